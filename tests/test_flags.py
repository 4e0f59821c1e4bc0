"""Every flag of every script.

Each is explained by -h and used in some test. A wrong value gets one line that names it, and
nothing is written. What a flag does is measured here where no other test does it. All in this
process, on a model without training.
"""

import argparse
import csv
import json
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import degrade
import evaluate
import model
import train
from conftest import ROOT
from model import PRESETS, build_restorer
from test_readme import PAGES, shell_commands
from vae import save_weights

COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "data pairs": data,
    "data cache": data,
    "data match": data,
    "degrade": degrade,
    "model export": model,
}


def parser_of(command):
    """Return the parser that a command makes, caught when it is asked to parse."""

    def catch(parser, *_):
        raise InterruptedError(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(degrade.Parser, "parse_args", catch)
        with pytest.raises(InterruptedError) as caught:
            COMMANDS[command].main()
    parser = caught.value.args[0]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices[command.split()[1]]
    return parser


PARSERS = {command: parser_of(command) for command in COMMANDS}
ACTIONS = []  # (command, flag or positional), as argparse has it
for command, parser in PARSERS.items():
    for action in parser._actions:
        if action.dest != "help":
            ACTIONS.append((command, action))


def test_help_explains_every_flag_and_fits_on_a_page():
    for command, action in ACTIONS:
        assert action.help or action.dest == "command", (command, action.dest)
    for command, parser in PARSERS.items():
        assert len(parser.format_help().splitlines()) <= 78, command


def test_every_flag_is_used_by_a_test():
    texts = [path.read_text() for path in (ROOT / "tests").glob("test_*.py")]
    used = "\n".join(texts + shell_commands())
    names = {name for _, action in ACTIONS for name in action.option_strings}
    assert len(names) > 50
    for name in sorted(names):
        assert re.search(rf"{name}\b(?![_-])", used), name


def test_the_pages_have_no_other_flags():
    names = {name for _, action in ACTIONS for name in action.option_strings}
    names |= {"--quick", "--gpu", "--threads", "--minutes", "--val"}  # of bench.py
    names |= {"--nproc_per_node", "--nnodes", "--max_restarts"}  # of torchrun
    names |= {"--rdzv_backend", "--rdzv_endpoint", "--rdzv_id"}
    for page, text in PAGES.items():
        assert set(re.findall(r"(?<![\w-])--\w+", text)) <= names, page


# --------------------------------------------------------------------------------------------------
# Wrong values.

NO_COUNT = ["x", "1.5", "0"]  # of what begins at 1
NO_INDEX = ["nan", "-1"]  # of what begins at 0
NO_SHARE = ["1,5", "nan", "-0.1", "1.1"]  # of 0 to 1
NO_FACTOR = ["x", "nan", "-0.1", "inf"]  # of what begins at 0
NO_CHOICE = ["nonsense", ""]
NO_DEGRADATION = ["fog", "jpeg:quality=101", "gaussian_blur:kernel=4"]
WRONG = {  # by flag or positional; "file" holds no picture, table or run, "photos" is a folder
    "checkpoint": ["absent", "file", "photos"],
    "curriculum": ["x", "32:", "0:5", "32:1e3", "32:5,1000000000:5"],
    "degradations": [*NO_DEGRADATION, "jpeg jpeg"],
    "device": ["moon", "cuda:99", "meta"],
    "ema_device": ["moon", "meta"],
    "image": ["absent.png", "file", "photos"],
    "input": ["absent.png", "file"],
    "latent_steps": [*NO_INDEX, "1001"],
    "lpips_weights": ["absent file"],
    "model": ["absent", "a/b/c", "file"],
    "only": NO_DEGRADATION,
    "out": ["file/below"],
    "output": ["file/below.png"],
    "pattern": ["x", "=", "a=", "=b"],
    "quality": [*NO_COUNT, "101"],
    "resolution": [*NO_COUNT, "100000"],
    "seed": NO_INDEX,
    "shift": ["x", "nan", "0.009", "101"],
    "workers": [*NO_COUNT, "101"],
}
COUNTS = "accumulate batch_size epochs lora max_degradations num_degradations save_every steps"
SHARES = "caption_dropout condition_dropout decoder_weight ema_decay lr proj_lr share_at_one"
for values, names in [
    (NO_COUNT, f"{COUNTS} val_every"),
    (NO_SHARE, SHARES),
    (NO_FACTOR, "clip condition_guidance guidance weight_decay"),
    (NO_CHOICE, "conditioning metrics optimizer sampler stage weights"),
    (["absent", "file"], "cache clean degraded fid_weights photos resume"),
    (["absent.csv", "file", "photos"], "data val_data"),
]:
    WRONG |= dict.fromkeys(names.split(), values)
NEW = {"trained": [], "held_out": [], "before": []}  # the rows of a new run
FREE = {"prompt", "command"}  # any words; the subcommand


@pytest.fixture(scope="module")
def place(photos, tmp_path_factory):
    """A folder with pairs and two checkpoints without training.

    The answers of "run" differ from its inputs. "latent" needs a pretrained model.
    """
    folder = tmp_path_factory.mktemp("place")
    (folder / "file").write_text("x")
    for name in ("photos", "again"):
        (folder / name).mkdir()
        for i in range(3):
            Image.open(photos / f"{i:02d}.png").save(folder / f"{name}/{i}.png")
    Image.open(photos / "00.png").save(folder / "a.png")
    (folder / "pairs.csv").write_text(
        "image_path,condition_image_path,caption\n"
        "photos/0.png,photos/1.png,sharpen\n"
        "photos/1.png,photos/0.png,\n"
        "photos/2.png,,\n"
    )
    restorer = build_restorer(PRESETS["tiny"])
    generator = torch.Generator().manual_seed(0)
    restorer.sana.initialize(generator)
    torch.nn.init.normal_(restorer.sana.proj_out.weight, std=0.05, generator=generator)
    tensors = restorer.state_dict()
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    pretrained = {"autoencoder": {"kind": "pretrained"}, "name": "gone"}
    for name, changes in [("run", {}), ("latent", pretrained)]:
        save_weights(tensors, folder / name / "ema.safetensors")
        save_weights(changed, folder / name / "model.safetensors")
        config = {"step": 3, "model": PRESETS["tiny"] | changes, "args": {}}
        (folder / name / "config.json").write_text(json.dumps(config))
        (folder / name / "rows.json").write_text(json.dumps(NEW))
    return folder


def in_process(module, words, patch):
    """Run a script here. It may catch Ctrl-C; afterwards pytest does again."""
    before = {name: signal.getsignal(name) for name in train.SIGNALS}
    patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
    try:
        degrade.run_script(module.main)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


MEASURING = {"metrics", "lpips_weights", "fid_weights", "degradations", "data"}


def words_for(command, name, value):
    """Return the words of a command that is right but for one value."""
    flag = [f"--{name}={value}"]
    if " " in value:
        flag = [f"--{name}", *value.split()]
    if command == "train":
        more = {"cache": ["--data", "pairs.csv"], "resume": [], "out": []}
        more["val_data"] = ["--data", "pairs.csv", "--resolution", "32", "--out", "new"]
        return [*flag, *more.get(name, ["--out", "new"])]
    if command == "evaluate":
        checkpoint = ["--checkpoint", "latent" if name == "model" else "run"]
        if name not in MEASURING:
            return [*checkpoint, "--input", "a.png", "--output", "o.png", *flag]
        metric = {"lpips_weights": "lpips", "fid_weights": "fid"}.get(name, "psnr")
        pairs = ["--data", "pairs.csv", "--output", "new"]
        return [*checkpoint, *pairs, "--metrics", metric, *flag]
    if command == "data cache":
        words = ["--data", "pairs.csv", "--out", "new", "--resolution", "32"]
        return ["cache", *words, *flag]
    positional = {
        "data pairs": {"photos": "photos"},
        "data match": {"clean": "photos", "degraded": "again"},
        "degrade": {"image": "a.png", "out": "o.png"},
        "model export": {"checkpoint": "run", "out": "new"},
    }[command]
    if name in positional:
        positional[name] = value
        flag = []
    more = {"data pairs": ["--out", "new"], "data match": ["--out", "new.csv"]}.get(command, [])
    return [*command.split()[1:], *positional.values(), *more, *flag]


def cases_of(command):
    """Return [(flag or positional, wrong value)]."""
    cases = []
    for other, action in ACTIONS:
        if other == command and action.nargs != 0 and action.dest not in FREE:
            values = WRONG[action.dest]
            if (command, action.dest) == ("degrade", "out"):
                values = ["file/o.png"]
            cases += [(action.dest, value) for value in values]
    return cases


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_value_gets_one_line_that_names_it(command, place, monkeypatch, capsys):
    def accept(*_, **__):
        raise RuntimeError("it was accepted")

    def files():
        return {path for path in place.rglob("*") if path.is_file()}

    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(train, "validate", accept)
    monkeypatch.setattr(evaluate, "evaluate_pairs", accept)
    before = files()
    wrong = []
    cases = cases_of(command)
    assert len(cases) > 3
    for name, value in cases:
        status = None  # if it is accepted
        try:
            in_process(COMMANDS[command], words_for(command, name, value), monkeypatch)
        except SystemExit as end:
            status = end.code
        except Exception as error:
            status = repr(error)
        lines = capsys.readouterr().err.splitlines()
        written = files() - before
        names = [f"--{name}", *(word for word in value.split() if len(word) > 2)]
        good = status == 2 and len(lines) == 1 and lines[0].startswith("error: ")
        good = good and any(word in lines[0] for word in names)
        good = good and not re.search(r"invalid \w+_\w+ value", lines[0])  # a function's name
        if not good or written:
            wrong.append(f"{name}={value}: status {status}, {lines}, written: {written}")
        for path in written:
            path.unlink()
    assert not wrong, "\n".join(wrong)


# --------------------------------------------------------------------------------------------------
# What flags of training do: on its state, and on its draws.


def parse(*flags):
    return train.parse_args(["--device", "cpu", "--out", "none", *map(str, flags)])


def begin(*flags, **changes):
    """Begin a run without data, which train_step can take further -> state, stage."""
    args = parse(*flags)
    vars(args).update(changes)
    config = train.describe_run(args)[0]
    dataset = data.PairedDataset(data.DeadLeaves(1, 8, 0), 8)
    stage = train.RestorerStage(config, args, dataset, dataset, range(0))
    return train.State(stage.load(None), args), stage


def step(state, stage, count=8, side=8):
    """Do a training step with random pictures -> the norm of its gradient."""
    generator = torch.Generator().manual_seed(0)
    clean, condition = torch.rand(2, count, 3, side, side, generator=generator) * 2 - 1
    batch = {"clean": clean, "condition": condition, "caption": ["Remove the noise."] * count}
    _, norm, _ = train.train_step(state, stage, batch, train.Lanes(stage.config, state.args))
    return norm


@pytest.mark.parametrize("clip", [1e-3, 0])
def test_clip_bounds_the_norm_of_the_gradient_and_0_does_not(clip):
    """AdamW's first step leaves a tenth of the gradient in its first moment."""
    state, stage = begin("--clip", clip)
    norm = step(state, stage)
    assert norm > 1e-2
    moments = [moments["exp_avg"].norm() for moments in state.moments.values()]
    used = torch.stack(moments).norm().item() / 0.1
    expected = min(norm, clip or norm)
    assert used == pytest.approx(expected, rel=1e-2 if expected < norm else 1e-4)


def test_ema_decay_is_reached_after_a_warm_up():
    state, stage = begin("--lr", 0.1, "--ema_decay", 0.3)
    expected = {name: p.detach().clone() for name, p in state.own.items()}
    for n in range(1, 6):
        step(state, stage, side=4)
        decay = min(0.3, (1 + n) / (10 + n))
        for name, p in state.own.items():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    for name in state.own:
        assert torch.allclose(state.average[name], expected[name], atol=1e-6), name
    name = "sana.proj_out.weight"
    assert (state.average[name] - state.own[name]).abs().max() > 1e-3


def test_ema_device_is_where_the_averages_lie():
    assert parse("--ema_device", "cpu").ema_device == "cpu"
    state, stage = begin(ema_device="meta")  # the other device that each machine has
    state.step = 49
    step(state, stage)
    assert state.average_every == 50
    assert {tensor.device.type for tensor in state.average.values()} == {"meta"}
    assert {p.device.type for p in state.own.values()} == {"cpu"}


@pytest.mark.parametrize(
    "flags, share, shift",
    [
        ([], 0.3, 3),
        (["--share_at_one", 0, "--shift", 0.2], 0, 0.2),
    ],
)
def test_sigmas_are_drawn_with_that_share_and_shift(flags, share, shift, monkeypatch):
    count = 4000
    sigmas = []

    def watch(restorer, x0, condition, text, text_mask, sigma, *_):
        sigmas.append(sigma)
        return 0 * sum(p.sum() for p in restorer.parameters()) + torch.ones(len(sigma))

    monkeypatch.setattr(model, "flow_loss", watch)
    state, stage = begin("--batch_size", count, *flags)
    step(state, stage, count, side=4)
    at_one = sigmas[0] == 1
    assert abs(at_one.float().mean() - share) < 4 * 0.5 / count**0.5
    assert at_one.any() == (share > 0)
    rest = sigmas[0][~at_one].double()
    normal = (rest / (shift - (shift - 1) * rest)).logit()  # without the shift and the sigmoid
    assert state.module.shift == shift
    assert abs(normal.mean()) < 5 / len(rest) ** 0.5
    assert abs(normal.std() - 1) < 4 / len(rest) ** 0.5


def plans(*flags):
    """Return what the first draws of a training with these flags will do."""
    train_set, _, _ = train.load_data(parse(*flags), 0, 0)
    return [train_set.plan(i) for i in range(400)]


def test_flags_of_drawing():
    for flags, dropped, counts in [
        ([], 0.1, {1}),
        (["--max_degradations", 3], 0.1, {1, 2, 3}),
        (["--caption_dropout", 0.6, "--max_degradations", 5], 0.6, {1, 2, 3, 4, 5}),
    ]:
        drawn = plans(*flags)
        assert abs(np.mean([plan.caption == "" for plan in drawn]) - dropped) < 0.1
        assert {len(plan.recipe) for plan in drawn} == counts
    assert parse("--data", "photos.csv", "--model", "tiny").max_degradations == 3
    steps = []
    for plan in plans("--degradations", "jpeg", "downscale:factor=3"):
        steps += plan.recipe
    assert {name for name, _ in steps} == {"jpeg", "downscale"}
    assert {strengths["factor"] for name, strengths in steps if name == "downscale"} == {3}
    assert plans("--seed", 3) == plans("--seed", 3) != plans("--seed", 4)


def test_val_every_save_every_and_weights(photos_csv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    flags = ["--data", photos_csv, "--batch_size", 2, "--resolution", 16, "--out", "run"]
    rhythm = ["--device", "cpu", "--steps", 7, "--val_every", 3, "--save_every", 2]
    in_process(train, [*flags, *rhythm], monkeypatch)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "restored_psnr" in line] == [0, 3, 6, 7]
    assert (run / "latest").read_text() == "step_000007"
    kept = {path.name for path in run.glob("step_*")}
    assert kept == {"step_000007", (run / "best").read_text()}

    for weights, flags in [("ema", []), ("model", ["--weights", "model"])]:
        in_process(model, ["export", "run", weights, *flags], monkeypatch)
        trained = load_file(run / f"step_000007/{weights}.safetensors")
        exported = load_file(f"{weights}/diffusion_pytorch_model.safetensors")
        assert len(exported) > 50
        for name, tensor in exported.items():
            assert torch.equal(tensor, trained[f"sana.{name}"]), name


# --------------------------------------------------------------------------------------------------
# What flags of the other scripts do: on what they write.


def test_flags_of_restoring_reach_the_sampler(place, tmp_path, monkeypatch):
    """All at once: without any one of them the picture is another."""
    monkeypatch.chdir(place)
    flags = {"prompt": "Remove JPEG artifacts.", "steps": 2, "seed": 5, "sampler": "dpm"}
    flags |= {"guidance": 2.5, "condition_guidance": 1.5}
    words = ["--checkpoint", "run", "--input", "a.png", "--output", tmp_path / "o.png"]
    words += ["--prompt", flags["prompt"], "--steps", 2, "--seed", 5, "--sampler", "dpm"]
    words += ["--guidance", 2.5, "--condition_guidance", 1.5]
    in_process(evaluate, words, monkeypatch)
    restored = Image.open(tmp_path / "o.png").tobytes()
    pipeline = evaluate.Pipeline.load("run")
    assert pipeline("a.png", **flags).tobytes() == restored
    for name in flags:
        fewer = {other: value for other, value in flags.items() if other != name}
        assert pipeline("a.png", **fewer).tobytes() != restored, name


def test_restoring_enlarges_as_training_did(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = Image.open(place / "a.png").crop((0, 0, 24, 20))
    small.save("b.png")
    small.resize((48, 40)).save("a.png")
    Path("p.csv").write_text("image_path,condition_image_path\n" + "a.png,b.png\n" * 3)
    flags = ["--steps", 1, "--batch_size", 1, "--resolution", 16, "--device", "cpu"]
    in_process(train, ["--data", "p.csv", *flags, "--out", "run"], monkeypatch)
    words = ["--checkpoint", "run", "--input", "b.png", "--output", "o.png"]
    in_process(evaluate, words, monkeypatch)
    assert Image.open("o.png").size == (48, 40)


@pytest.fixture
def scores(place, tmp_path, monkeypatch):
    """A function: measure the pairs with some flags -> the rows of scores.csv."""
    monkeypatch.chdir(place)

    def measure(*flags):
        out = tmp_path / f"scores{len(list(tmp_path.iterdir()))}"
        words = ["--checkpoint", "run", "--data", "pairs.csv", "--output", out, *flags]
        in_process(evaluate, words, monkeypatch)
        with open(out / "scores.csv", newline="") as file:
            return list(csv.DictReader(file))

    return measure


def test_a_prompt_takes_the_place_of_the_captions(scores, monkeypatch):
    captions = []
    restore = evaluate.Pipeline.restore

    def watch(pipeline, pixels, some, **how):
        captions.extend(some)
        return restore(pipeline, pixels, some, **how)

    monkeypatch.setattr(evaluate.Pipeline, "restore", watch)
    scores("--metrics", "psnr")
    assert captions[:2] == ["sharpen", ""] and len(captions) == 3
    captions.clear()
    scores("--metrics", "psnr", "--prompt", "Fix it.")
    assert captions == ["Fix it."] * 3


def test_degradations_and_seed_of_measuring(scores):
    noise = "--metrics", "psnr", "--degradations", "gaussian_noise:sigma=25"
    first, other, again = (scores(*noise, "--seed", seed)[2] for seed in (1, 2, 1))
    assert first == again
    assert first["degradation"] == other["degradation"] == "gaussian_noise"
    assert first["input_psnr"] != other["input_psnr"]
    assert abs(float(first["input_psnr"]) - 20.2) < 0.7  # 20 log10(255 / 25), a little clipped


def test_flags_of_making_pairs(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    flags = ["--degradations", "jpeg:quality=20", "downscale", "--num_degradations", 1, 2]
    made = []
    for seed in (0, 0, 1):
        out = tmp_path / f"{len(made)}"
        words = ["pairs", "photos", "--out", out, *flags, "--seed", seed]
        in_process(data, words, monkeypatch)
        made.append((out / "pairs.csv").read_text())
    assert made[0] == made[1] != made[2]
    assert {*re.findall(r"jpeg:\S+|downscale", "".join(made))} == {"jpeg:quality=20", "downscale"}
