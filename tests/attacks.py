"""Attacks on what a user may hand over: tables, pictures, weight files.

Case n of an attack is the same everywhere: the named cases come first, the others are drawn from
(seed, n). A case works, or it is refused in one line that names the file. Nothing may hang, warn,
take gigabytes, or run what a file contains.
"""

import contextlib
import copy
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import tempfile
import traceback
import unittest.mock
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from PIL import Image

import conftest  # noqa: F401, puts the project on the path
import data
import degrade
import evaluate
import vae
from degrade import UserError
from model import PRESETS, Gemma2, GemmaTokenizer, Sana, build_restorer, encode_prompts
from pipeline import tiny_pipeline
from vae import DCAE, load_pretrained

SECONDS = 30  # that a case may take
GIGABYTES = 3  # that an attack may take beyond what the process had


def attempt(use, name):
    """Call use() -> "worked" or "refused".

    Raises AssertionError if it was refused in another way than one line that has name in it, or if
    it warned or printed more than one line.
    """
    said = io.StringIO()
    with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(said):
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", module="PIL")  # as run_script has it
        try:
            use()
            outcome = "worked"
        except (UserError, OSError) as error:  # run_script says them in one line
            outcome = "refused"
            line = str(error)[:1000]
            good = line.isprintable() and name in line and "MemoryError" not in line
            assert good, f"refused with {line!r}"
    assert not warned, [str(warning.message) for warning in warned]
    lines = said.getvalue().splitlines()
    assert len(lines) <= 1 and all(line.isprintable() for line in lines), lines[:5]
    return outcome


def attack(case, numbers):
    """Call case(n) for each number -> (Counter of outcomes, [what went wrong]).

    It happens in a process of its own whose memory is limited. A case that takes longer than
    SECONDS kills that process, even where Python does not listen, and another one goes on.
    """
    torch.set_num_threads(1)  # before the fork: threads do not survive one
    context = multiprocessing.get_context("fork")
    last = context.Value("q", -1)
    answers = context.SimpleQueue()
    counts = Counter()
    wrong = []
    with tempfile.TemporaryFile() as errors:
        while numbers:
            process = context.Process(target=run_cases, args=(case, numbers, last, answers, errors))
            process.start()
            while process.is_alive() or not answers.empty():
                if answers.empty():
                    process.join(0.01)
                    continue
                outcome, problem = answers.get()
                if outcome:
                    counts[outcome] += 1
                if problem:
                    wrong.append(problem)
            if process.exitcode:
                meaning = f"-14: it took more than {SECONDS} s"
                wrong.append(f"case {last.value}: the process died, {process.exitcode} ({meaning})")
            numbers = [n for n in numbers if n > last.value]
        errors.seek(0)
        for line in errors.read().decode(errors="replace").splitlines():
            # what libtiff and Pillow's logger say of a damaged TIFF is not ours to hold back
            if not re.match(r"[\w.]+: |More samples per pixel", line):
                wrong.append(f"on stderr: {line}")
    return counts, wrong


def run_cases(case, numbers, last, answers, errors):
    """Be the process of attack(): put (outcome, problem) of each case into answers."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (GIGABYTES + 1) * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.dup2(errors.fileno(), 2)
    for n in numbers:
        last.value = n
        signal.alarm(SECONDS)
        try:
            answers.put((case(n), None))
        except BaseException as error:
            reason = traceback.format_exception(error)[-1][-1500:]
            answers.put((None, f"case {n}: {reason}"))
        signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    if grown > GIGABYTES:
        answers.put((None, f"{grown:.1f} GB of memory"))
    os._exit(0)


def choose(rng, options, chances=None):
    """Return one of the options; numpy's choice would make an array of them."""
    return options[rng.choice(len(options), p=chances)]


def damage(content, rng):
    """Do one to three of seven things to bytes."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        size = max(1, len(content))
        at = int(rng.integers(size))
        part = slice(at, at + int(rng.integers(1, max(2, size // 8))))
        kind = rng.integers(7)
        if kind == 0:  # cut off
            del content[at:]
        elif kind == 1:  # flipped
            for i in rng.integers(0, size, rng.choice([1, 4, 30])):
                content[i : i + 1] = bytes([rng.integers(256)])
        elif kind == 2:  # blanked
            content[part] = bytes(len(content[part]))
        elif kind == 3:  # removed
            del content[part]
        elif kind == 4:  # inserted
            content[at:at] = rng.bytes(part.stop - at)
        elif kind == 5:  # repeated
            content[at:at] = content[part]
        else:  # an extreme number early on
            width = int(rng.choice([1, 2, 4, 8]))
            largest = 2 ** (8 * width)
            number = choose(rng, [0, 1, largest - 1, largest // 2 - 1, 30000]) % largest
            at = int(rng.integers(min(size, 100)))
            content[at : at + width] = number.to_bytes(width, choose(rng, ["little", "big"]))
    return bytes(content)


def special_files(folder, suffix, name="attack"):
    """Make what is no file to be read: {kind: path}."""
    places = {}
    for kind in ("folder", "pipe", "dangling", "loop", "absent"):
        places[kind] = folder / f"{name}_{kind}{suffix}"
    places["folder"].mkdir()
    os.mkfifo(places["pipe"])
    places["dangling"].symlink_to("nowhere")
    places["loop"].symlink_to(places["loop"].name)
    return places | {"device": Path("/dev/zero")}


# --------------------------------------------------------------------------------------------------
# Tables. In them HERE stands for their folder, FOLDER for its name.

HEADER = "image_path,condition_image_path,caption\n"
GOOD_TABLES = {
    "plain": HEADER + "a.png,b.png,words\n",
    "byte order mark": (HEADER + "a.png,,é\n").encode("utf-8-sig"),
    "old line ends": HEADER.replace("\n", "\r") + "a.png,,x\r",
    "quotes, commas, lines": HEADER + '"a.png",,"a ""b"", c\nd"\n',
    "NUL in a caption": HEADER + "a.png,,a\0b\n",
    "up and down again": "image_path\n../FOLDER/deep/../a.png\n",
    "absolute": "image_path\nHERE/a.png\n",
    "columns in another order, and more": "caption,who,image_path\nx,me,a.png\n",
    "short rows": HEADER + "a.png\n",
    "link": "image_path\nlink.png\n",
    "blank lines": HEADER + "\n\na.png\n\n",
    "lines in a header": 'image_path,"a\nb\nc"\na.png,x\n',
    "100,000 rows": HEADER + "a.png,b.png,words\n" * 100_000,
}
BAD_TABLES = {
    "nothing": "",
    "blank": "\n\n\n",
    "header alone": HEADER,
    "no header": "a.png,b.png,x\n",
    "header in capitals": HEADER.upper() + "a.png,,\n",
    "semicolons": (HEADER + "a.png,,x\n").replace(",", ";"),
    "one column too many": HEADER + "a.png,,x,y\n",
    "a column twice": "image_path,image_path\na.png,b.png\n",
    "empty path": HEADER + " ,b.png,x\n",
    "UTF-16": (HEADER + "a.png,,x\n").encode("utf-16"),
    "UTF-16 without a mark": (HEADER + "a.png,,x\n").encode("utf-16-le"),
    "UTF-32": (HEADER + "a.png,,x\n").encode("utf-32"),
    "Latin 1": (HEADER + "a.png,,é\n").encode("latin-1"),
    "open quote": HEADER + 'a.png,,"x\n',
    "text after a quote": HEADER + 'a.png,,"x"y\n',
    "a line in a path": HEADER + '"a\nb.png",,x\n',
    "NUL in a path": HEADER + "a\0.png,,x\n",
    "escape codes": HEADER + "\x1b[31ma.png,,x\n",
    "huge caption": HEADER + f"a.png,,{'x' * 10_000_000}\n",
    "huge path": HEADER + f"{'x' * 100_000},,\n",
    "huge header": "column," * 100_000 + "\n",
    "folder for a picture": "image_path\ndeep\n",
    "pipe for a picture": "image_path\nx_pipe.png\n",
    "dangling picture": "image_path\na.png\nx_dangling.png\n",
    "loop": "image_path\nx_loop.png\n",
    "device": "image_path\n/dev/zero\n",
    "broken picture": "image_path,condition_image_path\na.png,broken.png\n",
    "other size": "image_path,condition_image_path\na.png,small.png\n",
}
HEADERS = [
    ["image_path", "condition_image_path", "caption"],
    ["image_path"],
    ["image_path", "caption"],
    [" image_path ", "condition_image", "caption"],
    ["Image_Path", "caption"],
    ["image_path", "condition_image_path", "caption", "degradation"],
    ["caption", "image_path"],
    [],
]
PATHS = [  # the first two are good
    *("a.png", "b.png", "HERE/a.png", "../FOLDER/b.png", "./deep/../a.png", " a.png ", "link.png"),
    *("small.png", "broken.png", "deep", "x_pipe.png", "x_dangling.png", "gone.png", "/", ".."),
    *("~/a.png", "C:\\a.png", "a.png\0", "a\nb.png", "\u202ea.png", "é.png", "x" * 300, ""),
    *("=cmd()", '"'),
]
WORDS = [  # so are these
    *("", "words", "Remove noise.", "a, b", "a\nb", 'say "x"', "\0", "😀 é", "x" * 200_000),
    *("\x1b[2J", "jpeg:quality=20", " "),
]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "cp1252", "shift_jis", "utf-7"]


def draw_table(rng):
    """Draw a table of mostly good rows, written in some way, damaged or not -> bytes."""
    header = choose(rng, HEADERS, [0.4, 0.15, 0.1, 0.05, 0.05, 0.15, 0.05, 0.05])
    bad = rng.choice([0, 0, 0.2, 0.9])  # the share of bad cells
    rows = [header]
    for _ in range(rng.choice([0, 1, 2, 5, 40])):
        row = []
        for name in header:
            cells = PATHS if "path" in name.lower() else WORDS
            row.append(choose(rng, cells if rng.random() < bad else cells[:2]))
        if rng.random() < bad / 4:
            row = row[:-1] if rng.random() < 0.5 else [*row, "more"]
        rows.append(row)
    comma = choose(rng, [",", ";", "\t"], [0.9, 0.05, 0.05])
    lines = []
    for row in rows:
        lines.append(comma.join(quote(cell, comma, rng) for cell in row))
    text = choose(rng, ["\n", "\r\n", "\r"], [0.7, 0.2, 0.1]).join(lines)
    encoding = choose(rng, ENCODINGS, [0.6, 0.15, 0.05, 0.05, 0.05, 0.04, 0.03, 0.03])
    content = text.encode(encoding, "replace")
    return damage(content, rng) if rng.random() < 0.4 else content


def quote(cell, comma, rng):
    """Quote a cell that needs it, mostly, and sometimes one that does not."""
    needed = any(c in cell for c in f'{comma}"\n\r')
    if rng.random() < (0.9 if needed else 0.1):
        return '"' + cell.replace('"', '""') + '"'
    return cell


def tables(folder, numbers, seed=0):
    """Do what attack() does."""
    folder = Path(folder)
    for name, size in [("a", 20), ("b", 20), ("small", 12), ("é", 20)]:
        data.dead_leaves(size, np.random.default_rng(0)).save(folder / f"{name}.png")
    picture = (folder / "a.png").read_bytes()
    (folder / "deep").mkdir()
    (folder / "broken.png").write_bytes(picture[:200])
    (folder / "link.png").symlink_to("a.png")
    special_files(folder, ".png", "x")
    named = []  # (name, whether it works, path, content)
    for name, path in special_files(folder, ".csv").items():
        named.append((name, False, path, None))
    for works, group in [(True, GOOD_TABLES), (False, BAD_TABLES), (False, {"picture": picture})]:
        for name, content in group.items():
            named.append((name, works, folder / "attack.csv", content))

    def use(path):
        source = data.CsvPairs(path)
        dataset = data.PairedDataset(source, 12, training=False)
        for row in {0, len(source) // 2, len(source) - 1}:
            dataset.name_degradations(row)
            dataset.draw(row)

    def case(n):
        if n < len(named):
            name, works, path, content = named[n]
        else:
            name, works, path = "drawn", None, folder / "attack.csv"
            content = draw_table(np.random.default_rng((seed, n)))
        if content is not None:
            if isinstance(content, str):
                content = content.encode()
            content = content.replace(b"HERE", bytes(folder))
            path.write_bytes(content.replace(b"FOLDER", folder.name.encode()))
        outcome = attempt(lambda: use(path), path.name)
        assert works in (None, outcome == "worked"), f"{name}: {outcome}"
        return outcome

    return attack(case, numbers)


# --------------------------------------------------------------------------------------------------
# Pictures.


def encoded(image, kind, **options):
    """Return the bytes of a picture in some format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, bits=1, color=0, rows=b""):
    """Return a PNG file that claims this."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind + body) for kind, body in chunks)


def png_chunk(content):
    return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))


def redo_checksums(content):
    """Make the chunks of a PNG fit their checksums again: damage then reaches the decoder."""
    parts = [content[:8]]
    at = 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        body = content[at + 4 : at + 8 + length]
        parts.append(content[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + length
    return b"".join(parts)


FORMATS = [
    *("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "ICO", "DDS", "PCX", "SGI"),
    *("JPEG2000", "AVIF", "QOI", "SPIDER", "XBM", "ICNS", "MSP", "EPS"),
]
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "F", "I"]
COMPRESSIONS = ["tiff_lzw", "tiff_deflate", "packbits", "jpeg", "tiff_adobe_deflate"]


def small_pictures():
    """Return {name: bytes} of a picture in every mode and format, to be damaged."""
    photo = data.dead_leaves(24, np.random.default_rng(1)).crop((0, 0, 24, 17))
    modes = {mode: photo.convert(mode) for mode in MODES}
    deep = np.arange(24 * 17, dtype=np.uint16) * 160
    modes["I;16"] = Image.fromarray(deep.reshape(17, 24))
    modes["LAB"] = Image.merge("LAB", photo.split())
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a picture"
    found = {
        "PNG P;t": encoded(modes["P"], "PNG", transparency=3),
        "GIF t": encoded(modes["P"], "GIF", transparency=7),
        "JPEG progressive": encoded(photo, "JPEG", progressive=True),
        "JPEG exif": encoded(photo, "JPEG", exif=exif, icc_profile=b"\0" * 400),
        "PNG exif": encoded(photo, "PNG", exif=exif, icc_profile=b"p" * 90),
        "WEBP exif": encoded(photo, "WEBP", exif=exif),
        "TIFF exif": encoded(photo, "TIFF", exif=exif),
        "WEBP lossless": encoded(modes["RGBA"], "WEBP", lossless=True),
        "TIFF group4": encoded(modes["1"], "TIFF", compression="group4"),
    }
    flipped = [photo.transpose(Image.Transpose.FLIP_TOP_BOTTOM)] * 2
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "MPO", "AVIF"):
        found[f"{kind} animated"] = encoded(photo, kind, save_all=True, append_images=flipped)
    for compression in COMPRESSIONS:
        found[f"TIFF {compression}"] = encoded(photo, "TIFF", compression=compression)
    for kind in FORMATS:
        for mode, image in modes.items():
            with contextlib.suppress(OSError, ValueError, KeyError):
                found[f"{kind} {mode}"] = encoded(image, kind)
    return found


def with_exif(content, exif):
    """Return a JPEG with these bytes as its EXIF."""
    length = struct.pack(">H", len(exif) + 8)
    return content[:2] + b"\xff\xe1" + length + b"Exif\0\0" + exif + content[2:]


PLAIN = [  # of small_pictures: 24 x 17 pixels
    *("JPEG CMYK", "JPEG L", "PNG LA", "PNG P;t", "GIF t", "MPO animated", "TIFF CMYK", "TIFF LAB"),
    *("PNG 1", "PPM RGB", "BMP RGB", "TGA RGBA", "JPEG2000 RGB", "AVIF RGB", "TIFF YCbCr"),
    "WEBP lossless",
]
REFUSED = [  # of small_pictures
    *("PNG I;16", "TIFF I;16", "TIFF I", "TIFF F", "JPEG2000 I;16", "PPM I", "GIF animated"),
    *("PNG animated", "WEBP animated", "TIFF animated", "AVIF animated"),
]


def good_pictures(small):
    """Return {name: (size, file name, content or the function that makes it)}."""
    found = {}
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        content = encoded(Image.new(mode, (1, 1)), "PNG")
        found[f"one pixel, {mode}"] = (1, 1), "x.png", content
    for name in PLAIN:
        found[f"plain {name}"] = (24, 17), "x.png", small[name]
    jpeg = small["JPEG RGB"]
    tag = b"MM\0*\0\0\0\x08\0\x01\x01\x12"  # of one entry, the orientation
    exifs = {
        "corrupt EXIF": b"MM\0*\0\0\0\x08\xff\xff garbage",
        "EXIF that is none": b"nonsense" * 9,
        "EXIF, orientation 77": tag + b"\0\x03\0\0\0\x01\0\x4d\0\0\0\0\0\0",
        "EXIF, orientation a text": tag + b"\0\x02\0\0\0\x04six\0\0\0\0\0",
    }
    for name, exif in exifs.items():
        found[name] = (24, 17), "x.jpg", with_exif(jpeg, exif)
    photo = Image.open(io.BytesIO(jpeg))
    profile = encoded(photo, "JPEG", icc_profile=b"\xff" * 100_000)
    wide, large = Image.new("RGB", (30_000, 2)), (12_500, 8_000)
    tall = (12_000, 10_000)
    return found | {
        "turned": ((17, 24), "x.jpg", small["JPEG exif"]),
        "corrupt profile": ((24, 17), "x.jpg", profile),
        "wrong extension": ((24, 17), "x.tiff", jpeg),
        "no extension": ((24, 17), "x", jpeg),
        "30,000 wide": (wide.size, "x.png", encoded(wide, "PNG")),
        "100 megapixels": (large, "x.jpg", lambda: encoded(Image.new("RGB", large), "JPEG")),
        "120 megapixels": (tall, "x.png", lambda: png(*tall, 8, 0, bytes(12_001 * 10_000))),
    }


def bad_pictures(small):
    """Return {name: (file name, content)}."""
    bmp = small["BMP RGB"]
    endless = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{ } loop\n%%EOF\n"
    gif = b"GIF89a\0\0\0\0\0\0\0,\0\0\0\0\0\0\0\0\0\x02\0;"
    found = {}
    for name in REFUSED:
        found[f"refused {name}"] = "x.png", small[name]
    return found | {
        "bomb": ("x.png", png(30_000, 30_000, 8, 2)),
        "bigger bomb": ("x.png", png(2**31 - 1, 2**31 - 1, 8, 2)),
        "zero wide": ("x.png", png(0, 9)),
        "zero high": ("x.png", png(9, 0)),
        "zero, PPM": ("x.ppm", b"P6 0 0 255\n"),
        "zero, PGM": ("x.pgm", b"P5 3 0 65535\n"),
        "zero, GIF": ("x.gif", gif),
        "zero, BMP": ("x.bmp", bmp[:18] + bytes(8) + bmp[26:]),
        "PostScript that never ends": ("x.eps", endless),
        "nothing": ("x.png", b""),
        "one byte": ("x.png", b"\x89"),
        "text": ("x.png", b"hello"),
        "a page": ("x.jpg", b"<html></html>"),
        "headers alone": ("x.jpg", b"\xff\xd8\xff\xe0"),
        "archive": ("x.png", b"PK\x03\x04" + bytes(99)),
        "pickle": ("x.png", pickle.dumps([1])),
    }


def pictures(folder, numbers, seed=0):
    """Do what attack() does."""
    folder = Path(folder)
    small = small_pictures()
    names = sorted(small)
    named = []  # (name, size or None if it is refused, path, content)
    for name, path in special_files(folder, ".png").items():
        named.append((name, None, path, None))
    for name, (size, file, content) in good_pictures(small).items():
        named.append((name, size, folder / file, content))
    for name, (file, content) in bad_pictures(small).items():
        named.append((name, None, folder / file, content))
    ghostscript = folder / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {folder}/ran\n")
    ghostscript.chmod(0o755)

    def use(path, size):
        header = degrade.read_header(path)
        image = degrade.open_image(path)
        assert image.mode in ("L", "LA", "RGB", "RGBA") and image.width * image.height, image
        assert size in (None, image.size), image
        assert (header.size, header.mode) == (image.size, image.mode), header
        data.to_tensor(image.crop((0, 0, 3, 3)))

    def draw(rng):
        name = choose(rng, names)
        content = damage(small[name], rng)
        if name.startswith("PNG") and rng.random() < 0.7:
            content = redo_checksums(content)
        suffix = choose(rng, [".png", ".jpg", ".tif", ".webp", ""])
        return name, None, folder / f"attack{suffix}", content

    def case(n):
        os.environ["PATH"] = str(folder)  # where Pillow would find Ghostscript
        if n < len(named):
            name, size, path, content = named[n]
        else:
            name, size, path, content = draw(np.random.default_rng((seed, n)))
        if content is not None:
            path.write_bytes(content() if callable(content) else content)
        try:
            outcome = attempt(lambda: use(path, size), path.name)
        except Exception as error:
            raise AssertionError(f"{name}: {traceback.format_exception(error)[-1]}") from None
        expected = "refused" if size is None else "worked"
        assert n >= len(named) or outcome == expected, (name, path, outcome)
        assert not (folder / "ran").exists(), f"{name}: Ghostscript was run"
        return outcome

    return attack(case, numbers)


# --------------------------------------------------------------------------------------------------
# Weight files, and what stands beside them: configs, indices, tokenizers, caches.


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def archive(content):
    """Return what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


JUNK = [  # for JSON
    *(None, True, False, 0, 1, -1, 2, 3, 7, 4096, 10**6, 2**31, 2**63, -(2**63), 10**30),
    *(0.5, -0.5, 2.0, 1e-6, 1e308, 1e-300, math.nan, math.inf),
    *("", "two", "\ud800", "../x", "..", "/etc/passwd", "a\nb", "\0", "x" * 100_000, "silu"),
    *([], {}, [[]], [0] * 5, [1, 1, 1], ["x"], [None], [10**6] * 3, {"a": 1}, {"": None}, [[[5]]]),
]


def damage_json(content, rng, junk=True):
    """Remove, add, double or (junk) replace one to three values somewhere in it, or damage bytes.

    The networks' configs get no junk: what is no number there, or an absurd one, their owner wrote.
    """
    if rng.random() < 0.25:
        return damage(content, rng)
    spec = json.loads(content)
    kinds = ["remove", "add", "double"] + ["replace"] * (3 * junk)
    for _ in range(rng.integers(1, 4)):
        place, key = draw_place(spec, rng)
        kind = choose(rng, kinds)
        value = copy.deepcopy(choose(rng, JUNK))
        if key is None or kind == "add":
            if isinstance(place, dict):
                place[str(value)[:20]] = 1
            else:
                place.append(value)
        elif kind == "remove":
            del place[key]
        elif kind == "double" and isinstance(place[key], (int, float)):
            place[key] *= 2
        elif junk:
            place[key] = value
    return json.dumps(spec).encode()


def draw_place(spec, rng):
    """Go down into JSON by chance -> (a list or dict, a key of it, None if it is empty)."""
    place = spec
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return place, None
        key = choose(rng, keys)
        if not isinstance(place[key], (dict, list)) or rng.random() < 0.3:
            return place, key
        place = place[key]


def damage_config(content, rng):
    return damage_json(content, rng, junk=False)


def pack(header, body):
    """Return a safetensors file of this header: {...}, or bytes."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


LENGTHS = [0, 1, 2**20, 2**31, 2**40, 2**63 - 1, 2**64 - 1]
TYPES = [
    *("F64", "F32", "F16", "BF16", "I32", "U32", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "U8"),
    *("C64", "F4", "X", ""),
]
WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8}
INFINITY = {2: b"\x80\x7f", 4: b"\0\0\x80\xff", 8: b"\0" * 6 + b"\xf0\x7f"}


def damage_weights(content, rng):
    """Damage safetensors: bytes, a value that is no number, or a lie or two in the header."""
    length = int.from_bytes(content[:8], "little")
    text, body = content[8 : 8 + length], content[8 + length :]
    kind = rng.integers(10)
    if kind == 0:
        return damage(content, rng)
    if kind == 1:
        return content[:8] + damage(text, rng) + body
    if kind == 2:
        wrong = choose(rng, [*LENGTHS, length - 1, length + 1, length * 2])
        return struct.pack("<Q", wrong) + content[8:]
    header = json.loads(text)
    if kind == 3:
        return pack(header, spoil_a_number(header, body, rng))
    for _ in range(rng.integers(1, 3)):
        body = tell_a_lie(header, body, rng)
    return pack(header, body)


def spoil_a_number(header, body, rng):
    """Write nan or infinity somewhere into a tensor."""
    about = header[choose(rng, [name for name in header if name != "__metadata__"])]
    start, end = about["data_offsets"]
    width = WIDTHS[about["dtype"]]
    at = start + width * int(rng.integers((end - start) // width))
    value = b"\xff" * width if rng.random() < 0.5 else INFINITY[width]
    return body[:at] + value + body[at + width :]


def tell_a_lie(header, body, rng):
    """Change a header of safetensors, in place -> the body, longer if a tensor was added."""
    names = []
    for name, about in header.items():
        offsets = about.get("data_offsets") if isinstance(about, dict) else None
        if isinstance(offsets, list) and len(offsets) == 2:
            names.append(name)
    if not names:
        return body
    name, other = choose(rng, names), choose(rng, names)
    about, junk = header[name], choose(rng, JUNK)
    lie = rng.integers(9)
    if lie == 0:
        about["dtype"] = choose(rng, TYPES)
    elif lie == 1:
        about["shape"] = choose(rng, wrong_shapes(about["shape"]) + [junk])
    elif lie == 2:
        others = header[other]["data_offsets"]
        about["data_offsets"] = choose(rng, wrong_offsets(*about["data_offsets"]) + [others, junk])
    elif lie == 3:
        about[choose(rng, ["dtype", "shape", "data_offsets", "more"])] = junk
    elif lie == 4:
        del header[name]
    elif lie == 5:
        header[str(junk)[:99]] = header.pop(name)
    elif lie == 6:
        header[name], header[other] = header[other], header[name]
    elif lie == 7:
        offsets = [len(body), len(body) + 16]
        header["extra.weight"] = {"dtype": "F32", "shape": [4], "data_offsets": offsets}
        body += bytes(16)
    else:
        header["__metadata__"] = junk
    return body


def wrong_shapes(shape):
    known = [[], [0], [-1], [2**62, 4], [1] * 200, "8", None, [0.5]]
    if not isinstance(shape, list):
        return known
    return known + [shape[::-1], [1, *shape], shape * 2]


def wrong_offsets(start, end):
    reversed_, empty, one = [end, start], [start, start], [start]
    return [reversed_, empty, one, [0, 2**63], [-4, end], [2**64, 2**65]]


def named_damage(folder):
    """Return {name: content of a weight file or of a JSON file that is refused}."""
    trap = Trap(folder / "ran")
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    return {
        "nothing": b"",
        "blank": b" " * 99,
        "a length alone": struct.pack("<Q", 9),
        "2**40 bytes of header": struct.pack("<Q", 2**40) + b"{}",
        "no object": pack(b"[]", b""),
        "garbage": pack(b"garbage, no header", b""),
        "zeros": bytes(1000),
        "not UTF-8": b'{"\xff\xfe": 1}',
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "byte order mark": "\ufeff{}".encode(),
        "deep": b"[" * 100_000 + b"]" * 100_000,
        "deep objects": deep,
        "deep header": pack(deep, b""),
        "a list": b"[]",
        "a number": b"3",
        "a long number": b'{"a": ' + b"1" * 5000 + b"}",
        "pickle": pickle.dumps(trap),
        "pickle, old": pickle.dumps(trap, protocol=0),
        "zip": b"PK\x03\x04" + bytes(99),
        "archive": archive(trap),
        "git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "a page": b"<!doctype html><html></html>",
    }


@dataclass
class Victim:
    """A file to attack."""

    path: Path
    use: Callable  # what reads it
    damage: Callable  # what draws a case

    def __post_init__(self):
        self.content = self.path.read_bytes()


def pretrained_victims(folder):
    """Return the files of a pipeline's folder."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 16, 16, generator=generator)

    def transformer():
        use_transformer(folder / "transformer")

    def autoencoder():
        dcae = load_pretrained(DCAE, folder / "vae").requires_grad_(False)
        assert dcae.decode(dcae.encode(pixels)).shape[:2] == (1, 3)

    def text():
        tokenizer = GemmaTokenizer(folder / "tokenizer")
        gemma = Gemma2.from_pretrained(folder / "text_encoder")
        encode_prompts(tokenizer, gemma, ["Remove noise."])

    weights = "diffusion_pytorch_model.safetensors"
    return [
        Victim(folder / "transformer" / weights, transformer, damage_weights),
        Victim(folder / "transformer/config.json", transformer, damage_config),
        Victim(folder / "vae" / weights, autoencoder, damage_weights),
        Victim(folder / "vae/config.json", autoencoder, damage_config),
        Victim(folder / "text_encoder/model.safetensors", text, damage_weights),
        Victim(folder / "text_encoder/config.json", text, damage_config),
        Victim(folder / "tokenizer/tokenizer.json", text, damage_json),
    ]


def use_transformer(folder):
    sana = Sana.from_pretrained(folder)
    latents = torch.zeros(1, sana.config["in_channels"], 4, 4)
    sana(latents, torch.ones(1), torch.zeros(1, 3, sana.config["caption_channels"]))


def sharded_victims(folder, transformer):
    """Write a transformer in two shards, and return their files."""
    tensors = Sana.from_pretrained(transformer).state_dict()
    folder.mkdir()
    shutil.copy(transformer / "config.json", folder)
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    places = {}
    for i, shard in enumerate(shards):
        names = sorted(tensors)[i::2]
        vae.save_weights({name: tensors[name] for name in names}, folder / shard)
        places |= dict.fromkeys(names, shard)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))

    def use():
        use_transformer(folder)

    return [Victim(index, use, damage_json), Victim(folder / shards[1], use, damage_weights)]


def checkpoint_victims(run):
    """Write a checkpoint of train.py, and return its files."""
    small = {
        "num_layers": 1,
        "num_attention_heads": 1,
        "num_cross_attention_heads": 1,
        "cross_attention_dim": 32,
    }
    config = PRESETS["tiny"] | {"sana": PRESETS["tiny"]["sana"] | small}
    restorer = build_restorer(config)
    restorer.sana.initialize(torch.Generator().manual_seed(0))
    step = run / "step_000001"
    vae.save_weights(restorer.state_dict(), step / "ema.safetensors")
    (step / "config.json").write_text(json.dumps({"model": config, "step": 1, "args": {}}))
    (run / "latest").write_text("step_000001")
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def use():
        evaluate.Pipeline.load(run).restore(pixels, ["words"], steps=2)

    return [
        Victim(step / "ema.safetensors", use, damage_weights),
        Victim(step / "config.json", use, damage),
        Victim(run / "latest", use, damage),
    ]


def cache_victims(folder, pretrained):
    """Make a cache with data.py, and return its files."""
    csv = folder / "pairs.csv"
    lines = ["image_path,condition_image_path,caption"]
    rows = 3
    for i in range(rows):
        data.dead_leaves(20, np.random.default_rng(i)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,,word {i}")
    csv.write_text("\n".join(lines))
    cache = folder / "cache"
    words = ["cache", "--data", csv, "--model", pretrained, "--out", cache, "--epochs", 2]
    words += ["--resolution", 16, "--workers", 0, "--device", "cpu"]
    with (
        unittest.mock.patch("sys.argv", ["data.py", *map(str, words)]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        data.main()
    expected = json.loads((cache / "index.json").read_text())
    expected.pop("epochs")
    digests = json.loads((cache / "pictures.json").read_text())

    def use():
        cached = data.CachedDataset(cache, expected, digests, rows)
        cached.prompts()
        for batch in data.load_batches(cached, 2 * rows, range(2 * rows), workers=0):
            assert batch["clean"].shape == batch["condition"].shape
            assert batch["clean"].isfinite().all()

    return [
        Victim(cache / "index.json", use, damage_json),
        Victim(cache / "pictures.json", use, damage_json),
        Victim(data.draw_path(cache, 0), use, damage_weights),
        Victim(cache / "prompts.safetensors", use, damage_weights),
    ]


def weight_files(folder, numbers, seed=0, pipeline=None):
    """Do what attack() does. pipeline: the folder of a small one; None: it is made here."""
    folder = Path(folder)
    pretrained = folder / "pretrained"
    if pipeline:
        shutil.copytree(pipeline, pretrained)
    else:
        tiny_pipeline().save_pretrained(pretrained)
    victims = pretrained_victims(pretrained)
    victims += sharded_victims(folder / "shards", pretrained / "transformer")
    victims += checkpoint_victims(folder / "run")
    victims += cache_victims(folder, pretrained)
    files, contents = special_files(folder, ""), named_damage(folder)
    named = []
    for victim in victims:
        for what in (*files, *contents, "whole", "link"):
            named.append((victim, what))
    optional = folder / "cache/prompts.safetensors"  # without it the captions are encoded anew

    def change(victim, what, rng):
        """Put something else in the place of the victim's file."""
        victim.path.unlink()
        if what in files:
            victim.path.symlink_to(files[what])
        elif what == "link":  # as the hub's cache does
            (folder / "elsewhere").write_bytes(victim.content)
            victim.path.symlink_to(folder / "elsewhere")
        elif what == "whole":
            victim.path.write_bytes(victim.content)
        elif what == "drawn":
            victim.path.write_bytes(victim.damage(victim.content, rng))
        else:
            victim.path.write_bytes(contents[what])

    def case(n):
        if n < len(named):
            victim, what = named[n]
        else:
            victim, what = victims[n % len(victims)], "drawn"
        change(victim, what, np.random.default_rng((seed, n)))
        path = victim.path.relative_to(folder)
        place = folder / path.parts[0]  # what the line has to name
        try:
            outcome = attempt(victim.use, str(place))
        except Exception as error:
            reason = traceback.format_exception(error)[-1]
            raise AssertionError(f"{path}, {what}: {reason}") from None
        finally:
            victim.path.unlink()
            victim.path.write_bytes(victim.content)
        good = what in ("whole", "link") or victim.path == optional and what in files
        assert what == "drawn" or good == (outcome == "worked"), (path, what, outcome)
        assert not (folder / "ran").exists(), f"{path}, {what}: a pickle was run"
        return outcome

    return attack(case, numbers)
