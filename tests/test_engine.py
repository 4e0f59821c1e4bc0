"""What a long run meets: several processes, a cache, a curriculum, kill -9, a full disk, a text-to-image model to start from."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import endurance
import evaluate
import train
from conftest import ROOT
from model import PRESETS, build_restorer
from runner import run_script
from test_commands import SMALL, run
from test_train import seeded


def weights(folder, name="model"):
    return load_file(folder / f"{name}.safetensors")


def losses(folder):
    return [line["loss"] for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in line]


def torchrun(processes, *flags, cwd, status=0, **env):
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", *map(str, flags)], cwd=cwd,
                            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | env, timeout=600)
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + result.stderr


# with seed 0 and these photos some gradients are at the level of rounding, where AdamW makes whole steps of it
EIGHT = ["--batch_size", 8, "--resolution", 32, "--val_every", 50, "--save_every", 10, "--workers", 0, "--steps", 20, "--seed", 1]


@pytest.fixture(scope="module")
def alone(photos_csv, tmp_path_factory):
    """Twenty steps of eight images in one process."""
    folder = tmp_path_factory.mktemp("alone")
    run("train.py", "--data", photos_csv, *EIGHT, "--keep", 2, "--out", "run", cwd=folder)
    return folder / "run"


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_are_one(processes, alone, photos_csv, tmp_path):
    """The same steps, to rounding, and a checkpoint that one process can go on with."""
    output = torchrun(processes, ROOT / "train.py", "--data", photos_csv, *EIGHT, "--out", "run", cwd=tmp_path)
    assert output.count("model tiny") == 1 and f"{processes} x cpu" in output
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)
    for name in ("model", "ema", "optimizer"):
        a, b = weights(alone / "step_000020", name), weights(tmp_path / "run/step_000020", name)
        assert a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= 2e-3 * a[k].abs().max() + 1e-9 for k in a), name
    if processes == 2:
        run("train.py", "--resume", "run", "--steps", 24, cwd=tmp_path)
        assert (tmp_path / "run/latest").read_text() == "step_000024"


def test_processes_in_bf16_with_a_projection_save_and_go_on(photos_csv, tmp_path):
    """The projection stays fp32, without low bits, and with two processes it is the second one's."""
    flags = ["--data", photos_csv, *EIGHT, "--optimizer", "adamw_bf16", "--conditioning", "projection", "--steps", 4, "--val_every", 4]
    run("train.py", *flags, "--out", "alone", cwd=tmp_path)
    torchrun(2, ROOT / "train.py", *flags, "--out", "two", cwd=tmp_path)
    a, b = weights(tmp_path / "alone/step_000004", "optimizer"), weights(tmp_path / "two/step_000004", "optimizer")
    assert {name: (t.shape, t.dtype) for name, t in a.items()} == {name: (t.shape, t.dtype) for name, t in b.items()}
    assert "low.projection.weight" not in a and a["exp_avg.projection.weight"].dtype == torch.float32 and a["low.sana.proj_out.weight"].dtype == torch.int16
    run("train.py", "--resume", "two", "--steps", 5, cwd=tmp_path)


def test_a_killed_process_ends_the_job_and_torchrun_resumes_it(alone, photos_csv, tmp_path):
    """One of two processes is killed at its 15th step; the checkpoint of step 10 is whole, and the restarted job ends like one that was not."""
    (tmp_path / "killed.py").write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
step = train.train_step
def spoilt(state, batch):
    if state.step == 15 and train.RANK == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(state, batch)
train.train_step = spoilt
train.run_script(train.main)
""")
    torchrun(2, "--max_restarts=0", "killed.py", "--data", photos_csv, *EIGHT, "--out", "ended", cwd=tmp_path, status=1)
    assert (tmp_path / "ended/latest").read_text() == "step_000010"
    torchrun(2, "--max_restarts=1", "killed.py", "--data", photos_csv, *EIGHT, "--out", "restarted", cwd=tmp_path)
    a, b = weights(alone / "step_000020"), weights(tmp_path / "restarted/step_000020")
    assert all((a[k] - b[k]).abs().max() <= 2e-3 * a[k].abs().max() + 1e-9 for k in a)


def test_an_unreadable_image_of_one_process_ends_all_and_saves(photos, tmp_path):
    rows = [str(path) for path in sorted(photos.glob("*.png"))]
    (tmp_path / "cut.png").write_bytes((photos / "00.png").read_bytes()[:2000])
    (tmp_path / "pairs.csv").write_text("image_path\n" + "\n".join([*rows, "cut.png"]) + "\n")
    output = torchrun(2, ROOT / "train.py", "--data", "pairs.csv", *EIGHT, "--seed", 0, "--out", "run", cwd=tmp_path, status=1)
    assert "line 14" in output and (tmp_path / "run/latest").read_text() == "step_000001"


# ----------------------------------------------------------------------------------------------------------------
# The cache.

@pytest.mark.parametrize("kind", ["tiny", "pretrained"])
def test_training_from_a_cache_is_the_same_training(kind, photos_csv, pipeline_folder, tmp_path):
    """Crops, flips, degradations and captions included: the cached epochs are the run's own draws."""
    flags = ["--data", photos_csv, "--resolution", 32, "--seed", 3]
    steps = ["--steps", 9, "--batch_size", 2, "--lr", 1e-3, "--val_every", 100, "--save_every", 3]
    if kind == "pretrained":
        flags += ["--model", pipeline_folder]
    run("data.py", "cache", *flags, "--epochs", 2, "--out", "cache", cwd=tmp_path)
    run("train.py", *flags, *steps, "--out", "photos", cwd=tmp_path)
    run("train.py", *flags, *steps, "--out", "cached", "--cache", "cache", "--workers", 2, cwd=tmp_path)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "photos"), rel=1e-3)
    error = run("train.py", *flags, *steps, "--seed", 4, "--out", "x", "--cache", "cache", cwd=tmp_path, status=2)
    assert "--seed" in error and "cache" in error
    assert "--curriculum" in run("train.py", *flags, "--curriculum", "32:4", "--cache", "cache", cwd=tmp_path, status=2)
    # beyond the cached epochs the same draws come again, in another order
    run("train.py", "--resume", "cached", "--steps", 20, cwd=tmp_path)


def test_an_interrupted_cache_is_completed(photos_csv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "SHARD", 8)
    flags = ["data.py", "cache", "--data", str(photos_csv), "--resolution", "32", "--epochs", "3", "--workers", "0", "--out"]
    monkeypatch.setattr(sys, "argv", [*flags, str(tmp_path / "whole")])
    data.main()
    encode, calls = data.PixelAE.encode, []

    def stopping(self, pixels):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encode(self, pixels)
    monkeypatch.setattr(data.PixelAE, "encode", stopping)
    monkeypatch.setattr(sys, "argv", [*flags, str(tmp_path / "halved")])
    with pytest.raises(KeyboardInterrupt):
        data.main()
    made = sorted(path.name for path in (tmp_path / "halved").glob("[!.]*"))
    assert made == ["draws_00000.safetensors", "draws_00001.safetensors", "index.json"]
    args = train.parse_args(["--data", str(photos_csv), "--resolution", "32", "--cache", str(tmp_path / "halved")])
    expected = data.fingerprint(args, PRESETS["tiny"])
    with pytest.raises(data.UserError, match="not complete"):
        data.CachedDataset(args.cache, expected, 11)
    data.main()
    for path in (tmp_path / "whole").glob("*.safetensors"):
        a, b = (load_file(folder) for folder in (path, tmp_path / "halved" / path.name))
        assert all(torch.equal(a[k], b[k]) for k in a)
    cached, (drawn, _) = data.CachedDataset(args.cache, expected, 11), data.make_datasets(args)
    for n in (0, 7, 8, 32):
        assert cached[n]["caption"] == drawn[n]["caption"]
        assert torch.equal(cached[n]["clean"], encode(data.PixelAE(2), drawn[n]["clean"][None])[0].half().float())
    later = [sorted(cached[n]["clean"].sum().item() for n in range(start, start + 11)) for start in (0, 33)]
    assert later[0] == later[1] and [cached[n]["caption"] for n in range(11)] != [cached[n + 33]["caption"] for n in range(11)]
    (tmp_path / "halved/draws_00001.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(data.UserError, match="draws_00001"):
        data.CachedDataset(args.cache, expected, 11)


# ----------------------------------------------------------------------------------------------------------------
# Stages, kills, full disks.

def test_a_curriculum_changes_the_crop_and_resumes_across_the_change(photos_csv, tmp_path):
    flags = ["--data", photos_csv, "--curriculum", "32:7,48:5", "--batch_size", 2, "--val_every", 50, "--save_every", 4, "--keep", 9, "--ema_every", 2]
    run("train.py", *flags, "--out", "whole", cwd=tmp_path)
    assert "step_000012" == (tmp_path / "whole/latest").read_text()
    for at, workers in ((4, 2), (8, 0)):
        again = tmp_path / f"again{at}"
        again.mkdir()
        (again / "latest").write_text(f"step_{at:06d}")
        os.symlink(tmp_path / f"whole/step_{at:06d}", again / f"step_{at:06d}")
        (again / "log.jsonl").write_text((tmp_path / "whole/log.jsonl").read_text())
        run("train.py", "--resume", again, "--workers", workers, cwd=tmp_path)
        for name in ("model", "ema", "optimizer"):
            a, b = weights(tmp_path / "whole/step_000012", name), weights(again / "step_000012", name)
            assert all(torch.equal(a[k], b[k]) for k in a), name
    args = train.parse_args([str(word) for word in flags])
    train_set, _ = train.make_datasets(args, train.curriculum(args))
    assert (train_set[13]["clean"].shape[1], train_set[14]["clean"].shape[1]) == (32, 48) and args.steps == 12
    assert "512:8000" in run("train.py", "--curriculum", "32:7,x", cwd=tmp_path, status=2)


def test_kill_9_at_any_instant_leaves_whole_files(photos, photos_csv, alone, tmp_path):
    """A few of each; tests/stress.py does a thousand."""
    for name in ("training", "caching", "pairs", "export", "evaluation"):
        (tmp_path / name).mkdir()
    assert len(endurance.kill_training(photos_csv, tmp_path / "training", 12)) > 12
    assert endurance.kill_caching(photos_csv, tmp_path / "caching", 6)[0] == endurance.kill_pairs(photos, tmp_path / "pairs", 6)[0] == 6
    endurance.kill_export(alone, tmp_path / "export", 3), endurance.kill_evaluation(alone, photos, tmp_path / "evaluation", 6)


def wait_for(path):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_runs_do_not_share_a_folder(photos_csv, tmp_path):
    flags = ["--data", photos_csv, *SMALL, "--steps", 100000, "--save_every", 1, "--val_every", 100000, "--out", tmp_path / "run"]
    pid = endurance.start(["train.py", *flags], tmp_path)
    wait_for(tmp_path / "run/latest")
    for command in (["train.py", "--resume", "run"], ["train.py", *flags, "--overwrite"], ["data.py", "cache", "--data", photos_csv, "--out", "run"]):
        assert "another program" in run(*command, cwd=tmp_path, status=2)
    os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)
    latest = (tmp_path / "run/latest").read_text()
    run("train.py", "--resume", "run", "--steps", int(latest[5:]) + 1, cwd=tmp_path)


def test_a_killed_worker_ends_the_run_with_its_state_saved(photos_csv, tmp_path):
    """As when memory runs out: the system kills what takes most."""
    pid = endurance.start(["train.py", "--data", photos_csv, *SMALL, "--steps", 100000, "--save_every", 100000, "--workers", 2, "--out", tmp_path / "run"], tmp_path)
    wait_for(tmp_path / "run/log.jsonl")
    time.sleep(2)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    output = (tmp_path / "output").read_text()
    assert os.WEXITSTATUS(status) == 2 and "error: --workers 2" in output and "Traceback" not in output, output
    state = load_file(tmp_path / "run" / (tmp_path / "run/latest").read_text() / "optimizer.safetensors")
    assert any(t.abs().sum() > 0 for t in state.values())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), MemoryError()])
def test_out_of_memory_saves_what_there_was(error, photos_csv, tmp_path, monkeypatch):
    loss, calls = train.flow_loss, []

    def spoilt(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise error
        return loss(*arguments)
    monkeypatch.setattr(train, "flow_loss", spoilt)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(photos_csv), *SMALL, "--workers", "0", "--steps", "9", "--out", "run"])
    with pytest.raises(data.UserError, match="out of memory.*README"):
        train.main()
    assert (tmp_path / "run/latest").read_text() == "step_000003"
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "run"])
    train.main()
    assert (tmp_path / "run/latest").read_text() == "step_000009"


def test_a_validation_that_fails_saves_first(photos_csv, tmp_path, monkeypatch):
    validate = train.validate

    def spoilt(state, *rest):
        if state.step == 4:
            raise data.UserError("a held-out picture is gone")
        return validate(state, *rest)
    monkeypatch.setattr(train, "validate", spoilt), monkeypatch.chdir(tmp_path)
    flags = ["train.py", "--data", str(photos_csv), *SMALL, "--workers", "0", "--steps", "9", "--val_every", "4", "--save_every", "100", "--out", "run"]
    monkeypatch.setattr(sys, "argv", flags)
    with pytest.raises(data.UserError, match="is gone"):
        train.main()
    assert (tmp_path / "run/latest").read_text() == "step_000004"


def test_a_row_that_cannot_be_drawn_is_not_held_out(photos, tmp_path):
    """A picture below the crop, a row without the condition that --degradation paired asks for, one picture for all draws."""
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    rows = [f"{path},{path}" for path in sorted(photos.glob("*.png"))] + ["small.png,small.png", f"{photos / '00.png'},"] * 4
    (tmp_path / "p.csv").write_text("image_path,condition_image_path\n" + "\n".join(rows))
    for seed in range(8):
        args = train.parse_args(["--data", str(tmp_path / "p.csv"), "--skip_bad", "--resolution", "32", "--degradation", "paired", "--seed", str(seed)])
        train_set, val_set = data.make_datasets(args)
        assert all(row < 12 for row in val_set.rows) and val_set.crop == 80 and len(val_set) == 2
        assert not any(isinstance(train_set[n], data.UserError) for n in range(100))
    one = data.PairedDataset(data.CsvPairs(tmp_path / "p.csv"), 32, rows=[3, 12], skip_bad=True)
    assert {one[n]["clean"].shape for n in range(60)} == {(3, 32, 32)}


def test_data_that_changes_under_a_run_is_named(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (tmp_path / "photos.csv").write_text("image_path\n" + "".join(f"photos/{i:02d}.png\n" for i in range(12)))
    flags = ["--data", "photos.csv", *SMALL, "--out", "run"]
    run("train.py", *flags, "--steps", 3, cwd=tmp_path)
    for i in range(12):
        (folder / f"{i:02d}.png").write_bytes(b"no longer a picture")
    assert "photos.csv, line" in run("train.py", "--resume", "run", "--steps", 6, cwd=tmp_path, status=2)
    shutil.copytree(photos, folder, dirs_exist_ok=True)
    with open(tmp_path / "photos.csv", "a") as file:
        file.write("photos/00.png\n")
    assert "not what it was" in run("train.py", "--resume", "run", "--steps", 6, cwd=tmp_path, status=2)
    run("train.py", "--resume", "run", "--steps", 6, "--data", "photos.csv", cwd=tmp_path)
    run("train.py", "--resume", "run", "--steps", 8, cwd=tmp_path)
    (folder / "03.png").unlink()  # the rows are fewer, although the file that lists them is the same
    assert "not what it was" in run("train.py", "--resume", "run", "--steps", 9, "--skip_bad", cwd=tmp_path, status=2)


def test_skip_bad_counts_and_goes_on(photos, tmp_path):
    """One damaged and one absent picture among twelve: training, caching, making pairs, measuring."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "05.png").write_bytes((photos / "05.png").read_bytes()[:900])
    (tmp_path / "photos.csv").write_text("image_path\n" + "".join(f"photos/{i:02d}.png\n" for i in range(13)))
    for command in (["train.py", "--data", "photos.csv", *SMALL, "--steps", 12], ["data.py", "cache", "--data", "photos.csv", "--resolution", 32, "--out", "cache"],
                    ["data.py", "pairs", "photos", "--out", "pairs"], ["evaluate.py", "--data", "photos.csv", "--compare", "photos", "--metrics", "psnr"]):
        error = run(*command, cwd=tmp_path, status=2)
        assert ("05.png" if "pairs" in command else "12.png") in error
        if "cache" in command:
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        output = run(*command, "--skip_bad", *["--workers", 2] * ("train.py" in command), cwd=tmp_path)
        assert "left out: " in output and "05.png" in output
    lines = [json.loads(line) for line in (tmp_path / "out/photos/log.jsonl").read_text().splitlines()]
    args = train.parse_args(["--data", str(tmp_path / "photos.csv"), "--skip_bad", "--resolution", "32"])
    train_set, val_set = data.make_datasets(args)
    bad = sum(train_set.plan(n)[0] == 5 for n in range(24))  # each is passed over once; two of them in a row do not come in these epochs
    assert [line["bad_images"] for line in lines if "bad_images" in line][-1] == bad > 0 and 5 not in val_set.rows
    n = next(n for n in range(24) if train_set.plan(n)[0] == 5)
    assert train_set[n]["bad"] == 1 and train_set[n]["caption"] == train_set.plan(n + 1)[2]
    assert len((tmp_path / "pairs/pairs.csv").read_text().splitlines()) == 12
    assert json.loads((tmp_path / "out/evaluation/scores.json").read_text())["count"] == 11


@pytest.mark.parametrize("kind, flags", [("black", []), ("grey", ["--degradations", "jpeg"]), ("outlier", []), ("black", ["--lr", 1]), ("outlier", ["--lr", 1, "--clip", 1000])])
def test_senseless_pictures_and_rates_end_in_finite_weights(kind, flags, tmp_path):
    """All black, all grey, one white row in black, and learning rates that are too high: the run survives, or stops with advice and its state."""
    for i in range(4):
        pixels = np.full((40, 40, 3), 128 if kind == "grey" else 0, np.uint8)
        pixels[i] = 255 if kind == "outlier" else pixels[i]
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "p.csv").write_text("image_path,condition_image_path\n" + "".join(f"{i}.png,{i}.png\n" if kind == "black" else f"{i}.png,\n" for i in range(4)))
    code, output, errors = run_script(["train.py", "--data", "p.csv", *SMALL, "--steps", 40, *flags, "--out", "run"], tmp_path, os.environ | {"OMP_NUM_THREADS": "1"})
    assert code == 0 or code == 2 and "lower --lr" in errors, errors
    assert "Traceback" not in errors
    for name in ("model", "ema", "optimizer"):
        assert all(t.float().isfinite().all() for t in load_file(tmp_path / "run" / (tmp_path / "run/latest").read_text() / f"{name}.safetensors").values())


def test_a_full_disk_keeps_the_checkpoint_before(photos_csv, tmp_path):
    """A limit on the size of files stands in for the disk."""
    run("train.py", "--data", photos_csv, "--steps", 40, *SMALL, "--out", "run", "--save_every", 20, cwd=tmp_path)
    size = (tmp_path / "run/step_000040/ema.safetensors").stat().st_size
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    result = subprocess.run([sys.executable, ROOT / "train.py", "--resume", "run", "--steps", "60"], cwd=tmp_path, capture_output=True, text=True,
                            preexec_fn=limit, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 2 and "step_000040 is whole" in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert (tmp_path / "run/latest").read_text() == "step_000040" and not list((tmp_path / "run").glob(".step*"))
    run("train.py", "--resume", "run", "--steps", 60, cwd=tmp_path)


# ----------------------------------------------------------------------------------------------------------------
# From a text-to-image model of one's own; torch.compile; what the log says.

@pytest.mark.parametrize("conditioning", ["projection", "widen"])
def test_a_restorer_starts_from_a_text_to_image_run_unchanged(conditioning, photos_csv, tmp_path):
    flags = ["--data", photos_csv, *SMALL]
    run("train.py", *flags, "--conditioning", "none", "--steps", 30, "--out", "prior", "--share_at_one", 0, cwd=tmp_path)
    run("train.py", *flags, "--model", "prior", "--conditioning", conditioning, "--steps", 6, "--out", "tuned", cwd=tmp_path)
    args = train.parse_args(["--model", str(tmp_path / "prior"), "--conditioning", conditioning])
    state = train.State(data.describe_model(args.model, conditioning), data.PixelAE(2), data.Prompts(), args)
    prior, _ = evaluate.load_restorer(tmp_path / "prior")
    x, condition, timestep = torch.randn(2, 12, 8, 6, generator=seeded()), torch.randn(2, 12, 8, 6, generator=seeded(1)), torch.tensor([70.0, 1000.0])
    with torch.no_grad():
        text = data.hash_prompts(["Remove the noise."] * 2)
        assert torch.equal(prior(x, condition, timestep, *text), state.restorer(x, condition, timestep, *text))
    assert state.condition_norm() == 0 and prior.prediction == state.restorer.prediction == "velocity"
    log = [json.loads(line) for line in (tmp_path / "tuned/log.jsonl").read_text().splitlines()]
    assert log[0]["step"] == 0 and log[-2]["condition_norm"] > 0 and log[-1]["val_loss"] > 0
    other = {"projection": "widen", "widen": "projection"}[conditioning]
    assert "already" in run("train.py", "--model", "tuned", "--conditioning", other, "--out", "x", cwd=tmp_path, status=2)
    run("model.py", "export", "tuned", "exported", cwd=tmp_path)


def test_compiled_training_is_the_same(photos_csv, tmp_path):
    flags = ["--data", photos_csv, "--steps", 3, *SMALL, "--workers", 0, "--lr", 1e-3]
    for name, more in (("eager", ["--no-compile"]), ("compiled", ["--compile"])):
        run("train.py", *flags, *more, "--out", name, cwd=tmp_path)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


def test_the_compiled_optimizer_is_the_same_and_is_compiled_once():
    counts = torch._dynamo.utils.counters
    ours, compiled = ([torch.nn.Parameter(torch.randn(n, generator=seeded(n)).bfloat16()) for n in (70_001, 300)] for _ in range(2))
    a, b = train.BF16AdamW([{"params": ours, "lr": 1e-3}]), train.BF16AdamW([{"params": compiled, "lr": 1e-3}], compile=True)
    graphs = []
    for i in range(5):
        for p, q in zip(ours, compiled):
            p.grad = torch.randn(p.shape, generator=seeded(i)).bfloat16()
            q.grad = p.grad.clone()
        a.param_groups[0]["lr"] = b.param_groups[0]["lr"] = 1e-3 / (i + 1)
        a.step(i + 1, dict.fromkeys(ours, i), 1 / (i + 1)), b.step(i + 1, dict.fromkeys(compiled, i), 1 / (i + 1))
        graphs.append(counts["stats"]["unique_graphs"])
    assert graphs[0] > 0 and len(set(graphs)) == 1
    for p, q in zip(ours, compiled):  # a compiler may fuse a product and a sum: 1 ulp of fp32
        exact = [train.join_fp32(w.data, o.state[w]["low"]) for w, o in ((p, a), (q, b))]
        assert (exact[0] - exact[1]).abs().max() <= 1e-6 * exact[0].abs().max()


def test_the_log_counts_what_it_says(alone):
    lines = [json.loads(line) for line in (alone / "log.jsonl").read_text().splitlines()]
    line = next(line for line in lines if "loss" in line)
    assert (alone / "step_000020/ema.safetensors").stat().st_mode == (alone / "step_000020/config.json").stat().st_mode
    assert line["step"] == 20 and len(line["loss_by_sigma"]) == evaluate.BINS and 0 <= line["data_wait"] <= 1 and line["skipped"] == 0
    assert 0.1 < line["memory_gb"] < 8 and line["condition_norm"] > 0
    # matrix products and convolutions of a forward pass: two operations a weight and position
    config, tokens, text = PRESETS["tiny"], 24 * 24, 32
    restorer = build_restorer(config)
    c = restorer.sana.config
    count = 0
    for name, module in restorer.named_modules():
        if isinstance(module, torch.nn.Linear):
            rows = text if "caption" in name or ".attn2.to_k" in name or ".attn2.to_v" in name else 1 if "time_embed" in name else tokens
            count += 2 * rows * module.weight.numel()
        elif isinstance(module, torch.nn.Conv2d):
            count += 2 * tokens * module.weight.numel()
    width = c["num_attention_heads"] * c["attention_head_dim"]
    attention = c["num_layers"] * (4 * tokens * width * (c["attention_head_dim"]) + 4 * tokens * text * width)
    assert evaluate.training_flops(config, (24, 24), text) == pytest.approx(3 * (count + attention), rel=0.03)
