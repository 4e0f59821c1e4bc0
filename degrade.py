"""Degradations: what the restorer learns to undo, and the prompts that name them.

A degradation takes a grey ("L") or RGB PIL image and a numpy Generator and returns an image of the
same mode and size, rounded and clipped to 0..255.
(Here sigma is the standard deviation of the noise in an image. In model.py it is the noise level
of the diffusion model.)
From "Errors and command lines" on, this file holds what all others share; skip it at first.

    python degrade.py photo.jpg noisy.png                      two random degradations
    python degrade.py photo.jpg noisy.png --only gaussian_noise:sigma=25
    python degrade.py photo.jpg sheet.png --preview            all of them, side by side
"""
import argparse
import contextlib
import hashlib
import io
import math
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageEnhance, ImageOps
from PIL import UnidentifiedImageError

# --------------------------------------------------------------------------------------------------
# The six degradations: plain functions of a grey ("L") or RGB image.


def gaussian_noise(image, rng, sigma):
    """Add independent N(0, sigma^2) noise to each pixel and channel. sigma: levels of 0..255."""
    levels = np.asarray(image, np.float32)
    return to_uint8(levels + sigma * rng.standard_normal(levels.shape, np.float32))


def poisson_noise(image, rng, scale):
    """Draw Poisson(x / scale) * scale: photon noise, whose variance scale * x grows with light.

    scale: levels of 0..255 per photon."""
    return to_uint8(rng.poisson(np.asarray(image) / scale) * scale)


def jpeg(image, rng, quality):
    """Compress with Pillow's JPEG, chroma at half resolution (4:2:0, its default)."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert(image.mode)


def gaussian_blur(image, rng, kernel):
    """Blur like OpenCV's GaussianBlur with sigma 0, within one level. kernel: odd width, pixels."""
    weights = gaussian_kernel(kernel)
    levels = np.asarray(image, np.float32)
    height, width = levels.shape[:2]
    margins = [(kernel // 2, kernel // 2)] * 2 + [(0, 0)]
    x = np.pad(levels, margins[: levels.ndim], "reflect")  # mirrors, does not repeat the edge
    x = sum(weights[k] * x[k : k + height] for k in range(kernel))  # down the columns
    x = sum(weights[k] * x[:, k : k + width] for k in range(kernel))  # along the rows
    return Image.fromarray((x + 0.5).astype(np.uint8))  # OpenCV rounds halves up


def gaussian_kernel(width):
    """Return OpenCV's weights: small kernels from a table of 256ths, others from a formula."""
    table = {
        3: [64, 128, 64],
        5: [16, 64, 96, 64, 16],
        7: [8, 28, 56, 72, 56, 28, 8],
        9: [4, 13, 30, 51, 60, 51, 30, 13, 4],
    }
    if width in table:
        weights = np.array(table[width], np.float32)
    else:
        sigma = 0.3 * ((width - 1) * 0.5 - 1) + 0.8
        weights = np.exp(-0.5 * ((np.arange(width, dtype=np.float32) - width // 2) / sigma) ** 2)
    return weights / weights.sum()


def downscale(image, rng, factor):
    """Resize down by factor and up again, both Pillow's bicubic (antialiased)."""
    width, height = image.size
    small = max(1, round(width / factor)), max(1, round(height / factor))
    bicubic = Image.Resampling.BICUBIC
    return image.resize(small, bicubic).resize(image.size, bicubic)


def color_jitter(image, rng, brightness, contrast):
    """Multiply brightness, then contrast about the grey mean (PIL's ImageEnhance)."""
    brighter = ImageEnhance.Brightness(image).enhance(brightness)
    return ImageEnhance.Contrast(brighter).enhance(contrast)


def to_uint8(levels):
    """Round and clip an array of levels to a PIL image."""
    return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))


# --------------------------------------------------------------------------------------------------
# The table. A seventh degradation is one function above and one entry here.


@dataclass(frozen=True)
class Strength:
    """The values of one parameter of a degradation: a range of integers, or (lowest, highest).

    drawn: what a recipe draws from, uniformly. legal: what a user may set."""

    drawn: tuple | range
    legal: tuple | range

    def draw(self, rng):
        if isinstance(self.drawn, range):
            return int(rng.choice(self.drawn))
        return float(rng.uniform(*self.drawn))

    def parse(self, text):
        """Return the number that a user has written. Raises ValueError if it is not legal."""
        low, high = self.legal[0], self.legal[-1]
        value = math.nan
        with contextlib.suppress(ValueError):
            value = float(text)
        if isinstance(self.legal, tuple):
            wanted = "a number"
            if low <= value <= high:
                return value
        else:
            wanted = "an odd number" if self.legal.step == 2 else "a whole number"
            if value in self.legal:
                return int(value)
        raise ValueError(f"{text} is not possible; give {wanted} from {low:.7g} to {high:.7g}")


@dataclass(frozen=True)
class Degradation:
    """An entry of the table. Call it as entry(image, rng, quality=20).

    phrases: how prompts name it. by_default: False: drawn only if it is asked for."""

    function: Callable
    strengths: dict[str, Strength]
    phrases: tuple
    by_default: bool = True

    def draw_strengths(self, rng, given):
        """Return all strengths: those given as they are, and the others drawn."""
        chosen = {}
        for key, strength in self.strengths.items():
            chosen[key] = given[key] if key in given else strength.draw(rng)
        return chosen | given  # an unknown one becomes a TypeError of the function

    def __call__(self, image, rng, **given):
        """Degrade a PIL image. Modes other than "L" and "RGB" become RGB.

        given: strengths, which are not checked; the others are drawn."""
        if image.mode not in ("L", "RGB"):
            image = image.convert("RGB")
        return self.function(image, rng, **self.draw_strengths(rng, given))


DEGRADATIONS = {
    "gaussian_noise": Degradation(
        gaussian_noise,
        {"sigma": Strength((5.0, 50.0), legal=(0, 1e6))},
        ("gaussian noise", "sensor noise", "random grain"),
    ),
    "poisson_noise": Degradation(
        poisson_noise,
        {"scale": Strength((1.0, 5.0), legal=(0.01, 1e6))},
        ("photon noise", "shot noise", "low light noise"),
    ),
    "jpeg": Degradation(
        jpeg,
        {"quality": Strength(range(10, 41), legal=range(1, 101))},
        ("JPEG artifacts", "compression artifacts", "JPEG blocking"),
    ),
    "gaussian_blur": Degradation(
        gaussian_blur,
        {"kernel": Strength(range(3, 12, 2), legal=range(1, 1000, 2))},
        ("gaussian blur", "defocus blur", "soft focus"),
    ),
    "downscale": Degradation(
        downscale,
        {"factor": Strength((2.0, 4.0), legal=(1, 1e6))},
        ("low resolution", "lost detail from downscaling", "pixelation from resizing"),
    ),
    "color_jitter": Degradation(
        color_jitter,
        {
            "brightness": Strength((0.8, 1.2), legal=(0, 1e6)),
            "contrast": Strength((0.8, 1.2), legal=(0, 1e6)),
        },
        ("wrong brightness and contrast", "shifted exposure", "faded colors"),
        # nothing in the image tells how far its brightness was changed, and the error that remains
        # would drown out the errors of the others
        by_default=False,
    ),
}
DEFAULT_DEGRADATIONS = [name for name, entry in DEGRADATIONS.items() if entry.by_default]

# --------------------------------------------------------------------------------------------------
# Recipes: which degradations, in which order and how strong.
# A recipe is a list of (name, strengths): [("jpeg", {"quality": 20}), ("downscale", {...})].


def parse_degradations(words):
    """Read ["jpeg", "gaussian_noise:sigma=25"] -> [("jpeg", {}), ("gaussian_noise", {...})].

    A strength that is not given stays open, to be drawn for each image. Raises UserError."""
    parsed = {}
    for word in words:
        name, *settings = word.split(":")
        if name not in DEGRADATIONS:
            raise UserError(f"unknown degradation {name!r}; there are {', '.join(DEGRADATIONS)}")
        if name in parsed:
            raise UserError(f"a degradation is named twice in {' '.join(words)}")
        known = DEGRADATIONS[name].strengths
        parsed[name] = {}
        for setting in settings:
            key, _, value = setting.partition("=")
            if key not in known or key in parsed[name]:
                raise UserError(f"{word!r}: write it like {name}:{next(iter(known))}=NUMBER")
            try:
                parsed[name][key] = known[key].parse(value)
            except ValueError as error:
                raise UserError(f"{word!r}: {key}: {error}") from None
    return list(parsed.items())


def draw_recipe(choices, count, rng):
    """Draw at most count distinct entries of choices in random order, and their open strengths."""
    recipe = []
    for i in rng.permutation(len(choices))[:count]:
        name, given = choices[i]
        recipe.append((name, DEGRADATIONS[name].draw_strengths(rng, given)))
    return recipe


def apply_recipe(image, recipe, rng):
    """Degrade a PIL image by each step of a recipe in turn."""
    for name, strengths in recipe:
        image = DEGRADATIONS[name](image, rng, **strengths)
    return image


def describe(recipe):
    """Return a recipe as a string: "jpeg:quality=20 gaussian_noise:sigma=25".

    parse_degradations reads it, split into words. Strengths are rounded to 4 digits."""
    words = []
    for name, strengths in recipe:
        settings = [f":{key}={value:.4g}" for key, value in strengths.items()]
        words.append(name + "".join(settings))
    return " ".join(words)


def random_degradation(image, num_degradations=2, rng=None):
    """Apply distinct ones of the default five in random order, each of random strength.

    rng: numpy Generator. None means default_rng(0), which always draws the same recipe. Raises
    ValueError for more than five."""
    if num_degradations > len(DEFAULT_DEGRADATIONS):
        raise ValueError(f"there are {len(DEFAULT_DEGRADATIONS)} degradations by default")
    rng = rng or np.random.default_rng(0)
    choices = parse_degradations(DEFAULT_DEGRADATIONS)
    return apply_recipe(image, draw_recipe(choices, num_degradations, rng), rng)


# --------------------------------------------------------------------------------------------------
# Prompts. Many wordings, so that the model learns what is meant and not one sentence.

TEMPLATES = [
    "Remove {}.",
    "Restore this photo: it has {}.",
    "Clean up {} in this image.",
    "Fix the {}.",
    "A sharp, clean photo without {}.",
    "Undo {}.",
]


def make_prompt(names, rng):
    """Return a random prompt that asks to undo the named degradations, one at least."""
    phrases = []
    for name in names:
        options = DEGRADATIONS[name].phrases
        phrases.append(options[rng.integers(len(options))])
    listed = phrases[-1]
    if len(phrases) > 1:
        listed = ", ".join(phrases[:-1]) + " and " + listed
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(listed)


# --------------------------------------------------------------------------------------------------
# Errors and command lines. They stand here because every other file imports this one.


class UserError(ValueError):
    """An error that the user can fix. Its one line says what is wrong, where, and what to do."""

    def __init__(self, message):
        # file names may contain newlines and control characters
        super().__init__("".join(c if c.isprintable() else " " for c in str(message)))


@contextlib.contextmanager
def explain_errors(path, what):
    """Turn any error raised while a file is read into a UserError that names its path.

    what: the content, for the message ("this picture"). NameError passes through."""
    if not os.path.isfile(path):  # opening a pipe could block forever
        raise UserError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}")
    try:
        with name_shortage(path):
            yield
    except NameError:  # a mistake in this program, not in the file
        raise
    except Exception as error:  # damaged files raise a dozen types
        reason = repr(error) if isinstance(error, KeyError) else str(error)
        if not reason.startswith(str(path)):
            reason = f"{path}: cannot read {what}: {reason or type(error).__name__}"
        raise UserError(reason) from None


def is_shortage(error):
    """Say whether an error means that memory is short, of the machine or of a GPU."""
    shortages = "out of memory", "not enough memory", "allocate memory"
    message = str(error)
    return isinstance(error, MemoryError) or any(word in message for word in shortages)


@contextlib.contextmanager
def name_shortage(path):
    """Turn a lack of memory for a picture or a file into a UserError that names it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        raise UserError(f"{path}: out of memory: this needs more than is free") from None


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one line of help per flag. Raises UserError where it would exit."""

    def __init__(self, description, **options):
        def layout(prog):
            return argparse.RawDescriptionHelpFormatter(prog, max_help_position=42, width=110)

        options |= {"description": description, "formatter_class": layout, "allow_abbrev": False}
        super().__init__(**options)
        self.titles = {}  # {flag: title of its group}

    def group(self, title):
        """Return a function like add_argument. Its flags stand in a group of this title."""
        group = self.add_argument_group(title)

        def add(*names, **options):
            self.titles[group.add_argument(*names, **options).dest] = title

        return add

    def refuse(self, given, title, reason):
        """Raise UserError if a flag of a group was given. given: {name: value} as typed."""
        for name in given:
            if self.titles.get(name) == title:
                raise UserError(f"--{name}: {reason}")

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} -h)")


def between(kind, low, high=math.inf):
    """Return an argparse type: a finite int or float (kind), from low to high inclusive."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:  # nan is not between anything
            limit = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"{text}: give a number {limit}")
        return value

    convert.__name__ = kind.__name__  # argparse names it when a text is no number
    return convert


def run_script(main):
    """Call main(). Report the user's and the machine's errors in one line, with exit status 2.

    Other errors are bugs and keep their traceback. Ctrl-C exits with status 130."""
    warnings.filterwarnings("ignore", module="PIL")  # of odd files: open_image says what matters
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that it cannot encode
    try:
        main()
    except (UserError, OSError) as error:  # OSError: a full disk, a folder that is not writable
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        reason = " ".join(str(error).split())[:200]
        advice = "smaller pictures, crops and batches help; in training --accumulate, "
        advice += "--checkpointing, --ema_device cpu, --cache and --lora spare memory"
        fail(f"out of memory: {advice} ({reason})")
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message):
    print(f"error: {UserError(message)}"[:1000], file=sys.stderr)
    sys.exit(2)


# --------------------------------------------------------------------------------------------------
# Pictures and files. Once it is open, a picture is upright, has 8 bits a channel and is sRGB.

GREY = "1", "L", "LA", "La"  # modes of one channel
COLOR = "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"  # modes that become RGB without a loss
NO_PICTURES = {"EPS", "WMF", "MPEG", "HDF5", "BUFR", "GRIB"}  # what Pillow knows but cannot decode
MOST_PIXELS = 10**9
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is 179 million; ours is in describe_picture
ORIENTATION = 0x0112  # EXIF's tag
SRGB_GAMMA = 1 / 2.2  # as PNG's gAMA has it
SRGB_PRIMARIES = 0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06  # x, y of white, red, green, blue
PNG_EXIF = b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif"  # where a PNG may have EXIF


@dataclass
class Header:
    """What a picture is once it is open. Checks of pairs and open_image both go by it."""

    size: tuple  # (width, height), upright
    mode: str  # L, LA, RGB or RGBA
    notices: list  # texts: what is converted


def read_header(path):
    """Look at a picture -> Header. Its pixels are not decoded. Raises UserError."""
    with explain_errors(path, "this picture"), open_file(path) as image:
        return describe_picture(image)


def open_file(path):
    """Open a file with Pillow, which reads its header alone."""
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        reason = "damaged, or of a format that Pillow does not read, such as HEIC"
        raise UserError(f"{reason}; save it as JPEG or PNG") from None


def open_image(path, notices=None):
    """Open a picture -> PIL image of mode L, LA, RGB or RGBA, upright and sRGB. Raises UserError.

    notices: {text: [paths]}; what is converted is added to it, see say_notices."""
    with explain_errors(path, "this picture"), open_file(path) as image:
        header = describe_picture(image)
        plain = plain_image(image, header)
    if notices is not None:
        for text in header.notices:
            notices.setdefault(text, []).append(path)
    return plain


def open_opaque(path, notices=None):
    """Open a picture -> L or RGB. Raises UserError also if a pixel is transparent."""
    image = open_image(path, notices)
    if image.mode.endswith("A") and image.getchannel("A").getextrema()[0] < 255:
        hidden = "has transparent pixels, under which any colour may be hidden"
        raise UserError(f"{path} {hidden}; put it on a background and save it as RGB")
    return image.convert(image.mode.rstrip("A"))


def say_notices(notices):
    """Print what was converted in pictures: a line for each kind, with an example."""
    for text, paths in notices.items():
        example = paths[0]
        if len(paths) > 1:
            example = f"{len(paths)} pictures, such as {example}"
        print(f"{example}: {text}", file=sys.stderr)


def describe_picture(image):
    """Return the Header of a PIL image, without decoding it. Raises UserError if it is refused."""
    if image.format == "EPS":  # Pillow would have Ghostscript run it
        raise UserError("PostScript is a program, not a picture; save it as PNG")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a photo with a preview
        raise UserError("it has several pages; save the page that you mean as PNG")
    if has_deep_channels(image):
        raise UserError("it has more than 8 bits a channel; save it as PNG with 8 bits a channel")
    size = image.size
    if size[0] * size[1] > MOST_PIXELS:
        raise UserError(f"it has {size[0]}x{size[1]} pixels, over {MOST_PIXELS:,}; make it smaller")
    if find_orientation(image) >= 5:  # stored lying on its side
        size = size[::-1]
    mode = "L" if image.mode in GREY else "RGB"
    if image.has_transparency_data:
        mode += "A"
    profile, notice = find_profile(image)
    notices = [notice] if notice else []
    if not profile and image.mode not in GREY + COLOR:
        notices.append(f"{image.mode} without a usable colour profile: its colours are approximate")
    elif not image.info.get("icc_profile") and claims_other_colors(image):
        notices.append("it says that its colours are not sRGB, without a profile; taken as sRGB")
    return Header(size, mode, notices)


def has_deep_channels(image):
    """Say whether a picture has more than 8 bits a channel, of which Pillow may keep 8."""
    stored = getattr(image, "tile", [])
    if image.mode[0] in "IF" or re.search(";16[BLN]|SGI16", str(stored)):
        return True
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (8,))) > 8  # bits a sample
    if image.format == "AVIF":
        return file_content(image).partition(b"pixi")[2][5:6] > b"\x08"
    if image.format == "JPEG2000":  # the depth of its first component, less one
        return file_content(image).partition(b"\xff\x4f\xff\x51")[2][38:39] > b"\x07"
    if image.format == "PPM" and stored and isinstance(stored[0].args, tuple):
        return stored[0].args[1] > 255  # the largest level
    return False


def find_orientation(image):
    """Return EXIF's orientation, 1 to 8. 1 is upright, and stands for a damaged or missing one."""
    orientation = 1
    if image.format == "TIFF":  # Pillow itself turns it
        return orientation
    with contextlib.suppress(Exception):
        orientation = read_exif(image).get(ORIENTATION)
    return orientation if orientation in range(1, 9) else 1


def find_profile(image):
    """Return (the colour profile to convert from, what to say); None for each if there is none."""
    content = image.info.get("icc_profile")
    if image.format == "JPEG2000":  # Pillow leaves it
        content = file_content(image).partition(b"colr\2")[2][2:]
    if not content:
        return None, None
    channels = "CMYK" if image.mode == "CMYK" else "RGB "
    if image.mode in GREY:
        channels = "GRAY"
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        usable = profile.profile.xcolor_space == channels
        if usable and channels == "RGB " and is_srgb(profile):
            return None, None
    except (ImageCms.PyCMSError, OSError):
        usable = False
    if not usable:
        return None, "its colour profile is damaged or not of its kind of picture; taken as sRGB"
    return profile, "its colour profile is converted to sRGB"


def is_srgb(profile):
    """Say whether a profile leaves colours as they are. (Names lie: "sRGB, linear".)"""
    steps = np.linspace(0, 255, 6).astype(np.uint8)
    colors = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    srgb = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(Image.fromarray(colors), profile, srgb)
    return np.allclose(converted, colors, atol=2)


def claims_other_colors(image):
    """Say whether a file without a profile has a note that its colours are not those of sRGB."""
    if image.format == "PNG":
        _, _, numbers = file_content(image).partition(b"IDAT")[0].partition(b"cICP")
        if numbers:  # of primaries, curve, matrix and range (ITU-T H.273): these are sRGB's
            return not numbers.startswith(b"\x01\x0d\0\1")
    if image.format == "AVIF":  # primaries and curve; 2: not said
        numbers = file_content(image).partition(b"nclx")[2][1:4:2]
        if numbers.translate(None, b"\1\2\x0d"):
            return True
    if "srgb" in image.info:
        return False
    gamma = image.info.get("gamma", SRGB_GAMMA)
    primaries = image.info.get("chromaticity", SRGB_PRIMARIES)
    if image.format == "TIFF" and 319 in image.tag_v2:
        primaries = SRGB_PRIMARIES[:2] + image.tag_v2[319]
    if not np.allclose([gamma, *primaries], [SRGB_GAMMA, *SRGB_PRIMARIES], atol=0.01):
        return True
    space = index = None
    with contextlib.suppress(Exception):
        exif = read_exif(image)
        space = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
        index = exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex)
    return space in (2, 65535) or index == "R03"  # Adobe RGB, uncalibrated, Adobe RGB


def file_content(image):
    """Return the bytes of the file that a picture was opened from; none if it was not."""
    name = getattr(image, "filename", "")
    return Path(name).read_bytes() if name else b""


def read_exif(image):
    """Return a picture's EXIF. It may stand behind the pixels of a PNG; few are decoded for it."""
    if image.format == "PNG" and "exif" not in image.info:
        content = file_content(image)
        if content and not any(word in content for word in PNG_EXIF):
            return Image.Exif()
    return image.getexif()


def plain_image(image, header):
    """Convert a PIL image of any mode to what its header says. The result carries no metadata."""
    # by its name Pillow would map a TIFF into memory, and garble one that lies on its side
    filename = getattr(image, "filename", "")
    image.filename = ""
    plain = image.convert(header.mode)
    image.filename = filename
    profile, _ = find_profile(image)
    if profile:
        colors = image if image.mode == "CMYK" else plain.convert(header.mode.rstrip("A"))
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(colors, profile, srgb, 0, "RGB")
        converted = converted.convert(header.mode)
        if header.mode.endswith("A"):
            converted.putalpha(plain.getchannel("A"))
        plain = converted
    plain.info = {}
    plain.getexif()[ORIENTATION] = find_orientation(image)
    plain = ImageOps.exif_transpose(plain)
    plain.info = {}
    return plain


def picture_extensions():
    """Return the extensions of the formats that this Pillow reads: {".png", ...}."""
    by_extension = Image.registered_extensions()
    formats = Image.OPEN.keys() - NO_PICTURES
    return {extension for extension, name in by_extension.items() if name in formats}


# --------------------------------------------------------------------------------------------------
# Writing. Only formats are written that keep the size and 8 bits a channel.

WRITTEN = {"PNG", "TIFF", "WEBP", "AVIF", "JPEG", "JPEG2000", "BMP", "PPM", "TGA"}
OPAQUE = {"JPEG", "BMP", "PPM"}
LARGEST_SIDE = {"WEBP": 16383, "AVIF": 32768, "JPEG": 65500, "TGA": 65535}  # pixels
LEAST_LOSS = {  # options of Pillow
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    "JPEG": {"quality": 100, "subsampling": 0},
}


def choose_output(path, mode, notices):
    """Return where a picture of this mode is written: path, or its name with .png.

    Where the format of path would lose something, that is added to notices, see say_notices."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a picture in it")
    kind = kind_of(path)
    transparent = mode.endswith("A")
    if kind and not (transparent and kind in OPAQUE):
        return path
    lost = "transparency" if transparent else "size and colours"
    text = f"{path.suffix or 'no extension'}: not a format that keeps {lost}; a .png instead"
    notices.setdefault(text, []).append(path)
    return path.with_name(fit_name(path.stem, ".png"))


def kind_of(path):
    """Return the format that the extension of path means; None if it is not written."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    return kind if kind in WRITTEN & Image.SAVE.keys() else None


def check_side(path, size):
    """Raise UserError if a picture of this size is too large for the format of path."""
    kind = kind_of(path)
    if max(size) > LARGEST_SIDE.get(kind, math.inf):
        limit = f"sides of at most {LARGEST_SIDE[kind]:,} pixels, not {max(size):,}"
        raise UserError(f"{path}: {kind} holds {limit}; name a .png")


def save_image(image, path, quality=None):
    """Write a picture, its format by extension. Raises UserError.

    quality: 1 to 100, of lossy formats; None: the least loss."""
    check_side(path, image.size)
    kind = kind_of(path)
    options = LEAST_LOSS.get(kind, {})
    if options and quality is not None:
        options = {"quality": quality}
    with atomic_write(path) as partial:
        image.save(partial, kind, **options)


def fit_name(stem, ending):
    """Return the file name stem + ending. Of more than 255 bytes, the stem is cut.

    A digest then stands for what was cut, so that two names stay two."""
    content = os.fsencode(stem)
    if len(content) + len(ending) <= 255:
        return stem + ending
    digest = hashlib.sha256(content).hexdigest()[:12]
    return content[: 240 - len(ending)].decode("utf-8", "ignore") + "-" + digest + ending


def make_folder(path):
    """Claim a folder by making it. Raises UserError if it is there already."""
    try:
        Path(path).mkdir(parents=True)
    except OSError as error:
        reason = "it exists already" if isinstance(error, FileExistsError) else error
        raise UserError(f"cannot make the folder {path}: {reason}; choose another") from None


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside path, and rename it to path if the block succeeds.

    So path never holds half a file, and a failure leaves the old file in place. Raises UserError.
    """
    path = Path(path)
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]  # a long name stays legal
    partial = path.parent / f".{name}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except (OSError, ValueError) as error:  # ValueError: an unknown extension
        raise UserError(f"cannot write {path}: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------


def contact_sheet(image, rng):
    """Return a labelled sheet of the clean image and each degradation of it, four to a row.

    Shrinks image in place to at most 320 pixels a side."""
    image.thumbnail((320, 320))
    width, height = image.size
    shown = [("clean", image)]
    for name in DEGRADATIONS:
        recipe = draw_recipe([(name, {})], 1, rng)
        shown.append((describe(recipe), apply_recipe(image, recipe, rng)))
    rows = math.ceil(len(shown) / 4)
    sheet = Image.new("RGB", (4 * width, rows * height), "white")
    for i, (label, picture) in enumerate(shown):
        left, top = i % 4 * width, i // 4 * height
        sheet.paste(picture, (left, top))
        place = left + 4, top + 4
        ImageDraw.Draw(sheet).text(place, label, "white", stroke_width=2, stroke_fill="black")
    return sheet


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("image", help="picture to degrade")
    add("out", help="where to write the result (format by extension)")
    choose = parser.add_mutually_exclusive_group().add_argument
    most = len(DEFAULT_DEGRADATIONS)
    text = f"how many, at most {most} (default 2): color_jitter is not drawn"
    choose("--num_degradations", type=between(int, 1, most), metavar="N", help=text)
    choose("--only", metavar="NAME", help="this degradation alone: jpeg, or jpeg:quality=20")
    choose("--preview", action="store_true", help="write a labelled sheet of all of them instead")
    add("--seed", type=between(int, 0), default=0, help="of everything random (default 0)")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    notices = {}
    image = open_opaque(args.image, notices)
    out = choose_output(args.out, image.mode, notices)
    say_notices(notices)
    renamed = out != Path(args.out)
    if out.resolve() == Path(args.image).resolve() or (renamed and out.exists()):
        raise UserError(f"{out} is there already; name another")
    if args.preview:
        result = contact_sheet(image, rng)
    else:
        choices = parse_degradations([args.only] if args.only else DEFAULT_DEGRADATIONS)
        recipe = draw_recipe(choices, args.num_degradations or 2, rng)
        result = apply_recipe(image, recipe, rng)
        print(f"{out}: {describe(recipe)}")
    save_image(result, out)
    if kind_of(out) in ("JPEG", "AVIF"):
        print(f"{out}: this format loses detail, too, even at its best; a .png does not")


if __name__ == "__main__":
    run_script(main)
