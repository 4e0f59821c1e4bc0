"""Degradations against Pillow and OpenCV, recipes, prompts; and how every picture is opened."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageEnhance, ImageOps
from tifffile import imwrite

import degrade
from degrade import UserError, open_image, read_header


def levels(image):
    return np.asarray(image, np.float64)


def flat(level):
    return Image.new("RGB", (400, 400), (level,) * 3)


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


@pytest.mark.parametrize("scale", [1, 5])
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


@pytest.mark.parametrize("factor, small", [(3, (171, 133)), (2.5, (205, 160))])
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


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
@pytest.mark.parametrize("name", degrade.DEGRADATIONS)
def test_every_degradation_keeps_size_and_mode_and_follows_its_generator(photo, name, mode):
    apply = degrade.DEGRADATIONS[name]
    image = photo.crop((0, 0, 51, 33)).convert(mode)
    first = apply(image, np.random.default_rng(1))
    again = apply(image, np.random.default_rng(1))
    other = apply(image, np.random.default_rng(2))
    assert first.size == image.size
    assert first.mode == ("L" if mode == "L" else "RGB")
    assert np.array_equal(levels(first), levels(again))
    assert not np.array_equal(levels(first), levels(image.convert(first.mode)))
    if name != "gaussian_blur":  # of five kernels, two seeds may draw the same
        assert not np.array_equal(levels(first), levels(other))


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


def test_prompts_name_what_was_done():
    names = ["jpeg", "gaussian_blur"]
    prompts = {degrade.make_prompt(names, np.random.default_rng(i)) for i in range(100)}
    assert len(prompts) > 20
    for prompt in prompts:
        for name in names:
            assert any(phrase in prompt for phrase in degrade.DEGRADATIONS[name].phrases)


def test_recipes_can_be_written_down_and_read_back():
    choices = degrade.parse_degradations(["jpeg:quality=20", "gaussian_noise:sigma=25"])
    recipe = degrade.draw_recipe(choices, 2, np.random.default_rng(0))
    assert sorted(recipe) == [("gaussian_noise", {"sigma": 25.0}), ("jpeg", {"quality": 20})]
    assert degrade.parse_degradations(degrade.describe(recipe).split()) == recipe


BAD_RECIPES = {  # and what is said
    "blur": "unknown degradation 'blur'; there are gaussian_noise",
    "jpeg:sigma=3": "write it like jpeg:quality=NUMBER",
    "jpeg:quality=x": "give a whole number from 1 to 100",
    "gaussian_blur:kernel=4": "give an odd number from 1 to 999",
    "gaussian_noise:sigma=nan": "give a number from 0 to 1000000",
    "jpeg jpeg": "named twice",
    "jpeg:quality=20:quality=30": "write it like jpeg:quality=NUMBER",
}


def test_bad_recipes_are_refused():
    for words, says in BAD_RECIPES.items():
        with pytest.raises(UserError, match=says):
            degrade.parse_degradations(words.split())


def test_what_a_script_asks_for_is_done_or_refused(photo, rng):
    small = photo.crop((0, 0, 8, 8))
    first = levels(degrade.random_degradation(small))
    assert np.array_equal(first, levels(degrade.random_degradation(small)))
    with pytest.raises(TypeError, match="sigma"):
        degrade.DEGRADATIONS["jpeg"](small, rng, sigma=25)
    with pytest.raises(ValueError, match="there are 5"):
        degrade.random_degradation(small, num_degradations=6)


BAD_COMMANDS = {
    "--num_degradations 6": "a number from 1 to 5",
    "--only jpeg --num_degradations 2": "not allowed with",
    "--only jpeg --preview": "not allowed with",
}


def test_flags_without_effect_are_refused(monkeypatch):
    for words, says in BAD_COMMANDS.items():
        monkeypatch.setattr("sys.argv", ["degrade.py", "a.png", "o.png", *words.split()])
        with pytest.raises(UserError, match=says):
            degrade.main()


def test_the_sheet_shows_every_degradation(photo, rng, monkeypatch):
    invert = degrade.Degradation(lambda image, rng: image.point(lambda x: 255 - x), {}, ("x",))
    more = {"seventh": invert, "eighth": invert}
    monkeypatch.setattr(degrade, "DEGRADATIONS", degrade.DEGRADATIONS | more)
    small = photo.resize((60, 40))
    sheet = degrade.contact_sheet(small, rng)
    assert sheet.size == (4 * 60, 3 * 40)
    last = sheet.crop((0, 100, 60, 120))  # below its label
    assert np.array_equal(levels(last), 255 - levels(small.crop((0, 20, 60, 40))))


# --------------------------------------------------------------------------------------------------
# Pictures.


def coordinates(width=40, height=30):
    """Every pixel tells where it is: red = 6 * column, green = 6 * row."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([6 * x, 6 * y, 0 * x], 2).astype(np.uint8))


MODES_OF_FILES = [  # as stored, name, as opened, whether something is said
    ("P", "palette.png", "RGB", False),
    ("1", "one.png", "L", False),
    ("CMYK", "cmyk.jpg", "RGB", True),
    ("LAB", "lab.tif", "RGB", True),
    ("LA", "la.png", "LA", False),
    ("RGBA", "rgba.png", "RGBA", False),
]


@pytest.mark.parametrize("mode, name, mode_read, said", MODES_OF_FILES)
def test_a_picture_is_grey_or_rgb_perhaps_with_alpha(tmp_path, photo, mode, name, mode_read, said):
    small = photo.crop((0, 0, 20, 10))
    stored = Image.merge("LAB", small.split()) if mode == "LAB" else small.convert(mode)
    stored.save(tmp_path / name)
    notices = {}
    opened = open_image(tmp_path / name, notices)
    assert opened.mode == mode_read
    assert opened.tobytes() == Image.open(tmp_path / name).convert(mode_read).tobytes()
    header = read_header(tmp_path / name)
    assert (header.mode, header.size) == (mode_read, (20, 10))
    assert header.notices == list(notices)
    assert bool(notices) == said


def deep(channels):
    return np.random.default_rng(0).integers(0, 65536, (30, 20, channels), dtype=np.uint16)


def save_pages(path):
    first = coordinates()
    first.save(path, save_all=True, append_images=[ImageOps.mirror(first)])


def save_planar(path):
    imwrite(path, np.moveaxis(deep(3), 2, 0), planarconfig="separate", photometric="rgb")


NOT_OPENED = {  # name: (how it is written, what is said)
    "grey.png": (lambda path: Image.fromarray(deep(1)[..., 0]).save(path), "8 bits a channel"),
    "rgb.png": (lambda path: cv2.imwrite(str(path), deep(3)), "8 bits a channel"),
    "planar.tif": (save_planar, "8 bits a channel"),
    "floats.tif": (lambda path: coordinates().convert("F").save(path), "8 bits a channel"),
    "rgb.sgi": (lambda path: coordinates().save(path, bpc=2), "8 bits a channel"),
    "pages.tif": (save_pages, "several pages; save the page"),
    "moving.gif": (save_pages, "several pages; save the page"),
    "program.eps": (lambda path: coordinates().save(path), "PostScript"),
}


@pytest.mark.parametrize("name", NOT_OPENED)
def test_what_would_lose_something_is_refused_by_header_and_loader(tmp_path, name):
    save, says = NOT_OPENED[name]
    save(tmp_path / name)
    for look in (read_header, open_image):
        with pytest.raises(UserError, match=f"{name}: .*{says}.* PNG"):
            look(tmp_path / name)


def test_what_only_looks_like_it_is_opened(tmp_path):
    """A phone's photo with a preview; colours of 5 and 6 bits, whose raw mode is BGR;16."""
    save_pages(tmp_path / "photo.mpo")
    assert open_image(tmp_path / "photo.mpo").size == (40, 30)
    head = struct.pack("<2sIIIIiiHHIIiiII", b"BM", 70, 0, 66, 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    (tmp_path / "565.bmp").write_bytes(head + masks + struct.pack("<HH", 0xF800, 0x07E0))
    assert levels(open_image(tmp_path / "565.bmp")).tolist() == [[[255, 0, 0], [0, 255, 0]]]


TURNS = {  # {EXIF orientation: what turns an array of the picture upright}
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: np.flipud(np.rot90(x)),
    6: lambda x: np.rot90(x, 3),
    7: lambda x: np.fliplr(np.rot90(x)),
    8: np.rot90,
    9: lambda x: x,  # there is none
}


@pytest.mark.parametrize("mode, extension", [("L", "tif"), ("RGB", "jpg"), ("RGBA", "tif")])
@pytest.mark.parametrize("orientation", TURNS)
def test_a_picture_is_turned_upright(tmp_path, orientation, mode, extension):
    """A grey TIFF, and one with alpha, are mapped into memory, where Pillow 13 garbles them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{extension}"
    coordinates().convert(mode).save(path, exif=exif)
    plain = tmp_path / f"plain.{extension}"
    coordinates().convert(mode).save(plain)
    opened = open_image(path)
    expected = levels(Image.open(plain).convert(opened.mode))
    assert np.array_equal(levels(opened), TURNS[orientation](expected))
    header = read_header(path)
    assert (header.size, header.mode) == (opened.size, opened.mode)


def test_orientation_may_stand_behind_the_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    coordinates().save(path, exif=exif)
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    last = content.index(b"IEND") - 4
    path.write_bytes(content[:start] + content[end:last] + content[start:end] + content[last:])
    assert "exif" not in Image.open(path).info
    assert read_header(path).size == open_image(path).size == (30, 40)


def display_p3(name="swap"):
    """A profile made from sRGB's, under a name of four letters: red is green, green is red."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    table = srgb[128:]
    count = int.from_bytes(table[:4], "big")
    places = {}
    for i in range(count):
        entry = table[4 + 12 * i : 16 + 12 * i]
        places[entry[:4]] = 128 + 4 + 12 * i
    swapped = bytearray(srgb)
    red, green = places[b"rXYZ"], places[b"gXYZ"]
    swapped[red : red + 4], swapped[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(swapped).replace("sRGB".encode("utf-16-be"), name.encode("utf-16-be"))


@pytest.mark.parametrize("kind", ["plain", "alpha", "turned"])
def test_a_profile_is_converted_to_srgb(tmp_path, photo, kind, capsys):
    small = photo.resize((40, 30))
    red, green, blue = small.split()
    swapped = Image.merge("RGB", (green, red, blue))
    exif = Image.Exif()
    if kind == "turned":
        exif[0x0112] = 6
        small = small.transpose(Image.Transpose.ROTATE_270)
    if kind == "alpha":
        small.putalpha(red)
        swapped.putalpha(red)
    path = tmp_path / "swapped.png"
    swapped.save(path, icc_profile=display_p3(), exif=exif)
    notices = {}
    opened = open_image(path, notices)
    assert opened.mode == small.mode
    assert abs(levels(opened) - levels(small)).max() <= 1
    assert opened.info == {}
    open_image(path, notices)
    degrade.say_notices(notices)
    says = f"2 pictures, such as {path}: its colour profile is converted to sRGB\n"
    assert capsys.readouterr().err == says


def test_which_profiles_are_converted(tmp_path):
    """Not sRGB's own, whatever its name; another may have sRGB's name."""
    path = tmp_path / "a.png"
    grey = coordinates().convert("L")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    cases = [
        (coordinates(), srgb, ""),
        (coordinates(), srgb.replace("sRGB".encode("utf-16-be"), "any ".encode("utf-16-be")), ""),
        (coordinates(), display_p3("sRGB"), "is converted to sRGB"),
        (coordinates(), b"nothing", "damaged"),
        (grey, display_p3(), "not of its kind of picture"),
    ]
    for image, profile, says in cases:
        image.save(path, icc_profile=profile)
        notices = {}
        opened = open_image(path, notices)
        assert len(notices) == bool(says) and says in "".join(notices)
        if "converted" not in says:
            assert np.array_equal(levels(opened), levels(image))


def test_degrade_takes_alpha_only_if_it_hides_nothing(tmp_path, monkeypatch):
    image = coordinates().convert("RGBA")
    image.save(tmp_path / "a.png")
    words = ["--only", "gaussian_noise:sigma=0"]
    monkeypatch.setattr("sys.argv", ["degrade.py", "a.png", "o.png", *words])
    monkeypatch.chdir(tmp_path)
    degrade.main()
    assert np.array_equal(levels(Image.open(tmp_path / "o.png")), levels(coordinates()))
    image.putpixel((3, 3), (1, 2, 3, 254))
    image.save(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png has transparent pixels"):
        degrade.main()


def test_a_picture_that_is_made_plain_keeps_its_name(photo, tmp_path):
    photo.resize((9, 7)).save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as image:
        degrade.plain_image(image, degrade.describe_picture(image))
        assert str(image.filename) == str(tmp_path / "a.tif")


def png_chunk(kind, content):
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def add_chunks(path, *chunks):
    """Put chunks into a PNG, behind its header."""
    content = path.read_bytes()
    path.write_bytes(content[:33] + b"".join(chunks) + content[33:])


CHROMATICITY = [31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000]
ADOBE = [31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000]
CLAIMS = {  # what stands in a PNG: (chunks, whether something is said)
    "nothing": ([], False),
    "gAMA of sRGB": ([(b"gAMA", struct.pack(">I", 45455))], False),
    "gAMA 1.0": ([(b"gAMA", struct.pack(">I", 100000))], True),
    "cHRM of sRGB": ([(b"cHRM", struct.pack(">8I", *CHROMATICITY))], False),
    "cHRM of Adobe RGB": ([(b"cHRM", struct.pack(">8I", *ADOBE))], True),
    "sRGB goes before gAMA": ([(b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 100000))], False),
    "cICP of sRGB": ([(b"cICP", b"\x01\x0d\0\1")], False),
    "cICP of Display P3": ([(b"cICP", b"\x0c\x0d\0\1")], True),
    "cICP of a narrow range": ([(b"cICP", b"\x01\x0d\0\0")], True),
    "cICP of BT.2100 PQ": ([(b"cICP", b"\x09\x10\0\1")], True),
    "cICP goes before gAMA": (
        [(b"cICP", b"\x01\x0d\0\1"), (b"gAMA", struct.pack(">I", 100000))],
        False,
    ),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_what_a_png_says_about_its_colours_is_not_ignored(tmp_path, name):
    chunks, said = CLAIMS[name]
    path = tmp_path / "a.png"
    coordinates().save(path)
    add_chunks(path, *[png_chunk(*chunk) for chunk in chunks])
    notices = {}
    assert np.array_equal(levels(open_image(path, notices)), levels(coordinates()))
    assert [("not sRGB, without a profile" in text) for text in notices] == [True] * said
    assert read_header(path).notices == list(notices)


@pytest.mark.parametrize("codes, said", [((1, 13), False), ((2, 2), False), ((12, 13), True)])
def test_what_an_avif_says_about_its_colours_is_not_ignored(tmp_path, codes, said):
    path = tmp_path / "a.avif"
    coordinates().save(path)
    content = path.read_bytes()
    at = content.index(b"nclx") + 4
    path.write_bytes(content[:at] + struct.pack(">HH", *codes) + content[at + 4 :])
    assert bool(read_header(path).notices) == said


def test_what_a_tiff_says_about_its_colours_is_not_ignored(tmp_path):
    for primaries, said in ((CHROMATICITY, False), (ADOBE, True)):
        tags = {319: tuple(number / 100_000 for number in primaries[2:])}
        coordinates().save(tmp_path / "a.tif", tiffinfo=tags)
        assert 319 in Image.open(tmp_path / "a.tif").tag_v2
        assert bool(read_header(tmp_path / "a.tif").notices) == said


def test_the_profile_of_a_jpeg2000_is_converted(tmp_path):
    path = tmp_path / "a.jp2"
    coordinates().save(path)
    content = path.read_bytes()
    head, color = content.index(b"jp2h"), content.index(b"colr")  # a box is its length, its name...
    profile = b"colr\2\0\0" + display_p3()
    longer = int.from_bytes(content[head - 4 : head], "big") - 15 + len(profile) + 4
    start = content[: head - 4] + struct.pack(">I", longer) + content[head : color - 4]
    path.write_bytes(start + struct.pack(">I", len(profile) + 4) + profile + content[color + 11 :])
    red, green, blue = coordinates().split()
    assert "converted to sRGB" in read_header(path).notices[0]
    expected = levels(Image.merge("RGB", (green, red, blue)))
    assert abs(levels(open_image(path)) - expected).max() <= 1


DEEP = {  # of a format that Pillow cuts to 8 bits: {where a depth stands: what is added to it}
    "jp2": {(b"\xff\x51", 38): 4, (b"\xff\x51", 41): 4, (b"\xff\x51", 44): 4},
    "avif": {(b"pixi", 5): 2, (b"pixi", 6): 2, (b"pixi", 7): 2, (b"av1C", 2): 64},
}


@pytest.mark.parametrize("extension", DEEP)
def test_more_than_8_bits_are_told_where_pillow_cuts_them(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    coordinates().save(path)
    content = bytearray(path.read_bytes())
    assert read_header(path).mode == "RGB"
    for (mark, offset), more in DEEP[extension].items():
        content[content.index(mark) + len(mark) + offset] += more
    path.write_bytes(content)
    for look in (read_header, open_image):
        with pytest.raises(UserError, match="more than 8 bits a channel"):
            look(path)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
@pytest.mark.parametrize("space, index, said", [(1, "R98", False), (65535, "R03", True)])
def test_exif_says_adobe_rgb(tmp_path, extension, space, index, said):
    exif = Image.Exif()
    exif[0x0112] = 1
    ifd = exif.get_ifd(ExifTags.IFD.Exif)
    ifd[ExifTags.Base.ColorSpace] = space
    ifd[ExifTags.IFD.Interop] = {1: index}
    path = tmp_path / f"a.{extension}"
    coordinates().save(path, exif=exif)
    assert bool(read_header(path).notices) == said


def test_pictures_of_up_to_a_gigapixel_open(tmp_path):
    """More than Pillow would; what is larger is refused by its header."""
    path = tmp_path / "a.png"
    for width, height in ((20_000, 10_000), (40_000, 25_001)):
        head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        end = png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + end)
        if width == 20_000:
            assert read_header(path).size == (width, height)
        else:
            for look in (read_header, open_image):
                with pytest.raises(UserError, match="40000x25001 pixels, over 1,000,000,000; make"):
                    look(path)


@pytest.mark.parametrize("name", ["photo.heic", "photo.jpg"])
def test_a_photo_of_another_format_is_refused_with_advice(tmp_path, name):
    content = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)
    (tmp_path / name).write_bytes(content)
    for look in (read_header, open_image):
        with pytest.raises(UserError, match=f"{name}: .* HEIC; save it as JPEG or PNG"):
            look(tmp_path / name)


# --------------------------------------------------------------------------------------------------
# Writing.

KEPT = {  # what each format that is written keeps: {mode}
    ".png": {"L", "LA", "RGB", "RGBA"},
    ".tif": {"L", "LA", "RGB", "RGBA"},
    ".tga": {"L", "LA", "RGB", "RGBA"},
    ".jp2": {"L", "LA", "RGB", "RGBA"},
    ".webp": {"L", "LA", "RGB", "RGBA"},
    ".avif": {"L", "LA", "RGB", "RGBA"},
    ".bmp": {"L", "RGB"},
    ".ppm": {"L", "RGB"},
    ".jpeg": {"L", "RGB"},
    ".gif": set(),
    ".ico": set(),
    ".icns": set(),
    ".pcx": set(),
    ".pdf": set(),
    ".xyz": set(),
    "": set(),
}


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("extension", KEPT)
def test_what_is_written_keeps_size_levels_and_alpha(tmp_path, photo, extension, mode):
    image = photo.resize((300, 290)).convert(mode)
    if mode.endswith("A"):
        image.putalpha(photo.convert("L").resize((300, 290)))
    notices = {}
    path = degrade.choose_output(tmp_path / f"a{extension}", mode, notices)
    kept = mode in KEPT[extension]
    assert path.name == (f"a{extension}" if kept else "a.png")
    assert bool(notices) != kept
    degrade.save_image(image, path)
    written = Image.open(path)
    assert written.size == image.size
    assert written.has_transparency_data == mode.endswith("A")
    largest = {".jpeg": 4, ".avif": 4}.get(path.suffix, 0)
    visible = levels(image)
    difference = abs(levels(written.convert(mode)) - visible)
    if mode.endswith("A"):
        difference = difference[visible[..., -1] > 0]  # what cannot be seen may change
    assert difference.max() <= largest


@pytest.mark.parametrize("name, side", [("a.webp", 16383), ("a.jpg", 65500), ("a.tga", 65535)])
def test_a_side_that_a_format_does_not_hold_is_refused(tmp_path, name, side):
    degrade.save_image(Image.new("L", (side, 1)), tmp_path / name)
    assert Image.open(tmp_path / name).size == (side, 1)
    with pytest.raises(UserError, match=f"at most {side:,} pixels, not {side + 1:,}; name a .png"):
        degrade.save_image(Image.new("L", (side + 1, 1)), tmp_path / f"b{name}")
    assert len(list(tmp_path.iterdir())) == 1


def test_degrade_adds_no_loss_of_its_own_or_says_so(photo, tmp_path, monkeypatch, capsys):
    photo.save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    written = {}
    for name in ("n.png", "n.jpg", "n.webp", "n.avif", "g.gif"):
        words = [name, "--only", "gaussian_noise:sigma=25"]
        monkeypatch.setattr("sys.argv", ["degrade.py", "a.png", *words])
        degrade.main()
        said = capsys.readouterr()
        assert ("loses detail" in said.out) == (name in ("n.jpg", "n.avif"))
        assert (".gif: not a format" in said.err) == (name == "g.gif")
        if name == "g.gif":
            assert not (tmp_path / name).exists()
            name = "g.png"
        written[name] = levels(Image.open(tmp_path / name))
    monkeypatch.setattr("sys.argv", ["degrade.py", "a.png", "."])
    with pytest.raises(UserError, match="a folder; name a picture in it"):
        degrade.main()
    for name, picture in written.items():
        error = np.sqrt(np.mean((picture - written["n.png"]) ** 2.0))
        assert error < (1 if name in ("n.jpg", "n.avif") else 1e-9)


TAKEN = [("a.png", "a.png"), ("a.jpg", "./a.jpg"), ("a.png", "b.gif")]


@pytest.mark.parametrize("given, out", TAKEN)
def test_degrade_writes_over_nothing_that_was_not_named(tmp_path, monkeypatch, given, out):
    for name in (given, "b.png"):
        coordinates().save(tmp_path / name)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["degrade.py", given, out])
    with pytest.raises(UserError, match="is there already"):
        degrade.main()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.setattr("sys.argv", ["degrade.py", given, "./b.png"])
    degrade.main()  # that was named
    assert (tmp_path / "b.png").read_bytes() != before["b.png"]


@pytest.mark.parametrize("name", ["x" * 251 + ".png", "é" * 125 + ".json"])
def test_a_name_at_the_limit_is_written(tmp_path, name):
    assert len(name.encode()) == 255
    with degrade.atomic_write(tmp_path / name) as partial:
        partial.write_text("a")
    assert (tmp_path / name).read_text() == "a"
    with pytest.raises(UserError, match="cannot write"), degrade.atomic_write(tmp_path / name):
        raise OSError("no space left")
    assert [path.name for path in tmp_path.iterdir()] == [name]
