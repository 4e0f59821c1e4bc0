"""Pairs of a clean and a degraded picture with a caption: read, drawn, degraded, cached.

    python data.py pairs PHOTOS --out pairs         degrade a folder of photos once: pairs/pairs.csv
    python data.py pairs PHOTOS --out val --degradations gaussian_noise:sigma=25
    python data.py cache --data pairs/pairs.csv --model sana1.5-1.6b --out cache
                                                     encode what training will draw, once

A CSV has the header image_path,condition_image_path,caption (the last two may be empty or absent).
Paths are absolute or relative to the CSV. An empty condition is made from the clean picture each
time it is drawn. An empty caption becomes a prompt that names the degradations.
"""
import contextlib
import csv
import hashlib
import json
import os
import signal
import sys
import warnings
from argparse import ArgumentTypeError
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
from degrade import Parser, UserError, between, explain_errors, run_script
from vae import DCAE, HUB, PixelAE, atomic_write, load_config, read_json, resolve_model
from vae import save_weights, write_text


def seed_for(seed, index, purpose):
    """Return the 63-bit seed of a numpy or torch generator: the one source of randomness.

    It depends on the run's seed, a step or draw, and what the numbers are for. Same inputs, same
    numbers, in any process and in any order."""
    digest = hashlib.sha256(f"{seed}/{index}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# --------------------------------------------------------------------------------------------------
# Pictures. Nobody else opens, saves or converts them.

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def to_tensor(image):
    """PIL image (alpha ignored) -> float tensor [3, H, W] in [-1, 1], RGB."""
    levels = np.array(image.convert("RGB"))
    return torch.from_numpy(levels).permute(2, 0, 1).float() / 127.5 - 1


def to_image(tensor):
    """[3, H, W] in [-1, 1] (clipped) -> PIL RGB image, rounded to the nearest level."""
    levels = ((tensor.detach().float().cpu() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def open_image(path, notice=True):
    """Read a picture as plain_image makes it. Raises UserError.

    notice: say on stderr that 16-bit grey is scaled to 8 bits."""
    quiet = warnings.catch_warnings(action="ignore")
    with explain_errors(path, "this picture"), quiet, Image.open(path) as image:
        if image.format == "EPS":  # Pillow would have Ghostscript run it
            raise ValueError("PostScript is a program, not a picture")
        image.load()
        if notice and image.mode.startswith("I"):
            print(f"{path}: 16-bit grey is converted to 8 bits", file=sys.stderr)
        return plain_image(image)


def plain_image(image):
    """Turn a PIL image upright (EXIF orientation) -> L, LA, RGB or RGBA, 8 bits a channel.

    16-bit grey is scaled. It may change the image that it is given. Raises UserError."""
    with contextlib.suppress(Exception):  # damaged EXIF: then as it is stored
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise UserError("floating-point pixels have no fixed range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = image.convert("I")
        low, high = image.getextrema()
        if low < 0 or high > 65535:
            raise UserError("its values go beyond 16 bits; save it with 8 or 16 bits")
        return image.point([round(level / 257) for level in range(65536)], "L")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    return image.convert(mode + "A" if image.has_transparency_data else mode)


def save_image(image, path, **options):
    """Write a picture, its format by extension. Raises UserError."""
    with atomic_write(path) as partial:
        image.save(partial, **options)


def list_images(folder):
    """Return the pictures below a folder, sorted, without hidden files. Raises UserError."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    found = []
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix.lower() in PICTURES and not path.name.startswith(".") and path.is_file():
            found.append(path)
    if not found:
        raise UserError(f"{folder}: no pictures in this folder")
    return found


def write_csv(path, rows):
    with atomic_write(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


# --------------------------------------------------------------------------------------------------
# Where pairs come from. A source has a length, peek(i) -> (whether it has a condition, caption),
# which opens nothing, and load(i) -> (clean, condition or None, what to call it in an error).

CACHE_BYTES = 512 * 2**20  # decoded photos that a source keeps in memory; the rest is read again


@dataclass
class Row:
    """A row of a CSV, and the line that it ends on."""

    line: int
    clean: Path
    condition: Path | None
    caption: str
    degradation: str  # what was done to the condition, as degrade.describe() writes it; may be ""


class CsvPairs:
    """The rows of a pairs.csv. Raises UserError, with the row, for anything missing or unreadable.

    skip_bad: leave out rows whose files are missing, with a line each, instead."""

    def __init__(self, path, skip_bad=False):
        self.path = Path(path)
        self.pictures = {}
        self.bytes = 0
        self.rows = []
        with explain_errors(path, "this CSV"), open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            lines = [(reader.line_num, fields) for fields in reader]
        header = ",".join(reader.fieldnames)
        if reader.fieldnames.count("image_path") != 1:
            wanted = "image_path,condition_image_path,caption"
            raise UserError(f"{path}: no column image_path in {header!r}; the header is {wanted}")
        if "condition_image_path" not in reader.fieldnames and "," in header:
            print(f"{path}: no column condition_image_path in {header!r}: conditions are made here")
        for line, fields in lines:
            try:
                self.rows.append(self.check(line, fields))
            except UserError as error:
                report_bad(error, skip_bad)
        if not self.rows:
            raise UserError(f"{path}: no row that can be read")

    def check(self, line, fields):
        where = f"{self.path}, line {line}"
        if None in fields:
            raise UserError(f"{where}: more fields than columns")
        values = {key: (value or "").strip() for key, value in fields.items()}
        if not values["image_path"]:
            raise UserError(f"{where}: image_path is empty")
        clean = self.path.parent / values["image_path"]
        condition = None
        if values.get("condition_image_path"):
            condition = self.path.parent / values["condition_image_path"]
        for path in (clean, condition):
            if path and not os.path.isfile(path):  # of any text: too long, with a NUL
                raise UserError(f"{where}: no file {path}")
        caption, degradation = values.get("caption", ""), values.get("degradation", "")
        return Row(line, clean, condition, caption, degradation)

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
        if condition and clean.size != condition.size:
            sizes = f"{size_of(clean)} and {size_of(condition)}"
            raise UserError(f"{where}: a pair of different sizes, {sizes}")
        return clean, condition, where

    def open(self, path):
        if path in self.pictures:
            return self.pictures[path]
        image = open_image(path, notice=False).convert("RGB")
        if self.bytes < CACHE_BYTES:
            self.pictures[path] = image
            self.bytes += 3 * image.width * image.height
        return image


def size_of(image):
    return f"{image.width}x{image.height}"


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
    smallest, largest, count = 1.5, size * 0.6, size * size // 24
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
        color = below + rng.uniform(0.1, 1) * (color - below)  # much detail is of low contrast
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
    return Image.fromarray(np.clip(np.rint(image * 255), 0, 255).astype(np.uint8))


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
    """Crops of pairs: {"clean", "condition": [3, H, W] in [-1, 1], "caption": str, "bad": int}.

    source: CsvPairs or DeadLeaves. rows: which of its indices to use (default all).
    crop: side in pixels; None: whole pictures; [(n, side), ...]: that side for draws below n.
    degradations: of parse_degradations; 1 to max_degradations of them are applied to the clean
    picture of a row without a condition.
    training True: item n is the n-th draw of an endless stream, which visits every row once an
    epoch in a new order, with random crop, flip and caption dropout, all from (seed, n). So a run
    can stop and go on at any n. False: item n is row n, centre crop, always the same degradation.
    skip_bad: the next draw's row in place of one that cannot be read. "bad" counts them."""

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
        tries = 2 * len(self) if self.skip_bad and self.training else 1  # so many see every row
        for later in range(tries):
            try:
                return self.draw(index, later) | {"bad": later}
            except UserError as error:
                if later + 1 == tries:
                    raise
                if str(error) not in self.reported:
                    report_bad(error)
                    self.reported.add(str(error))

    def plan(self, index):
        """Say what draw(index) will do -> (row, recipe or None, caption).

        It opens no picture, so that all captions of a run can be encoded before it starts. So it
        has random numbers of its own."""
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
        """Make item index, of the row that comes so many draws later. Raises UserError.

        The crop is that of index, so that its size is that of the batch."""
        row, recipe, caption = self.plan(index + later)
        clean, condition, where = self.source.load(row)
        purpose = "train" if self.training else "validation"
        rng = np.random.default_rng(seed_for(self.seed, index, purpose))
        cut = self.draw_cut(clean, index, where, rng)
        clean = cut(clean)
        # one crop and one flip for both pictures of the pair: they cannot drift apart
        condition = degrade.apply_recipe(clean, recipe, rng) if recipe else cut(condition)
        return {"clean": to_tensor(clean), "condition": to_tensor(condition), "caption": caption}

    def draw_cut(self, image, index, where, rng):
        """Draw a crop and a flip -> the function that cuts them out of a picture of that size."""
        crop = self.crop_at(index)
        width, height = crop or image.width, crop or image.height
        if width > image.width or height > image.height:
            smaller = min(image.size) // 4 * 4
            raise UserError(
                f"{where}: the picture is {size_of(image)}, smaller than the {crop}-pixel crop; "
                f"use larger pictures or --resolution {smaller}"
            )
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

    def name_degradations(self, index):
        """Say what was done to the condition of item index: "jpeg downscale".

        By the recipe, else the CSV's column, else the words of the caption."""
        row, recipe, caption = self.plan(index)
        if recipe:
            return " ".join(name for name, _ in recipe)
        written = self.source.rows[row].degradation
        if written:
            return " ".join(word.split(":")[0] for word in written.split())
        return " ".join(degrade.read_prompt(caption))


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
            self.kept = rng.permutation(self.rows)
            self.epoch = epoch
        return int(self.kept[position])


def collate(items):
    """[item] -> {"clean", "condition": [B, 3, H, W], "caption": [str], "bad": count}."""
    return {
        "clean": torch.stack([item["clean"] for item in items]),
        "condition": torch.stack([item["condition"] for item in items]),
        "caption": [item["caption"] for item in items],
        "bad": sum(item["bad"] for item in items),
    }


def load_batches(dataset, batch_size, draws, workers, pin_memory=False):
    """Yield batches of the draws with these numbers, which worker processes make.

    Raises UserError for a picture that cannot be read."""
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
    except UserError as error:  # from a worker it brings its traceback, whose end is the message
        raise UserError(str(error).split("UserError: ")[-1].strip()) from None
    finally:
        if workers:
            stop_workers(batches)


def ignore_signals(_):
    """Leave Ctrl-C and SIGTERM, which may go to all processes, to the main one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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
    torch._C._remove_worker_pids(id(batches))  # that they die is no error any more
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
    add_degradations_flag(group)
    add("--max_degradations", type=between(int, 1, 6), default=3, help="1 to this many (default 3)")
    add("--skip_bad", action="store_true", help="leave out rows that cannot be read")
    side = between(int, 1, 2**14)
    add("--resolution", type=side, help="side of the crops (default 48 pixels for tiny, else 512)")
    share = between(float, 0, 1)
    add("--caption_dropout", type=share, default=0.1, help="captions to empty (default 0.1)")
    names = ", ".join(HUB)
    add("--model", help=f"tiny, {names}, a hub id, a folder or a run (default tiny; on a GPU SANA)")
    add("--seed", type=between(int, 0), default=0, help="of everything random (default 0)")
    workers = between(int, 0, 1000)
    add("--workers", type=workers, default=1, help="processes that prepare pictures (default 1)")
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


HELD_OUT = 8  # pictures that validation measures, or a tenth of the rows if that is fewer
VALIDATION_CROP = 192


def make_datasets(args, stages=None):
    """Return training draws, and validation pairs that are never trained on. Raises UserError.

    args: of add_data_flags. stages: [(n, side)] as PairedDataset's crop; default args.resolution.
    """
    options = {
        "degradations": degrade.parse_degradations(args.degradations),
        "max_degradations": args.max_degradations,
        "caption_dropout": args.caption_dropout,
        "seed": args.seed,
        "skip_bad": args.skip_bad,
    }
    crop = stages or args.resolution
    largest = max([args.resolution] + [side for _, side in stages or []])
    if args.data is None:
        photos = DeadLeaves(256, max(128, largest), args.seed)
        others = DeadLeaves(HELD_OUT, VALIDATION_CROP, seed_for(args.seed, 0, "held out"))
        val_set = PairedDataset(others, None, training=False, **options)
        return PairedDataset(photos, crop, **options), val_set
    source = CsvPairs(args.data, args.skip_bad)
    trial = PairedDataset(source, args.resolution, training=False, **options)
    training, held_out = split_rows(trial)
    sides = [min(source.load(row)[0].size) for row in held_out]
    val_crop = min(max(VALIDATION_CROP, largest), *sides)
    val_set = PairedDataset(source, val_crop, rows=held_out, training=False, **options)
    return PairedDataset(source, crop, rows=training, **options), val_set


def split_rows(dataset):
    """Return the rows to train on and those held out, which share no clean picture.

    A row that cannot be read is not held out. Raises UserError."""
    source = dataset.source
    generator = torch.Generator().manual_seed(seed_for(dataset.seed, 0, "held out"))
    order = torch.randperm(len(source), generator=generator).tolist()
    count = min(HELD_OUT, len(source) // 10)
    if count == 0:
        rows = f"{source.path} has {len(source)} rows, too few to hold any out"
        print(f"{rows}: validation is on training pictures")
    held_out = []
    for row in order:
        if count and len(held_out) == count:
            break
        try:
            dataset.draw(row)
            held_out.append(row)
        except UserError as error:
            report_bad(error, dataset.skip_bad)
    if not held_out:
        raise UserError(f"{source.path}: no row that can be read")
    if count == 0:
        return order, held_out
    pictures = {source.rows[row].clean for row in held_out}
    training = [row for row in order if source.rows[row].clean not in pictures]
    if not training:
        raise UserError(f"{source.path}: all rows have the same clean picture; give more")
    return training, held_out


# --------------------------------------------------------------------------------------------------
# What stands around the transformer, frozen: pixels become latents, captions become embeddings.


def hash_prompts(prompts):
    """Embed prompts without a text encoder -> text [B, L, 256], text_mask [B, L] bool.

    Each word becomes the 256 bits of its SHA-256 as -1 and 1. So words are nearly orthogonal, and
    the same on every machine. The empty word stands first, as <bos> does elsewhere."""
    rows = []
    for prompt in prompts:
        letters = "".join(c if c.isalnum() else " " for c in prompt.lower())
        digests = []
        for word in [""] + letters.split():
            digests.append(list(hashlib.sha256(word.encode()).digest()))
        bits = (torch.tensor(digests)[:, :, None] >> torch.arange(8)) & 1   # [L, 32, 8]
        rows.append(bits.flatten(1).float() * 2 - 1)                        # [L, 256]
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
        """Encode those that are new. Call it once with all captions: it loads the encoder."""
        new = sorted(set(captions) - self.known.keys())
        if not new or not self.folder:
            return
        dtype = torch.float32 if self.device == "cpu" else None  # a CPU is slow in bf16
        gemma = model.Gemma2.from_pretrained(self.folder / "text_encoder", dtype).to(self.device)
        tokenizer = model.GemmaTokenizer(self.folder / "tokenizer")
        self.known.update(zip(new, model.encode_prompts(tokenizer, gemma, new)))

    def __call__(self, captions):
        """[B] captions -> text [B, L, D], text_mask [B, L] bool."""
        if not self.folder:
            return hash_prompts(captions)
        self.prepare(captions)
        return model.pad_text([self.known[caption] for caption in captions])


def load_frozen(config, device):
    """Load the autoencoder and the Prompts for the "model" of a config.json. Raises UserError."""
    if config["autoencoder"]:
        return PixelAE(**config["autoencoder"]), Prompts()
    folder = resolve_model(config["name"], ["vae", "text_encoder"])
    autoencoder = DCAE.from_pretrained(folder / "vae", torch.float32)
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
# The cache: what training draws in its first epochs, encoded once. Training then needs neither
# autoencoder nor text encoder.


class CachedDataset(Dataset):
    """The draws of a PairedDataset's first epochs, with latents [C, H, W] in place of pixels.

    Draw n is what it would be without the cache, with its crop, flip and degradation. After the
    cached epochs the same draws come again, in a new order. expected: fingerprint of the run; rows:
    how many draws an epoch has. Raises UserError for a cache that was made of anything else, or is
    not complete."""

    def __init__(self, folder, expected, rows):
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
        for n in range(self.epochs * rows):
            if not draw_path(folder, n).is_file():
                rest = "the python data.py cache command that began it makes the rest"
                raise UserError(f"--cache {folder}: not complete (draw {n}); {rest}")

    def prompts(self):
        """Return the embeddings of all captions: {caption: [L, D]}; {} for the tiny preset."""
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
            item = {key: file.get_tensor(key).float() for key in ("clean", "condition")}
            clean, condition = item["clean"], item["condition"]
            if clean.shape != condition.shape or not (clean + condition).isfinite().all():
                raise ValueError("not a pair of latents")
            return item | {"caption": file.metadata()["caption"], "bad": 0}


def draw_path(folder, n):
    """Return the file of draw n, a thousand in a folder."""
    return Path(folder) / f"{n // 1000:04d}" / f"{n:07d}.safetensors"


def fingerprint(args, config):
    """Return what a cache depends on, by the names of the flags: {name: value}."""
    files = []
    for row in CsvPairs(args.data, args.skip_bad).rows:
        sizes = [path.stat().st_size for path in (row.clean, row.condition) if path]
        files.append([row.clean.name, row.caption, sizes])
    weights = [config["autoencoder"]]
    if not config["autoencoder"]:
        folder = resolve_model(config["name"], ["vae", "text_encoder"])
        for part in ("vae", "text_encoder", "tokenizer"):
            for path in sorted((folder / part).glob("*.*")):
                weights.append([path.name, path.stat().st_size])
    names = "degradations", "max_degradations", "resolution", "caption_dropout", "seed"
    flags = {name: getattr(args, name) for name in names}
    return flags | {"data": short_hash(files), "model": short_hash(weights)}


def short_hash(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def make_cache(args):
    """Encode the first args.epochs epochs of draws, each to a file in args.out.

    An interrupted command goes on where it stopped. Raises UserError."""
    if not args.data:
        raise UserError("cache needs --data: the CSV of what to encode")
    args.model = args.model or default_model(args)
    config = model.describe_model(args.model)
    args.resolution = args.resolution or (48 if config["autoencoder"] else 512)
    train_set, val_set = make_datasets(args)
    out = Path(args.out)
    index = {"epochs": args.epochs} | fingerprint(args, config)
    if (out / "index.json").exists() and read_json(out / "index.json") != index:
        raise UserError(f"{out} holds another cache; choose another --out")
    write_text(out / "index.json", json.dumps(index, indent=1))
    autoencoder, prompts = load_frozen(config, args.device)
    count = args.epochs * len(train_set)
    if prompts.folder and not (out / "prompts.safetensors").exists():
        prompts.prepare(captions_of(train_set, range(count), val_set))
        named = {f"caption {caption}": row for caption, row in prompts.known.items()}
        save_weights(named, out / "prompts.safetensors")
    todo = [n for n in range(count) if not draw_path(out, n).exists()]
    numbers = iter(todo)
    bar = tqdm(total=count, initial=count - len(todo), unit="img", desc="cache")
    with bar, contextlib.closing(load_batches(train_set, 8, todo, args.workers)) as batches:
        for batch in batches:
            clean = autoencoder.encode(batch["clean"].to(args.device))
            condition = autoencoder.encode(batch["condition"].to(args.device))
            for i, caption in enumerate(batch["caption"]):
                # half precision: its rounding is a hundredth of what the autoencoder loses
                latents = {"clean": clean[i].half(), "condition": condition[i].half()}
                save_weights(latents, draw_path(out, next(numbers)), caption=caption)
            bar.update(len(batch["caption"]))
    made = f"{count} draws ({args.epochs} epochs of {len(train_set)} pictures) in {out}"
    print(f"{made}: python train.py --data {args.data} --cache {out}")


def default_model(args):
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

    choices: of parse_degradations. counts: [low, high], how many of them for a photo.
    The same command goes on after an interruption. Raises UserError."""
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
    for i, path in enumerate(tqdm(paths, unit="img", desc="pairs")):
        rng = np.random.default_rng(seed_for(seed, i, "pairs"))
        recipe = degrade.draw_recipe(choices, rng.integers(counts[0], counts[-1] + 1), rng)
        caption = degrade.make_prompt([name for name, _ in recipe], rng)
        name = f"{i:05d}_{path.stem}.png"
        if not (out / "condition" / name).exists():
            try:
                clean = open_image(path).convert("RGB")
            except UserError as error:
                report_bad(error, skip_bad)
                continue
            save_image(clean, out / "clean" / name)
            save_image(degrade.apply_recipe(clean, recipe, rng), out / "condition" / name)
        rows.append((f"clean/{name}", f"condition/{name}", caption, degrade.describe(recipe)))
    if len(rows) == 1:
        raise UserError(f"{photos}: no picture that can be read")
    write_csv(out / "pairs.csv", rows)
    begun.unlink()
    left_out = len(paths) - len(rows) + 1
    print(f"{len(rows) - 1} pairs in {out / 'pairs.csv'}; {left_out} pictures left out")


# --------------------------------------------------------------------------------------------------


def main():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    pairs = commands.add_parser("pairs", description="Degrade every photo of a folder once.")
    add = pairs.add_argument
    add("photos", help="folder of clean photos (searched recursively)")
    add("--out", required=True, help="folder to make; pairs.csv appears when all is written")
    add_degradations_flag(pairs)
    text, count = "how many: one number, or lowest and highest (default 1 3)", between(int, 1, 6)
    add("--num_degradations", nargs="+", type=count, default=[1, 3], metavar="N", help=text)
    add("--skip_bad", action="store_true", help="leave out pictures that cannot be read")
    add("--seed", type=between(int, 0), default=0, help="of everything random (default 0)")
    cache = commands.add_parser("cache", description="Encode what train.py would draw, once.")
    add_data_flags(cache)
    cache.add_argument("--epochs", type=between(int, 1), default=1, help="epochs (default 1)")
    cache.add_argument("--out", required=True, help="folder to make")
    args = parser.parse_args()
    if args.command == "cache":
        make_cache(args)
        return
    counts = args.num_degradations
    if len(counts) > 2 or counts[0] > counts[-1]:
        raise UserError("--num_degradations: give one number, or low and high")
    choices = degrade.parse_degradations(args.degradations)
    make_pairs(args.photos, args.out, choices, counts, args.seed, args.skip_bad)


if __name__ == "__main__":
    run_script(main)
