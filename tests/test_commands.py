"""Every command of the README on small inputs, and what bad input gets: one line, exit status 2, nothing half-written."""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import ROOT
from runner import run_script

SMALL = ["--batch_size", "2", "--resolution", "32", "--val_every", "40", "--save_every", "20"]


def run(*command, cwd, status=0):
    """Run a script of the project from any folder; -> its output. One thread: tests share two cores. Nothing is fetched."""
    code, output, errors = run_script(command, cwd, os.environ | {"OMP_NUM_THREADS": "1", "https_proxy": "http://127.0.0.1:9"})
    assert code == status, output + errors
    if status == 2:
        assert re.fullmatch(r"error: [^\n]+", errors.splitlines()[-1]) and errors.count("error:") == 1, errors
        assert "Traceback" not in errors
        return errors.splitlines()[-1]
    return output + errors


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo, cut down to half a minute: it must beat its input by 2 dB."""
    folder = tmp_path_factory.mktemp("demo")
    start = time.monotonic()
    output = run("train.py", "--steps", 260, "--degradations", "gaussian_noise:sigma=25", cwd=folder)
    return folder, output, time.monotonic() - start


def test_half_a_minute_of_training_beats_the_input_by_2_db(demo):
    folder, output, seconds = demo
    before, after = map(float, re.search(r"PSNR ([\d.]+) -> ([\d.]+) dB", output).groups())
    assert after > before + 2, output
    run_folder = folder / "out/demo"
    assert (run_folder / "latest").read_text() == "step_000260"
    log = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert log[-1]["restored_psnr"] == pytest.approx(after, abs=0.01) and log[-1]["step"] == 260
    assert Image.open(run_folder / "samples/step_000260.png").size == (6 * 196, 4 * 210)
    assert Image.open(run_folder / "loss.png").size == (640, 720)
    assert seconds < 300


def test_restore_a_file_and_a_folder(demo, photos, tmp_path):
    checkpoint = demo[0] / "out/demo"
    noisy = tmp_path / "noisy.jpg"
    Image.open(photos / "03.png").save(noisy)
    run("evaluate.py", "--checkpoint", checkpoint, "--input", "noisy.jpg", "--output", "restored.jpg", cwd=tmp_path)
    assert Image.open(tmp_path / "restored.jpg").size == (96, 80)
    (tmp_path / "in/deep").mkdir(parents=True)
    Image.open(noisy).convert("L").save(tmp_path / "in/grey.png"), Image.open(noisy).save(tmp_path / "in/deep/a.jpg")
    run("evaluate.py", "--checkpoint", checkpoint / "step_000260", "--input", "in", "--output", "out", "--steps", 3, cwd=tmp_path)
    assert Image.open(tmp_path / "out/grey.png").mode == "L" and (tmp_path / "out/deep/a.jpg").is_file()
    assert len(list((tmp_path / "out").rglob("[!.]*.*"))) == 2


def test_pairs_train_evaluate(photos, tmp_path):
    run("data.py", "pairs", photos, "--out", "pairs", cwd=tmp_path)
    assert "tiny" in run("train.py", "--data", "pairs/pairs.csv", "--steps", 40, *SMALL, cwd=tmp_path)
    output = run("evaluate.py", "--checkpoint", "out/pairs", "--data", "pairs/pairs.csv", "--steps", 2, "--seed", 1, cwd=tmp_path)
    report = json.loads((tmp_path / "out/evaluation/scores.json").read_text())
    with open(tmp_path / "out/evaluation/scores.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report["images"]) == report["count"] == 12 and report["flags"]["steps"] == 2
    mean = np.mean([float(row["input_psnr"]) for row in rows])
    assert report["methods"]["input"]["psnr"]["mean"] == pytest.approx(mean) and f"{mean:.2f}" in output
    clean, degraded = (np.asarray(Image.open(tmp_path / "pairs" / kind / os.path.basename(rows[4]["image"])), float) for kind in ("clean", "condition"))
    assert float(rows[4]["input_psnr"]) == pytest.approx(10 * np.log10(255**2 / np.mean((clean - degraded) ** 2)), abs=1e-4)
    assert (tmp_path / "out/evaluation/grid.png").is_file()
    # the CSV's column tells what was done to each
    with open(tmp_path / "pairs/pairs.csv") as file:
        done = [[word.split(":")[0] for word in row["degradation"].split()] for row in csv.DictReader(file)]
    assert [row["degradation"].split() for row in rows] == done
    some = [float(row["restored_psnr"]) for row, words in zip(rows, done) if "jpeg" in words]
    assert re.search(rf"with jpeg \({len(some)}\) .* -> {np.mean(some):.2f}", output)
    # no network: said, and null
    assert output.count("n/a (its weights could not be fetched") == 2 and report["methods"]["restored"]["fid"] is None
    assert report["methods"]["restored"]["lpips"] == {"mean": None, "low": None, "high": None} and report["missing"].keys() == {"lpips", "fid"}


def test_the_context_of_a_score(demo, photos, published, tmp_path):
    """Sweep, ceiling, comparison, all metrics from local files, intervals."""
    (tmp_path / "six").mkdir()
    for i in range(6):
        (tmp_path / f"six/{i:02d}.png").symlink_to(photos / f"{i:02d}.png")
    run("data.py", "pairs", "six", "--out", "pairs", "--degradations", "gaussian_noise:sigma=25", cwd=tmp_path)
    weights = "--lpips_weights", published["alex"], published["alex heads"], "--fid_weights", published["inception"]
    command = "evaluate.py", "--data", "pairs/pairs.csv", *weights, "--compare", tmp_path / "pairs/clean"
    output = run(*command, "--checkpoint", demo[0] / "out/demo", "--sweep", "1,3", "--average", 2, "--guidance", 1.5, "--condition_guidance", 1.1,
                 cwd=tmp_path)
    report = json.loads((tmp_path / "out/evaluation/scores.json").read_text())
    methods = report["methods"]
    assert list(methods) == ["input", "ceiling", "steps_1", "steps_3", "compared"] and not report["missing"] and "below 2,048" in output
    for perfect in ("ceiling", "compared"):  # the tiny preset's autoencoder loses nothing
        assert methods[perfect]["psnr"]["mean"] is None and methods[perfect]["ssim"]["mean"] == 1 and methods[perfect]["lpips"]["mean"] == 0
        assert methods[perfect]["fid"] < 1e-4 and "inf" in output
    one, degraded = methods["steps_1"], methods["input"]
    assert degraded["ssim"]["low"] < degraded["ssim"]["mean"] < degraded["ssim"]["high"] and degraded["fid"] > 1
    assert report["share_of_the_way"]["compared"]["ssim"] == 1
    expected = (one["ssim"]["mean"] - degraded["ssim"]["mean"]) / (1 - degraded["ssim"]["mean"])
    assert report["share_of_the_way"]["steps_1"]["ssim"] == pytest.approx(expected)
    assert Image.open(tmp_path / "out/evaluation/sweep.png").size == (640, 240)
    output = run(*command, "--metrics", "psnr", "--y_channel", "--output", "alone", cwd=tmp_path)  # no checkpoint: only the other program
    assert "PSNR (Y)" in output and list(json.loads((tmp_path / "alone/scores.json").read_text())["methods"]) == ["input", "compared"]
    for name in ("00", "05"):
        (tmp_path / f"pairs/clean/000{name}_{name}.png").rename(tmp_path / f"{name}.png")
    assert "00000_00.png" in run("evaluate.py", "--data", "pairs/pairs.csv", "--compare", "pairs/clean", "--metrics", "psnr", cwd=tmp_path, status=2)


def test_folders_of_pictures(demo, photos, tmp_path):
    """Patterns, one damaged picture, a second run that has nothing left to do, quality, the grid."""
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.open(photos / f"{i:02d}.png").save(tmp_path / f"in/{i}.png")
    (tmp_path / "in/3.png").write_bytes((tmp_path / "in/2.png").read_bytes()[:900])
    command = "evaluate.py", "--checkpoint", demo[0] / "out/demo", "--input", "in/*.png", "--output", "out"
    output = run(*command, "--grid", "grid.png", cwd=tmp_path, status=1)
    assert "left out: in/3.png" in output and "restored 3 image(s)" in output and "1 failed" in output
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (3 * 84, 3 * 98)
    before, after, difference = (np.asarray(grid.crop((x, 16, x + 80, 96))).astype(int) for x in (0, 84, 168))
    assert np.array_equal(difference, np.clip(128 + 2 * (after - before), 0, 255)) and len(np.unique(difference)) > 20
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[!.]*")}
    assert times.keys() == {"0.png", "1.png", "2.png"}
    (tmp_path / "out/1.png").unlink(), (tmp_path / "in/3.png").unlink()
    assert "2 were there already" in run(*command, cwd=tmp_path)
    assert (tmp_path / "out/0.png").stat().st_mtime_ns == times["0.png"] and (tmp_path / "out/1.png").exists()
    run(*command, "--overwrite", cwd=tmp_path)
    assert (tmp_path / "out/0.png").stat().st_mtime_ns > times["0.png"]
    for quality in (30, 95):
        run(*command[:4], "in/0.png", "--output", f"{quality}.jpg", "--quality", quality, cwd=tmp_path)
    assert (tmp_path / "30.jpg").stat().st_size < (tmp_path / "95.jpg").stat().st_size
    (tmp_path / "more").mkdir()
    Image.open(photos / "00.png").save(tmp_path / "more/0.png")
    assert "same name" in run(*command[:4], "in/0.png", "more/0.png", "--output", "both", cwd=tmp_path, status=2)


def test_what_lies_in_a_folder_that_holds_no_run_is_not_deleted(photos_csv, tmp_path):
    (tmp_path / "out/samples").mkdir(parents=True), (tmp_path / "out/step_by_step").mkdir()
    kept = [tmp_path / "out/samples/mine.png", tmp_path / "out/step_by_step/notes.txt", tmp_path / "out/loss.md"]
    for path in kept:
        path.write_text("mine")
    for flags in ([], ["--overwrite"]):
        run("train.py", "--data", photos_csv, "--steps", 1, *SMALL, "--out", "out" if not flags else "out2", *flags, cwd=tmp_path)
    assert all(path.read_text() == "mine" for path in kept)


def test_degrade_commands(photos, tmp_path):
    source = photos / "00.png"
    assert "jpeg" in run("degrade.py", source, "a.png", "--only", "jpeg:quality=20", cwd=tmp_path)
    assert Image.open(tmp_path / "a.png").size == (96, 80)
    run("degrade.py", source, "b.png", "--num_degradations", 2, "--seed", 4, cwd=tmp_path)
    run("degrade.py", source, "sheet.png", "--preview", cwd=tmp_path)
    assert Image.open(tmp_path / "sheet.png").size == (400, 196)


@pytest.mark.parametrize("conditioning, workers", [("widen", 0), ("projection", 2), ("widen", 4)])
def test_a_run_that_is_interrupted_and_resumed_is_the_same_run(photos_csv, tmp_path, conditioning, workers):
    flags = ["--data", photos_csv, "--steps", 120, "--conditioning", conditioning, *SMALL]
    run("train.py", *flags, "--out", "whole", cwd=tmp_path)
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, flags), "--out", "halved", "--workers", str(workers)],
                               cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "halved/latest").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in output and "--resume" in output and "Traceback" not in errors
    stopped = int((tmp_path / "halved/latest").read_text()[5:])
    assert 20 <= stopped < 120
    run("train.py", "--resume", "--out", "halved", "--workers", workers, cwd=tmp_path)
    for name in ("model", "ema", "optimizer"):
        whole, halved = (load_file(tmp_path / r / f"step_000120/{name}.safetensors") for r in ("whole", "halved"))
        assert whole.keys() == halved.keys() and all(torch.equal(whole[k], halved[k]) for k in whole), name
    logs = [[r for r in map(json.loads, (tmp_path / r / "log.jsonl").read_text().splitlines()) if "restored_psnr" in r and r["step"] % 40 == 0]
            for r in ("whole", "halved")]
    assert logs[0] == logs[1] and len(logs[0]) == 4  # before the first step, and every 40


def test_bad_input_gets_one_line_and_exit_status_2(demo, photos, tmp_path):
    checkpoint = demo[0] / "out/demo"
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "file").write_text("x")
    (tmp_path / "bad.csv").write_text("image_path,condition_image_path,caption\nempty.png,,\n")
    (tmp_path / "small.csv").write_text(f"image_path\n{photos / '00.png'}\n")
    (tmp_path / "header.csv").write_text(f"picture\n{photos / '00.png'}\n")
    Image.new("RGB", (96, 81)).save(tmp_path / "other.png")
    (tmp_path / "sizes.csv").write_text(f"image_path,condition_image_path\n{photos / '00.png'},other.png\n")
    cases = [
        (["train.py", "--data", "absent.csv"], ["absent.csv"]),
        (["train.py", "--data", "bad.csv"], ["bad.csv, line 2", "empty.png"]),
        (["train.py", "--data", "small.csv", "--resolution", "128"], ["line 2", "96x80", "--resolution 80"]),
        (["train.py", "--data", "header.csv"], ["header.csv", "image_path", "picture"]),
        (["train.py", "--data", "sizes.csv"], ["sizes.csv, line 2", "96x80", "96x81"]),
        (["train.py", "--lr", "-1"], ["--lr"]),
        (["train.py", "--device", "moon"], ["moon"]),
        (["train.py", "--resume", "--overwrite"], ["give one"]),
        (["evaluate.py", "--checkpoint", checkpoint, "--input", photos, "--output", photos / "x"], ["inside"]),
        (["train.py", "--stepz", "3"], ["--stepz", "-h"]),
        (["train.py", "--steps", "x"], ["--steps"]),
        (["train.py", "--steps", "0"], ["--steps"]),
        (["train.py", "--resolution", "31"], ["multiple of 2"]),
        (["train.py", "--degradations", "fog"], ["fog", "jpeg"]),
        (["train.py", "--out", "file/run"], ["file/run"]),
        (["train.py", "--resume", "--out", "nowhere"], ["nowhere", "no checkpoint"]),
        (["train.py", "--out", checkpoint], ["--resume", "--overwrite"]),
        (["train.py", "--resume", "--out", checkpoint], ["260", "--steps"]),
        (["evaluate.py", "--checkpoint", "nowhere", "--input", photos / "00.png", "--output", "b.png"], ["nowhere", "no checkpoint"]),
        (["evaluate.py", "--checkpoint", checkpoint], ["--input", "--data"]),
        (["evaluate.py", "--checkpoint", checkpoint, "--input", "empty.png", "--output", "o.png"], ["empty.png"]),
        (["evaluate.py", "--checkpoint", checkpoint, "--input", photos / "00.png"], ["--output"]),
        (["evaluate.py", "--checkpoint", checkpoint, "--input", photos / "00.png", "--output", "o.xyz"], ["o.xyz"]),
        (["evaluate.py", "--checkpoint", checkpoint, "--input", photos / "00.png", "--output", "file/o.png"], ["file/o.png"]),
        (["evaluate.py", "--checkpoint", checkpoint, "--data", "absent.csv"], ["absent.csv"]),
        (["evaluate.py", "--data", "small.csv"], ["--checkpoint", "--compare"]),
        (["evaluate.py", "--checkpoint", checkpoint, "--data", "small.csv", "--sweep", "1,x"], ["--sweep", "1,2,4,8,20"]),
        (["evaluate.py", "--checkpoint", checkpoint, "--data", "small.csv", "--sweep", "0"], ["--sweep"]),
        (["evaluate.py", "--checkpoint", checkpoint, "--data", "small.csv", "--average", "0"], ["--average 0"]),
        (["evaluate.py", "--checkpoint", checkpoint, "--data", "small.csv", "--compare", "nowhere", "--metrics", "psnr"], ["nowhere"]),
        (["evaluate.py", "--checkpoint", checkpoint, "--data", "small.csv", "--metrics", "fid", "--fid_weights", "bad.csv"], ["bad.csv", "inception"]),
        (["evaluate.py", "--checkpoint", checkpoint, "--input", "none/*.png", "--output", "o"], ["none/*.png"]),
        (["evaluate.py", "--checkpoint", checkpoint, "--input", photos / "00.png", "--output", "o.jpg", "--quality", "0"], ["--quality 0"]),
        (["train.py", "--condition_dropout", "2"], ["--condition_dropout"]),
        (["data.py", "pairs", "nowhere", "--out", "p"], ["nowhere"]),
        (["data.py", "pairs", photos, "--out", "file/p"], ["file/p"]),
        (["degrade.py", "absent.png", "o.png"], ["absent.png"]),
        (["degrade.py", photos / "00.png", "o.png", "--only", "fog"], ["fog"]),
    ]
    with ThreadPoolExecutor(1) as pool:  # one after the other: some are about the same run folder
        lines = list(pool.map(lambda case: run(*case[0], cwd=tmp_path, status=2), cases))
    for (command, words), line in zip(cases, lines):
        assert all(word in line for word in words), (command, line)
    assert not list(tmp_path.rglob("*o.*")) and not (tmp_path / "p").exists() and (tmp_path / "file").read_text() == "x"


def test_help_of_every_script(tmp_path):
    for script in ("train.py", "evaluate.py", "data.py", "degrade.py"):
        assert "python " + script in run(script, "-h", cwd=tmp_path)
