"""Degradations: what the restorer learns to undo, and the prompts that name them.

Each degradation takes a PIL image and a numpy Generator and gives a PIL image of the same mode and size. Units are
8-bit levels (0..255); outputs are rounded and clipped. Grey (L) and RGB images keep their mode, others become RGB.
(The sigma here is a noise level in an image; model.py's sigma is the noise fraction of a diffusion model.)

    python degrade.py photo.jpg noisy.png                      two random degradations
    python degrade.py photo.jpg noisy.png --only gaussian_noise:sigma=25
    python degrade.py photo.jpg sheet.png --preview            all six, side by side, labelled
"""
import argparse
import contextlib
import csv
import ctypes
import errno
import fcntl
import functools
import glob
import io
import logging
import math
import os
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from tqdm import tqdm

# name -> keyword -> range it is drawn from: (low, high) floats, (low, high) integers, or a tuple of choices (a set)
RANGES = {
    "gaussian_noise": {"sigma": (5.0, 50.0)},
    "poisson_noise": {"scale": (1.0, 5.0)},
    "jpeg": {"quality": (10, 40)},
    "gaussian_blur": {"kernel": {3, 5, 7, 9, 11}},
    "downscale": {"factor": (2.0, 4.0)},
    "color_jitter": {"brightness": (0.8, 1.2), "contrast": (0.8, 1.2)},
}
# A changed brightness leaves no trace in the image to invert, so its error only drowns the others': opt in.
DEFAULT_DEGRADATIONS = ("gaussian_noise", "poisson_noise", "jpeg", "gaussian_blur", "downscale")
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class UserError(ValueError):
    """What is wrong, where, and what to do about it, in one line. Scripts print it and exit with status 2."""

    def __init__(self, message):
        super().__init__(one_line(message))


def one_line(text):
    """text as a terminal may show it: line ends and control codes escaped (names of files have them), the middle of a long one cut out."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
    return line if len(line) <= 900 else f"{line[:600]} ... {line[-280:]}"


@contextlib.contextmanager
def reading(path, what):
    """Whatever goes wrong while a file is read becomes a UserError that names it. Only a file, or a link to one, is read: opening a
    pipe would wait for ever, and a device may never end."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}")
    try:
        yield
    except Exception as error:  # of a dozen types, for damaged files
        reason = repr(error) if isinstance(error, KeyError) or not str(error) else str(error)
        raise UserError(reason if reason.startswith(str(path)) else f"{path}: cannot read {what}: {reason}") from None


# ----------------------------------------------------------------------------------------------------------------
# The six degradations.

DEGRADATIONS = {}


def degradation(function):
    """Enter a function in DEGRADATIONS, and see to it that it only meets grey and RGB images."""
    @functools.wraps(function)
    def on_color(image, rng, *strength, **strengths):
        return function(image if image.mode in ("L", "RGB") else image.convert("RGB"), rng, *strength, **strengths)
    DEGRADATIONS[function.__name__] = on_color
    return on_color


def _to_uint8(array, like):
    return Image.fromarray(np.clip(np.rint(array), 0, 255).astype(np.uint8), like.mode)


@degradation
def gaussian_noise(image, rng, sigma=None):
    """x + N(0, sigma), independent in each pixel and channel. sigma in levels, 5..50."""
    sigma = _strength("gaussian_noise", "sigma", sigma, rng)
    x = np.asarray(image, np.float32)
    return _to_uint8(x + sigma * rng.standard_normal(x.shape, np.float32), image)


@degradation
def poisson_noise(image, rng, scale=None):
    """Poisson(x / scale) * scale: photon noise, whose variance scale * x grows with brightness. scale 1..5."""
    scale = _strength("poisson_noise", "scale", scale, rng)
    return _to_uint8(rng.poisson(np.asarray(image) / scale) * scale, image)


@degradation
def jpeg(image, rng, quality=None):
    """Pillow's JPEG, chroma at half resolution (4:2:0, its default). quality 10..40."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_strength("jpeg", "quality", quality, rng))
    return Image.open(buffer).convert(image.mode)


@degradation
def gaussian_blur(image, rng, kernel=None):
    """What OpenCV's GaussianBlur(kernel, 0) computes, to one level. kernel = width in pixels, 3, 5, 7, 9 or 11."""
    kernel = _strength("gaussian_blur", "kernel", kernel, rng)
    half, weights, levels = kernel // 2, _gaussian_kernel(kernel), np.asarray(image)
    padded = np.pad(levels, [(half, half)] * 2 + [(0, 0)] * (levels.ndim - 2), "reflect")  # mirrors without repeating the edge
    blurred, rows = np.empty_like(levels), 32  # a strip of so many rows stays in the processor's cache: half the time
    for top in range(0, len(levels), rows):
        x = padded[top:top + rows + 2 * half].astype(np.float32)
        for axis in (0, 1):  # separable: columns, then rows
            x = np.moveaxis(x, axis, 0)
            n = len(x) - 2 * half
            y = weights[half] * x[half:half + n]
            for k in range(half):  # a symmetric kernel: one product for each pair of taps
                pair = x[k:k + n] + x[2 * half - k:2 * half - k + n]
                pair *= weights[k]
                y += pair
            x = np.moveaxis(y, 0, axis)
        blurred[top:top + rows] = x + np.float32(0.5)  # OpenCV rounds halves up, and its kernels of 256ths make many
    return Image.fromarray(blurred, image.mode)


def _gaussian_kernel(k):
    """OpenCV takes its small kernels from a table of 256ths, the others from sigma = 0.3 * ((k - 1) / 2 - 1) + 0.8."""
    table = {3: (64, 128), 5: (16, 64, 96), 7: (8, 28, 56, 72), 9: (4, 13, 30, 51, 60)}
    if k in table:
        weights = np.array(table[k] + table[k][-2::-1], np.float32)
    else:
        sigma = 0.3 * ((k - 1) * 0.5 - 1) + 0.8
        weights = np.exp(-0.5 * ((np.arange(k, dtype=np.float32) - k // 2) / sigma) ** 2)
    return weights / weights.sum()


@degradation
def downscale(image, rng, factor=None):
    """Bicubic down by factor, bicubic up to the old size, both Pillow's (antialiased). factor: any real in 2..4."""
    factor = _strength("downscale", "factor", factor, rng)
    small = [max(1, round(side / factor)) for side in image.size]
    return image.resize(small, Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)


@degradation
def color_jitter(image, rng, brightness=None, contrast=None):
    """Brightness times a factor, then contrast about the grey mean (PIL ImageEnhance). Both 0.8..1.2."""
    brightness = _strength("color_jitter", "brightness", brightness, rng)
    contrast = _strength("color_jitter", "contrast", contrast, rng)
    return ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(brightness)).enhance(contrast)


def _strength(name, keyword, value, rng):
    """The given strength, checked, or one drawn from its range."""
    allowed = RANGES[name][keyword]
    if value is None:
        if isinstance(allowed, set):
            return int(rng.choice(sorted(allowed)))
        low, high = allowed
        return int(rng.integers(low, high + 1)) if isinstance(low, int) else float(rng.uniform(low, high))
    legal = {"sigma": value >= 0, "scale": value >= 0.01, "quality": 1 <= value <= 100 and value == int(value),
             "kernel": 1 <= value < 1000 and value % 2 == 1, "factor": value >= 1, "brightness": value >= 0, "contrast": value >= 0}
    if not (legal[keyword] and np.isfinite(value)):
        raise UserError(f"{name}: {keyword} {value:g} makes no sense; it is drawn from {allowed}")
    return int(value) if isinstance(allowed, set) or isinstance(allowed[0], int) else value


# ----------------------------------------------------------------------------------------------------------------
# Recipes: which degradations, in which order and how strong, and the prompt that names them.
# A recipe is a list of (name, strengths), such as [("jpeg", {"quality": 20}), ("gaussian_noise", {"sigma": 25.0})].

def parse_degradations(words):
    """["jpeg", "gaussian_noise:sigma=25"] -> [("jpeg", {}), ("gaussian_noise", {"sigma": 25.0})]; a strength that is
    not given stays open, to be drawn for each image. Raises UserError."""
    parsed = []
    for word in words:
        name, _, rest = word.partition(":")
        if name not in DEGRADATIONS:
            raise UserError(f"unknown degradation {name!r}; there are {', '.join(DEGRADATIONS)}")
        strengths = {}
        for pair in filter(None, rest.split(":")):
            key, _, value = pair.partition("=")
            try:
                strengths[key] = _strength(name, key, float(value), None)
            except (KeyError, ValueError):
                raise UserError(f"{word!r}: write it like {name}:{next(iter(RANGES[name]))}=NUMBER") from None
        parsed.append((name, strengths))
    if len({name for name, _ in parsed}) < len(parsed):
        raise UserError(f"a degradation is named twice in {' '.join(words)}")
    return parsed


def draw_recipe(choices, count, rng):
    """count distinct entries of choices (all, if there are fewer) in random order, their open strengths drawn."""
    picked = [choices[i] for i in rng.permutation(len(choices))[:count]]
    return [(name, {key: _strength(name, key, given.get(key), rng) for key in RANGES[name]}) for name, given in picked]


def apply_recipe(image, recipe, rng):
    for name, strengths in recipe:
        image = DEGRADATIONS[name](image, rng, **strengths)
    return image


def describe(recipe):
    """A recipe as parse_degradations reads it: "jpeg:quality=20 gaussian_noise:sigma=25"."""
    return " ".join(":".join([name] + [f"{key}={value:.4g}" for key, value in strengths.items()])
                    for name, strengths in recipe)


def random_degradation(image, num_degradations=2, rng=None):
    """num_degradations distinct ones of the default five, in random order, each of random strength.
    rng: numpy Generator; None means default_rng(0): always the same recipe."""
    rng = np.random.default_rng(0) if rng is None else rng
    choices = [(name, {}) for name in DEFAULT_DEGRADATIONS]
    return apply_recipe(image, draw_recipe(choices, num_degradations, rng), rng)


PHRASES = {
    "gaussian_noise": ("gaussian noise", "sensor noise", "random grain"),
    "poisson_noise": ("photon noise", "shot noise", "low light noise"),
    "jpeg": ("JPEG artifacts", "compression artifacts", "JPEG blocking"),
    "gaussian_blur": ("gaussian blur", "defocus blur", "soft focus"),
    "downscale": ("low resolution", "lost detail from downscaling", "pixelation from resizing"),
    "color_jitter": ("wrong brightness and contrast", "shifted exposure", "faded colors"),
}
TEMPLATES = ("Remove {}.", "Restore this photo: it has {}.", "Clean up {} in this image.", "Fix the {}.",
             "A sharp, clean photo without {}.", "Undo {}.")


def make_prompt(names, rng):
    """A random wording of the request to undo the named degradations; "" if there are none to name."""
    if not names:
        return ""
    words = [PHRASES[name][rng.integers(len(PHRASES[name]))] for name in names]
    listed = " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(listed)


def read_prompt(prompt):
    """The degradations that a prompt of make_prompt's words names."""
    return [name for name, phrases in PHRASES.items() if any(phrase.lower() in prompt.lower() for phrase in phrases)]


# ----------------------------------------------------------------------------------------------------------------
# Procedural pictures, which the demo learns from.

def dead_leaves(size, rng):
    """A size x size picture of opaque shapes that hide each other: discs, boxes and triangles whose radii follow
    r^-3, which gives the edges, flat areas and 1/f spectrum of photographs (Lee, Mumford & Huang 2001; as training
    images: Achddou et al. 2021). Each has a colour near one of a small palette, a shading and perhaps a texture."""
    grid_y, grid_x = np.mgrid[:size, :size].astype(np.float32)
    grey = rng.uniform(0.02, 0.98, (rng.integers(3, 8), 1))  # natural palettes vary in brightness more than in hue
    palette = grey + rng.normal(0, rng.uniform(0.03, 0.25), (len(grey), 3))
    noise = _pink_noise(size, rng)
    image = np.ones((size, size, 3), np.float32) * palette[0]
    smallest, largest, count = 1.5, size * 0.6, size * size // 24
    radii = (rng.uniform(size=count) * (smallest**-2 - largest**-2) + largest**-2) ** -0.5
    for radius in radii:
        cx, cy = rng.uniform(-0.1 * size, 1.1 * size, 2)
        reach = int(1.5 * radius) + 2
        x0, x1, y0, y1 = (int(np.clip(v, 0, size)) for v in (cx - reach, cx + reach, cy - reach, cy + reach))
        if x0 >= x1 or y0 >= y1:
            continue
        box = slice(y0, y1), slice(x0, x1)
        angle, aspect, kind = rng.uniform(0, np.pi), rng.uniform(0.3, 1), rng.integers(3)
        dx, dy = (grid_x[box] - cx) / radius, (grid_y[box] - cy) / radius
        u, v = dx * np.cos(angle) + dy * np.sin(angle), (dy * np.cos(angle) - dx * np.sin(angle)) / aspect
        if kind == 0:
            edge = np.sqrt(u * u + v * v)
        elif kind == 1:
            edge = np.maximum(abs(u), abs(v))
        else:
            edge = np.maximum(np.maximum(-2 * v, v + 1.7 * u), v - 1.7 * u)
        softness = radius * aspect / rng.choice([0.7, 1, 1, 2, 4])  # most edges are one pixel wide, some out of focus
        alpha = np.clip((1 - edge) * softness + 0.5, 0, 1)[..., None]
        color = palette[rng.integers(len(palette))] + rng.normal(0, 0.06, 3)
        below = image[min(max(int(cy), 0), size - 1), min(max(int(cx), 0), size - 1)]
        color = below + rng.uniform(0.1, 1) * (color - below)  # much detail in photographs is of low contrast
        light = (rng.normal(0, 0.1) * u)[..., None]
        texture = rng.random()
        if texture < 0.3:
            oy, ox = rng.integers(0, size, 2)
            light = light + rng.uniform(0.02, 0.15) * noise[oy:oy + y1 - y0, ox:ox + x1 - x0]
        elif texture < 0.45:
            fx, fy = rng.normal(0, 0.8, 2)
            wave = np.sin(fx * grid_x[box] + fy * grid_y[box] + rng.uniform(0, 6.3))
            light = light + (rng.uniform(0.02, 0.12) * wave)[..., None]
        image[box] += alpha * (color.astype(np.float32) + light - image[box])
    return Image.fromarray(np.clip(np.rint(image * 255), 0, 255).astype(np.uint8))


def _pink_noise(size, rng):
    """[2 * size, 2 * size, 1], zero mean, unit variance, amplitude spectrum 1/f: bark, grass, cloth."""
    frequency = np.hypot(np.fft.fftfreq(2 * size)[:, None], np.fft.rfftfreq(2 * size)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((2 * size, 2 * size))) / frequency, s=(2 * size, 2 * size))
    return (noise / noise.std()).astype(np.float32)[..., None]


# ----------------------------------------------------------------------------------------------------------------
# Opening and saving pictures, and what every script of this project shares.

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what is wrong with a file is said once, by UserError


def open_image(path, notice=True):
    """Read a picture upright (EXIF orientation applied) as one of the modes L, LA, RGB, RGBA, 8 bits a channel.
    16-bit grey is scaled to 8 bits, with a notice on stderr. Raises UserError with the path for anything unreadable."""
    with reading(path, "this picture"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about large pictures and odd metadata, which are no reason to refuse one
        with Image.open(path) as image:
            if image.format == "EPS":
                raise ValueError("PostScript is a program, not a picture")  # which Pillow would have Ghostscript run
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF: then as it is stored
                ImageOps.exif_transpose(image, in_place=True)
            if not image.width * image.height:
                raise ValueError("a picture without pixels")
            if image.mode == "F":
                raise ValueError("floating-point pixels have no fixed range; save the picture with 8 or 16 bits")
            if image.mode[0] == "I":  # I;16 and its like
                image = image.convert("I")
                if image.getextrema()[0] < 0 or image.getextrema()[1] > 65535:
                    raise ValueError("its values go beyond 16 bits; save the picture with 8 or 16 bits")
                if notice:
                    print(one_line(f"{path}: 16-bit grey is converted to 8 bits"), file=sys.stderr)
                return image.point([round(level / 257) for level in range(65536)], "L")
            grey = image.mode in ("1", "L", "LA", "La")
            return image.convert(("L" if grey else "RGB") + "A" * image.has_transparency_data)


def save_image(image, path, **options):
    """Write a picture, its format by extension. Raises UserError."""
    with whole_file(path) as partial:
        image.save(partial, **options)


def write_text(path, text):
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_csv(path, rows):
    with whole_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


@contextlib.contextmanager
def whole_file(path):
    """Gives a temporary name beside path, renamed when the block ends: nobody ever finds half a file under path, and
    what stood there before survives a failure. Raises UserError if it cannot be written."""
    path = Path(path)
    if not path.name:
        raise UserError(f"cannot write {path}: give a file name")
    partial = path.with_name(f".partial.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot write {path}: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()  # after a failure or Ctrl-C; else it was renamed


LOCKS = []  # open files: the system drops a lock when its program ends, however it ends


def make_folder(path):
    """Make a folder, see that it can be written to before long work begins, and keep other programs that call this out of it
    until this one ends. Raises UserError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        LOCKS.append(open(path / ".lock", "a"))
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: its workers do not inherit it
    except BlockingIOError:
        raise UserError(f"{path}: another program is writing here; wait for its end, or choose another folder") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS):  # some network file systems have no locks
            raise UserError(f"cannot write {path}: {error}") from None
    return path


def left_out(error, skip=True):
    """What becomes of a UserError about one of many pictures: a line on stderr if it is to be skipped, else it is raised."""
    if not skip:
        raise error
    tqdm.write(f"left out: {error}", file=sys.stderr)


def list_images(folder):
    """The pictures below a folder, sorted; hidden files are left out. Raises UserError if there are none."""
    folder = Path(folder)
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES and p.name[0] != "." and p.is_file())
    if not found:
        raise UserError(f"{folder}: " + ("no pictures in this folder" if folder.is_dir() else "no such folder"))
    return found


def list_work(sources, target):
    """Files, folders and patterns -> [(picture, where the restored one goes)]. Raises UserError."""
    target, work = Path(target), []
    found = [Path(path) for source in sources for path in ([source] if Path(source).exists() else sorted(glob.glob(source, recursive=True)) or [source])]
    for path in found:
        if not path.exists():
            raise UserError(f"--input {path}: no such file or folder")
        if path.is_dir():
            if target.resolve().is_relative_to(path.resolve()):
                raise UserError(f"--output {target} lies inside --input {path}; choose a folder elsewhere")
            work += [(picture, target / picture.relative_to(path)) for picture in list_images(path)]
        else:
            work.append((path, target / path.name if target.is_dir() or len(found) > 1 else target))
    for path, out in work:
        if out.suffix.lower() not in PICTURES:
            raise UserError(f"--output {out}: give a file name with a picture's extension, such as .png")
        if out.resolve() == path.resolve():
            raise UserError(f"--output {out} would write over the input; choose another")
    if len({out for _, out in work}) < len(work):
        raise UserError(f"--output {target}: two of the inputs have the same name; restore them into folders of their own")
    return work


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, like all others."""

    def __init__(self, doc, **options):
        super().__init__(description=doc, **options, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} -h)")


def out_of_memory(error):
    """The line to say, if that is what an exception means, on a GPU or not; else None."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in ("out of memory", "allocate memory")):
        reason = " ".join(str(error).split())[:120]
        return f"out of memory ({reason}): smaller batches, crops or pictures take less; the README's Memory says what else does"


def check_numbers(args, ranges):
    """ranges: {flag: (lowest, highest)}. Raises UserError for a number outside, which nan is of any; None is a default still to come."""
    for name, (low, high) in ranges.items():
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} {getattr(args, name)}: from {low} to {high}")


def keep_freed_memory():
    """Let the C library use freed memory again instead of giving it back, where every large tensor on a CPU pays for its pages anew:
    restoring a 500x500 photo with the tiny preset takes 3.1 s on one core instead of 5.3."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        if libc.mallopt(-3, 2**30):  # M_MMAP_THRESHOLD: only what is larger comes straight from the system
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def run_script(main):
    """Call main(); a UserError becomes one line and exit status 2, and so do a full disk and a full memory, which can show anywhere."""
    keep_freed_memory()
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(f"error: {out_of_memory(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def contact_sheet(image, rng):
    """The clean image and all six degradations at random strength, in two labelled rows of four."""
    thumb = image.copy()
    thumb.thumbnail((320, 320))
    recipes = [draw_recipe([(name, {})], 1, rng) for name in DEGRADATIONS]
    return label_tiles([("clean", thumb)] + [(describe(r), apply_recipe(thumb, r, rng)) for r in recipes], columns=4)


def label_tiles(tiles, columns):
    """[(label, image)], all of the first one's size -> one RGB image, labels above the tiles."""
    width, height = tiles[0][1].size
    sheet = Image.new("RGB", (columns * (width + 4), -(-len(tiles) // columns) * (height + 18)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (label, image) in enumerate(tiles):
        x, y = i % columns * (width + 4), i // columns * (height + 18)
        draw.text((x + 2, y + 2), label, fill="black")
        sheet.paste(image, (x, y + 16))
    return sheet


def draw_grid(pictures, tile=256):
    """Rows of labelled pictures, as evaluate_pairs gives them: the centre of each, at most tile pixels wide, unscaled;
    two rows side by side if there are more than four."""
    side = min(tile, *(min(image.size) for row in pictures for _, image in row))
    tiles = []
    for label, image in (picture for row in pictures for picture in row):
        left, top = (image.width - side) // 2, (image.height - side) // 2
        tiles.append((label, image.crop((left, top, left + side, top + side))))
    return label_tiles(tiles, columns=len(pictures[0]) * (1 + (len(pictures) > 4)))


def draw_panels(panels, path):
    """Line charts below each other. panels: [(title, [(x, y)], log_scale, labels)], labels: a text beside each point, or None for
    a plain line. Points that are not finite are left out."""
    width, height, left, right = 640, 240, 44, 628
    picture = Image.new("RGB", (width, len(panels) * height), "white")
    draw = ImageDraw.Draw(picture)
    for panel, (title, points, log_scale, labels) in enumerate(panels):
        top, bottom = panel * height + 28, (panel + 1) * height - 28
        draw.text((left, top - 24), title, fill="black")
        points = [(x, math.log10(max(y, 1e-12)) if log_scale else y) for x, y in points if math.isfinite(x + y)]
        if not points:
            continue
        (x0, x1), (y0, y1) = ((min(values), max(values)) for values in zip(*points))
        x0 = x0 if labels else 0
        places = [(left + (x - x0) / max(x1 - x0, 1e-9) * (right - left - 60 * bool(labels)), bottom - (y - y0) / max(y1 - y0, 1e-9) * (bottom - top))
                  for x, y in points]
        for value, y in ((y0, bottom), ((y0 + y1) / 2, (top + bottom) / 2), (y1, top)):
            draw.line([(left, y), (right, y)], fill="#dddddd")
            draw.text((4, y - 6), f"{10 ** value:.3g}" if log_scale else f"{value:.2f}" if y1 > 1 else f"{value:.3f}", fill="black")
        draw.text((left, bottom + 8), f"{x0:.5g}", fill="black")
        draw.text((right - 48, bottom + 8), f"{x1:.5g}", fill="black")
        draw.line(places, fill="#1f5fbf", width=2)
        for (x, y), label in zip(places, labels or ()):
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill="#1f5fbf")
            draw.text((x + 6, y - 12), label, fill="black")
    save_image(picture, path)


def main():
    parser = Parser(__doc__)
    parser.add_argument("image", help="picture to degrade")
    parser.add_argument("out", help="where to write the result (format by extension)")
    parser.add_argument("--only", metavar="NAME", help="this degradation alone, e.g. jpeg or jpeg:quality=20")
    parser.add_argument("--num_degradations", type=int, default=2, help="how many to draw from the default five (default 2)")
    parser.add_argument("--preview", action="store_true", help="write a labelled contact sheet of all six instead")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    args = parser.parse_args()
    check_numbers(args, {"num_degradations": (1, 10**9)})
    rng = np.random.default_rng(abs(args.seed))
    image = open_image(args.image).convert("RGB")
    if args.preview:
        return save_image(contact_sheet(image, rng), args.out)
    choices = parse_degradations([args.only] if args.only else DEFAULT_DEGRADATIONS)
    recipe = draw_recipe(choices, args.num_degradations, rng)
    save_image(apply_recipe(image, recipe, rng), args.out)
    print(f"{args.out}: {describe(recipe)}")


if __name__ == "__main__":
    run_script(main)
