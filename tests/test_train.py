"""The optimizer against torch's, and the parts of the training loop that no command shows."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import data
import model
import train
from conftest import ROOT
from degrade import UserError
from model import Sana
from pipeline import SANA, randomize
from test_commands import SMALL, read_log, run
from train import BF16AdamW, join_fp32, round_stochastically, split_fp32


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def train_here(monkeypatch, *flags):
    """Run train.py's main() in this process, where its functions can be replaced."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    handlers = {}
    for number in data.SIGNALS:
        handlers[number] = signal.getsignal(number)
    try:
        train.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train_until(step, *flags, cwd, threads=1):
    """Run train.py with a SIGTERM in that step (from 1), as whose end it saves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGNAL", f"TERM {step - 1} 0")
        run(ROOT / "tests/signalled.py", *flags, cwd=cwd, status=143, threads=threads)


def start_training(*flags, cwd):
    """Start train.py in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, flags)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def wait_until(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def load_newest(run_folder, name="model"):
    latest = (run_folder / "latest").read_text()
    return load_file(run_folder / latest / f"{name}.safetensors")


def assert_same_checkpoint(run_folder, other):
    """The newest checkpoints of two runs are equal, bit for bit."""
    assert (run_folder / "latest").read_text() == (other / "latest").read_text()
    for name in ("model", "ema", "optimizer"):
        a = load_newest(run_folder, name)
        b = load_newest(other, name)
        assert a.keys() == b.keys()
        different = [key for key in a if not torch.equal(a[key], b[key])]
        assert not different, (name, different)


def assert_finite(tensors):
    assert all(t.float().isfinite().all() for t in tensors.values())


# --------------------------------------------------------------------------------------------------
# The optimizer.


def test_split_weights_lose_nothing():
    """All exponents, ties between two bf16 neighbours, zeros, the largest, infinity."""
    limits = -(2**31), 2**31 - 1
    bits = torch.randint(*limits, (1_000_000,), generator=seeded(), dtype=torch.int64)
    ties = (bits >> 16 << 16) + 0x8000
    special = torch.tensor([0, -(2**31), 0x7F7FFFFF, 0x7F800000])
    weights = torch.cat([bits, ties, special]).to(torch.int32).view(torch.float32)
    weights = weights[~weights.isnan()]
    high, low = split_fp32(weights)
    assert torch.equal(join_fp32(high, low), weights)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    normal = weights.abs().clamp(max=3e38) == weights.abs()
    nearest = (weights.bfloat16().double() - weights.double()).abs()[normal]
    assert torch.equal((high.double() - weights.double()).abs()[normal], nearest)


def test_stochastic_rounding_has_the_mean_and_never_skips_a_neighbour():
    numbers = torch.tensor([1.0, 1.0 + 1 / 512, -1.0 - 3 / 512, 3e-5])
    x = numbers[:, None].expand(4, 40_000).contiguous()
    rounded = round_stochastically(x, torch.tensor([1, 2], dtype=torch.int32)).float()
    assert (rounded[0] == 1).all()
    assert all(len(row.unique()) <= 2 for row in rounded)
    # in units of the gap between neighbours, at most; 1 / sqrt(40,000) = 0.005
    error = (rounded - x).mean(1) / (x.abs().mean(1) / 128)
    assert error.abs().max() < 0.015


def test_rounding_is_fair_and_unrelated_between_neighbours_and_seeds():
    """Half way between two neighbours: up or down, as often.

    2^17 choices, all correlations below five standard deviations.
    """
    x = torch.full((1 << 17,), 1 + 1 / 256)
    ups = []
    for i in range(8):
        seed = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, generator=seeded(i))
        ups.append((round_stochastically(x, seed) > 1) * 2.0 - 1)
    ups = torch.stack(ups)
    ups = torch.cat([ups, ups.roll(1, 1), ups.roll(2, 1), ups.roll(64, 1)])
    correlation = ups @ ups.T / len(x) - torch.eye(len(ups))
    assert correlation.abs().max() < 5 / len(x) ** 0.5
    assert ups.mean(1).abs().max() < 5 / len(x) ** 0.5


def test_the_chance_of_rounding_is_unrelated_between_neighbours_and_seeds():
    """What is half way between two bf16 goes up or down like a coin.

    Correlations of 2^16 throws are below five standard deviations.
    """
    x = torch.full((1 << 16,), 1 + 1 / 256)
    seeds = torch.randint(-(2**31), 2**31, (4, 2), dtype=torch.int32, generator=seeded())
    coins = torch.stack([(round_stochastically(x, seed).float() > 1) * 2.0 - 1 for seed in seeds])
    rows = torch.cat([coins.roll(shift, 1) for shift in (0, 1, 2, 3, 64, 4096)])
    correlation = rows @ rows.T / x.numel() - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / 256
    assert coins.mean(1).abs().max() < 5 / 256


@pytest.mark.parametrize("weight_decay, shape", [(0.0, (70_001,)), (0.1, (33, 9, 3, 3))])
def test_bf16_adamw_with_fp32_moments_is_torchs_fp32_adamw_bit_for_bit(weight_decay, shape):
    """1,000 steps of changing length and direction, in several pieces, against torch's own loop.

    (foreach and fused order their operations otherwise: up to 1 ulp.)
    """
    start = torch.randn(shape, generator=seeded())
    theirs = torch.nn.Parameter(start.clone())
    high, low = split_fp32(start)
    ours = torch.nn.Parameter(high.clone())
    a = BF16AdamW([{"params": [ours], "lr": 1e-3}], weight_decay, moments=torch.float32)
    a.state[ours]["low"].copy_(low)
    options = {"betas": (0.9, 0.99), "weight_decay": weight_decay, "foreach": False}
    b = torch.optim.AdamW([theirs], lr=1e-3, fused=False, **options)
    for i in range(1000):
        size = 10 ** math.sin(i)
        gradient = (torch.randn(shape, generator=seeded(i + 1)) * size).bfloat16()
        ours.grad = gradient
        theirs.grad = gradient.float()
        a.param_groups[0]["lr"] = 1e-3 * (1 - i / 1000)
        b.param_groups[0]["lr"] = 1e-3 * (1 - i / 1000)
        a.step(i + 1, {ours: i})
        b.step()
    assert torch.equal(join_fp32(ours.data, a.state[ours]["low"]), theirs.data)
    assert torch.equal(a.state[ours]["exp_avg_sq"], b.state[theirs]["exp_avg_sq"])


def travelled(make_optimizer, dtype, steps=400):
    """Return the share of the way to a far target that lr 1e-5 covers of what fp32 could."""
    p = torch.nn.Parameter(torch.ones(20_000, dtype=dtype))
    optimizer = make_optimizer([{"params": [p], "lr": 1e-5}])
    for i in range(steps):
        p.grad = (1 + 0.1 * torch.randn(p.shape, generator=seeded(i))).to(dtype)
        if isinstance(optimizer, BF16AdamW):
            optimizer.step(i + 1, {p: i})
        else:
            optimizer.step()
    weight = p.data.float()
    if "low" in optimizer.state[p]:
        weight = join_fp32(p.data, optimizer.state[p]["low"])
    return (1 - weight).mean().item() / (1e-5 * steps)


def test_plain_bf16_loses_what_the_two_bf16_optimizers_keep():
    def torchs(groups):
        return torch.optim.AdamW(groups, weight_decay=0)

    def stochastic(groups):
        return BF16AdamW(groups, exact=False)

    whole = travelled(torchs, torch.float32)
    assert whole > 0.9
    assert abs(travelled(BF16AdamW, torch.bfloat16) / whole - 1) < 0.01
    assert abs(travelled(stochastic, torch.bfloat16) / whole - 1) < 0.05
    assert travelled(torchs, torch.bfloat16) < 0.1


def test_rounding_depends_on_the_seed_alone():
    def final(seed):
        p = torch.nn.Parameter(torch.randn(5000, generator=seeded()).bfloat16())
        optimizer = BF16AdamW([{"params": [p], "lr": 1e-3}], exact=False)
        for i in range(3):
            p.grad = torch.randn(5000, generator=seeded(i)).bfloat16()
            optimizer.step(i + 1, {p: seed + i})
        return p.data

    assert torch.equal(final(7), final(7))
    assert not torch.equal(final(7), final(700))


# --------------------------------------------------------------------------------------------------
# Memory.


def test_checkpointing_changes_no_gradient():
    sana = randomize(Sana(SANA))
    g = seeded()
    latents = torch.randn(2, 8, 5, 4, generator=g)
    text = torch.randn(2, 6, 32, generator=g)
    gradients = []
    for sana.checkpointing in (False, True):
        sana.zero_grad()
        sana(latents, torch.tensor([100.0, 900.0]), text).square().sum().backward()
        gradients.append([p.grad.clone() for p in sana.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_a_batch_in_parts_gives_the_same_weights(photos_csv, tmp_path):
    flags = ["--data", photos_csv, "--steps", 20, *SMALL, "--batch_size", 4]
    run("train.py", *flags, "--out", "plain", cwd=tmp_path)
    run("train.py", *flags, "--accumulate", 2, "--checkpointing", "--out", "parts", cwd=tmp_path)
    a = load_newest(tmp_path / "plain")
    b = load_newest(tmp_path / "parts")
    assert all((a[key] - b[key]).abs().max() < 2e-3 * a[key].abs().max() for key in a)
    assert any(not torch.equal(a[key], b[key]) for key in a)
    flags = ["--accumulate", 3, "--batch_size", 4]
    assert "divisor" in run("train.py", *flags, cwd=tmp_path, status=2)


def test_threads_that_share_a_batch_change_nothing(photos_csv, tmp_path):
    """They have parts of 3, 3 and 2 pictures. What is stopped goes on as if it had not been."""
    flags = ["--data", photos_csv, "--steps", 12, *SMALL, "--batch_size", 8]
    run("train.py", *flags, "--out", "one", cwd=tmp_path)
    run("train.py", *flags, "--out", "three", cwd=tmp_path, threads=3)
    train_until(6, *flags, "--out", "again", cwd=tmp_path, threads=3)
    run("train.py", "--resume", "again", cwd=tmp_path, threads=3)
    a, b = load_newest(tmp_path / "one"), load_newest(tmp_path / "three")
    assert all((a[key] - b[key]).abs().max() < 1e-2 * a[key].abs().max() for key in a)
    assert any(not torch.equal(a[key], b[key]) for key in a)
    assert_same_checkpoint(tmp_path / "three", tmp_path / "again")
    for one, three in zip(read_log(tmp_path / "one"), read_log(tmp_path / "three")):
        for key in one.keys() & {"loss", "norm"}:
            assert abs(one[key] / three[key] - 1) < 1e-3


def test_a_run_keeps_its_shift(photos_csv, tmp_path):
    """It is that of a run which goes on, of one that begins with it, and of what is exported."""
    flags = ["--data", photos_csv, *SMALL, "--steps", 4]
    train_until(2, *flags, "--shift", 0.1, "--out", "first", cwd=tmp_path)
    said = run("train.py", "--resume", "first", "--shift", 1, cwd=tmp_path, status=2)
    assert "begun with 0.1" in said
    run("train.py", "--resume", "first", cwd=tmp_path)
    run("train.py", *flags, "--model", "first", "--out", "kept", cwd=tmp_path)
    run("train.py", *flags, "--model", "first", "--shift", 1, "--out", "other", cwd=tmp_path)
    for name, shift in [("first", 0.1), ("kept", 0.1), ("other", 1)]:
        assert model.read_run(tmp_path / name)["model"]["shift"] == shift
        assert model.load_restorer(tmp_path / name)[0].shift == shift
    first = str(tmp_path / "first")
    config = model.describe_model(first) | {"shift": 1}
    assert model.initial_restorer(first, config, None).shift == 1  # what it is trained with


@pytest.mark.parametrize("optimizer, bytes_each", [("adamw_bf16", 8), ("adamw_sr", 6)])
def test_training_in_bf16_resumes_bit_for_bit(optimizer, bytes_each, photos_csv, tmp_path):
    flags = ["--data", photos_csv, "--optimizer", optimizer, "--conditioning", "projection"]
    flags += [*SMALL, "--steps", 12]
    run("train.py", *flags, "--out", "whole", cwd=tmp_path)
    train_until(6, *flags, "--out", "halved", cwd=tmp_path)
    assert (tmp_path / "halved/latest").read_text() == "step_000006"
    run("train.py", "--resume", "--out", "halved", cwd=tmp_path)
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "halved")

    weights = load_newest(tmp_path / "whole")
    half = {name for name, t in weights.items() if t.dtype == torch.bfloat16}
    assert set(weights) - half == {"projection.weight"}
    size = sum(weights[name].nbytes for name in half)
    for key, moment in load_newest(tmp_path / "whole", "optimizer").items():
        if key.split(".", 1)[1] in half:
            size += moment.nbytes
    assert size == bytes_each * sum(weights[name].numel() for name in half)


# --------------------------------------------------------------------------------------------------
# The loop.


def spoil_losses(monkeypatch, steps):
    """Make the loss of these steps of training nan, counted from 1."""
    flow_loss = train.model.flow_loss
    train_step = train.train_step
    begun = []

    def watched(state, *rest):
        begun.append(state.step + 1)
        return train_step(state, *rest)

    def spoilt(*inputs, **options):
        loss = flow_loss(*inputs, **options)
        in_training = torch.is_grad_enabled()  # not in validation
        return loss * math.nan if in_training and begun[-1] in steps else loss

    monkeypatch.setattr(train, "train_step", watched)
    monkeypatch.setattr(train.model, "flow_loss", spoilt)


def test_a_step_without_a_finite_loss_is_skipped(photos_csv, tmp_path, monkeypatch, capsys):
    spoil_losses(monkeypatch, {3, 4})
    flags = ["--data", photos_csv, *SMALL, "--workers", 0, "--steps", 6]
    train_here(monkeypatch, *flags, "--out", tmp_path / "run")
    output = capsys.readouterr().out
    assert output.count("skipped") == 2
    assert "step 3: loss nan" in output
    assert read_log(tmp_path / "run")[-2]["skipped"] == 2
    assert_finite(load_file(tmp_path / "run/step_000006/model.safetensors"))


def test_twenty_steps_without_a_finite_loss_end_the_run(photos_csv, tmp_path, monkeypatch):
    spoil_losses(monkeypatch, range(5, 100))
    flags = ["--data", photos_csv, *SMALL, "--workers", 0, "--steps", 60, "--save_every", 100]
    with pytest.raises(UserError, match="20 steps in a row"):
        train_here(monkeypatch, *flags, "--out", tmp_path / "run")
    assert_finite(load_file(tmp_path / "run/step_000024/model.safetensors"))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16"])
def test_skipped_steps_do_not_change_how_a_run_resumes(
    optimizer, photos_csv, tmp_path, monkeypatch
):
    """Steps 1 to 3 and 7 have no finite loss.

    A run that stopped after 3, before any update, or after 8, ends like the one that did not.
    """
    spoil_losses(monkeypatch, {1, 2, 3, 7})
    flags = ["--data", photos_csv, *SMALL, "--workers", 0, "--steps", 10]
    flags += ["--optimizer", optimizer]
    train_here(monkeypatch, *flags, "--out", tmp_path / "whole")
    watched = train.train_step
    for stop in (3, 8):

        def stopping(state, *rest):
            if state.step + 1 == stop:  # noqa: B023, called within this round of the loop
                os.kill(os.getpid(), signal.SIGTERM)
            return watched(state, *rest)

        out = tmp_path / f"stopped_{stop}"
        monkeypatch.setattr(train, "train_step", stopping)
        with pytest.raises(SystemExit):
            train_here(monkeypatch, *flags, "--out", out)
        assert (out / "latest").read_text() == f"step_{stop:06d}"
        monkeypatch.setattr(train, "train_step", watched)
        train_here(monkeypatch, "--resume", out)
        assert_same_checkpoint(tmp_path / "whole", out)


def test_condition_dropout_hides_that_share_of_the_conditions(photos_csv, tmp_path, monkeypatch):
    flow_loss = train.model.flow_loss
    hidden = []

    def watch(restorer, x0, condition, *rest, **options):
        if torch.is_grad_enabled():  # not in validation
            hidden.extend((condition == 0).flatten(1).all(1).tolist())
        return flow_loss(restorer, x0, condition, *rest, **options)

    monkeypatch.setattr(train.model, "flow_loss", watch)
    flags = ["--data", photos_csv, "--steps", 60, "--batch_size", 4, "--resolution", 16]
    flags += ["--val_every", 60, "--device", "cpu"]
    for share in (0.0, 0.3):
        hidden.clear()
        more = "--condition_dropout", share, "--out", tmp_path / str(share)
        train_here(monkeypatch, *flags, *more)
        assert len(hidden) == 240
        assert abs(sum(hidden) / 240 - share) < 0.1  # 3.4 standard deviations
        assert (sum(hidden) > 0) == (share > 0)


# --------------------------------------------------------------------------------------------------
# What is saved, and when.


def test_a_run_resumes_with_its_own_optimizer_and_folder_only(photos_csv, tmp_path):
    flags = ["--data", photos_csv, "--batch_size", 2]
    run("train.py", *flags, "--resolution", 32, "--steps", 4, "--out", "a", cwd=tmp_path)
    run("train.py", *flags, "--curriculum", "32:2,48:2", "--out", "b", cwd=tmp_path)
    config = tmp_path / "a/step_000004/config.json"
    before = config.read_text()
    refused = [
        (["--resume", "a/step_000004", "--steps", 8], "no run in"),
        (["--resume", "a", "--steps", 8, "--optimizer", "adamw_bf16"], "begun with adamw"),
        (["--resume", "a", "--steps", 8, "--conditioning", "projection"], "begun with widen"),
        (["--resume", "b", "--steps", 9], "--curriculum"),
    ]
    for flags, words in refused:
        assert words in run("train.py", *flags, cwd=tmp_path, status=2)
    assert config.read_text() == before


def test_another_batch_size_after_a_resume_skips_and_repeats_no_draw(
    photos_csv, tmp_path, monkeypatch
):
    drawn = []
    draw = data.PairedDataset.draw

    def watch(dataset, index, later=0):
        if dataset.training:
            drawn.append(index)
        return draw(dataset, index, later)

    monkeypatch.setattr(data.PairedDataset, "draw", watch)
    flags = ["--data", photos_csv, "--curriculum", "32:4,48:4", "--workers", 0, "--out", "run"]
    train_until(3, *flags, "--batch_size", 4, cwd=tmp_path)
    train_here(monkeypatch, "--resume", tmp_path / "run", "--batch_size", 2)
    assert drawn == list(range(12, 22))
    config = json.loads((tmp_path / "run/step_000008/config.json").read_text())
    assert config["draws"] == 22


def test_a_closed_terminal_saves(photos_csv, tmp_path, monkeypatch):
    monkeypatch.setenv("SIGNAL", "HUP 2 0")
    flags = ["--data", photos_csv, *SMALL, "--steps", 9, "--out", "run"]
    run(ROOT / "tests/signalled.py", *flags, cwd=tmp_path, status=128 + signal.SIGHUP)
    assert (tmp_path / "run/latest").read_text() == "step_000003"


def test_a_trained_model_gets_a_tenth_of_the_learning_rate(photos_csv, tmp_path, capsys):
    flags = ["--data", photos_csv, *SMALL]
    run("train.py", *flags, "--steps", 2, "--out", "a", cwd=tmp_path)
    output = run("train.py", *flags, "--steps", 2, "--model", "a", "--out", "b", cwd=tmp_path)
    assert "--lr 0.0005, a tenth" in output
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert config["args"]["lr"] == pytest.approx(5e-4)


def test_sigterm_to_all_processes_of_a_run_saves_and_the_best_is_kept(photos_csv, tmp_path):
    """torchrun and batch systems signal the whole group, the workers that prepare images too."""
    flags = ["--data", photos_csv, *SMALL, "--val_every", 5, "--save_every", 5, "--workers", 2]
    process = start_training(*flags, cwd=tmp_path)
    run_folder = tmp_path / "out/photos"
    latest = run_folder / "latest"
    wait_until(lambda: latest.exists() and latest.read_text() >= "step_000020", process)
    os.killpg(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "--resume out/photos goes on" in output
    step = int(latest.read_text().removeprefix("step_"))
    assert f"stopped at step {step} of" in output
    validated = step // 5 * 5
    word = "validated" if validated == step else "last validated"
    assert f"\n{word} at step {validated} on" in output
    assert "Traceback" not in errors
    with pytest.raises(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, signal.SIGTERM)
    scores = {}
    for line in read_log(run_folder):
        if "restored_psnr" in line and line["step"]:
            scores[f"step_{line['step']:06d}"] = line["restored_psnr"]
    best = max(scores, key=scores.get)
    assert (run_folder / "best").read_text() == best
    # the last one was not validated: there may be little time
    assert {path.name for path in run_folder.glob("step_*")} == {best, latest.read_text()}


def test_the_best_checkpoint_is_one_that_was_validated(photos_csv, tmp_path, monkeypatch):
    """9 dB at step 4, 1 dB at step 8, saved at every step."""

    def validate(state, *_):
        numbers = {"val_loss": 1.0, "input_psnr": 5.0, "input_ssim": 0.5, "restored_ssim": 0.5}
        psnr = 9.0 if state.step == 4 else 1.0
        return {"step": state.step, "restored_psnr": psnr} | numbers

    monkeypatch.setattr(train, "validate", validate)
    flags = ["--data", photos_csv, *SMALL, "--steps", 8, "--val_every", 4, "--save_every", 1]
    train_here(monkeypatch, *flags, "--out", tmp_path / "run")
    assert (tmp_path / "run/best").read_text() == "step_000004"
    assert (tmp_path / "run/step_000004").is_dir()
