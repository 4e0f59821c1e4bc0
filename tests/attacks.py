"""Attacks on what a user may hand over: tables, pictures, weight files. Case n of an attack is the same everywhere: the named cases come first, the others
are drawn from (seed, n). A case works, or it is refused: a UserError of one line that names the file. Nothing may hang, warn, print, take
gigabytes, or run what a file contains."""
import contextlib
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
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import conftest  # noqa: F401, puts the project on the path
import data
import evaluate
import vae
from degrade import UserError, open_image
from model import PRESETS, Gemma2, GemmaTokenizer, Sana, build_restorer, encode_prompts, load_restorer
from pipeline import tiny_pipeline
from vae import DCAE

SECONDS, GIGABYTES = 30, 3  # that a case may take, that an attack may take beyond what the process had


def attempt(use, name):
    """-> "worked" or "refused"; raises AssertionError if it was refused in another way than one line that has name in it."""
    said = io.StringIO()
    with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(said):
        warnings.simplefilter("always")
        try:
            use()
            outcome = "worked"
        except UserError as error:
            line, outcome = str(error), "refused"
            assert line.isprintable() and len(line) <= 1000 and name in line and "MemoryError" not in line, f"refused with {line[:2000]!r}"
    assert not warned and all(line.isprintable() and len(line) <= 1000 for line in said.getvalue().splitlines()) and said.getvalue().count("\n") <= 1, (
        [str(w.message) for w in warned], said.getvalue()[:2000])
    return outcome


def attack(case, numbers):
    """case(n) -> what became of it, for each number, in a process of its own whose memory is limited; a case that takes longer than SECONDS
    kills it, even where Python does not listen, and another goes on. -> (Counter of outcomes, [what went wrong])."""
    context = multiprocessing.get_context("fork")
    last, answers, errors, counts, wrong = context.Value("q", -1), context.SimpleQueue(), tempfile.TemporaryFile(), Counter(), []

    torch.set_num_threads(1)  # before the fork: threads do not survive one

    def child():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + int((GIGABYTES + 1) * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        os.dup2(errors.fileno(), 2)
        for last.value in numbers:
            signal.alarm(SECONDS)
            try:
                answers.put((case(last.value), None))
            except BaseException as error:
                answers.put((None, f"case {last.value}: {traceback.format_exception(error)[-1][-1500:]}"))
            signal.alarm(0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
        answers.put(("memory", f"{grown:.1f} GB of memory" if grown > GIGABYTES else None))
        os._exit(0)

    while numbers:
        process = context.Process(target=child)
        process.start()
        while process.is_alive() or not answers.empty():
            if answers.empty():
                process.join(0.01)
                continue
            outcome, problem = answers.get()
            counts[outcome] += outcome in ("worked", "refused")
            wrong += [problem] if problem else []
        if process.exitcode:
            wrong.append(f"case {last.value}: the process died, {process.exitcode} (-14: it took more than {SECONDS} s)")
        numbers = [n for n in numbers if n > last.value]
    errors.seek(0)
    # what libtiff itself says of a damaged picture is not Pillow's to hold back
    wrong += [f"on stderr: {line}" for line in errors.read().decode(errors="replace").splitlines() if not re.match(r"[\w.]+: ", line)]
    return +counts, wrong


def damage(content, rng):
    """Bytes with one to three of: cut off, flipped, blanked, removed, inserted, repeated, an extreme number early on."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        size = max(1, len(content))
        at, count = int(rng.integers(size)), int(rng.integers(1, max(2, size // 8)))
        kind = rng.integers(7)
        if kind == 0:
            del content[at:]
        elif kind == 1:
            for i in rng.integers(0, size, rng.choice([1, 4, 30])):
                content[i:i + 1] = bytes([rng.integers(256)])
        elif kind == 2:
            content[at:at + count] = bytes(len(content[at:at + count]))
        elif kind == 3:
            del content[at:at + count]
        elif kind == 4:
            content[at:at] = rng.bytes(count)
        elif kind == 5:
            content[at:at] = content[at:at + count]
        else:
            width, at = int(rng.choice([1, 2, 4, 8])), int(rng.integers(min(size, 100)))
            number = [0, 1, 2**(8 * width) - 1, 2**(8 * width - 1) - 1, 30000][rng.integers(5)] % 2**(8 * width)
            content[at:at + width] = number.to_bytes(width, ["little", "big"][rng.integers(2)])
    return bytes(content)


def special_files(folder, suffix, name="attack"):
    """What is no file to be read: {name: path}."""
    places = {kind: folder / f"{name}_{kind}{suffix}" for kind in ("folder", "pipe", "dangling", "loop", "absent")}
    places["folder"].mkdir(), os.mkfifo(places["pipe"]), places["dangling"].symlink_to("nowhere"), places["loop"].symlink_to(places["loop"].name)
    return places | {"device": Path("/dev/zero")}


# ----------------------------------------------------------------------------------------------------------------
# Tables.

HEADER = "image_path,condition_image_path,caption\n"
TABLES = {  # name: (whether it works, content)
    "plain": (True, HEADER + "a.png,b.png,words\n"),
    "byte order mark": (True, (HEADER + "a.png,,é\n").encode("utf-8-sig")),
    "old line ends": (True, HEADER.replace("\n", "\r") + "a.png,,x\r"),
    "quotes, commas, lines": (True, HEADER + '"a.png",,"a ""b"", c\nd"\n'),
    "NUL in a caption": (True, HEADER + "a.png,,a\0b\n"),
    "up and down again": (True, "image_path\n../FOLDER/deep/../a.png\n"),
    "absolute": (True, "image_path\nHERE/a.png\n"),
    "columns in another order, and more": (True, "caption,who,image_path\nx,me,a.png\n"),
    "short rows": (True, HEADER + "a.png\n"),
    "link": (True, "image_path\nlink.png\n"),
    "blank lines": (True, HEADER + "\n\na.png\n\n"),
    "100,000 rows": (True, HEADER + "a.png,b.png,words\n" * 100_000),
    "nothing": (False, ""),
    "blank": (False, "\n\n\n"),
    "header alone": (False, HEADER),
    "no header": (False, "a.png,b.png,x\n"),
    "header in capitals": (False, HEADER.upper() + "a.png,,\n"),
    "semicolons": (False, (HEADER + "a.png,,x\n").replace(",", ";")),
    "one column too many": (False, HEADER + "a.png,,x,y\n"),
    "a column twice": (True, "image_path,image_path\na.png,b.png\n"),
    "empty path": (False, HEADER + " ,b.png,x\n"),
    "UTF-16": (False, (HEADER + "a.png,,x\n").encode("utf-16")),
    "UTF-16 without a mark": (False, (HEADER + "a.png,,x\n").encode("utf-16-le")),
    "UTF-32": (False, (HEADER + "a.png,,x\n").encode("utf-32")),
    "Latin 1": (False, (HEADER + "a.png,,é\n").encode("latin-1")),
    "open quote": (False, HEADER + 'a.png,,"x\n'),
    "text after a quote": (False, HEADER + 'a.png,,"x"y\n'),
    "a line in a path": (False, HEADER + '"a\nb.png",,x\n'),
    "NUL in a path": (False, HEADER + "a\0.png,,x\n"),
    "escape codes": (False, HEADER + "\x1b[31ma.png,,x\n"),
    "huge caption": (False, HEADER + f"a.png,,{'x' * 10_000_000}\n"),
    "huge path": (False, HEADER + f"{'x' * 100_000},,\n"),
    "huge header": (False, ",".join(f"c{i}" for i in range(100_000)) + "\n"),
    "lines in a header": (True, 'image_path,"a\nb\nc"\na.png,x\n'),
    "a picture": (False, None),
    "folder for a picture": (False, "image_path\ndeep\n"),
    "pipe for a picture": (False, "image_path\nx_pipe.png\n"),
    "dangling picture": (False, "image_path\na.png\nx_dangling.png\n"),
    "loop": (False, "image_path\nx_loop.png\n"),
    "device": (False, "image_path\n/dev/zero\n"),
    "broken picture": (False, "image_path,condition_image_path\na.png,broken.png\n"),
    "other size": (False, "image_path,condition_image_path\na.png,small.png\n"),
}
CELLS = ["a.png", "b.png", "HERE/a.png", "../FOLDER/b.png", "./deep/../a.png", " a.png ", "link.png", "small.png", "broken.png", "deep", "x_pipe.png",
         "x_dangling.png", "gone.png", "/", "..", "~/a.png", "C:\\a.png", "a.png\0", "a\nb.png", "\u202ea.png", "é.png", "x" * 300, "", "=cmd()", '"']
WORDS = ["", "words", "Remove noise.", "a, b", "a\nb", 'say "x"', "\0", "😀 é", "x" * 200_000, "\x1b[2J", "jpeg:quality=20", " "]


def draw_table(rng):
    """A table of mostly good rows, written in some way, damaged or not -> bytes."""
    header = [["image_path", "condition_image_path", "caption"], ["image_path"], ["image_path", "caption"], [" image_path ", "condition_image", "caption"],
              ["Image_Path", "caption"], ["image_path", "condition_image_path", "caption", "degradation"], ["caption", "image_path"], []][rng.choice(8, p=[.4, .15, .1, .05, .05, .15, .05, .05])]
    pick = lambda values, bad: values[rng.integers(len(values))] if rng.random() < bad else values[rng.integers(2)]
    bad, rows = rng.choice([0, 0, 0.2, 0.9]), []
    for _ in range(rng.choice([0, 1, 2, 5, 40])):
        rows.append([pick(CELLS, bad) if "path" in name.lower() else pick(WORDS, bad) for name in header])
        if rng.random() < bad / 4:
            rows[-1] = rows[-1][:-1] if rng.random() < 0.5 else rows[-1] + ["more"]
    comma = [",", ";", "\t"][rng.choice(3, p=[.9, .05, .05])]
    quote = lambda cell: '"' + cell.replace('"', '""') + '"' if any(c in cell for c in f'{comma}"\n\r') and rng.random() < 0.9 or rng.random() < 0.1 else cell
    text = str(rng.choice(["\n", "\r\n", "\r"], p=[.7, .2, .1])).join(comma.join(map(quote, row)) for row in [header, *rows])
    encoding = str(rng.choice(["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "cp1252", "shift_jis", "utf-7"], p=[.6, .15, .05, .05, .05, .04, .03, .03]))
    content = text.encode(encoding, "replace")
    return damage(content, rng) if rng.random() < 0.4 else content


def tables(folder, numbers, seed=0):
    """-> what attack gives."""
    folder = Path(folder)
    for name, size in ("a", 20), ("b", 20), ("small", 12), ("é", 20):
        data.dead_leaves(size, np.random.default_rng(0)).save(folder / f"{name}.png")
    (folder / "deep").mkdir(), (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200]), (folder / "link.png").symlink_to("a.png")
    special_files(folder, ".png", "x")
    files, named = special_files(folder, ".csv"), list(TABLES)

    def use(path):
        source = data.CsvPairs(path)
        dataset = data.PairedDataset(source, 12, training=False)
        for row in {0, len(source) // 2, len(source) - 1}:
            dataset.name_degradations(row), dataset.draw(row)

    def case(n):
        path, works = folder / "attack.csv", None
        if n < len(files):
            path, works = list(files.values())[n], False
        elif n < len(files) + len(named):
            works, content = TABLES[named[n - len(files)]]
        else:
            content = draw_table(np.random.default_rng((seed, n)))
        if n >= len(files):
            content = (folder / "a.png").read_bytes() if content is None else content.encode() if isinstance(content, str) else content
            path.write_bytes(content.replace(b"HERE", bytes(folder)).replace(b"FOLDER", folder.name.encode()))
        outcome = attempt(lambda: use(path), path.name)
        assert works in (None, outcome == "worked"), f"{named[n - len(files)] if n >= len(files) else path}: {outcome}"
        return outcome
    return attack(case, numbers)


# ----------------------------------------------------------------------------------------------------------------
# Pictures.

def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, bits=1, color=0, rows=b""):
    """A PNG file of these claims."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


def redo_checksums(content):
    """A PNG whose chunks fit their checksums again: damage then reaches the decoder."""
    parts, at = [content[:8]], 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at:at + 4], "big")
        body = content[at + 4:at + 8 + length]
        parts.append(content[at:at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + length
    return b"".join(parts)


def small_pictures():
    """{name: bytes} in every mode and format, to be damaged."""
    photo = data.dead_leaves(24, np.random.default_rng(1)).crop((0, 0, 24, 17))
    deep = Image.fromarray((np.arange(24 * 17, dtype=np.uint16) * 160).reshape(17, 24))
    modes = {mode: photo.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "F", "I")} | {"I;16": deep}
    modes["LAB"] = Image.merge("LAB", photo.split())
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    found = {"PNG P;t": encoded(modes["P"], "PNG", transparency=3), "JPEG progressive": encoded(photo, "JPEG", progressive=True),
             "JPEG exif": encoded(photo, "JPEG", exif=exif, icc_profile=b"\0" * 400), "PNG exif": encoded(photo, "PNG", exif=exif, icc_profile=b"p" * 90),
             "WEBP exif": encoded(photo, "WEBP", exif=exif), "TIFF exif": encoded(photo, "TIFF", exif=exif), "WEBP lossless": encoded(modes["RGBA"], "WEBP", lossless=True),
             "GIF t": encoded(modes["P"], "GIF", transparency=7)}
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "MPO", "AVIF"):
        found[f"{kind} animated"] = encoded(photo, kind, save_all=True, append_images=[photo.transpose(Image.Transpose.FLIP_TOP_BOTTOM)] * 2)
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "group4", "tiff_adobe_deflate"):
        found[f"TIFF {compression}"] = encoded(modes["1"] if compression == "group4" else photo, "TIFF", compression=compression)
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "ICO", "DDS", "PCX", "SGI", "JPEG2000", "AVIF", "QOI", "SPIDER", "XBM", "ICNS", "MSP", "EPS"):
        for mode, image in modes.items():
            with contextlib.suppress(OSError, ValueError, KeyError):
                found[f"{kind} {mode}"] = encoded(image, kind)
    return found


def exif_of(content, exif):
    """A JPEG with these bytes as its EXIF."""
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif + content[2:]


def named_pictures(small):
    """{name: (size of the picture that is read, or None if it is refused, file name, content or function that gives it)}"""
    photo, plain = Image.open(io.BytesIO(small["JPEG RGB"])), small["JPEG RGB"]
    one = {f"one pixel, {mode}": ((1, 1), "x.png", encoded(Image.new(mode, (1, 1)), "PNG")) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")}
    good = {f"plain {name}": ((24, 17), "x.png", small[name]) for name in (
        "JPEG CMYK", "JPEG L", "PNG LA", "PNG I;16", "PNG P;t", "GIF t", "GIF animated", "PNG animated", "WEBP animated", "TIFF animated", "MPO animated",
        "TIFF CMYK", "TIFF LAB", "PNG 1", "TIFF I;16", "TIFF I", "PPM RGB", "BMP RGB", "TGA RGBA", "JPEG2000 RGB", "AVIF RGB", "TIFF YCbCr", "WEBP lossless")}
    return one | good | {
        "turned": ((17, 24), "x.jpg", small["JPEG exif"]),
        "corrupt EXIF": ((24, 17), "x.jpg", exif_of(plain, b"MM\0*\0\0\0\x08\xff\xff garbage")),
        "EXIF that is none": ((24, 17), "x.jpg", exif_of(plain, b"nonsense" * 9)),
        "EXIF, orientation 77": ((24, 17), "x.jpg", exif_of(plain, b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x4d\0\0\0\0\0\0")),
        "EXIF, orientation a text": ((24, 17), "x.jpg", exif_of(plain, b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04six\0\0\0\0\0")),
        "corrupt profile": ((24, 17), "x.jpg", encoded(photo, "JPEG", icc_profile=b"\xff" * 100_000)),
        "wrong extension": ((24, 17), "x.tiff", plain),
        "no extension": ((24, 17), "x", plain),
        "30,000 wide": ((30_000, 2), "x.png", lambda: encoded(Image.new("RGB", (30_000, 2)), "PNG")),
        "100 megapixels, 8 bits": ((12_500, 8_000), "x.jpg", lambda: encoded(Image.new("RGB", (12_500, 8_000)), "JPEG")),
        "120 megapixels, 16 bits": ((12_000, 10_000), "x.png", lambda: png(12_000, 10_000, 16, 0, bytes(24_001 * 10_000))),
        "bomb": (None, "x.png", png(30_000, 30_000, 8, 2)),
        "bigger bomb": (None, "x.png", png(2**31 - 1, 2**31 - 1, 8, 2)),
        "zero wide": (None, "x.png", png(0, 9)), "zero high": (None, "x.png", png(9, 0)),
        "zero, PPM": (None, "x.ppm", b"P6 0 0 255\n"), "zero, PGM": (None, "x.pgm", b"P5 3 0 65535\n"), "zero, GIF": (None, "x.gif", b"GIF89a\0\0\0\0\0\0\0,\0\0\0\0\0\0\0\0\0\x02\0;"),
        "zero, BMP": (None, "x.bmp", small["BMP RGB"][:18] + bytes(8) + small["BMP RGB"][26:]),
        "floats": (None, "x.tif", small["TIFF F"]),
        "beyond 16 bits": (None, "x.tif", lambda: encoded(Image.fromarray(np.array([[70_000]], np.int32)), "TIFF")),
        "PostScript that never ends": (None, "x.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{ } loop\n%%EOF\n"),
        "nothing": (None, "x.png", b""), "one byte": (None, "x.png", b"\x89"), "text": (None, "x.png", b"hello"), "a page": (None, "x.jpg", b"<html></html>"),
        "headers alone": (None, "x.jpg", b"\xff\xd8\xff\xe0"), "archive": (None, "x.png", b"PK\x03\x04" + bytes(99)), "pickle": (None, "x.png", pickle.dumps([1]))}


def pictures(folder, numbers, seed=0):
    """-> what attack gives."""
    folder, small = Path(folder), small_pictures()
    files, names, named = special_files(folder, ".png"), sorted(small), named_pictures(small)
    (folder / "gs").write_text(f"#!/bin/sh\ntouch {folder}/ran\n"), (folder / "gs").chmod(0o755)  # in place of Ghostscript

    def use(path, size):
        image = open_image(path, notice=False)
        assert image.mode in ("L", "LA", "RGB", "RGBA") and image.width * image.height and size in (None, image.size), (image.mode, image.size)
        data.to_tensor(image.crop((0, 0, 3, 3)))

    def case(n):
        os.environ["PATH"] = str(folder)
        rng, size, refused = np.random.default_rng((seed, n)), None, False
        if n < len(files):
            path, what, refused = list(files.values())[n], None, True
        elif n < len(files) + len(named):
            what = list(named)[n - len(files)]
            size, name, content = named[what]
            path, content, refused = folder / name, content() if callable(content) else content, size is None
            path.write_bytes(content)
        else:
            what = names[rng.integers(len(names))]
            path, content = folder / ("attack" + str(rng.choice([".png", ".jpg", ".tif", ".webp", ""]))), damage(small[what], rng)
            path.write_bytes(redo_checksums(content) if what.startswith("PNG") and rng.random() < 0.7 else content)
        try:
            outcome = attempt(lambda: use(path, size), path.name)
        except Exception as error:
            raise AssertionError(f"{what}: {traceback.format_exception(error)[-1]}") from None
        assert what is not None and what not in named or refused == (outcome == "refused"), (what, path, outcome)
        assert not (folder / "ran").exists(), f"{what}: Ghostscript was run"
        return outcome
    return attack(case, numbers)


# ----------------------------------------------------------------------------------------------------------------
# Weight files, and what stands beside them: configs, indices, tokenizers, caches.

class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


JUNK = [None, True, False, 0, 1, -1, 2, 3, 7, 4096, 10**6, 2**31, 2**63, -2**63, 10**30, 0.5, -0.5, 2.0, 1e308, 1e-300, math.nan, math.inf, "", "two", "\ud800", "../x", "..",
        "/etc/passwd", "a\nb", "\0", "x" * 100_000, [], {}, [[]], [0] * 5, [1, 1, 1], ["x"], [None], [10**6] * 3, {"a": 1}, {"": None}, [[[5]]], 1e-6, "silu", "ResBlock"]


def damage_json(content, rng):
    """JSON with one to three values replaced, removed, added or doubled somewhere in it; or its bytes damaged."""
    if rng.random() < 0.25:
        return damage(content, rng)
    spec = json.loads(content)
    for _ in range(rng.integers(1, 4)):
        place = spec
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = keys[rng.integers(len(keys))] if keys else None
            if key is None or not isinstance(place[key], (dict, list)) or rng.random() < 0.3:
                break
            place = place[key]
        junk, kind = JUNK[rng.integers(len(JUNK))], rng.choice(["value", "value", "value", "remove", "add", "double"])
        if key is None or kind == "add":
            place.update({str(junk)[:20]: 1}) if isinstance(place, dict) else place.append(junk)
        elif kind == "remove":
            del place[key]
        elif kind == "double" and isinstance(place[key], (int, float)):
            place[key] *= 2
        else:
            place[key] = junk
    return json.dumps(spec).encode()


def pack(header, body):
    """A safetensors file of this header: {...}, or bytes."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


def damage_weights(content, rng):
    """Safetensors with a lie or two in the header, a value that is no number, or damaged bytes, mostly in the header."""
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8:8 + length]), bytearray(content[8 + length:])
    kind = rng.integers(10)
    if kind == 0:
        return damage(content, rng)
    if kind == 1:  # bytes of the header alone
        return content[:8] + damage(content[8:8 + length], rng) + body
    if kind == 2:
        wrong = [0, 1, length - 1, length + 1, length * 2, 2**20, 2**31, 2**40, 2**63 - 1, 2**64 - 1]
        return struct.pack("<Q", wrong[rng.integers(len(wrong))]) + content[8:]
    names = [name for name in header if name != "__metadata__"]
    if kind == 3:  # infinity or no number, in any tensor
        at = header[names[rng.integers(len(names))]]
        width = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8}[at["dtype"]]
        start = at["data_offsets"][0] + width * int(rng.integers((at["data_offsets"][1] - at["data_offsets"][0]) // width))
        body[start:start + width] = b"\xff" * width if rng.random() < 0.5 else {2: b"\x80\x7f", 4: b"\0\0\x80\xff", 8: b"\0" * 6 + b"\xf0\x7f"}[width]
        return pack(header, bytes(body))
    for _ in range(rng.integers(1, 3)):
        name, other = (names[i] for i in rng.integers(0, len(names), 2))
        about, junk, lie = header.get(name), JUNK[rng.integers(len(JUNK))], rng.integers(9)
        if not isinstance(about, dict):
            continue
        if lie == 0:
            about["dtype"] = ["F64", "F32", "F16", "BF16", "I32", "U32", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "U8", "C64", "F4", "X", ""][rng.integers(15)]
        elif lie == 1:
            about["shape"] = [[], [0], [-1], [2**62, 4], [1] * 200, about["shape"][::-1], [1, *about["shape"]], [2 * n for n in about["shape"]], "8", None, [0.5], junk][rng.integers(12)]
        elif lie == 2:
            start, end = about["data_offsets"]
            about["data_offsets"] = [[end, start], [start, start], [start + 4, end + 4], [0, 2**63], [-4, end], [start], [2**64, 2**65], junk, header[other]["data_offsets"]][rng.integers(9)]
        elif lie == 3:
            about[["dtype", "shape", "data_offsets", "more"][rng.integers(4)]] = junk
        elif lie == 4:
            del header[name]
        elif lie == 5:
            header[str(junk)[:99]] = header.pop(name)
        elif lie == 6:
            header[name], header[other] = header[other], header[name]
        elif lie == 7:
            header["extra.weight"] = {"dtype": "F32", "shape": [4], "data_offsets": [len(body), len(body) + 16]}
            body += bytes(16)
        else:
            header["__metadata__"] = junk
        names = [name for name in names if name in header and isinstance(header[name], dict) 
                 and isinstance(header[name].get("data_offsets"), list) and len(header[name]["data_offsets"]) == 2]
        if not names:
            break
    return pack(header, bytes(body))


def named_damage(folder):
    """{name: content of a weight file or of a JSON file that is refused}"""
    return {
        "nothing": b"", "blank": b" " * 99, "a length alone": struct.pack("<Q", 9), "2**40 bytes of header": struct.pack("<Q", 2**40) + b"{}", "no object": pack(b"[]", b""),
        "garbage": pack(b"garbage, no header", b""), "zeros": bytes(1000), "not UTF-8": b'{"\xff\xfe": 1}', "UTF-16": '{"a": 1}'.encode("utf-16"),
        "byte order mark": "\ufeff{}".encode(), "deep": b"[" * 100_000 + b"]" * 100_000, "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "deep header": pack(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b""), "a list": b"[]", "a number": b"3", "a long number": b'{"a": ' + b"1" * 5000 + b"}",
        "pickle": pickle.dumps(Trap(folder / "ran")), "pickle, old": pickle.dumps(Trap(folder / "ran"), protocol=0), "zip": b"PK\x03\x04" + bytes(99), "archive": archive(Trap(folder / "ran")),
        "git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a page": b"<!doctype html><html></html>"}


def archive(content):
    """As torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def victims(pipeline, folder):
    """Copies of a pipeline's folder, its transformer in shards, a checkpoint of train.py and a cache: [(file to attack, function that uses it)]."""
    base, g = folder / "base", torch.Generator().manual_seed(0)
    shutil.copytree(pipeline, base)
    sana, shards, pixels = Sana.from_pretrained(base / "transformer"), folder / "shards", torch.rand(1, 3, 16, 16, generator=g)
    tensors, names = sana.state_dict(), sorted(sana.state_dict())
    shards.mkdir(), shutil.copy(base / "transformer/config.json", shards)
    for i in range(2):
        vae.save_weights({name: tensors[name] for name in names[i::2]}, shards / f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors")
    index = shards / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {name: f"diffusion_pytorch_model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}}))
    config = PRESETS["tiny"] | {"name": "tiny", "shift": 3.0, "sana": PRESETS["tiny"]["sana"] | {"num_layers": 1, "num_attention_heads": 1, "num_cross_attention_heads": 1,
                                                                                             "cross_attention_dim": 32}}
    restorer, run = build_restorer(config), folder / "run"
    restorer.sana.initialize(g)
    vae.save_weights(restorer.state_dict(), run / "step_000001/ema.safetensors")
    (run / "step_000001/config.json").write_text(json.dumps({"model": config, "step": 1})), (run / "latest").write_text("step_000001")
    for i in range(3):
        data.dead_leaves(20, np.random.default_rng(i)).save(folder / f"{i}.png")
    (folder / "pairs.csv").write_text("image_path,condition_image_path,caption\n" + "".join(f"{i}.png,,word {i}\n" for i in range(3)))
    flags = ["cache", "--data", folder / "pairs.csv", "--model", base, "--epochs", "2", "--resolution", "16", "--workers", "0", "--device", "cpu", "--out", folder / "cache"]
    with unittest.mock.patch("sys.argv", ["data.py", *map(str, flags)]), contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
        data.main()
    made_of, rows = json.loads((folder / "cache/index.json").read_text())["made_of"], 3

    def transformer(place):
        sana = Sana.from_pretrained(place)
        sana(torch.zeros(1, sana.config["in_channels"], 4, 4), torch.ones(1), torch.zeros(1, 3, sana.config["caption_channels"]))

    def autoencoder():
        ae = DCAE.from_pretrained(base / "vae")
        assert ae.decode(ae.encode(pixels)).shape[:2] == (1, 3)

    def text():
        encode_prompts(GemmaTokenizer(base / "tokenizer"), Gemma2.from_pretrained(base / "text_encoder"), ["Remove noise."])

    def checkpoint():
        restorer, config = load_restorer(run)
        ae, prompts = data.build_surroundings(config, "cpu")
        evaluate.restore(restorer, ae, prompts, pixels, ["words"], steps=2)

    def cache():
        cached = data.CachedDataset(folder / "cache", made_of, rows)
        batch = data.collate([cached[i] for i in range(2 * rows + 1)])
        if isinstance(batch, UserError):
            raise batch
        assert batch["clean"].shape == batch["condition"].shape == (2 * rows + 1, *batch["clean"].shape[1:])
    weights = "diffusion_pytorch_model.safetensors"
    return [(base / "transformer" / weights, lambda: transformer(base / "transformer")), (base / "transformer/config.json", lambda: transformer(base / "transformer")),
            (index, lambda: transformer(shards)), (shards / "diffusion_pytorch_model-00002-of-00002.safetensors", lambda: transformer(shards)),
            (base / "vae" / weights, autoencoder), (base / "vae/config.json", autoencoder), (base / "text_encoder/model.safetensors", text), (base / "text_encoder/config.json", text),
            (base / "tokenizer/tokenizer.json", text), (run / "step_000001/ema.safetensors", checkpoint), (run / "step_000001/config.json", checkpoint),
            (run / "latest", checkpoint), (folder / "cache/index.json", cache), (folder / "cache/draws_00000.safetensors", cache), (folder / "cache/prompts.safetensors", cache)]


def weight_files(folder, numbers, seed=0, pipeline=None):
    """-> what attack gives. pipeline: the folder of a small one; made here if there is none."""
    folder = Path(folder)
    if pipeline is None:
        pipeline = folder / "pipeline"
        tiny_pipeline().save_pretrained(pipeline)
    targets, named, files = victims(pipeline, folder), named_damage(folder), special_files(folder, "")
    contents = [path.read_bytes() for path, _ in targets]
    fixed = [(*target, what) for target in zip(targets, contents) for what in (*files, *named, "whole", "link")]
    optional = folder / "cache/prompts.safetensors"

    def case(n):
        rng = np.random.default_rng((seed, n))
        (path, use), content, what = fixed[n] if n < len(fixed) else (targets[n % len(targets)], contents[n % len(targets)], "drawn")
        changed = {".json": damage_json, ".safetensors": damage_weights}.get(path.suffix, damage)(content, rng) if what == "drawn" else named.get(what, content)
        path.unlink()
        if what in files:
            path.symlink_to(files[what])
        elif what == "link":
            (folder / "elsewhere").write_bytes(content), path.symlink_to(folder / "elsewhere")  # as the hub's cache does
        else:
            path.write_bytes(changed)
        name = folder / "run" if "run" in path.parts else path.parent
        try:
            outcome = attempt(use, str(name))
        except Exception as error:
            raise AssertionError(f"{path.relative_to(folder)}, {what}: {traceback.format_exception(error)[-1]}") from None
        finally:
            path.unlink(), path.write_bytes(content)
        assert what == "drawn" or (what in ("whole", "link") or path == optional and what in files) == (outcome == "worked"), (path, what, outcome)
        assert not (folder / "ran").exists(), f"{path}, {what}: a pickle was run"
        return outcome
    return attack(case, numbers)
