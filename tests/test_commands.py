"""Every script on small inputs, and what bad input gets: one line, exit status 2, nothing lost."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
from conftest import ROOT
from runner import run_script

SMALL = ["--batch_size", 2, "--resolution", 32, "--val_every", 20, "--save_every", 10]


def run(*command, cwd, status=0, threads=1):
    """Run a script of the project in the folder cwd -> its output; of status 2, the error's line.

    By default in one thread, because tests share two cores. The proxy that is not there keeps it
    off the network.
    """
    environment = os.environ | {"OMP_NUM_THREADS": f"{threads}"}
    environment["https_proxy"] = "http://127.0.0.1:9"
    code, output, errors = run_script(command, cwd, environment)
    assert code == status, output + errors
    if status != 2:
        return output + errors
    assert "Traceback" not in errors and errors.count("error:") == 1, errors
    line = errors.splitlines()[-1]
    assert line.startswith("error: "), errors
    return line


def read_log(run_folder):
    lines = (run_folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo, cut down to some seconds -> its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    noise = "--degradations", "gaussian_noise:sigma=50"
    return folder, run("train.py", "--steps", 100, *noise, cwd=folder)


@pytest.fixture
def restore(demo):
    """The beginning of a command that restores with the demo's run."""
    return "evaluate.py", "--checkpoint", demo[0] / "out/demo"


# --------------------------------------------------------------------------------------------------
# Good input.


def test_some_seconds_of_training_beat_the_input_by_4_db(demo):
    folder, output = demo
    before, after = re.search(r"PSNR ([\d.]+) -> ([\d.]+) dB", output).groups()
    assert float(after) > float(before) + 4
    run_folder = folder / "out/demo"
    assert (run_folder / "latest").read_text() == "step_000100"
    last = read_log(run_folder)[-1]
    assert last["step"] == 100
    assert last["restored_psnr"] == pytest.approx(float(after), abs=0.01)
    assert Image.open(run_folder / "samples/step_000100.png").size == (6 * 196, 4 * 210)
    assert Image.open(run_folder / "loss.png").size == (640, 480)


def test_restore_a_file_and_a_folder(demo, restore, photos, tmp_path):
    photo = Image.open(photos / "03.png")
    photo.save(tmp_path / "noisy.jpg")
    run(*restore, "--input", "noisy.jpg", "--output", "restored.jpg", cwd=tmp_path)
    assert Image.open(tmp_path / "restored.jpg").size == (96, 80)

    (tmp_path / "in/deep").mkdir(parents=True)
    photo.convert("L").save(tmp_path / "in/grey.png")
    photo.save(tmp_path / "in/deep/a.jpg")
    step = demo[0] / "out/demo/step_000100"
    words = "--checkpoint", step, "--input", "in", "--output", "out", "--steps", 3
    run("evaluate.py", *words, cwd=tmp_path)
    assert Image.open(tmp_path / "out/grey.png").mode == "L"
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(files) == [tmp_path / "out/deep/a.jpg", tmp_path / "out/grey.png"]


def test_pairs_train_evaluate(photos, published, tmp_path):
    """FID from a local file; LPIPS' weights cannot be fetched: that is said, and null."""
    (tmp_path / "photos").mkdir()
    for i in range(3):
        shutil.copy(photos / f"{i:02d}.png", tmp_path / "photos")
    run("data.py", "pairs", "photos", "--out", "pairs", cwd=tmp_path)
    pairs = "--data", "pairs/pairs.csv"
    run("train.py", *pairs, "--steps", 2, *SMALL, cwd=tmp_path)
    words = "--checkpoint", "out/pairs", *pairs, "--fid_weights", published["inception"]
    output = run("evaluate.py", *words, "--steps", 1, cwd=tmp_path)
    rows = read_csv(tmp_path / "out/evaluation/scores.csv")
    report = json.loads((tmp_path / "out/evaluation/scores.json").read_text())
    assert len(rows) == len(report["images"]) == report["count"] == 3

    # the numbers are those of the pictures, and so are their means
    name = os.path.basename(rows[1]["image"])
    clean = np.asarray(Image.open(tmp_path / "pairs/clean" / name), float)
    degraded = np.asarray(Image.open(tmp_path / "pairs/condition" / name), float)
    expected = 10 * np.log10(255**2 / np.mean((clean - degraded) ** 2))
    assert float(rows[1]["input_psnr"]) == pytest.approx(expected, abs=1e-4)
    mean = np.mean([float(row["input_psnr"]) for row in rows])
    methods = report["methods"]
    assert methods["input"]["psnr"]["mean"] == pytest.approx(mean)

    # the tiny preset's autoencoder loses nothing
    ceiling = methods["ceiling"]
    assert (ceiling["psnr"]["mean"], ceiling["ssim"]["mean"]) == (100, 1)
    assert ceiling["fid"] < 1e-4 and methods["input"]["fid"] > 1
    assert "FID of 3 images is too high" in output
    assert output.count("n/a (its weights could not be fetched") == 1
    assert report["missing"].keys() == {"lpips"}
    assert methods["restored"]["lpips"] == {"mean": None, "low": None, "high": None}


def test_a_folder_with_a_damaged_picture_and_a_second_time(restore, photos, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.open(photos / f"{i:02d}.png").save(tmp_path / f"in/{i}.png")
    damaged = tmp_path / "in/3.png"
    damaged.write_bytes((tmp_path / "in/2.png").read_bytes()[:900])
    command = *restore, "--input", "in", "--output", "out"
    output = run(*command, cwd=tmp_path, status=1)
    assert "failed: in/3.png" in output
    assert "restored 3 image(s)" in output and "1 failed" in output

    def times():
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}

    first = times()
    assert first.keys() == {"0.png", "1.png", "2.png"}
    damaged.unlink()
    (tmp_path / "out/1.png").unlink()
    assert "2 were there already" in run(*command, cwd=tmp_path)
    second = times()
    assert second.keys() == first.keys() and second["0.png"] == first["0.png"]
    run(*command, "--overwrite", cwd=tmp_path)
    assert times()["0.png"] > first["0.png"]


def test_quality_and_two_inputs_of_one_name(restore, photos, tmp_path):
    Image.open(photos / "00.png").save(tmp_path / "0.png")
    for quality in (30, 95):
        output = "--output", f"{quality}.jpg", "--quality", quality
        run(*restore, "--input", "0.png", *output, cwd=tmp_path)
    assert (tmp_path / "30.jpg").stat().st_size < (tmp_path / "95.jpg").stat().st_size
    (tmp_path / "more").mkdir()
    Image.open(photos / "00.png").save(tmp_path / "more/0.png")
    inputs = "--input", "0.png", "more/0.png"
    assert "same name" in run(*restore, *inputs, "--output", "both", cwd=tmp_path, status=2)


# --------------------------------------------------------------------------------------------------
# Interruptions.


def interrupt(flags, out, cwd):
    """Begin a training, press Ctrl-C after its first checkpoint -> what it printed."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, flags), "--out", out],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (cwd / out / "latest").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, errors = process.communicate(timeout=60)
    assert process.returncode in (130, 143), errors
    assert "Traceback" not in errors
    return output


def test_a_run_that_is_interrupted_and_resumed_is_the_same_run(photos_csv, tmp_path):
    """The threads that open pictures end with it."""
    flags = ["--data", photos_csv, "--steps", 60, "--conditioning", "projection", *SMALL]
    run("train.py", *flags, "--out", "whole", cwd=tmp_path)
    assert "--resume halved" in interrupt([*flags, "--workers", 3], "halved", tmp_path)
    stopped = int((tmp_path / "halved/latest").read_text().removeprefix("step_"))
    assert 10 <= stopped < 60
    run("train.py", "--resume", "halved", "--workers", 3, cwd=tmp_path)
    for name in ("model", "ema", "optimizer"):
        whole = load_file(tmp_path / f"whole/step_000060/{name}.safetensors")
        halved = load_file(tmp_path / f"halved/step_000060/{name}.safetensors")
        assert whole.keys() == halved.keys()
        assert all(torch.equal(whole[key], halved[key]) for key in whole), name
    validations = []
    for name in ("whole", "halved"):
        log = read_log(tmp_path / name)
        lines = [line for line in log if "restored_psnr" in line and line["step"] % 20 == 0]
        validations.append(lines)
    assert validations[0] == validations[1]
    assert [line["step"] for line in validations[0]] == [0, 20, 40, 60]


def test_a_damaged_picture_ends_a_run_that_is_saved_and_goes_on(photos, tmp_path):
    """Without --skip_bad, which decodes all pictures first."""
    rows = [f"{i:02d}.png" for i in range(12)]
    for name in rows:
        shutil.copy(photos / name, tmp_path)
    table = tmp_path / "p.csv"
    table.write_text("\n".join(["image_path", *rows]))
    _, held_out = data.hold_out(data.CsvPairs(table))
    orders = data.EndlessOrder(sorted(set(range(12)) - set(held_out)), 0)
    bad = rows[orders[7]]  # drawn in the fourth step
    (tmp_path / bad).write_bytes((tmp_path / bad).read_bytes()[:-900])
    command = ["train.py", "--data", "p.csv", "--steps", 8, *SMALL, "--out"]
    line = run(*command, "run", cwd=tmp_path, status=2)
    assert f"p.csv, line {rows.index(bad) + 2}: {bad}: cannot read this picture" in line
    assert line.endswith("python train.py --resume run --data CSV goes on with a mended table")
    assert (tmp_path / "run/latest").read_text() == "step_000003"
    output = run(*command, "skipped", "--skip_bad", cwd=tmp_path)
    assert f"left out: p.csv, line {rows.index(bad) + 2}: " in output and "11 rows" in output
    table.write_text("\n".join(["image_path", *[name for name in rows if name != bad]]))
    line = run("train.py", "--resume", "run", cwd=tmp_path, status=2)
    assert "run began with other pictures; --data, given again, goes on with these" in line
    run("train.py", "--resume", "run", "--data", "p.csv", cwd=tmp_path)
    rows_then = json.loads((tmp_path / "run/step_000008/rows.json").read_text())
    assert len(rows_then["before"]) == 1  # the damaged one may have been trained on


# --------------------------------------------------------------------------------------------------
# Bad input.


@pytest.mark.parametrize("flags", ["--out mine", "--resume mine", "--out mine --resume"])
def test_a_folder_of_other_files_becomes_no_run_and_stays_as_it_is(flags, photos_csv, tmp_path):
    files = {"mine/base/a.png", "mine/samples/b.png", "mine/step_by_step/notes.txt", "mine/loss.md"}
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    flags = flags.split()
    line = run("train.py", "--data", photos_csv, *SMALL, *flags, cwd=tmp_path, status=2)
    assert "exists already" in line or "nothing was saved here" in line
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path).as_posix() for path in left} == files


BAD_INPUT = [  # a command, and what the one line has to say
    ("train.py --data bad.csv", ["bad.csv, line 2", "empty.png"]),
    ("train.py --data small.csv --resolution 128", ["line 2", "96x80", "--resolution"]),
    ("train.py --stepz 3", ["--stepz", "-h"]),
    ("train.py --resolution 31", ["multiple of 4"]),
    ("train.py --resume nowhere", ["nowhere", "no such folder"]),
    ("train.py --out RUN", ["holds a run already", "--resume"]),
    ("train.py --resume RUN --out x", ["--out", "--resume names the folder"]),
    ("train.py --model nonsense", ["tiny, mini, sana1.5-1.6b", "a hub id, or a run"]),
    ("train.py --model out/typo", ["out/typo: no such folder"]),  # out/ is there: no hub id
    ("train.py --resume --out RUN", ["100", "--steps"]),
    ("evaluate.py --checkpoint nowhere --input PHOTO --output b.png", ["nowhere", "no checkpoint"]),
    ("evaluate.py --checkpoint RUN", ["--input", "--data"]),
    ("evaluate.py --checkpoint RUN --input PHOTO", ["--output"]),
]


def test_bad_input_gets_one_line_and_exit_status_2(demo, photos, tmp_path):
    photo = photos / "00.png"
    files = {
        "empty.png": "",
        "bad.csv": "image_path,condition_image_path,caption\nempty.png,,\n",
        "small.csv": f"image_path\n{photo}\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    for command, says in BAD_INPUT:
        command = command.replace("PHOTO", str(photo))
        command = command.replace("RUN", str(demo[0] / "out/demo"))
        line = run(*command.split(), cwd=tmp_path, status=2)
        assert all(word in line for word in says), (command, line)
        left = [path for path in tmp_path.rglob("*") if path not in before]
        assert not [path for path in left if path.is_file()], (command, left)
