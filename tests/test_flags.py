"""Every flag of every script.

Each is explained by -h and used in some test. A wrong value gets one line that names it, and
nothing is written. What a flag does is measured here where no other test does it. All in this
process, on a model without training.
"""

import argparse
import csv
import json
import math
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

NO_COUNT = ["x", "1.5", "nan", "inf", "", "-1", "0"]  # of what begins at 1
NO_INDEX = ["x", "1.5", "nan", "inf", "", "-1"]  # of what begins at 0
NO_SHARE = ["x", "nan", "", "1,5", "-0.1", "1.1", "-inf", "inf"]  # of 0 to 1
NO_FACTOR = ["x", "nan", "", "1,5", "-0.1", "-inf", "inf"]  # of what begins at 0
NO_CHOICE = ["nonsense", ""]
NO_DEGRADATION = [
    *("fog", "jpeg:x", "jpeg:quality", "jpeg:quality=x", "jpeg:quality=0", "jpeg:quality=101"),
    *("jpeg:quality=1.5", "jpeg:sigma=3", "gaussian_noise:sigma=-1", "gaussian_noise:sigma=nan"),
    *("gaussian_noise:sigma=inf", "gaussian_blur:kernel=4", "gaussian_blur:kernel=0"),
    *("gaussian_blur:kernel=1000000001", "poisson_noise:scale=0", "downscale:factor=0"),
    *("downscale:factor=nan", "color_jitter:contrast=-1"),
]
NO_CURRICULUM = [
    *("x", "32", "32:", "32:x", "0:5", "32:0", "-32:5", "32:5,", "32:1e3", "nan:5"),
    "32:5,1000000000:5",
]
WRONG = {  # by flag or positional; "file" holds no picture, table or run, "photos" is a folder
    "checkpoint": ["absent", "file", "photos"],
    "curriculum": NO_CURRICULUM,
    "degradations": [*NO_DEGRADATION, "jpeg jpeg"],
    "device": ["moon", "cuda:99", "", "cpu:x", "meta"],
    "ema_device": ["moon", "meta"],
    "image": ["absent.png", "file", "photos"],
    "input": ["absent.png", "file"],
    "latent_steps": [*NO_INDEX, "1001"],
    "lpips_weights": ["absent file"],
    "model": ["absent", "a/b/c", "file"],
    "only": NO_DEGRADATION,
    "out": ["file/below"],
    "output": ["file/below.png", "o.xyz", "noext"],
    "pattern": ["x", "=", "a=", "=b"],
    "quality": [*NO_COUNT, "101"],
    "resolution": [*NO_COUNT, "100000"],
    "seed": NO_INDEX,
    "shift": ["x", "nan", "", "1,5", "0", "0.009", "101", "inf", "-1"],
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
    words = [*command.split()[1:], *positional.values()]
    more = {"data pairs": ["--out", "new"], "data match": ["--out", "new.csv"]}
    return [*words, *more.get(command, []), *flag]


def cases_of(command):
    """Return [(flag or positional, wrong value)]."""
    cases = []
    for other, action in ACTIONS:
        if other == command and action.nargs != 0 and action.dest not in FREE:
            values = WRONG[action.dest]
            if (command, action.dest) == ("degrade", "out"):
                values = ["o.xyz", "noext", "file/o.png"]
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


@pytest.mark.parametrize(
    "flags, peaks",
    [
        (["--lr", 1e-3], [1e-3, 0.05]),
        (["--lr", 1e-4, "--proj_lr", 0.3], [1e-4, 0.3]),
    ],
)
def test_lr_and_proj_lr_rise_for_2_percent_and_fall_as_a_cosine(flags, peaks):
    state, stage = begin("--conditioning", "projection", "--steps", 200, *flags)
    rest, projection = state.adamw.param_groups
    assert [p.shape for p in projection["params"]] == [(48, 96, 1, 1)]
    assert len(rest["params"]) == len(state.own) - 1
    for state.step in (0, 2, 4, 100, 199):
        done = (state.step + 0.5) / 200
        factor = min(1, done / 0.02) * (1 + math.cos(math.pi * done)) / 2
        step(state, stage)
        assert rest["lr"] == pytest.approx(peaks[0] * factor)
        assert projection["lr"] == pytest.approx(peaks[1] * factor)


@pytest.mark.parametrize("clip", [1e-3, 1e9, 0])
def test_clip_bounds_the_norm_of_the_gradient_and_0_does_not(clip):
    """AdamW's first step leaves a tenth of the gradient in its first moment."""
    state, stage = begin("--clip", clip)
    norm = step(state, stage)
    assert norm > 1e-2
    moments = [moments["exp_avg"].norm() for moments in state.moments.values()]
    used = torch.stack(moments).norm().item() / 0.1
    expected = min(norm, clip or norm)
    assert used == pytest.approx(expected, rel=1e-2 if expected < norm else 1e-4)


def test_weight_decay_draws_every_weight_towards_zero():
    plain, stage = begin("--lr", 0.1)
    decayed, _ = begin("--lr", 0.1, "--weight_decay", 0.5)
    start = {name: p.detach().clone() for name, p in plain.own.items()}
    step(plain, stage)
    step(decayed, stage)
    lr = plain.adamw.param_groups[0]["lr"]
    assert lr > 1e-4
    for name, p in plain.own.items():
        difference = p - decayed.own[name]
        assert torch.allclose(difference, lr * 0.5 * start[name], atol=1e-6), name


@pytest.mark.parametrize("decay, every", [(0.9999, 1), (0.15, 1), (0.9999, 3)])
def test_the_average_is_that_of_ema_decay(decay, every):
    """On another device it moves every 50 steps, here three."""
    state, stage = begin("--lr", 0.1, "--steps", 50, "--ema_decay", decay)
    state.average_every = every
    expected = {name: p.detach().clone() for name, p in state.own.items()}
    for n in range(1, 8):
        step(state, stage, side=4)
        if n % every == 0:
            warmed_up = min(decay, (1 + n) / (10 + n)) ** every
            for name, p in state.own.items():
                expected[name] = warmed_up * expected[name] + (1 - warmed_up) * p.detach()
    moved = 0
    for name, p in state.own.items():
        assert torch.allclose(state.average[name], expected[name], atol=1e-6), name
        moved = max(moved, (state.average[name] - p).abs().max().item())
    assert moved > 1e-3


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
        (["--share_at_one", 0], 0, 3),
        (["--share_at_one", 0.6, "--shift", 0.2], 0.6, 0.2),
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


def plans(*flags, count=400):
    """Return what the first draws of a training with these flags will do."""
    train_set, _, _ = train.load_data(parse(*flags), 0, 0)
    return [train_set.plan(i) for i in range(count)]


def test_caption_dropout():
    for flags, share in [([], 0.1), ([0], 0), ([1], 1), ([0.4], 0.4)]:
        flags = ["--caption_dropout", *flags] if flags else []
        dropped = np.mean([caption == "" for _, _, caption in plans(*flags)])
        assert abs(dropped - share) < (0.1 if 0 < share < 1 else 1e-9)


def test_degradations_and_how_many():
    for flags, counts in [
        ([], {1, 2, 3}),
        (["--max_degradations", 1], {1}),
        (["--max_degradations", 5], {1, 2, 3, 4, 5}),
    ]:
        assert {len(recipe) for _, recipe, _ in plans(*flags)} == counts
    steps = []
    for _, recipe, _ in plans("--degradations", "jpeg", "downscale:factor=3"):
        steps += recipe
    assert {name for name, _ in steps} == {"jpeg", "downscale"}
    assert {strengths["factor"] for name, strengths in steps if name == "downscale"} == {3}
    assert len({strengths["quality"] for name, strengths in steps if name == "jpeg"}) > 20


def test_seed_and_rows_without_a_condition(place, monkeypatch):
    assert plans("--seed", 3) == plans("--seed", 3) != plans("--seed", 4)
    monkeypatch.chdir(place)
    drawn = plans("--data", "pairs.csv", "--resolution", 32, count=30)
    assert {row for row, recipe, _ in drawn if recipe} == {2}
    assert {row for row, recipe, _ in drawn if not recipe} == {0, 1}


def test_val_every_save_every_and_weights(photos_csv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    flags = ["--data", photos_csv, "--batch_size", 2, "--resolution", 16, "--device", "cpu"]
    flags += ["--out", "run"]
    rhythm = ["--steps", 7, "--val_every", 3, "--save_every", 2]
    in_process(train, [*flags, *rhythm], monkeypatch)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "restored_psnr" in line] == [0, 3, 6, 7]
    assert (run / "latest").read_text() == "step_000007"
    kept = {path.name for path in run.glob("step_*")}
    assert kept == {"step_000007", (run / "best").read_text()}

    for out, weights in [("default", None), ("averaged", "ema"), ("last", "model")]:
        more = ["--weights", weights] if weights else []
        in_process(model, ["export", "run", out, *more], monkeypatch)
        trained = load_file(run / f"step_000007/{weights or 'ema'}.safetensors")
        exported = load_file(f"{out}/diffusion_pytorch_model.safetensors")
        assert len(exported) > 50
        for name, tensor in exported.items():
            assert torch.equal(tensor, trained[f"sana.{name}"]), name


# --------------------------------------------------------------------------------------------------
# What flags of the other scripts do: on what they write.


def test_flags_of_restoring_reach_the_sampler(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    pipeline = evaluate.Pipeline.load("run")
    seen = set()
    changes = [
        {},
        {"prompt": ""},
        {"steps": 3},
        {"seed": 5},
        {"sampler": "dpm"},
        {"guidance": 2.5},
        {"condition_guidance": 1.5},
    ]
    for i, change in enumerate(changes):
        how = {"steps": 2, "prompt": "Remove JPEG artifacts."} | change
        out = tmp_path / f"{i}.png"
        words = ["--checkpoint", "run", "--input", "a.png", "--output", out]
        for name, value in how.items():
            words += [f"--{name}", value]
        in_process(evaluate, words, monkeypatch)
        restored = Image.open(out)
        assert restored.tobytes() == pipeline("a.png", **how).tobytes(), change
        seen.add(restored.tobytes())
    assert len(seen) == len(changes)


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


def test_metrics_and_the_captions(scores, monkeypatch):
    captions = []
    restore = evaluate.Pipeline.restore

    def watch(pipeline, pixels, some, **how):
        captions.extend(some)
        return restore(pipeline, pixels, some, **how)

    monkeypatch.setattr(evaluate.Pipeline, "restore", watch)
    rows = scores("--metrics", "psnr")
    columns = ["input_psnr", "ceiling_psnr", "restored_psnr"]
    assert list(rows[0]) == ["image", "condition", "degradation", *columns]
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

    def pairs(out, *flags):
        in_process(data, ["pairs", "photos", "--out", tmp_path / out, *flags], monkeypatch)
        with open(tmp_path / out / "pairs.csv", newline="") as file:
            done = [row["degradation"].split() for row in csv.DictReader(file)]
        images = sorted((tmp_path / out / "condition").iterdir())
        return done, [path.read_bytes() for path in images]

    two = pairs("a", "--num_degradations", 2)
    assert [len(words) for words in two[0]] == [2, 2, 2]
    assert pairs("b", "--num_degradations", 2) == two
    assert pairs("c", "--num_degradations", 2, "--seed", 1)[1] != two[1]
    many, _ = pairs("d", "--num_degradations", 4, 5)
    assert {len(words) for words in many} <= {4, 5}
    jpeg, _ = pairs("e", "--num_degradations", 1, "--degradations", "jpeg:quality=20")
    assert jpeg == [["jpeg:quality=20"]] * 3


def test_flags_of_degrading(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    pictures = []
    for seed, count in [(0, 3), (0, 3), (1, 3), (0, 1)]:
        words = ["a.png", tmp_path / "o.png", "--num_degradations", count, "--seed", seed]
        in_process(degrade, words, monkeypatch)
        assert len(capsys.readouterr().out.split()) == 1 + count
        pictures.append(Image.open(tmp_path / "o.png").tobytes())
    assert pictures[0] == pictures[1] and len(set(pictures)) == 3
