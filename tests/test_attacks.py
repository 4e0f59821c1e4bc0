"""A few cases of every kind of attack; tests/attacks.py does thousands."""

import math
import os
import pickle
import shutil

import attacks
import numpy as np
import pytest
import torch
from attacks import Case, Trap, attack
from safetensors.torch import load_file, save_file

from degrade import UserError
from evaluate import LPIPS_TRUNK, read_published
from model import Sana
from vae import load_pretrained

# drawn cases, all cases, those that must work and those that must be refused at least
COUNTS = {
    "tables": (40, 57, 3, 14),
    "pictures": (100, 117, 18, 57),
    "kills": (2, 6, 6, 0),
    "sizes": (10, 2, 2, 0),
}


@pytest.mark.parametrize("kind", COUNTS)
def test_attacks(kind, tmp_path):
    draws, total, worked, refused = COUNTS[kind]
    make_cases, _ = attacks.KINDS[kind]
    counts, wrong = attack(make_cases(tmp_path, draws), tmp_path)
    assert not wrong, "\n".join(wrong)
    assert counts.total() == total, counts
    assert counts["worked"] >= worked and counts["refused"] >= refused, counts


def test_attacks_on_weights(pipeline_folder, tmp_path):
    """Five files: whole, replaced in twelve ways, and damaged in six."""
    counts, wrong = attack(attacks.weights(tmp_path, 30, pipeline_folder), tmp_path)
    assert not wrong, "\n".join(wrong)
    assert counts.total() == 5 * 19 and counts["worked"] >= 5 and counts["refused"] >= 5 * 12


def test_an_attack_that_succeeds_is_noticed(tmp_path):
    """Each way in which a case can go wrong."""
    (tmp_path / "known.txt").write_text("whole")

    def refuse():
        raise UserError("a line that names nothing")

    def hang():
        while True:
            pass

    cases = [
        Case("raises", lambda: {}["gone"]),
        Case("names nothing", refuse, named="known.txt"),
        Case("works", lambda: None, tmp_path / "known.txt", b"bad", "refused"),
        Case("says two lines", lambda: print("one\ntwo")),
        Case("writes", lambda: os.write(2, b"a line, and\nanother\n")),
        Case("takes memory", lambda: np.zeros(2**33, np.uint8)),
        Case("fine", lambda: None),
        Case("runs", lambda: (tmp_path / "ran").mkdir()),
        Case("hangs", hang, seconds=1),
    ]
    counts, wrong = attack(cases, tmp_path)
    assert counts == {"worked": 2, "wrong": 6}
    found = [problem.split(":")[0] for problem in wrong]
    noticed = ["raises", "names nothing", "works", "says two lines", "takes memory", "runs"]
    assert found == [*noticed, "hangs", "on stderr", "on stderr"]
    assert (tmp_path / "known.txt").read_text() == "whole"


def test_weights_that_are_not_finite_are_named(pipeline_folder, tmp_path):
    shutil.copy(pipeline_folder / "transformer/config.json", tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    good = load_file(pipeline_folder / "transformer" / path.name)
    spoiled = "transformer_blocks.1.attn2.to_k.weight"
    for dtype, value in [(torch.float32, math.nan), (torch.bfloat16, math.inf)]:
        tensors = {name: tensor.to(dtype) for name, tensor in good.items()}
        tensors[spoiled][5, 3] = value
        save_file(tensors, path)
        says = f"{path.name}: {spoiled} holds values that are not finite"
        with pytest.raises(UserError, match=says):
            load_pretrained(Sana, tmp_path)


def test_nothing_is_unpickled_from_a_users_path(tmp_path):
    trap = Trap(tmp_path / "ran")
    (tmp_path / "0.pth").write_bytes(pickle.dumps(trap))
    torch.save(trap, tmp_path / "1.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    for name in ("0.pth", "1.pth", "pipe.pth"):
        with pytest.raises(UserError, match=name):
            read_published(LPIPS_TRUNK, tmp_path / name)
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "0.pth").read_bytes())
    assert (tmp_path / "ran").exists()  # the trap works


def test_an_error_is_one_line():
    assert str(UserError("a\nb\x1b[2Jé\0")) == "a b [2Jé "
