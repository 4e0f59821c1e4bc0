"""The six degradations against Pillow and OpenCV, their recipes, and the prompts that name them."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance

import degrade


def levels(image):
    return np.asarray(image, np.float64)


def flat(level, size=(400, 400), mode="RGB"):
    return Image.new(mode, size, (level,) * 3 if mode == "RGB" else level)


def test_gaussian_noise_has_its_sigma_in_each_channel_and_none_in_common(rng):
    noise = levels(degrade.gaussian_noise(flat(128), rng, sigma=25)) - 128
    assert np.allclose(noise.std((0, 1)), 25, atol=0.3)
    assert np.allclose(noise.mean((0, 1)), 0, atol=0.3)
    between_channels = np.corrcoef(noise.reshape(-1, 3).T)
    assert abs(between_channels - np.eye(3)).max() < 0.01
    between_neighbours = np.corrcoef(noise[:, 1:, 0].ravel(), noise[:, :-1, 0].ravel())
    assert abs(between_neighbours[0, 1]) < 0.01


def test_gaussian_noise_rounds_and_clips(rng):
    dark = levels(degrade.gaussian_noise(flat(0), rng, sigma=25))
    # P(N(0, 25) < 0.5): a truncating cast would leave more zeros
    assert abs((dark == 0).mean() - 0.508) < 0.005
    assert dark.max() > 80


@pytest.mark.parametrize("scale", [1, 3, 5])
def test_poisson_noise_variance_is_scale_times_level(scale, rng):
    noisy = levels(degrade.poisson_noise(flat(90), rng, scale=scale))
    assert abs(noisy.mean() - 90) < 0.2
    assert abs(noisy.var() / (90 * scale) - 1) < 0.02
    assert set(np.unique(noisy % scale)) == {0}


@pytest.mark.parametrize("quality", [10, 40])
def test_jpeg_is_pillows(photo, rng, quality):
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    ours = degrade.jpeg(photo, rng, quality=quality)
    assert np.array_equal(levels(ours), levels(Image.open(buffer)))


@pytest.mark.parametrize("kernel", [3, 5, 7, 9, 11])
@pytest.mark.parametrize("size", [(512, 512), (37, 61), (4, 3), (1, 9)])
def test_gaussian_blur_is_opencvs(photo, rng, kernel, size):
    image = photo.crop((100, 100, 100 + size[0], 100 + size[1]))
    ours = levels(degrade.gaussian_blur(image, rng, kernel=kernel))
    border = cv2.BORDER_REFLECT_101
    theirs = cv2.GaussianBlur(np.asarray(image), (kernel, kernel), 0, borderType=border)
    # kernels of 256ths: equal; OpenCV rounds the widest one's weights
    allowed = 1 if kernel == 11 else 0
    assert abs(ours - theirs.astype(float)).max() <= allowed


@pytest.mark.parametrize(
    "factor, small", [(2, (256, 200)), (3, (171, 133)), (2.5, (205, 160)), (4, (128, 100))]
)
def test_downscale_is_pillows_bicubic(photo, rng, factor, small):
    image = photo.crop((0, 0, 512, 400))
    expected = image.resize(small, Image.BICUBIC).resize(image.size, Image.BICUBIC)
    assert np.array_equal(levels(degrade.downscale(image, rng, factor=factor)), levels(expected))


def test_color_jitter_is_brightness_then_contrast(photo, rng):
    ours = levels(degrade.color_jitter(photo, rng, brightness=1.2, contrast=0.8))
    bright = np.floor(np.minimum(levels(photo) * np.float32(1.2), 255))
    grey = Image.fromarray(bright.astype(np.uint8)).convert("L")
    mean = int(levels(grey).mean() + 0.5)
    assert abs(ours - (mean + 0.8 * (bright - mean))).max() <= 1
    brighter = ImageEnhance.Brightness(photo).enhance(1.2)
    assert np.array_equal(ours, levels(ImageEnhance.Contrast(brighter).enhance(0.8)))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", degrade.DEGRADATIONS)
def test_every_degradation_keeps_size_and_mode_and_follows_its_generator(photo, name, mode):
    apply = degrade.DEGRADATIONS[name]
    image = photo.crop((0, 0, 51, 33)).convert(mode)
    first = apply(image, np.random.default_rng(1))
    again = apply(image, np.random.default_rng(1))
    other = apply(image, np.random.default_rng(2))
    assert first.size == image.size
    assert first.mode == mode
    assert np.array_equal(levels(first), levels(again))
    assert not np.array_equal(levels(first), levels(image))
    if name != "gaussian_blur":  # of five kernels, two seeds may draw the same
        assert not np.array_equal(levels(first), levels(other))


@pytest.mark.parametrize("name", degrade.DEGRADATIONS)
def test_other_modes_become_rgb(photo, name):
    image = photo.crop((0, 0, 51, 33)).convert("P")
    assert degrade.DEGRADATIONS[name](image, np.random.default_rng(1)).mode == "RGB"


def test_strengths_are_drawn_from_the_documented_ranges():
    choices = [(name, {}) for name in degrade.DEGRADATIONS]
    drawn = {}
    for seed in range(300):
        for _, strengths in degrade.draw_recipe(choices, 6, np.random.default_rng(seed)):
            for key, value in strengths.items():
                drawn.setdefault(key, []).append(value)
    documented = {
        "sigma": (5, 50),
        "scale": (1, 5),
        "quality": (10, 40),
        "kernel": (3, 11),
        "factor": (2, 4),
        "brightness": (0.8, 1.2),
        "contrast": (0.8, 1.2),
    }
    assert drawn.keys() == documented.keys()
    for key, (low, high) in documented.items():
        margin = 0.1 * (high - low)
        assert low <= min(drawn[key]) < low + margin, key
        assert high - margin < max(drawn[key]) <= high, key
    assert set(drawn["kernel"]) == {3, 5, 7, 9, 11}
    assert set(drawn["quality"]) == set(range(10, 41))


def test_recipes_are_distinct_and_in_random_order():
    choices = degrade.parse_degradations(degrade.DEFAULT_DEGRADATIONS)
    recipes = []
    for seed in range(400):
        recipe = degrade.draw_recipe(choices, 3, np.random.default_rng(seed))
        recipes.append([name for name, _ in recipe])
    for names in recipes:
        assert len(set(names)) == 3
        assert "color_jitter" not in names
    for position in range(3):
        there = [names[position] for names in recipes]
        for name in degrade.DEFAULT_DEGRADATIONS:
            assert there.count(name) > 50  # 80 expected


def test_random_degradation_is_deterministic(photo):
    small = photo.crop((0, 0, 64, 64))
    first = levels(degrade.random_degradation(small))
    assert np.array_equal(first, levels(degrade.random_degradation(small)))
    other = levels(degrade.random_degradation(small, rng=np.random.default_rng(5)))
    assert not np.array_equal(other, levels(small))


def test_prompts_name_what_was_done():
    names = ["jpeg", "gaussian_blur"]
    prompts = {degrade.make_prompt(names, np.random.default_rng(i)) for i in range(100)}
    assert len(prompts) > 20
    for prompt in prompts:
        for name in names:
            assert any(phrase in prompt for phrase in degrade.DEGRADATIONS[name].phrases)
        assert degrade.read_prompt(prompt) == names
    assert degrade.make_prompt([], np.random.default_rng(0)) == ""


def test_recipes_can_be_written_down_and_read_back():
    choices = degrade.parse_degradations(["jpeg:quality=20", "gaussian_noise:sigma=25"])
    recipe = degrade.draw_recipe(choices, 2, np.random.default_rng(0))
    assert sorted(recipe) == [("gaussian_noise", {"sigma": 25.0}), ("jpeg", {"quality": 20})]
    assert degrade.parse_degradations(degrade.describe(recipe).split()) == recipe


BAD_RECIPES = {  # and what is said
    "blur": "unknown degradation 'blur'; there are gaussian_noise",
    "jpeg:sigma=3": "write it like jpeg:quality=NUMBER",
    "jpeg:quality=x": "give a whole number from 1 to 100",
    "jpeg:quality=0": "give a whole number from 1 to 100",
    "jpeg:quality=20.5": "give a whole number from 1 to 100",
    "gaussian_blur:kernel=4": "give an odd number from 1 to 999",
    "downscale:factor=0.5": "give a number from 1 to 1000000",
    "gaussian_noise:sigma=nan": "give a number from 0 to 1000000",
    "poisson_noise:scale=inf": "give a number from 0.01 to 1000000",
    "jpeg jpeg": "named twice",
}


@pytest.mark.parametrize("words", BAD_RECIPES)
def test_bad_recipes_are_refused(words):
    with pytest.raises(degrade.UserError, match=BAD_RECIPES[words]):
        degrade.parse_degradations(words.split())


def test_what_a_script_asks_for_is_done_or_refused(photo, rng):
    small = photo.crop((0, 0, 8, 8))
    with pytest.raises(TypeError, match="sigma"):
        degrade.DEGRADATIONS["jpeg"](small, rng, sigma=25)
    with pytest.raises(ValueError, match="there are 5"):
        degrade.random_degradation(small, num_degradations=6)


BAD_COMMANDS = {
    "--num_degradations 6": "a number from 1 to 5",
    "--only jpeg --num_degradations 2": "not allowed with",
    "--only jpeg --preview": "not allowed with",
    "--preview --num_degradations 3": "not allowed with",
}


@pytest.mark.parametrize("words", BAD_COMMANDS)
def test_flags_without_effect_are_refused(words, photo, tmp_path, monkeypatch):
    photo.crop((0, 0, 8, 8)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["degrade.py", "a.png", "o.png", *words.split()])
    with pytest.raises(degrade.UserError, match=BAD_COMMANDS[words]):
        degrade.main()


def test_the_sheet_shows_every_degradation(photo, rng, monkeypatch):
    invert = degrade.Degradation(lambda image, rng: image.point(lambda x: 255 - x), {}, ("x",))
    more = {"seventh": invert, "eighth": invert}
    monkeypatch.setattr(degrade, "DEGRADATIONS", degrade.DEGRADATIONS | more)
    small = photo.resize((60, 40))
    sheet = degrade.contact_sheet(small, rng)
    assert sheet.size == (4 * 60, 3 * 40)
    below_label = 0, 20, 60, 40
    last = sheet.crop((0, 80, 60, 120)).crop(below_label)
    assert np.array_equal(levels(last), 255 - levels(small.crop(below_label)))
