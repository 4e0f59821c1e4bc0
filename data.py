"""Pairs of a clean and a degraded picture with a caption: read, drawn, degraded, cached.

    python data.py pairs PHOTOS --out pairs         degrade a folder of photos once: pairs/pairs.csv
    python data.py pairs PHOTOS --out val --degradations gaussian_noise:sigma=25
    python data.py match CLEAN DEGRADED --out pairs.csv    a CSV of two folders, by name
    python data.py cache --data pairs/pairs.csv --model sana1.5-1.6b --out cache
                                                     encode what training will draw, once

A CSV has the header image_path,condition_image_path,caption (the last two may be empty or absent).
Paths are absolute or relative to the CSV. If the condition is empty, the clean picture is degraded
anew each time it is drawn, and an empty caption becomes a prompt that names the degradations. Two
more columns are read: degradation says what was done; if a row of a group is held out for
validation, no row of that group is trained on.
"""
import argparse
import codecs
import contextlib
import csv
import hashlib
import json
import os
import sys
import unicodedata
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from tqdm import tqdm

import degrade
import model
from degrade import Parser, UserError, between, explain_errors, open_opaque, read_header
from degrade import run_script, save_image
from vae import file_digest, read_json, save_weights, write_json


def seed_for(seed, index, purpose):
    """Return the 63-bit seed of a numpy or torch generator: the one source of randomness.

    It depends on the run's seed, a step or draw, and what the numbers are for. Same inputs, same
    numbers, in any process and in any order."""
    digest = hashlib.sha256(f"{seed}/{index}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# --------------------------------------------------------------------------------------------------
# Pictures as tensors, and folders of pictures. (degrade.py opens and saves the files.)


def to_tensor(image):
    """PIL image (alpha ignored) -> float tensor [3, H, W] in [-1, 1], RGB."""
    levels = torch.from_numpy(np.array(image.convert("RGB")))
    return levels.permute(2, 0, 1).float() / 127.5 - 1


def to_image(tensor):
    """[3, H, W] in [-1, 1] (clipped) -> PIL RGB image, rounded to the nearest level."""
    pixels = tensor.detach().float().cpu().clamp(-1, 1)
    levels = ((pixels + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


# how the names of hidden and system files and folders begin
HIDDEN = ".", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information"


def list_images(folder):
    """Return the pictures below a folder, sorted; links to folders are followed. Raises UserError.

    Hidden and system folders and files are skipped. Other files that are not pictures are left
    out, and their number is printed."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    extensions = degrade.picture_extensions()
    found = []
    others = []
    visited = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:  # a link leads back
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        for name in names:
            path = Path(place, name)
            if not name.startswith(HIDDEN):
                usable = path.suffix.lower() in extensions and path.is_file()
                files = found if usable else others  # a link may lead nowhere
                files.append(path)
    if others:
        example = min(others, key=lambda path: (path.suffix.lower() != ".heic", path))
        some = f"{len(others)} files that cannot be read as pictures, such as {example.name}"
        print(f"{folder}: left out: {some}; save photos as JPEG or PNG", file=sys.stderr)
    if not found:
        raise UserError(f"{folder}: no pictures in this folder")
    return sorted(found)


# --------------------------------------------------------------------------------------------------
# Sources of pairs. A source has .rows, a length, .enlarge and
#   load(i) -> (clean, condition or None, the row's name in error messages)
#   about_conditions() -> {key: value} of config.json that follow from its conditions

# of decoded pictures that each process keeps in memory; others are read again at each draw
CACHE_BYTES = 512 * 2**20
COLUMNS = "image_path", "condition_image_path", "caption", "degradation", "group"
FACTORS = 1, 2, 3, 4, 8  # how many times smaller than the clean pictures all conditions may be


@dataclass
class Row:
    """A row of a CSV, and the line that it ends on."""

    line: int
    name: str  # as the CSV names its files
    clean: Path | None  # None: procedural
    condition: Path | None
    caption: str
    degradation: str  # what was done to the condition, as degrade.describe() writes it; may be ""
    group: str  # no row of a held-out row's group is trained on; may be ""
    digest: str = ""  # SHA-256 of the clean picture's file: copies of a picture are the same
    condition_digest: str | None = None

    def paths(self):
        return [path for path in (self.clean, self.condition) if path]

    def degradations(self):
        """Return the names in the column degradation: ["jpeg", "downscale"].

        A text that is no recipe counts as one name."""
        names = [word.split(":")[0] for word in self.degradation.split()]
        if set(names) <= degrade.DEGRADATIONS.keys():
            return names
        return [self.degradation]

    def identity(self):
        """Return [name, digest of the clean picture, digest of all else]."""
        others = [self.condition_digest, self.caption, self.degradation, self.group]
        return [self.name, self.digest, short_hash(others)]


class CsvPairs:
    """The rows of a pairs.csv, whose pictures have been looked at.

    headers: {path: Header}. enlarge: how many times smaller the conditions are than their clean
    pictures. smallest: side that clean pictures must have at least. Raises UserError, with the
    line, if a file of a row is missing or unreadable, has transparent pixels, or does not fit.
    skip_bad: decode each picture now, and print and leave out the rows that fail."""

    def __init__(self, path, skip_bad=False, smallest=1):
        self.path = Path(path)
        self.skip_bad = skip_bad
        self.smallest = smallest
        self.pictures = {}
        self.bytes = 0
        self.rows = []
        self.headers = {}
        for line, fields in self.read_lines():
            with self.bad_row(line):
                self.rows.append(self.read_row(line, fields))
        self.look_at_pictures()
        self.enlarge = self.find_factor()
        self.keep_rows(self.check_sizes)

    @contextlib.contextmanager
    def bad_row(self, line, always=False):
        """Add the line to a UserError of the block. With skip_bad print the error and go on.

        always: raise it even so."""
        try:
            yield
        except UserError as error:
            message = f"{self.path}, line {line}: {error}"
            if always or not self.skip_bad:
                raise UserError(message) from None
            tqdm.write(f"left out: {message}", file=sys.stderr)

    def keep_rows(self, check):
        """Keep the rows for which check(row) raises no UserError; see bad_row."""
        kept = []
        for row in tqdm(self.rows, unit="row", desc="check", delay=1):
            with self.bad_row(row.line):
                check(row)
                kept.append(row)
        if not kept:
            raise UserError(f"{self.path}: no row that can be used")
        self.rows = kept

    def read_lines(self):
        """Yield (line number, {column: field}) of each row; one that is no CSV is a bad row."""
        lines = self.read_file().splitlines(keepends=True)
        at = 0  # index of the next line to read
        columns = None
        while at < len(lines):
            line = at + 1
            # read anew from each line: an open quote does not take the rest of the file with it
            rest = (lines[i].decode() for i in range(at, len(lines)))
            reader = csv.reader(rest, strict=True)
            at += 1
            with self.bad_row(line, always=columns is None), explain_csv():
                fields = next(reader)
                at = line - 1 + reader.line_num  # a caption may have several lines
                if columns is None:
                    columns = self.check_header([field.strip() for field in fields])
                elif len(fields) > len(columns):
                    raise UserError("more fields than columns")
                elif fields:
                    yield line, dict(zip(columns, fields))

    def read_file(self):
        """Return the bytes of the CSV. Raises UserError for a file that cannot be one."""
        path = self.path
        if path.is_dir():
            advice = "python data.py match makes one of two folders, python data.py pairs of one"
            raise UserError(f"{path} is a folder, a CSV is needed: {advice}")
        with explain_errors(path, "this CSV"):
            content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:99]:
            raise UserError(f"{path}: this is UTF-16, or no text; save it as CSV UTF-8")
        if not content.strip():
            raise UserError(f"{path}: an empty file; the header is {','.join(COLUMNS[:3])}")
        return content

    def check_header(self, columns):
        """Return the names of the columns. Raises UserError."""
        header = ",".join(columns)
        if "image_path" not in columns:
            for mark, name in ((";", "semicolons"), ("\t", "tabs")):
                if mark in header:
                    raise UserError(f"{name} stand between the fields; save it with commas")
            raise UserError(f"no column image_path in {header!r}; it is {','.join(COLUMNS[:3])}")
        for name in COLUMNS:
            if columns.count(name) > 1:
                raise UserError(f"two columns {name} in {header!r}")
        unused = [name for name in columns if name and name not in COLUMNS]
        if unused:
            names = ", ".join(repr(name) for name in unused)
            print(f"{self.path}: not used: column {names}; known are {', '.join(COLUMNS)}")
        return columns

    def read_row(self, line, fields):
        """Make a Row. Raises UserError."""
        name, degraded, *texts = [(fields.get(column) or "").strip() for column in COLUMNS]
        if not name:
            raise UserError("image_path is empty")
        clean = self.find_file(name)
        condition = None
        if degraded:
            name += "," + degraded
            condition = self.find_file(degraded)
        row = Row(line, name, clean, condition, *texts)
        for path in row.paths():
            if not os.path.isfile(path):  # False, no error, if too long or with a NUL
                raise UserError(f"no file {path}")
        return row

    def find_file(self, name):
        """Return the path of a file that the CSV names. Windows writes folders\\like\\this."""
        path = self.path.parent / name
        return path if os.path.exists(path) else self.path.parent / name.replace("\\", "/")

    def look_at_pictures(self):
        """Read the headers and digests of all pictures. Leave out, or refuse, rows that fail."""
        looks = {}  # a path may stand in several rows
        digests = {}
        with ThreadPoolExecutor() as pool:
            for row in self.rows:
                for path in row.paths():
                    if path not in looks:
                        looks[path] = pool.submit(look_at, path, self.skip_bad)

            def check(row):
                for path in row.paths():
                    self.headers[path], digests[path] = looks[path].result()
                row.digest = digests[row.clean]
                row.condition_digest = digests.get(row.condition)

            self.keep_rows(check)
        notices = {}
        for path, header in self.headers.items():
            for text in header.notices:
                notices.setdefault(text, []).append(path)
        degrade.say_notices(notices)

    def find_factor(self):
        """Return how many times smaller most conditions are than their clean pictures."""
        counts = Counter()
        for row in self.rows:
            if row.condition:
                clean, condition = self.headers[row.clean].size, self.headers[row.condition].size
                counts.update(n for n in FACTORS if sizes_fit(clean, condition, n))
        if not counts:
            return 1
        factor = counts.most_common(1)[0][0]  # others are refused by check_sizes
        if factor > 1:
            smaller = f"conditions are {factor} times smaller than their clean pictures"
            print(f"{self.path}: {smaller}: they are enlarged (bicubic)")
        return factor

    def clean_size(self, row):
        """Return the size of a clean picture; that of its enlarged condition, which may cut it."""
        if not row.condition or self.enlarge == 1:
            return self.headers[row.clean].size
        width, height = self.headers[row.condition].size
        return width * self.enlarge, height * self.enlarge

    def about_conditions(self):
        """Return {key: value} of "model" in config.json: what the conditions are like.

        keeps_grey stands there only if a condition (or a clean picture to be degraded) is grey."""
        about = {"enlarge": self.enlarge}
        stored = [row for row in self.rows if self.stored_grey(row.condition or row.clean)]
        rows = stored or self.rows
        sample = rows[:: len(rows) // 50 + 1]  # others have to be decoded to see
        grey = [row for row in sample if self.is_grey(row.condition or row.clean)]
        colored = [row for row in grey if not self.is_grey(row.clean)]
        if grey:
            about["keeps_grey"] = not colored
        if colored:
            some = f"{len(colored)} of {len(grey)} grey conditions have a coloured clean picture"
            print(f"{self.path}: {some}: what is restored from grey pictures has colours")
        return about

    def stored_grey(self, path):
        return self.headers[path].mode.startswith("L")

    def is_grey(self, path):
        """Say whether a picture has no colours. Many grey ones are stored as RGB."""
        if self.stored_grey(path):
            return True
        with contextlib.suppress(UserError):  # damage is said when it is drawn
            red, green, blue = open_opaque(path).split()
            return red == green == blue
        return False

    def check_sizes(self, row):
        """Raise UserError if the pictures of a row do not fit each other, or are too small."""
        clean = self.headers[row.clean].size
        condition = row.condition and self.headers[row.condition].size
        if condition and not sizes_fit(clean, condition, self.enlarge):
            sizes = f"{as_text(clean)} and {as_text(condition)}"
            raise UserError(f"a pair of different sizes, once turned upright by EXIF: {sizes}")
        if min(self.clean_size(row)) < self.smallest:
            raise UserError(too_small(self.clean_size(row), self.smallest))

    def summary(self):
        """Say what is in the rows, in a line."""
        cut = sum(self.clean_size(row) != self.headers[row.clean].size for row in self.rows)
        paired = sum(row.condition is not None for row in self.rows)
        captions = sum(row.caption != "" for row in self.rows)
        made = f"{paired} with a condition, {len(self) - paired} degraded on the fly"
        made += f", {captions} with captions"
        if cut:
            made += f", {cut} clean pictures cut to a multiple of {self.enlarge} pixels"
        return f"{self.path}: {len(self)} rows, {made}"

    def __len__(self):
        return len(self.rows)

    def load(self, index):
        row = self.rows[index]
        where = f"{self.path}, line {row.line}"
        condition = None
        try:
            clean = self.open(row.clean)
            if row.condition:
                condition = self.open(row.condition)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if condition and self.enlarge > 1:
            size = self.clean_size(row)
            clean = clean.crop((0, 0, *size))
            condition = condition.resize(size, Image.Resampling.BICUBIC)
        return clean, condition, where

    def open(self, path):
        """Return a picture, L or RGB."""
        if path in self.pictures:
            return self.pictures[path]
        image = open_opaque(path)
        if self.bytes < CACHE_BYTES:
            self.pictures[path] = image
            self.bytes += len(image.mode) * image.width * image.height
        return image


@contextlib.contextmanager
def explain_csv():
    """Turn an error in the text of a CSV into a UserError that says what to do."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{error}; save the table as CSV UTF-8") from None
    except csv.Error as error:
        advice = 'close every quote, and write one that stands within a quoted field as ""'
        raise UserError(f"{error}; {advice}") from None


def look_at(path, decode=False):
    """Look at a picture of a pair -> Header, SHA-256 of the file. Raises UserError.

    decode: decode it too, which finds damage behind the header. What has alpha is always decoded:
    transparent pixels may hide colours."""
    header = read_header(path)
    if decode or header.mode.endswith("A"):
        open_opaque(path)
    return header, file_digest(path)


def sizes_fit(clean, condition, factor):
    """Say whether a condition is factor times smaller, its sides rounded down."""
    return condition == (clean[0] // factor, clean[1] // factor)


def as_text(size):
    return f"{size[0]}x{size[1]}"


def too_small(size, crop):
    """Say that a picture is smaller than a crop of it."""
    advice = "use larger pictures or a smaller --resolution"
    return f"the picture is {as_text(size)}, smaller than the {crop}-pixel crop; {advice}"


def short_hash(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


class DeadLeaves:
    """Pictures of the built-in demo, each drawn when it is first asked for."""

    enlarge = 1

    def __init__(self, count, size, seed):
        self.size = size
        self.seed = seed
        self.pictures = {}
        self.rows = []
        for i in range(count):
            name = f"procedural picture {i} of seed {seed}"
            self.rows.append(Row(i, name, None, None, "", "", "", short_hash([name, size])))

    def about_conditions(self):
        return {"enlarge": 1}

    def __len__(self):
        return len(self.rows)

    def load(self, index):
        if index not in self.pictures:
            rng = np.random.default_rng(seed_for(self.seed, index, "dead leaves"))
            self.pictures[index] = dead_leaves(self.size, rng)
        return self.pictures[index], None, self.rows[index].name


def dead_leaves(size, rng):
    """Draw a size x size picture of opaque shapes that hide each other.

    Discs, boxes and triangles, whose radii follow r^-3, give the edges, flat areas and the 1/f
    spectrum of photographs (Lee, Mumford & Huang 2001; as training pictures: Achddou et al. 2021).
    Each has a colour near one of a small palette, a shading and perhaps a texture."""
    grid_y, grid_x = np.mgrid[:size, :size].astype(np.float32)
    grey = rng.uniform(0.02, 0.98, (rng.integers(3, 8), 1))  # palettes vary more in light than hue
    palette = grey + rng.normal(0, rng.uniform(0.03, 0.25), (len(grey), 3))
    noise = pink_noise(size, rng)
    image = np.ones((size, size, 3), np.float32) * palette[0]
    smallest = np.exp(rng.uniform(np.log(1.5), np.log(4)))  # some pictures have calmer areas
    largest = size * 0.6
    count = int(size**2 / (10.7 * smallest**2))
    radii = (rng.uniform(size=count) * (smallest**-2 - largest**-2) + largest**-2) ** -0.5
    for radius in radii:
        cx, cy = rng.uniform(-0.1 * size, 1.1 * size, 2)
        reach = int(1.5 * radius) + 2
        corners = np.array([cx - reach, cx + reach, cy - reach, cy + reach])
        x0, x1, y0, y1 = np.clip(corners, 0, size).astype(int)
        if x0 >= x1 or y0 >= y1:
            continue
        box = slice(y0, y1), slice(x0, x1)
        # u, v: coordinates of the shape, turned, stretched, 1 at its edge
        angle = rng.uniform(0, np.pi)
        aspect = rng.uniform(0.3, 1)
        dx = (grid_x[box] - cx) / radius
        dy = (grid_y[box] - cy) / radius
        u = dx * np.cos(angle) + dy * np.sin(angle)
        v = (dy * np.cos(angle) - dx * np.sin(angle)) / aspect
        shape = rng.integers(3)
        if shape == 0:
            edge = np.sqrt(u * u + v * v)
        elif shape == 1:
            edge = np.maximum(abs(u), abs(v))
        else:
            edge = np.maximum(np.maximum(-2 * v, v + 1.7 * u), v - 1.7 * u)
        # most edges are one pixel wide, some are out of focus
        softness = radius * aspect / rng.choice([0.7, 1, 1, 2, 4])
        alpha = np.clip((1 - edge) * softness + 0.5, 0, 1)[..., None]
        color = palette[rng.integers(len(palette))] + rng.normal(0, 0.06, 3)
        below = image[min(max(int(cy), 0), size - 1), min(max(int(cx), 0), size - 1)]
        change = rng.uniform(0.1, 1) * (color - below)  # much detail is of low contrast
        light_change = change.mean()  # and what is small differs in light more than in hue
        color = below + light_change + min(1, radius / 15) * (change - light_change)
        light = (rng.normal(0, 0.1) * u)[..., None]
        texture = rng.random()
        if texture < 0.3:
            oy, ox = rng.integers(0, size, 2)
            patch = noise[oy : oy + y1 - y0, ox : ox + x1 - x0]
            light = light + rng.uniform(0.02, 0.15) * patch
        elif texture < 0.45:
            fx, fy = rng.normal(0, 0.8, 2)
            wave = np.sin(fx * grid_x[box] + fy * grid_y[box] + rng.uniform(0, 6.3))
            light = light + (rng.uniform(0.02, 0.12) * wave)[..., None]
        image[box] += alpha * (color.astype(np.float32) + light - image[box])
    return degrade.to_uint8(image * 255)


def pink_noise(size, rng):
    """[2 * size, 2 * size, 1] of unit variance and amplitude spectrum 1/f: bark, grass, cloth."""
    shape = 2 * size, 2 * size
    frequency = np.hypot(np.fft.fftfreq(2 * size)[:, None], np.fft.rfftfreq(2 * size)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) / frequency, s=shape)
    return (noise / noise.std()).astype(np.float32)[..., None]


# --------------------------------------------------------------------------------------------------
# What training draws.


class Plan(NamedTuple):
    """What a draw will be. No picture is opened for it."""

    row: int
    recipe: list | None  # of degradations; None: the row has a condition
    caption: str


class PairedDataset:
    """Crops of pairs: {"clean", "condition": [3, H, W] in [-1, 1], "caption", "draw",
    "grey", "clean_grey"}.

    draw: the item's number. grey, clean_grey: whether the condition, or the clean picture, has one
    channel, repeated three times.

    source: CsvPairs or DeadLeaves. rows: which of its indices to use (default all).
    crop: side in pixels; None: whole pictures; [(n, side), ...]: that side for draws below n.
    degradations: as parse_degradations returns them; 1 to max_degradations of them are applied to
    the clean picture of a row without a condition. caption_dropout: share of captions emptied.
    training True: item n is the n-th draw of an endless stream, which visits every row once an
    epoch in a new order, with random crop, flip and caption dropout. All of it depends on seed and
    n alone, so a run can stop and go on at any n. False: item n is the n-th of rows, always with
    the same degradation, cropped at its centre; a side shorter than the crop is kept whole."""

    def __init__(
        self,
        source,
        crop,
        degradations=None,
        rows=None,
        max_degradations=3,
        caption_dropout=0.1,
        training=True,
        seed=0,
    ):
        self.source = source
        self.crop = crop
        self.degradations = degradations or degrade.parse_degradations(degrade.DEFAULT_DEGRADATIONS)
        self.rows = list(range(len(source))) if rows is None else rows
        self.max_degradations = max_degradations
        self.caption_dropout = caption_dropout
        self.training = training
        self.seed = seed
        self.order = EndlessOrder(self.rows, seed)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, n):
        """Return item n. Raises UserError if its row cannot be read."""
        return with_tensors(self.prepare(n, self.plan(n)))

    def plan(self, n):
        """Return the Plan of draw n, so that all captions of a run can be encoded before it starts.

        Its random numbers are separate from those of prepare."""
        purpose = "train plan" if self.training else "validation plan"
        rng = np.random.default_rng(seed_for(self.seed, n, purpose))
        index = self.order[n] if self.training else self.rows[n]  # training: shuffled
        row = self.source.rows[index]
        caption = row.caption
        recipe = None
        if not row.condition:
            count = rng.integers(1, self.max_degradations + 1)
            recipe = degrade.draw_recipe(self.degradations, count, rng)
            caption = caption or degrade.make_prompt([name for name, _ in recipe], rng)
        if self.training and rng.random() < self.caption_dropout:
            caption = ""
        return Plan(index, recipe, caption)

    def prepare(self, n, plan):
        """Open and degrade the pictures of draw n. They are PIL images, RGB.

        Threads may call it at the same time. Raises UserError if a picture cannot be read."""
        clean, condition, where = self.source.load(plan.row)
        purpose = "train" if self.training else "validation"
        rng = np.random.default_rng(seed_for(self.seed, n, purpose))
        cut = self.draw_cut(clean, n, where, rng)
        clean = cut(clean)
        # one crop and one flip for both pictures of the pair: they cannot drift apart
        if plan.recipe:
            condition = degrade.apply_recipe(clean, plan.recipe, rng)
        else:
            condition = cut(condition)
        return {
            "clean": clean.convert("RGB"),
            "condition": condition.convert("RGB"),
            "caption": plan.caption,
            "grey": condition.mode == "L",
            "clean_grey": clean.mode == "L",
            "draw": n,
        }

    def draw_cut(self, image, n, where, rng):
        """Choose a crop and a flip -> a function that applies both to a picture of image's size.

        Raises UserError if the picture is smaller than the crop of training."""
        crop = self.crop_at(n) or max(image.size)
        if self.training and self.crop and min(image.size) < crop:
            raise UserError(f"{where}: {too_small(image.size, crop)}")
        width, height = min(crop, image.width), min(crop, image.height)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        flip = False
        if self.training:
            left, top = rng.integers((image.width - width + 1, image.height - height + 1))
            flip = rng.random() < 0.5

        def cut(image):
            image = image.crop((left, top, left + width, top + height))
            return ImageOps.mirror(image) if flip else image

        return cut

    def crop_at(self, n):
        if not isinstance(self.crop, list):
            return self.crop
        for end, side in self.crop:
            if n < end:
                return side
        return side

    def degradation_names(self):
        """Return the names of all degradations that its rows may have, by draw or by the CSV."""
        names = {name for name, _ in self.degradations}
        for i in self.rows:
            names.update(self.source.rows[i].degradations())
        return names

    def name_degradations(self, n):
        """Return what was done to the condition of item n: ["jpeg", "downscale"].

        Read from its recipe; without one from the CSV's column degradation."""
        index, recipe, _ = self.plan(n)
        if recipe:
            return [name for name, _ in recipe]
        return self.source.rows[index].degradations()


class EndlessOrder:
    """The rows again and again, in a new order each epoch: order[n] is the row of draw n."""

    def __init__(self, rows, seed):
        self.rows = rows
        self.seed = seed
        self.epoch = None  # whose order is kept

    def __getitem__(self, n):
        epoch, position = divmod(n, len(self.rows))
        if epoch != self.epoch:
            rng = np.random.default_rng(seed_for(self.seed, epoch, "order"))
            self.permutation = rng.permutation(self.rows)
            self.epoch = epoch
        return int(self.permutation[position])


def with_tensors(item):
    """Return an item of prepare with its pictures as tensors [3, H, W] in [-1, 1]."""
    item = dict(item)
    for key in ("clean", "condition"):
        if isinstance(item[key], Image.Image):  # a cache has latents, which are tensors already
            item[key] = to_tensor(item[key])
    return item


def collate(items):
    """[item] -> {"clean", "condition": [B, 3, H, W], "caption": [str], "draw": [n]}.

    From a cache "clean" and "condition" are latents [B, C, H/f, W/f]."""
    return {
        "clean": torch.stack([item["clean"] for item in items]),
        "condition": torch.stack([item["condition"] for item in items]),
        "caption": [item["caption"] for item in items],
        "draw": [item["draw"] for item in items],
    }


def load_batches(dataset, batch_size, draws, workers=1):
    """Yield batches of dataset[n] for n in draws. Raises UserError for an unreadable picture.

    workers: how many threads open and degrade the pictures of the next two batches meanwhile.
    (Pillow and numpy release Python's lock while they work.) Plans are made here, one after the
    other, and so are tensors."""
    pool = ThreadPoolExecutor(workers)
    numbers = iter(draws)
    ahead = deque()  # of batches, each a list of futures

    def begin_batch():
        some = list(islice(numbers, batch_size))
        if some:
            ahead.append([pool.submit(dataset.prepare, n, dataset.plan(n)) for n in some])

    try:
        begin_batch()
        begin_batch()
        while ahead:
            items = [with_tensors(future.result()) for future in ahead.popleft()]
            begin_batch()
            yield collate(items)
    finally:
        pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------------------
# Flags of what is drawn, and the split into training and held-out pictures.

RESOLUTIONS = {"tiny": 48, "mini": 96}  # default sides of crops, pixels
RESOLUTION = 512  # of pretrained models
DEFAULTS = {
    "data": None,
    "val_data": None,
    "degradations": degrade.DEFAULT_DEGRADATIONS,
    "max_degradations": 3,
    "skip_bad": False,
    "caption_dropout": 0.1,
    "seed": 0,
    "workers": 1,
    "device": "cuda" if torch.cuda.is_available() else "cpu",
}


def add_data_flags(parser):
    """Add the flags that train.py and the cache have in common. DEFAULTS has their values."""
    add = parser.group("data")
    add("--data", metavar="CSV", help="pairs (default: the demo, which draws its own pictures)")
    add("--val_data", metavar="CSV", help="pairs to validate with (default: some of --data)")
    add_degradations_flag(add)
    most = between(int, 1, len(degrade.DEGRADATIONS))
    add("--max_degradations", type=most, help="1 to this many (default 3; the demo 1)")
    add("--skip_bad", action="store_true", help="decode all first, leave out rows that fail")
    side = between(int, 1, 2**14)
    add("--resolution", type=side, help="side of crops (default: tiny 48, mini 96, else 512)")
    share = between(float, 0, 1)
    add("--caption_dropout", type=share, help="captions to empty (default 0.1)")
    text = "tiny, mini, sana1.5-1.6b, a hub id, a folder or a run (default tiny; on a GPU SANA)"
    add("--model", help=text)
    add("--seed", type=between(int, 0), help="of everything random (default 0)")
    add("--workers", type=between(int, 1, 100), help="threads that prepare pictures (default 1)")
    add("--device", type=check_device, help=f"default {DEFAULTS['device']}")


def add_degradations_flag(add):
    example = "such as jpeg gaussian_noise:sigma=25 (default: all but color_jitter)"
    add("--degradations", nargs="+", metavar="NAME", help=example)


def check_device(name):
    """Return name if this machine has that torch device. Raises ArgumentTypeError if not."""
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{name}: not on this machine ({error})") from None
    return name


def use_device(name):
    """Make a numbered GPU the current one, which pinned memory belongs to."""
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)


def default_model(table, device):
    """Return the model of a command that names none."""
    return "sana1.5-1.6b" if table and device.startswith("cuda") else "tiny"


HELD_OUT = 8  # pictures that validation measures, or a tenth of the rows if that is fewer
VALIDATION_CROP = 192


def draw_flags(flags):
    """Return {flag: value} of how a pair is drawn. flags: {flag: value}, as given."""
    return {
        "degradations": degrade.parse_degradations(flags["degradations"]),
        "max_degradations": flags["max_degradations"],
        "caption_dropout": flags["caption_dropout"],
        "seed": flags["seed"],
    }


def make_datasets(table, val_table, crop, drawing, skip_bad=False, before=(), kept=()):
    """Return the PairedDataset of training, that of validation, and the rows held out.

    table, val_table: paths of CSVs. table None: the demo. val_table None: rows of table are held
    out, see hold_out. crop: PairedDataset's, of training. drawing: see draw_flags. before, kept:
    see hold_out. Raises UserError."""
    largest = max(side for _, side in crop) if isinstance(crop, list) else crop
    fixed = drawing | {"training": False}
    if table is None:  # the demo
        seed = drawing["seed"]
        photos = DeadLeaves(256, max(128, largest), seed)
        others = DeadLeaves(HELD_OUT, VALIDATION_CROP, seed_for(seed, 0, "held out"))
        val_set = PairedDataset(others, None, **fixed)
        return PairedDataset(photos, crop, **drawing), val_set, list_rows(val_set)
    val_source = source = CsvPairs(table, skip_bad, largest)
    if val_table:
        val_source = CsvPairs(val_table, skip_bad)
        if val_source.enlarge != source.enlarge:
            factors = f"{val_source.enlarge} and {source.enlarge} times smaller conditions"
            raise UserError(f"--val_data and --data have {factors}; give the same in both")
        measured = held_out = list(range(len(val_source)))
    else:
        measured, held_out = hold_out(source, before, kept)
    units = find_units(source, val_source)
    taken = {units[val_source.rows[i].digest] for i in held_out}
    training = [i for i, row in enumerate(source.rows) if units[row.digest] not in taken]
    if not training:
        raise UserError(f"{table}: all rows share a picture or group with --val_data")
    print(source.summary())
    shared = len(source) - len(training)
    if val_table:
        print(f"validation: {len(measured)} rows of {val_table}; {shared} rows of {table} share a")
        print("picture or group with them and are not trained on")
    elif held_out:
        groups = f"{shared} rows ({len(taken)} pictures or groups) are held out"
        others = shared - len(measured)
        print(f"{groups}: {len(measured)} are measured in validation, {others} only left out")
    else:
        print("no row is held out: validation is on pictures that are trained on")
    val_crop = max(VALIDATION_CROP, largest)
    val_set = PairedDataset(val_source, val_crop, rows=measured, **fixed)
    train_set = PairedDataset(source, crop, rows=training, **drawing)
    return train_set, val_set, [val_source.rows[i].identity() for i in held_out]


def find_units(*sources):
    """Return {digest of a clean picture: name of its unit} of the pictures of CsvPairs.

    Rows of one group or of equal clean pictures are a unit. Its name is the hash of its group's
    name, without a group that of its clean picture."""
    # a forest: the marks of a unit lead to one root, the least ("group" comes before "picture")
    parent = {}

    def find(mark):
        while parent.setdefault(mark, mark) != mark:
            mark = parent[mark]
        return mark

    for source in sources:
        for row in source.rows:
            root = find(("picture", row.digest))
            if row.group:
                composed = unicodedata.normalize("NFC", row.group)  # an accent has two spellings
                name = hashlib.sha256(composed.encode()).hexdigest()
                other = find(("group", name))
                parent[max(root, other)] = min(root, other)
    return {name: find((kind, name))[1] for kind, name in parent if kind == "picture"}


def hold_out(source, before=(), kept=()):
    """Choose rows of a CsvPairs to validate with -> (rows to measure, all rows held out).

    Units (see find_units) are held out whole, in the order of their names: the choice depends on
    neither seed nor order of the CSV. Takes units until a tenth of the rows, at most HELD_OUT, are
    out. Passes over a unit of more than half of the rows, and one with a picture that was trained
    on. Without any, nothing is held out and rows of the first units are measured.
    before: digests of the clean pictures that the weights were trained on already. kept: what
    list_rows said of the rows held out earlier in this run; the pictures still there stay held out,
    whatever became of their captions and conditions."""
    count = min(HELD_OUT, len(source) // 10)
    units = find_units(source)
    rows = {}  # of each unit
    for i in sorted(range(len(source)), key=lambda i: source.rows[i].identity()[1:]):
        rows.setdefault(units[source.rows[i].digest], []).append(i)
    order = [i for unit in sorted(rows) for i in rows[unit]]
    earlier = {digest for _, digest, _ in kept}
    held_out = [i for i in order if source.rows[i].digest in earlier]
    if held_out:  # the run goes on
        return held_out[: max(1, count)], held_out
    seen = {units[digest] for digest in before if digest in units}
    for unit in sorted(rows):
        if len(held_out) < count and len(rows[unit]) <= len(source) / 2 and unit not in seen:
            held_out += rows[unit]
    if held_out:
        return held_out[:count], held_out
    return order[:HELD_OUT], []


def refuse_useless_flags(given, *sources):
    """Raise UserError for a flag of degradations where every row has a condition.

    given: {flag: value} of what was typed."""
    useless = {"degradations", "max_degradations"} & given.keys()
    if useless and all(row.condition for source in sources for row in source.rows):
        all_paired = f"every row of {sources[0].path} has a condition, nothing is degraded here"
        raise UserError(f"--{min(useless)}: {all_paired}; leave it out")


def list_rows(dataset):
    """Return [[name, digest of the clean picture, digest of all else]] of a data set's rows."""
    return [dataset.source.rows[i].identity() for i in dataset.rows]


def check_same(before, now, what):
    """Raise UserError that names the first difference between two results of list_rows.

    what: how the message begins."""
    missing = ["nothing", "", ""]
    for old, new in zip_longest(before, now, fillvalue=missing):
        if old[0] != new[0]:
            raise UserError(f"{what}: the row {old[0]} was where {new[0]} is now")
        if old != new:
            raise UserError(f"{what}: the files or texts of the row {old[0]} have changed")


# --------------------------------------------------------------------------------------------------
# The cache: what training draws in its first epochs, encoded once. Training steps then need
# neither text encoder nor autoencoder.


class CachedDataset:
    """The draws of a PairedDataset's first epochs, with latents [C, H/f, W/f] instead of pixels.

    Draw n has the same crop, flip and degradation as without the cache. After the cached epochs
    the same draws come again, in a new order. expected: fingerprint of the run; pairs: what it
    trains on. Raises UserError if the cache differs from these or is incomplete."""

    def __init__(self, folder, expected, pairs):
        self.folder = Path(folder)
        self.pairs = pairs
        self.count = len(pairs)
        self.order = EndlessOrder(range(self.count), expected["seed"])
        index = read_json(self.folder / "index.json")
        self.epochs = index.get("epochs")
        if type(self.epochs) is not int or self.epochs < 1:
            raise UserError(f"{self.folder / 'index.json'}: not the index of a cache")
        for name, value in expected.items():
            if index.get(name) != value:
                other = f"was made with --{name} {index.get(name)}, this run has {value}"
                if name == "model":  # known by its digest
                    other = "was made with another --model"
                raise UserError(f"--cache {folder}: {other}; python data.py cache makes a new one")
        check_same(index["rows"], list_rows(pairs), f"--cache {folder} was made of other pictures")
        for n in range(self.epochs * self.count):
            if not draw_path(folder, n).is_file():
                rest = "the python data.py cache command that began it makes the rest"
                raise UserError(f"--cache {folder}: not complete (draw {n}); {rest}")

    def degradation_names(self):
        return self.pairs.degradation_names()

    def prompts(self):
        """Return the embeddings of all captions: {caption: [L, D]}; {} if they are hashed."""
        path = self.folder / "prompts.safetensors"
        if not path.is_file():
            return {}
        with explain_errors(path, "this part of the cache"), safe_open(path, "pt") as file:
            return {key.removeprefix("caption "): file.get_tensor(key) for key in list(file.keys())}

    def __len__(self):
        return self.count

    def __getitem__(self, n):
        return self.prepare(n, self.plan(n))

    def plan(self, n):
        """Return which of the cached draws comes as draw n."""
        epoch, position = divmod(n, self.count)
        if epoch >= self.epochs:
            position = self.order[n]
        return epoch % self.epochs * self.count + position

    def prepare(self, n, cached):
        path = draw_path(self.folder, cached)
        with explain_errors(path, "this part of the cache"), safe_open(path, "pt") as file:
            item = {key: file.get_tensor(key).float() for key in ("clean", "condition")}
            for key, latents in item.items():
                if not latents.isfinite().all():
                    raise ValueError(f"{key} is not finite")
            if item["clean"].shape != item["condition"].shape:
                raise ValueError("not a pair")
            return item | {"caption": file.metadata()["caption"], "draw": n}


def draw_path(folder, n):
    """Return the file of draw n; a folder holds a thousand."""
    return Path(folder) / f"{n // 1000:04d}" / f"{n:07d}.safetensors"


def fingerprint(config, drawing, resolution):
    """Return {flag: value} of all that a cache depends on, except its pictures.

    config: "model" of config.json. drawing: see draw_flags."""
    about = {
        "degradations": degrade.describe(drawing["degradations"]),
        "resolution": resolution,
        "model": short_hash([config["autoencoder"], config["digests"]]),
    }
    return drawing | about


def make_cache(out, index, train_set, val_set, autoencoder, prompts, device, workers):
    """Encode the first epochs of train_set's draws, each to a file in the folder out.

    index: what index.json holds: the fingerprint, "epochs", and "rows" as list_rows. Latents are
    kept in half precision: its rounding is a hundredth of what the autoencoder loses. An
    interrupted command goes on where it stopped. Raises UserError."""
    if not (out / "index.json").exists():
        degrade.make_folder(out)
        write_json(out / "index.json", index)
    elif read_json(out / "index.json") != index:
        raise UserError(f"{out} holds another cache; choose another --out")
    count = index["epochs"] * len(train_set)
    if not prompts.hashed and not (out / "prompts.safetensors").exists():
        prompts.prepare(captions_of(train_set, range(count), val_set))
        named = {f"caption {caption}": row for caption, row in prompts.known.items()}
        save_weights(named, out / "prompts.safetensors")
    todo = [n for n in range(count) if not draw_path(out, n).exists()]
    batches = load_batches(train_set, 1, todo, workers)
    for batch in tqdm(batches, total=count, initial=count - len(todo), unit="img", desc="cache"):
        latents = {}
        for key in ("clean", "condition"):
            latents[key] = autoencoder.encode(batch[key].to(device))[0].half()
        save_weights(latents, draw_path(out, batch["draw"][0]), caption=batch["caption"][0])
    made = f"{count} draws ({index['epochs']} epochs of {len(train_set)} pictures) in {out}"
    print(f"{made}: python train.py with the same flags of data and --cache {out}")


def captions_of(train_set, draws, val_set):
    """Return every caption that these training draws and the validation will ask for."""
    captions = {""}
    captions.update(train_set.plan(n).caption for n in draws)
    captions.update(val_set.plan(n).caption for n in range(len(val_set)))
    return captions


# --------------------------------------------------------------------------------------------------
# Tables of pairs, made from folders.


def make_pairs(photos, out, choices, counts, seed, skip_bad=False):
    """Degrade every photo of a folder once: out/clean/, out/condition/ (PNG), last out/pairs.csv.

    out: a new folder. choices: as parse_degradations returns them. counts: [low, high] or [count],
    how many of them a photo gets. Raises UserError."""
    out = Path(out)
    paths = list_images(photos)
    if out.resolve().is_relative_to(Path(photos).resolve()):
        raise UserError(f"--out {out} lies inside {photos}: choose a folder elsewhere")
    degrade.make_folder(out)
    rows = [("image_path", "condition_image_path", "caption", "degradation")]
    notices = {}
    for i, path in enumerate(tqdm(paths, unit="img", desc="pairs")):
        # of the content too: another folder with the same seed gets other noise
        rng = np.random.default_rng(seed_for(seed, f"{i} {file_digest(path)}", "pairs"))
        recipe = degrade.draw_recipe(choices, rng.integers(counts[0], counts[-1] + 1), rng)
        caption = degrade.make_prompt([name for name, _ in recipe], rng)
        stem = path.stem.encode("utf-8", "replace").decode()  # the CSV is UTF-8, a name may not be
        name = degrade.fit_name(f"{i:05d}_{stem}", ".png")
        try:
            with degrade.name_shortage(path):
                clean = open_opaque(path, notices)
                degraded = degrade.apply_recipe(clean, recipe, rng)
        except UserError as error:
            if not skip_bad:
                raise
            tqdm.write(f"left out: {error}", file=sys.stderr)
            continue
        save_image(clean, out / "clean" / name)
        save_image(degraded, out / "condition" / name)
        rows.append((f"clean/{name}", f"condition/{name}", caption, degrade.describe(recipe)))
    if len(rows) == 1:
        raise UserError(f"{photos}: no picture that can be read")
    write_csv(out / "pairs.csv", rows)
    degrade.say_notices(notices)
    pairs = len(rows) - 1
    print(f"{pairs} pairs in {out / 'pairs.csv'}; {len(paths) - pairs} pictures left out")


def match_folders(clean_folder, degraded_folder, out, pattern="", skip_bad=False):
    """Write the CSV of two folders whose pictures have the same paths but for the extension.

    pattern: "GT=NOISY" replaces the last GT in a clean picture's path by NOISY, which gives its
    partner's path. With a pattern, both folders may be the same one. skip_bad: leave out clean
    pictures without a partner. Raises UserError."""
    here, _, there = pattern.partition("=")
    if pattern and not (here and there):
        raise UserError(f"--pattern {pattern}: write CLEAN=DEGRADED, such as GT=NOISY")
    if Path(out).exists():
        raise UserError(f"{out} exists already; choose another --out")
    same_folder = Path(clean_folder).resolve() == Path(degraded_folder).resolve()
    if same_folder and not pattern:
        raise UserError(f"{clean_folder}: two times the same folder; say with --pattern which")
    degraded = pictures_by_name(degraded_folder)
    clean = pictures_by_name(clean_folder, here, there, skip_others=same_folder)
    rows = [("image_path", "condition_image_path", "caption")]
    for name, path in clean.items():
        if name in degraded:
            rows.append((relative(path, out), relative(degraded[name], out), ""))
        elif skip_bad:
            print(f"left out: {path} has no partner", file=sys.stderr)
        else:
            raise UserError(f"{path}: no {name} in {degraded_folder}; --skip_bad leaves it out")
    pairs = len(rows) - 1
    if not pairs:
        raise UserError(f"no picture of {clean_folder} has a partner in {degraded_folder}")
    write_csv(out, rows)
    left_out = f"{len(clean) - pairs} clean"
    if not same_folder:
        left_out += f", {len(degraded) - pairs} degraded"
    print(f"{pairs} pairs in {out}; left out: {left_out} without a partner")


def pictures_by_name(folder, here="", there="", skip_others=False):
    """Return {path below the folder, without extension: picture}. Raises UserError if two are one.

    here, there: replace the last here in a path by there. skip_others: leave out paths without
    here."""
    found = {}
    for path in list_images(folder):
        name = path.relative_to(folder).as_posix()
        if skip_others and here not in name:
            continue
        if here:
            name = there.join(name.rsplit(here, 1))
        name = unicodedata.normalize("NFC", Path(name).with_suffix("").as_posix())
        if name in found:
            raise UserError(f"{path} and {found[name]} have one name, {name}; leave one out")
        found[name] = path
    return found


def relative(path, table):
    """Return a path as a CSV has it: relative to the CSV, with forward slashes."""
    try:
        return Path(os.path.relpath(path, Path(table).parent)).as_posix()
    except ValueError:  # on another drive
        return Path(path).resolve().as_posix()


def write_csv(path, rows):
    text = {"newline": "", "encoding": "utf-8"}
    with degrade.atomic_write(path) as partial, open(partial, "w", **text) as file:
        csv.writer(file).writerows(rows)


# --------------------------------------------------------------------------------------------------


def make_parsers():
    """Return the parser of all commands."""
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    pairs = commands.add_parser("pairs", description="Degrade every photo of a folder once.")
    add = pairs.add_argument
    add("photos", help="folder of clean photos (searched recursively)")
    add("--out", required=True, help="folder to make; pairs.csv appears when all is written")
    pairs.set_defaults(degradations=degrade.DEFAULT_DEGRADATIONS)
    add_degradations_flag(add)
    text = "how many: one number, or lowest and highest (default 1 3)"
    count = between(int, 1, len(degrade.DEGRADATIONS))
    add("--num_degradations", nargs="+", type=count, default=[1, 3], metavar="N", help=text)
    add("--skip_bad", action="store_true", help="leave out pictures that cannot be read")
    add("--seed", type=between(int, 0), default=0, help="of everything random (default 0)")
    match = commands.add_parser("match", description="Write the CSV of two folders.")
    add = match.add_argument
    add("clean", help="folder of clean pictures")
    add("degraded", help="folder of the same pictures, degraded; may be the same")
    add("--out", required=True, help="CSV to write")
    text = "what differs in their paths: GT=NOISY, sharp=blur, .png=x4.png"
    add("--pattern", default="", metavar="CLEAN=DEGRADED", help=text)
    add("--skip_bad", action="store_true", help="leave out clean pictures without a partner")
    cache = commands.add_parser("cache", description="Encode what train.py would draw, once.")
    cache.set_defaults(**DEFAULTS, model=None, resolution=None)
    add_data_flags(cache)
    cache.add_argument("--epochs", type=between(int, 1), default=1, help="epochs (default 1)")
    cache.add_argument("--out", required=True, help="folder to make")
    return parser


def run_cache(args):
    """Do what the command cache asks for. Raises UserError."""
    if not args.data:
        raise UserError("cache needs --data: the CSV of what to encode")
    use_device(args.device)
    name = args.model or default_model(args.data, args.device)
    config = model.describe_model(name, "restorer")
    resolution = args.resolution or RESOLUTIONS.get(config["name"], RESOLUTION)
    drawing = draw_flags(vars(args))
    autoencoder = model.load_autoencoder(config, name).to(args.device)
    model.check_resolution([resolution], autoencoder)
    before = model.rows_trained_on(name)
    options = resolution, drawing, args.skip_bad, before
    train_set, val_set, _ = make_datasets(args.data, args.val_data, *options)
    index = fingerprint(config, drawing, resolution)
    index |= {"epochs": args.epochs, "rows": list_rows(train_set)}
    prompts = model.Prompts(config, args.device)
    sets = train_set, val_set
    make_cache(Path(args.out), index, *sets, autoencoder, prompts, args.device, args.workers)


def main():
    args = make_parsers().parse_args()
    if args.command == "cache":
        run_cache(args)
    elif args.command == "match":
        match_folders(args.clean, args.degraded, args.out, args.pattern, args.skip_bad)
    else:
        counts = args.num_degradations
        if len(counts) > 2 or counts[0] > counts[-1]:
            raise UserError("--num_degradations: give one number, or low and high")
        choices = degrade.parse_degradations(args.degradations)
        make_pairs(args.photos, args.out, choices, counts, args.seed, args.skip_bad)


if __name__ == "__main__":
    run_script(main)
