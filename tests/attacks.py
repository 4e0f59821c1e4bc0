"""Attacks on the program, as bad files and bad machines do them: one sample of each kind.

    python tests/attacks.py                             all of it
    python tests/attacks.py tables kills --draws 1000   two kinds, with so many drawn cases each

tables, pictures, weights   named cases, and bytes damaged at random. A case works, or it is refused
                            in one line that names the file. Nothing may hang, warn, take gigabytes,
                            or run what a file contains.
kills                       kill -9 at any instant: no file is half there, and all goes on
sizes                       long runs take no more memory than short ones
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import conftest  # noqa: F401, puts the project on the path
import numpy as np
import torch
import torch._dynamo  # noqa: F401, which an optimizer imports: not in each fork anew
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

import data
import degrade
import evaluate
import model
import train
from degrade import UserError
from model import GemmaTokenizer, Sana
from vae import load_pretrained

GIGABYTES = 3  # that the cases may take beyond what the process had
SCRIPTS = {"train.py": train, "data.py": data, "model.py": model, "evaluate.py": evaluate}
SMALL = ["--batch_size", 2, "--resolution", 16, "--workers", 1, "--device", "cpu"]

# --------------------------------------------------------------------------------------------------
# The driver.


@dataclass
class Case:
    """One attack: what meets it, what is put where, and what has to come of it."""

    what: str  # shown where it went wrong
    use: Callable  # meets the attack
    path: Path | None = None  # where content is put
    content: object = None  # bytes, a Path to link to, or what returns bytes; None: nothing
    outcome: str = ""  # "worked" or "refused"; "": either
    named: str = ""  # what the line of a refusal has in it
    seconds: int = 30  # that it may take


def attack(cases, folder):
    """Run all cases -> (Counter of outcomes, [what went wrong]).

    It happens in a process of its own whose memory is limited. A case that takes too long kills it.
    A file folder/ran tells that something was run that should only be read.
    """
    torch.set_num_threads(1)  # before the fork: threads do not survive one
    with tempfile.TemporaryFile("w+") as answers, tempfile.TemporaryFile("w+") as errors:
        pid = os.fork()
        if pid == 0:
            run_cases(cases, Path(folder) / "ran", answers, errors)
        _, status = os.waitpid(pid, 0)
        answers.seek(0)
        results = [json.loads(line) for line in answers]
        errors.seek(0)
        said = errors.read().splitlines()
    wrong = [problem for _, problem in results if problem]
    if status:
        died = f"the process died, {os.waitstatus_to_exitcode(status)} (-14: too slow)"
        wrong.append(f"{cases[len(results)].what}: {died}")
    for line in said:
        # what libtiff and Pillow's logger say of a damaged TIFF is not ours to hold back
        if not re.match(r"[\w.]+: |More samples per pixel", line):
            wrong.append(f"on stderr: {line}")
    return Counter(outcome for outcome, _ in results), wrong


def run_cases(cases, ran, answers, errors):
    """Be the process of attack(): write [outcome, problem] of each case, and end."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (GIGABYTES + 1) * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.dup2(errors.fileno(), 2)
    for case in cases:
        signal.alarm(case.seconds)
        try:
            answer = run_case(case), None
            assert not ran.exists(), "something was run"
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
            assert grown < GIGABYTES, f"{grown:.1f} GB of memory"
        except BaseException as error:
            reason = traceback.format_exception(error)[-1][-1500:]
            answer = "wrong", f"{case.what}: {reason}"
        signal.alarm(0)
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)


def run_case(case):
    """Put the content in its place, call use(), and put the file that was there back."""
    before = case.path.read_bytes() if case.path and case.path.is_file() else None
    try:
        if case.path:
            put(case.path, case.content() if callable(case.content) else case.content)
        outcome = attempt(case.use, case.named)
    finally:
        if case.path:
            put(case.path, before)
    assert case.outcome in ("", outcome), outcome
    return outcome


def put(path, content):
    """Replace a file by these bytes, by a link (to a Path), or by nothing (None)."""
    path.unlink(missing_ok=True)
    if isinstance(content, Path):
        path.symlink_to(content)
    elif content is not None:
        path.write_bytes(content)


def attempt(use, named):
    """Call use() -> "worked" or "refused". A refusal is one line that has named in it."""
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
            good = line.isprintable() and named in line and "MemoryError" not in line
            assert good, f"refused with {line!r}"
    assert not warned, [str(warning.message) for warning in warned]
    lines = said.getvalue().splitlines()
    assert len(lines) <= 1 and all(line.isprintable() for line in lines), lines[:5]
    return outcome


# --------------------------------------------------------------------------------------------------
# What a user hands over.


def rng_of(n):
    return np.random.default_rng((0, n))


def make_cases(use, path, good, bad, drawn):
    """Return cases of one file. good, bad: {what: content}; drawn: [content]."""
    cases = []
    for what, content in good.items():
        cases.append(Case(what, use, path, content, "worked", path.name))
    for what, content in bad.items():
        cases.append(Case(what, use, path, content, "refused", path.name))
    for n, content in enumerate(drawn):
        cases.append(Case(f"drawn {n}", use, path, content, "", path.name))
    return cases


def choose(rng, options):
    """Return one of the options; numpy's choice would make an array of them."""
    return options[rng.integers(len(options))]


def damage(content, rng):
    """Do one to three of five things to bytes."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        size = max(1, len(content))
        at = int(rng.integers(size))
        part = slice(at, at + int(rng.integers(1, max(2, size // 8))))
        kind = rng.integers(5)
        if kind == 0:  # cut off
            del content[at:]
        elif kind == 1:  # flipped
            for i in rng.integers(0, size, rng.choice([1, 4, 30])):
                content[i : i + 1] = bytes([rng.integers(256)])
        elif kind == 2:  # removed
            del content[part]
        elif kind == 3:  # repeated
            content[at:at] = content[part]
        else:  # an extreme number early on
            width = int(rng.choice([1, 2, 4, 8]))
            number = choose(rng, [0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1) - 1])
            at = int(rng.integers(min(size, 100)))
            content[at : at + width] = number.to_bytes(width, choose(rng, ["little", "big"]))
    return bytes(content)


def special_files(folder):
    """Return {kind: where a link to it leads} of what is no file to be read."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    names = "folder", "pipe", "loop", "absent"
    return {name: folder / name for name in names} | {"device": Path("/dev/zero")}


HEADER = b"image_path,condition_image_path,caption\n"
GOOD_TABLES = {
    "byte order mark, old line ends": b"\xef\xbb\xbfimage_path\ra.png\r",
    "quotes, commas, lines": HEADER + b'"a.png",,"a ""b"", c\nd"\n',
    "many rows": HEADER + b"a.png,b.png,words\n" * 30_000,
}
BAD_TABLES = {
    "nothing": b"",
    "no header": b"a.png,b.png,x\n",
    "one column too many": HEADER + b"a.png,,x,y\n",
    "not UTF-8": HEADER + b"a.png,,\xe9\n",
    "open quote": HEADER + b'a.png,,"x\n',
    "escape codes and NUL": HEADER + b"\x1b[31m\0a.png,,x\n",
    "huge caption": HEADER + b"a.png,," + b"x" * 1_000_000,
    "huge path": HEADER + b"x" * 100_000,
    "pipe for a picture": b"image_path\npipe\n",
}


def tables(folder, draws):
    for name in ("a", "b"):
        data.dead_leaves(20, rng_of(0)).save(folder / f"{name}.png")
    table = folder / "attack.csv"

    def use():
        dataset = data.PairedDataset(data.CsvPairs(table), 12, training=False)
        assert dataset[0] and dataset[len(dataset) - 1]

    whole = HEADER + 'a.png,b.png,"words, é"\n'.encode() * 3
    drawn = [partial(damage, whole, rng_of(n)) for n in range(draws)]
    return make_cases(use, table, GOOD_TABLES, special_files(folder) | BAD_TABLES, drawn)


FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "JPEG2000", "ICO", "AVIF"]
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"]


def encoded(image, kind, **options):
    """Return the bytes of a picture in some format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pictures(folder, draws):
    photo = data.dead_leaves(24, rng_of(0)).crop((0, 0, 24, 17))
    turned = Image.Exif()
    turned[0x0112] = 6
    text = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04six\0\0\0\0\0"
    good = {
        "turned": encoded(photo, "JPEG", exif=turned),
        "turned by a text": encoded(photo, "JPEG", exif=text),
        "corrupt EXIF": encoded(photo, "JPEG", exif=b"Exif\0\0MM\0*garbage"),
        "corrupt profile": encoded(photo, "JPEG", icc_profile=b"\xff" * 100_000),
        "wide": encoded(Image.new("RGB", (30_000, 2)), "PNG"),
        "one pixel": encoded(Image.new("1", (1, 1)), "PNG"),
    }
    bad = special_files(folder) | {
        "bomb": b"P6 30000 30000 255\n",
        "zero wide": b"P6 0 9 255\n",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{ } loop\n",
        "nothing": b"",
        "headers alone": b"\xff\xd8\xff\xe0",
        "pickle": pickle.dumps([1]),
    }
    small = []
    for kind in FORMATS:
        for mode in MODES:
            with contextlib.suppress(OSError, ValueError):
                small.append(encoded(photo.convert(mode), kind))
    (folder / "gs").write_text(f"#!/bin/sh\ntouch {folder}/ran\n")
    (folder / "gs").chmod(0o755)
    picture = folder / "attack.png"

    def use():
        os.environ["PATH"] = str(folder)  # where Pillow would find Ghostscript
        header = degrade.read_header(picture)
        image = degrade.open_image(picture)
        assert image.mode in ("L", "LA", "RGB", "RGBA") and image.width * image.height, image
        assert (header.size, header.mode) == (image.size, image.mode), header

    drawn = []
    for n in range(draws):
        drawn.append(partial(damage, choose(rng_of(n), small), rng_of(n)))
    return make_cases(use, picture, good, bad, drawn)


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


LIES = {
    "dtype": ["F64", "F16", "I32", "BOOL", "F8_E4M3", "X", None, []],
    "shape": [[0], [-1], [2**62, 4], [1] * 200, [0.5], "8", None],
    "data_offsets": [[8, 0], [0, 0], [0], [0, 2**63], [-4, 8], [2**64, 2**65], None, {}],
}


def damage_weights(content, rng):
    """Damage safetensors: bytes, a value that is no number, or a lie in the header."""
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = choose(rng, [name for name in header if name != "__metadata__"])
    kind = rng.integers(5)
    if kind == 0:
        return damage(content, rng)
    if kind == 1:
        wrong = choose(rng, [0, length - 1, 2**31, 2**40, 2**64 - 1])
        return struct.pack("<Q", wrong) + content[8:]
    if kind == 2:  # nan
        start, end = header[name]["data_offsets"]
        body = body[:start] + b"\xff" * (end - start) + body[end:]
    elif kind == 3:
        key = choose(rng, list(LIES))
        header[name][key] = choose(rng, LIES[key])
    else:
        header["another"] = header.pop(name)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def weights(folder, draws, pipeline=None):
    """pipeline: the folder of a small one; None: it is made here."""
    pretrained, run = folder / "pretrained", folder / "run"
    if pipeline:
        shutil.copytree(pipeline, pretrained)
    else:
        from pipeline import tiny_pipeline

        tiny_pipeline().save_pretrained(pretrained)
    csv = make_photos(folder, 3)
    finish(["train.py", *SMALL, "--data", csv, "--steps", 1, "--out", run], folder)
    step = run / (run / "latest").read_text()

    def use_transformer():
        load_pretrained(Sana, pretrained / "transformer")

    def use_tokenizer():
        GemmaTokenizer(pretrained / "tokenizer").encode("Remove noise.")

    def use_run():
        evaluate.Pipeline.load(run).restore(torch.zeros(1, 3, 16, 16), ["words"], steps=1)

    model_file = pretrained / "transformer/diffusion_pytorch_model.safetensors"
    victims = [  # the file, what reads it, how it is damaged
        (model_file, use_transformer, damage_weights),
        (pretrained / "transformer/config.json", use_transformer, damage),
        (pretrained / "tokenizer/tokenizer.json", use_tokenizer, damage),
        (step / "ema.safetensors", use_run, damage_weights),
        (step / "config.json", use_run, damage),
    ]
    bad = special_files(folder) | {
        "nothing": b"",
        "zeros": bytes(1000),
        "not UTF-8": b'{"\xff\xfe": 1}',
        "deep": b"[" * 100_000 + b"]" * 100_000,
        "2**40 bytes of header": struct.pack("<Q", 2**40) + b"{}",
        "pickle": pickle.dumps(Trap(folder / "ran")),
        "git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    }
    cases = []
    for path, use, spoil in victims:
        whole = path.read_bytes()
        drawn = [partial(spoil, whole, rng_of(n)) for n in range(draws // len(victims))]
        cases += make_cases(use, path, {"whole": whole}, bad, drawn)
    for case in cases:
        place = case.path.relative_to(folder)
        case.what = f"{place}, {case.what}"
        case.named = str(folder / place.parts[0])
    return cases


# --------------------------------------------------------------------------------------------------
# What a machine does.


def start(command, folder):
    """Fork a process that runs one of the scripts in a folder, its output in folder/output."""
    torch.set_num_threads(1)  # before the fork: threads do not survive one
    pid = os.fork()
    if pid == 0:
        # tqdm's own lock is shared by all processes: one that is killed may hold it for ever
        tqdm.set_lock(threading.RLock())
        try:
            os.chdir(folder)
            sys.stdout = sys.stderr = open("output", "a", buffering=1)  # noqa: SIM115
            sys.argv = [str(word) for word in command]
            degrade.run_script(SCRIPTS[command[0]].main)
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def finish(command, folder):
    """Let it run to its end -> GB of memory that it took at most."""
    _, status, usage = os.wait4(start(command, folder), 0)
    assert os.waitstatus_to_exitcode(status) == 0, (folder / "output").read_text()[-2000:]
    return usage.ru_maxrss / 2**20


def make_photos(folder, count):
    """-> a CSV of so many pictures of 40 x 40 pixels."""
    (folder / "photos").mkdir()
    lines = ["image_path"]
    for i in range(count):
        lines.append(f"photos/{i}.png")
        data.dead_leaves(40, rng_of(i)).save(folder / lines[-1])
    (folder / "photos.csv").write_text("\n".join(lines) + "\n")
    return folder / "photos.csv"


def kills(folder, draws):
    """A training that never ends, and what makes many files; each goes on where it was killed."""
    csv = make_photos(folder, 12)
    training = ["train.py", *SMALL, "--data", csv, "--save_every", 1, "--val_every", 3]
    finish([*training, "--steps", 1, "--out", "run"], folder)
    restoring = ["evaluate.py", "--checkpoint", "run", "--input", "photos", "--overwrite"]
    commands = [  # and the longest time until it is killed
        ([*training, "--resume", "--steps", 10**6, "--out", "training"], 1.0),
        (["data.py", "cache", "--data", csv, *SMALL[2:], "--epochs", 12, "--out", "cache"], 0.6),
        ([*restoring, "--output", "restored"], 0.6),
    ]
    cases = []
    for command, longest in commands:
        for n in range(draws):
            use = partial(kill, command, folder, rng_of(n).uniform(0, longest))
            cases.append(Case(f"{command[-1]}, kill {n}", use, outcome="worked"))
    return cases


def kill(command, folder, seconds):
    """Run a command, kill -9 after so many seconds, and read every file it left that has a name."""
    pid = start(command, folder)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    ended = not os.WIFSIGNALED(status)
    assert not ended or os.WEXITSTATUS(status) == 0, (folder / "output").read_text()[-2000:]
    made = folder / command[-1]
    for path in made.rglob("[!.]*"):
        if any(part.startswith(".") for part in path.parts):
            continue  # it was being written
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.name == "latest":
            assert (made / path.read_text() / "config.json").is_file()
    if ended:
        shutil.rmtree(made)  # and once more


def sizes(folder, draws):
    """A training of ten times as many steps, and ten times as many pictures restored."""
    csv = make_photos(folder, draws)
    few = folder / "few"
    few.mkdir()
    for i in range(draws // 10):
        shutil.copy(folder / f"photos/{i}.png", few)
    training = ["train.py", *SMALL, "--data", csv, "--val_every", 10**6, "--steps"]
    restoring = ["evaluate.py", "--checkpoint", "out1", "--input"]
    pairs = {
        "steps": [[*training, draws, "--out", "out1"], [*training, 10 * draws, "--out", "out2"]],
        "pictures": [[*restoring, few, "--output", "a"], [*restoring, "photos", "--output", "b"]],
    }

    def use(commands):
        short, long = [finish(command, folder) for command in commands]
        assert long < short + 0.05, f"{short:.3f} GB, then {long:.3f}"

    cases = []
    for name, commands in pairs.items():
        cases.append(Case(name, partial(use, commands), outcome="worked", seconds=30 + draws))
    return cases


KINDS = {  # name: (function that returns its cases, how many are drawn)
    "tables": (tables, 1000),
    "pictures": (pictures, 1000),
    "weights": (weights, 1000),
    "kills": (kills, 100),
    "sizes": (sizes, 500),
}


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], help="default: all")
    parser.add_argument("--draws", type=int, help="cases that are drawn (default: see KINDS)")
    args = parser.parse_args()
    for name in args.kinds or KINDS:
        cases, draws = KINDS[name]
        before = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            counts, wrong = attack(cases(Path(folder), args.draws or draws), folder)
        assert not wrong, "\n".join(wrong[:20])
        told = f"{counts['worked']} worked, {counts['refused']} refused in one line"
        print(f"{name}: {told} ({time.monotonic() - before:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
