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
    class Caught(Exception):
        pass

    def catch(self, *_):
        raise Caught(self)
    script, *sub = command.split()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Caught) as caught:
        patch.setattr(degrade.Parser, "parse_args", catch)
        (COMMANDS[command].parse_args if hasattr(COMMANDS[command], "parse_args") else COMMANDS[command].main)()
    parser = caught.value.args[0]
    subparsers = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return subparsers[0][sub[0]] if subparsers else parser


ACTIONS = [(command, action) for command in COMMANDS for action in parser_of(command)._actions if action.dest != "help"]


def test_every_flag_is_used_by_a_test_and_the_readme_has_no_other():
    used = "\n".join([path.read_text() for path in (ROOT / "tests").glob("*.py")] + commands())
    names = {option for _, action in ACTIONS for option in action.option_strings}
    assert len(names) > 50 and [name for name in sorted(names) if not re.search(rf"{name}\b(?![_-])", used)] == []
    others = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--max_restarts"}  # torchrun's
    assert set(re.findall(r"(?<![\w-])--\w+", README)) - names == others
    assert all(action.help for _, action in ACTIONS if action.dest != "command")


# ----------------------------------------------------------------------------------------------------------------
# Wrong values. Numbers and choices are attacked alike; a flag with words of its own has to be in WORDS.

NO_NUMBERS = {int: ["x", "1.5", "nan", "inf", ""], float: ["x", "nan", "", "1,5"]}
OUTSIDE = {int: ["-1", "0", str(10**20)], float: ["-1", "-inf", "1e30", "inf"]}
FINE = {"seed": OUTSIDE[int], "workers": ["0"], "sigma_mean": ["-1"], "clip": ["1e30", "inf"]}  # of these, what makes sense for a flag
WORDS = {  # by flag or positional: wrong values of it
    "data": ["absent.csv", "file", "."], "cache": ["absent", "file"], "checkpoint": ["absent", "file", "photos"], "input": ["absent.png", "absent/*.png", "file"],
    "model": ["absent", "a/b/c", "file"], "compare": ["absent", "file"], "photos": ["absent", "file"], "image": ["absent.png", "file", "photos"],
    "out": ["file/below"], "output": ["file/below.png", "o.xyz", "o"], "grid": ["g.xyz", "g"], "resume": ["absent", "file"],
    "device": ["moon", "cuda:99", "", "cpu:x", "meta"], "ema_device": ["moon", "meta"], "lpips_weights": ["absent file"], "fid_weights": ["absent", "file"],
    "curriculum": ["x", "32", "32:", "32:x", "0:5", "32:0", "-32:5", "32:-5", "32:5,", "32:1e3", "nan:5", f"{10**9}:5", f"32:{10**20}", f"32:5,{10**9}:5"],
    "sweep": ["x", "0", "-1", "1,", ",1", "1.5", "1,x", "1;2", "nan", "99999"],
    "degradations": ["fog", "jpeg jpeg", "jpeg:x", "jpeg:quality", "jpeg:quality=x", "jpeg:quality=0", "jpeg:quality=101", "jpeg:quality=1.5", "jpeg:sigma=3",
                     "gaussian_noise:sigma=-1", "gaussian_noise:sigma=nan", "gaussian_noise:sigma=inf", "gaussian_blur:kernel=4", "gaussian_blur:kernel=0",
                     f"gaussian_blur:kernel={10**9 + 1}", "poisson_noise:scale=0", "downscale:factor=0", "downscale:factor=nan", "color_jitter:contrast=-1"],
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
    positional = {"data pairs": {"photos": "photos"}, "data cache": {}, "degrade": {"image": "a.png", "out": "o.png"}, "model export": {"checkpoint": "run", "out": "new"}}[command]
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
    return {"degrade": {"out": ["o.xyz", "o", "file/o.png"]}}.get(command, {}).get(name) or WORDS[name]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_value_gets_one_line_that_names_it(command, place, monkeypatch, capsys):
    class Accepted(Exception):
        pass

    def accept(*_, **__):
        raise Accepted
    monkeypatch.chdir(place), monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(train, "State", accept), monkeypatch.setattr(evaluate, "evaluate_pairs", accept)
    before = sorted(path for path in place.rglob("*") if path.is_file())
    cases, wrong = [(action.dest, value) for c, action in ACTIONS if c == command for value in wrong_values(command, action)], []
    for name, value in cases:
        try:
            in_process(COMMANDS[command], words_for(command, name, value), monkeypatch)
            ended = "it was accepted"
        except Accepted:
            ended = "it was accepted"
        except SystemExit as error:
            ended = error.code
        except Exception as error:
            ended = repr(error)
        lines = capsys.readouterr().err.splitlines()
        part = next((word for word in (value, *value.split()) if word and any(word in line for line in lines)), None)
        if ended != 2 or len(lines) != 1 or not lines[0].startswith("error: ") or not (f"--{name}" in lines[0] or part):
            wrong.append((name, value, ended, lines))
        written = sorted(path for path in place.rglob("*") if path.is_file())
        if written != before:
            wrong.append((name, value, "wrote", set(written) - set(before)))
            before = written
    assert len(cases) > 3 and not wrong, "\n".join(map(str, wrong))
