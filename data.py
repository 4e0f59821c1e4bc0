"""Pairs of a clean and a degraded image with a caption: from a CSV, degraded on the fly, or drawn by the program.

    python data.py pairs PHOTOS --out pairs                 degrade a folder of photos once: pairs/pairs.csv + images
    python data.py pairs PHOTOS --out val --degradations gaussian_noise:sigma=25
    python data.py cache --data pairs/pairs.csv --model sana1.5-1.6b --out cache     encode what training will draw, once

A CSV has the header image_path,condition_image_path,caption (the last two may be empty or absent). Paths are absolute
or relative to the CSV. An empty condition is made from the clean image each time it is drawn; an empty caption
becomes a prompt that names the degradations.
"""
import csv
import hashlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch.utils.data import DataLoader
from tqdm import tqdm

from degrade import (DEFAULT_DEGRADATIONS, Parser, UserError, apply_recipe, check_numbers, dead_leaves, describe, draw_recipe, skip_or_raise,
                     list_images, make_folder, make_prompt, one_line, open_image, parse_degradations, read_prompt, reading, run_script,
                     save_image, write_csv, write_text)
from model import PRESETS, SHIFT, Gemma2, GemmaTokenizer, Sana, build_restorer, encode_prompts, pad_text
from vae import DCAE, HUB, PixelAE, find_model, is_run, read_json, read_run, save_weights

CACHE_BYTES = 512 * 2**20  # decoded photos that a data set keeps in memory, per worker; the rest is read again


def seed_for(seed, index, what):
    """The one source of randomness: a 63-bit seed for a numpy or torch generator, from the run's seed, a step or
    sample index, and what the numbers are for. Same inputs, same numbers, in any process and any order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}/{what}".encode()).digest()[:8], "big") >> 1


# ----------------------------------------------------------------------------------------------------------------
# Pixels <-> tensors. Nobody else converts.

def to_tensor(image):
    """PIL image (alpha ignored) -> float tensor [3, H, W] in [-1, 1], RGB."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def to_image(tensor):
    """[3, H, W] in [-1, 1] (values outside are clipped) -> PIL RGB image, rounded to the nearest level."""
    levels = ((tensor.detach().float().cpu() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


# ----------------------------------------------------------------------------------------------------------------
# Where pairs come from. A source has a length, load(i) -> (clean, condition or None, what it is called), and
# peek(i) -> (whether there is a condition, caption), which opens nothing.

class CsvPairs:
    """The rows of a pairs.csv. Raises UserError, naming the row, for anything missing or unreadable."""

    def __init__(self, path, skip_bad=False):
        self.path, self.cache, self.cached = Path(path), {}, 0
        with reading(path, "this CSV"), open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            reader.fieldnames = header = [name.strip() for name in reader.fieldnames or []]
            lines = [(reader.line_num, row) for row in reader]
        if "image_path" not in header:
            found = f"its first line has {', '.join(header)}" if header else "the file is empty"
            raise UserError(f"{path}: no column image_path ({found}); the header is image_path,condition_image_path,caption")
        if not lines:
            raise UserError(f"{path}: a header and no rows")
        if "condition_image_path" not in header and len(header) > 1:  # a misspelt column should not pass unseen
            print(one_line(f"{path}: no column condition_image_path among {', '.join(header)}: the conditions are made on the fly"))
        self.rows = []
        for line, row in lines:
            try:
                self.rows.append(self._check(line, row))
            except UserError as error:
                skip_or_raise(error, skip_bad)
        if not self.rows:
            raise UserError(f"{path}: no row can be read")

    def _check(self, line, row):
        """(line number, clean path, condition path or None, caption, degradation) of one row, both files present."""
        clean, condition, *rest = ((row.get(key) or "").strip() for key in ("image_path", "condition_image_path", "caption", "degradation"))
        if not clean or None in row:
            raise UserError(f"{self.path}, line {line}: {'more fields than columns' if clean else 'image_path is empty'}")
        paths = [self.path.parent / name if name else None for name in (clean, condition)]
        for path in paths:
            if path and not os.path.isfile(path):
                raise UserError(f"{self.path}, line {line}: no file {path}")
        return line, *paths, *rest

    def __len__(self):
        return len(self.rows)

    def peek(self, index):
        """(whether the row has a condition image, its caption), without opening a file."""
        return self.rows[index][2] is not None, self.rows[index][3]

    def load(self, index):
        line, clean_path, condition_path = self.rows[index][:3]
        where = f"{self.path}, line {line}"
        try:
            clean, condition = self._open(clean_path), self._open(condition_path) if condition_path else None
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if condition and clean.size != condition.size:
            raise UserError(f"{where}: a pair of different sizes: {clean_path.name} is {_size(clean)}, "
                            f"{condition_path.name} is {_size(condition)}")
        return clean, condition, where

    def _open(self, path):
        image = self.cache.get(path)
        if image is None:
            image = open_image(path, notice=False).convert("RGB")
            if self.cached < CACHE_BYTES:
                self.cache[path] = image
                self.cached += 3 * image.width * image.height
        return image


class DeadLeaves:
    """count procedural images (the built-in demo), each made when it is first asked for."""

    def __init__(self, count, size, seed):
        self.count, self.size, self.seed, self.cache = count, size, seed, {}

    def __len__(self):
        return self.count

    def peek(self, index):
        return False, ""

    def load(self, index):
        if index not in self.cache:
            self.cache[index] = dead_leaves(self.size, np.random.default_rng(seed_for(self.seed, index, "dead leaves")))
        return self.cache[index], None, f"procedural image {index}"


def _size(image):
    return f"{image.width}x{image.height}"


# ----------------------------------------------------------------------------------------------------------------
# What training draws.

class PairedDataset(torch.utils.data.Dataset):
    """Crops of pairs, as {"clean", "condition": [3, crop, crop] in [-1, 1], "caption": str}.

    source: CsvPairs or DeadLeaves. rows: which of its indices to use (default all).
    degradations: [(name, strengths)] as parse_degradations gives them; 1 to max_degradations are applied.
    degradation: "auto" degrades on the fly where a row has no condition image, "on_the_fly" everywhere, "paired" nowhere.
    crop: side in pixels; None gives whole images; [(n, side), ...] that side for draws below n.
    training: True: item n is the n-th draw of an endless stream that visits every row once per epoch in a new order,
    with random crop, flip and caption dropout, all from (seed, n): a run can stop and go on at any n.
    False: item n is row n, centre crop, the same degradation always.
    skip_bad: in the place of a row that cannot be read, the next draw's; "bad" counts them.
    """

    def __init__(self, source, crop, degradations=None, rows=None, degradation="auto", max_degradations=3,
                 caption_dropout=0.1, training=True, seed=0, skip_bad=False):
        self.source, self.crop, self.seed, self.training = source, crop, seed, training
        self.degradations = parse_degradations(DEFAULT_DEGRADATIONS) if degradations is None else degradations
        self.rows = list(range(len(source))) if rows is None else rows
        self.degradation, self.max_degradations, self.caption_dropout = degradation, max_degradations, caption_dropout
        self.skip_bad, self.told, self.epoch, self.order = skip_bad, set(), -1, None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        """The item, or the UserError that kept it from being made (an exception raised in a worker process would
        arrive as a page of traceback)."""
        problem = None
        for bad in range(2 * len(self) if self.skip_bad and self.training else 1):  # so many draws see every row
            try:
                return self.draw(index, bad) | {"bad": bad}
            except UserError as error:
                problem = problem or error
                if self.skip_bad and str(error) not in self.told:
                    skip_or_raise(error)
                    self.told.add(str(error))
        return problem

    def plan(self, index):
        """What draw(index) is about to do -> (row, recipe or None, caption). It opens no image, so that all captions of
        a run can be encoded before it starts."""
        rng = np.random.default_rng(seed_for(self.seed, index, "train plan" if self.training else "validation plan"))
        row, recipe = self._row(index), None
        has_condition, caption = self.source.peek(row)
        if self.degradation == "on_the_fly" or not has_condition:
            recipe = draw_recipe(self.degradations, rng.integers(1, self.max_degradations + 1), rng)
        caption = caption or make_prompt([name for name, _ in recipe or ()], rng)
        dropped = self.training and rng.random() < self.caption_dropout
        return row, recipe, "" if dropped else caption

    def name_degradations(self, index):
        """What draw(index) does to the condition, or was done: by its recipe, the CSV's column, or the caption's words. -> "jpeg downscale"."""
        row, recipe, caption = self.plan(index)
        written = self.source.rows[row][4].split() if not recipe else [name for name, _ in recipe]
        return " ".join(word.split(":")[0] for word in written or read_prompt(caption))

    def draw(self, index, later=0):
        """Item index, of the row that comes so many draws later."""
        row, recipe, caption = self.plan(index + later)
        clean, condition, where = self.source.load(row)
        if self.degradation == "paired" and condition is None:
            raise UserError(f"{where}: no condition image, and --degradation paired makes none")
        crop = next(side for end, side in self.crop if index < end) if isinstance(self.crop, list) else self.crop
        width, height = (crop or side for side in clean.size)
        if width > clean.width or height > clean.height:
            raise UserError(f"{where}: the image is {_size(clean)}, smaller than the {crop}-pixel crop; "
                            f"use --resolution {min(clean.size) // 4 * 4} or larger images")
        rng = np.random.default_rng(seed_for(self.seed, index, "train" if self.training else "validation"))
        # one crop and one flip for both images of the pair: they cannot drift apart
        room = clean.width - width, clean.height - height
        left, top = rng.integers((room[0] + 1, room[1] + 1)) if self.training else (room[0] // 2, room[1] // 2)
        flip = self.training and rng.random() < 0.5

        def cut(image):
            image = image.crop((left, top, left + width, top + height))
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image

        clean = cut(clean)
        condition = apply_recipe(clean, recipe, rng) if recipe else cut(condition)
        return {"clean": to_tensor(clean), "condition": to_tensor(condition), "caption": caption}

    def _row(self, index):
        if not self.training:
            return self.rows[index]
        epoch, position = divmod(index, len(self.rows))
        if epoch != self.epoch:
            self.order, self.epoch = epoch_order(self.seed, epoch, self.rows), epoch
        return self.order[position]


def epoch_order(seed, epoch, rows):
    """The rows in the order in which an epoch visits them."""
    return np.random.default_rng(seed_for(seed, epoch, "order")).permutation(rows)


def collate(items):
    """[item] -> {"clean", "condition": [B, 3, H, W], "caption": [str], "bad": count}, or the first UserError among them."""
    for item in items:
        if isinstance(item, UserError):
            return item
    batch = {key: torch.stack([item[key] for item in items]) for key in ("clean", "condition")}
    return batch | {"caption": [item["caption"] for item in items], "bad": sum(item.get("bad", 0) for item in items)}


def make_loader(dataset, args, draws):
    """Batches of the draws with these numbers, every draws.step-th of which this process computes."""
    return DataLoader(dataset, args.batch_size // draws.step, sampler=draws, num_workers=args.workers, collate_fn=collate, worker_init_fn=ignore_signals,
                      pin_memory=args.device.startswith("cuda"))


def ignore_signals(_):
    """Workers leave Ctrl-C and a first SIGTERM, which may go to all processes, to the main one: it finishes its step and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def add_data_flags(parser):
    """What is drawn: flags that train.py and the cache have in common."""
    parser.add_argument("--data", metavar="CSV", help="header image_path,condition_image_path,caption (default: the demo)")
    parser.add_argument("--degradation", choices=["auto", "on_the_fly", "paired"], default="auto",
                        help="auto: degrade on the fly the rows without a condition image; on_the_fly: all; paired: none")
    parser.add_argument("--degradations", nargs="+", default=list(DEFAULT_DEGRADATIONS), metavar="NAME",
                        help="the set to draw from, e.g. jpeg gaussian_noise:sigma=25 (default: all but color_jitter)")
    parser.add_argument("--max_degradations", type=int, default=3, help="1 to this many per image (default 3)")
    parser.add_argument("--skip_bad", action="store_true", help="leave out rows that cannot be read, and count them, instead of ending there")
    parser.add_argument("--resolution", type=int, help="side of the training crops, in pixels (default 48 for tiny, else 512)")
    parser.add_argument("--caption_dropout", type=float, default=0.1, help="share of captions replaced by the empty one (default 0.1)")
    parser.add_argument("--model", help=f"tiny, trained from scratch; or one to start from: {', '.join(HUB)}, a hub id, a folder in "
                        "the hub's layout, or a run of this program (default: sana1.5-1.6b for --data on a GPU, else tiny)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random: same seed, same run (default 0)")
    parser.add_argument("--workers", type=int, default=1, help="processes that prepare images (default 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if there is one")


DATA_RANGES = {"max_degradations": (1, 10**9), "resolution": (1, 2**14), "workers": (0, 1000), "caption_dropout": (0, 1)}


def check_device(name, flag="device"):
    """name, if this machine has that torch device. Raises UserError if not."""
    try:
        return torch.zeros(1, device=name).cpu() is not None and name
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--{flag} {name}: not on this machine ({str(error).splitlines()[0]})") from None


def curriculum(args):
    """--curriculum -> [(draws before the end of the stage, crop)], as PairedDataset takes it."""
    stages, end = [], 0
    try:
        for part in args.curriculum.split(","):
            side, steps = map(int, part.split(":"))
            end += steps * args.batch_size
            stages.append((end, side))
            if not (1 <= side <= DATA_RANGES["resolution"][1] and 1 <= steps <= 10**9):
                raise ValueError
    except ValueError:
        raise UserError(f"--curriculum {args.curriculum}: write side:steps,side:steps, such as 512:8000,1024:2000") from None
    return stages


VALIDATION_CROP = 192


def make_datasets(args, stages=None):
    """args: of add_data_flags. stages: crop sizes over the draws, instead of args.resolution.
    -> training draws, and validation pairs that are never trained on."""
    options = dict(degradations=parse_degradations(args.degradations), degradation=args.degradation, seed=args.seed,
                   max_degradations=args.max_degradations, caption_dropout=args.caption_dropout, skip_bad=args.skip_bad)
    crop, largest = stages or args.resolution, max([args.resolution] + [side for _, side in stages or ()])
    if args.data is None:
        train = PairedDataset(DeadLeaves(256, max(128, largest), args.seed), crop, **options)
        held_out = DeadLeaves(8, VALIDATION_CROP, seed_for(args.seed, 0, "held out"))
        return train, PairedDataset(held_out, None, training=False, **options)
    source = CsvPairs(args.data, args.skip_bad)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed_for(args.seed, 0, "held out"))).tolist()
    count, held_out, sides = min(8, len(source) // 10), [], []
    if not count:
        print(f"{args.data} has {len(source)} rows, too few to hold any out: validation is on training images")
    trial = PairedDataset(source, args.resolution, training=False, **options)
    for i in order:
        if len(held_out) < (count or len(order)):
            try:
                trial.draw(i)
                sides += source.load(i)[0].size
                held_out.append(i)
            except UserError as error:
                skip_or_raise(error, args.skip_bad)
    kept_out = {source.rows[i][1] for i in held_out if count}  # a clean photo may stand in several rows
    rows = [i for i in order if source.rows[i][1] not in kept_out]
    if not rows or not held_out:
        raise UserError(f"{args.data}: " + ("all rows have the same clean image; training needs more" if held_out else "no row can be read"))
    return (PairedDataset(source, crop, rows=rows, **options),
            PairedDataset(source, min(max(VALIDATION_CROP, largest), *sides), rows=held_out, training=False, **options))


# ----------------------------------------------------------------------------------------------------------------
# --model, and what stands around the transformer: pixels become latents, captions become embeddings.

def describe_model(name, conditioning=None):
    """--model and --conditioning -> "model" of config.json: all that is needed to build the restorer, but its weights."""
    if name in PRESETS:
        config = PRESETS[name]
    elif is_run(name):
        config = read_run(name)["model"]
        if config["conditioning"] not in ("none", conditioning or config["conditioning"]):
            raise UserError(f"--model {name} has learnt --conditioning {config['conditioning']} already; leave the flag out")
    else:
        folder = find_model(name)
        sana, about = Sana.from_config(folder / "transformer").config, read_json(folder / "transformer" / "config.json")
        scheduler = folder / "scheduler" / "scheduler_config.json"
        config = {"name": str(folder.resolve()) if Path(name).is_dir() else name, "autoencoder": None, "sana": sana,
                  "prediction": about.get("_prediction", "velocity"),
                  "conditioning": "projection" if sana["in_channels"] == sana["out_channels"] else "widen",
                  "shift": read_json(scheduler).get("flow_shift", SHIFT) if scheduler.is_file() else SHIFT}
    before = "projection" if config["conditioning"] == "none" else config["conditioning"]
    config = config | {"conditioning": conditioning or before}
    if conditioning == "none":  # nothing that a residual could be added to
        config["prediction"] = "velocity"
    with torch.device("meta"):
        build_restorer(config)  # so that what cannot be built is said before anything is loaded
    return config


def hash_prompts(prompts):
    """Embeds prompts without a text encoder: each word becomes the 256 bits of its SHA-256 as -1 and 1, so words are
    nearly orthogonal, and the same on every machine. The empty word stands first, as <bos> does elsewhere.
    -> text [B, L, 256], text_mask [B, L] bool."""
    rows = []
    for prompt in prompts:
        words = [""] + "".join(c if c.isalnum() else " " for c in prompt.lower()).split()
        digests = torch.tensor([list(hashlib.sha256(word.encode()).digest()) for word in words])  # [L, 32] bytes
        rows.append((digests[:, :, None] >> torch.arange(8) & 1).flatten(1).float() * 2 - 1)      # [L, 256]
    return pad_text(rows)


class Prompts:
    """Captions to text embeddings. folder: a pretrained model's, whose Gemma encodes each distinct caption once and is
    then freed again; None: hash_prompts."""

    def __init__(self, folder=None, device="cpu"):
        self.folder, self.device, self.known = folder, device, {}

    def prepare(self, captions):
        """Encode those that are new. To be called once with all captions of a run: it loads the encoder."""
        new = sorted(set(captions) - self.known.keys())
        if new and self.folder:
            dtype = torch.float32 if self.device == "cpu" else None  # a CPU is slow in bf16
            gemma = Gemma2.from_pretrained(self.folder / "text_encoder", dtype).to(self.device)
            rows = encode_prompts(GemmaTokenizer(self.folder / "tokenizer"), gemma, new)
            self.known.update(zip(new, rows))

    def __call__(self, captions):
        """-> text [B, L, D], text_mask [B, L]."""
        self.prepare(captions)
        return pad_text([self.known[caption] for caption in captions]) if self.folder else hash_prompts(captions)


def build_surroundings(config, device):
    """-> (autoencoder, Prompts) for the "model" of a config.json."""
    if config["autoencoder"]:
        return PixelAE(**config["autoencoder"]), Prompts()
    folder, sana = find_model(config["name"], ("vae", "text_encoder")), config["sana"]
    autoencoder, width = DCAE.from_pretrained(folder / "vae", torch.float32), Gemma2.from_config(folder / "text_encoder").c["hidden_size"]
    if (autoencoder.channels, width) != (sana["out_channels"], sana["caption_channels"]):
        raise UserError(f"{folder}: the transformer works on {sana['out_channels']} channels and texts of {sana['caption_channels']}, "
                        f"the autoencoder gives {autoencoder.channels}, the text encoder {width}")
    return autoencoder.to(device), Prompts(folder, device)


# ----------------------------------------------------------------------------------------------------------------
# The cache: what training draws in its first epochs, encoded once, so that it needs no autoencoder and no text encoder.

SHARD, ENCODE = 1024, 8  # draws in a file, and at a time
DAMAGED = "this part of the cache (delete it and run python data.py cache again)"


def fingerprint(args, config):
    """What a cache depends on, by the names of the flags: {name: value}."""
    source = CsvPairs(args.data, args.skip_bad)
    files = [(path.name, path.stat().st_size) if path else None for row in source.rows for path in row[1:3]]
    weights = []
    if not config["autoencoder"]:
        folder = find_model(config["name"], ("vae", "text_encoder"))
        weights = sorted((path.name, path.stat().st_size) for part in ("vae", "text_encoder", "tokenizer")
                         for path in (folder / part).glob("*.*"))
    digest = hashlib.sha256(json.dumps([[row[3] for row in source.rows], files]).encode()).hexdigest()
    model = hashlib.sha256(json.dumps([config["autoencoder"], weights]).encode()).hexdigest()
    names = ("degradation", "degradations", "max_degradations", "resolution", "caption_dropout", "seed")
    return {"data": digest, "model": model} | {name: getattr(args, name) for name in names}


class CachedDataset(torch.utils.data.Dataset):
    """The draws of a PairedDataset's first epochs, as latents [C, H, W]. Draw n is what it would have been without the cache, with its crop,
    flip and degradation; after the cached epochs the same come again, in a new order. expected: fingerprint of the run.
    Raises UserError for a cache that was made of anything else, or is not complete."""

    def __init__(self, folder, expected, rows):
        self.folder, self.rows, self.seed = Path(folder), rows, expected["seed"]
        index = read_json(self.folder / "index.json")
        made_of, self.epochs = index.get("made_of"), index.get("epochs")
        if not isinstance(made_of, dict) or type(self.epochs) is not int or self.epochs < 1:
            raise UserError(f"{self.folder / 'index.json'}: not the index of a cache")
        for name, value in expected.items():
            if made_of.get(name) != value:
                what = "" if name in ("data", "model") else f" {made_of.get(name)}, this run has {value}"
                raise UserError(f"--cache {folder}: was made with another --{name}{what}; make a new one with python data.py cache")
        count = -(-self.epochs * rows // SHARD)
        missing = count - len(list(self.folder.glob("draws_*.safetensors")))
        if missing > 0:
            raise UserError(f"--cache {folder}: not complete, {missing} of {count} files are missing; the same python data.py cache command makes the rest")
        self.paths = [self.folder / f"draws_{i:05d}.safetensors" for i in range(count)]
        self.files, self.captions, self.prompts, shapes = {}, [], {}, set()
        for i, path in enumerate(self.paths):
            with reading(path, DAMAGED):
                sizes, captions = [self._file(i).get_slice(key).get_shape() for key in ("clean", "condition")], json.loads(self._file(i).metadata()["captions"])
                shapes |= {tuple(size[1:]) for size in sizes}
                if len(shapes) > 1 or {len(captions), *(size[0] for size in sizes)} != {min(SHARD, self.epochs * rows - i * SHARD)}:
                    raise ValueError("not the draws that belong here")
                self.captions += map(str, captions)
        self.files = {}  # each worker opens its own
        if (path := self.folder / "prompts.safetensors").is_file():
            with reading(path, DAMAGED), safe_open(path, "pt") as file:
                self.prompts = {key.removeprefix("caption "): file.get_tensor(key) for key in file.keys()}
                if len({(t.shape[1:], t.dtype) for t in self.prompts.values()}) > 1 or not all(t.isfinite().all() for t in self.prompts.values()):
                    raise ValueError("not embeddings of one width, or not finite")

    def __len__(self):
        return self.rows

    def _file(self, shard):
        if shard not in self.files:
            self.files[shard] = safe_open(self.paths[shard], "pt")
        return self.files[shard]

    def __getitem__(self, index):
        """The draw, or the UserError that kept it from being read."""
        epoch, position = divmod(index, self.rows)
        if epoch >= self.epochs:
            position = epoch_order(self.seed, epoch, self.rows)[position]
        shard, row = divmod(int(epoch % self.epochs * self.rows + position), SHARD)
        try:
            with reading(self.paths[shard], DAMAGED):
                latents = {key: self._file(shard).get_slice(key)[row].float() for key in ("clean", "condition")}
                if not all(t.isfinite().all() for t in latents.values()):
                    raise ValueError("latents that are not finite")
        except UserError as error:
            return error
        return latents | {"caption": self.captions[shard * SHARD + row]}


def make_cache(args):
    """Encode the first args.epochs epochs of draws -> files of SHARD draws in args.out, each whole or absent, in order: an
    interrupted command goes on where it stopped."""
    args.model = args.model or ("sana1.5-1.6b" if args.device.startswith("cuda") else "tiny")
    config = describe_model(args.model)
    args.resolution = args.resolution or (48 if config["autoencoder"] else 512)
    train_set, val_set = make_datasets(args)
    made_of, out = fingerprint(args, config), make_folder(args.out)
    index, count = {"epochs": args.epochs, "made_of": made_of}, args.epochs * len(train_set)
    if (out / "index.json").exists() and read_json(out / "index.json") != index:
        raise UserError(f"{out} holds another cache; choose another --out")
    write_text(out / "index.json", json.dumps(index, indent=1))
    autoencoder, prompts = build_surroundings(config, args.device)
    if prompts.folder and not (out / "prompts.safetensors").exists():
        prompts.prepare(["", *(train_set.plan(i)[2] for i in range(count + 2 * len(train_set) * args.skip_bad)), *(val_set.plan(i)[2] for i in range(len(val_set)))])
        save_weights({f"caption {caption}": row for caption, row in prompts.known.items()}, out / "prompts.safetensors")
    done = next(i for i in range(-(-count // SHARD) + 1) if not (out / f"draws_{i:05d}.safetensors").exists()) * SHARD
    parts, captions = {"clean": [], "condition": []}, []
    loader = DataLoader(train_set, ENCODE, sampler=range(done, count), num_workers=args.workers, collate_fn=collate)
    with tqdm(total=count, initial=min(done, count), unit="img", desc="cache") as bar:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            for key, part in parts.items():  # half precision: its rounding is a hundredth of what the autoencoder loses
                part.append(autoencoder.encode(batch[key].to(args.device)).half().cpu())
            captions += batch["caption"]
            bar.update(len(batch["caption"]))
            if len(captions) == SHARD or bar.n == count:
                save_weights({key: torch.cat(part) for key, part in parts.items()}, out / f"draws_{(bar.n - 1) // SHARD:05d}.safetensors",
                             captions=json.dumps(captions))
                parts, captions = {"clean": [], "condition": []}, []
    print(f"{count} draws ({args.epochs} epochs of {len(train_set)} images) in {out}: python train.py --data {args.data} --cache {out}")


# ----------------------------------------------------------------------------------------------------------------
# Pre-generation.

def make_pairs(photos, out, choices, counts, seed, skip_bad=False):
    """Degrade every photo of a folder once -> out/clean/, out/condition/ (PNG) and, last, out/pairs.csv. The same command goes on
    after an interruption."""
    out, paths, rows = Path(out), list_images(photos), []
    begun = out / "begun.json"
    if out.resolve().is_relative_to(Path(photos).resolve()):
        raise UserError(f"--out {out} lies inside {photos}: its pictures would be taken for photos; choose a folder elsewhere")
    make_folder(out)
    if (out / "pairs.csv").exists() and not begun.exists():
        raise UserError(f"{out / 'pairs.csv'} exists already; choose another --out")
    made_of = json.dumps([str(Path(photos).resolve()), list(map(str, paths)), choices, counts, seed])
    if begun.exists() and begun.read_text(encoding="utf-8") != made_of:
        raise UserError(f"{out} holds the beginning of other pairs; choose another --out")
    write_text(begun, made_of)
    for i, path in enumerate(tqdm(paths, unit="img", desc="pairs")):
        rng = np.random.default_rng(seed_for(seed, i, "pairs"))
        recipe = draw_recipe(choices, rng.integers(counts[0], counts[-1] + 1), rng)
        caption, name = make_prompt([n for n, _ in recipe], rng), f"{i:05d}_{one_line(path.stem)}.png"
        if not (out / "condition" / name).exists():
            try:
                clean = open_image(path).convert("RGB")
            except UserError as error:
                skip_or_raise(error, skip_bad)
                continue
            save_image(clean, out / "clean" / name)
            save_image(apply_recipe(clean, recipe, rng), out / "condition" / name)
        rows.append((f"clean/{name}", f"condition/{name}", caption, describe(recipe)))
    if not rows:
        raise UserError(f"{photos}: no picture can be read")
    write_csv(out / "pairs.csv", [("image_path", "condition_image_path", "caption", "degradation")] + rows)
    begun.unlink()
    print(f"{len(rows)} pairs in {out / 'pairs.csv'}" + f"; {len(paths) - len(rows)} pictures left out" * (len(rows) < len(paths)))


def main():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    pairs = commands.add_parser("pairs", doc="Degrade every photo of a folder once: pairs.csv and images.")
    pairs.add_argument("photos", help="folder of clean photos (searched recursively)")
    pairs.add_argument("--out", required=True, help="folder to make; pairs.csv appears when all images are written")
    pairs.add_argument("--degradations", nargs="+", default=DEFAULT_DEGRADATIONS, metavar="NAME",
                       help="the set to draw from, e.g. jpeg gaussian_noise:sigma=25 (default: all but color_jitter)")
    pairs.add_argument("--num_degradations", nargs="+", type=int, default=[1, 3], metavar="N",
                       help="how many per image: one number, or the lowest and highest (default 1 3)")
    pairs.add_argument("--skip_bad", action="store_true", help="leave out pictures that cannot be read, and count them, instead of ending there")
    pairs.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    cache = commands.add_parser("cache", doc="Encode what python train.py with the same flags will draw.")
    add_data_flags(cache)
    cache.add_argument("--epochs", type=int, default=1, help="epochs of draws, each with its own crops, flips and degradations (default 1)")
    cache.add_argument("--out", required=True, help="folder to make")
    args = parser.parse_args()
    if args.command == "cache":
        if not args.data:
            raise UserError("cache needs --data: the CSV of what to encode")
        check_numbers(args, DATA_RANGES | {"epochs": (1, 10**9)}), check_device(args.device)
        return make_cache(args)
    if len(args.num_degradations) > 2 or not 1 <= args.num_degradations[0] <= args.num_degradations[-1] <= 10**9:
        raise UserError(f"--num_degradations {' '.join(map(str, args.num_degradations))}: give one number, or low and high")
    make_pairs(args.photos, args.out, parse_degradations(args.degradations), args.num_degradations, args.seed, args.skip_bad)


if __name__ == "__main__":
    run_script(main)
