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
    assert np.allclose(noise.std((0, 1)), 25, atol=0.3) and np.allclose(noise.mean((0, 1)), 0, atol=0.3)
    assert abs(np.corrcoef(noise.reshape(-1, 3).T) - np.eye(3)).max() < 0.01
    assert abs(np.corrcoef(noise[:, 1:, 0].ravel(), noise[:, :-1, 0].ravel())[0, 1]) < 0.01


def test_gaussian_noise_rounds_and_clips(rng):
    dark = levels(degrade.gaussian_noise(flat(0), rng, sigma=25))
    assert abs((dark == 0).mean() - 0.508) < 0.005  # P(N(0, 25) < 0.5): a truncating cast would leave more zeros
    assert dark.max() > 80


@pytest.mark.parametrize("scale", [1, 3, 5])
def test_poisson_noise_variance_is_scale_times_level(scale, rng):
    noisy = levels(degrade.poisson_noise(flat(90), rng, scale=scale))
    assert abs(noisy.mean() - 90) < 0.2 and abs(noisy.var() / (90 * scale) - 1) < 0.02
    assert set(np.unique(noisy % scale)) == {0}


@pytest.mark.parametrize("quality", [10, 40])
def test_jpeg_is_pillows(photo, rng, quality):
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    assert np.array_equal(levels(degrade.jpeg(photo, rng, quality=quality)), levels(Image.open(buffer)))


@pytest.mark.parametrize("kernel", [3, 5, 7, 9, 11])
@pytest.mark.parametrize("size", [(512, 512), (37, 61), (4, 3), (1, 9)])
def test_gaussian_blur_is_opencvs(photo, rng, kernel, size):
    image = photo.crop((100, 100, 100 + size[0], 100 + size[1]))
    ours = levels(degrade.gaussian_blur(image, rng, kernel=kernel))
    theirs = cv2.GaussianBlur(np.asarray(image), (kernel, kernel), 0, borderType=cv2.BORDER_REFLECT_101).astype(float)
    assert abs(ours - theirs).max() <= (kernel == 11)  # kernels of 256ths: equal; OpenCV rounds the widest one's weights


@pytest.mark.parametrize("factor, small", [(2, (256, 200)), (3, (171, 133)), (2.5, (205, 160)), (4, (128, 100))])
def test_downscale_is_pillows_bicubic(photo, rng, factor, small):
    image = photo.crop((0, 0, 512, 400))
    expected = image.resize(small, Image.BICUBIC).resize(image.size, Image.BICUBIC)
    assert np.array_equal(levels(degrade.downscale(image, rng, factor=factor)), levels(expected))


def test_color_jitter_is_brightness_then_contrast(photo, rng):
    ours = levels(degrade.color_jitter(photo, rng, brightness=1.2, contrast=0.8))
    bright = np.floor(np.minimum(levels(photo) * np.float32(1.2), 255))
    grey = int(levels(Image.fromarray(bright.astype(np.uint8)).convert("L")).mean() + 0.5)
    assert abs(ours - (grey + 0.8 * (bright - grey))).max() <= 1
    assert np.array_equal(ours, levels(ImageEnhance.Contrast(ImageEnhance.Brightness(photo).enhance(1.2)).enhance(0.8)))


@pytest.mark.parametrize("name", degrade.DEGRADATIONS)
def test_every_degradation_keeps_size_and_mode_and_follows_its_generator(photo, name):
    for image in (photo.crop((0, 0, 51, 33)), photo.crop((0, 0, 51, 33)).convert("L")):
        a, b, c = (degrade.DEGRADATIONS[name](image, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert a.size == image.size and a.mode == image.mode
        assert np.array_equal(levels(a), levels(b)) and not np.array_equal(levels(a), levels(image))
        assert not np.array_equal(levels(a), levels(c)) or name == "gaussian_blur"
    assert degrade.DEGRADATIONS[name](image.convert("P"), np.random.default_rng(1)).mode == "RGB"


def test_strengths_are_drawn_from_the_documented_ranges():
    drawn = {}
    for seed in range(300):
        for name, strengths in degrade.draw_recipe([(n, {}) for n in degrade.DEGRADATIONS], 6, np.random.default_rng(seed)):
            for key, value in strengths.items():
                drawn.setdefault(key, []).append(value)
    for key, low, high in [("sigma", 5, 50), ("scale", 1, 5), ("quality", 10, 40), ("kernel", 3, 11), ("factor", 2, 4),
                           ("brightness", 0.8, 1.2), ("contrast", 0.8, 1.2)]:
        assert low <= min(drawn[key]) < low + 0.1 * (high - low) and high - 0.1 * (high - low) < max(drawn[key]) <= high
    assert set(drawn["kernel"]) == {3, 5, 7, 9, 11} and set(drawn["quality"]) == set(range(10, 41))


def test_recipes_are_distinct_and_in_random_order():
    choices = degrade.parse_degradations(degrade.DEFAULT_DEGRADATIONS)
    recipes = [[n for n, _ in degrade.draw_recipe(choices, 3, np.random.default_rng(i))] for i in range(400)]
    assert all(len(set(r)) == 3 for r in recipes)
    for position in range(3):
        counts = [sum(r[position] == name for r in recipes) for name in degrade.DEFAULT_DEGRADATIONS]
        assert min(counts) > 50  # 80 expected each
    assert not any("color_jitter" in r for r in recipes)


def test_random_degradation_is_deterministic_and_prompts_name_what_was_done(photo):
    small = photo.crop((0, 0, 64, 64))
    assert np.array_equal(levels(degrade.random_degradation(small)), levels(degrade.random_degradation(small)))
    assert not np.array_equal(levels(degrade.random_degradation(small, rng=np.random.default_rng(5))), levels(small))
    prompts = {degrade.make_prompt(["jpeg", "gaussian_blur"], np.random.default_rng(i)) for i in range(100)}
    assert len(prompts) > 20
    for prompt in prompts:
        assert any(p in prompt for p in degrade.PHRASES["jpeg"]) and any(p in prompt for p in degrade.PHRASES["gaussian_blur"])
    assert degrade.make_prompt([], np.random.default_rng(0)) == ""


def test_recipes_can_be_written_down_and_read_back():
    recipe = degrade.draw_recipe(degrade.parse_degradations(["jpeg:quality=20", "gaussian_noise:sigma=25"]), 2, np.random.default_rng(0))
    assert sorted(recipe) == [("gaussian_noise", {"sigma": 25.0}), ("jpeg", {"quality": 20})]
    assert degrade.parse_degradations(degrade.describe(recipe).split()) == recipe


@pytest.mark.parametrize("words", [["blur"], ["jpeg:sigma=3"], ["jpeg:quality=x"], ["gaussian_blur:kernel=4"],
                                   ["jpeg:quality=0"], ["jpeg", "jpeg"], ["downscale:factor=0.5"], ["gaussian_noise:sigma=nan"]])
def test_bad_recipes_are_refused(words):
    with pytest.raises(degrade.UserError):
        degrade.parse_degradations(words)


# Opening pictures.

def test_open_image_modes(tmp_path, photo):
    small = photo.crop((0, 0, 20, 10))
    ramp = np.arange(200, dtype=np.uint16).reshape(10, 20) * 257
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: rotate by 90 degrees to see it upright
    cases = {"rgb.png": (small, "RGB"), "grey.png": (small.convert("L"), "L"), "palette.png": (small.convert("P"), "RGB"),
             "one.png": (small.convert("1"), "L"), "cmyk.jpg": (small.convert("CMYK"), "RGB"), "la.png": (small.convert("LA"), "LA"),
             "rgba.png": (small.convert("RGBA"), "RGBA"), "deep.png": (Image.fromarray(ramp), "L")}
    for name, (image, mode) in cases.items():
        image.save(tmp_path / name)
        assert degrade.open_image(tmp_path / name).mode == mode, name
    assert np.array_equal(np.asarray(degrade.open_image(tmp_path / "deep.png")), np.arange(200).reshape(10, 20))
    small.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(levels(degrade.open_image(tmp_path / "turned.png")), levels(small.transpose(Image.ROTATE_270)))


def test_open_image_names_the_file_that_it_cannot_read(tmp_path, photo):
    photo.save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    for name, data in [("empty.png", b""), ("text.png", b"hello"), ("cut.png", content[:len(content) // 2])]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(degrade.UserError, match=name):
            degrade.open_image(tmp_path / name)
    with pytest.raises(degrade.UserError, match="no such file"):
        degrade.open_image(tmp_path / "absent.png")
