"""What has to hold on a GPU: parity, optimizer, resume, memory. Without one: the same on the CPU.

    python -m pytest tests -k cuda
"""

import contextlib

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model

import bench
import model
import test_train
import train
import vae
from data import to_tensor
from evaluate import Pipeline
from memory import restorer_memory
from model import Gemma2, Sana
from pipeline import DC_AE, GEMMA, randomize
from test_model import QK_NORM, SMALL, inputs, randomized, seeded
from test_train import bf16_state, bf16_step, call, load_newest
from vae import DCAE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# of the largest number: fp32 to rounding (a GPU sums in another order), bf16 no worse than the peer
FP32 = 1e-4


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """No TF32 in convolutions, nor in DC-AE's Linears (in others there is none)."""
    monkeypatch.setattr(vae, "tf32", contextlib.nullcontext)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def error(got, exact):
    return ((got.float().cpu() - exact).norm() / exact.norm()).item()


def compare(ours, theirs, exact):
    """Both networks' answers against fp32 on the CPU. ours, theirs: functions of a dtype."""
    assert error(ours(torch.float32), exact) < FP32
    half, peer = error(ours(torch.bfloat16), exact), error(theirs(torch.bfloat16), exact)
    assert half < 1.2 * peer + 1e-3


def test_cuda_sana():
    theirs = randomized(SanaTransformer2DModel(**SMALL, **QK_NORM).float().eval())
    ours = Sana(SMALL | QK_NORM)
    ours.load_state_dict(theirs.state_dict())
    latents, timestep, text, text_mask = inputs()

    def run_theirs(dtype, device=DEVICE):
        net = theirs.to(device, dtype)
        given = [t.to(device) for t in (latents.to(dtype), text.to(dtype), timestep, text_mask)]
        with torch.no_grad():
            return net(*given[:3], encoder_attention_mask=given[3], return_dict=False)[0]

    def run_ours(dtype):
        net = ours.to(DEVICE, dtype)
        given = [latents.to(dtype), timestep, text.to(dtype), text_mask]
        with torch.no_grad():
            return net(*[t.to(DEVICE) for t in given])

    exact = run_theirs(torch.float32, "cpu")
    compare(run_ours, run_theirs, exact)


def test_cuda_autoencoder():
    theirs = randomize(AutoencoderDC(**DC_AE), scale=0.15)
    ours = DCAE(DC_AE).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(1, 3, 64, 96, generator=seeded())

    def run_theirs(dtype, device=DEVICE):
        net = theirs.to(device, dtype)
        with torch.no_grad():
            return net.decode(net.encode(pixels.to(device, dtype)).latent).sample

    def run_ours(dtype):
        net = ours.to(DEVICE, dtype)
        return net.decode(net.encode(pixels.to(DEVICE)))

    compare(run_ours, run_theirs, run_theirs(torch.float32, "cpu"))


def test_cuda_gemma():
    theirs = randomize(Gemma2Model(Gemma2Config(vocab_size=300, **GEMMA)), 1, 0.1)
    ours = Gemma2(theirs.config.to_dict())
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(300, (2, 12), generator=seeded())
    mask = torch.arange(12) < torch.tensor([[12], [7]])

    def run_theirs(dtype, device=DEVICE):
        net = theirs.to(device, dtype)
        with torch.no_grad():
            states = net(ids.to(device), attention_mask=mask.to(device)).last_hidden_state
        return states[mask.to(device)]

    def run_ours(dtype):
        net = ours.to(DEVICE, dtype)
        with torch.no_grad():
            return net(ids.to(DEVICE), mask.to(DEVICE))[mask.to(DEVICE)]

    compare(run_ours, run_theirs, run_theirs(torch.float32, "cpu"))


# on a card: a compiler for CPUs need not be there
@pytest.mark.parametrize("compiled", [False, True] if DEVICE == "cuda" else [False])
def test_cuda_optimizer_takes_the_steps_of_the_cpu(compiled, monkeypatch):
    """To rounding in fp32; the second moment may round up where the CPU rounds it down."""
    start = torch.randn(5000, generator=seeded())
    exact = bf16_state(start)
    ours = {name: tensor.to(DEVICE) for name, tensor in bf16_state(start).items()}
    for step in range(1, 31):
        gradient = torch.randn(5000, generator=seeded(step)).bfloat16()
        bf16_step(exact, gradient, step, 1e-3, decay=0.01, share=0.01)
        with monkeypatch.context() as patch:
            if compiled:
                update = train.compile_update(DEVICE)
                patch.setattr(test_train, "adamw_bf16", update)
            bf16_step(ours, gradient.to(DEVICE), step, 1e-3, decay=0.01, share=0.01)
    joined = train.join_fp32(ours["weight"], ours["low"]).cpu()
    apart = (joined - train.join_fp32(exact["weight"], exact["low"])).abs()
    assert apart.max() <= 1e-4 and apart.mean() <= 1e-6
    assert (ours["average"].cpu() - exact["average"]).abs().max() <= 1e-5


@pytest.mark.parametrize("flags", [[], ["--lora", 2]])
def test_cuda_resume(flags, photos_csv, pipeline_folder, tmp_path):
    """Six steps, and three and three: to rounding, since a GPU's sums have no fixed order."""
    flags = ["--data", photos_csv, "--model", pipeline_folder, "--device", DEVICE, *flags]
    flags += ["--resolution", 32, "--batch_size", 2, "--steps", 6, "--lr", 1e-3]
    flags += ["--val_every", 6, "--save_every", 3]
    call("train.py", *flags, "--out", "whole", cwd=tmp_path)
    call("train.py", *flags, "--out", "half", cwd=tmp_path, stop=3)
    call("train.py", "--resume", "half", cwd=tmp_path)
    ends = [model.read_run(tmp_path / name)["validation"] for name in ("half", "whole")]
    assert ends[0]["restored_psnr"] == pytest.approx(ends[1]["restored_psnr"], abs=0.05)
    a, b = load_newest(tmp_path / "half", "ema"), load_newest(tmp_path / "whole", "ema")
    assert all(error(a[key], b[key]) < 1e-2 for key in a if b[key].norm() > 1e-3)


@pytest.mark.parametrize("flags", ["", "--lora 2 --checkpointing"])
def test_cuda_memory_is_what_the_estimate_says(flags):
    """Weights, moments and averages by what a State holds, the rest by its order."""
    args = bench.settings_of(f"--resolution 128 --optimizer adamw_bf16 {flags}", DEVICE)
    if args.lora:
        args.optimizer = "adamw"
    config = bench.card_config(SMALL | QK_NORM, args.lora)
    state = bench.train_row(config, args)
    assert state.step == 2
    weights = sum(p.nbytes for p in state.module.parameters())
    moments = 0
    for kept in state.moments.values():
        weights += kept["low"].nbytes if "low" in kept else 0
        moments += kept["exp_avg"].nbytes + kept["exp_avg_sq"].nbytes
    autoencoder = DCAE(DC_AE)
    about = {"count": 4, "side": 128, "base_bytes": 2 if DEVICE == "cuda" else 4}
    sizes = restorer_memory(config, autoencoder, args.optimizer, **about)
    assert sizes["weights"] == pytest.approx(weights, rel=0.02)
    assert sizes["moments"] == pytest.approx(moments, rel=0.02)
    assert sizes["average"] == sum(t.nbytes for t in state.average.values())
    assert sizes["autoencoder"] == sum(p.nbytes for p in autoencoder.parameters())
    spared = restorer_memory(config, autoencoder, args.optimizer, checkpointing=True, **about)
    assert 0 < spared["activations"] < sizes["activations"]


def test_cuda_a_pretrained_run_restores_in_bf16(pipeline_folder, photo, tmp_path):
    """Within the rounding of bf16 of what the CPU makes of it in fp32."""
    flags = ["--model", pipeline_folder, "--batch_size", 2, "--resolution", 32]
    flags += ["--val_every", 2, "--steps", 2, "--device", DEVICE, "--out", "run"]
    call("train.py", *flags, cwd=tmp_path)
    small = photo.resize((96, 64))
    exact = to_tensor(Pipeline.load(tmp_path / "run")(small, steps=2))
    pipeline = Pipeline.load(tmp_path / "run", DEVICE)
    if DEVICE == "cpu":
        assert pipeline.restorer.sana.proj_out.weight.dtype == torch.float32
        pipeline.restorer.sana.bfloat16()
    assert pipeline.restorer.sana.proj_out.weight.dtype == torch.bfloat16
    assert pipeline.restorer.projection.weight.dtype == torch.float32
    restored = to_tensor(pipeline(small, steps=2))
    assert 0 < (restored - exact).abs().mean() < 0.02
