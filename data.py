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
import contextlib
import csv
import hashlib
import json
import os
import signal
import sys
import unicodedata
from argparse import ArgumentTypeError
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import degrade
import model
from degrade import Header, Parser, UserError, atomic_write, between, explain_errors, given_flags
from degrade import open_opaque, run_script, say_notices
from vae import DCAE, PixelAE, file_digest, load_config, load_pretrained, load_weights, read_json
from vae import resolve_model, save_weights, write_text


def seed_for(seed, index, purpose):
    """Return the 63-bit seed of a numpy or torch generator: the one source of randomness.

    It depends on the run's seed, a step or draw, and what the numbers are for. Same inputs, same
    numbers, in any process and in any order."""
    digest = hashlib.sha256(f"{seed}/{index}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# --------------------------------------------------------------------------------------------------
# Pictures as tensors, and in folders.

def to_tensor(image):
    """PIL image (alpha ignored) -> float tensor [3, H, W] in [-1, 1], RGB."""
    levels = np.array(image.convert("RGB"))
    return from_bytes(torch.from_numpy(levels).permute(2, 0, 1))


def to_bytes(pixels):
    """Invert what to_tensor does to the levels: [-1, 1] -> uint8."""
    return ((pixels + 1) * 127.5).round().to(torch.uint8)


def from_bytes(levels):
    """uint8 -> float in [-1, 1]."""
    return levels.float() / 127.5 - 1


def to_image(tensor):
    """[3, H, W] in [-1, 1] (clipped) -> PIL RGB image, rounded to the nearest level."""
    levels = to_bytes(tensor.detach().float().cpu().clamp(-1, 1))
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information"}


def list_images(folder):
    """Return the pictures below a folder, sorted; links to folders are followed. Raises UserError.

    Hidden and system folders and files are skipped. Other files that are not pictures are left
    out, and their number is printed by extension."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    extensions = degrade.picture_extensions()
    found = []
    others = Counter()
    visited = set()  # a link may lead back
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(place))
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in names:
            path = Path(place, name)
            if is_hidden(name) or not path.is_file():
                continue
            if path.suffix.lower() in extensions:
                found.append(path)
            else:
                others[path.suffix.lower() or "without an extension"] += 1
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        print(f"{folder}: no pictures, left out: {counts}", file=sys.stderr)
    if not found:
        raise UserError(f"{folder}: no pictures in this folder")
    return sorted(found)


def is_hidden(name):
    return name.startswith(".") or name in SYSTEM_FOLDERS


def write_csv(path, rows):
    with atomic_write(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


# --------------------------------------------------------------------------------------------------
# Sources of pairs. A source has a length and two methods:
#   peek(i) -> (whether row i has a condition, caption), without opening a file
#   load(i) -> (clean, condition or None, the row's name in error messages)

# of decoded pictures that each process keeps in memory; others are read again at each draw
CACHE_BYTES = 512 * 2**20
COLUMNS = "image_path", "condition_image_path", "caption", "degradation", "group"
FACTORS = 1, 2, 3, 4, 8  # how many times smaller than the clean pictures all conditions may be


@dataclass
class Row:
    """A row of a CSV, and the line that it ends on."""

    line: int
    name: str  # as the CSV names its files
    clean: Path
    condition: Path | None
    caption: str
    degradation: str  # what was done to the condition, as degrade.describe() writes it; may be ""
    group: str  # no row of a held-out row's group is trained on; may be ""


class CsvPairs:
    """The rows of a pairs.csv, and the checked headers of all their pictures.

    enlarge: how many times smaller the conditions are than their clean pictures. headers: {path:
    Header}. Raises UserError, with the line, if a file of a row is missing or unreadable, has
    transparent pixels, or does not fit its partner. skip_bad: print and leave out such rows."""

    def __init__(self, path, skip_bad=False):
        self.path = Path(path)
        self.pictures = {}
        self.bytes = 0
        self.rows = []
        for line, fields in self.read_lines():
            try:
                self.rows.append(self.read_row(line, fields))
            except UserError as error:
                report_bad(error, skip_bad)
        self.headers = read_headers(self.rows)
        self.enlarge = self.find_factor()
        self.keep_rows(self.check_header, skip_bad)
        self.say_notices()

    def read_lines(self):
        """Read the CSV -> [(line number, {column: field})]."""
        path = self.path
        if path.is_dir():
            two = "python data.py match CLEAN DEGRADED --out pairs.csv makes one of two folders"
            one = "python data.py pairs PHOTOS --out pairs of one"
            raise UserError(f"{path} is a folder, a CSV is needed: {two}, {one}")
        with explain_errors(path, "this CSV"), open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            lines = [(reader.line_num, fields) for fields in reader]
        header = ",".join(reader.fieldnames)
        if "image_path" not in reader.fieldnames:
            wanted = "image_path,condition_image_path,caption"
            raise UserError(f"{path}: no column image_path in {header!r}; the header is {wanted}")
        for name in COLUMNS:
            if reader.fieldnames.count(name) > 1:
                raise UserError(f"{path}: two columns {name} in {header!r}")
        unused = [name for name in reader.fieldnames if name and name not in COLUMNS]
        if unused:
            names = ", ".join(repr(name) for name in unused)
            print(f"{path}: not used: column {names}; known are {', '.join(COLUMNS)}")
        return lines

    def read_row(self, line, fields):
        where = f"{self.path}, line {line}"
        if None in fields:
            raise UserError(f"{where}: more fields than columns")
        values = {key: (value or "").strip() for key, value in fields.items()}
        if not values["image_path"]:
            raise UserError(f"{where}: image_path is empty")
        name = values["image_path"]
        clean = self.path.parent / name
        condition = None
        if values.get("condition_image_path"):
            name += "," + values["condition_image_path"]
            condition = self.path.parent / values["condition_image_path"]
        for path in (clean, condition):
            if path and not os.path.isfile(path):  # False, no error, if too long or with a NUL
                raise UserError(f"{where}: no file {path}{other_spelling(path)}")
        texts = [values.get(column, "") for column in ("caption", "degradation", "group")]
        return Row(line, name, clean, condition, *texts)

    def find_factor(self):
        """Return how many times smaller most conditions are than their clean pictures."""
        counts = Counter()
        for row in self.rows:
            clean, condition = self.headers[row.clean], self.headers.get(row.condition)
            if isinstance(clean, Header) and isinstance(condition, Header):
                counts.update(n for n in FACTORS if sizes_fit(clean.size, condition.size, n))
        if not counts:
            return 1
        factor = counts.most_common(1)[0][0]  # others are refused by check_header
        if factor > 1:
            smaller = f"conditions are {factor} times smaller than their clean pictures"
            print(f"{self.path}: {smaller}: they are enlarged (bicubic)")
        return factor

    def check_header(self, row):
        """Raise UserError if the pictures of a row cannot be used."""
        for path in (row.clean, row.condition):
            header = self.headers.get(path)
            if isinstance(header, UserError):
                raise header
            if header and header.transparent:
                hidden = "has transparent pixels, under which any colour may be hidden"
                raise UserError(f"{path} {hidden}; put it on a background and save it as RGB")
        if not row.condition:
            return
        clean, condition = self.headers[row.clean], self.headers[row.condition]
        if sizes_fit(clean.size, condition.size, self.enlarge):
            return
        problem = f"a pair of different sizes, {as_text(clean.size)} and {as_text(condition.size)}"
        stored_alike = (clean.orientation >= 5) == (condition.orientation >= 5)
        if not stored_alike and clean.size == condition.size[::-1]:
            turned = row.clean if clean.orientation >= 5 else row.condition
            problem += f"; they fit before {turned.name} is turned by its EXIF orientation"
        raise UserError(problem)

    def keep_rows(self, check, skip_bad):
        """Raise the UserError of check(row) with the line; with skip_bad leave out that row."""
        kept = []
        for row in self.rows:
            try:
                check(row)
                kept.append(row)
            except UserError as error:
                report_bad(UserError(f"{self.path}, line {row.line}: {error}"), skip_bad)
        if not kept:
            raise UserError(f"{self.path}: no row that can be used")
        self.rows = kept

    def check_sides(self, crop, skip_bad):
        """Leave out, or refuse, rows whose pictures are smaller than the crops of training."""

        def check(row):
            size = self.headers[row.clean].size
            if min(size) < crop:
                raise UserError(too_small(size, crop))

        self.keep_rows(check, skip_bad)

    def say_notices(self):
        """Print what is converted in the pictures, one line for each kind."""
        notices = {}
        for path in paths_of(self.rows):
            for text in self.headers[path].notices:
                notices.setdefault(text, []).append(path)
        say_notices(notices)

    def summary(self):
        """Say what is in the rows, in a line."""
        paired = sum(row.condition is not None for row in self.rows)
        captions = sum(row.caption != "" for row in self.rows)
        made = f"{paired} with a condition, {len(self) - paired} degraded on the fly"
        return f"{self.path}: {len(self)} rows, {made}, {captions} with captions"

    def digest(self, row):
        """Return the digest of a row's files and texts."""
        files = [self.headers[path].digest for path in (row.clean, row.condition) if path]
        return short_hash([files, row.caption, row.degradation, row.group])

    def __len__(self):
        return len(self.rows)

    def peek(self, index):
        row = self.rows[index]
        return row.condition is not None, row.caption

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
        if condition and not sizes_fit(clean.size, condition.size, self.enlarge):  # after all
            sizes = f"{as_text(clean.size)} and {as_text(condition.size)}"
            raise UserError(f"{where}: a pair of different sizes, {sizes}")
        if condition and self.enlarge > 1:
            condition = condition.resize(clean.size, Image.Resampling.BICUBIC)
        return clean, condition, where

    def open(self, path):
        """Return a picture, grey or RGB."""
        if path in self.pictures:
            return self.pictures[path]
        image = open_opaque(path)
        if self.bytes < CACHE_BYTES:
            self.pictures[path] = image
            self.bytes += len(image.mode) * image.width * image.height
        return image


def paths_of(rows):
    """Return the pictures of all rows, each once."""
    paths = [path for row in rows for path in (row.clean, row.condition) if path]
    return list(dict.fromkeys(paths))


def read_headers(rows):
    """Look at the pictures of all rows -> {path: Header, or the UserError that it gave}."""
    paths = paths_of(rows)

    def look(path):
        try:
            header = degrade.read_header(path)
            header.digest = file_digest(path)
            return header
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool:
        looks = tqdm(pool.map(look, paths), total=len(paths), unit="img", desc="check", delay=1)
        return dict(zip(paths, looks))


def other_spelling(path):
    """Return a hint if a file exists whose name differs only in its Unicode form, else ""."""
    name = unicodedata.normalize("NFC", path.name)
    try:
        names = os.listdir(path.parent)
    except (OSError, ValueError):
        return ""
    for other in names:
        if unicodedata.normalize("NFC", other) == name:
            return ", but one whose accents are written in another Unicode form; rename it"
    return ""


def sizes_fit(clean, condition, factor):
    return clean == (condition[0] * factor, condition[1] * factor)


def as_text(size):
    return f"{size[0]}x{size[1]}"


def too_small(size, crop):
    """Say that a picture is smaller than a crop of it."""
    advice = "use larger pictures"
    if min(size) >= 8:
        advice += f" or --resolution {min(size) // 4 * 4}"
    return f"the picture is {as_text(size)}, smaller than the {crop}-pixel crop; {advice}"


def report_bad(error, skip=True):
    """Print a UserError about one of many pictures, or raise it."""
    if not skip:
        raise error
    tqdm.write(f"left out: {error}", file=sys.stderr)


class DeadLeaves:
    """Pictures of the built-in demo, each drawn when it is first asked for."""

    def __init__(self, count, size, seed):
        self.count = count
        self.size = size
        self.seed = seed
        self.pictures = {}

    def __len__(self):
        return self.count

    def peek(self, index):
        return False, ""

    def load(self, index):
        if index not in self.pictures:
            rng = np.random.default_rng(seed_for(self.seed, index, "dead leaves"))
            self.pictures[index] = dead_leaves(self.size, rng)
        return self.pictures[index], None, f"procedural picture {index}"


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


class PairedDataset(Dataset):
    """Crops of pairs: {"clean", "condition": [3, H, W] in [-1, 1], "caption": str, ...}.

    And "grey": whether the condition has one channel, repeated three times; "draw": the item's
    number; "bad": how many unreadable rows were passed over for it.

    source: CsvPairs or DeadLeaves. rows: which of its indices to use (default all).
    crop: side in pixels; None: whole pictures; [(n, side), ...]: that side for draws below n. In
    validation, a side of the picture that is shorter than the crop is kept whole.
    degradations: as parse_degradations returns them; 1 to max_degradations of them are applied to
    the clean picture of a row without a condition. caption_dropout: share of captions emptied.
    training True: item n is the n-th draw of an endless stream, which visits every row once an
    epoch in a new order, with random crop, flip and caption dropout. All of it depends on seed and
    n alone, so a run can stop and go on at any n. False: item n is the n-th of rows, cropped at its
    centre, always with the same degradation.
    skip_bad: in training, replace a row that cannot be read by that of the next draw."""

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
        skip_bad=False,
    ):
        self.source = source
        self.crop = crop
        self.degradations = degradations or degrade.parse_degradations(degrade.DEFAULT_DEGRADATIONS)
        self.rows = list(range(len(source))) if rows is None else rows
        self.max_degradations = max_degradations
        self.caption_dropout = caption_dropout
        self.training = training
        self.seed = seed
        self.skip_bad = skip_bad
        self.reported = set()
        self.order = EndlessOrder(self.rows, seed)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        # 2 * len(self) consecutive draws contain a whole epoch, so every row is tried
        tries = 2 * len(self) if self.skip_bad and self.training else 1
        for later in range(tries):
            try:
                return self.draw(index, later) | {"bad": later, "draw": index}
            except UserError as error:
                if later + 1 == tries:
                    raise
                if str(error) not in self.reported:
                    report_bad(error)
                    self.reported.add(str(error))

    def plan(self, index):
        """Return what draw(index) will do: (row, recipe or None, caption).

        It opens no picture, so that all captions of a run can be encoded before the run starts. Its
        random numbers are therefore separate from those of draw."""
        purpose = "train plan" if self.training else "validation plan"
        rng = np.random.default_rng(seed_for(self.seed, index, purpose))
        row = self.order[index] if self.training else self.rows[index]
        has_condition, caption = self.source.peek(row)
        recipe = None
        if not has_condition:
            count = rng.integers(1, self.max_degradations + 1)
            recipe = degrade.draw_recipe(self.degradations, count, rng)
            caption = caption or degrade.make_prompt([name for name, _ in recipe], rng)
        if self.training and rng.random() < self.caption_dropout:
            caption = ""
        return row, recipe, caption

    def draw(self, index, later=0):
        """Make item index. Raises UserError if its row cannot be read.

        later: take the row of draw index + later instead. The crop size is still that of index, so
        that the item fits its batch."""
        row, recipe, caption = self.plan(index + later)
        clean, condition, where = self.source.load(row)
        purpose = "train" if self.training else "validation"
        rng = np.random.default_rng(seed_for(self.seed, index, purpose))
        cut = self.draw_cut(clean, index, where, rng)
        clean = cut(clean)
        # one crop and one flip for both pictures of the pair: they cannot drift apart
        condition = degrade.apply_recipe(clean, recipe, rng) if recipe else cut(condition)
        return {
            "clean": to_tensor(clean),
            "condition": to_tensor(condition),
            "caption": caption,
            "grey": condition.mode == "L",
        }

    def draw_cut(self, image, index, where, rng):
        """Choose a crop and a flip -> a function that applies both to a picture of image's size.

        Raises UserError if the picture is smaller than the crop of training."""
        crop = self.crop_at(index)
        width, height = crop or image.width, crop or image.height
        if not self.training:  # pictures smaller than the crop are allowed
            width, height = min(width, image.width), min(height, image.height)
        if width > image.width or height > image.height:
            raise UserError(f"{where}: {too_small(image.size, crop)}")
        left, top = (image.width - width) // 2, (image.height - height) // 2
        flip = False
        if self.training:
            left, top = rng.integers((image.width - width + 1, image.height - height + 1))
            flip = rng.random() < 0.5

        def cut(image):
            image = image.crop((left, top, left + width, top + height))
            return ImageOps.mirror(image) if flip else image

        return cut

    def crop_at(self, index):
        if not isinstance(self.crop, list):
            return self.crop
        for end, side in self.crop:
            if index < end:
                return side
        return side

    def degradation_names(self):
        """Return the names of all degradations that its rows may have, by draw or by the CSV."""
        names = {name for name, _ in self.degradations}
        if isinstance(self.source, DeadLeaves):
            return names
        rows = [self.source.rows[i] for i in self.rows]
        if all(row.condition for row in rows):
            names = set()
        for row in rows:
            names.update(word.split(":")[0] for word in row.degradation.split())
        return names

    def name_degradations(self, index):
        """Return what was done to the condition of item index: ["jpeg", "downscale"].

        Read from its recipe; without one from the CSV's column degradation, which counts as one
        name if it is not a recipe; if that is empty from the caption."""
        row, recipe, caption = self.plan(index)
        if recipe:
            return [name for name, _ in recipe]
        written = self.source.rows[row].degradation
        if not written:
            return degrade.read_prompt(caption)
        names = [word.split(":")[0] for word in written.split()]
        return names if set(names) <= degrade.DEGRADATIONS.keys() else [written]


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


def collate(items):
    """[item] -> {"clean", "condition": [B, 3, H, W], "caption": [str], "bad": count, "draw": [n]}.

    From a cache "clean" and "condition" are latents [B, C, H/f, W/f]; for --stage decoder they are
    pixels, and "latents" [B, C, H/f, W/f] is added."""
    batch = {
        "caption": [item["caption"] for item in items],
        "bad": sum(item["bad"] for item in items),
        "draw": [item["draw"] for item in items],
    }
    for key in ("clean", "condition", "latents"):
        if key in items[0]:
            batch[key] = torch.stack([item[key] for item in items])
    return batch


def load_batches(dataset, batch_size, draws, workers, pin_memory=False):
    """Yield batches of dataset[n] for n in draws. Raises UserError for an unreadable picture.

    workers: how many processes make the batches; 0: this one does."""
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=draws,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=ignore_signals,
        pin_memory=pin_memory,
    )
    batches = iter(loader)
    try:
        yield from batches
    except UserError as error:  # a worker's is a whole traceback, which ends with the message
        raise UserError(str(error).split("UserError: ")[-1].strip()) from None
    finally:
        if workers:
            stop_workers(batches)


SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # the terminal was closed; Windows has none
    SIGNALS.append(signal.SIGHUP)


def ignore_signals(_):
    """Ignore Ctrl-C, SIGTERM and SIGHUP: all processes may get them, the main one handles them."""
    for name in SIGNALS:
        signal.signal(name, signal.SIG_IGN)


def stop_workers(batches):
    """End the worker processes of a DataLoader's iterator.

    They ignore SIGTERM, so Python would wait for them for ever as it exits. Where one of them was
    killed, kill the others: DataLoader would wait for a lock that the killed one may hold.
    """
    if batches._shutdown:  # the last batch was drawn
        return
    if all(worker.is_alive() for worker in batches._workers):
        batches._shutdown_workers()
        return
    torch._C._remove_worker_pids(id(batches))  # so that their death is no error
    batches._worker_pids_set = False
    batches._shutdown = True
    for worker in batches._workers:
        worker.kill()


# --------------------------------------------------------------------------------------------------
# Flags of what is drawn, and the split into training and held-out pictures.


def add_data_flags(parser):
    """Add the flags that train.py and the cache have in common."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data", metavar="CSV", help="pairs (default: the demo, which draws its own pictures)")
    add("--val_data", metavar="CSV", help="pairs to validate with (default: some of --data)")
    add("--val_count", type=between(int, 1), help="rows of --val_data to use at most (default all)")
    add_degradations_flag(group)
    most = between(int, 1, len(degrade.DEGRADATIONS))
    add("--max_degradations", type=most, default=3, help="1 to this many (default 3)")
    add("--skip_bad", action="store_true", help="leave out rows that cannot be read")
    side = between(int, 1, 2**14)
    add("--resolution", type=side, help="side of crops (default: tiny 48, mini 96, else 512)")
    share = between(float, 0, 1)
    add("--caption_dropout", type=share, default=0.1, help="captions to empty (default 0.1)")
    text = "tiny, sana1.5-1.6b or another name of vae.HUB, a hub id, a folder or a run"
    add("--model", help=f"{text} (default tiny; on a GPU SANA)")
    add("--vae", help="another DC-AE with the same encoder: a folder, short name or hub id")
    text = "what to train: autoencoder (of mini), restorer (default), or its decoder that sees the"
    add("--stage", choices=model.STAGES, help=f"{text} degraded image")
    text = "steps of the restorer that makes latents for the decoder (default 1); several: in turn"
    count = between(int, 0, 1000)
    add("--latent_steps", type=count, nargs="+", default=[1], metavar="N", help=f"{text}; 0: none")
    add("--seed", type=between(int, 0), default=0, help="of everything random (default 0)")
    add("--workers", type=count, default=1, help="processes that prepare pictures (default 1)")
    add_device_flag(group)


def add_degradations_flag(parser):
    default = degrade.DEFAULT_DEGRADATIONS
    example = "such as jpeg gaussian_noise:sigma=25 (default: all but color_jitter)"
    parser.add_argument("--degradations", nargs="+", metavar="NAME", default=default, help=example)


def add_device_flag(parser):
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, type=check_device, help=f"default {default}")


def check_device(name):
    """Return name if this machine has that torch device. Raises ArgumentTypeError if not."""
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentTypeError(f"{name}: not on this machine ({error})") from None
    return name


RESOLUTIONS = {"tiny": 48, "mini": 96}  # default sides of crops, pixels
RESOLUTION = 512  # of pretrained models
HELD_OUT = 8  # pictures that validation measures, or a tenth of the rows if that is fewer
VALIDATION_CROP = 192


def make_datasets(args, stages=None, kept=None):
    """Return the PairedDatasets of training and of validation. Raises UserError.

    Validation pictures are not trained on, unless --data has fewer than 10 rows and --val_data is
    not given.
    args: of add_data_flags. stages: [(n, side)] as PairedDataset's crop; default args.resolution.
    kept: names of the rows held out earlier in this run; those still in the CSV stay held out."""
    options = {
        "degradations": degrade.parse_degradations(args.degradations),
        "max_degradations": args.max_degradations,
        "caption_dropout": args.caption_dropout,
        "seed": args.seed,
        "skip_bad": args.skip_bad,
    }
    if args.val_count and not args.val_data:
        raise UserError("--val_count counts pictures of --val_data; give that too")
    crop = stages or args.resolution
    largest = max([args.resolution] + [side for _, side in stages or []])
    if args.data is None:  # the demo
        photos = DeadLeaves(256, max(128, largest), args.seed)
        others = DeadLeaves(HELD_OUT, VALIDATION_CROP, seed_for(args.seed, 0, "held out"))
        val_set = PairedDataset(others, None, training=False, **options)
        return PairedDataset(photos, crop, **options), val_set
    source = val_source = CsvPairs(args.data, args.skip_bad)
    source.check_sides(largest, args.skip_bad)
    if args.val_data:
        val_source = CsvPairs(args.val_data, args.skip_bad)
        if val_source.enlarge != source.enlarge:
            factors = f"{val_source.enlarge} and {source.enlarge} times smaller conditions"
            raise UserError(f"--val_data and --data have {factors}; give the same in both")
        held_out = list(range(len(val_source)))[: args.val_count]
    else:
        held_out = choose_held_out(PairedDataset(source, None, training=False, **options), kept)
    training = rows_apart(source, held_out, val_source)
    if len(source) < 10 and not args.val_data:
        print(f"{args.data}: too few rows to hold any out: validation is on training pictures")
        training = list(range(len(source)))
    if not training:
        raise UserError(f"{args.data}: all rows share a picture or group with one held out")
    refuse_useless_flags(source, val_source)
    print(f"{source.summary()}, {len(held_out)} for validation ({val_source.path.name})")
    shared = len(source) - len(training) - (0 if args.val_data else len(held_out))
    if shared > 0:
        print(f"{shared} more share a picture or group with those: they are not trained on")
    val_crop = max(VALIDATION_CROP, largest)
    val_set = PairedDataset(val_source, val_crop, rows=held_out, training=False, **options)
    return PairedDataset(source, crop, rows=training, **options), val_set


def choose_held_out(dataset, kept=None):
    """Return the indices of the rows to validate with: those named in kept, else random ones.

    Names that are no longer in the CSV are ignored. Raises UserError for a random row that cannot
    be read; with skip_bad it is skipped."""
    source = dataset.source
    places = {row.name: i for i, row in enumerate(source.rows)}
    held_out = [places[name] for name in kept or [] if name in places]
    if held_out:
        return held_out
    generator = torch.Generator().manual_seed(seed_for(dataset.seed, 0, "held out"))
    count = min(HELD_OUT, len(source) // 10) or len(source)
    for row in torch.randperm(len(source), generator=generator).tolist():
        if len(held_out) == count:
            break
        try:
            dataset.draw(row)
            held_out.append(row)
        except UserError as error:
            report_bad(error, dataset.skip_bad)
    if not held_out:
        raise UserError(f"{source.path}: no row that can be read")
    return held_out


def rows_apart(source, held_out, val_source):
    """Return the indices of the rows of source that may be trained on beside those held out.

    They share neither clean picture nor group with a held-out row. Pictures are compared by
    content: copies and other spellings of a path are the same picture."""
    held_out_rows = [val_source.rows[i] for i in held_out]
    contents = {val_source.headers[row.clean].digest for row in held_out_rows}
    groups = {row.group for row in held_out_rows} - {""}
    apart = []
    for i, row in enumerate(source.rows):
        content = source.headers[row.clean].digest
        if content not in contents and row.group not in groups:
            apart.append(i)
    return apart


def refuse_useless_flags(*sources):
    """Raise UserError for a flag of degradations where every row has a condition."""
    useless = {"--degradations", "--max_degradations"} & given_flags()
    if useless and all(row.condition for source in sources for row in source.rows):
        all_paired = f"every row of {sources[0].path} has a condition, nothing is degraded here"
        raise UserError(f"{sorted(useless)[0]}: {all_paired}; leave it out")


def row_names(dataset):
    """Return the names of a data set's rows, as its CSV has them; [] for the demo."""
    if isinstance(dataset.source, DeadLeaves):
        return []
    return [dataset.source.rows[row].name for row in dataset.rows]


def row_digests(dataset):
    """Return {name: digest of its files and texts} of a data set's rows, in their order."""
    if isinstance(dataset.source, DeadLeaves):
        return {}
    digests = {}
    for i in dataset.rows:
        row = dataset.source.rows[i]
        name = row.name
        while name in digests:
            name += " again"
        digests[name] = dataset.source.digest(row)
    return digests


def check_same(before, now, what):
    """Raise UserError, with the row's name, if two results of row_digests differ.

    what: how the message begins."""
    for name in before:
        if name not in now:
            raise UserError(f"{what}: the row {name} is gone")
        if now[name] != before[name]:
            raise UserError(f"{what}: the files or texts of the row {name} are not what they were")
    for name in now:
        if name not in before:
            raise UserError(f"{what}: the row {name} is new")
    if list(now) != list(before):
        raise UserError(f"{what}: the rows stand in another order")


# --------------------------------------------------------------------------------------------------
# What stands around the transformer, frozen: pixels become latents, captions become embeddings.


def hash_prompts(prompts):
    """Embed prompts without a text encoder -> text [B, L, 256], text_mask [B, L] bool.

    Each word becomes the 256 bits of its SHA-256 as -1 and 1. So words are nearly orthogonal, and
    the same on every machine. The empty word stands first, as <bos> does elsewhere."""
    rows = []
    for prompt in prompts:
        words = "".join(c if c.isalnum() else " " for c in prompt.lower()).split()
        digests = b"".join(hashlib.sha256(word.encode()).digest() for word in ["", *words])
        bits = np.unpackbits(np.frombuffer(digests, np.uint8), bitorder="little")
        rows.append(torch.from_numpy(bits).view(-1, 256).float() * 2 - 1)   # [L, 256]
    return model.pad_text(rows)


class Prompts:
    """Turn captions into embeddings.

    folder: a pretrained model's, whose Gemma encodes each distinct caption once and is then freed.
    None: hash_prompts."""

    def __init__(self, folder=None, device="cpu"):
        self.folder = folder
        self.device = device
        self.known = {}

    def prepare(self, captions):
        """Encode the captions that are new. Call it once with all: each call loads the encoder."""
        new = sorted(set(captions) - self.known.keys())
        if not new or not self.folder:
            return
        dtype = torch.float32 if self.device == "cpu" else None  # a CPU is slow in bf16
        gemma = model.Gemma2.from_pretrained(self.folder / "text_encoder", dtype).to(self.device)
        tokenizer = model.GemmaTokenizer(self.folder / "tokenizer")
        # one by one on a CPU: rounding does not depend on the batch, so resuming is exact
        batch_size = 1 if self.device == "cpu" else 8
        self.known.update(zip(new, model.encode_prompts(tokenizer, gemma, new, batch_size)))

    def __call__(self, captions):
        """[B] captions -> text [B, L, D], text_mask [B, L] bool."""
        if not self.folder:
            return hash_prompts(captions)
        self.prepare(captions)
        return model.pad_text([self.known[caption] for caption in captions])


def choose_vae(config, name):
    """Put --vae into the "model" of a config.json, if it is given. Raises UserError."""
    if not name:
        return
    if model.works_on_pixels(config):
        raise UserError("--vae: this model works on pixels, it has no DC-AE; leave it out")
    if config["decoder"]:
        raise UserError("--vae: this decoder was trained with one autoencoder; leave it out")
    if config["autoencoder"]:  # no other DC-AE has its latents: only the run's path may change
        if model.stage_of(name) != "autoencoder":
            raise UserError(f"--vae {name}: no run of --stage autoencoder")
        moved = model.name_base(name)
        if moved["digest"] != config["vae"]["digest"]:
            raise UserError(f"--vae {name}: other weights than those this model was trained with")
        config["vae"] = moved
    else:
        config["vae"] = str(Path(name).resolve()) if Path(name).is_dir() else name


def load_autoencoder(config, decoder=True):
    """Load the autoencoder for the "model" of a config.json, frozen. Raises UserError.

    decoder: with the decoder that sees the degraded image, where the config has one."""
    own = config["autoencoder"]
    if model.works_on_pixels(config):
        return PixelAE(**own)
    if own:
        with torch.device("meta"):
            autoencoder = DCAE(own)
        folder = model.open_base(config["vae"], "this model")
        load_weights(autoencoder, Path(folder) / "ema.safetensors")
    else:
        folder = resolve_model(config["name"], ["vae"]) / "vae"
        autoencoder = load_pretrained(DCAE, folder, torch.float32)
    if decoder and config["decoder"]:
        autoencoder.add_skips(config["decoder"]["gains"])
        autoencoder.freeze_around_decoder()
        load_weights(autoencoder, config["decoder"]["weights"], trained=True)
    return autoencoder.requires_grad_(False).eval()


def load_frozen_restorer(config, device):
    """Load the restorer that a decoder belongs to: its averaged weights. Raises UserError."""
    restorer, _ = model.load_restorer(model.open_base(config["base"], "this decoder"))
    if device.startswith("cuda") and not config["autoencoder"]:
        restorer.sana.bfloat16()
    return restorer.to(device).requires_grad_(False)


def load_frozen(config, device):
    """Load the autoencoder and the Prompts for the "model" of a config.json. Raises UserError."""
    autoencoder = load_autoencoder(config)
    if config["autoencoder"]:
        if not model.works_on_pixels(config):
            autoencoder.to(device)
        return autoencoder, Prompts()
    folder = resolve_model(config["name"], ["vae", "text_encoder"])
    width = load_config(model.Gemma2, folder / "text_encoder").config["hidden_size"]
    sana = config["sana"]
    if (autoencoder.channels, width) != (sana["out_channels"], sana["caption_channels"]):
        raise UserError(
            f"{folder}: the transformer takes {sana['out_channels']} channels and texts of "
            f"{sana['caption_channels']}; autoencoder and text encoder give {autoencoder.channels} "
            f"and {width}"
        )
    return autoencoder.to(device), Prompts(folder, device)


# --------------------------------------------------------------------------------------------------
# The cache: what training draws in its first epochs, encoded once. Training steps then need
# neither text encoder nor autoencoder; with --stage decoder, neither text encoder nor restorer.


class CachedDataset(Dataset):
    """The draws of a PairedDataset's first epochs, with latents [C, H/f, W/f] instead of pixels.

    (Or, for --stage decoder, pixels and restored latents.) Draw n has the same crop, flip and
    degradation as without the cache. After the cached epochs the same draws come again, in a new
    order. expected: fingerprint of the run; digests: row_digests of what it trains on; rows: how
    many draws an epoch has. Raises UserError if the cache differs from these or is incomplete."""

    def __init__(self, folder, expected, digests, rows):
        self.folder = Path(folder)
        self.rows = rows
        self.order = EndlessOrder(range(rows), expected["seed"])
        index = read_json(self.folder / "index.json")
        self.epochs = index.pop("epochs", None)
        if type(self.epochs) is not int or self.epochs < 1:
            raise UserError(f"{self.folder / 'index.json'}: not the index of a cache")
        for name, value in expected.items():
            if index.get(name) != value:
                other = f"was made with --{name} {index.get(name)}, this run has {value}"
                raise UserError(f"--cache {folder}: {other}; python data.py cache makes a new one")
        before = read_json(self.folder / "pictures.json")
        check_same(before, digests, f"--cache {folder} was made of other pictures")
        for n in range(self.epochs * rows):
            if not draw_path(folder, n).is_file():
                rest = "the python data.py cache command that began it makes the rest"
                raise UserError(f"--cache {folder}: not complete (draw {n}); {rest}")

    def prompts(self):
        """Return the embeddings of all captions: {caption: [L, D]}; {} if they are hashed."""
        path = self.folder / "prompts.safetensors"
        if not path.is_file():
            return {}
        with explain_errors(path, "this part of the cache"), safe_open(path, "pt") as file:
            return {key.removeprefix("caption "): file.get_tensor(key) for key in list(file.keys())}

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        epoch, position = divmod(index, self.rows)
        if epoch >= self.epochs:
            position = self.order[index]
        cached_epoch = epoch % self.epochs
        path = draw_path(self.folder, cached_epoch * self.rows + position)
        with explain_errors(path, "this part of the cache"), safe_open(path, "pt") as file:
            item = {}
            for key in list(file.keys()):
                tensor = file.get_tensor(key)
                item[key] = from_bytes(tensor) if tensor.dtype == torch.uint8 else tensor.float()
                if not item[key].isfinite().all():
                    raise ValueError(f"{key} is not finite")
            if item["clean"].shape != item["condition"].shape:
                raise ValueError("not a pair")
            return item | {"caption": file.metadata()["caption"], "bad": 0, "draw": index}


def draw_path(folder, n):
    """Return the file of draw n, a thousand in a folder."""
    return Path(folder) / f"{n // 1000:04d}" / f"{n:07d}.safetensors"


def fingerprint(args, config):
    """Return {flag: value} of all that a cache depends on, except its pictures."""
    weights = [config["autoencoder"]]
    if config["autoencoder"] and not model.works_on_pixels(config):
        weights.append(config["vae"]["digest"])
    if not config["autoencoder"]:
        folder = resolve_model(config["name"], ["vae", "text_encoder"])
        for part in (folder / "vae", folder / "text_encoder", folder / "tokenizer"):
            for path in sorted(part.glob("*.*")):
                weights.append([path.name, file_digest(path)])
    names = ["degradations", "max_degradations", "resolution", "caption_dropout", "seed", "stage"]
    if args.stage == "decoder":
        names.append("latent_steps")
        weights.append(config["base"]["digest"])
    flags = {name: getattr(args, name) for name in names}
    return flags | {"model": short_hash(weights)}


def short_hash(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def check_cache_flags(args):
    if not args.data:
        raise UserError("cache needs --data: the CSV of what to encode")
    args.stage = args.stage or "restorer"
    if args.stage == "autoencoder":
        raise UserError("cache: --stage autoencoder trains on pictures, there is nothing to encode")
    if args.stage == "restorer" and "--latent_steps" in given_flags():
        raise UserError("--latent_steps: it has no effect with --stage restorer")


def make_cache(args):
    """Encode the first args.epochs epochs of draws, each to a file in args.out.

    An interrupted command goes on where it stopped. Raises UserError."""
    check_cache_flags(args)
    args.model = args.model or default_model(args)
    config = model.describe_model(args.model, stage=args.stage)
    choose_vae(config, args.vae)
    args.resolution = args.resolution or RESOLUTIONS.get(config["name"], RESOLUTION)
    autoencoder, prompts = load_frozen(config | {"decoder": None}, args.device)
    check_resolution([args.resolution], autoencoder, config)
    train_set, val_set = make_datasets(args)
    out = Path(args.out)
    index = {"epochs": args.epochs} | fingerprint(args, config)
    if (out / "index.json").exists() and read_json(out / "index.json") != index:
        raise UserError(f"{out} holds another cache; choose another --out")
    digests = row_digests(train_set)
    if (out / "pictures.json").exists():
        check_same(read_json(out / "pictures.json"), digests, f"{out} is a cache of other pictures")
    write_text(out / "pictures.json", json.dumps(digests, indent=1))
    write_text(out / "index.json", json.dumps(index, indent=1))
    count = args.epochs * len(train_set)
    if prompts.folder and not (out / "prompts.safetensors").exists():
        prompts.prepare(captions_of(train_set, range(count), val_set))
        named = {f"caption {caption}": row for caption, row in prompts.known.items()}
        save_weights(named, out / "prompts.safetensors")
    restorer = None
    if args.stage == "decoder":  # after the text encoder has left the memory
        restorer = load_frozen_restorer(config, args.device)
    todo = [n for n in range(count) if not draw_path(out, n).exists()]
    bar = tqdm(total=count, initial=count - len(todo), unit="img", desc="cache")
    with bar, contextlib.closing(load_batches(train_set, 8, todo, args.workers)) as batches:
        for batch in batches:
            tensors = encode_batch(args, batch, autoencoder, prompts, restorer)
            for i, n in enumerate(batch["draw"]):
                item = {key: values[i] for key, values in tensors.items()}
                save_weights(item, draw_path(out, n), caption=batch["caption"][i])
            bar.update(len(batch["caption"]))
    made = f"{count} draws ({args.epochs} epochs of {len(train_set)} pictures) in {out}"
    print(f"{made}: python train.py with the same flags of data and --cache {out}")


def encode_batch(args, batch, autoencoder, prompts, restorer=None):
    """Return what a cache keeps of a batch, {name: [B, ...]}: latents of both pictures.

    With a restorer, for --stage decoder: the pictures as bytes, and the restored latents. Latents
    are in half precision: its rounding is a hundredth of what the autoencoder loses."""
    if restorer:
        latents = restore_latents(restorer, autoencoder, prompts, batch, args)
        pictures = {key: to_bytes(batch[key]) for key in ("clean", "condition")}
        return pictures | {"latents": latents.half()}
    latents = {}
    for key in ("clean", "condition"):
        latents[key] = autoencoder.encode(batch[key].to(args.device)).half()
    return latents


@torch.no_grad()
def restore_latents(restorer, autoencoder, prompts, batch, args):
    """Return the restored latents [B, C, H/f, W/f] that --stage decoder trains on.

    The noise of each draw, and which of args.latent_steps it takes, depend on its number alone. So
    a cache and a run on any number of processes see the same latents. 0 steps: the latents of the
    condition itself."""
    device = args.device
    condition = autoencoder.encode(batch["condition"].to(device))
    noise = []
    for n in batch["draw"]:
        generator = torch.Generator().manual_seed(seed_for(args.seed, n, "latents"))
        noise.append(torch.randn(condition.shape[1:], generator=generator))
    noise = torch.stack(noise).to(condition)
    text, text_mask = prompts(batch["caption"])
    latents = condition.clone()
    for k, steps in enumerate(args.latent_steps):
        turn = [i for i, n in enumerate(batch["draw"]) if n % len(args.latent_steps) == k]
        if turn and steps > 0:
            prompt = text[turn].to(device), text_mask[turn].to(device)
            velocity = model.guided(restorer, condition[turn], prompt, None)
            latents[turn] = model.sample_euler(velocity, noise[turn], steps, restorer.shift)
    return latents


def check_resolution(sides, autoencoder, config):
    """Raise UserError for a crop that the model cannot take."""
    unit = autoencoder.factor * config["sana"].get("patch_size", 1)
    for side in sides:
        if side % unit:
            raise UserError(f"--resolution {side}: give a multiple of {unit}, the model's unit")


def default_model(args):
    """Return the model of a command that names none."""
    if args.stage == "autoencoder":
        return "mini"
    return "sana1.5-1.6b" if args.data and args.device.startswith("cuda") else "tiny"


def captions_of(train_set, draws, val_set):
    """Return every caption that these training draws and the validation will ask for."""
    if train_set.skip_bad:  # a bad row's place is taken by later draws, see __getitem__
        draws = range(draws.start, draws.stop + 2 * len(train_set))
    captions = {""}
    captions.update(train_set.plan(i)[2] for i in draws)
    captions.update(val_set.plan(i)[2] for i in range(len(val_set)))
    return captions


# --------------------------------------------------------------------------------------------------
# Pre-generated pairs.


def make_pairs(photos, out, choices, counts, seed, skip_bad=False):
    """Degrade every photo of a folder once: out/clean/, out/condition/ (PNG), last out/pairs.csv.

    choices: as parse_degradations returns them. counts: [low, high] or [count], how many of them a
    photo gets. After an interruption, the same command goes on. Raises UserError."""
    out = Path(out)
    paths = list_images(photos)
    if out.resolve().is_relative_to(Path(photos).resolve()):
        raise UserError(f"--out {out} lies inside {photos}: choose a folder elsewhere")
    begun = out / "begun.json"
    made_of = json.dumps([[str(path) for path in paths], choices, counts, seed])
    if (out / "pairs.csv").exists() and not begun.exists():
        raise UserError(f"{out / 'pairs.csv'} exists already; choose another --out")
    if begun.exists() and begun.read_text(encoding="utf-8") != made_of:
        raise UserError(f"{out} holds the beginning of other pairs; choose another --out")
    write_text(begun, made_of)
    rows = [("image_path", "condition_image_path", "caption", "degradation")]
    notices = {}
    for i, path in enumerate(tqdm(paths, unit="img", desc="pairs")):
        # of the content too: another folder with the same seed gets other noise
        rng = np.random.default_rng(seed_for(seed, f"{i} {file_digest(path)}", "pairs"))
        recipe = degrade.draw_recipe(choices, rng.integers(counts[0], counts[-1] + 1), rng)
        caption = degrade.make_prompt([name for name, _ in recipe], rng)
        name = f"{i:05d}_{path.stem}.png"
        if not (out / "condition" / name).exists():
            try:
                clean = open_opaque(path, notices)
            except UserError as error:
                report_bad(error, skip_bad)
                continue
            degrade.save_image(clean, out / "clean" / name)
            degrade.save_image(degrade.apply_recipe(clean, recipe, rng), out / "condition" / name)
        rows.append((f"clean/{name}", f"condition/{name}", caption, degrade.describe(recipe)))
    if len(rows) == 1:
        raise UserError(f"{photos}: no picture that can be read")
    say_notices(notices)
    write_csv(out / "pairs.csv", rows)
    begun.unlink()
    left_out = len(paths) - len(rows) + 1
    print(f"{len(rows) - 1} pairs in {out / 'pairs.csv'}; {left_out} pictures left out")


# --------------------------------------------------------------------------------------------------


def match_folders(clean_folder, degraded_folder, out, pattern=""):
    """Write the CSV of two folders whose pictures are named alike, and print the others.

    pattern: "GT=NOISY" replaces the last GT in a clean picture's path by NOISY, which gives its
    partner's path. With a pattern, both folders may be the same one. Raises UserError."""
    if Path(clean_folder).resolve() == Path(degraded_folder).resolve():
        degraded_folder = clean_folder  # written alike, so that paths can be compared
    here, _, there = pattern.partition("=")
    if pattern and not (here and there):
        raise UserError(f"--pattern {pattern}: write CLEAN=DEGRADED, such as GT=NOISY")
    if Path(out).exists():
        raise UserError(f"{out} exists already; choose another --out")
    clean, degraded = list_both(clean_folder, degraded_folder, here)
    by_path, by_name = index_pictures(degraded, degraded_folder)
    partners = {}  # degraded picture: clean picture
    alone = []
    for path in clean:
        wanted = path.relative_to(clean_folder).as_posix()
        if here:
            wanted = there.join(wanted.rsplit(here, 1))  # the last one
        found = find_partner(path, Path(wanted).with_suffix(""), by_path, by_name)
        if found in partners:
            raise UserError(f"{found} would be the partner of {partners[found]} and {path}")
        if found:
            partners[found] = path
        else:
            alone.append(path)
    alone += [path for path in degraded if path not in partners]
    for path in alone:
        print(f"no partner: {path}", file=sys.stderr)
    if not partners:
        raise UserError(f"no picture of {clean_folder} has a partner in {degraded_folder}")
    rows = [("image_path", "condition_image_path", "caption")]
    for condition, path in partners.items():
        rows.append([os.path.relpath(name, Path(out).parent) for name in (path, condition)] + [""])
    write_csv(out, rows)
    print(f"{len(partners)} pairs in {out}; {len(alone)} pictures without a partner are left out")


def list_both(clean_folder, degraded_folder, word):
    """Return the clean and the degraded pictures; no picture is both. Raises UserError.

    word: what the path of a clean picture has, where the folders are one."""
    clean = list_images(clean_folder)
    degraded = list_images(degraded_folder)
    if clean_folder == degraded_folder:
        if not word:
            raise UserError(f"{clean_folder}: two times the same folder; say with --pattern which")
        clean = [path for path in clean if word in path.relative_to(clean_folder).as_posix()]
        chosen = set(clean)
        return clean, [path for path in degraded if path not in chosen]
    taken = {path.resolve() for path in degraded}  # one folder may lie within the other
    return [path for path in clean if path.resolve() not in taken], degraded


def index_pictures(paths, folder):
    """Return {path below the folder, without extension: pictures} and {bare name: pictures}."""
    by_path, by_name = {}, {}
    for path in paths:
        by_path.setdefault(path.relative_to(folder).with_suffix(""), []).append(path)
        by_name.setdefault(path.stem, []).append(path)
    return by_path, by_name


def find_partner(path, wanted, by_path, by_name):
    """Return the picture with the path that is wanted, else the only one of its name, else None.

    Extensions may differ. Raises UserError if there are two of that path."""
    found = by_path.get(wanted, [])
    if len(found) > 1:
        raise UserError(f"{path}: its partner may be {found[0]} and {found[1]}; leave one out")
    if not found and len(by_name.get(wanted.name, [])) == 1:
        found = by_name[wanted.name]
    return found[0] if found else None


# --------------------------------------------------------------------------------------------------


def main():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    pairs = commands.add_parser("pairs", description="Degrade every photo of a folder once.")
    add = pairs.add_argument
    add("photos", help="folder of clean photos (searched recursively)")
    add("--out", required=True, help="folder to make; pairs.csv appears when all is written")
    add_degradations_flag(pairs)
    text = "how many: one number, or lowest and highest (default 1 3)"
    count = between(int, 1, len(degrade.DEGRADATIONS))
    add("--num_degradations", nargs="+", type=count, default=[1, 3], metavar="N", help=text)
    add("--skip_bad", action="store_true", help="leave out pictures that cannot be read")
    add("--seed", type=between(int, 0), default=0, help="of everything random (default 0)")
    match = commands.add_parser("match", description="Write the CSV of two folders.")
    match.add_argument("clean", help="folder of clean pictures")
    match.add_argument("degraded", help="folder of the same pictures, degraded; may be the same")
    match.add_argument("--out", required=True, help="CSV to write")
    text = "what differs in their paths: GT=NOISY, sharp=blur, .png=x4.png"
    match.add_argument("--pattern", default="", metavar="CLEAN=DEGRADED", help=text)
    cache = commands.add_parser("cache", description="Encode what train.py would draw, once.")
    add_data_flags(cache)
    cache.add_argument("--epochs", type=between(int, 1), default=1, help="epochs (default 1)")
    cache.add_argument("--out", required=True, help="folder to make")
    args = parser.parse_args()
    if args.command == "cache":
        make_cache(args)
    elif args.command == "match":
        match_folders(args.clean, args.degraded, args.out, args.pattern)
    else:
        counts = args.num_degradations
        if len(counts) > 2 or counts[0] > counts[-1]:
            raise UserError("--num_degradations: give one number, or low and high")
        choices = degrade.parse_degradations(args.degradations)
        make_pairs(args.photos, args.out, choices, counts, args.seed, args.skip_bad)


if __name__ == "__main__":
    run_script(main)
