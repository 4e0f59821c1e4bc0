"""The check of published weights: on random ones every part is off, on an oracle they are ok."""

import json
import math
import re
import shutil

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2Model

import published as checks
from bench import DC_AE_F32C32, SANAS
from degrade import UserError
from model import Sana
from test_commands import run
from test_pretrained import WEIGHTS, edit_json
from vae import PixelAE

SIZE = 64
SANA_0_6B = {
    "num_layers": 28,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}


def lines_of(output):
    """Return {name of a part: its line} of what the check prints."""
    lines = {}
    for line in output.splitlines():
        found = re.match(r"(ok |OFF)  (.+?): .* \| expected: ", line)
        if found:
            lines[found[2]] = line
    return lines


# --------------------------------------------------------------------------------------------------
# On random weights, and on damaged folders.


def test_on_random_weights_every_part_is_off(pipeline_folder, tmp_path):
    command = "tests/published.py", "--model", pipeline_folder, "--device", "cpu", "--size", SIZE
    (tmp_path / "seen").mkdir()  # of a run before
    output = run(*command, "--out", "seen", cwd=tmp_path, status=1)
    lines = lines_of(output)
    assert len(lines) == 15
    assert all(line.startswith("OFF") for line in lines.values())
    assert output.endswith("15 of 15 parts are off\n")
    assert "Traceback" not in output and "Error" not in output
    assert {path.name for path in (tmp_path / "seen").iterdir()} == {"euler.png", "dpm.png"}


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_raises_is_a_line(pipeline_folder, tmp_path, monkeypatch, capsys, part):
    folder = shutil.copytree(pipeline_folder, tmp_path / "damaged")
    shutil.rmtree(folder / part)
    results = checks.check_model(model_of(folder), True, tmp_path)
    output = capsys.readouterr().out
    assert results == [False] * 14
    assert len(lines_of(output)) == len(output.splitlines()) == 14
    damaged = output.count("UserError")
    assert damaged == {"transformer": 10, "vae": 12, "text_encoder": 10}.get(part, damaged) > 0


def test_the_training_process_fails_in_a_line(tmp_path, capsys):
    pixels, _, _ = checks.bundled_photos(SIZE)
    (tmp_path / "none").mkdir()
    assert not checks.check("five", "", checks.training, tmp_path / "none", pixels, "cpu", tmp_path)
    line = lines_of(capsys.readouterr().out)["five"]
    assert line.startswith("OFF") and "no diffusion_pytorch_model.safetensors" in line


# --------------------------------------------------------------------------------------------------
# On an oracle.


def model_of(folder):
    pixels, captions, _ = checks.bundled_photos(SIZE)
    return checks.Published(folder, pixels, captions)


@pytest.fixture
def scaled(pipeline_folder, tmp_path):
    """The toy pipeline with a scaling factor that fits its latents."""
    folder = shutil.copytree(pipeline_folder, tmp_path / "scaled")
    config = folder / "vae/config.json"
    factor = json.loads(config.read_text())["scaling_factor"]
    edit_json(config, scaling_factor=factor / model_of(folder).latents.std().item())
    return folder


def use_oracle(monkeypatch, latents, error=lambda velocity, text: 0):
    """Have every transformer answer the velocity to the nearest of latents, and an error.

    Of pure noise none is nearer than the others.
    """

    def forward(self, x, timestep, text, text_mask=None):
        sigma = (timestep / 1000)[:, None, None, None]
        answers = []
        for one, s in zip(x, sigma):
            distance = (one - (1 - s) * latents).square().flatten(1).sum(1)
            answers.append((one - latents[distance.argmin()]) / s)
        velocity = torch.stack(answers)
        return velocity + error(velocity, text)

    monkeypatch.setattr(Sana, "forward", forward)


def verdicts(p, out, capsys):
    checks.check_model(p, True, out)
    lines = lines_of(capsys.readouterr().out)
    return {name: line.startswith("ok") for name, line in lines.items()}


FLOW = [f"flow loss, sigma {sigma}" for sigma in checks.SIGMAS]
ORACLE = [
    *FLOW,
    "flow loss, empty caption",
    "flow loss, no instruction",
    "picture, euler",
    "picture, dpm",
    "untrained restorer and text-to-image",
    "latents, standard deviation",
]


def test_on_an_oracle_what_depends_on_the_transformer_is_ok(scaled, tmp_path, monkeypatch, capsys):
    p = model_of(scaled)
    use_oracle(monkeypatch, p.latents)
    found = verdicts(p, tmp_path, capsys)
    assert [name for name, ok in found.items() if ok] == sorted(ORACLE, key=list(found).index)


@pytest.mark.parametrize(
    "error, off",
    [
        # the velocity the other way round; an answer of 0; no number
        (lambda velocity, text: -2 * velocity, ORACLE[:-1]),
        (lambda velocity, text: -velocity, ORACLE[:-1]),
        (lambda velocity, text: math.nan, ORACLE[:-1]),
        # it errs with all captions but the empty one, which is a single token
        (lambda velocity, text: 0.1 * (text.shape[1] > 1), ["flow loss, empty caption"]),
    ],
)
def test_an_oracle_that_errs_is_noticed(scaled, tmp_path, monkeypatch, capsys, error, off):
    p = model_of(scaled)
    use_oracle(monkeypatch, p.latents, error)
    found = verdicts(p, tmp_path, capsys)
    assert set(ORACLE) - {name for name, ok in found.items() if ok} == set(off)


@pytest.mark.parametrize("noise, ok", [(0.08, True), (0.2, False), (0.001, False)])
def test_a_round_trip_is_ok_within_its_limits(tmp_path, noise, ok):
    """0.08 of a range of 2 are 28 dB, 0.2 are 20 dB, 0.001 are 66 dB."""

    class Lossy(PixelAE):
        def decode(self, latents):
            pixels = super().decode(latents)
            generator = torch.Generator().manual_seed(0)
            return pixels + noise * torch.randn(pixels.shape, generator=generator)

    p = model_of(tmp_path)
    p.autoencoder = Lossy(4)
    assert checks.round_trip(p, 26, 32)[1] == ok


@pytest.mark.parametrize(
    "change, ok",
    [({}, True), ({"loss": 1.6}, False), ({"skipped": 1}, False), ({"step": 4}, False)],
)
def test_the_log_of_five_steps_is_judged(change, ok):
    first = {"step": 0, "restored_psnr": 20.0}
    line = {"step": 5, "loss": 0.7, "skipped": 0, "images_per_second": 8.0, "memory_gb": 29.04}
    log = "\n".join(json.dumps(entry) for entry in (first, line | change, first | {"step": 5}))
    figure, holds = checks.judge_log(log, 4)
    assert holds == ok
    assert "0.50 s" in figure and "29.0 GB" in figure


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part, model, theirs, config",
    [
        ("transformer", "SANA 1.5 1.6B", SanaTransformer2DModel, SANAS["sana1.5-1.6b"]),
        ("transformer", "SANA 1.5 4.8B", SanaTransformer2DModel, SANAS["sana1.5-4.8b"]),
        ("transformer", "SANA 1.0 1.6B", SanaTransformer2DModel, {}),
        ("transformer", "SANA 1.0 0.6B", SanaTransformer2DModel, SANA_0_6B),
        ("vae", "DC-AE f32c32", AutoencoderDC, DC_AE_F32C32),
        ("text_encoder", "Gemma-2-2b", Gemma2Model, {}),
    ],
)
def test_counts_names_and_shapes_are_those_of_the_peers_classes(part, model, theirs, config):
    """The defaults of diffusers and transformers are SANA 1.0 1.6B and Gemma-2-2b."""
    with torch.device("meta"):
        if theirs is Gemma2Model:
            peer = Gemma2Model(Gemma2Config())
        else:
            peer = theirs(**config)
        ours = checks.NETWORKS[part](config)
    expected = peer.state_dict()
    got = ours.state_dict()
    assert {name: t.shape for name, t in got.items()} == {n: t.shape for n, t in expected.items()}
    numbers = sum(tensor.numel() for tensor in expected.values())
    assert checks.COUNTS[part][model] == (len(expected), numbers)
    assert len(checks.COUNTS) == 3 and len(checks.COUNTS["transformer"]) == 4


def test_names_and_shapes_that_do_not_fit_are_counted(pipeline_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(pipeline_folder, tmp_path / "toy")
    count = len(load_file(folder / "transformer" / WEIGHTS)), 33_464
    monkeypatch.setitem(checks.COUNTS["transformer"], "toy", count)
    assert checks.tensors(folder, "transformer") == ("62 tensors of 33,464 numbers, toy", True)
    weights = load_file(folder / "transformer" / WEIGHTS)
    weights["renamed"] = weights.pop("proj_out.bias")
    weights["patch_embed.proj.bias"] = weights["patch_embed.proj.bias"][:, None]
    save_file(weights, folder / "transformer" / WEIGHTS)
    figure, holds = checks.tensors(folder, "transformer")
    assert not holds and "3 do not fit config.json, such as proj_out.bias" in figure


def test_own_photos_need_captions(photos, tmp_path):
    lines = ["image_path,caption"] + [f"{photos}/0{i}.png,a picture" for i in range(3)]
    table = tmp_path / "own.csv"
    for last in ("", f"{photos}/03.png,"):
        table.write_text("\n".join([*lines, last]))
        with pytest.raises(UserError, match="four photos"):
            checks.own_photos(table, 80)
    table.write_text("\n".join([*lines, f"{photos}/03.png,a"]))
    pixels, captions, enlarged = checks.own_photos(table, 80)
    assert pixels.shape == (4, 3, 80, 80) and captions[3] == "a" and not enlarged
    assert checks.own_photos(table, 81)[2]
