"""The named cases of every attack and some drawn ones; tests/stress.py does thousands."""

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import attacks
from data import list_images
from degrade import UserError, open_image
from evaluate import LPIPS_TRUNK, list_work, read_published
from model import Sana
from test_commands import run
from vae import load_pretrained


def test_tables(tmp_path):
    counts, wrong = attacks.tables(tmp_path, range(130))
    assert not wrong, "\n".join(wrong)
    assert counts.total() == 130 and counts["worked"] >= 20 and counts["refused"] >= 80, counts


def test_pictures(tmp_path):
    counts, wrong = attacks.pictures(tmp_path, range(160))
    assert not wrong, "\n".join(wrong)
    assert counts.total() == 160 and counts["worked"] >= 50 and counts["refused"] >= 80, counts


def test_weight_files(pipeline_folder, tmp_path):
    """15 files in 30 named ways each, two of which work."""
    counts, wrong = attacks.weight_files(tmp_path, range(540), pipeline=pipeline_folder)
    assert not wrong, "\n".join(wrong)
    assert counts.total() == 540 and counts["worked"] >= 36 and counts["refused"] >= 450, counts


def test_an_attack_that_succeeds_is_noticed(tmp_path):
    """Each way in which a case can go wrong."""

    def case(n):
        if n == 0:
            raise KeyError("a traceback")
        if n == 1:
            return attacks.attempt(lambda: open_image(tmp_path / "gone.png"), "another.png")
        if n == 2:
            os.kill(os.getpid(), 9)
        if n == 3:
            os.write(2, b"a line, and\nanother\n")
        if n == 4:
            return attacks.attempt(lambda: print("one\ntwo"), "")
        if n == 5:
            np.zeros(2**33, np.uint8)[::4096] = 1
        return "worked"

    counts, wrong = attacks.attack(case, range(7))
    assert counts == {"worked": 2}
    noticed = [
        "case 0: KeyError",
        "case 1: AssertionError",
        "case 2: the process died",
        "on stderr: a line, and",
        "case 4",
        "case 5",
        "MemoryError",
    ]
    for words in noticed:
        assert any(words in problem for problem in wrong), (words, wrong)


def test_weights_that_are_not_finite_are_named(pipeline_folder, tmp_path):
    config = (pipeline_folder / "transformer/config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    good = load_file(pipeline_folder / "transformer" / path.name)
    spoiled = "transformer_blocks.1.attn2.to_k.weight"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for value in (float("nan"), float("inf"), -float("inf")):
            tensors = {name: tensor.to(dtype) for name, tensor in good.items()}
            tensors[spoiled][5, 3] = value
            save_file(tensors, path)
            says = f"{path.name}: {spoiled} holds values that are not finite"
            with pytest.raises(UserError, match=says):
                load_pretrained(Sana, tmp_path)
    large = {}
    for name, tensor in good.items():
        large[name] = torch.full_like(tensor, 60_000, dtype=torch.float16)
    save_file(large, path)
    assert next(load_pretrained(Sana, tmp_path).parameters()).max() == 60_000


def test_nothing_is_unpickled_from_a_users_path(tmp_path):
    trap = attacks.Trap(tmp_path / "ran")
    (tmp_path / "0.pth").write_bytes(pickle.dumps(trap))
    (tmp_path / "1.pth").write_bytes(attacks.archive(trap))
    os.mkfifo(tmp_path / "pipe.pth")
    for name in ("0.pth", "1.pth", "pipe.pth"):
        with pytest.raises(UserError, match=name):
            read_published(LPIPS_TRUNK, tmp_path / name)
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "0.pth").read_bytes())
    assert (tmp_path / "ran").exists()  # the trap works


def test_what_the_scripts_answer_to_what_is_no_file(tmp_path):
    paths = attacks.special_files(tmp_path, ".png")
    commands = [
        ["degrade.py", paths["pipe"], "o.png"],
        ["degrade.py", paths["folder"], "o.png"],
        ["train.py", "--data", paths["pipe"]],
    ]
    for command in commands:
        assert "not a file" in run(*command, cwd=tmp_path, status=2)
    assert not (tmp_path / "o.png").exists()
    Image.new("RGB", (9, 8)).save(tmp_path / "good.png")
    assert list_images(tmp_path) == [tmp_path / "good.png"]
    work = list_work([str(paths["pipe"])], tmp_path / "out.png")
    with pytest.raises(UserError, match="attack_pipe.png: not a file"):
        open_image(work[0][0])


def test_an_error_is_one_line():
    """Also as it comes from a worker process."""
    assert str(UserError("a\nb\x1b[2Jé\0")) == "a b [2Jé "
    assert str(pickle.loads(pickle.dumps(UserError("a\nb")))) == "a b"
