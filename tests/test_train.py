"""The optimizer against torch's, and the parts of the training loop that no command shows."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ROOT
from model import Sana, flow_loss
from pipeline import SANA, randomize
from test_commands import SMALL, run
from train import BF16AdamW, join_fp32, round_stochastically, split_fp32


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_split_weights_lose_nothing():
    """Every kind of fp32 number: all exponents, ties between two bf16 neighbours, zeros, the largest, infinity."""
    bits = torch.randint(-2**31, 2**31 - 1, (1_000_000,), generator=seeded(), dtype=torch.int64).to(torch.int32)
    weights = torch.cat([bits, (bits >> 16 << 16) + 0x8000, torch.tensor([0, -2**31, 0x7F7FFFFF, 0x7F800000])]).to(torch.int32).view(torch.float32)
    weights = weights[~weights.isnan()]
    high, low = split_fp32(weights)
    assert torch.equal(join_fp32(high, low), weights) and (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    normal = weights.abs().clamp(max=3e38) == weights.abs()
    nearest = (weights.bfloat16().double() - weights.double()).abs()[normal]
    assert torch.equal((high.double() - weights.double()).abs()[normal], nearest)


def test_stochastic_rounding_has_the_mean_and_never_skips_a_neighbour():
    x = torch.tensor([1.0, 1.0 + 1 / 512, -1.0 - 3 / 512, 3e-5])[:, None].expand(4, 40_000).contiguous()
    rounded = round_stochastically(x, torch.tensor([1, 2], dtype=torch.int32)).float()
    assert (rounded[0] == 1).all() and all(len(row.unique()) <= 2 for row in rounded)
    error = (rounded - x).mean(1) / (x.abs().mean(1) / 128)  # in units of the gap between neighbours, at most; 1 / sqrt(40,000) = 0.005
    assert error.abs().max() < 0.015


def test_rounding_is_fair_and_unrelated_between_neighbours_and_seeds():
    """Half way between two neighbours: up or down, as often; 2^17 choices, all correlations below five standard deviations."""
    x = torch.full((1 << 17,), 1 + 1 / 256)
    seeds = [torch.randint(-2**31, 2**31, (2,), dtype=torch.int32, generator=seeded(i)) for i in range(8)]
    ups = torch.stack([(round_stochastically(x, seed) > 1) * 2.0 - 1 for seed in seeds])
    ups = torch.cat([ups, ups.roll(1, 1), ups.roll(2, 1), ups.roll(64, 1)])
    correlation = ups @ ups.T / len(x) - torch.eye(len(ups))
    assert correlation.abs().max() < 5 / len(x) ** 0.5 and ups.mean(1).abs().max() < 5 / len(x) ** 0.5


def test_the_chance_of_rounding_is_unrelated_between_neighbours_and_seeds():
    """What is half way between two bf16 goes up or down like a coin: correlations of 2^16 throws below five standard deviations."""
    x, seeds = torch.full((1 << 16,), 1 + 1 / 256), torch.randint(-2**31, 2**31, (4, 2), dtype=torch.int32, generator=seeded())
    coins = torch.stack([(round_stochastically(x, seed).float() > 1) * 2.0 - 1 for seed in seeds])
    rows = torch.cat([coins.roll(shift, 1) for shift in (0, 1, 2, 3, 64, 4096)])
    correlation = rows @ rows.T / x.numel() - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / 256 and coins.mean(1).abs().max() < 5 / 256


@pytest.mark.parametrize("weight_decay, shape", [(0.0, (70_001,)), (0.1, (33, 9, 3, 3))])
def test_bf16_adamw_with_fp32_moments_is_torchs_fp32_adamw_bit_for_bit(weight_decay, shape):
    """1,000 steps of changing length and direction, in several chunks, against torch's own loop (foreach and fused order their
    operations otherwise: up to 1 ulp)."""
    start = torch.randn(shape, generator=seeded())
    theirs, (high, low) = torch.nn.Parameter(start.clone()), split_fp32(start)
    ours = torch.nn.Parameter(high.clone())
    options = {"betas": (0.9, 0.99), "weight_decay": weight_decay}
    a = BF16AdamW([{"params": [ours], "lr": 1e-3}], **options, moments=torch.float32)
    a.state[ours]["low"].copy_(low)
    b = torch.optim.AdamW([theirs], lr=1e-3, **options, foreach=False, fused=False)
    for i in range(1000):
        gradient = (torch.randn(shape, generator=seeded(i + 1)) * 10 ** math.sin(i)).bfloat16()
        ours.grad, theirs.grad = gradient, gradient.float()
        a.param_groups[0]["lr"] = b.param_groups[0]["lr"] = 1e-3 * (1 - i / 1000)
        a.step(i + 1, {ours: i})
        b.step()
    assert torch.equal(join_fp32(ours.data, a.state[ours]["low"]), theirs.data)
    assert torch.equal(a.state[ours]["exp_avg_sq"], b.state[theirs]["exp_avg_sq"])


def travelled(optimizer, dtype, steps=400):
    """The share of the way to a far target that lr 1e-5 covers of what fp32 could."""
    p = torch.nn.Parameter(torch.ones(20_000, dtype=dtype))
    optimizer = optimizer([{"params": [p], "lr": 1e-5}])
    for i in range(steps):
        p.grad = (1 + 0.1 * torch.randn(p.shape, generator=seeded(i))).to(dtype)
        optimizer.step(*([i + 1, {p: i}] if isinstance(optimizer, BF16AdamW) else []))
    weight = join_fp32(p.data, optimizer.state[p]["low"]) if "low" in optimizer.state[p] else p.data.float()
    return (1 - weight).mean().item() / (1e-5 * steps)


def test_plain_bf16_loses_what_the_two_bf16_optimizers_keep():
    whole = travelled(lambda groups: torch.optim.AdamW(groups, weight_decay=0), torch.float32)
    exact, rounded = travelled(BF16AdamW, torch.bfloat16), travelled(lambda groups: BF16AdamW(groups, exact=False), torch.bfloat16)
    plain = travelled(lambda groups: torch.optim.AdamW(groups, weight_decay=0), torch.bfloat16)
    assert whole > 0.9 and abs(exact / whole - 1) < 0.01 and abs(rounded / whole - 1) < 0.05 and plain < 0.1


def test_rounding_depends_on_the_seed_alone():
    def final(seed):
        p = torch.nn.Parameter(torch.randn(5000, generator=seeded()).bfloat16())
        optimizer = BF16AdamW([{"params": [p], "lr": 1e-3}], exact=False)
        for i in range(3):
            p.grad = torch.randn(5000, generator=seeded(i)).bfloat16()
            optimizer.step(i + 1, {p: seed + i})
        return p.data
    assert torch.equal(final(7), final(7)) and not torch.equal(final(7), final(700))


def test_checkpointing_changes_no_gradient():
    sana, g = randomize(Sana(SANA)), seeded()
    inputs = torch.randn(2, 8, 5, 4, generator=g), torch.tensor([100.0, 900.0]), torch.randn(2, 6, 32, generator=g)
    gradients = []
    for sana.checkpointing in (False, True):
        sana.zero_grad()
        sana(*inputs).square().sum().backward()
        gradients.append([p.grad.clone() for p in sana.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.fixture(scope="module")
def plain(photos_csv, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    run("train.py", "--data", photos_csv, "--steps", 20, *SMALL, "--batch_size", 4, "--out", "run", cwd=folder)
    return folder / "run/step_000020"


def test_a_batch_in_parts_gives_the_same_weights(plain, photos_csv, tmp_path):
    run("train.py", "--data", photos_csv, "--steps", 20, *SMALL, "--batch_size", 4, "--accumulate", 2, "--checkpointing", "--out", "run", cwd=tmp_path)
    a, b = (load_file(folder / "model.safetensors") for folder in (plain, tmp_path / "run/step_000020"))
    assert all((a[k] - b[k]).abs().max() < 2e-3 * a[k].abs().max() for k in a) and any(not torch.equal(a[k], b[k]) for k in a)
    assert "divisor" in run("train.py", "--accumulate", 3, "--batch_size", 4, cwd=tmp_path, status=2)


@pytest.mark.parametrize("optimizer, bytes_each", [("adamw_bf16", 8), ("adamw_sr", 6)])
def test_training_in_bf16_resumes_bit_for_bit(optimizer, bytes_each, photos_csv, tmp_path):
    flags = ["--data", photos_csv, "--optimizer", optimizer, "--conditioning", "projection", *SMALL, "--steps", 12, "--save_every", 6, "--keep", 2]
    run("train.py", *flags, "--out", "whole", cwd=tmp_path)
    whole = tmp_path / "whole"
    assert (whole / "step_000006").is_dir() and (whole / "step_000012").is_dir()
    (tmp_path / "again").mkdir()
    for name in ("step_000006", "log.jsonl"):  # as if it had ended there
        os.rename(whole / name, tmp_path / "again" / name) if name != "log.jsonl" else (tmp_path / "again" / name).write_text((whole / name).read_text())
    (tmp_path / "again/latest").write_text("step_000006")
    run("train.py", "--resume", "--out", "again", cwd=tmp_path)
    for name in ("model", "ema", "optimizer"):
        a, b = (load_file(tmp_path / f"{r}/step_000012/{name}.safetensors") for r in ("whole", "again"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    model, state = (load_file(whole / f"step_000012/{name}.safetensors") for name in ("model", "optimizer"))
    half = {k for k in model if model[k].dtype == torch.bfloat16}
    assert set(model) - half == {"projection.weight"}
    size = sum(t.nbytes for k, t in [*model.items(), *state.items()] if k.split(".", 1)[-1] in half or k in half)
    assert size == bytes_each * sum(model[k].numel() for k in half)


def test_a_step_without_a_finite_loss_is_skipped_and_twenty_end_the_run(photos_csv, tmp_path, monkeypatch, capsys):
    loss = train.flow_loss

    def spoilt(restorer, x0, *rest):
        value = loss(restorer, x0, *rest)
        spoilt.count += 1
        return value * math.nan if spoilt.count in spoilt.bad else value
    monkeypatch.setattr(train, "flow_loss", spoilt)
    monkeypatch.chdir(tmp_path)
    flags = ["train.py", "--data", str(photos_csv), *SMALL, "--workers", "0", "--save_every", "100"]
    spoilt.count, spoilt.bad = 0, {3, 4}
    monkeypatch.setattr(sys, "argv", [*flags, "--steps", "6", "--out", "few"])
    train.main()
    errors = capsys.readouterr().err
    assert errors.count("skipped") == 2 and "step 3: the loss is nan" in errors
    assert all(t.isfinite().all() for t in load_file("few/step_000006/model.safetensors").values())
    spoilt.count, spoilt.bad = 0, set(range(5, 100))
    monkeypatch.setattr(sys, "argv", [*flags, "--steps", "60", "--out", "many"])
    with pytest.raises(train.UserError, match="20 steps in a row"):
        train.main()
    assert all(t.isfinite().all() for t in load_file("many/step_000024/model.safetensors").values())


def test_sigterm_saves_and_the_best_checkpoint_is_kept(photos_csv, tmp_path):
    flags = ["--data", photos_csv, *SMALL, "--val_every", "5", "--save_every", "5", "--keep", "2"]
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    folder, deadline = tmp_path / "out/photos", time.monotonic() + 120
    latest = folder / "latest"
    while not latest.exists() or latest.read_text() < "step_000020":
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "interrupted" in output
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    scores = {entry["step"]: entry["restored_psnr"] for entry in log if "restored_psnr" in entry and entry["step"]}
    best = f"step_{max(scores, key=scores.get):06d}"
    assert (folder / "best").read_text() == best and (folder / best).is_dir()
    kept = sorted(p.name for p in folder.glob("step_*"))
    saved = set(scores) | {int(latest.read_text()[-6:])}  # the last one was not validated: there may be little time
    assert set(f"step_{step:06d}" for step in sorted(saved)[-2:]) | {best} == set(kept)


def test_condition_dropout_hides_that_share_of_the_conditions(photos_csv, tmp_path, monkeypatch):
    hidden = []

    def watch(restorer, x0, condition, *rest):
        hidden.extend((condition == 0).flatten(1).all(1).tolist())
        return flow_loss(restorer, x0, condition, *rest)
    monkeypatch.setattr(train, "flow_loss", watch)
    for share in (0.0, 0.3):
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(photos_csv), "--steps", "60", "--batch_size", "4", "--resolution", "16", "--val_every", "60",
                                          "--condition_dropout", str(share), "--device", "cpu", "--out", str(tmp_path / str(share))])
        hidden.clear()
        train.main()
        assert abs(sum(hidden) / 240 - share) < 0.1 and (sum(hidden) > 0) == (share > 0)  # 3.4 standard deviations


def test_a_run_resumes_with_its_own_optimizer_and_folder_only(photos_csv, tmp_path):
    run("train.py", "--data", photos_csv, *SMALL, "--steps", 4, "--save_every", 2, "--keep", 2, "--out", "a", cwd=tmp_path)
    run("train.py", "--data", photos_csv, *SMALL, "--curriculum", "32:2,48:2", "--out", "b", cwd=tmp_path)
    before = (tmp_path / "a/step_000002/config.json").read_text()
    for flags, word in ((["--resume", "a/step_000002", "--steps", 8], "run folder"), (["--resume", "a", "--steps", 8, "--optimizer", "adamw_bf16"], "adamw"),
                        (["--resume", "b", "--steps", 9], "--curriculum")):
        assert word in run("train.py", *flags, cwd=tmp_path, status=2)
    assert (tmp_path / "a/step_000002/config.json").read_text() == before


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16"])
def test_skipped_steps_do_not_change_how_a_run_resumes(optimizer, photos_csv, tmp_path, monkeypatch):
    """Steps 1 to 3 and 7 have no finite loss; a run that stopped after 3, before any update, or after 8, ends like the one that did not."""
    loss = train.flow_loss

    def spoilt(restorer, x0, *rest):
        return loss(restorer, x0, *rest) * (math.nan if spoilt.state.step + 1 in (1, 2, 3, 7) else 1)
    step = train.train_step

    def watched(state, batch):
        spoilt.state = state
        return step(state, batch)
    monkeypatch.setattr(train, "flow_loss", spoilt), monkeypatch.setattr(train, "train_step", watched), monkeypatch.chdir(tmp_path)
    ends = {}
    for stops in ([10], [3, 10], [8, 10]):
        out = "run" + "_".join(map(str, stops))
        for i, stop in enumerate(stops):  # the schedule is that of the last stop: cut the earlier ones off by hand
            begin = ["--data", str(photos_csv), *SMALL, "--workers", "0", "--optimizer", optimizer, "--steps", "10", "--save_every", "1", "--keep", "9"]
            monkeypatch.setattr(sys, "argv", ["train.py", *(["--resume", out] if i else [*begin, "--out", out])])
            train.main()
            if stop < 10:
                (tmp_path / out / "latest").write_text(f"step_{stop:06d}")
                for later in range(stop + 1, 11):
                    shutil.rmtree(tmp_path / out / f"step_{later:06d}", ignore_errors=True)
        ends[out] = load_file(f"{out}/step_000010/model.safetensors") | load_file(f"{out}/step_000010/optimizer.safetensors")
    for other in ("run3_10", "run8_10"):
        assert all(torch.equal(ends["run10"][name].float(), ends[other][name].float()) for name in ends["run10"])


def test_the_best_checkpoint_is_one_that_was_validated(photos_csv, tmp_path, monkeypatch):
    """9 dB at step 4, 1 dB at step 8, saved at every step."""
    monkeypatch.setattr(train, "validate", lambda state, *_: {"step": state.step, "val_loss": 1.0, "input_psnr": 5.0, "input_ssim": 0.5, "restored_ssim": 0.5,
                                                              "restored_psnr": {4: 9.0}.get(state.step, 1.0)})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(photos_csv), *SMALL, "--steps", "8", "--val_every", "4", "--save_every", "1", "--out", "run"])
    train.main()
    assert (tmp_path / "run/best").read_text() == "step_000004" and (tmp_path / "run/step_000004").is_dir()


def test_sigterm_to_all_processes_of_a_run_saves(photos_csv, tmp_path):
    """torchrun and batch systems signal the whole group, the workers that prepare images too."""
    flags = ["--data", photos_csv, *SMALL, "--steps", "5000", "--workers", "2", "--out", "run"]
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags], cwd=tmp_path,
                               start_new_session=True, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "run/log.jsonl").exists():
        time.sleep(0.2)
    time.sleep(3)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in errors and (tmp_path / "run/latest").is_file(), errors
