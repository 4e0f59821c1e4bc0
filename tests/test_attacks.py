"""The named cases of every attack and some drawn ones (tests/stress.py does thousands); what the scripts answer; weights that are not finite."""
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import attacks
from degrade import UserError, list_images, list_work, one_line, open_image
from model import Sana
from test_commands import run
from vae import read_published


@pytest.mark.parametrize("attack, count, worked, refused", [(attacks.tables, 130, 20, 80), (attacks.pictures, 160, 50, 80)])
def test_tables_and_pictures(attack, count, worked, refused, tmp_path):
    counts, wrong = attack(tmp_path, range(count))
    assert not wrong, "\n".join(wrong)
    assert sum(counts.values()) == count and counts["worked"] >= worked and counts["refused"] >= refused, counts


def test_weight_files(pipeline_folder, tmp_path):
    counts, wrong = attacks.weight_files(tmp_path, range(540), pipeline=pipeline_folder)
    assert not wrong, "\n".join(wrong)
    assert sum(counts.values()) == 540 and counts["worked"] >= 36 and counts["refused"] >= 460, counts  # 15 files, whole and linked; six without prompts


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
    for words in ("case 0: KeyError", "case 1: AssertionError", "case 2: the process died", "on stderr: a line, and", "case 4", "case 5", "MemoryError"):
        assert any(words in problem for problem in wrong), (words, wrong)


def test_weights_that_are_not_finite_are_named(pipeline_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((pipeline_folder / "transformer/config.json").read_bytes())
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    good = load_file(pipeline_folder / "transformer" / path.name)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for value in (float("nan"), float("inf"), -float("inf")):
            tensors = {name: tensor.to(dtype) for name, tensor in good.items()}
            tensors["transformer_blocks.1.attn2.to_k.weight"][5, 3] = value
            save_file(tensors, path)
            with pytest.raises(UserError, match=r"diffusion_pytorch_model.safetensors: transformer_blocks.1.attn2.to_k.weight holds values that are not finite"):
                Sana.from_pretrained(tmp_path)
    save_file({name: torch.full_like(tensor, 60_000, dtype=torch.float16) for name, tensor in good.items()}, path)  # large, but numbers
    assert next(Sana.from_pretrained(tmp_path).parameters()).max() == 60_000


def test_nothing_is_unpickled_from_a_users_path(tmp_path):
    for i, content in enumerate((pickle.dumps(attacks.Trap(tmp_path / "ran")), attacks.archive(attacks.Trap(tmp_path / "ran")))):
        (tmp_path / f"{i}.pth").write_bytes(content)
        with pytest.raises(UserError, match=f"{i}.pth"):
            read_published("alex", tmp_path / f"{i}.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(UserError, match="pipe.pth: .*no such file"):
        read_published("alex", tmp_path / "pipe.pth")
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "0.pth").read_bytes())
    assert (tmp_path / "ran").exists()  # the trap works


def test_what_the_scripts_answer_to_what_is_no_file(photos, tmp_path):
    paths = attacks.special_files(tmp_path, ".png")
    for command in ["degrade.py", paths["pipe"], "o.png"], ["degrade.py", paths["folder"], "o.png"], ["train.py", "--data", paths["pipe"]]:
        assert "not a file" in run(*command, cwd=tmp_path, status=2)
    assert not (tmp_path / "o.png").exists()
    Image.new("RGB", (9, 8)).save(tmp_path / "good.png")
    assert list_images(tmp_path) == [tmp_path / "good.png"]
    work = list_work([str(tmp_path / "attack_pipe.png")], tmp_path / "out.png")
    with pytest.raises(UserError, match="attack_pipe.png: not a file"):
        open_image(work[0][0])


def test_one_line():
    assert one_line("a\nb\x1b[2Jé\0\udcff") == r"a\nb\x1b[2Jé\x00\udcff" and str(UserError("x\ny")) == r"x\ny"
    assert one_line("x" * 5000) == "x" * 600 + " ... " + "x" * 280
    assert str(pickle.loads(pickle.dumps(UserError("a\nb")))) == r"a\nb"  # as it comes from a worker process
