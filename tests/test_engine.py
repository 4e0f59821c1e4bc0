"""What a long run meets: several processes, a cache, lack of memory, a full disk, bad pictures."""

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
from model import hash_prompts
from runner import run_script
from test_commands import read_log
from test_train import SMALL, assert_finite, assert_same_checkpoint, call, load_newest
from test_train import refused, seeded

ALONE = os.environ | {"OMP_NUM_THREADS": "1"}
CHECKPOINT = "model", "ema", "optimizer"
# with seed 0 and these photos some gradients are at the level of rounding, where AdamW makes whole
# steps of it
EIGHT = ["--batch_size", 8, "--resolution", 32, "--val_every", 50, "--save_every", 5]
EIGHT += ["--steps", 10, "--seed", 1, "--device", "cpu"]


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
    """Run a script as so many processes, with what torchrun would tell them, but without it.

    -> what each prints.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}

    def run_rank(rank):
        return run_script(command, cwd, ALONE | env | {"RANK": str(rank)})

    printed = []
    with ThreadPoolExecutor(count) as pool:
        for code, output, errors in pool.map(run_rank, range(count)):
            assert code == status, output + errors
            printed.append(output + errors)
    return printed


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


def distance(run_folder, other):
    """How far apart the newest weights of two runs are, all together, as a share of their size.

    (AdamW makes whole steps of gradients at the level of rounding, so single ones may differ.)
    """
    a, b = load_newest(run_folder), load_newest(other)
    difference = sum((a[key] - b[key]).square().sum() for key in a)
    return (difference / sum(tensor.square().sum() for tensor in a.values())).sqrt()


@pytest.fixture(scope="module")
def alone(photos_csv, tmp_path_factory):
    """Ten steps of eight images in one process."""
    folder = tmp_path_factory.mktemp("alone")
    call("train.py", "--data", photos_csv, *EIGHT, "--out", "run", cwd=folder)
    return folder / "run"


def test_the_log_counts_what_it_says(alone):
    line = next(line for line in read_log(alone) if "loss" in line)
    files = [alone / "step_000010" / name for name in ("ema.safetensors", "config.json")]
    assert files[0].stat().st_mode == files[1].stat().st_mode
    assert line["step"] == 10
    assert 0 <= line["data_wait"] <= 1
    assert line["skipped"] == 0
    assert line["images_per_second"] > 0


# --------------------------------------------------------------------------------------------------
# Several processes: the same steps as one, to rounding.


@pytest.mark.parametrize("count, more", [(2, ["--accumulate", 2, "--checkpointing"]), (4, [])])
def test_several_processes_are_one(count, more, alone, photos_csv, tmp_path):
    """Also if they compute a batch in parts; also if they are more than some weights have rows."""
    flags = ["--data", photos_csv, *EIGHT, *more, "--out", "run"]
    first, *others = share(count, "train.py", *flags, cwd=tmp_path)
    assert f"model tiny, 0.74 M parameters, on {count} x cpu" in first
    assert not any("model tiny" in output for output in others)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)
    assert_close_checkpoint(alone, tmp_path / "run")


def test_processes_in_bf16_with_a_projection_save_and_go_on(photos_csv, tmp_path):
    """The projection stays fp32, without low bits.

    After a signal to the second of two they go on as if never stopped, bit for bit.
    """
    flags = ["--data", photos_csv, *EIGHT, "--optimizer", "adamw_bf16", "--steps", 5]
    flags += ["--conditioning", "projection"]
    call("train.py", *flags, "--out", "one", cwd=tmp_path)
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
    call("train.py", "--resume", "two", "--steps", 6, cwd=tmp_path)
    assert (tmp_path / "two/latest").read_text() == "step_000006"


def test_a_signal_to_one_process_ends_all_and_any_number_goes_on(alone, photos_csv, tmp_path):
    """One process to step 3, two to step 7, one to the end: as one that was not disturbed."""
    call("train.py", "--data", photos_csv, *EIGHT, "--out", "run", cwd=tmp_path, stop=3)
    signalled = ROOT / "tests/signalled.py", "--resume", "run"
    output = share(2, *signalled, cwd=tmp_path, status=143, SIGNAL="TERM 6 1")
    assert "--resume run goes on" in output[0]
    assert "goes on" not in output[1]
    assert (tmp_path / "run/latest").read_text() == "step_000007"
    call("train.py", "--resume", "run", cwd=tmp_path)
    assert_close_checkpoint(alone, tmp_path / "run")


def test_a_killed_process_ends_the_job_and_torchrun_resumes_it(alone, photos_csv, tmp_path):
    """The second of two processes is killed at step 6."""
    words = ["--max_restarts=1", ROOT / "tests/signalled.py", "--data", photos_csv, *EIGHT]
    torchrun(2, *words, "--out", "run", "--resume", cwd=tmp_path, SIGNAL="KILL 6 1")
    assert_close_checkpoint(alone, tmp_path / "run")
    lines = [line for line in read_log(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in lines] == [10]


# --------------------------------------------------------------------------------------------------
# The cache.


@pytest.mark.parametrize("kind", ["tiny", "pretrained"])
def test_training_from_a_cache_is_the_same_training(kind, photos_csv, pipeline_folder, tmp_path):
    """Crops, flips, degradations and captions included: it holds the run's own draws."""
    flags = ["--data", photos_csv, "--resolution", 32, "--seed", 3, "--device", "cpu"]
    if kind == "pretrained":
        flags += ["--model", pipeline_folder]
    call("data.py", "cache", *flags, "--epochs", 2, "--out", "cache", cwd=tmp_path)
    flags += ["--steps", 9, "--batch_size", 2, "--lr", 1e-3, "--val_every", 100]
    cached = ["--cache", "cache"]
    call("train.py", *flags, "--out", "photos", cwd=tmp_path)
    call("train.py", *flags, "--out", "cached", *cached, "--workers", 2, cwd=tmp_path)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "photos"), rel=1e-3)
    if kind == "pretrained":
        share(2, "train.py", *flags, "--out", "two", *cached, cwd=tmp_path)
        assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "cached"), rel=1e-5)
    wrong = [*flags, *cached, "--seed", 4, "--out", "x"]
    assert "made with --seed 3" in refused("train.py", *wrong, cwd=tmp_path)
    # beyond the cached epochs the same draws come again, in another order
    call("train.py", "--resume", "cached", "--steps", 14, cwd=tmp_path)


def test_an_interrupted_cache_is_completed(photos_csv, tmp_path, monkeypatch):
    flags = ["cache", "--data", photos_csv, "--resolution", 32, "--epochs", 2, "--device", "cpu"]
    call("data.py", *flags, "--out", "whole", cwd=tmp_path)
    with monkeypatch.context() as patch:
        encode = model.PixelAE.encode
        calls = []

        def stopping(self, pixels):
            calls.append(1)
            if len(calls) == 6:  # of the third draw
                raise KeyboardInterrupt
            return encode(self, pixels)

        patch.setattr(model.PixelAE, "encode", stopping)
        with pytest.raises(KeyboardInterrupt):
            call("data.py", *flags, "--out", "halved", cwd=tmp_path)
    halved = tmp_path / "halved"
    files = [path for path in halved.rglob("*") if path.is_file()]
    assert sorted(files) == [data.draw_path(halved, n) for n in range(2)] + [halved / "index.json"]
    training = ["--data", photos_csv, *SMALL, "--steps", 2, "--cache", "halved"]
    assert "not complete (draw 2)" in refused("train.py", *training, cwd=tmp_path)
    assert not (tmp_path / "out").exists()
    call("data.py", *flags, "--out", "halved", cwd=tmp_path)
    for n in range(22):
        a = load_file(data.draw_path(tmp_path / "whole", n))
        b = load_file(data.draw_path(halved, n))
        assert all(torch.equal(a[key], b[key]) for key in a)
    data.draw_path(halved, 8).write_bytes(b"x" * 100)
    line = refused("train.py", *training, "--steps", 20, cwd=tmp_path)
    assert "0000008.safetensors" in line


# --------------------------------------------------------------------------------------------------
# What fails on the way.


@pytest.mark.parametrize(
    "error, status, said",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), 2, "--accumulate"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: 9 bytes."), 2, "out of memory"),
        (MemoryError(), 2, "out of memory"),
        (AssertionError("a mistake"), 1, "a mistake"),
    ],
)
def test_what_fails_within_a_step_leaves_the_last_checkpoint(
    error, status, said, photos_csv, tmp_path, monkeypatch, capsys
):
    """Half an update is not saved. Where a mistake of the program was, its traceback says."""
    update = train.State.update

    def spoilt(state, scale):
        if state.step == 4:
            raise error
        update(state, scale)

    flags = ["--data", photos_csv, *SMALL, "--steps", 5, "--save_every", 3, "--out", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(train.State, "update", spoilt)
        if status == 2:
            with pytest.raises(SystemExit):
                degrade.run_script(lambda: call("train.py", *flags, cwd=tmp_path))
            line = capsys.readouterr().err.splitlines()[-1]
            assert line.startswith("error: out of memory") and said in line
        else:
            with pytest.raises(AssertionError, match=said):
                call("train.py", *flags, cwd=tmp_path)
    assert (tmp_path / "run/latest").read_text() == "step_000003"
    call("train.py", "--resume", "run", cwd=tmp_path)
    assert (tmp_path / "run/latest").read_text() == "step_000005"


def test_a_full_disk_keeps_the_checkpoint_before(photos_csv, tmp_path):
    """A limit on the size of files stands in for the disk."""
    flags = ["--data", photos_csv, *SMALL, "--steps", 4, "--out", "run"]
    call("train.py", *flags, cwd=tmp_path)
    size = (tmp_path / "run/step_000004/ema.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        line = refused("train.py", "--resume", "run", "--steps", 6, cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot write checkpoint run/step_000006" in line
    assert (tmp_path / "run/latest").read_text() == "step_000004"
    assert not list((tmp_path / "run").glob(".step*"))
    call("train.py", "--resume", "run", "--steps", 6, cwd=tmp_path)


@pytest.fixture
def with_a_bad_row(photos, tmp_path):
    """Flags of a training, in tmp_path, that meets a damaged picture in its second step."""
    rows = [str(path) for path in sorted(photos.glob("*.png"))]
    (tmp_path / "cut.png").write_bytes((photos / "00.png").read_bytes()[:2000])
    (tmp_path / "pairs.csv").write_text("\n".join(["image_path", *rows, "cut.png"]) + "\n")
    source = data.CsvPairs(tmp_path / "pairs.csv")
    for seed in range(100):
        train_set = data.PairedDataset(source, 32, rows=training_rows(source), seed=seed)
        if 12 in [train_set.plan(n).row for n in range(8, 12)]:
            break
    return ["--data", "pairs.csv", *EIGHT, "--seed", seed, "--out", "run"]


def training_rows(source):
    """Return the rows that are trained on. Here each is a unit of its own."""
    _, held_out = data.hold_out(source)
    return sorted(set(range(len(source))) - set(held_out))


def test_a_damaged_picture_of_one_process_ends_all(with_a_bad_row, tmp_path):
    """It is named, and the last checkpoint is whole."""
    words = [ROOT / "train.py", *with_a_bad_row, "--save_every", 1]
    output = torchrun(2, *words, cwd=tmp_path, status=1)
    assert "error: pairs.csv, line 14" in output
    assert (tmp_path / "run/latest").read_text() == "step_000001"
    for name in CHECKPOINT:
        assert_finite(load_newest(tmp_path / "run", name))


SENSELESS = [
    ("black", []),
    ("grey", ["--degradations", "jpeg"]),
    ("outlier", ["--lr", 1, "--clip", 0]),
]


@pytest.mark.parametrize("kind, flags", SENSELESS)
def test_senseless_pictures_and_rates_end_in_finite_weights(kind, flags, tmp_path):
    """All black, all grey, one white row in black, and a learning rate that is too high.

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
    flags = ["--data", "p.csv", *SMALL, "--steps", 30, *flags, "--out", "run"]
    try:
        call("train.py", *flags, cwd=tmp_path)
    except degrade.UserError as error:
        assert "lower --lr" in str(error)
    for name in CHECKPOINT:
        assert_finite(load_newest(tmp_path / "run", name))


# --------------------------------------------------------------------------------------------------
# From a text-to-image model of one's own; other systems.


@pytest.mark.parametrize("conditioning", ["projection", "widen"])
def test_a_restorer_starts_from_a_text_to_image_run_unchanged(conditioning, photos_csv, tmp_path):
    flags = ["--data", photos_csv, *SMALL]
    first = ["--conditioning", "none", "--share_at_one", 0, "--steps", 9, "--out", "prior"]
    call("train.py", *flags, *first, cwd=tmp_path)
    second = ["--model", "prior", "--conditioning", conditioning, "--steps", 4, "--out", "tuned"]
    call("train.py", *flags, *second, cwd=tmp_path)

    name = str(tmp_path / "prior")
    config = model.describe_model(name, "restorer", conditioning)
    ours = model.initial_restorer(name, config, seeded())
    prior, _ = model.load_restorer(name)
    inputs = [torch.randn(2, 48, 8, 6, generator=seeded(i)) for i in range(2)]
    inputs.append(torch.tensor([70.0, 1000.0]))
    inputs += hash_prompts(["Remove the noise."] * 2)
    with torch.no_grad():
        assert torch.equal(prior(*inputs), ours(*inputs))
    assert prior.prediction == ours.prediction == "velocity"

    log = read_log(tmp_path / "tuned")
    assert log[0]["step"] == 0
    assert log[-1]["restored_psnr"] > 0
    other = "widen" if conditioning == "projection" else "projection"
    wrong = ["--model", "tuned", "--conditioning", other, "--out", "x"]
    assert "already" in refused("train.py", *wrong, cwd=tmp_path)
    call("model.py", "export", "tuned", "exported", cwd=tmp_path)


def test_all_files_import_without_what_only_unix_has(tmp_path):
    script = f"""
import signal, sys
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
del signal.SIGCHLD, signal.SIGHUP
sys.path.insert(0, {str(ROOT)!r})
import degrade, vae, model, data, evaluate, train
"""
    (tmp_path / "importing.py").write_text(script)
    code, _, errors = run_script([tmp_path / "importing.py"], tmp_path, ALONE)
    assert code == 0, errors


def test_a_file_system_without_links_gets_copies(alone, photos_csv, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    shutil.copytree(alone, tmp_path / "before")
    flags = ["--data", photos_csv, *SMALL, "--steps", 2, "--model", "before", "--lora", 2]
    call("train.py", *flags, "--out", "run", cwd=tmp_path)
    shutil.rmtree(tmp_path / "before")
    ours = load_file(tmp_path / "run/base/ema.safetensors")
    theirs = load_newest(alone, "ema")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    model.load_restorer(tmp_path / "run")
