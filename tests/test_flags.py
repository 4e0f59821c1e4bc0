"""Every flag of every script: a test uses it, a wrong value gets one line that names it and writes nothing, and what it does is measured here
where no other test does. In this process, on a model without training."""
import argparse
import csv
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio

import data
import degrade
import evaluate
import model
import train
from conftest import ROOT
from model import PRESETS, build_restorer
from test_readme import README, commands
from vae import PixelAE, read_published, save_weights

COMMANDS = {"train": train, "evaluate": evaluate, "data pairs": data, "data cache": data, "degrade": degrade, "model export": model}


def parser_of(command):
    """The parser that the script makes, caught when it is asked to parse."""
    def catch(self, *_):
        raise InterruptedError(self)
    script, *sub = command.split()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError) as caught:
        patch.setattr(degrade.Parser, "parse_args", catch)
        (COMMANDS[command].parse_args if hasattr(COMMANDS[command], "parse_args") else COMMANDS[command].main)()
    parser = caught.value.args[0]
    subparsers = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return subparsers[0][sub[0]] if subparsers else parser


ACTIONS = [(command, action) for command in COMMANDS for action in parser_of(command)._actions if action.dest != "help"]


def test_every_flag_is_used_by_a_test_and_the_readme_has_no_other():
    used = "\n".join([path.read_text() for path in (ROOT / "tests").glob("test_*.py")] + commands())
    names = {option for _, action in ACTIONS for option in action.option_strings}
    assert len(names) > 50 and [name for name in sorted(names) if not re.search(rf"{name}\b(?![_-])", used)] == []
    others = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--max_restarts", "--quick", "--gpu"}  # torchrun's, and the bench's
    assert set(re.findall(r"(?<![\w-])--\w+", README)) - names == others
    assert all(action.help for _, action in ACTIONS if action.dest != "command")


# ----------------------------------------------------------------------------------------------------------------
# Wrong values. Numbers and choices are attacked alike; a flag with words of its own has to be in WORDS.

NO_NUMBERS = {int: ["x", "1.5", "nan", "inf", ""], float: ["x", "nan", "", "1,5"]}
OUTSIDE = {int: ["-1", "0", str(10**20)], float: ["-1", "-inf", "1e30", "inf"]}
FINE = {"seed": OUTSIDE[int], "workers": ["0"], "sigma_mean": ["-1"], "clip": ["1e30", "inf"]}  # of these, what makes sense for a flag
WORDS = {  # by flag or positional: wrong values of it
    "data": ["absent.csv", "file", "photos"], "cache": ["absent", "file"], "checkpoint": ["absent", "file", "photos"], "compare": ["absent", "file"],
    "input": ["absent.png", "absent/*.png", "file"], "model": ["absent", "a/b/c", "file"], "photos": ["absent", "file"], "resume": ["absent", "file"],
    "image": ["absent.png", "file", "photos"], "out": ["file/below"], "output": ["file/below.png", "o.xyz", "o"], "grid": ["g.xyz", "g"],
    "device": ["moon", "cuda:99", "", "cpu:x", "meta"], "ema_device": ["moon", "meta"],
    "lpips_weights": ["absent file"], "fid_weights": ["absent", "file"],
    "curriculum": ["x", "32", "32:", "32:x", "0:5", "32:0", "-32:5", "32:-5", "32:5,", "32:1e3", "nan:5", f"{10**9}:5", f"32:{10**20}",
                   f"32:5,{10**9}:5"],
    "sweep": ["x", "0", "-1", "1,", ",1", "1.5", "1,x", "1;2", "nan", "99999"],
    "degradations": ["fog", "jpeg jpeg", "jpeg:x", "jpeg:quality", "jpeg:quality=x", "jpeg:quality=0", "jpeg:quality=101", "jpeg:quality=1.5",
                     "jpeg:sigma=3", "gaussian_noise:sigma=-1", "gaussian_noise:sigma=nan", "gaussian_noise:sigma=inf", "gaussian_blur:kernel=4",
                     "gaussian_blur:kernel=0", f"gaussian_blur:kernel={10**9 + 1}", "poisson_noise:scale=0", "downscale:factor=0",
                     "downscale:factor=nan", "color_jitter:contrast=-1"],
}
WORDS["only"] = [word for word in WORDS["degradations"] if " " not in word]
FREE = {"prompt", "command"}  # any words; the subcommand, which is one of its choices


@pytest.fixture(scope="module")
def place(photos, tmp_path_factory):
    """A folder with pairs, a checkpoint without training whose answers differ from its inputs, and one that needs a pretrained model."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "file").write_text("x"), (folder / "photos").mkdir()
    for i in range(3):
        Image.open(photos / f"{i:02d}.png").save(folder / f"photos/{i}.png")
    Image.open(photos / "00.png").save(folder / "a.png")
    (folder / "pairs.csv").write_text("image_path,condition_image_path,caption\nphotos/0.png,photos/1.png,sharpen\nphotos/1.png,photos/0.png,\nphotos/2.png,,\n")
    restorer = build_restorer(PRESETS["tiny"])
    restorer.sana.initialize(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(restorer.sana.proj_out.weight, std=0.05, generator=torch.Generator().manual_seed(1))
    for name, changes in (("run", {}), ("latent", {"autoencoder": None, "name": "gone"})):
        (folder / name).mkdir()
        save_weights(restorer.state_dict(), folder / name / "ema.safetensors")
        save_weights({key: t + 1 for key, t in restorer.state_dict().items()}, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"step": 3, "model": PRESETS["tiny"] | changes, "args": {}}))
    return folder


def in_process(module, words, patch):
    patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
    degrade.run_script(module.main)


def words_for(command, name, value):
    """A command that is right but for one value."""
    values = value.split() if name in ("degradations", "lpips_weights") else [value]
    flag = [f"--{name}", *values] if len(values) > 1 else [f"--{name}={value}"]
    measured = {"metrics", "y_channel", "lpips_net", "lpips_weights", "fid_weights", "compare", "sweep", "degradations", "data"}
    if command == "train":
        return [*["--data", "pairs.csv"] * (name == "cache"), *["--out", "new"] * (name != "resume"), *flag]
    if command == "evaluate":
        metric = {"lpips_weights": "lpips", "fid_weights": "fid"}.get(name, "psnr")
        how = ["--data", "pairs.csv", "--metrics", metric, "--output", "new"] if name in measured else ["--input", "a.png", "--output", "o.png"]
        return ["--checkpoint", "latent" if name == "model" else "run", *how, *flag]
    positional = {"data pairs": {"photos": "photos"}, "data cache": {}, "degrade": {"image": "a.png", "out": "o.png"},
                  "model export": {"checkpoint": "run", "out": "new"}}[command]
    given = [value if key == name else right for key, right in positional.items()]
    required = {"data pairs": ["--out", "new"], "data cache": ["--data", "pairs.csv", "--out", "new", "--workers", "0"]}.get(command, [])
    return [*command.split()[1:], *given, *required, *(flag if name not in positional else [])]


def wrong_values(command, action):
    name = action.dest
    if action.nargs == 0 or name in FREE:
        return []
    if action.choices:
        return ["nonsense", ""]
    if action.type:
        fine = FINE.get(name, []) + [str(10**20)] * (command == "degrade" and name == "seed")
        return NO_NUMBERS[action.type] + [value for value in OUTSIDE[action.type] if value not in fine]
    return {"degrade": {"out": ["o.xyz", "noext", "file/o.png"]}}.get(command, {}).get(name) or WORDS[name]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_value_gets_one_line_that_names_it(command, place, monkeypatch, capsys):
    def accept(*_, **__):
        raise RuntimeError("it was accepted")

    def files():
        return {path for path in place.rglob("[!.]*") if path.is_file()}
    monkeypatch.chdir(place), monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(train, "State", accept), monkeypatch.setattr(evaluate, "evaluate_pairs", accept)
    cases, wrong, before = [(action.dest, value) for c, action in ACTIONS if c == command for value in wrong_values(command, action)], [], files()
    for name, value in cases:
        try:
            ended = in_process(COMMANDS[command], words_for(command, name, value), monkeypatch)  # None: it was accepted
        except (SystemExit, Exception) as error:
            ended = error.code if isinstance(error, SystemExit) else repr(error)
        lines, written = capsys.readouterr().err.splitlines(), files() ^ before
        named = [f"--{name}"] + [word for word in value.split() if name in (*WORDS, "out") and len(word) > 2]  # a path or word says where by itself
        if ended != 2 or len(lines) != 1 or not lines[0].startswith("error: ") or not any(word in lines[0] for word in named) or written:
            wrong.append((name, value, ended, lines, written))
            before ^= written
    assert len(cases) > 3 and not wrong, "\n".join(map(str, wrong))


# ----------------------------------------------------------------------------------------------------------------
# What the flags do: of training, on its state and its draws; of the other scripts, on what they write.

def state_of(*flags):
    args = train.parse_args(["--device", "cpu", *map(str, flags)])
    return train.State(data.describe_model(args.model, args.conditioning), PixelAE(2), data.Prompts(), args)


def batch_of(count, side=8):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, count, 3, side, side, generator=generator) * 2 - 1
    return {"clean": pixels[0], "condition": pixels[1], "caption": ["Remove the noise."] * count, "bad": 0}


@pytest.mark.parametrize("flags, peaks", [(["--lr", 1e-3], (1e-3, 0.05)), (["--lr", 1e-4], (1e-4, 1e-2)), (["--lr", 1e-4, "--proj_lr", 0.3], (1e-4, 0.3))])
def test_lr_and_proj_lr_rise_for_2_percent_and_fall_as_a_cosine(flags, peaks):
    state = state_of("--conditioning", "projection", "--steps", 200, *flags)
    rest, projection = state.optimizer.param_groups
    assert [p.shape for p in projection["params"]] == [(12, 24, 1, 1)] and len(rest["params"]) == len(state.parameters) - 1
    for state.step in (0, 2, 4, 100, 199):
        done = (state.step + 0.5) / 200
        train.train_step(state, batch_of(4))
        expected = [peak * min(1, done / 0.02) * (1 + math.cos(math.pi * done)) / 2 for peak in peaks]
        assert [rest["lr"], projection["lr"]] == pytest.approx(expected)


@pytest.mark.parametrize("clip", [1e-3, 1e9])
def test_clip_bounds_the_norm_of_the_gradient(clip):
    """Which AdamW's first step leaves in its first moment, a tenth of it."""
    state = state_of("--clip", clip)
    _, norm, *_ = train.train_step(state, batch_of(4))
    used = torch.stack([state.optimizer.state[p]["exp_avg"].norm() for p in state.mine.values()]).norm() / 0.1
    assert norm > 1e-2 and used.item() == pytest.approx(min(norm, clip), rel=1e-2 if clip < norm else 1e-4)


def test_weight_decay_draws_every_weight_towards_zero():
    plain, decayed = state_of("--lr", 0.1), state_of("--lr", 0.1, "--weight_decay", 0.5)
    start = {name: p.detach().clone() for name, p in plain.parameters.items()}
    for state in (plain, decayed):
        train.train_step(state, batch_of(4))
    lr = plain.optimizer.param_groups[0]["lr"]
    assert lr > 1e-4
    for name, p in plain.parameters.items():
        assert torch.allclose(p - decayed.parameters[name], lr * 0.5 * start[name], atol=1e-6), name


@pytest.mark.parametrize("decay, every", [(0.9999, 1), (0.15, 1), (0.9999, 3)])
def test_the_average_is_that_of_ema_decay_and_ema_every(decay, every):
    state = state_of("--lr", 0.1, "--steps", 50, "--ema_decay", decay, "--ema_every", every)
    expected = {name: p.detach().clone() for name, p in state.parameters.items()}
    for step in range(1, 8):
        train.train_step(state, batch_of(4))
        if step % every == 0:
            share = 1 - min(decay, (1 + step) / (10 + step)) ** every  # warmed up: soon forgets the start
            expected = {name: (1 - share) * ema + share * state.parameters[name].detach() for name, ema in expected.items()}
    for name, ema in expected.items():
        assert torch.allclose(state.ema[name], ema, atol=1e-6), name
    assert any((state.ema[name] - p).abs().max() > 1e-3 for name, p in state.parameters.items())


def test_ema_device_is_where_the_averages_lie():
    args = train.parse_args(["--device", "cpu", "--ema_device", "cpu"])
    args.ema_device = "meta"  # the other device that each machine has
    state = train.State(PRESETS["tiny"], PixelAE(2), data.Prompts(), args)
    train.train_step(state, batch_of(4))
    assert {t.device.type for t in state.ema.values()} == {"meta"} and {p.device.type for p in state.mine.values()} == {"cpu"}


@pytest.mark.parametrize("flags, share, mean, std", [([], 0.3, 0, 1), (["--share_at_one", 0], 0, 0, 1),
                                                     (["--share_at_one", 0.6, "--sigma_mean", 1, "--sigma_std", 0.5], 0.6, 1, 0.5)])
def test_sigmas_are_drawn_with_that_share_mean_and_deviation(flags, share, mean, std, monkeypatch):
    sigmas, count = [], 4000

    def watch(restorer, x0, condition, text, text_mask, sigma, *_):
        sigmas.append(sigma)
        return 0 * sum(p.sum() for p in restorer.parameters()) + torch.ones(len(sigma))
    monkeypatch.setattr(train, "flow_loss", watch)
    state = state_of("--batch_size", count, *flags)
    train.train_step(state, batch_of(count, 2))
    at_one = sigmas[0] == 1
    assert abs(at_one.float().mean() - share) < 4 * 0.5 / count**0.5 and (at_one.any() or not share)
    rest, shift = sigmas[0][~at_one].double(), state.restorer.shift
    normal = (rest / (shift - (shift - 1) * rest)).logit()  # before the shift, and before the sigmoid
    assert shift == 3 and abs(normal.mean() - mean) < 5 * std / len(rest)**0.5 and abs(normal.std() - std) < 4 * std / len(rest)**0.5


def test_flags_of_what_is_drawn(place, monkeypatch):
    monkeypatch.chdir(place)

    def plans(*flags, count=400):
        drawn = train.make_datasets(train.parse_args(["--device", "cpu", *map(str, flags)]))[0]
        return [drawn.plan(i) for i in range(count)]

    def dropped(*flags):
        return sum(caption == "" for *_, caption in plans(*flags)) / 400
    assert dropped("--caption_dropout", 0) == 0 and dropped("--caption_dropout", 1) == 1 and abs(dropped("--caption_dropout", 0.4) - 0.4) < 0.1
    assert 0.04 < dropped() < 0.16  # one in ten
    for flags, counts in (([], {1, 2, 3}), (["--max_degradations", 1], {1}), (["--max_degradations", 5], {1, 2, 3, 4, 5})):
        assert {len(recipe) for _, recipe, _ in plans(*flags)} == counts
    some = [dict(recipe) for _, recipe, _ in plans("--degradations", "jpeg", "downscale:factor=3")]
    assert {name for recipe in some for name in recipe} == {"jpeg", "downscale"} and {r["downscale"]["factor"] for r in some if "downscale" in r} == {3}
    assert len({r["jpeg"]["quality"] for r in some if "jpeg" in r}) > 20
    assert plans("--seed", 3) == plans("--seed", 3) != plans("--seed", 4)
    conditions = "--data", "pairs.csv", "--resolution", 32, "--degradation"
    assert [{row for row, recipe, _ in plans(*conditions, mode, count=30) if recipe} for mode in ("auto", "on_the_fly")] == [{2}, {0, 1, 2}]
    with pytest.raises(degrade.UserError, match="line 4"):
        train.make_datasets(train.parse_args(["--data", "pairs.csv", "--resolution", "32", "--degradation", "paired"]))
    drawn = data.PairedDataset(data.CsvPairs("pairs.csv"), 32, degradation="paired")
    assert sum(isinstance(drawn[i], degrade.UserError) for i in range(3)) == 1  # the row without a condition
    args = train.parse_args(["--data", "pairs.csv", "--resolution", "32", "--workers", "2"])
    assert train.make_loader(drawn, args, range(0, 8, 1)).num_workers == 2 and drawn[int(isinstance(drawn[0], degrade.UserError))]["clean"].shape == (3, 32, 32)


def test_val_every_save_every_keep_overwrite_and_weights(photos_csv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", photos_csv, "--batch_size", 2, "--resolution", 16, "--workers", 0, "--device", "cpu", "--out", "run"]
    in_process(train, [*flags, "--steps", 7, "--val_every", 3, "--save_every", 2, "--keep", 2], monkeypatch)
    log = [json.loads(line) for line in open("run/log.jsonl")]
    assert [line["step"] for line in log if "val_loss" in line] == [0, 3, 6, 7]
    kept, best = {path.name for path in tmp_path.glob("run/step_*")}, (tmp_path / "run/best").read_text()
    assert kept == {"step_000006", "step_000007", best} and (tmp_path / "run/latest").read_text() == "step_000007"
    for name, more in (("ema", []), ("ema", ["--weights", "ema"]), ("model", ["--weights", "model"])):
        in_process(model, ["export", "run", f"exported{len(more)}{name}", *more], monkeypatch)
        trained = load_file(f"run/step_000007/{name}.safetensors")
        exported = load_file(f"exported{len(more)}{name}/diffusion_pytorch_model.safetensors")
        assert len(exported) > 50 and all(torch.equal(t, trained[f"sana.{key}"]) for key, t in exported.items())
    in_process(train, [*flags, "--steps", 1, "--overwrite"], monkeypatch)
    assert [path.name for path in tmp_path.glob("run/step_*")] == ["step_000001"] and len(list(open("run/log.jsonl"))) < len(log)


def test_flags_of_restoring_reach_the_sampler(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    image, (restorer, _) = degrade.open_image("a.png"), model.load_restorer("run")
    given, seen = {"steps": 2, "prompt": "Remove JPEG artifacts."}, []
    for changes in ({}, {"prompt": ""}, {"steps": 3}, {"seed": 5}, {"sampler": "dpm"}, {"guidance": 2.5}, {"condition_guidance": 1.5}, {"average": 2}):
        how = given | changes
        flags = [word for name, value in how.items() for word in (f"--{name}", value)]
        in_process(evaluate, ["--checkpoint", "run", "--input", "a.png", "--output", tmp_path / f"{len(seen)}.png", *flags], monkeypatch)
        expected = evaluate.restore_image(image, how.pop("prompt"), restorer=restorer, autoencoder=PixelAE(2), prompts=data.Prompts(), **how)
        seen.append(np.asarray(Image.open(tmp_path / f"{len(seen)}.png")))
        assert np.array_equal(seen[-1], np.asarray(expected)), changes
    assert len({picture.tobytes() for picture in seen}) == len(seen)


def test_flags_of_measuring(place, published, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    captions, restore = [], evaluate.restore

    def watch(**how):
        captions.extend(how["captions"])
        return restore(**how)
    monkeypatch.setattr(evaluate, "restore", watch)

    def scores(*flags):
        captions.clear()
        in_process(evaluate, ["--checkpoint", "run", "--data", "pairs.csv", "--output", tmp_path / "out", *flags], monkeypatch)
        with open(tmp_path / "out/scores.csv") as file:
            return list(csv.DictReader(file))
    plain = scores("--metrics", "psnr")
    assert captions[0] == "sharpen" and {key.split("_", 1)[1] for key in plain[0] if "_" in key} == {"psnr"}
    scores("--metrics", "psnr", "--prompt", "Fix it.")
    assert captions == ["Fix it."] * 3
    pictures = [np.asarray(Image.open(f"photos/{i}.png")) for i in (0, 1)]
    y = scores("--metrics", "psnr", "--y_channel")
    assert float(y[0]["input_psnr"]) == pytest.approx(peak_signal_noise_ratio(*(rgb2ycbcr(x)[..., 0] for x in pictures), data_range=255), abs=1e-4)
    assert float(plain[0]["input_psnr"]) == pytest.approx(peak_signal_noise_ratio(*pictures, data_range=255), abs=1e-4)
    weights = [published["vgg"], published["vgg heads"]]
    vgg = evaluate.LPIPS(read_published("vgg", weights[0]), read_published("vgg heads", weights[1]), "vgg")
    expected = vgg(*(data.to_tensor(Image.fromarray(x))[None] for x in pictures)).item()
    measured = scores("--metrics", "lpips", "--lpips_net", "vgg", "--lpips_weights", *weights)
    assert expected > 1e-3 and float(measured[0]["input_lpips"]) == pytest.approx(expected, rel=1e-4)
    noisy = [scores("--metrics", "psnr", "--degradations", "gaussian_noise:sigma=25", "--seed", seed)[2] for seed in (1, 2, 1)]
    assert {row["degradation"] for row in noisy} == {"gaussian_noise"} and abs(float(noisy[0]["input_psnr"]) - 20.2) < 0.7  # 20 log10(255 / 25), clipped
    assert noisy[0] == noisy[2] and noisy[0]["input_psnr"] != noisy[1]["input_psnr"]


def test_flags_of_degrading(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)

    def pairs(out, *flags):
        in_process(data, ["pairs", "photos", "--out", tmp_path / out, *flags], monkeypatch)
        with open(tmp_path / out / "pairs.csv") as file:
            return [row["degradation"].split() for row in csv.DictReader(file)], [path.read_bytes() for path in sorted(tmp_path.glob(f"{out}/condition/*"))]
    done, images = pairs("a", "--num_degradations", 2)
    assert [len(words) for words in done] == [2, 2, 2] and {len(words) for words in pairs("b", "--num_degradations", 4, 5)[0]} <= {4, 5}
    assert pairs("c", "--num_degradations", 2) == (done, images) and pairs("d", "--num_degradations", 2, "--seed", 1)[1] != images
    assert {tuple(words) for words in pairs("e", "--num_degradations", 1, "--degradations", "jpeg:quality=20")[0]} == {("jpeg:quality=20",)}
    pictures = []
    for seed, count in ((0, 3), (0, 3), (1, 3), (0, 1)):
        capsys.readouterr()
        in_process(degrade, ["a.png", tmp_path / "o.png", "--num_degradations", count, "--seed", seed], monkeypatch)
        assert len(capsys.readouterr().out.split()) == 1 + count
        pictures.append(np.asarray(Image.open(tmp_path / "o.png")).tobytes())
    assert pictures[0] == pictures[1] and len(set(pictures)) == 3
