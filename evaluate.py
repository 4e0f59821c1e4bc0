"""Restore pictures with a trained checkpoint, and measure how well it does.

    python evaluate.py --checkpoint out/demo --input noisy.jpg --output restored.jpg
    python evaluate.py --checkpoint out/demo --input photos/ --output restored/           a folder, names kept
    python evaluate.py --checkpoint out/demo --data val/pairs.csv                         tables, CSV, JSON, grid
    python evaluate.py --checkpoint out/demo --data val/pairs.csv --sweep 1,2,4,8,20      PSNR against texture
    python evaluate.py --data val/pairs.csv --compare others/                             another program's outputs

Pictures of any size and mode: grey stays grey, transparency and the colour profile are kept, 16-bit grey becomes 8-bit, EXIF rotation
is applied (and the rest of EXIF dropped). What --output holds is not made again (--overwrite), so an interrupted command goes on.
"""
import functools
import json
import math
import os
import re
import resource
import sys
import time

import torch
import torch.nn.functional as F
from PIL import ImageChops
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import CsvPairs, PairedDataset, build_surroundings, check_device, seed_for, to_image, to_tensor
from degrade import (DEFAULT_DEGRADATIONS, PICTURES, Parser, UserError, check_numbers, draw_grid, draw_panels, keep_freed_memory,
                     list_images, list_work, make_folder, open_image, out_of_memory, parse_degradations, run_script, save_image, skip_or_raise,
                     write_csv, write_text)
from model import build_restorer, draw_sigma, flow_loss, guided, load_restorer, sample
from vae import PixelAE, blend_tiles, pad_to_multiple, read_published

# ----------------------------------------------------------------------------------------------------------------
# PSNR and SSIM. Both images [B, C, H, W] in [-1, 1]; one float64 value per image.

def psnr(a, b):
    """Peak signal-to-noise ratio in dB, 10 log10(range^2 / mse) over all pixels and channels; inf for equal images."""
    return 10 * torch.log10(4 / (a.double() - b.double()).square().flatten(1).mean(1))


def ssim(a, b):
    """Structural similarity (Wang et al. 2004): gaussian window 11x11 of sigma 1.5, population variances, mean over
    channels and over the positions where the window fits. scikit-image's with gaussian_weights, sigma=1.5,
    use_sample_covariance=False. Raises ValueError for images below 11 pixels."""
    if min(a.shape[2:]) < 11:
        raise ValueError(f"SSIM needs 11x11 pixels, not {a.shape[3]}x{a.shape[2]}")
    a, b = a.double() + 1, b.double() + 1                                   # black must be 0: SSIM compares means
    window = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=torch.float64, device=a.device) / 1.5) ** 2)

    def band(n):                                                            # [n-10, n]: row i has the window at i to i + 10
        matrix = window.new_zeros(n - 10, n)
        for k, weight in enumerate(window / window.sum()):
            matrix.diagonal(k).fill_(weight)
        return matrix
    rows, columns = band(a.shape[2]), band(a.shape[3]).T

    def blur(x):                                                            # [B, C, H, W] -> [B, C, H-10, W-10]
        return rows @ x @ columns                                           # at 512 px 2.6 times as fast as convolutions; above 2,000 slower
    mean_a, mean_b = blur(a), blur(b)
    product, squares = mean_a * mean_b, mean_a**2 + mean_b**2
    covariance, variances = blur(a * b) - product, blur(a * a + b * b) - squares
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2                               # 2 = range of [-1, 1]
    score = (2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
    return score.flatten(1).mean(1)


def luma(x):
    """RGB [B, 3, H, W] in [-1, 1] -> Y of ITU-R BT.601 [B, 1, H, W], from 16 to 235 levels: what super-resolution papers score."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=x.device)
    return (torch.einsum("bchw,c->bhw", (x.double() + 1) / 2, weights)[:, None] + 16) / 127.5 - 1


# ----------------------------------------------------------------------------------------------------------------
# LPIPS and FID: distances between features of trained networks.

class LPIPS(nn.Module):
    """Learned perceptual image patch similarity v0.1 (arXiv 1801.03924), 0 = alike: how far the features of two images differ, at
    each position normalized over channels, weighted by channel as human judgements have taught ("heads").
    trunk: torchvision's weights of net; heads: {"lin0.model.1.weight": ...}. Raises UserError if they do not fit."""
    NETS = {  # convolutions (channels, kernel, stride, padding), each with a ReLU; a number: max pooling; layers whose output counts
        "alex": ([(64, 11, 4, 2), 3, (192, 5, 1, 2), 3, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)], (1, 4, 7, 9, 11)),
        "vgg": ([*[(64, 3, 1, 1)] * 2, 2, *[(128, 3, 1, 1)] * 2, 2, *[(256, 3, 1, 1)] * 3, 2, *[(512, 3, 1, 1)] * 3, 2,
                 *[(512, 3, 1, 1)] * 3], (3, 8, 15, 22, 29))}

    def __init__(self, trunk, heads, net="alex"):
        super().__init__()
        layers, self.taps = self.NETS[net]
        self.features, self.heads, width = nn.Sequential(), nn.ParameterList(), 3
        for layer in layers:
            if isinstance(layer, tuple):
                self.features.extend([nn.Conv2d(width, *layer), nn.ReLU()])
                width = layer[0]
            else:
                self.features.append(nn.MaxPool2d(layer, 2))
            if len(self.features) - 1 in self.taps:
                self.heads.append(torch.empty(1, width, 1, 1))
        weights = {name: t for name, t in trunk.items() if name.startswith("features.")}
        try:
            self.load_state_dict(weights | {f"heads.{name[3]}": t for name, t in heads.items() if name.endswith(".model.1.weight")})
        except RuntimeError as error:
            raise UserError(f"these are not the weights of LPIPS {net}: {' '.join(str(error).split())[:200]}") from None
        self.eval().requires_grad_(False)

    def forward(self, a, b):
        """[B, 3, H, W] in [-1, 1], of at least 64 pixels -> [B]."""
        x = torch.cat([a, b])
        x = (x - x.new_tensor([-0.030, -0.088, -0.188])[:, None, None]) / x.new_tensor([0.458, 0.448, 0.450])[:, None, None]
        heads, total = iter(self.heads), 0
        for i, layer in enumerate(self.features):
            x = layer(x)                                                    # [2B, C, h, w]
            if i in self.taps:
                unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
                first, second = unit.chunk(2)
                total = total + ((first - second).square() * next(heads)).sum(1).mean((1, 2))
        return total


class Inception(nn.Module):
    """The Inception v3 of the first FID (arXiv 1706.08500), ported from TensorFlow: not torchvision's. weights: as pytorch-fid
    published them. What differs is marked with * below. Raises UserError if they do not fit."""
    SAME = {1: 0, 3: 1, 5: 2, (1, 7): (0, 3), (7, 1): (3, 0), (1, 3): (0, 1), (3, 1): (1, 0)}  # kernel: padding that keeps the size
    POOLS = {"average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),           # * padding does not count
             "max": lambda x: F.max_pool2d(x, 3, 1, 1), "halve": lambda x: F.max_pool2d(x, 3, 2)}
    STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "halve", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "halve")
    # A mixed block: branches whose outputs are stacked, each a chain of layers; a layer in parentheses has two convolutions side by side.
    A = "1x1", "5x5_1 5x5_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3", "average _pool"
    B = "3x3", "3x3dbl_1 3x3dbl_2 3x3dbl_3", "halve"
    C = "1x1", "7x7_1 7x7_2 7x7_3", "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5", "average _pool"
    D = "3x3_1 3x3_2", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4", "halve"
    E = "1x1", "3x3_1 3x3_2a|3x3_2b", "3x3dbl_1 3x3dbl_2 3x3dbl_3a|3x3dbl_3b", "average _pool"
    LAST = (*E[:3], "max _pool")                                            # * the last block has a max pool
    BLOCKS = {"5b": A, "5c": A, "5d": A, "6a": B, "6b": C, "6c": C, "6d": C, "6e": C, "7a": D, "7b": E, "7c": LAST}
    HALVING = ("Conv2d_1a_3x3", "Mixed_6a.branch3x3", "Mixed_6a.branch3x3dbl_3", "Mixed_7a.branch3x3_2", "Mixed_7a.branch7x7x3_4")

    def __init__(self, weights):
        super().__init__()
        self.convs, names = {}, [name.removesuffix(".conv.weight") for name in weights if name.endswith(".conv.weight")]
        try:
            for name in names:  # batch normalization at rest is one more linear map: into the convolution with it
                kernel = weights[f"{name}.conv.weight"]
                gain = weights[f"{name}.bn.weight"] / (weights[f"{name}.bn.running_var"] + 0.001).sqrt()
                bias = weights[f"{name}.bn.bias"] - weights[f"{name}.bn.running_mean"] * gain
                size = tuple(kernel.shape[2:])
                valid = name in self.HALVING or name in ("Conv2d_2a_3x3", "Conv2d_4a_3x3")
                padding = 0 if valid else self.SAME[size[0] if size[0] == size[1] else size]
                self.convs[name] = (kernel * gain[:, None, None, None]).to(memory_format=torch.channels_last), bias, 1 + (name in self.HALVING), padding
            if self(torch.zeros(1, 3, 299, 299)).shape[1] != 2048:
                raise RuntimeError("its features are not 2048 wide")
        except (KeyError, RuntimeError) as error:
            raise UserError(f"these are not the weights of FID's Inception: {' '.join(str(error).split())[:200]}") from None

    def step(self, x, step, prefix=""):
        """A pooling, a convolution, or several side by side. x [B, C, H, W]."""
        if step in self.POOLS:
            return self.POOLS[step](x)
        layers = (self.convs[prefix + name] for name in step.split("|"))
        return torch.cat([F.conv2d(x, weight.to(x.device), bias.to(x.device), stride, padding).relu_() for weight, bias, stride, padding in layers], 1)

    @torch.no_grad()
    def forward(self, x):
        """[B, 3, H, W] in [-1, 1] -> "pool3" [B, 2048]."""
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)  # * not antialiased; and no other normalization
        x = functools.reduce(self.step, self.STEM, x.contiguous(memory_format=torch.channels_last))
        for block, branches in self.BLOCKS.items():
            follow = functools.partial(self.step, prefix=f"Mixed_{block}.branch")
            x = torch.cat([functools.reduce(follow, branch.split(), x) for branch in branches], 1)
        return x.mean((2, 3))                                               # * 1008 classes follow, which nobody asks for


class FID:
    """Fréchet inception distance between sets of images that are added one batch after the other."""

    def __init__(self, inception):
        self.inception, self.sets = inception, {}

    @torch.no_grad()
    def add(self, which, images):
        """images [B, 3, H, W] in [-1, 1], into the set called which: its mean and covariance, in float64 (Chan et al. 1983)."""
        x = self.inception(images).double().cpu()
        count, mean, scatter = self.sets.get(which, (0, torch.zeros(x.shape[1]).double(), torch.zeros(x.shape[1], x.shape[1]).double()))
        delta, total = x.mean(0) - mean, count + len(x)
        scatter += (x - x.mean(0)).T @ (x - x.mean(0)) + delta.outer(delta) * (count * len(x) / total)
        self.sets[which] = total, mean + delta * (len(x) / total), scatter

    def distance(self, one, other):
        """nan below two images."""
        (n, mean, scatter), (n2, mean2, scatter2) = self.sets[one], self.sets[other]
        return frechet_distance(mean, scatter / (n - 1), mean2, scatter2 / (n2 - 1)) if min(n, n2) > 1 else math.nan


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) of two gaussians, float64. With A = F F^T, A B has the eigenvalues of the
    symmetric F^T B F: no root of a matrix that is not symmetric, no complex numbers, and fewer images than features do no harm."""
    factor, failed = torch.linalg.cholesky_ex(cov_a)
    if failed:  # singular: only the directions in which there is anything
        values, vectors = torch.linalg.eigh(cov_a)
        there = values > values.max() * len(values) * torch.finfo(values.dtype).eps
        factor = vectors[:, there] * values[there].sqrt()
    roots = torch.linalg.eigvalsh(factor.T @ cov_b @ factor).clamp(min=0).sqrt()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots.sum()
    return max(0.0, distance.item())


METRICS = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS"}  # of one image; FID is of all


class Metrics:
    """What is measured, of "psnr", "ssim", "lpips", "fid". A metric without its weights is said to be missing, and why; the others
    go on. lpips_weights: local files (trunk, heads), fid_weights: a local file."""

    def __init__(self, names=("psnr", "ssim"), y_channel=False, net="alex", lpips_weights=None, fid_weights=None, device="cpu"):
        self.names, self.y_channel, self.device = [n for n in names if n in METRICS], y_channel, device
        self.lpips, self.fid, self.missing = None, None, {}  # name: why
        local = {net: lpips_weights, "inception": [fid_weights] if fid_weights else None}
        for name, files in (("lpips", (net, f"{net} heads")), ("fid", ("inception",))):
            try:
                if name in names:
                    weights = [read_published(what, path) for what, path in zip(files, local[files[0]] or (None, None))]
                    setattr(self, name, LPIPS(*weights, net).to(device) if name == "lpips" else FID(Inception(*weights)))
            except OSError as error:
                self.missing[name] = f"its weights could not be fetched: {error}; --{name}_weights takes local files"

    @torch.no_grad()
    def __call__(self, clean, image, which):
        """{name: value} of a picture [3, H, W], rounded to 8 bits as when saved; nan where a metric is missing or it is too small. which: its set."""
        clean, image = clean[None].to(self.device), to_tensor(to_image(image))[None].to(self.device)
        if self.fid:
            self.fid.add(which, image)
        small, (a, b) = min(clean.shape[2:]), (luma(t) if self.y_channel else t for t in (image, clean))
        values = {"psnr": psnr(a, b).item(), "ssim": ssim(a, b).item() if small >= 11 else math.nan,
                  "lpips": self.lpips(image, clean).item() if self.lpips and small >= 64 else math.nan}
        return {name: values[name] for name in self.names}


# ----------------------------------------------------------------------------------------------------------------
# Restoring.

DEFAULT_STEPS = {"residual": 1, "velocity": 20}  # a network that predicts the clean image does so at once; a pretrained one was trained to walk
TILE, OVERLAP = 1024, 64  # pixels: the tiny preset restores larger pictures in tiles, so that memory stays bounded (1 GB)


@torch.no_grad()
def restore(restorer, autoencoder, prompts, pixels, captions, steps=1, seed=0, sampler="euler", guidance=1.0, condition_guidance=1.0,
            average=1):
    """Degraded pixels [B, 3, H, W] in [-1, 1] of any size, and a caption each -> restored pixels, clipped to [-1, 1].
    The noise depends on the seed and the image size alone: an image comes out the same whatever is beside it.
    average: so many answers, from different noise, of which the mean is taken."""
    (height, width), f = pixels.shape[2:], autoencoder.factor
    pixels = pad_to_multiple(pixels, f * restorer.sana.config["patch_size"])
    shape = autoencoder.channels, *(side // f for side in pixels.shape[2:])
    noises = [torch.randn(shape, generator=torch.Generator().manual_seed(seed_for(seed, k, "restore"))).to(pixels) for k in range(average)]
    prompts.prepare([*captions, ""])
    text, empty = ((restorer.sana.read(text.to(pixels.device)), mask.to(pixels.device))  # once for all tiles and steps
                   for text, mask in map(prompts, (captions, [""] * len(captions))))

    def part(at):
        condition = autoencoder.encode(pixels[at])                          # [B, C, h, w]
        rows, columns = (slice(side.start // f, side.stop // f) for side in at[1:])
        seeing, blind = (lambda x, *rest, c=c: restorer(x, c, *rest) for c in (condition, torch.zeros_like(condition)))
        velocity = guided(seeing, text, empty, guidance, blind, condition_guidance)
        starts = (noise[:, rows, columns].expand_as(condition) for noise in noises)
        return sum(autoencoder.decode(sample(velocity, start, steps, sampler, restorer.shift)) for start in starts) / average
    tile = TILE if isinstance(autoencoder, PixelAE) else max(pixels.shape[2:])  # latents are small: the whole picture at once
    return blend_tiles(part, pixels.shape[2:], tile, OVERLAP)[..., :height, :width].clamp(-1, 1)


def restore_image(image, caption, **how):
    """A picture as open_image gives it -> the restored one: grey if it was grey, with its transparency and colour profile."""
    device = next(how["restorer"].parameters()).device
    pixels = restore(pixels=to_tensor(image)[None].to(device), captions=[caption], **how)
    restored = to_image(pixels[0]).convert(image.mode.rstrip("A"))
    if "A" in image.mode:
        restored.putalpha(image.getchannel("A"))
    profile = image.info.get("icc_profile") or b""
    if profile[16:20] == (b"GRAY" if image.mode[0] == "L" else b"RGB "):  # not that of a CMYK file that became RGB
        restored.info["icc_profile"] = profile
    return restored


def restore_files(work, overwrite=False, quality=95, grid=None, **how):
    """Restore [(picture, where to)]; one that cannot be read does not stop the others. -> how many failed."""
    there = set() if overwrite else {out for _, out in work if out.exists()}
    failed, pictures = 0, []
    for path, out in tqdm([(path, out) for path, out in work if out not in there], unit="img", desc="restore", disable=len(work) == 1):
        try:
            image = open_image(path)
            restored = restore_image(image, **how)
            suffix, options = out.suffix.lower(), {"icc_profile": restored.info.get("icc_profile")}
            if "A" in restored.mode and suffix in (".jpg", ".jpeg", ".bmp", ".ppm", ".pgm"):
                print(f"{out}: this format holds no transparency; saved without", file=sys.stderr)
                restored = restored.convert(restored.mode.rstrip("A"))
            save_image(restored, out, **options | ({"quality": quality} if suffix in (".jpg", ".jpeg", ".webp") else {}))
        except UserError as error:
            skip_or_raise(error, len(work) > 1)
            failed += 1
        else:
            if grid and len(pictures) < 8:
                before, after = image.convert("RGB"), restored.convert("RGB")
                difference = ImageChops.add(after, ImageChops.invert(before), 0.5, -382)  # 128 + 2 (after - before)
                pictures.append([("input", before), ("restored", after), ("difference x 2", difference)])
    if grid and pictures:
        save_image(draw_grid(pictures), grid)
    print(f"restored {len(work) - len(there) - failed} image(s) -> {work[0][1] if len(work) == 1 else work[0][1].parent}"
          + f"; {len(there)} were there already (--overwrite makes them again)" * bool(there) + f"; {failed} failed" * bool(failed))
    return failed


# ----------------------------------------------------------------------------------------------------------------
# Measuring.

def evaluate_pairs(dataset, methods, metrics=Metrics(), quiet=False):
    """methods: {name: function(i, item of the dataset) -> its picture [3, H, W]}; the degraded image itself is scored as "input".
    -> rows [{"image": i, "degradation": names, "input_psnr", "NAME_psnr", ...}], and of the first eight images the labelled
    pictures [[("degraded ...", PIL), ("NAME ...", PIL), ..., ("clean", PIL)]]."""
    rows, pictures = [], []
    for i in (bar := tqdm(range(len(dataset)), unit="img", desc="evaluate", disable=quiet)):
        try:
            item = dataset.draw(i)
        except UserError as error:
            skip_or_raise(error, dataset.skip_bad)
            continue
        outputs = {"input": item["condition"]} | {name: method(i, item) for name, method in methods.items()}
        scores = {name: metrics(item["clean"], output, name) for name, output in outputs.items()}
        if metrics.fid:
            metrics.fid.add("clean", item["clean"][None])
        rows.append({"image": i, "degradation": dataset.name_degradations(i)} | {
            f"{name}_{key}": value for name, score in scores.items() for key, value in score.items()})
        if len(pictures) < 8:
            shown = {"degraded" if name == "input" else name: name for name in outputs if name != "ceiling"}
            pictures.append([(f"{label} {scores[name].get('psnr', math.nan):.2f} dB", to_image(outputs[name])) for label, name in shown.items()]
                            + [("clean", to_image(item["clean"]))])
        bar.set_postfix_str("PSNR " + " -> ".join(f"{score['psnr']:.2f}" for name, score in scores.items() if name != "ceiling" and "psnr" in score))
    if not rows:
        raise UserError("no pair can be read")
    return rows, pictures


@torch.no_grad()
def mean_loss(dataset, rows, restorer, autoencoder, prompts, seed):
    """The training loss over the images of evaluate_pairs' rows, with fixed noise and sigmas."""
    device, generator, losses = next(restorer.parameters()).device, torch.Generator().manual_seed(seed_for(seed, 0, "validation loss")), []
    for item in (dataset.draw(row["image"]) for row in rows):
        x0, condition = (autoencoder.encode(item[key][None].to(device)) for key in ("clean", "condition"))
        noise, sigma = torch.randn(x0.shape, generator=generator), draw_sigma(1, generator, shift=restorer.shift)
        text = (t.to(device) for t in prompts([item["caption"]]))
        losses.append(flow_loss(restorer, x0, condition, *text, sigma.to(device), noise.to(device)).item())
    return sum(losses) / len(losses)


def mean_of(rows):
    """The mean of each column of scores; images restored perfectly (PSNR inf) or too small (nan) are left out of it. If all
    are perfect, so is the mean."""
    means = {}
    for key in [k for k, v in rows[0].items() if isinstance(v, float)]:
        finite = [row[key] for row in rows if math.isfinite(row[key])]
        means[key] = sum(finite) / len(finite) if finite else rows[0][key]
    return means


def bootstrap(values, resamples=1000):
    """The 95% interval of the mean of a list (percentile bootstrap, Efron 1979), nan for fewer than two values."""
    values, generator = torch.tensor([v for v in values if math.isfinite(v)]).double(), torch.Generator().manual_seed(0)
    if len(values) < 2:
        return math.nan, math.nan
    means = values[torch.randint(len(values), (resamples, len(values)), generator=generator)].mean(1)
    return tuple(means.quantile(torch.tensor([0.025, 0.975]).double()).tolist())


def summarize(rows, methods, metrics):
    """-> {method: {metric: {"mean", "low", "high"}, ..., "fid": distance}}, and {method: {metric: share}}: how far it came from the
    input (0) to the ceiling (1), the best that any restorer can do whose answer passes through the autoencoder."""
    means, summary, shares = mean_of(rows), {}, {}
    for name in methods:
        summary[name] = {key: {"mean": means[f"{name}_{key}"]} | dict(zip(("low", "high"), bootstrap([row[f"{name}_{key}"] for row in rows])))
                         for key in metrics.names}
        summary[name]["fid"] = metrics.fid.distance("clean", name) if metrics.fid else math.nan
        if name not in ("input", "ceiling") and "ceiling" in summary:
            low, high = ([summary[end][key]["mean"] for key in metrics.names] for end in ("input", "ceiling"))
            shares[name] = {key: (summary[name][key]["mean"] - a) / (b - a) if math.isfinite(b - a) and a != b else math.nan
                            for key, a, b in zip(metrics.names, low, high)}
    return summary, shares


def print_summary(rows, summary, shares, metrics):
    digits = {"psnr": 2, "ssim": 4, "lpips": 4}
    title = {key: METRICS[key] + " (Y)" * (metrics.y_channel and key != "lpips") for key in metrics.names}
    width = max(30, *(len(name) + 24 for name in summary))
    print(f"{f'{len(rows)} images, mean (95%)':{width}}" + "".join(f"{title[key]:26} " for key in metrics.names) + "FID" * bool(metrics.fid))
    for name, values in summary.items():
        cells = [f"{v['mean']:.{digits[key]}f} ({v['low']:.{digits[key]}f}, {v['high']:.{digits[key]}f})" for key, v in values.items() if key != "fid"]
        cells = ["n/a" if cell.startswith("nan") else cell.replace(" (nan, nan)", "") for cell in cells]
        label = {"input": "degraded input", "ceiling": "ceiling: autoencoder alone"}.get(name, name)
        print(f"{label:{width}}" + "".join(f"{cell:26} " for cell in cells) + (f"{values['fid']:.2f}" if metrics.fid else ""))
    for name, share in shares.items():
        print(f"{f'{name}: share of the way':{width}}" + "".join(f"{'n/a' if math.isnan(v) else f'{v:.0%}':26} " for v in share.values()))
    for word in sorted({word for row in rows for word in row["degradation"].split()}):
        some = [row for row in rows if word in row["degradation"].split()]
        means = mean_of(some)
        cells = [" -> ".join(f"{means[f'{name}_{key}']:.{digits[key]}f}" for name in summary if name != "ceiling") for key in metrics.names if key not in metrics.missing]
        print(f"{f'with {word} ({len(some)})':{width}}" + "".join(f"{cell:26} " for cell in cells))
    for name, reason in metrics.missing.items():
        print(f"{name.upper()}: n/a ({reason})")
    if metrics.fid and len(rows) < 2048:
        print(f"FID of {len(rows)} images: below 2,048 it is too high, and comparable only between sets of the same size")
    for key, count in {key: sum(not math.isfinite(row[key]) for row in rows) for key in mean_of(rows)}.items():
        if 0 < count < len(rows):
            print(f"{key}: {count} image(s) without a finite value (identical, or too small) are not in its mean")


# ----------------------------------------------------------------------------------------------------------------
# Following a training run.

BINS = 4  # of sigma, in which the loss is logged
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "RTX 4090": 165e12}  # bf16 FLOP/s, dense


class Meter:
    """What a line of the log says of the steps since the line before."""

    def __init__(self, state, processes):
        self.state, self.processes, self.skipped, self.bad = state, processes, 0, 0
        self.reset()

    def reset(self):
        self.since, self.waited, self.steps = time.monotonic(), 0.0, 0
        self.sums = [0.0] * (2 * BINS)  # losses by bin of sigma, and how many there were

    def wait_for(self, loader):
        """The next batch, None after the last, or a UserError; and how long that took."""
        before = time.monotonic()
        try:
            batch = next(loader, None)
        except (MemoryError, RuntimeError) as error:  # so torch says that a worker was killed
            if not (out_of_memory(error) or "exited unexpectedly" in str(error) or "killed by signal" in str(error)):
                raise
            reason = out_of_memory(error) or str(error).splitlines()[0]
            batch = UserError(f"--workers {self.state.args.workers}: one of them could not go on: {reason}")
        self.waited += time.monotonic() - before
        return batch

    def count(self, sums, finite, bad):
        """The losses of a step by bin of sigma, whether they were finite, how many unreadable images were passed over."""
        self.steps, self.skipped, self.bad = self.steps + 1, self.skipped + (not finite), self.bad + bad
        if finite:
            self.sums = [a + b for a, b in zip(self.sums, sums)]

    def entry(self, norm):
        state, seconds = self.state, time.monotonic() - self.since
        losses, counts, speed = self.sums[:BINS], self.sums[BINS:], self.steps * state.args.batch_size / seconds
        line = {"step": state.step, "loss": sum(losses) / max(1, sum(counts)), "norm": norm, "condition_norm": state.condition_norm(),
                "loss_by_sigma": [loss / n if n else None for loss, n in zip(losses, counts)], "images_per_second": speed,
                "data_wait": self.waited / seconds, "memory_gb": peak_memory(state.args.device), "skipped": self.skipped, "bad_images": self.bad}
        name = torch.cuda.get_device_name() if state.args.device.startswith("cuda") else ""
        for peak in (flops for known, flops in PEAK.items() if known in name):  # model FLOPs utilization (arXiv 2204.02311)
            line["mfu"] = speed * training_flops(state.config, state.grid) / (self.processes * peak)
        self.reset()
        return line


def peak_memory(device):
    """GiB: what tensors took at most on a GPU, what the process took on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**(30 if sys.platform == "darwin" else 20)


def training_flops(config, grid, tokens=32):
    """Of one image with a latent grid (H, W): forward, and twice that for the gradient."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        restorer = build_restorer(config)
        c = restorer.sana.config
        latents = torch.empty(1, c["out_channels"], *grid)
        restorer(latents, latents, torch.empty(1), torch.empty(1, tokens, c["caption_channels"]))
    return 3 * counter.get_total_flops()


# ----------------------------------------------------------------------------------------------------------------
# The command line.

def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", help="run folder of train.py, or one of its step folders")
    parser.add_argument("--input", nargs="+", help="pictures, folders of pictures, or patterns such as 'photos/**/*.jpg', to restore")
    parser.add_argument("--output", help="where the restored picture or folder goes; with --data, the scores and the grid (default out/evaluation)")
    parser.add_argument("--data", help="pairs.csv to measure on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if there is one")
    parser.add_argument("--model", help="where the autoencoder and text encoder of a pretrained model are now (default: where they were in training)")
    # how to restore
    parser.add_argument("--prompt", help='what to do, e.g. "Remove JPEG artifacts."; "" lets the model judge '
                        '(default: "" for --input, the captions of --data)')
    parser.add_argument("--steps", type=int, help="sampling steps; 1: best PSNR, more: more texture (default: 1 for the tiny "
                        "preset, 20 for pretrained models)")
    parser.add_argument("--sampler", choices=["euler", "dpm"], default="euler", help="dpm: DPM-Solver++ 2M (default euler)")
    parser.add_argument("--average", type=int, default=1, metavar="K", help="the mean of K answers from different noise: less texture, better PSNR (default 1)")
    parser.add_argument("--guidance", type=float, default=1.0, help="how far to go beyond what the prompt asks, away from "
                        "what no prompt gives (default 1: no further)")
    parser.add_argument("--condition_guidance", type=float, default=1.0, help="the same for the degraded image; the model has to be trained "
                        "with --condition_dropout (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise and of degradations made here")
    # with --input
    parser.add_argument("--overwrite", action="store_true", help="restore again what --output holds already")
    parser.add_argument("--quality", type=int, default=95, help="of JPEG and WebP, 1 to 100 (default 95)")
    parser.add_argument("--grid", help="with --input: also a picture of the first eight: input | restored | difference")
    # with --data
    parser.add_argument("--skip_bad", action="store_true", help="leave out rows that cannot be read, instead of ending there")
    parser.add_argument("--degradations", nargs="+", default=DEFAULT_DEGRADATIONS, metavar="NAME",
                        help="for rows of --data without a condition image: what to degrade them with")
    parser.add_argument("--metrics", nargs="+", choices=[*METRICS, "fid"], default=[*METRICS, "fid"], help="default: all; LPIPS and FID fetch "
                        "their weights once (244 MB and 95 MB)")
    parser.add_argument("--y_channel", action="store_true", help="PSNR and SSIM of luma alone (BT.601), as super-resolution papers have them")
    parser.add_argument("--lpips_net", choices=list(LPIPS.NETS), default="alex", help="default alex")
    parser.add_argument("--lpips_weights", nargs=2, metavar=("TRUNK", "HEADS"), help="local files of LPIPS (see PUBLISHED in this file)")
    parser.add_argument("--fid_weights", metavar="FILE", help="local file of FID's Inception")
    parser.add_argument("--compare", metavar="FOLDER", help="also score another program's outputs, named like the degraded or the clean images")
    parser.add_argument("--sweep", metavar="STEPS,...", help="score each of these numbers of steps, and draw PSNR against LPIPS")
    args = parser.parse_args()
    if bool(args.input) == bool(args.data):
        raise UserError("give either --input (pictures to restore) or --data (pairs to measure on)")
    if args.input and not args.output:
        raise UserError("--input needs --output: where to write the restored picture")
    if not args.checkpoint and not args.compare:
        raise UserError("give the --checkpoint to restore with (only --compare does without)")
    check_numbers(args, {"steps": (1, 1000), "average": (1, 1000), "quality": (1, 100), "guidance": (0, 100), "condition_guidance": (0, 100)})
    if args.grid and not args.grid.lower().endswith(tuple(PICTURES)):
        raise UserError(f"--grid {args.grid}: give a file name with a picture's extension, such as .png")
    if args.sweep and not re.fullmatch(r"[1-9]\d{0,2}(,[1-9]\d{0,2})*", args.sweep):
        raise UserError(f"--sweep {args.sweep}: write numbers of steps, such as 1,2,4,8,20")
    args.sweep = [int(steps) for steps in args.sweep.split(",")] if args.sweep else []
    return args


def compared(folder, source):
    """-> function(i, item): the picture in the folder that is named like pair i's degraded or clean image. Raises UserError."""
    files, outputs = {path.stem: path for path in list_images(folder)}, []
    for line, clean, condition, *_ in source.rows:
        outputs.append(files.get((condition or clean).stem) or files.get(clean.stem))
        if outputs[-1] is None:
            raise UserError(f"--compare {folder}: nothing there is named like {(condition or clean).name} ({source.path}, line {line})")

    def load(i, item):
        output = to_tensor(open_image(outputs[i]))
        if output.shape != item["clean"].shape:
            raise UserError(f"{outputs[i]}: {output.shape[2]}x{output.shape[1]}, the pair is {item['clean'].shape[2]}x{item['clean'].shape[1]}")
        return output
    return load


def measure(args, how):
    """--data: tables, scores.csv, scores.json, grid.png, and sweep.png. how: the arguments of restore, None without a checkpoint."""
    source, out = CsvPairs(args.data, args.skip_bad), make_folder(args.output or "out/evaluation")
    metrics = Metrics(args.metrics, args.y_channel, args.lpips_net, args.lpips_weights, args.fid_weights, args.device)
    dataset, methods = PairedDataset(source, None, parse_degradations(args.degradations), training=False, seed=args.seed, skip_bad=args.skip_bad), {}
    if how:
        captions = [dataset.plan(i)[2] if args.prompt is None else args.prompt for i in range(len(dataset))]
        how["prompts"].prepare([*captions, ""])
        ae = how["autoencoder"]
        methods["ceiling"] = lambda i, item: ae.decode(ae.encode(item["clean"][None].to(args.device)))[0, :, :item["clean"].shape[1], :item["clean"].shape[2]].cpu()
        for steps in args.sweep or [how["steps"]]:
            methods[f"steps_{steps}" if args.sweep else "restored"] = lambda i, item, steps=steps: restore(
                pixels=item["condition"][None].to(args.device), captions=[captions[i]], **how | {"steps": steps})[0].cpu()
    if args.compare:
        methods["compared"] = compared(args.compare, source)
    rows, pictures = evaluate_pairs(dataset, methods, metrics)
    rows = [row | {"image": os.path.relpath(source.rows[row["image"]][1], source.path.parent)} for row in rows]
    summary, shares = summarize(rows, ["input", *methods], metrics)
    print_summary(rows, summary, shares, metrics)
    save_image(draw_grid(pictures), out / "grid.png")
    if args.sweep:
        key = "lpips" if "lpips" in metrics.names and "lpips" not in metrics.missing else "ssim"
        points = [(summary[f"steps_{steps}"]["psnr"]["mean"], summary[f"steps_{steps}"][key]["mean"]) for steps in args.sweep]
        draw_panels([(f"{METRICS[key]} over PSNR (dB), by sampling steps", points, False, list(map(str, args.sweep)))], out / "sweep.png")
    write_csv(out / "scores.csv", [list(rows[0])] + [list(row.values()) for row in rows])
    report = {"flags": vars(args), "count": len(rows), "methods": summary, "share_of_the_way": shares, "missing": metrics.missing, "images": rows}
    write_text(out / "scores.json", json.dumps(json.loads(json.dumps(report), parse_constant=lambda _: None), indent=1))  # inf, nan: null
    print(f"{out}/scores.csv, scores.json, grid.png" + ", sweep.png" * bool(args.sweep))


def main():
    args = parse_args()
    check_device(args.device)
    if args.device == "cpu":
        keep_freed_memory()
    work = list_work(args.input, args.output) if args.input else []
    if len(work) > 1:
        make_folder(args.output)
    if not args.checkpoint:
        return measure(args, None)
    restorer, config = load_restorer(args.checkpoint)
    autoencoder, prompts = build_surroundings(config | ({"name": args.model} if args.model else {}), args.device)
    args.steps = args.steps or DEFAULT_STEPS[restorer.prediction]
    how = {"restorer": restorer.to(args.device), "autoencoder": autoencoder, "prompts": prompts} | {
        name: getattr(args, name) for name in ("steps", "seed", "sampler", "guidance", "condition_guidance", "average")}
    if args.data:
        measure(args, how)
    elif restore_files(work, args.overwrite, args.quality, args.grid, caption=args.prompt or "", **how):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
