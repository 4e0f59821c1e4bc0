"""Ours beside the peers, in one process, interleaved, same weights and inputs, outputs compared first; milliseconds are medians.

    python tests/bench.py [--quick] [--threads 2] [WHAT ...]
    python tests/bench.py --gpu [--quick]      transformer, autoencoder and optimizer at full size in bf16 on a CUDA card, eager and compiled

transformer   SANA's forward and backward, and a sampling step, at the 1.6B model's width
tokens        what a token costs at growing sizes (linear attention: the same)
autoencoder   DC-AE f32c32, time and memory
decoder       the one that sees the degraded image, beside the plain one; a step of its training
optimizer     a step of AdamW in bf16: time, and bytes a parameter that stay between steps (weight, gradient, state)
degradations  the six, and random recipes
loader        training crops from photos
check         what is looked at before training starts
denoise       the tiny preset beside plain convolutions, trained for --minutes each: what they reach (not part of all)
busy          training beside another process, by settings of the threads
metrics       PSNR, SSIM, LPIPS, FID
tiny          the preset: training, and restoring a photo, beside plain convolutions
preset        all steps of the tiny preset (with --gpu; on a CPU 20)
startup       -h, and the import of torch
gradients     bf16, eager and compiled, against fp32's
memory        the table by card: what training takes on a GPU, derived from the shapes (nothing is allocated); with --gpu measured too

On Linux set MALLOC_MMAP_THRESHOLD_=1073741824 and MALLOC_TRIM_THRESHOLD_=1073741824: without them both sides wait for the system's memory.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import conftest  # first: it puts the project on the path, and torchvision needs what it defines
import numpy as np
import optimi
import torch
import torchao.optim
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import data
import model
import train
from data import Prompts, dead_leaves, to_tensor
from degrade import DEGRADATIONS, parse_degradations, random_degradation
from evaluate import LPIPS, Inception, Metrics, Pipeline, evaluate_pairs, frechet_distance
from evaluate import psnr, ssim, validation_means
from memory import decoder_memory, restorer_memory
from model import PRESETS, Sana, build_restorer, flow_loss, sample_euler
from train import BF16AdamW, join_fp32
from vae import DCAE, PixelAE, decoder_loss, trained_weights

# where the first three run; --gpu makes it a card, bf16, all 20 layers, 20 steps, and compiled code beside eager
WHERE = argparse.Namespace(
    device="cpu",
    dtype=torch.float32,
    layers=2,
    steps=1,
    side=512,
    compiled=(False,),
    tolerance=1e-3,
    threads=2,
)
GPU = dict(
    device="cuda",
    dtype=torch.bfloat16,
    layers=20,
    steps=20,
    side=1024,
    compiled=(False, True),
    tolerance=5e-2,
)
# bf16 FLOP/s, dense, of cards whose peak is known: for the model FLOPs utilization (MFU)
PEAK = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
SANA_1_6B = dict(
    qk_norm="rms_norm_across_heads", sample_size=32
)  # over SANA_DEFAULTS, which are its own


DC_AE_F32C32 = dict(  # SANA's
    latent_channels=32,
    attention_head_dim=32,
    encoder_block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    decoder_block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    encoder_block_out_channels=[128, 256, 512, 512, 1024, 1024],
    decoder_block_out_channels=[128, 256, 512, 512, 1024, 1024],
    encoder_layers_per_block=[2, 2, 2, 3, 3, 3],
    decoder_layers_per_block=[3] * 6,
    encoder_qkv_multiscales=[[], [], [], [5], [5], [5]],
    decoder_qkv_multiscales=[[], [], [], [5], [5], [5]],
    downsample_block_type="Conv",
    upsample_block_type="interpolate",
    scaling_factor=0.41407,
)


def interleaved(runs, rounds):
    """{name: function} -> {name: median seconds}, one call of each in turn; the first round only warms up."""
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


@contextlib.contextmanager
def peak():
    """Yields a list that gets the growth of this process's (of the card's) memory within the block, GB."""
    result, stop = [], threading.Event()
    if WHERE.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield result
        return result.append((torch.cuda.max_memory_allocated() - before) / 1e9)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must be grown again

    def watch():
        while not stop.wait(0.002):
            seen.append(resident())

    before, seen = resident(), [0]
    thread = threading.Thread(target=watch)
    thread.start()
    yield result
    stop.set(), thread.join()
    result.append((max(seen) - before) / 1e9)


def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def row(work, ours, peer, name, memory=None, flops=None):
    """One line of the table. flops: of one call, for the rate and, on a card whose peak is known, the model FLOPs utilization."""
    extra = "" if memory is None else f"  {memory[0]:6.2f} {memory[1]:6.2f} GB"
    if flops:
        card = torch.cuda.get_device_name() if WHERE.device == "cuda" else ""
        extra += f"  {flops / ours / 1e12:.2f} {flops / peer / 1e12:.2f} TFLOP/s"
        extra += "".join(
            f", MFU {flops / ours / rate:.2f} {flops / peer / rate:.2f}"
            for known, rate in PEAK.items()
            if known in card
        )
    print(
        f"{work:52} {1000 * ours:9.1f} {1000 * peer:9.1f} ms  {peer / ours:5.2f}x  {name}{extra}",
        flush=True,
    )


def same(a, b, tolerance=None):
    error = ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
    assert error < (tolerance or WHERE.tolerance), f"outputs differ by {error:.1e}"


def transformers():
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(0)
    theirs = SanaTransformer2DModel(num_layers=WHERE.layers, **SANA_1_6B)
    ours = Sana(SANA_1_6B | {"num_layers": WHERE.layers})
    ours.load_state_dict(theirs.state_dict())
    return ours.to(WHERE.device, WHERE.dtype), theirs.to(WHERE.device, WHERE.dtype)


def bench_transformer(quick):
    """A prompt of 32 tokens: the peer takes 300, of which the mask hides the others."""
    batch, side, tokens = (1, 256, 32) if quick else (4, 512, 32)
    ours, theirs = transformers()
    latents, text = torch.randn(batch, 32, side // 32, side // 32), torch.randn(batch, 300, 2304)
    latents, text = latents.to(WHERE.device, WHERE.dtype), text.to(WHERE.device, WHERE.dtype)
    mask = torch.zeros(batch, 300, device=WHERE.device)
    mask[:, :tokens] = 1
    time_in = torch.full((batch,), 700.0, device=WHERE.device)
    peer = lambda x, t: (
        theirs(x, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=t).sample
    )

    def train_ours():
        ours.zero_grad()
        ours(latents, time_in, text[:, :tokens], None).square().mean().backward()

    def train_theirs():
        theirs.zero_grad()
        peer(latents, time_in).square().mean().backward()

    with torch.no_grad():
        read = ours.caption_keys_values(text[:, :tokens])  # once for all steps
    sample_ours = lambda: sample_euler(lambda x, t: ours(x, t, read), latents, WHERE.steps)
    sample_theirs = lambda: sample_euler(peer, latents, WHERE.steps)
    with FlopCounterMode(display=False) as counter:
        train_ours()
    flops, what = (
        counter.get_total_flops(),
        f"SANA 1.6B, {WHERE.layers} layers, {side} px, batch {batch}",
    )
    for compiled in WHERE.compiled:
        if compiled:  # block by block, as train.py does
            for block in [*ours.transformer_blocks, *theirs.transformer_blocks]:
                block.compile(dynamic=False)
            what += ", compiled"
        train_ours(), train_theirs()
        same(ours.patch_embed.proj.weight.grad, theirs.patch_embed.proj.weight.grad)
        memory = []
        for function in (train_ours, train_theirs):
            with peak() as grown:
                function()
            memory += grown
        seconds = interleaved({"ours": train_ours, "peer": train_theirs}, 3 if quick else 7)
        row(f"{what}: training", *seconds.values(), "diffusers", memory, flops)
        with torch.no_grad():
            same(sample_ours(), sample_theirs())
            seconds = interleaved({"ours": sample_ours, "peer": sample_theirs}, 3 if quick else 9)
        row(
            f"the same: {WHERE.steps} sampling step{'s' * (WHERE.steps > 1)}",
            *seconds.values(),
            "diffusers",
            None,
            WHERE.steps * flops / 3,
        )


def bench_tokens(quick):
    ours, _ = transformers()
    text, sides = torch.randn(1, 32, 2304), (256, 512) if quick else (512, 1024, 2048)
    with torch.no_grad():
        seconds = interleaved(
            {
                side: (
                    lambda side=side: ours(
                        torch.randn(1, 32, side // 32, side // 32), torch.ones(1), text
                    )
                )
                for side in sides
            },
            3,
        )
    first = seconds[sides[0]] / sides[0] ** 2
    for side in sides:
        print(
            f"SANA 1.6B, 2 layers, {side} px: {1000 * seconds[side]:.0f} ms, a token costs {seconds[side] / side**2 / first:.2f} of one at {sides[0]} px"
        )


def bench_autoencoder(quick):
    from diffusers import AutoencoderDC

    side = 128 if quick else WHERE.side
    torch.manual_seed(0)
    theirs = AutoencoderDC(**DC_AE_F32C32).eval()
    ours = DCAE({k: v for k, v in theirs.config.items() if not k.startswith("_")}).eval()
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = ours.to(WHERE.device, WHERE.dtype), theirs.to(WHERE.device, WHERE.dtype)
    pixels = (torch.rand(1, 3, side, side) * 2 - 1).to(WHERE.device, WHERE.dtype)
    with torch.no_grad():
        latents = (ours.encode(pixels) / ours.scaling).to(WHERE.dtype)
        works = {
            "encode": (
                lambda: ours.encode(pixels) / ours.scaling,
                lambda: theirs.encode(pixels).latent,
            ),
            "decode": (
                lambda: ours.decode(latents * ours.scaling),
                lambda: theirs.decode(latents).sample,
            ),
        }
        for compiled, (work, (mine, yours)) in itertools.product(WHERE.compiled, works.items()):
            if compiled and work == "encode":
                for part in (ours.encoder, ours.decoder, theirs.encoder, theirs.decoder):
                    part.compile(dynamic=False)
            same(mine(), yours())
            memory = []
            for function in (mine, yours):
                with peak() as grown:
                    function()
                memory += grown
            seconds = interleaved({"ours": mine, "peer": yours}, 3)
            row(
                f"DC-AE f32c32, {work} {side} px{', compiled' * compiled}",
                *seconds.values(),
                "diffusers",
                memory,
            )


def bench_decoder(quick):
    """The decoder that sees the degraded image, f32c32 with random weights: 2 megapixels, and a step of training."""
    torch.manual_seed(0)
    config = dict(DC_AE_F32C32)
    if quick:  # a quarter of its widths
        widths = [32, 64, 128, 128, 256, 256]
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
    memory = []
    with torch.no_grad():
        latents = ours.encode(degraded)
        works = {
            "ours": lambda: ours.decode(latents, degraded),
            "peer": lambda: ours.decode(latents),
        }
        outputs, seconds = [], {}  # one call each: it takes minutes on a CPU
        for name, function in works.items():
            before = time.perf_counter()
            with peak() as grown:
                outputs.append(function())
                synchronize()
            seconds[name] = time.perf_counter() - before
            memory += grown
        same(*outputs, 1e-5)  # skips of zeros
    row(f"decode {width}x{height} beside the degraded", *seconds.values(), "plain decoder", memory)
    side = 128 if quick else 256
    clean = (torch.rand(1, 3, side, side) * 2 - 1).to(WHERE.device)
    latents = ours.encode(clean)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4, fused=True)

    def step():
        optimizer.zero_grad()
        decoder_loss(ours, latents, clean, clean, 1.0).mean().backward()
        optimizer.step()

    with peak() as grown:
        step()
    seconds = interleaved({"ours": step}, 2)["ours"]
    print(f"a step of training, one crop of {side}: {seconds:.2f} s, {grown[0]:.2f} GB more")


def bench_degradations(quick):
    import albumentations as A
    import cv2

    cv2.setNumThreads(1)
    side = 512
    image = dead_leaves(side, np.random.default_rng(0))
    array = np.asarray(image)
    peers = {
        "gaussian_noise": (A.GaussNoise(std_range=(25 / 255, 25 / 255), p=1), {"sigma": 25.0}),
        "poisson_noise": (A.ShotNoise(scale_range=(3 / 255, 3 / 255), p=1), {"scale": 3.0}),
        "jpeg": (A.ImageCompression(quality_range=(20, 20), p=1), {"quality": 20}),
        "gaussian_blur": (
            A.GaussianBlur(blur_limit=(7, 7), sigma_limit=(1.4, 1.4), p=1),
            {"kernel": 7},
        ),
        "downscale": (
            A.Downscale(
                scale_range=(1 / 3, 1 / 3),
                p=1,
                interpolation_pair={"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_CUBIC},
            ),
            {"factor": 3.0},
        ),
        "color_jitter": (
            A.ColorJitter(
                brightness=(1.1, 1.1), contrast=(0.9, 0.9), saturation=(1, 1), hue=(0, 0), p=1
            ),
            {"brightness": 1.1, "contrast": 0.9},
        ),
    }
    rng = np.random.default_rng(0)
    for name, (peer, strength) in peers.items():
        a, b = (
            np.asarray(DEGRADATIONS[name](image, rng, **strength), float),
            peer(image=array)["image"].astype(float),
        )
        assert abs(np.mean((a - array) ** 2) ** 0.5 / np.mean((b - array) ** 2) ** 0.5 - 1) < 0.5, (
            name
        )  # of the same strength
        seconds = interleaved(
            {
                "ours": lambda: DEGRADATIONS[name](image, rng, **strength),
                "peer": lambda: peer(image=array),
            },
            5 if quick else 21,
        )
        row(f"{name}, {side} px, one thread", *seconds.values(), "albumentations")
    start, count = time.perf_counter(), 20 if quick else 60
    for i in range(count):
        random_degradation(image, 1 + i % 3, np.random.default_rng(i))
    print(
        f"recipes of 1 to 3, {side} px: {count / (time.perf_counter() - start):.0f} images/s on one core (asked: 30)"
    )


def bench_loader(quick):
    """Crops of 512 px from JPEGs of two megapixels, degraded, by two workers; none is kept decoded."""
    data.CACHE_BYTES, count = 0, 40 if quick else 160
    photo, leaves = Image.new("RGB", (1920, 1080)), dead_leaves(480, np.random.default_rng(0))
    for x, y in ((x, y) for x in range(0, 1920, 480) for y in range(0, 1080, 480)):
        photo.paste(leaves, (x, y))
    with tempfile.TemporaryDirectory() as folder:
        photo.save(f"{folder}/photo.jpg", quality=92)
        with open(f"{folder}/photos.csv", "w") as file:
            file.write("image_path\n" + "photo.jpg\n" * 20)
        dataset = data.PairedDataset(data.CsvPairs(f"{folder}/photos.csv"), 512)
        batches = data.load_batches(dataset, 4, range(count + 16), 2)
        for _ in range(4):  # until the workers run
            next(batches)
        start = time.perf_counter()
        assert sum(len(batch["caption"]) for batch in batches) == count
        print(
            f"data loader, 2 workers, 512 px of 2 megapixels: {count / (time.perf_counter() - start):.0f} images/s (asked: 20)"
        )


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
        Path(f"{folder}/pairs.csv").write_text("\n".join(lines))
        start = time.perf_counter()
        assert len(data.CsvPairs(f"{folder}/pairs.csv")) == count
        print(f"check of {count} rows: {time.perf_counter() - start:.1f} s (asked: 10 for 10,000)")


def bench_busy(quick):
    """The demo's steps a second, alone and beside a process that keeps one core busy."""
    steps = 50 if quick else 300
    settings = {"as it is": {}, "one thread": {"OMP_NUM_THREADS": "1"}}
    if sys.platform == "linux":
        settings["spinning as by default"] = {"GOMP_SPINCOUNT": "300000"}  # GNU OpenMP's own
    for name, setting in settings.items():
        alone = demo_speed(steps, setting)
        hog = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            beside = demo_speed(steps, setting)
        finally:
            hog.kill()
        print(f"demo, {name}: {alone:.1f} steps/s alone, {beside:.1f} beside a busy core")


def demo_speed(steps, setting):
    """Return the steps a second of the last fifty of a demo of so many steps."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--steps", str(steps), "--val_every", str(2 * steps), "--out", f"{folder}/run"]
        environment = {key: value for key, value in os.environ.items() if "NUM_THREADS" not in key}
        subprocess.run(
            [sys.executable, conftest.ROOT / "train.py", *flags],
            env=environment | setting,
            check=True,
            capture_output=True,
        )
        lines = Path(f"{folder}/run/log.jsonl").read_text().splitlines()
    speeds = [json.loads(line)["images_per_second"] for line in lines if '"loss":' in line]
    return speeds[-1] / 8  # pictures a step


def bench_metrics(quick):
    import lpips
    import piq
    import pytorch_fid.fid_score
    import torchmetrics.functional.image as tm
    import torchvision
    from pytorch_fid.inception import InceptionV3
    import pytorch_fid.inception
    from pipeline import random_inception

    side = 256 if quick else 512
    a = to_tensor(dead_leaves(side, np.random.default_rng(0)))[None]
    b = (a + 0.1 * torch.randn(a.shape)).clamp(-1, 1)
    psnr_ssim = lambda: (psnr(a, b), ssim(a, b))
    theirs = lambda: (
        tm.peak_signal_noise_ratio(a, b, data_range=(-1.0, 1.0)),
        tm.structural_similarity_index_measure(a, b, data_range=(-1.0, 1.0)),
    )
    piqs = lambda: piq.ssim((a + 1) / 2, (b + 1) / 2, data_range=1.0, downsample=False)
    assert abs(psnr_ssim()[1].item() - piqs().item()) < 1e-4
    seconds = interleaved({"ours": psnr_ssim, "peer": theirs, "piq": piqs}, 9)
    row(f"PSNR + SSIM, {side} px", seconds["ours"], seconds["peer"], "torchmetrics")
    row(f"PSNR + SSIM (piq: SSIM alone), {side} px", seconds["ours"], seconds["piq"], "piq")
    with torch.no_grad():
        torch.manual_seed(0)
        trunk = torchvision.models.alexnet(weights=None).state_dict()
        peer = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
        for name, t in trunk.items():
            if name.startswith("features"):
                _, layer, kind = name.split(".")
                module = next(
                    getattr(s, layer)
                    for s in (getattr(peer.net, f"slice{i}") for i in range(1, 6))
                    if hasattr(s, layer)
                )
                getattr(module, kind).data.copy_(t)
        ours = LPIPS(
            trunk,
            {f"lin{i}.model.1.weight": getattr(peer, f"lin{i}").model[1].weight for i in range(5)},
        )
        same(ours(a, b), peer(a, b).flatten())
        row(
            f"LPIPS AlexNet, {side} px",
            *interleaved({"ours": lambda: ours(a, b), "peer": lambda: peer(a, b)}, 9).values(),
            "lpips",
        )
        weights = random_inception().state_dict()
        pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: weights
        mine, yours, images = (
            Inception(weights),
            InceptionV3([3]).eval(),
            torch.rand(2 if quick else 8, 3, 299, 299) * 2 - 1,
        )
        same(mine(images), yours((images + 1) / 2)[0].flatten(1))
        seconds = interleaved(
            {"ours": lambda: mine(images), "peer": lambda: yours((images + 1) / 2)}, 3
        )
        row(f"Inception features of {len(images)} images", *seconds.values(), "pytorch-fid")
    size, rng = (512, 2048)[not quick], np.random.default_rng(0)
    for count in (size // 4, 2 * size):
        sets = [
            rng.normal(size=(count, size)) @ rng.normal(size=(size, size)) / size**0.5
            for _ in range(2)
        ]
        moments = [(x.mean(0), np.cov(x, rowvar=False)) for x in sets]
        mine = lambda: frechet_distance(*(torch.from_numpy(x) for pair in moments for x in pair))
        yours = lambda: pytorch_fid.fid_score.calculate_frechet_distance(*moments[0], *moments[1])
        assert abs(mine() / yours() - 1) < 1e-3
        row(
            f"Fréchet distance, {size} features, {count} images",
            *interleaved({"ours": mine, "peer": yours}, 1).values(),
            "pytorch-fid (scipy)",
        )


class ConvStack(torch.nn.Module):
    """What one would try first instead of the tiny preset: FFDNet's shape without its noise map.

    Pixels unshuffled by 2, 3x3 convolutions with ReLU, shuffled back, added to the input. Width,
    depth, rate, loss, crop and batch were searched: see BENCH.md."""

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


def train_stack(flags, minutes):
    """Train the stack on train.py's crops for so many minutes -> stack, steps, minutes."""
    searched = ["--resolution", "32", "--lr", "3e-3", "--batch_size", "4"]
    args = train.parse_args([*flags, *searched, "--out", "none"])
    train_set, _ = data.make_datasets(args)
    stack = ConvStack(generator=torch.Generator().manual_seed(args.seed))
    average = {name: p.detach().clone() for name, p in stack.named_parameters()}
    options = {"lr": args.lr, "betas": (0.9, 0.99), "weight_decay": 0, "fused": True}
    optimizer = torch.optim.AdamW(stack.parameters(), **options)
    batches = data.load_batches(train_set, args.batch_size, range(10**9), args.workers)
    next(batches)  # the worker has started
    start = time.monotonic()
    step, progress = 0, 0.0
    while progress < 1:
        batch = next(batches)
        rate = args.lr * min(1, progress / 0.02) * (1 + np.cos(np.pi * progress)) / 2
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
    return stack.eval(), step, minutes


def train_tiny(flags, minutes, folder):
    """Train the preset by train.py for about so many minutes -> Pipeline, steps, minutes."""

    def run(steps, name):
        often = ["--val_every", steps, "--save_every", steps]
        often += ["--batch_size", 4 * WHERE.threads]
        words = [*flags, "--steps", steps, *often, "--out", name]
        subprocess.run(
            [sys.executable, conftest.ROOT / "train.py", *map(str, words)],
            env=os.environ | {"OMP_NUM_THREADS": str(WHERE.threads)},
            cwd=folder,
            check=True,
            capture_output=True,
        )
        batch = json.loads(Path(folder, name, "config.json").read_text())["args"]["batch_size"]
        text = Path(folder, name, "log.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in text]
        return [line["images_per_second"] / batch for line in lines if "loss" in line]

    trial = 250 if minutes >= 1 else 100
    steps = round(60 * minutes * statistics.mean(run(trial, "speed")[1:]))
    steps = max(100, 50 * (steps // 50))  # whole lines of the log
    real = sum(50 / rate for rate in run(steps, "run")) / 60
    return Pipeline.load(Path(folder, "run")), steps, real


def bench_denoise(quick):
    """The tiny preset and plain convolutions, trained for the same minutes on the same pictures.

    Gaussian noise of sigma 25. --data, --val: CSVs of photos (default: procedural pictures)."""
    minutes = 0.2 if quick else WHERE.minutes
    flags = ["--degradations", "gaussian_noise:sigma=25", "--device", "cpu"]
    degradations = parse_degradations(["gaussian_noise:sigma=25"])
    if WHERE.data:
        flags += ["--data", str(Path(WHERE.data).resolve())]
    source = data.CsvPairs(WHERE.val) if WHERE.val else data.DeadLeaves(8, 256, seed=1)
    options = {"training": False, "max_degradations": 1}
    dataset = data.PairedDataset(source, None, degradations, **options)
    metrics = Metrics(["psnr", "ssim", "lpips"], lpips_weights=WHERE.lpips_weights)
    with tempfile.TemporaryDirectory() as folder:
        for name in WHERE.contestants:
            if name == "tiny":
                pipeline, steps, real = train_tiny(flags, minutes, folder)
                network = pipeline.restorer
                restore = lambda pixels: pipeline.restore(pixels, ["Remove gaussian noise."])
            else:
                network, steps, real = train_stack(flags, minutes)
                restore = network
            seconds = []

            def method(i, item):
                before = time.perf_counter()
                with torch.no_grad():
                    restored = restore(item["condition"][None])[0]
                seconds.append(time.perf_counter() - before)
                return restored

            rows, _ = evaluate_pairs(dataset, {"restored": method}, metrics, quiet=True)
            scores = validation_means(rows)
            found = " / ".join(f"{scores[f'restored_{m}']:.3f}" for m in ("psnr", "ssim", "lpips"))
            count = sum(p.numel() for p in network.parameters()) / 1e6
            about = f"{count:.2f} M, {steps} steps in {real:.1f} minutes, {WHERE.threads} threads"
            print(f"{name}: {about}: {found}, {statistics.median(seconds):.2f} s a photo", flush=True)


def bench_tiny(quick):
    restorer, autoencoder, prompts = build_restorer(PRESETS["tiny"]), PixelAE(4), Prompts()
    restorer.sana.initialize(torch.Generator().manual_seed(0))
    pipeline, stack = Pipeline(restorer.eval(), autoencoder, prompts), ConvStack().eval()
    count = [sum(p.numel() for p in module.parameters()) for module in (restorer, stack)]
    side = 128 if quick else 500
    photo = torch.rand(1, 3, side, side) * 2 - 1
    with torch.no_grad():
        seconds = interleaved(
            {"ours": lambda: pipeline.restore(photo, [""]), "peer": lambda: stack(photo)}, 5
        )
    row(
        f"tiny ({count[0] / 1e6:.2f} M), one step, {side}x{side}",
        *seconds.values(),
        f"plain convolutions ({count[1] / 1e6:.2f} M)",
    )
    x, noise, text = (
        autoencoder.encode(torch.rand(4, 3, 48, 48) * 2 - 1),
        torch.randn(4, 48, 12, 12),
        prompts(["Remove JPEG artifacts."] * 4),
    )
    pixels, target = torch.rand(4, 3, 48, 48), torch.rand(4, 3, 48, 48)

    def train_ours():
        restorer.zero_grad()
        flow_loss(restorer, x, x, *text, torch.full((4,), 0.7), noise).mean().backward()

    def train_peer():
        stack.zero_grad()
        (stack(pixels) - target).square().mean().backward()

    stack.train()
    seconds = interleaved({"ours": train_ours, "peer": train_peer}, 10)
    row(
        f"tiny, gradients of 4 crops of 48: {4 / seconds['ours']:.0f} img/s",
        *seconds.values(),
        "plain convolutions",
    )


def bench_preset(quick):
    """The tiny preset's 8,000 steps on the demo's pictures (on a CPU 20: here it is a stand-in)."""
    steps = 8000 if WHERE.device == "cuda" and not quick else 20
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--steps", steps, "--val_every", steps, "--device", WHERE.device, "--out", "run"]
        command = [sys.executable, conftest.ROOT / "train.py", *flags]
        before = time.perf_counter()
        output = subprocess.run(
            [str(word) for word in command], check=True, cwd=folder, capture_output=True, text=True
        ).stdout
        seconds = time.perf_counter() - before
    result = [line for line in output.splitlines() if "validated at" in line][0]
    print(f"tiny, {steps} steps on {WHERE.device}: {seconds:.0f} s; {result}")


def bench_startup(quick):
    def start(code):
        before = time.perf_counter()
        subprocess.run(
            [sys.executable, *code], check=True, stdout=subprocess.DEVNULL, cwd=conftest.ROOT
        )
        return time.perf_counter() - before

    commands = {
        "import torch": ["-c", "import torch"],
        "train.py -h": ["train.py", "-h"],
        "evaluate.py -h": ["evaluate.py", "-h"],
        "degrade.py -h": ["degrade.py", "-h"],
    }
    seconds = interleaved(
        {name: (lambda code=code: start(code)) for name, code in commands.items()}, 3
    )
    print(
        "start-up: "
        + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
        + " (asked: -h within 1 s of import torch)"
    )


def bench_optimizer(quick):
    count, lr = (4_000_000 if quick else 100_000_000), 1e-3
    shapes, device = [(count // 20,)] * 20, WHERE.device
    start = [
        torch.randn(shape, generator=torch.Generator().manual_seed(i)).bfloat16().float()
        for i, shape in enumerate(shapes)
    ]
    gradients = [
        (0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(100 + i))).bfloat16()
        for i, shape in enumerate(shapes)
    ]

    def make(dtype, optimizer):
        parameters = [torch.nn.Parameter(w.to(device, dtype)) for w in start]
        for p, g in zip(parameters, gradients):
            p.grad = g.to(device, dtype, copy=True)  # a peer writes into its gradients
        return parameters, optimizer(parameters)

    same = dict(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    contestants = {
        "adamw: torch, fp32, fused": make(
            torch.float32, lambda p: torch.optim.AdamW(p, lr, fused=True, **same)
        ),
        "adamw_bf16: ours, exact": make(
            torch.bfloat16, lambda p: BF16AdamW([{"params": p, "lr": lr}])
        ),
        "adamw_bf16: ours, compiled": make(
            torch.bfloat16, lambda p: BF16AdamW([{"params": p, "lr": lr}], compile=True)
        ),
        "adamw_sr: ours": make(
            torch.bfloat16, lambda p: BF16AdamW([{"params": p, "lr": lr}], exact=False)
        ),
        "optimi AdamW, Kahan": make(
            torch.bfloat16, lambda p: optimi.AdamW(p, lr, **same, kahan_sum=True)
        ),
        "torchao AdamW, stochastic rounding": make(
            torch.bfloat16,
            lambda p: torchao.optim._AdamW(p, lr, **same, bf16_stochastic_round=True),
        ),
    }
    steps = dict.fromkeys(contestants, 0)

    def step(name):
        parameters, optimizer = contestants[name]
        steps[name] += 1
        optimizer.step(
            *(
                [steps[name], dict.fromkeys(parameters, steps[name])]
                if isinstance(optimizer, BF16AdamW)
                else []
            )
        )

    seconds = interleaved(
        {name: (lambda name=name: step(name)) for name in contestants}, 3 if quick else 5
    )
    parameters, optimizer = contestants["adamw_bf16: ours, exact"]
    average = [w.to(device, copy=True) for w in start]

    def update_average():
        for mean, p in zip(average, parameters):
            mean.lerp_(join_fp32(p.detach(), optimizer.state[p]["low"]), 1e-4)

    ema = interleaved({"ours": update_average}, 3)["ours"]
    print(f"the fp32 average's step beside adamw_bf16: {1000 * ema:.0f} ms")
    reference = torch.cat([p.detach().float() for p in contestants["adamw: torch, fp32, fused"][0]])
    copies = lambda: [a.copy_(b) for a, b in zip(average[:10], average[10:])]
    copy = interleaved({"copy": copies}, 5)["copy"] / sum(
        t.nbytes for t in average
    )  # seconds a byte read or written
    print(
        f"{count / 1e6:.0f} M parameters, {device}, {torch.get_num_threads()} threads, {steps['adamw_sr: ours']} steps at lr {lr:g}; copying: {1e-9 / copy:.0f} GB/s"
    )
    print(f"{'optimizer':36} ms/step  bytes  of copying's speed  mean |weight - fp32 AdamW's|")
    for name, (parameters, optimizer) in contestants.items():
        state = sum(
            t.nbytes
            for values in optimizer.state.values()
            for t in values.values()
            if torch.is_tensor(t) and t.numel() > 1
        )
        size = (sum(p.nbytes + p.grad.nbytes for p in parameters) + state) / count
        moved = 2 * size * count - sum(
            p.grad.nbytes for p in parameters
        )  # all read, all but gradients written
        low = [optimizer.state[p].get("low") for p in parameters]  # ours alone has them
        exact = [
            p.detach().float() if bits is None else join_fp32(p.detach(), bits)
            for p, bits in zip(parameters, low)
        ]
        error = (torch.cat(exact) - reference).abs().mean().item()
        print(
            f"{name:36} {1000 * seconds[name]:7.1f}  {size:5.1f}  {moved * copy / seconds[name]:18.2f}  {error:.2e}"
        )


def bench_gradients(quick):
    """Gradients in bf16, eager and compiled, against fp32's: on CPUs the compiler made NaN of them."""
    config = SANA_1_6B | {"num_layers": 1 if quick else 2}
    if WHERE.device == "cpu":
        config |= {"num_attention_heads": 4, "num_cross_attention_heads": 2, "cross_attention_dim": 128}
        config |= {"caption_channels": 64, "cross_attention_head_dim": 64}
    torch.manual_seed(0)
    reference = Sana(config)
    for p in reference.parameters():
        torch.nn.init.normal_(p, std=0.02 if p.dim() > 1 else 0.5)
    reference.to(WHERE.device)
    x = torch.randn(2, 32, 16, 16, device=WHERE.device)
    text = torch.randn(2, 20, reference.config["caption_channels"], device=WHERE.device)
    time = torch.tensor([300.0, 900.0], device=WHERE.device)

    def gradients(network, dtype):
        network.zero_grad()
        network(x.to(dtype), time, text.to(dtype)).float().square().mean().backward()
        return torch.cat([p.grad.float().flatten() for p in network.parameters()])

    exact = gradients(reference, torch.float32)
    half = Sana(config).to(WHERE.device)
    half.load_state_dict(reference.state_dict())
    half.bfloat16()
    for compiled in (False, True):
        if compiled:
            for block in half.transformer_blocks:
                block.compile(dynamic=False)
        found = gradients(half, torch.bfloat16)
        bad = (~found.isfinite()).sum().item()
        error = ((found - exact).norm() / exact.norm()).item()
        how = "compiled" if compiled else "eager"
        print(f"bf16 gradients, {how}: {bad} of {found.numel()} not finite, {error:.1%} from fp32's")


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
SANAS = {  # over SANA_DEFAULTS, which are the 1.6B model's
    "sana1.5-1.6b": SANA_1_6B,
    "sana1.5-4.8b": SANA_1_6B | {"num_layers": 60},
}
PARTS = "weights", "gradients", "moments", "average", "autoencoder", "activations"  # or encoding


def typed(flags):
    """Return {name: value} of the flags of a row, as train.py reads them."""
    given = vars(train.make_parser().parse_args(flags.split()))
    return {name: value for name, value in given.items() if value is not None}


def card_config(sana, lora=None):
    """Return "model" of a config.json. lora: the rank."""
    with torch.device("meta"):
        sana = Sana(sana).config
    lora = {"rank": lora, "alpha": float(lora)} if lora else None
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
            given = typed(flags)
            config = card_config(SANAS[name], given.get("lora"))
            sizes = restorer_memory(
                config,
                autoencoder,
                "adamw" if config["lora"] else "adamw_bf16",
                side=given.get("resolution", 512),
                checkpointing=given.get("checkpointing", False),
                average=given.get("ema_device") != "cpu",
            )
            total = sum(sizes.values()) / 1e9
            cells = "".join(f"{sizes[part] / 1e9:12.1f}" for part in PARTS)
            print(f"{card:4d}  {cells} {total:12.1f}  --model {name} {flags}", flush=True)
            assert total < card, "this row does not fit its card"
            if WHERE.device == "cuda":
                measured_memory(config, flags)
    total = sum(decoder_memory(card_config(SANA_1_6B), autoencoder).values()) / 1e9
    print(f"sana1.5-1.6b --stage decoder: {total:.1f} GB")


def measured_memory(config, flags):
    """A training step of a row on the card, with random weights: its peak beside the estimate."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train_row(config, flags, "cuda")
    grown = (torch.cuda.max_memory_allocated() - before) / 1e9
    print(f"      measured, without the autoencoder: {grown:.1f} GB")


def train_row(config, flags, device):
    """Two training steps of a restorer with random weights."""
    args = train.make_parser().parse_args(["--data", "pairs.csv", *flags.split()])
    args.device, args.stage, args.steps, args.seed = device, "restorer", 1000, 0
    args.batch_size, args.accumulate, args.resolution = 4, 1, args.resolution or 512
    args.optimizer = "adamw" if args.lora else "adamw_bf16"
    args.ema_device = args.ema_device or device
    args.lr, args.proj_lr, args.share_at_one, args.clip, args.ema_every = 1e-5, 1e-3, 0.0, 0.1, 1
    restorer = build_restorer(config)
    for p in restorer.parameters():
        torch.nn.init.normal_(p, std=0.02)
    state = train.State(config, restorer, args)
    channels = config["sana"]["in_channels"]
    shape = args.batch_size, channels, args.resolution // 32, args.resolution // 32
    batch = {
        "clean": torch.randn(shape),
        "condition": torch.randn(shape),
        "caption": [""] * args.batch_size,
        "bad": 0,
    }
    prompts = Prompts()
    prompts.folder = "random"
    prompts.known = {"": torch.randn(64, config["sana"]["caption_channels"])}
    for _ in range(2):
        train.train_step(state, batch, train.Frozen(None, prompts))
    return state


if __name__ == "__main__":
    benches = {
        name.removeprefix("bench_"): function
        for name, function in globals().items()
        if name.startswith("bench_")
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", choices=[[], *benches], help="default: all")
    parser.add_argument(
        "--quick", action="store_true", help="smaller sizes: all of it within five minutes"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--gpu", action="store_true", help="transformer, autoencoder and optimizer on a CUDA card"
    )
    parser.add_argument("--minutes", type=float, default=5, help="of training, for denoise")
    parser.add_argument("--data", help="CSV of photos to train on, for denoise")
    parser.add_argument("--val", help="CSV of photos to measure on, for denoise")
    parser.add_argument("--lpips_weights", nargs=2, metavar=("TRUNK", "HEADS"), help="for denoise")
    choices = ["tiny", "convolutions"]
    parser.add_argument("--contestants", nargs="+", choices=choices, default=choices)
    args = parser.parse_args()
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch sees no CUDA card here")
    if args.gpu:
        vars(WHERE).update(GPU)
        args.what = args.what or ["transformer", "autoencoder", "decoder", "optimizer", "memory", "gradients", "preset"]
        print(torch.cuda.get_device_name(), "torch", torch.__version__)
    del sys.argv[1:]  # train.py would take these flags for its own
    options = "threads", "minutes", "data", "val", "lpips_weights", "contestants"
    vars(WHERE).update({name: getattr(args, name) for name in options})
    torch.set_num_threads(args.threads)
    print(f"{'':52} {'ours':>9} {'peer':>9}     ratio")
    for what in args.what or [name for name in benches if name != "denoise"]:
        benches[what](args.quick)
