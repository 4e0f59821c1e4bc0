"""What a long run meets: several processes, a cache, a curriculum, kill -9, a full disk."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import degrade
import model
import train
from conftest import ROOT
from model import PRESETS
from runner import run_script
from test_commands import SMALL, read_log, run
from test_train import assert_finite, assert_same_checkpoint, load_newest, seeded, train_here
from test_train import train_until

ALONE = os.environ | {"OMP_NUM_THREADS": "1"}
CHECKPOINT = "model", "ema", "optimizer"
# with seed 0 and these photos some gradients are at the level of rounding, where AdamW makes whole
# steps of it
EIGHT = ["--batch_size", 8, "--resolution", 32, "--val_every", 50, "--save_every", 10]
EIGHT += ["--workers", 0, "--steps", 20, "--seed", 1]


def losses(run_folder):
    return [line["loss"] for line in read_log(run_folder) if "loss" in line]


def torchrun(count, *words, cwd, status=0, **env):
    """Run a script as so many processes that torchrun watches over -> what they print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={count}", *map(str, words)]
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env=ALONE | env, timeout=300
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + result.stderr


def share(count, *command, cwd, status=0, **env):
    """Run a script as so many processes, with what torchrun would tell them, but without it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}

    def run_rank(rank):
        return run_script(command, cwd, ALONE | env | {"RANK": str(rank)})

    with ThreadPoolExecutor(count) as pool:
        for code, output, errors in pool.map(run_rank, range(count)):
            assert code == status, output + errors


def assert_close_checkpoint(run_folder, other):
    """The newest checkpoints of two runs differ by the rounding of sums, no more."""
    assert (run_folder / "latest").read_text() == (other / "latest").read_text()
    for name in CHECKPOINT:
        a = load_newest(run_folder, name)
        b = load_newest(other, name)
        tolerance = 0.02 if name == "optimizer" else 0.005  # of gradients that are near zero
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            apart = (a[key] - b[key]).abs().max()
            assert apart <= tolerance * a[key].abs().max() + 1e-9, (name, key)


@pytest.fixture(scope="module")
def alone(photos_csv, tmp_path_factory):
    """Twenty steps of eight images in one process."""
    folder = tmp_path_factory.mktemp("alone")
    run("train.py", "--data", photos_csv, *EIGHT, "--out", "run", cwd=folder)
    return folder / "run"


# --------------------------------------------------------------------------------------------------
# Several processes: the same steps as one, to rounding.


def test_two_processes_of_torchrun_are_one(alone, photos_csv, tmp_path):
    """Also if they compute a batch in parts, with less memory."""
    flags = ["--data", photos_csv, *EIGHT, "--accumulate", 2, "--checkpointing"]
    flags += ["--ema_device", "cpu", "--out", "run"]
    output = torchrun(2, ROOT / "train.py", *flags, cwd=tmp_path)
    assert output.count("model tiny") == 1
    assert "2 x cpu" in output
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)
    assert_close_checkpoint(alone, tmp_path / "run")


def test_four_processes_are_one(alone, photos_csv, tmp_path):
    """More than some weights have rows."""
    share(4, "train.py", "--data", photos_csv, *EIGHT, "--out", "run", cwd=tmp_path)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)
    assert_close_checkpoint(alone, tmp_path / "run")


def test_processes_in_bf16_with_a_projection_save_and_go_on(photos_csv, tmp_path):
    """The projection stays fp32, without low bits.

    After a signal to the second of two they go on as if never stopped, bit for bit.
    """
    flags = ["--data", photos_csv, *EIGHT, "--optimizer", "adamw_bf16", "--steps", 5]
    flags += ["--conditioning", "projection"]
    run("train.py", *flags, "--out", "one", cwd=tmp_path)
    share(2, "train.py", *flags, "--out", "two", cwd=tmp_path)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    for name in CHECKPOINT:
        one = load_newest(tmp_path / "one", name)
        two = load_newest(tmp_path / "two", name)
        assert one.keys() == two.keys()
        for key in one:
            assert (one[key].shape, one[key].dtype) == (two[key].shape, two[key].dtype), key
    moments = load_newest(tmp_path / "two", "optimizer")
    assert "low.projection.weight" not in moments
    assert moments["exp_avg.projection.weight"].dtype == torch.float32
    assert moments["low.sana.proj_out.weight"].dtype == torch.int16

    signalled = ROOT / "tests/signalled.py", *flags, "--out", "halved"
    share(2, *signalled, cwd=tmp_path, status=143, SIGNAL="TERM 2 1")
    assert (tmp_path / "halved/latest").read_text() == "step_000003"
    share(2, "train.py", "--resume", "halved", cwd=tmp_path)
    assert_same_checkpoint(tmp_path / "two", tmp_path / "halved")
    run("train.py", "--resume", "two", "--steps", 6, cwd=tmp_path)
    assert (tmp_path / "two/latest").read_text() == "step_000006"


def test_a_signal_to_one_process_ends_all_and_any_number_goes_on(alone, photos_csv, tmp_path):
    """One process to step 6, two to step 13, one to the end: as one that was not disturbed."""
    train_until(6, "--data", photos_csv, *EIGHT, "--out", "run", cwd=tmp_path)
    signalled = ROOT / "tests/signalled.py", "--resume", "run"
    output = torchrun(2, *signalled, cwd=tmp_path, status=1, SIGNAL="INT 12 1")
    assert "--resume run goes on" in output
    assert (tmp_path / "run/latest").read_text() == "step_000013"
    run("train.py", "--resume", "run", cwd=tmp_path)
    assert_close_checkpoint(alone, tmp_path / "run")


def test_a_killed_process_ends_the_job_and_torchrun_resumes_it(alone, photos_csv, tmp_path):
    """The second of two processes is killed at step 11, and when they go on, at step 12."""
    command = [ROOT / "tests/signalled.py", "--data", photos_csv, *EIGHT, "--out", "run"]
    torchrun(2, *command, cwd=tmp_path, status=1, SIGNAL="KILL 11 1")
    assert (tmp_path / "run/latest").read_text() == "step_000010"
    for name in CHECKPOINT:
        assert_finite(load_newest(tmp_path / "run", name))
    command = ["--max_restarts=1", *command, "--resume"]
    torchrun(2, *command, cwd=tmp_path, SIGNAL="KILL 12 1")
    assert_close_checkpoint(alone, tmp_path / "run")


@pytest.fixture
def with_a_bad_row(photos, tmp_path):
    """Flags of a training, in tmp_path, that meets an unreadable picture in its second step."""
    rows = [str(path) for path in sorted(photos.glob("*.png"))]
    (tmp_path / "cut.png").write_bytes((photos / "00.png").read_bytes()[:2000])
    (tmp_path / "pairs.csv").write_text("\n".join(["image_path", *rows, "cut.png"]) + "\n")
    return ["--data", "pairs.csv", *EIGHT, "--seed", 5, "--out", "run"]


def test_an_unreadable_image_of_one_process_ends_all(with_a_bad_row, tmp_path):
    """It is named, and the last checkpoint is whole."""
    words = [ROOT / "train.py", *with_a_bad_row, "--save_every", 1]
    output = torchrun(2, *words, cwd=tmp_path, status=1)
    assert "error: pairs.csv, line 14" in output
    assert (tmp_path / "run/latest").read_text() == "step_000001"
    for name in CHECKPOINT:
        assert_finite(load_newest(tmp_path / "run", name))


# --------------------------------------------------------------------------------------------------
# The cache.


@pytest.mark.parametrize("kind", ["tiny", "pretrained"])
def test_training_from_a_cache_is_the_same_training(kind, photos_csv, pipeline_folder, tmp_path):
    """Crops, flips, degradations and captions included: it holds the run's own draws."""
    flags = ["--data", photos_csv, "--resolution", 32, "--seed", 3]
    steps = ["--steps", 9, "--batch_size", 2, "--lr", 1e-3, "--val_every", 100]
    if kind == "pretrained":
        flags += ["--model", pipeline_folder]
    run("data.py", "cache", *flags, "--epochs", 2, "--out", "cache", cwd=tmp_path)
    flags += [*steps, "--save_every", 3]
    cached = ["--cache", "cache"]
    run("train.py", *flags, "--out", "photos", cwd=tmp_path)
    run("train.py", *flags, "--out", "cached", *cached, "--workers", 2, cwd=tmp_path)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "photos"), rel=1e-3)
    if kind == "pretrained":
        share(2, "train.py", *flags, "--out", "two", *cached, cwd=tmp_path)
        assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "cached"), rel=1e-5)
    wrong = [*flags, *cached, "--seed", 4, "--out", "x"]
    assert "made with --seed 3" in run("train.py", *wrong, cwd=tmp_path, status=2)
    wrong = [*flags[:6], *cached, "--curriculum", "32:4"]
    assert "--curriculum" in run("train.py", *wrong, cwd=tmp_path, status=2)
    # beyond the cached epochs the same draws come again, in another order
    run("train.py", "--resume", "cached", "--steps", 20, cwd=tmp_path)


def test_an_interrupted_cache_is_completed(photos_csv, tmp_path, monkeypatch):
    flags = ["data.py", "cache", "--data", str(photos_csv), "--resolution", "32"]
    flags += ["--epochs", "3", "--workers", "0", "--out"]
    whole = tmp_path / "whole"
    halved = tmp_path / "halved"
    monkeypatch.setattr(sys, "argv", [*flags, str(whole)])
    data.main()
    encode = data.PixelAE.encode
    calls = []

    def stopping(self, pixels):
        calls.append(1)
        if len(calls) == 6:  # of the third batch
            raise KeyboardInterrupt
        return encode(self, pixels)

    monkeypatch.setattr(data.PixelAE, "encode", stopping)
    monkeypatch.setattr(sys, "argv", [*flags, str(halved)])
    with pytest.raises(KeyboardInterrupt):
        data.main()
    files = [path for path in halved.rglob("*") if path.is_file()]
    made = [data.draw_path(halved, n) for n in range(16)]
    assert sorted(files) == [*made, halved / "index.json", halved / "pictures.json"]

    args = train.parse_args(
        ["--data", str(photos_csv), "--resolution", "32", "--cache", str(halved)]
    )
    expected = data.fingerprint(args, PRESETS["tiny"])
    drawn, _ = data.make_datasets(args)
    digests = data.row_digests(drawn)
    with pytest.raises(degrade.UserError, match="not complete.*draw 16"):
        data.CachedDataset(halved, expected, digests, 11)
    data.main()
    for n in range(33):
        a = load_file(data.draw_path(whole, n))
        b = load_file(data.draw_path(halved, n))
        assert all(torch.equal(a[key], b[key]) for key in a)

    cached = data.CachedDataset(halved, expected, digests, 11)
    for n in (0, 7, 8, 32):
        assert cached[n]["caption"] == drawn[n]["caption"]
        latents = encode(data.PixelAE(4), drawn[n]["clean"][None])[0]
        assert torch.equal(cached[n]["clean"], latents.half().float())
    first = [cached[n] for n in range(11)]
    again = [cached[n] for n in range(33, 44)]
    sums = [[item["clean"].sum().item() for item in items] for items in (first, again)]
    assert sorted(sums[0]) == sorted(sums[1])
    assert sums[0] != sums[1]
    assert [item["caption"] for item in first] != [item["caption"] for item in again]
    data.draw_path(halved, 8).write_bytes(b"x" * 100)
    with pytest.raises(degrade.UserError, match="0000008.safetensors"):
        cached[8]


# --------------------------------------------------------------------------------------------------
# Stages, kills, a lack of memory, full disks.


def test_a_curriculum_changes_the_crop_and_resumes_across_the_change(photos_csv, tmp_path):
    flags = ["--data", photos_csv, "--curriculum", "32:7,48:5", "--batch_size", 2]
    flags += ["--val_every", 50, "--ema_every", 2]
    run("train.py", *flags, "--out", "whole", cwd=tmp_path)
    assert (tmp_path / "whole/latest").read_text() == "step_000012"
    for stop, workers in ((4, 2), (8, 0)):
        out = tmp_path / f"stopped_{stop}"
        train_until(stop, *flags, "--out", out, cwd=tmp_path)
        assert (out / "latest").read_text() == f"step_{stop:06d}"
        run("train.py", "--resume", out, "--workers", workers, cwd=tmp_path)
        assert_same_checkpoint(tmp_path / "whole", out)
    args = train.parse_args([str(word) for word in flags])
    train_set, _ = data.make_datasets(args, train.crop_stages(args))
    assert args.steps == 12
    assert train_set[13]["clean"].shape[1] == 32
    assert train_set[14]["clean"].shape[1] == 48
    line = run("train.py", "--curriculum", "32:7,x", cwd=tmp_path, status=2)
    assert "--curriculum" in line


DISTURBED = """
import multiprocessing, sys, time
sys.path.insert(0, {root!r})
import train

do_step = train.train_step


def train_step(state, *rest):
    if state.step == 3:
        {disturbance}
    return do_step(state, *rest)


train.train_step = train_step
if __name__ == "__main__":
    train.run_script(train.main)
"""


@pytest.fixture
def disturb(photos_csv, tmp_path):
    """Run train.py with two workers and a statement that comes between step 3 and step 4."""

    def disturb(statement, status):
        script = DISTURBED.format(root=str(ROOT), disturbance=statement)
        (tmp_path / "disturbed.py").write_text(script)
        flags = ["--data", photos_csv, *SMALL, "--steps", 9, "--workers", 2, "--out", "run"]
        code, _, errors = run_script(
            [tmp_path / "disturbed.py", *flags], tmp_path, ALONE, timeout=30
        )
        assert code == status, errors
        assert (tmp_path / "run/latest").read_text() == "step_000003"
        return errors

    return disturb


def test_a_killed_worker_ends_the_run_with_its_state_saved(disturb, tmp_path):
    """As when memory runs out: the system kills what takes most."""
    wait = "[time.sleep(0.1) for _ in range(200)]"  # the signal that it died may come between two
    errors = disturb(f"multiprocessing.active_children()[0].kill(); {wait}", 2)
    assert errors.count("error:") == 1
    assert "Traceback" not in errors
    moments = load_newest(tmp_path / "run", "optimizer")
    assert any(t.abs().sum() > 0 for t in moments.values())
    run("train.py", "--resume", "run", cwd=tmp_path)


def test_an_unreadable_image_ends_the_run_with_its_state_saved(with_a_bad_row, tmp_path):
    """The other workers too."""
    command = ["train.py", *with_a_bad_row, "--workers", 3]
    code, _, errors = run_script(command, tmp_path, ALONE, timeout=30)
    assert code == 2, errors
    assert errors.splitlines()[-1].startswith("error: pairs.csv, line 14")
    assert "Traceback" not in errors
    assert (tmp_path / "run/latest").read_text() == "step_000001"


def test_a_mistake_in_the_program_ends_it_with_its_state_saved(disturb):
    """Where the mistake was is said, and no worker keeps the program from ending."""
    errors = disturb("raise AssertionError('a mistake')", 1)
    assert "AssertionError: a mistake" in errors


def test_a_mistake_while_caching_ends_it(photos_csv, tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import data

data.save_weights = None
if __name__ == "__main__":
    data.run_script(data.main)
"""
    (tmp_path / "mistaken.py").write_text(script)
    flags = ["cache", "--data", photos_csv, "--epochs", 9, "--workers", 2, "--out", "cache"]
    command = [tmp_path / "mistaken.py", *flags]
    code, _, errors = run_script(command, tmp_path, ALONE, timeout=30)
    assert code == 1
    assert "TypeError" in errors


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_out_of_memory_saves_what_there_was(error, photos_csv, tmp_path, monkeypatch, capsys):
    compute_gradients = train.compute_gradients

    def spoilt(state, *rest):
        if state.step == 3:
            raise error
        return compute_gradients(state, *rest)

    monkeypatch.setattr(train, "compute_gradients", spoilt)
    flags = ["--data", photos_csv, *SMALL, "--workers", 0, "--steps", 9, "--out", tmp_path / "run"]
    with pytest.raises(SystemExit) as end:
        degrade.run_script(lambda: train_here(monkeypatch, *flags))
    assert end.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: out of memory") and "README" in line
    assert (tmp_path / "run/latest").read_text() == "step_000003"
    monkeypatch.setattr(train, "compute_gradients", compute_gradients)
    train_here(monkeypatch, "--resume", tmp_path / "run")
    assert (tmp_path / "run/latest").read_text() == "step_000009"


def test_half_an_update_is_not_saved(photos_csv, tmp_path, monkeypatch):
    update_ema = train.State.update_ema

    def spoilt(state):
        if state.step == 4:
            raise MemoryError
        update_ema(state)

    monkeypatch.setattr(train.State, "update_ema", spoilt)
    flags = ["--data", photos_csv, *SMALL, "--workers", 0, "--steps", 9, "--save_every", 2]
    with pytest.raises(MemoryError):
        train_here(monkeypatch, *flags, "--out", tmp_path / "run")
    assert (tmp_path / "run/latest").read_text() == "step_000002"


def test_a_validation_that_fails_saves_first(photos_csv, tmp_path, monkeypatch):
    validate = train.validate

    def spoilt(state, *rest):
        if state.step == 4:
            raise degrade.UserError("a held-out picture is gone")
        return validate(state, *rest)

    monkeypatch.setattr(train, "validate", spoilt)
    flags = ["--data", photos_csv, *SMALL, "--workers", 0, "--steps", 9, "--val_every", 4]
    with pytest.raises(degrade.UserError, match="is gone"):
        train_here(monkeypatch, *flags, "--save_every", 100, "--out", tmp_path / "run")
    assert (tmp_path / "run/latest").read_text() == "step_000004"


def test_a_full_disk_keeps_the_checkpoint_before(photos_csv, tmp_path):
    """A limit on the size of files stands in for the disk."""
    flags = ["--data", photos_csv, *SMALL, "--steps", 4, "--out", "run"]
    run("train.py", *flags, cwd=tmp_path)
    size = (tmp_path / "run/step_000004/ema.safetensors").stat().st_size

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    command = [sys.executable, ROOT / "train.py", "--resume", "run", "--steps", "6"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit, env=ALONE
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("error: cannot write checkpoint run/step_000006") == 1
    assert "Traceback" not in result.stderr
    assert (tmp_path / "run/latest").read_text() == "step_000004"
    assert not list((tmp_path / "run").glob(".step*"))
    run("train.py", "--resume", "run", "--steps", 6, cwd=tmp_path)


# --------------------------------------------------------------------------------------------------
# Data that is bad, or changes.


def test_a_row_that_cannot_be_drawn_is_not_held_out(photos, tmp_path):
    """A picture below the crop, and one picture in many rows, with a condition and without."""
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    rows = ["image_path,condition_image_path"]
    rows += [f"{path},{path}" for path in sorted(photos.glob("*.png"))]
    rows += ["small.png,small.png", f"{photos / '00.png'},"] * 4
    (tmp_path / "p.csv").write_text("\n".join(rows))
    flags = ["--data", str(tmp_path / "p.csv"), "--skip_bad", "--resolution", "32"]
    for seed in range(8):
        args = train.parse_args([*flags, "--seed", str(seed)])
        train_set, val_set = data.make_datasets(args)
        assert len(val_set) == 1  # a tenth of the 16 that are large enough
        assert val_set.draw(0)["clean"].shape == (3, 80, 96)
        held_out = {val_set.source.rows[row].clean for row in val_set.rows}
        trained_on = {train_set.source.rows[row].clean for row in train_set.rows}
        assert tmp_path / "small.png" not in held_out
        assert not held_out & trained_on
        for n in range(100):
            assert train_set[n]["clean"].shape == (3, 32, 32)
    source = data.CsvPairs(tmp_path / "p.csv")
    one = data.PairedDataset(source, 32, rows=[3, 12], skip_bad=True)
    assert {one[n]["clean"].shape for n in range(60)} == {(3, 32, 32)}


def test_data_that_changes_under_a_run_is_named(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    names = [f"photos/{i:02d}.png" for i in range(12)]
    (tmp_path / "photos.csv").write_text("\n".join(["image_path", *names]) + "\n")
    flags = ["--data", "photos.csv", *SMALL, "--out", "run"]
    run("train.py", *flags, "--steps", 3, cwd=tmp_path)
    resume = "train.py", "--resume", "run", "--steps"

    for name in names:
        (tmp_path / name).write_bytes(b"no longer a picture")
    assert "photos.csv, line" in run(*resume, 6, cwd=tmp_path, status=2)
    shutil.copytree(photos, folder, dirs_exist_ok=True)

    with open(tmp_path / "photos.csv", "a") as file:
        file.write("photos/00.png\n")
    assert "the row photos/00.png again is new" in run(*resume, 6, cwd=tmp_path, status=2)
    run(*resume, 6, "--data", "photos.csv", cwd=tmp_path)
    run(*resume, 8, cwd=tmp_path)

    # the rows are fewer, although the file that lists them is the same
    (folder / "03.png").unlink()
    assert "the row photos/03.png is gone" in run(*resume, 9, "--skip_bad", cwd=tmp_path, status=2)


def test_skip_bad_counts_and_goes_on(photos, tmp_path):
    """One damaged and one absent picture among twelve: in all that reads pictures."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "05.png").write_bytes((photos / "05.png").read_bytes()[:900])
    names = [f"photos/{i:02d}.png" for i in range(13)]
    (tmp_path / "photos.csv").write_text("\n".join(["image_path", *names]) + "\n")
    table = "--data", "photos.csv"
    caching = ["data.py", "cache", *table, "--resolution", 32, "--out", "cache"]
    measuring = ["evaluate.py", *table, "--checkpoint", "out/photos", "--metrics", "psnr"]
    commands = [
        (["train.py", *table, *SMALL, "--steps", 12, "--workers", 2], "12.png"),
        (caching, "12.png"),
        (["data.py", "pairs", "photos", "--out", "pairs"], "05.png"),
        (measuring, "12.png"),
    ]
    for command, name in commands:
        assert name in run(*command, cwd=tmp_path, status=2)
        output = run(*command, "--skip_bad", cwd=tmp_path)
        assert "left out: " in output
        assert "05.png" in output

    flags = ["--data", str(tmp_path / "photos.csv"), "--skip_bad", "--resolution", "32"]
    train_set, val_set = data.make_datasets(train.parse_args(flags))
    assert 5 not in val_set.rows
    # each is passed over once; two of them in a row do not come in these epochs
    bad = [n for n in range(24) if train_set.plan(n)[0] == 5]
    assert bad
    lines = [line for line in read_log(tmp_path / "out/photos") if "bad_images" in line]
    assert lines[-1]["bad_images"] == len(bad)
    item = train_set[bad[0]]
    assert item["bad"] == 1
    assert item["caption"] == train_set.plan(bad[0] + 1)[2]
    assert len((tmp_path / "pairs/pairs.csv").read_text().splitlines()) == 12
    assert json.loads((tmp_path / "out/evaluation/scores.json").read_text())["count"] == 11


SENSELESS = [
    ("black", []),
    ("grey", ["--degradations", "jpeg"]),
    ("outlier", []),
    ("black", ["--lr", 1]),
    ("outlier", ["--lr", 1, "--clip", 1000]),
]


@pytest.mark.parametrize("kind, flags", SENSELESS)
def test_senseless_pictures_and_rates_end_in_finite_weights(kind, flags, tmp_path):
    """All black, all grey, one white row in black, and learning rates that are too high.

    The run survives, or stops with advice and its state.
    """
    rows = ["image_path,condition_image_path"]
    for i in range(4):
        pixels = np.full((40, 40, 3), 128 if kind == "grey" else 0, np.uint8)
        if kind == "outlier":
            pixels[i] = 255
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{i}.png" if kind == "black" else f"{i}.png,")
    (tmp_path / "p.csv").write_text("\n".join(rows) + "\n")
    command = ["train.py", "--data", "p.csv", *SMALL, "--steps", 40, *flags, "--out", "run"]
    code, _, errors = run_script(command, tmp_path, ALONE)
    assert code == 0 or (code == 2 and "lower --lr" in errors), errors
    assert "Traceback" not in errors
    for name in CHECKPOINT:
        assert_finite(load_newest(tmp_path / "run", name))


# --------------------------------------------------------------------------------------------------
# From a text-to-image model of one's own; torch.compile; other systems; what the log says.


@pytest.mark.parametrize("conditioning", ["projection", "widen"])
def test_a_restorer_starts_from_a_text_to_image_run_unchanged(conditioning, photos_csv, tmp_path):
    flags = ["--data", photos_csv, *SMALL]
    first = ["--conditioning", "none", "--share_at_one", 0, "--steps", 30, "--out", "prior"]
    run("train.py", *flags, *first, cwd=tmp_path)
    second = ["--model", "prior", "--conditioning", conditioning, "--steps", 6, "--out", "tuned"]
    run("train.py", *flags, *second, cwd=tmp_path)

    name = str(tmp_path / "prior")
    args = train.parse_args(["--model", name, "--conditioning", conditioning])
    config = model.describe_model(name, conditioning)
    state = train.State(config, model.initial_restorer(name, config, seeded()), args)
    prior, _ = model.load_restorer(name)
    inputs = [torch.randn(2, 48, 8, 6, generator=seeded(i)) for i in range(2)]
    inputs.append(torch.tensor([70.0, 1000.0]))
    inputs += data.hash_prompts(["Remove the noise."] * 2)
    with torch.no_grad():
        assert torch.equal(prior(*inputs), state.module(*inputs))
    assert state.condition_norm() == 0
    assert prior.prediction == state.module.prediction == "velocity"

    log = read_log(tmp_path / "tuned")
    assert log[0]["step"] == 0
    assert log[-2]["condition_norm"] > 0
    assert log[-1]["val_loss"] > 0
    other = "widen" if conditioning == "projection" else "projection"
    wrong = ["--model", "tuned", "--conditioning", other, "--out", "x"]
    assert "already" in run("train.py", *wrong, cwd=tmp_path, status=2)
    run("model.py", "export", "tuned", "exported", cwd=tmp_path)


def test_compiled_training_is_the_same(photos_csv, tmp_path):
    flags = ["--data", photos_csv, "--steps", 3, *SMALL, "--workers", 0, "--lr", 1e-3]
    run("train.py", *flags, "--no-compile", "--out", "eager", cwd=tmp_path)
    run("train.py", *flags, "--compile", "--out", "compiled", cwd=tmp_path)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


def make_optimizer(compile):
    weights = []
    for n in (70_001, 300):
        weights.append(torch.nn.Parameter(torch.randn(n, generator=seeded(n)).bfloat16()))
    return weights, train.BF16AdamW([{"params": weights, "lr": 1e-3}], compile=compile)


def test_the_compiled_optimizer_is_the_same_and_is_compiled_once():
    eager, a = make_optimizer(compile=False)
    compiled, b = make_optimizer(compile=True)
    graphs = []
    for i in range(5):
        for p, q in zip(eager, compiled):
            p.grad = torch.randn(p.shape, generator=seeded(i)).bfloat16()
            q.grad = p.grad.clone()
        a.param_groups[0]["lr"] = 1e-3 / (i + 1)
        b.param_groups[0]["lr"] = 1e-3 / (i + 1)
        a.step(i + 1, dict.fromkeys(eager, i), 1 / (i + 1))
        b.step(i + 1, dict.fromkeys(compiled, i), 1 / (i + 1))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert len(set(graphs)) == 1
    for p, q in zip(eager, compiled):  # a compiler may fuse a product and a sum: 1 ulp of fp32
        first = train.join_fp32(p.data, a.state[p]["low"])
        second = train.join_fp32(q.data, b.state[q]["low"])
        assert (first - second).abs().max() <= 1e-6 * first.abs().max()


def test_all_files_import_without_what_only_unix_has(tmp_path):
    script = f"""
import signal, sys
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
del signal.SIGCHLD
sys.path.insert(0, {str(ROOT)!r})
import degrade, vae, model, data, evaluate, train
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=ALONE, check=True)


def test_workers_that_are_spawned(photos_csv, tmp_path):
    """As macOS and Windows start them: what a worker needs is pickled."""
    script = f"""
import sys
import torch
sys.path.insert(0, {str(ROOT)!r})
import train
if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    train.run_script(train.main)
"""
    (tmp_path / "spawning.py").write_text(script)
    flags = ["--data", photos_csv, *SMALL, "--steps", 2]
    command = [sys.executable, "spawning.py", *flags, "--workers", 1, "--out", "spawned"]
    subprocess.run(list(map(str, command)), cwd=tmp_path, env=ALONE, check=True)
    run("train.py", *flags, "--workers", 0, "--out", "none", cwd=tmp_path)
    assert_same_checkpoint(tmp_path / "none", tmp_path / "spawned")


def test_the_log_counts_what_it_says(alone):
    line = next(line for line in read_log(alone) if "loss" in line)
    files = [alone / "step_000020" / name for name in ("ema.safetensors", "config.json")]
    assert files[0].stat().st_mode == files[1].stat().st_mode
    assert line["step"] == 20
    assert len(line["loss_by_sigma"]) == train.BINS
    assert 0 <= line["data_wait"] <= 1
    assert line["skipped"] == 0
    assert line["condition_norm"] > 0
