"""Ours beside the peers, in one process, interleaved, same weights and inputs, outputs compared.

    python tests/bench.py [--quick] [--threads 2] [WHAT ...]
    python tests/bench.py --gpu [--quick]      on a CUDA card: at full size, in bf16

transformer   SANA's forward and backward, and a sampling step, at the 1.6B model's width
autoencoder   DC-AE f32c32, time and memory
decoder       the one that sees the degraded image, beside the plain one; a step of its training
optimizer     a step of AdamW in bf16: time, and bytes a parameter that stay between steps
degradations  the six, and random recipes
loader        training crops from photos
check         what is looked at before training starts
metrics       PSNR, SSIM, LPIPS, FID
tiny          the preset: training, and restoring a photo, beside plain convolutions
convolutions  they, trained for --minutes: what they reach (not part of all)
memory        the table by card, derived from the shapes; with --gpu measured too
cost          a training step at full size, part by part: on a pretend GPU counted from the shapes
              (not part of all); with --gpu measured

Milliseconds are medians. On Linux set MALLOC_MMAP_THRESHOLD_=1073741824 and
MALLOC_TRIM_THRESHOLD_=1073741824: without them both sides wait for the system's memory.
"""

import argparse
import contextlib
import ctypes
import math
import os
import statistics
import tempfile
import threading
import time
from argparse import Namespace
from pathlib import Path
from unittest import mock

import conftest  # noqa: F401, first: puts the project on the path, and torchvision needs it
import numpy as np
import torch
from PIL import Image

import data
import model
import train
import vae
from data import dead_leaves, to_tensor
from degrade import DEGRADATIONS, parse_degradations, random_degradation
from evaluate import LPIPS, Metrics, Pipeline, evaluate_pairs, frechet_distance, means
from evaluate import psnr, ssim
from memory import TOKENS, decoder_memory, restorer_memory
from model import PRESETS, Prompts, Sana, build_restorer, flow_loss, sample_euler
from train import adamw_bf16, join_fp32
from vae import DCAE, PixelAE, decoder_loss, trained_weights

WHERE = Namespace(
    device="cpu", dtype=torch.float32, layers=2, steps=1, side=512, tolerance=1e-3, threads=2
)
GPU = Namespace(device="cuda", dtype=torch.bfloat16, layers=20, steps=20, side=1024, tolerance=5e-2)
SANA_1_6B = {"qk_norm": "rms_norm_across_heads", "sample_size": 32}  # the rest are the defaults
WIDTHS = [128, 256, 512, 512, 1024, 1024]
KINDS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
SCALES = [[], [], [], [5], [5], [5]]
DC_AE_F32C32 = {  # SANA's
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": KINDS,
    "decoder_block_types": KINDS,
    "encoder_block_out_channels": WIDTHS,
    "decoder_block_out_channels": WIDTHS,
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3] * 6,
    "encoder_qkv_multiscales": SCALES,
    "decoder_qkv_multiscales": SCALES,
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}

# --------------------------------------------------------------------------------------------------
# Measuring.


def interleaved(rounds, **runs):
    """Call each function in turn -> {name: median seconds}. The first round only warms up."""
    seconds = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, function in runs.items():
            start = time.perf_counter()
            function()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def synchronize():
    if WHERE.device == "cuda":
        torch.cuda.synchronize()


def peak(function):
    """Call it -> GB by which this process's (the card's) memory grew meanwhile."""
    if WHERE.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must be grown again
    before = resident()
    seen = [before]
    stop = threading.Event()

    def watch():
        while not stop.wait(0.002):
            seen.append(resident())

    thread = threading.Thread(target=watch)
    thread.start()
    function()
    stop.set()
    thread.join()
    return (max(seen) - before) / 1e9


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def compare(work, rounds, peer, ours, theirs, memory=True):
    """Measure two functions, and print a line of the table."""
    extra = f"  {peak(ours):6.2f} {peak(theirs):6.2f} GB" if memory else ""
    seconds = interleaved(rounds, ours=ours, theirs=theirs)
    print_row(work, seconds["ours"], seconds["theirs"], peer, extra)


def print_row(work, ours, theirs, peer, extra=""):
    times = f"{1000 * ours:9.1f} {1000 * theirs:9.1f} ms  {theirs / ours:5.2f}x"
    print(f"{work:52} {times}  {peer}{extra}", flush=True)


def same(a, b, tolerance=None):
    error = ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
    assert error < (tolerance or WHERE.tolerance), f"outputs differ by {error:.1e}"


def here(tensor):
    return tensor.to(WHERE.device, WHERE.dtype)


# --------------------------------------------------------------------------------------------------
# Networks.


def bench_transformer(quick):
    """A prompt of 32 tokens: the peer takes 300, of which the mask hides the others."""
    from diffusers import SanaTransformer2DModel

    batch, side, tokens = (1, 256, 32) if quick else (4, 512, 32)
    torch.manual_seed(0)
    theirs = here(SanaTransformer2DModel(num_layers=WHERE.layers, **SANA_1_6B))
    ours = here(Sana(SANA_1_6B | {"num_layers": WHERE.layers}))
    ours.load_state_dict(theirs.state_dict())
    latents = here(torch.randn(batch, 32, side // 32, side // 32))
    text = here(torch.randn(batch, 300, 2304))
    mask = torch.zeros(batch, 300, device=WHERE.device)
    mask[:, :tokens] = 1
    timestep = torch.full((batch,), 700.0, device=WHERE.device)

    def peer(x, t):
        about = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
        return theirs(x, timestep=t, **about).sample

    def train_ours():
        ours.zero_grad()
        ours(latents, timestep, text[:, :tokens], None).square().mean().backward()

    def train_theirs():
        theirs.zero_grad()
        peer(latents, timestep).square().mean().backward()

    train_ours()
    train_theirs()
    same(ours.patch_embed.proj.weight.grad, theirs.patch_embed.proj.weight.grad)
    what = f"SANA 1.6B, {WHERE.layers} layers, {side} px, batch {batch}: training"
    compare(what, 3 if quick else 7, "diffusers", train_ours, train_theirs)
    with torch.no_grad():
        network = lambda x, t: ours(x, t, text[:, :tokens])
        sample_ours = lambda: sample_euler(network, latents, WHERE.steps)
        sample_theirs = lambda: sample_euler(peer, latents, WHERE.steps)
        same(sample_ours(), sample_theirs())
        what = f"the same, sampling steps: {WHERE.steps}"
        compare(what, 3 if quick else 9, "diffusers", sample_ours, sample_theirs, memory=False)


def bench_autoencoder(quick):
    from diffusers import AutoencoderDC

    side = 128 if quick else WHERE.side
    torch.manual_seed(0)
    theirs = here(AutoencoderDC(**DC_AE_F32C32).eval())
    ours = here(DCAE(DC_AE_F32C32).eval())
    ours.load_state_dict(theirs.state_dict())
    pixels = here(torch.rand(1, 3, side, side) * 2 - 1)
    with torch.no_grad():
        latents = here(ours.encode(pixels) / ours.scaling)

        encode = lambda: ours.encode(pixels) / ours.scaling
        decode = lambda: ours.decode(latents * ours.scaling)
        their_encode = lambda: theirs.encode(pixels).latent
        their_decode = lambda: theirs.decode(latents).sample
        works = {"encode": (encode, their_encode), "decode": (decode, their_decode)}
        for work, (mine, yours) in works.items():
            same(mine(), yours())
            compare(f"DC-AE f32c32, {work} {side} px", 3, "diffusers", mine, yours)


def bench_decoder(quick):
    """f32c32 with random weights: 2 megapixels, and a step of training."""
    torch.manual_seed(0)
    config = dict(DC_AE_F32C32)
    if quick:  # a quarter of its widths
        widths = [width // 4 for width in WIDTHS]
        config |= {"encoder_block_out_channels": widths, "decoder_block_out_channels": widths}
    ours = DCAE(config).eval()
    plain = sum(p.numel() for p in ours.parameters())
    ours.add_skips().freeze_around_decoder().to(WHERE.device)
    trained = trained_weights(ours)
    skips = sum(p.numel() for p in ours.skips.parameters())
    rest = sum(p.numel() for p in trained.values()) - skips
    print(f"decoder: {plain:,} weights, {skips:,} in skips, {rest:,} others trained")
    height, width = (256, 384) if quick else (1152, 1792)
    degraded = (torch.rand(1, 3, height, width) * 2 - 1).to(WHERE.device)
    outputs, seconds, memory = [], [], []  # one call each: it takes minutes on a CPU
    with torch.no_grad():
        latents = ours.encode(degraded)
        for shown in ([degraded], []):

            def decode():
                outputs.append(ours.decode(latents, *shown))
                synchronize()

            before = time.perf_counter()
            memory.append(peak(decode))
            seconds.append(time.perf_counter() - before)
    same(*outputs, 1e-5)  # skips of zeros
    extra = f"  {memory[0]:6.2f} {memory[1]:6.2f} GB"
    print_row(f"decode {width}x{height} beside the degraded", *seconds, "plain decoder", extra)
    side = 128 if quick else 256
    clean = (torch.rand(1, 3, side, side) * 2 - 1).to(WHERE.device)
    latents = ours.encode(clean)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4, fused=True)

    def step():
        optimizer.zero_grad()
        decoder_loss(ours, latents, clean, clean, 1.0).mean().backward()
        optimizer.step()

    grown = peak(step)
    seconds = interleaved(2, ours=step)["ours"]
    print(f"a step of training, one crop of {side}: {seconds:.2f} s, {grown:.2f} GB more")


# --------------------------------------------------------------------------------------------------
# The optimizer.


class OurAdamW:
    """train.adamw_bf16 over a list of weights, with the state that train.State keeps."""

    def __init__(self, weights, lr, update):
        self.weights = weights
        self.lr = lr
        self.update = update
        self.count = 0
        self.state = {}
        for p in weights:
            self.state[p] = {
                "low": torch.zeros_like(p, dtype=torch.int16),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    @torch.no_grad()
    def step(self):
        self.count += 1
        t = self.count
        rate = -self.lr / (1 - train.BETA1**t)
        numbers = torch.tensor([1.0, rate, math.sqrt(1 - train.BETA2**t), 1.0, 0.0]).unbind()
        start = torch.tensor(0, dtype=torch.int32)
        for i, p in enumerate(self.weights):
            seed = torch.tensor(1000 * t + i, dtype=torch.int32)
            state = self.state[p]
            moments = state["exp_avg"], state["exp_avg_sq"]
            self.update(p, state["low"], p.grad, *moments, None, seed, start, numbers)


def bench_optimizer(quick):
    import optimi
    import torchao.optim

    count, lr = (4_000_000 if quick else 100_000_000), 1e-3
    start, gradients = [], []
    for i in range(20):
        generator = torch.Generator().manual_seed(i)
        start.append(torch.randn(count // 20, generator=generator).bfloat16())
        gradients.append(0.1 * torch.randn(count // 20, generator=generator).bfloat16())
    options = {"betas": (train.BETA1, train.BETA2), "eps": train.EPS, "weight_decay": 0.0}
    compiled = torch.compile(adamw_bf16, dynamic=True)
    makers = {
        "adamw: torch, fp32, fused": lambda p: torch.optim.AdamW(p, lr, fused=True, **options),
        "adamw_bf16: ours, eager": lambda p: OurAdamW(p, lr, adamw_bf16),
        "adamw_bf16: ours, compiled": lambda p: OurAdamW(p, lr, compiled),
        "optimi AdamW, Kahan": lambda p: optimi.AdamW(p, lr, **options, kahan_sum=True),
        "torchao AdamW, stochastic rounding": lambda p: torchao.optim._AdamW(
            p, lr, **options, bf16_stochastic_round=True
        ),
    }
    weights, optimizers, steps = {}, {}, {}
    for name, make in makers.items():
        dtype = torch.float32 if name.startswith("adamw:") else torch.bfloat16
        weights[name] = [torch.nn.Parameter(w.to(WHERE.device, dtype, copy=True)) for w in start]
        for p, grad in zip(weights[name], gradients):
            p.grad = grad.to(WHERE.device, dtype, copy=True)  # a peer writes into its gradients
        optimizers[name] = make(weights[name])
        steps[name] = optimizers[name].step
    seconds = interleaved(3 if quick else 5, **steps)
    reference = torch.cat([p.detach().float() for p in weights["adamw: torch, fp32, fused"]])
    about = f"{WHERE.device}, {torch.get_num_threads()} threads, lr {lr:g}"
    print(f"{count / 1e6:.0f} M parameters, {about}")
    print(f"{'optimizer':36} ms/step  bytes  mean |weight - fp32 AdamW's|")
    for name, optimizer in optimizers.items():
        bytes_kept = 0
        exact = []
        for p in weights[name]:
            state = optimizer.state[p]
            tensors = [t for t in state.values() if torch.is_tensor(t) and t.numel() > 1]
            bytes_kept += p.nbytes + p.grad.nbytes + sum(t.nbytes for t in tensors)
            ours = "low" in state
            exact.append(join_fp32(p.detach(), state["low"]) if ours else p.detach().float())
        error = (torch.cat(exact) - reference).abs().mean().item()
        figures = f"{1000 * seconds[name]:7.1f}  {bytes_kept / count:5.1f}  {error:.2e}"
        print(f"{name:36} {figures}")


# --------------------------------------------------------------------------------------------------
# Pictures.


def bench_degradations(quick):
    import albumentations
    import cv2

    cv2.setNumThreads(1)
    side = 512
    image = dead_leaves(side, np.random.default_rng(0))
    array = np.asarray(image)
    ways = {"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_CUBIC}
    third = {"scale_range": (1 / 3, 1 / 3), "interpolation_pair": ways}
    blur = {"blur_limit": (7, 7), "sigma_limit": (1.4, 1.4)}
    jitter = {"brightness": (1.1, 1.1), "contrast": (0.9, 0.9)}
    jitter |= {"saturation": (1, 1), "hue": (0, 0)}
    peers = [  # name, our strengths, their class and its options
        ("gaussian_noise", {"sigma": 25.0}, "GaussNoise", {"std_range": (25 / 255, 25 / 255)}),
        ("poisson_noise", {"scale": 3.0}, "ShotNoise", {"scale_range": (3 / 255, 3 / 255)}),
        ("jpeg", {"quality": 20}, "ImageCompression", {"quality_range": (20, 20)}),
        ("gaussian_blur", {"kernel": 7}, "GaussianBlur", blur),
        ("downscale", {"factor": 3.0}, "Downscale", third),
        ("color_jitter", {"brightness": 1.1, "contrast": 0.9}, "ColorJitter", jitter),
    ]
    rng = np.random.default_rng(0)
    for name, strengths, kind, options in peers:
        transform = getattr(albumentations, kind)(**options, p=1)
        ours = lambda: DEGRADATIONS[name](image, rng, **strengths)
        theirs = lambda: transform(image=array)["image"]
        errors = []
        for function in (ours, theirs):
            errors.append(np.mean((np.asarray(function(), float) - array) ** 2) ** 0.5)
        assert abs(errors[0] / errors[1] - 1) < 0.5, name  # of the same strength
        what = f"{name}, {side} px, one thread"
        compare(what, 5 if quick else 21, "albumentations", ours, theirs, memory=False)
    count = 20 if quick else 60
    start = time.perf_counter()
    for i in range(count):
        random_degradation(image, 1 + i % 3, np.random.default_rng(i))
    speed = count / (time.perf_counter() - start)
    print(f"recipes of 1 to 3, {side} px: {speed:.0f} images/s on one core")


def bench_loader(quick):
    """Crops from JPEGs of two megapixels, degraded; none is kept decoded."""
    data.CACHE_BYTES = 0
    count = 40 if quick else 160
    photo = Image.new("RGB", (1920, 1080))
    leaves = dead_leaves(480, np.random.default_rng(0))
    for x in range(0, 1920, 480):
        for y in range(0, 1080, 480):
            photo.paste(leaves, (x, y))
    with tempfile.TemporaryDirectory() as folder:
        photo.save(f"{folder}/photo.jpg", quality=92)
        table = Path(folder, "photos.csv")
        table.write_text("image_path\n" + "photo.jpg\n" * 20)
        dataset = data.PairedDataset(data.CsvPairs(table), 512)
        for threads in (1, 2):
            batches = data.load_batches(dataset, 4, range(count + 16), threads)
            for _ in range(4):  # until the threads run
                next(batches)
            start = time.perf_counter()
            assert sum(len(batch["caption"]) for batch in batches) == count
            speed = count / (time.perf_counter() - start)
            print(f"data loader, 512 px of 2 megapixels, threads: {threads}: {speed:.0f} images/s")


def bench_check(quick):
    """The check of a CSV before training starts: two pictures a row, each a file of its own."""
    count = 1000 if quick else 10_000
    with tempfile.TemporaryDirectory() as folder:
        dead_leaves(64, np.random.default_rng(0)).save(f"{folder}/a.png")
        content = Path(f"{folder}/a.png").read_bytes()
        lines = ["image_path,condition_image_path"]
        for i in range(count):
            for kind in ("clean", "noisy"):
                Path(f"{folder}/{i}{kind}.png").write_bytes(content)
            lines.append(f"{i}clean.png,{i}noisy.png")
        table = Path(folder, "pairs.csv")
        table.write_text("\n".join(lines))
        start = time.perf_counter()
        assert len(data.CsvPairs(table)) == count
        print(f"check of {count} rows: {time.perf_counter() - start:.1f} s")


@torch.no_grad()
def bench_metrics(quick):
    side = 256 if quick else 512
    a = to_tensor(dead_leaves(side, np.random.default_rng(0)))[None]
    b = (a + 0.1 * torch.randn(a.shape)).clamp(-1, 1)
    compare_psnr_ssim(a, b)
    compare_lpips(a, b)
    compare_inception(2 if quick else 8)
    compare_frechet(512 if quick else 2048)


def compare_psnr_ssim(a, b):
    import piq
    import torchmetrics.functional.image as peer

    def ours():
        return psnr(a, b), ssim(a, b)

    def theirs():
        peer.structural_similarity_index_measure(a, b, data_range=(-1.0, 1.0))
        peer.peak_signal_noise_ratio(a, b, data_range=(-1.0, 1.0))

    piqs = lambda: piq.ssim((a + 1) / 2, (b + 1) / 2, data_range=1.0, downsample=False)
    assert abs(ours()[1].item() - piqs().item()) < 1e-4
    what = f"PSNR + SSIM, {a.shape[-1]} px"
    compare(what, 9, "torchmetrics", ours, theirs, memory=False)
    compare(what, 9, "piq (SSIM alone)", ours, piqs, memory=False)


def compare_lpips(a, b):
    import torchvision
    from test_metrics import lpips_of_its_authors

    torch.manual_seed(0)
    trunk = torchvision.models.alexnet(weights=None).features.state_dict()
    trunk = {f"features.{name}": tensor for name, tensor in trunk.items()}
    peer = lpips_of_its_authors(trunk)
    heads = {}
    for i in range(5):
        heads[f"lin{i}.model.1.weight"] = getattr(peer, f"lin{i}").model[1].weight
    ours = LPIPS(trunk, heads)
    same(ours(a, b), peer(a, b).flatten())
    what = f"LPIPS AlexNet, {a.shape[-1]} px"
    compare(what, 9, "lpips", lambda: ours(a, b), lambda: peer(a, b), memory=False)


def compare_inception(count):
    from pipeline import random_inception
    from test_metrics import both_inceptions

    ours, peer = both_inceptions(random_inception().state_dict())
    images = torch.rand(count, 3, 299, 299) * 2 - 1

    theirs = lambda: peer((images + 1) / 2)[0].flatten(1)
    same(ours(images), theirs())
    what = f"Inception features of {count} images"
    compare(what, 3, "pytorch-fid", lambda: ours(images), theirs, memory=False)


def compare_frechet(size):
    from pytorch_fid.fid_score import calculate_frechet_distance

    rng = np.random.default_rng(0)
    moments = []
    for _ in range(2):
        x = rng.normal(size=(2 * size, size)) @ rng.normal(size=(size, size)) / size**0.5
        moments += [x.mean(0), np.cov(x, rowvar=False)]

    def ours():
        return frechet_distance(*[torch.from_numpy(moment) for moment in moments])

    def theirs():
        return calculate_frechet_distance(*moments)

    assert abs(ours() / theirs() - 1) < 1e-3
    what = f"Fréchet distance, {size} features"
    compare(what, 1, "pytorch-fid (scipy)", ours, theirs, memory=False)


# --------------------------------------------------------------------------------------------------
# The tiny preset, and what one would try first instead.


class ConvStack(torch.nn.Module):
    """FFDNet's shape without its noise map. Its settings were searched: see BENCH.md."""

    def __init__(self, width=96, layers=8, generator=None):
        super().__init__()
        middle = []
        for _ in range(layers - 2):
            middle.append(torch.nn.Conv2d(width, width, 3, padding=1))
            middle.append(torch.nn.ReLU(inplace=True))
        self.body = torch.nn.Sequential(
            torch.nn.PixelUnshuffle(2),
            torch.nn.Conv2d(12, width, 3, padding=1),
            torch.nn.ReLU(inplace=True),
            *middle,
            torch.nn.Conv2d(width, 12, 3, padding=1),
            torch.nn.PixelShuffle(2),
        )
        options = {"nonlinearity": "relu", "generator": generator}
        for layer in self.body:
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight, **options)
                torch.nn.init.zeros_(layer.bias)
        torch.nn.init.zeros_(self.body[-2].weight)
        self.to(memory_format=torch.channels_last)

    def forward(self, pixels):
        return pixels + self.body(pixels)


def bench_tiny(quick):
    restorer = build_restorer(PRESETS["tiny"])
    autoencoder, prompts = PixelAE(4), Prompts(PRESETS["tiny"])
    restorer.sana.initialize(torch.Generator().manual_seed(0))
    pipeline, stack = Pipeline(restorer.eval(), autoencoder, prompts), ConvStack().eval()
    side = 128 if quick else 500
    photo = torch.rand(1, 3, side, side) * 2 - 1
    peer = "plain convolutions"
    with torch.no_grad():
        what = f"tiny, one step, {side}x{side}"
        restore = lambda: pipeline.restore(photo, [""])
        compare(what, 5, peer, restore, lambda: stack(photo), memory=False)
    pixels, target = torch.rand(2, 4, 3, 48, 48) * 2 - 1
    x, noise = autoencoder.encode(pixels), torch.randn(4, 48, 12, 12)
    text = prompts(["Remove JPEG artifacts."] * 4)
    sigma = torch.full((4,), 0.7)

    def train_ours():
        restorer.zero_grad()
        flow_loss(restorer, x, x, *text, sigma, noise).mean().backward()

    def train_peer():
        stack.zero_grad()
        (stack(pixels) - target).square().mean().backward()

    compare("tiny, gradients of 4 crops of 48", 10, peer, train_ours, train_peer, memory=False)


def train_stack(table, degradations, minutes):
    """Train the stack on train.py's crops for so many minutes -> stack, steps."""
    drawing = {"degradations": degradations, "max_degradations": 1}
    train_set, _, _ = data.make_datasets(table, None, 32, drawing | {"seed": 0})
    stack = ConvStack(generator=torch.Generator().manual_seed(0))
    average = {name: p.detach().clone() for name, p in stack.named_parameters()}
    options = {"betas": (0.9, 0.99), "weight_decay": 0, "fused": True}
    optimizer = torch.optim.AdamW(stack.parameters(), **options)
    batches = data.load_batches(train_set, 4, range(10**9))
    start = time.monotonic()
    step, progress = 0, 0.0
    while progress < 1:
        batch = next(batches)
        rate = 3e-3 * min(1, progress / 0.02) * (1 + np.cos(np.pi * progress)) / 2
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        (stack(batch["condition"]) - batch["clean"]).abs().mean().backward()
        torch.nn.utils.clip_grad_norm_(stack.parameters(), 0.2)
        optimizer.step()
        step += 1
        decay = min(0.9999, (1 + step) / (10 + step))
        for name, p in stack.named_parameters():
            average[name].lerp_(p.detach(), 1 - decay)
        progress = (time.monotonic() - start) / (60 * minutes)
    batches.close()
    stack.load_state_dict(average)
    return stack.eval(), step


def bench_convolutions(quick):
    """--data, --val: CSVs of photos (default: procedural pictures). Gaussian noise of sigma 25."""
    degradations = parse_degradations(["gaussian_noise:sigma=25"])
    minutes = 0.2 if quick else WHERE.minutes
    stack, steps = train_stack(WHERE.data, degradations, minutes)
    source = data.CsvPairs(WHERE.val) if WHERE.val else data.DeadLeaves(8, 256, seed=1)
    options = {"training": False, "max_degradations": 1}
    dataset = data.PairedDataset(source, None, degradations, **options)
    seconds = []

    @torch.no_grad()
    def restore(i, item):
        before = time.perf_counter()
        restored = stack(item["condition"][None])[0]
        seconds.append(time.perf_counter() - before)
        return restored

    metrics = Metrics(["psnr", "ssim", "lpips"], lpips_weights=WHERE.lpips_weights)
    rows, _ = evaluate_pairs(dataset, {"restored": restore}, metrics, quiet=True)
    found = [f"{mean:.3f}" for name, mean in means(rows).items() if name.startswith("restored_")]
    about = f"{steps} steps in {minutes:g} minutes, {WHERE.threads} threads"
    photo = f"{statistics.median(seconds):.2f} s a photo"
    print(f"plain convolutions: {about}: {' / '.join(found)}, {photo}", flush=True)


# --------------------------------------------------------------------------------------------------
# Memory.

CARDS = {  # GB of a card: rows of (model, flags)
    8: [("sana1.5-1.6b", "--lora 16 --checkpointing")],
    12: [("sana1.5-1.6b", "--lora 64 --checkpointing --resolution 1024")],
    16: [("sana1.5-4.8b", "--lora 16 --checkpointing")],
    24: [("sana1.5-1.6b", "--checkpointing --ema_device cpu")],
    80: [
        ("sana1.5-1.6b", "--resolution 1024"),
        ("sana1.5-4.8b", "--checkpointing --resolution 1024"),
    ],
}
SANAS = {"sana1.5-1.6b": SANA_1_6B, "sana1.5-4.8b": SANA_1_6B | {"num_layers": 60}}
PARTS = "weights", "gradients", "moments", "average", "autoencoder", "activations"  # or encoding


def settings_of(flags, device="cuda"):
    """Return the settings of train.py for a pretrained model and these flags."""
    given = vars(train.make_parser().parse_args(flags.split()))
    known = {"device": device, "lora": None} | given
    return Namespace(**train.choose_settings(known, "pretrained", "restorer"))


def card_config(sana, lora=None):
    """Return "model" of a config.json. lora: the rank."""
    with torch.device("meta"):
        sana = Sana(sana).config
    return model.MODEL_DEFAULTS | {"sana": sana, "lora": lora}


def bench_memory(quick):
    """The table by card."""
    with torch.device("meta"):
        autoencoder = DCAE(DC_AE_F32C32)
        for name, config in SANAS.items():
            print(f"{name}: {sum(p.numel() for p in Sana(config).parameters()):,} parameters")
    print("card  " + "".join(f"{part:>12}" for part in PARTS) + "     total GB  flags")
    for card, rows in CARDS.items():
        for name, flags in rows:
            args = settings_of(flags)
            config = card_config(SANAS[name], args.lora)
            sizes = restorer_memory(
                config,
                autoencoder,
                args.optimizer,
                args.batch_size,
                args.resolution,
                args.checkpointing,
                args.ema_device == args.device,
            )
            total = sum(sizes.values()) / 1e9
            cells = "".join(f"{sizes[part] / 1e9:12.1f}" for part in PARTS)
            print(f"{card:4d}  {cells} {total:12.1f}  --model {name} {flags}", flush=True)
            assert total < card, "this row does not fit its card"
            if WHERE.device == "cuda":
                grown = peak(lambda: train_row(config, args))
                print(f"      measured, without the autoencoder: {grown:.1f} GB")
    total = sum(decoder_memory(card_config(SANA_1_6B), autoencoder).values()) / 1e9
    print(f"sana1.5-1.6b --stage decoder: {total:.1f} GB")


class RandomStage:
    """A stage of train.py on random latents."""

    def __init__(self, config, args):
        grid = args.resolution // 32
        shape = args.batch_size, config["sana"]["in_channels"], grid, grid
        self.latents = torch.randn(shape, device=args.device)
        width = config["sana"]["caption_channels"]
        self.text = torch.randn(args.batch_size, 64, width, device=args.device)
        self.sigma = torch.full((args.batch_size,), 0.7, device=args.device)

    def objective(self, module, batch, step):
        x, text, sigma = self.latents, self.text, self.sigma
        return lambda some: flow_loss(
            module, x[some], x[some], text[some], None, sigma[some], torch.randn_like(x[some])
        )


def train_row(config, args):
    """Do two training steps of a restorer with random weights, and return their State."""
    restorer = build_restorer(config)
    restorer.sana.checkpointing = args.checkpointing
    for p in restorer.parameters():
        torch.nn.init.normal_(p, std=0.02)
        if config["lora"] and args.device == "cuda" and not p.requires_grad:
            p.data = p.data.bfloat16()  # as train.RestorerStage does
    state = train.State(restorer, args)
    for _ in range(2):
        train.train_step(state, RandomStage(config, args), {}, Namespace(count=1))
    return state


# --------------------------------------------------------------------------------------------------
# What a step costs on a card, part by part: counted from the shapes, or measured there.

BANDWIDTHS = 3.35, 2.0, 1.0  # TB/s: H100, A100, RTX 4090
RECIPES = {  # flags of train.py, the cheapest first
    "LoRA 16 with checkpointing": "--lora 16 --checkpointing",
    "all weights in bf16, AdamW, the average on the card": "",
}


class FullSizeStage(train.RestorerStage):
    """The stage restorer of train.py, with DC-AE's random weights and a caption of zeros."""

    def __init__(self, config, args):
        self.config = config
        self.args = args
        with torch.device(args.device):
            self.autoencoder = DCAE(DC_AE_F32C32).eval().requires_grad_(False)
        self.prompts = Prompts(config, args.device)
        self.prompts.known = {"": torch.zeros(TOKENS, config["sana"]["caption_channels"])}
        self.mean_weight = 1.0

    def build_restorer(self):
        """Return it on the CPU, with random weights (for a pretend GPU with none)."""
        with torch.device("meta"):
            restorer = self.build()
        if self.args.device == "cuda":
            restorer.to_empty(device="cpu")
        for p in restorer.parameters():
            torch.nn.init.normal_(p, std=0.02)
            if self.config["lora"] and not p.requires_grad:
                p.data = p.data.bfloat16()  # as State does
        restorer.sana.checkpointing = self.args.checkpointing
        return restorer

    def batch(self):
        args = self.args
        pixels = torch.zeros(args.batch_size, 3, args.resolution, args.resolution)
        draws = list(range(args.batch_size))
        captions = [""] * args.batch_size
        return {"clean": pixels, "condition": pixels, "caption": captions, "draw": draws}


def training_step(state, stage):
    """Do a training step as train.train_step does. Yield the name of each part when it is done."""
    losses = stage.objective(state.module, stage.batch(), state.step)
    yield f"DC-AE encodes {2 * state.args.batch_size} pictures, fp32"
    loss = losses(slice(None)).sum() / state.args.batch_size
    yield "forward"
    loss.backward()
    yield "backward"
    state.collect_gradients()
    yield "gradient norm"
    state.update(1.0)
    yield "update and average"
    state.clear_gradients()


@torch.no_grad()
def sampling_step(restorer, stage):
    """Do a step of sampling, and yield its name."""
    latents = torch.zeros(1, 32, 32, 32, device=stage.args.device)
    prompt = stage.prompts([""])
    yield "the caption, to the card"
    sample_euler(model.guided(restorer, latents, prompt, None), latents, 1)
    yield "a sampling step of a picture of 1024 px"


def settings_and_stage(flags, device, layers=None):
    """layers: of a smaller transformer (default: all)."""
    args = settings_of(flags, device)
    sana = SANA_1_6B | {"num_layers": layers or model.SANA_DEFAULTS["num_layers"]}
    return args, FullSizeStage(card_config(sana, args.lora), args)


def count_parts(parts):
    """Run the parts of a step on the pretend GPU.

    -> {part: [launches, GB, TFLOP, waits]}, GB held at most
    """
    import pretend

    counted = {}
    most = 0
    pretend.reset()
    for part in parts:
        moved, computed = pretend.BYTES.total() / 1e9, pretend.FLOPS.total() / 1e12
        counted[part] = [pretend.LAUNCHES.total(), moved, computed, pretend.WAITS.total()]
        most = max(most, pretend.MEMORY.most)
        pretend.reset()
    return counted, most / 1e9


def print_counts(counted):
    for part, (launches, moved, computed, waits) in counted.items():
        times = "".join(f"{moved / bandwidth:8.0f}" for bandwidth in BANDWIDTHS)
        print(f"{part:40} {launches:8,} {moved:7.1f} {computed:7.2f} {waits:6} {times}", flush=True)


def count_recipes(layers):
    """Print the table of launches, GB and TFLOP. The milliseconds are arithmetic."""
    import pretend

    pretend.USE.raw = "meta"
    titles = "".join(f"{bandwidth:8g}" for bandwidth in BANDWIDTHS)
    print("SANA 1.5 1.6B, counted from the shapes. Nothing was run on a GPU.")
    print("ms: arithmetic, GB / bandwidth, for these bandwidths in TB/s")
    print(f"{'':40} launches      GB   TFLOP  waits {titles}")
    args, stage = settings_and_stage("", pretend.NAME, layers)
    restorer = stage.build_restorer()
    restorer.sana.bfloat16()
    print_counts(count_parts(sampling_step(restorer.to(args.device), stage))[0])
    del restorer, stage
    for name, flags in RECIPES.items():
        print(f"{name}: four pictures of 512 px")
        count_recipe(flags, pretend.NAME, layers)


def count_recipe(flags, device, layers):
    args, stage = settings_and_stage(flags, device, layers)
    state = train.State(stage.build_restorer(), args)
    counted, most = count_parts(training_step(state, stage))
    print_counts(counted)
    print_counts({"sum": [sum(column) for column in zip(*counted.values())]})
    print(f"peak memory {most:.1f} GB")
    if args.optimizer == "adamw_bf16":
        state.adamw_bf16 = adamw_bf16
        counted, _ = count_parts(training_step(state, stage))
        print_counts({"the update without a compiler": counted["update and average"]})


def measure_parts(step, rounds=5):
    """Time the parts of a step -> {part: median milliseconds}. The first round only warms up.

    step: a function that returns the generator of parts.
    """
    times = {}
    for _ in range(rounds + 1):
        synchronize()
        before = time.perf_counter()
        for part in step():
            synchronize()
            times.setdefault(part, []).append(1000 * (time.perf_counter() - before))
            before = time.perf_counter()
    return {part: statistics.median(values[1:]) for part, values in times.items()}


def measure_recipes(layers):
    """Print the rows of count_recipes in milliseconds, measured on a card."""
    print("SANA 1.5 1.6B, random weights: ms, measured")
    measure_sampling(layers)
    measure_ceiling()
    for name, flags in RECIPES.items():
        print(f"{name}: four pictures of 512 px")
        try:
            measure_recipe(flags, layers)
        except torch.OutOfMemoryError:
            print("more than this card's memory")


@torch.no_grad()
def measure_ceiling():
    """Time the ceiling, a picture of 1024 px there and back through DC-AE.

    With TF32 in its Linears and without (its convolutions have it either way, as torch has them).
    """
    torch.manual_seed(0)
    autoencoder = DCAE(DC_AE_F32C32).eval().to(WHERE.device)
    pixels = torch.rand(1, 3, 1024, 1024, device=WHERE.device) * 2 - 1
    restored = {}
    for name, context in {"TF32": vae.tf32, "fp32": contextlib.nullcontext}.items():

        def step():
            with mock.patch.object(vae, "tf32", context):
                restored[name] = autoencoder.decode(autoencoder.encode(pixels))
            yield f"DC-AE there and back, Linears in {name}"

        print_milliseconds(measure_parts(step))
    agree = psnr(restored["TF32"].clamp(-1, 1), restored["fp32"].clamp(-1, 1)).item()
    print(f"the two pictures agree to {agree:.1f} dB", flush=True)


def measure_sampling(layers):
    _, stage = settings_and_stage("", WHERE.device, layers)
    restorer = stage.build_restorer()
    restorer.sana.bfloat16()
    restorer.to(WHERE.device)
    print_milliseconds(measure_parts(lambda: sampling_step(restorer, stage)))


def measure_recipe(flags, layers):
    args, stage = settings_and_stage(flags, WHERE.device, layers)
    state = train.State(stage.build_restorer(), args)
    torch.cuda.reset_peak_memory_stats()
    times = measure_parts(lambda: training_step(state, stage))
    print_milliseconds(times)
    print_milliseconds({"sum": sum(times.values())})
    print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB", flush=True)
    if args.optimizer == "adamw_bf16":
        state.adamw_bf16 = adamw_bf16
        times = measure_parts(lambda: training_step(state, stage))
        print_milliseconds({"the update without a compiler": times["update and average"]})


def print_milliseconds(times):
    for part, milliseconds in times.items():
        print(f"{part:40} {milliseconds:9.1f}", flush=True)


def bench_cost(quick):
    """--quick: of two blocks."""
    layers = 2 if quick else None
    if WHERE.device == "cuda":
        measure_recipes(layers)
    else:
        count_recipes(layers)


BENCHES = {
    name.removeprefix("bench_"): function
    for name, function in list(globals().items())
    if name.startswith("bench_")
}


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("what", nargs="*", choices=[[], *BENCHES], help="default: all; --gpu: six of them")
    add("--quick", action="store_true", help="smaller sizes: all of it within five minutes")
    add("--threads", type=int, default=2)
    add("--gpu", action="store_true", help="on a CUDA card")
    add("--minutes", type=float, default=5, help="of training, for convolutions")
    add("--data", help="CSV of photos to train on, for convolutions")
    add("--val", help="CSV of photos to measure on, for convolutions")
    add("--lpips_weights", nargs=2, metavar=("TRUNK", "HEADS"), help="for convolutions")
    args = parser.parse_args()
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch sees no CUDA card here")
    if args.gpu:
        vars(WHERE).update(vars(GPU))
        print(torch.cuda.get_device_name(), "torch", torch.__version__)
    vars(WHERE).update(vars(args))
    torch.set_num_threads(args.threads)
    if args.what != ["cost"]:
        print(f"{'':52} {'ours':>9} {'peer':>9}     ratio")
    on_gpu = ["cost", "optimizer", "autoencoder", "transformer", "decoder", "memory"]
    on_cpu = [name for name in BENCHES if name not in ("convolutions", "cost")]
    for name in args.what or (on_gpu if args.gpu else on_cpu):
        BENCHES[name](args.quick)


if __name__ == "__main__":
    main()
