"""Restore pictures with a trained checkpoint, and measure how well it does.

    python evaluate.py --checkpoint out/demo --input noisy.jpg --output restored.jpg
    python evaluate.py --checkpoint out/demo --input photos/ --output restored/      names are kept
    python evaluate.py --checkpoint out/demo --data val/pairs.csv         table, CSV, JSON, pictures
    python evaluate.py --checkpoint out/demo --data val/pairs.csv --steps 1 2 4 8 20
    python evaluate.py --data theirs.csv        score another program's pictures, as conditions: see
                                                python data.py match CLEAN THEIRS --out theirs.csv

In Python: Pipeline.load("out/demo")("noisy.jpg").save("restored.png")

Pictures may have any size, and 8 bits a channel. Grey stays grey, all other modes become RGB, and
colours sRGB. Transparency is kept, EXIF rotation is applied, the rest is dropped.
"""
import contextlib
import csv
import math
import os
import pickle
import sys
from argparse import SUPPRESS, Namespace
from pathlib import Path

# threads that wait soon sleep instead of spinning, see train.py
os.environ.setdefault("GOMP_SPINCOUNT", "500")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from data import CsvPairs, PairedDataset, check_device, list_images
from data import relative, seed_for, to_image, to_tensor, use_device
from degrade import DEFAULT_DEGRADATIONS, Parser, UserError, between, check_side, choose_output
from degrade import describe_picture, explain_errors, name_shortage, open_image, parse_degradations
from degrade import plain_image, read_header, run_script, save_image, say_notices
from model import SAMPLERS, Prompts, find_checkpoint, guided, load_autoencoder, load_decoder
from model import load_restorer, read_run, rows_trained_on
from vae import PixelAE, blend_tiles, pad_to_multiple, write_json

# --------------------------------------------------------------------------------------------------
# PSNR and SSIM of two batches [B, C, H, W] in [-1, 1] -> one float64 value an image, [B].


def psnr(a, b):
    """Peak signal-to-noise ratio, dB: 10 log10(range^2 / mse) over all pixels and channels.

    It ends at 100 dB, which equal pictures have too: all means are finite, over the same pictures.
    """
    mse = (a.double() - b.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / mse)).clamp(max=100)


def ssim(a, b):
    """Structural similarity (Wang et al. 2004): 11x11 gaussian window of sigma 1.5.

    Population variances; the mean over channels and over positions where the window fits. This is
    scikit-image's with gaussian_weights, sigma=1.5, use_sample_covariance=False. Raises ValueError
    for images below 11 pixels."""
    if min(a.shape[2:]) < 11:
        raise ValueError(f"SSIM needs 11x11 pixels, not {a.shape[3]}x{a.shape[2]}")
    a = a.double() + 1  # black is 0: SSIM compares means
    b = b.double() + 1
    position = torch.arange(-5, 6, dtype=torch.float64, device=a.device)
    window = torch.exp(-0.5 * (position / 1.5) ** 2)
    window = window / window.sum()

    def band(n):  # [n-10, n]: row i averages i..i+10
        matrix = window.new_zeros(n - 10, n)
        for k, weight in enumerate(window):
            matrix.diagonal(k).fill_(weight)
        return matrix

    rows = band(a.shape[2])
    columns = band(a.shape[3]).T

    def blur(x):                                                    # [B, C, H, W]
        return rows @ x @ columns                                   # [B, C, H-10, W-10]

    mean_a, mean_b = blur(a), blur(b)
    product = mean_a * mean_b
    squares = mean_a**2 + mean_b**2
    covariance = blur(a * b) - product
    variances = blur(a * a + b * b) - squares
    c1 = (0.01 * 2) ** 2                                            # 2 = range of [-1, 1]
    c2 = (0.03 * 2) ** 2
    score = (2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
    return score.flatten(1).mean(1)


# --------------------------------------------------------------------------------------------------
# LPIPS and FID: distances between features of trained networks.

# url and local file name (None: as in the url). The name ends with the first digits of the file's
# SHA-256, which are checked.
LPIPS_TRUNK = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", None
LPIPS_HEADS = (
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/alex.pth",
    "lpips_alex-df73285e.pth",
)
INCEPTION = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    None,
)


def read_published(published, path=None):
    """Read {name: tensor} of a published file, downloaded once into torch.hub's folder.

    path: a local file instead. Nothing but tensors is unpickled. Raises OSError for what cannot be
    fetched, UserError for a local file that holds something else."""
    options = {"map_location": "cpu", "weights_only": True}
    if path:
        with explain_errors(path, "these weights"):
            try:
                return dict(torch.load(path, **options))
            except pickle.UnpicklingError:  # its message suggests running the file's code
                raise ValueError("it holds more than tensors") from None
    url, name = published
    try:
        return torch.hub.load_state_dict_from_url(url, file_name=name, check_hash=True, **options)
    except Exception as error:  # no network, another hash, a damaged file
        raise OSError(" ".join(str(error).split())[:200]) from None


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity v0.1, AlexNet (arXiv 1801.03924). 0 = alike.

    The features of both images are normalized over channels at each position. Their squared
    differences are weighted by channel ("heads", fitted to human judgements) and summed over the
    channels and layers, averaged over positions. trunk: the weights of torchvision's AlexNet;
    heads: {"lin0.model.1.weight": ...}. Raises UserError if they do not fit."""

    def __init__(self, trunk, heads):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        )
        widths = 64, 192, 384, 256, 256
        self.heads = nn.ParameterList(torch.empty(1, width, 1, 1) for width in widths)
        weights = {name: t for name, t in trunk.items() if name.startswith("features.")}
        try:
            for i in range(5):
                weights[f"heads.{i}"] = heads[f"lin{i}.model.1.weight"]
            self.load_state_dict(weights)
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"not the weights of LPIPS alex: {reason}") from None
        self.eval().requires_grad_(False)

    def forward(self, a, b):
        """[B, 3, H, W] in [-1, 1], of at least 64 pixels -> [B]."""
        x = torch.cat([a, b])
        shift = x.new_tensor([-0.030, -0.088, -0.188])[:, None, None]
        scale = x.new_tensor([0.458, 0.448, 0.450])[:, None, None]
        x = (x - shift) / scale
        total = 0
        heads = iter(self.heads)
        for layer in self.features:
            x = layer(x)                                            # [2B, C, h, w]
            if isinstance(layer, nn.ReLU):  # all five are compared
                # where all features are 0, vector_norm's gradient is 0, and not nan
                unit = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)
                first, second = unit.chunk(2)
                total = total + ((first - second).square() * next(heads)).sum(1).mean((1, 2))
        return total


class Inception(nn.Module):
    """The Inception v3 of the first FID (arXiv 1706.08500), ported from TensorFlow.

    It differs from torchvision's: see the comments with a star. weights: as pytorch-fid published
    them. Raises UserError if they do not fit."""

    def __init__(self, weights):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, padding=0)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128)
        self.Mixed_6c = BlockC(768, 160)
        self.Mixed_6d = BlockC(768, 160)
        self.Mixed_6e = BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, average_pool)
        self.Mixed_7c = BlockE(2048, max_pool)                      # * a max pool
        body = {name: t for name, t in weights.items() if not name.startswith("fc.")}
        try:
            self.load_state_dict(body)                              # * 1008 classes (fc) left out
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"not the weights of FID's Inception: {reason}") from None
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        for module in self.modules():
            if isinstance(module, ConvBN):  # in eval mode, batch norm folds into it
                module.conv = fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()

    def forward(self, x):
        """[B, 3, H, W] in [-1, 1] -> pool3 [B, 2048]."""
        # * not antialiased, and no other normalization
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6a(x)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))          # [B, 2048, 8, 8]
        return x.mean((2, 3))


class ConvBN(nn.Module):
    def __init__(self, dim, dim_out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(dim_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average_pool(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)        # * padding does not count


def max_pool(x):
    return F.max_pool2d(x, 3, 1, 1)


class BlockA(nn.Module):
    def __init__(self, dim, pool):
        super().__init__()
        self.branch1x1 = ConvBN(dim, 64, 1)
        self.branch5x5_1 = ConvBN(dim, 48, 1)
        self.branch5x5_2 = ConvBN(48, 64, 5)
        self.branch3x3dbl_1 = ConvBN(dim, 64, 1)
        self.branch3x3dbl_2 = ConvBN(64, 96, 3)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3)
        self.branch_pool = ConvBN(dim, pool, 1)

    def forward(self, x):
        a = self.branch1x1(x)
        b = self.branch5x5_2(self.branch5x5_1(x))
        c = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([a, b, c, self.branch_pool(average_pool(x))], 1)


class BlockB(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.branch3x3 = ConvBN(dim, 384, 3, stride=2, padding=0)
        self.branch3x3dbl_1 = ConvBN(dim, 64, 1)
        self.branch3x3dbl_2 = ConvBN(64, 96, 3)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3, stride=2, padding=0)

    def forward(self, x):
        a = self.branch3x3(x)
        b = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([a, b, F.max_pool2d(x, 3, 2)], 1)


class BlockC(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.branch1x1 = ConvBN(dim, 192, 1)
        self.branch7x7_1 = ConvBN(dim, inner, 1)
        self.branch7x7_2 = ConvBN(inner, inner, (1, 7))
        self.branch7x7_3 = ConvBN(inner, 192, (7, 1))
        self.branch7x7dbl_1 = ConvBN(dim, inner, 1)
        self.branch7x7dbl_2 = ConvBN(inner, inner, (7, 1))
        self.branch7x7dbl_3 = ConvBN(inner, inner, (1, 7))
        self.branch7x7dbl_4 = ConvBN(inner, inner, (7, 1))
        self.branch7x7dbl_5 = ConvBN(inner, 192, (1, 7))
        self.branch_pool = ConvBN(dim, 192, 1)

    def forward(self, x):
        a = self.branch1x1(x)
        b = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        c = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        c = self.branch7x7dbl_5(self.branch7x7dbl_4(c))
        return torch.cat([a, b, c, self.branch_pool(average_pool(x))], 1)


class BlockD(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.branch3x3_1 = ConvBN(dim, 192, 1)
        self.branch3x3_2 = ConvBN(192, 320, 3, stride=2, padding=0)
        self.branch7x7x3_1 = ConvBN(dim, 192, 1)
        self.branch7x7x3_2 = ConvBN(192, 192, (1, 7))
        self.branch7x7x3_3 = ConvBN(192, 192, (7, 1))
        self.branch7x7x3_4 = ConvBN(192, 192, 3, stride=2, padding=0)

    def forward(self, x):
        a = self.branch3x3_2(self.branch3x3_1(x))
        b = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([a, self.branch7x7x3_4(b), F.max_pool2d(x, 3, 2)], 1)


class BlockE(nn.Module):
    def __init__(self, dim, pool):
        super().__init__()
        self.branch1x1 = ConvBN(dim, 320, 1)
        self.branch3x3_1 = ConvBN(dim, 384, 1)
        self.branch3x3_2a = ConvBN(384, 384, (1, 3))
        self.branch3x3_2b = ConvBN(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvBN(dim, 448, 1)
        self.branch3x3dbl_2 = ConvBN(448, 384, 3)
        self.branch3x3dbl_3a = ConvBN(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvBN(384, 384, (3, 1))
        self.branch_pool = ConvBN(dim, 192, 1)
        self.pool = pool

    def forward(self, x):
        a = self.branch1x1(x)
        b = self.branch3x3_1(x)
        b = [self.branch3x3_2a(b), self.branch3x3_2b(b)]
        c = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        c = [self.branch3x3dbl_3a(c), self.branch3x3dbl_3b(c)]
        return torch.cat([a, *b, *c, self.branch_pool(self.pool(x))], 1)


class FID:
    """Fréchet inception distance between sets of images, added one batch after the other."""

    def __init__(self, inception):
        self.inception = inception
        self.sets = {}  # name: (count, mean [2048], scatter [2048, 2048]), float64

    @torch.no_grad()
    def add(self, name, images):
        """Add images [B, 3, H, W] in [-1, 1] to the set of that name (Chan et al. 1983)."""
        x = self.inception(images).cpu().double()                   # [B, 2048]
        count, mean, scatter = self.sets.get(name, (0, 0.0, 0.0))
        delta = x.mean(0) - mean
        centred = x - x.mean(0)
        total = count + len(x)
        scatter += centred.T @ centred + delta.outer(delta) * (count * len(x) / total)
        self.sets[name] = total, mean + delta * (len(x) / total), scatter

    def distance(self, a, b):
        """Return the distance between two sets; nan below two images."""
        count_a, mean_a, scatter_a = self.sets[a]
        count_b, mean_b, scatter_b = self.sets[b]
        if min(count_a, count_b) < 2:
            return math.nan
        cov_a, cov_b = scatter_a / (count_a - 1), scatter_b / (count_b - 1)
        return frechet_distance(mean_a, cov_a, mean_b, cov_b)


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """Return |mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) of two gaussians, float64.

    With A = F F^T, A B has the nonzero eigenvalues of the symmetric F^T B F. So no root of the
    non-symmetric A B is needed, and covariances may be singular (fewer images than features)."""
    factor, failed = torch.linalg.cholesky_ex(cov_a)
    if failed:  # singular: keep only the directions that have variance
        values, vectors = torch.linalg.eigh(cov_a)
        kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
        factor = vectors[:, kept] * values[kept].sqrt()
    roots = torch.linalg.eigvalsh(factor.T @ cov_b @ factor).clamp(min=0).sqrt()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots.sum()
    return max(0.0, distance.item())


METRICS = {"psnr": 2, "ssim": 4, "lpips": 4}  # of one image, printed digits; FID is of all


class Metrics:
    """Compute those of "psnr", "ssim", "lpips", "fid" that are in names.

    missing: {name: why} of metrics whose weights cannot be fetched; the others are still computed.
    lpips_weights: local files (trunk, heads). fid_weights: a local file."""

    def __init__(self, names, lpips_weights=None, fid_weights=None, device="cpu"):
        self.names = [name for name in METRICS if name in names]
        self.device = device
        self.lpips = None
        self.fid = None
        self.missing = {}
        reason = "its weights could not be fetched"
        if "lpips" in names:
            trunk, heads = lpips_weights or (None, None)
            try:
                trunk = read_published(LPIPS_TRUNK, trunk)
                self.lpips = LPIPS(trunk, read_published(LPIPS_HEADS, heads)).to(device)
            except OSError as error:
                self.missing["lpips"] = f"{reason}: {error}; --lpips_weights takes local files"
        if "fid" in names:
            try:
                self.fid = FID(Inception(read_published(INCEPTION, fid_weights)).to(device))
            except OSError as error:
                self.missing["fid"] = f"{reason}: {error}; --fid_weights takes a local file"

    @torch.no_grad()
    def __call__(self, clean, image, name):
        """Score a picture [3, H, W], rounded to 8 bits as when it is saved -> {metric: value}.

        nan where a metric is missing or the picture too small for it. name: the set of
        FID that the picture is added to."""
        a, b = to_tensor(to_image(image))[None], clean[None]
        side = min(b.shape[2:])
        values = dict.fromkeys(METRICS, math.nan)
        if self.lpips and side >= 64:
            values["lpips"] = self.lpips(a.to(self.device), b.to(self.device)).item()
        if self.fid:
            self.fid.add(name, a.to(self.device))
        values["psnr"] = psnr(a, b).item()
        if side >= 11:
            values["ssim"] = ssim(a, b).item()
        return {key: values[key] for key in self.names}


# --------------------------------------------------------------------------------------------------
# Restoring.

# A network that predicts the clean image ("residual") needs one step. A velocity is integrated in
# many small ones.
DEFAULT_STEPS = {"residual": 1, "velocity": 20}
PIXEL_TILE = 1024  # the tiny preset restores larger pictures in tiles, which bounds the memory
OVERLAP = 64


def finished_image(pixels, grey):
    """Turn restored pixels [3, H, W] into the picture that is saved, and so scored: L or RGB."""
    image = to_image(pixels)
    return image.convert("L") if grey else image


class Pipeline:
    """A loaded restorer: Pipeline.load("out/demo")("noisy.jpg").save("restored.png").

    autoencoder, prompts: made by model.load_autoencoder and model.Prompts. enlarge: by which factor
    a picture is enlarged first. keeps_grey: whether a grey picture stays grey. steps: the sampling
    steps that restore takes by default; None: 1 for a network that predicts the clean image, 20 for
    SANA; 0: the latents of the degraded picture are decoded."""

    def __init__(self, restorer, autoencoder, prompts, enlarge=1, keeps_grey=True, steps=None):
        self.restorer = restorer
        self.autoencoder = autoencoder
        self.prompts = prompts
        self.enlarge = enlarge
        self.keeps_grey = keeps_grey
        # where load found it: the step folder, and "model" of its config.json
        self.checkpoint = None
        self.config = None
        self.steps = DEFAULT_STEPS[restorer.prediction] if steps is None else steps
        # whether the decoder sees the degraded image
        self.seeing = bool(getattr(autoencoder, "gains", None))

    @classmethod
    def load(cls, path, device="cpu", model=None, weights="ema"):
        """Load a run of train.py or one of its checkpoints. Raises UserError.

        path may also be the file `best` or `latest` of a run, which names a checkpoint. model:
        where autoencoder and text encoder are now, if not where they were in training. weights:
        "ema", the averaged ones, or "model", the last ones. Pictures are enlarged before they are
        restored as the conditions were in training. On a GPU a pretrained SANA is loaded in bf16.
        """
        device = str(device)
        folder = find_checkpoint(path)
        restorer, config = load_restorer(folder, weights, model)
        pretrained = config["autoencoder"]["kind"] == "pretrained"
        if device.startswith("cuda") and pretrained:
            restorer.sana.to(torch.bfloat16)  # half the memory; the projection stays fp32
        steps = None
        if config["decoder"]:
            autoencoder = load_decoder(config, folder, weights)
            steps = config["decoder"]["steps"]
        else:
            autoencoder = load_autoencoder(config, folder)
        around = autoencoder.to(device), Prompts(config, device)
        inputs = config["enlarge"], config["keeps_grey"]
        pipeline = cls(restorer.to(device), *around, *inputs, steps)
        pipeline.checkpoint = folder
        pipeline.config = config
        return pipeline

    def __call__(self, picture, prompt="", **sampling):
        """Restore a path, a PIL image of any mode, or a uint8 array [H, W] or [H, W, 3].

        -> PIL image, sRGB, with its transparency; grey if it was grey and keeps_grey is set.
        sampling: the arguments of restore. Raises UserError."""
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        if isinstance(picture, Image.Image):
            picture = plain_image(picture, describe_picture(picture))
        else:
            notices = {}
            picture = open_image(picture, notices)
            say_notices(notices)
        if self.enlarge > 1:
            picture = ImageOps.scale(picture, self.enlarge, Image.Resampling.BICUBIC)
        pixels = to_tensor(picture)[None].to(next(self.restorer.parameters()).device)
        restored = self.restore(pixels, [prompt], **sampling)[0]
        grey = self.keeps_grey and picture.mode.startswith("L")
        restored = finished_image(restored, grey)
        if picture.mode.endswith("A"):
            restored.putalpha(picture.getchannel("A"))
        return restored

    @torch.no_grad()
    def restore(
        self,
        pixels,
        captions,
        steps=None,
        sampler="euler",
        seed=0,
        guidance=1.0,
        condition_guidance=1.0,
        decoder_weight=1.0,
    ):
        """Restore degraded pixels [B, 3, H, W] in [-1, 1] of any size, with a caption each.

        -> the same shape, clipped to [-1, 1]. The noise depends on seed and size alone, not on the
        rest of the batch. steps None: self.steps. guidance, condition_guidance: see model.guided.
        decoder_weight: how much a decoder that sees the degraded image adds from it, 0 to 1. Raises
        ValueError for pixels that are not floats in [-1, 1]."""
        if not (pixels.is_floating_point() and pixels.abs().max() <= 1):  # nan fails this, too
            raise ValueError("pixels: give floats in [-1, 1], as data.to_tensor makes them")
        restorer, autoencoder, f = self.restorer, self.autoencoder, self.autoencoder.factor
        height, width = pixels.shape[2:]
        pixels = pad_to_multiple(pixels, f)
        size = pixels.shape[2:]
        generator = torch.Generator().manual_seed(seed_for(seed, 0, "restore"))
        shape = autoencoder.channels, size[0] // f, size[1] // f
        noise = torch.randn(shape, generator=generator).to(pixels)
        self.prompts.prepare([*captions, ""])
        prompt = self.prompts(captions)
        empty = self.prompts([""] * len(captions))
        steps = self.steps if steps is None else steps

        def restore_tile(index):
            condition = autoencoder.encode(pixels[index])           # [B, C, h, w]
            latents = condition
            if steps > 0:  # the restorer, with condition and prompt filled in
                velocity = guided(restorer, condition, prompt, empty, guidance, condition_guidance)
                rows = slice(index[1].start // f, index[1].stop // f)
                columns = slice(index[2].start // f, index[2].stop // f)
                start = noise[:, rows, columns].expand_as(condition)
                latents = SAMPLERS[sampler](velocity, start, steps, restorer.shift)
            if self.seeing:
                return autoencoder.decode(latents, pixels[index], decoder_weight)
            return autoencoder.decode(latents)                      # [B, 3, h*f, w*f]

        # DC-AE's latents are small: one piece (encode and decode split into tiles by themselves)
        tile = max(size)
        if isinstance(autoencoder, PixelAE):
            tile = PIXEL_TILE // f * f
        restored = blend_tiles(restore_tile, size, tile, OVERLAP // f * f)
        return restored[..., :height, :width].clamp(-1, 1)


def restore_files(pipeline, work, overwrite=False, quality=95, **options):
    """Restore [(picture, output path)] -> how many failed. A failure does not stop the others.

    Existing outputs are kept unless overwrite is set. If work is one picture, its failure raises
    UserError. options: passed to pipeline."""
    # os.path.exists is False for a name that is too long; writing it fails later
    todo = [(path, out) for path, out in work if overwrite or not os.path.exists(out)]
    failed = 0
    notices = {}
    for path, out in tqdm(todo, unit="img", desc="restore", disable=len(work) == 1):
        try:
            with name_shortage(path):
                picture = open_image(path, notices)
                check_side(out, [side * pipeline.enlarge for side in picture.size])
                save_image(pipeline(picture, **options), out, quality)
        except UserError as error:
            if len(work) == 1:
                raise
            tqdm.write(f"failed: {error}", file=sys.stderr)
            failed += 1
    say_notices(notices)
    where = work[0][1]
    if len(work) > 1:
        where = os.path.commonpath([out.parent for _, out in work])
    kept = len(work) - len(todo)
    print(f"restored {len(todo) - failed} image(s) -> {where}; {failed} failed", end="")
    print(f"; {kept} were there already (--overwrite makes them again)" if kept else "")
    return failed


def name_output(path, out, notices):
    """Return where the restored picture of a file goes; see choose_output."""
    mode = "RGB"
    with contextlib.suppress(UserError):  # it is damaged, which is said when it is its turn
        mode = read_header(path).mode
    return choose_output(out, mode, notices)


def list_work(sources, target):
    """Files and folders -> [(picture, where the restored one goes)]. Raises UserError."""
    target = Path(target)
    work = []
    for source in sources:
        path = Path(source)
        if not os.path.exists(source):
            raise UserError(f"--input {source}: no such file or folder")
        if path.is_dir():
            if target.resolve().is_relative_to(path.resolve()):
                raise UserError(f"--output {target} lies inside --input {path}; choose another")
            for picture in list_images(path):
                work.append((picture, target / picture.relative_to(path)))
        elif target.is_dir() or len(sources) > 1:
            work.append((path, target / path.name))
        else:
            work.append((path, target))
    notices = {}
    work = [(path, name_output(path, out, notices)) for path, out in work]
    say_notices(notices)
    for path, out in work:
        if out.resolve() == path.resolve():
            raise UserError(f"--output {out} would write over the input; choose another")
    if len({out for _, out in work}) < len(work):
        raise UserError(f"--output {target}: two inputs have the same name; restore them apart")
    return work


# --------------------------------------------------------------------------------------------------
# Measuring. A method is a function (i, item of the data set) -> its picture [3, H, W].


def evaluate_pairs(dataset, methods, metrics, quiet=False, save=None, unrestored="input"):
    """Score {name: method} on each pair, and the condition itself, under the name unrestored.

    -> rows [{"image": i, "condition": "", "degradation": [name, ...], "input_psnr", "NAME_psnr",
    ...}], and the labelled pictures of the first eight pairs, as draw_grid takes them. save: called
    with each row when it is measured; it may change "image" to a name. Raises UserError."""
    rows = []
    pictures = []
    bar = tqdm(range(len(dataset)), unit="img", desc="evaluate", disable=quiet)
    for i in bar:
        item = dataset[i]
        outputs = {unrestored: item["condition"]}
        for name, method in methods.items():
            with name_shortage(dataset.source.rows[dataset.rows[i]].name):
                outputs[name] = method(i, item)
        row = {"image": i, "condition": "", "degradation": dataset.name_degradations(i)}
        labelled = []
        for name, output in outputs.items():
            scores = metrics(item["clean"], output, name)
            row |= {f"{name}_{key}": value for key, value in scores.items()}
            if name != "ceiling":
                shown = "degraded" if name == "input" else name
                label = f"{shown} {scores.get('psnr', math.nan):.2f} dB"
                labelled.append((label, to_image(output)))
        if metrics.fid:
            metrics.fid.add("clean", item["clean"][None].to(metrics.device))
        rows.append(row)
        if save:
            save(row)
        labelled.append(("clean", to_image(item["clean"])))
        if len(pictures) < 8:
            pictures.append(labelled)
        bar.set_postfix_str(", ".join(label for label, _ in labelled[:-1]))
    return rows, pictures


def values_of(rows, column):
    """Return the values of a column without nan: pictures too small for a metric have no score."""
    return [row[column] for row in rows if not math.isnan(row[column])]


def mean(values):
    return sum(values) / len(values) if values else math.nan


def means(rows):
    """Average each column of scores over the rows that have a value."""
    columns = [name for name, value in rows[0].items() if isinstance(value, float)]
    return {name: mean(values_of(rows, name)) for name in columns}


def bootstrap(values, resamples=1000):
    """Return the 95% interval of a mean (percentile bootstrap, Efron 1979), nan below 2 values."""
    if len(values) < 2:
        return math.nan, math.nan
    values = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(values), (resamples, len(values)), generator=generator)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return tuple(values[index].mean(1).quantile(ends).tolist())


def summarize(rows, methods, metrics):
    """Return {method: {metric: {"mean", "low", "high"}, ..., "fid": distance}}."""
    summary = {}
    for name in methods:
        summary[name] = {}
        for key in metrics.names:
            values = values_of(rows, f"{name}_{key}")
            low, high = bootstrap(values)
            summary[name][key] = {"mean": mean(values), "low": low, "high": high}
        summary[name]["fid"] = metrics.fid.distance("clean", name) if metrics.fid else math.nan
    return summary


BESIDE = {  # what stands beside a restorer's scores
    "input": "degraded input",
    "ceiling": "ceiling: autoencoder alone",
    # of a decoder that sees the degraded image
    "control": "control: input's own latents",
    "plain": "restored, plain decoder",
}


def number(value, key):
    return "n/a" if math.isnan(value) else f"{value:.{METRICS[key]}f}"


def cell(scores, key):
    """Format a mean and its interval: "28.76 (28.10, 29.41)"."""
    mean, low, high = (number(scores[name], key) for name in ("mean", "low", "high"))
    return mean if low == "n/a" else f"{mean} ({low}, {high})"


def print_row(label, cells):
    print(f"{label:30}" + "".join(f" {text:26}" for text in cells))


def print_summary(rows, summary, metrics):
    """Print the table: a line for each method, then for each degradation."""
    titles = [key.upper() for key in metrics.names]
    if metrics.fid:
        titles.append("FID")
    print_row(f"{len(rows)} images, mean (95%)", titles)
    for method, scores in summary.items():
        cells = [cell(scores[key], key) for key in metrics.names]
        if metrics.fid:
            cells.append(f"{scores['fid']:.2f}")
        print_row(BESIDE.get(method, method), cells)
    methods = [name for name in summary if name not in ("ceiling", "plain")]
    for group in sorted({name for row in rows for name in row["degradation"]}):
        some = [row for row in rows if group in row["degradation"]]
        values = means(some)
        cells = []
        for key in metrics.names:  # "20.44 -> 28.76": all methods in a cell
            cells.append(" -> ".join(number(values[f"{name}_{key}"], key) for name in methods))
        print_row(f"with {group} ({len(some)})", cells)
    print_notes(rows, summary, metrics)


def print_notes(rows, methods, metrics):
    """Say below the table what its means do not show."""
    for name, reason in metrics.missing.items():
        print(f"{name.upper()}: n/a ({reason})")
    if metrics.fid and len(rows) < 2048:
        print(f"FID of {len(rows)} images is too high: compare it only at the same number of them")
    for key in metrics.names:
        small = len(rows) - len(values_of(rows, f"{list(methods)[0]}_{key}"))
        if small and key not in metrics.missing:
            print(f"{key.upper()}: {small} of {len(rows)} images are too small for it")
    at_the_end = []
    for name in methods:
        count = sum(row.get(f"{name}_psnr") == 100 for row in rows)
        if count:
            at_the_end.append(f"{name} {count}")
    if at_the_end:
        print("PSNR ends at 100 dB, where pictures equal the clean ones:", ", ".join(at_the_end))


def ceiling_method(autoencoder, device):
    """Make the method that encodes the clean picture and decodes it again."""

    def method(i, item):
        clean = item["clean"][None].to(device)
        with torch.no_grad():
            pixels = autoencoder.decode(autoencoder.encode(clean))
        pixels = pixels[0, :, : clean.shape[2], : clean.shape[3]]
        return to_tensor(finished_image(pixels, item["clean_grey"]))

    return method


def restoring_method(pipeline, captions, device, **sampling):
    """Make the method that restores the condition. sampling: the arguments of restore."""

    def method(i, item):
        pixels = item["condition"][None].to(device)
        restored = pipeline.restore(pixels, [captions[i]], **sampling)[0]
        return to_tensor(finished_image(restored, item["grey"] and pipeline.keeps_grey))

    return method


def claim_folder(output):
    """Make the folder of the scores, --output or the next free one, and return it.

    Making it claims it: of two evaluations that start at once, each has its own."""
    out = Path(output or "out/evaluation")
    out.parent.mkdir(parents=True, exist_ok=True)
    next_one = 2
    while True:
        try:
            out.mkdir()
            return out
        except FileExistsError:
            if output:
                raise UserError(f"--output {output} exists already; name a new folder") from None
        out = Path(f"out/evaluation-{next_one}")
        next_one += 1


def append_row(path, row):
    """Append {column: value} to a CSV; the columns stand in its first line."""
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(row)
        writer.writerow(row.values())


def make_methods(args, pipeline, dataset):
    """Return {name: method}: the ceiling, and the restorer with each number of --steps.

    The ceiling is the round trip of the clean picture through the autoencoder. A decoder that sees
    the degraded image has two more. control: this decoder on the condition's own latents (no
    steps); if it scores as well, the transformer adds nothing. plain: the original decoder."""
    captions = [dataset.plan(i).caption for i in range(len(dataset))]
    if args.prompt is not None:
        captions = [args.prompt] * len(dataset)
    pipeline.prompts.prepare([*captions, ""])

    def restoring(pipeline, steps):
        options = sampling_options(args) | {"steps": steps}
        return restoring_method(pipeline, captions, args.device, **options)

    if pipeline.seeing:
        original = load_autoencoder(pipeline.config, pipeline.checkpoint)
        plain = Pipeline(pipeline.restorer, original.to(args.device), pipeline.prompts)
        plain.keeps_grey = pipeline.keeps_grey
        methods = {
            "ceiling": ceiling_method(original, args.device),
            "control": restoring(pipeline, 0),
            "plain": restoring(plain, args.steps[0]),
        }
    else:
        methods = {"ceiling": ceiling_method(pipeline.autoencoder, args.device)}
    for steps in args.steps:
        name = f"steps_{steps}" if len(args.steps) > 1 else "restored"
        methods[name] = restoring(pipeline, steps)
    return methods


def open_pairs(args):
    """Open --data. Raises UserError for pairs or flags that do not go together."""
    source = CsvPairs(args.data, args.skip_bad)
    print(source.summary())
    unpaired = [row.line for row in source.rows if not row.condition]
    if args.degradations and not unpaired:
        raise UserError(f"--degradations: every row of {args.data} has a condition; leave it out")
    if not args.checkpoint and unpaired:
        where = f"{args.data}, line {unpaired[0]}"
        raise UserError(f"{where}: no condition to score; name one, or give --checkpoint")
    if not args.checkpoint and source.enlarge > 1:
        sizes = f"conditions {source.enlarge} times smaller than the clean pictures"
        raise UserError(f"{args.data}: {sizes} need --checkpoint; without, sizes must be the same")
    return source


def say_trained_rows(checkpoint, source):
    """Say how many rows of a CsvPairs a run, or one it builds on, was trained on.

    They are known by the content of their clean pictures."""
    trained = rows_trained_on(checkpoint)
    count = sum(row.digest in trained for row in source.rows)
    if count:
        print(f"{source.path}: the checkpoint was trained on {count} of these {len(source)} rows")


def measure(args, out):
    """Do what --data asks: print the table, write scores.csv, scores.json and grid.png to out."""
    source = open_pairs(args)
    args.degradations = args.degradations or DEFAULT_DEGRADATIONS
    degradations = parse_degradations(args.degradations)
    options = {"training": False, "seed": args.seed}
    if args.checkpoint:
        pipeline = load_pipeline(args)
        say_trained_rows(pipeline.checkpoint, source)
        if pipeline.enlarge != source.enlarge:
            factors = f"{pipeline.enlarge} times in training, {source.enlarge} times here"
            print(f"conditions were enlarged {factors}")
        in_training = read_run(pipeline.checkpoint)["args"]
        options["max_degradations"] = in_training.get("max_degradations", 3)
    dataset = PairedDataset(source, None, degradations, **options)
    metrics = Metrics(args.metrics, args.lpips_weights, args.fid_weights, args.device)
    methods = make_methods(args, pipeline, dataset) if args.checkpoint else {}
    unrestored = "input" if args.checkpoint else "conditions"

    def save(row):
        pair = source.rows[row["image"]]
        row["image"] = relative(pair.clean, source.path)
        if pair.condition:
            row["condition"] = relative(pair.condition, source.path)
        done = "; ".join(row["degradation"])
        append_row(out / "scores.csv", row | {"degradation": done})

    rows, pictures = evaluate_pairs(dataset, methods, metrics, save=save, unrestored=unrestored)
    summary = summarize(rows, [unrestored, *methods], metrics)
    print_summary(rows, summary, metrics)
    save_image(draw_grid(pictures), out / "grid.png")
    report = {
        "flags": vars(args),
        "count": len(rows),
        "methods": summary,
        "missing": metrics.missing,
        "images": rows,
    }
    write_json(out / "scores.json", report)
    print("written:", ", ".join(str(path) for path in sorted(out.glob("*.*"))))


# --------------------------------------------------------------------------------------------------
# Pictures of pictures, and line charts.


def draw_grid(rows, tile=256):
    """Draw rows of (label, PIL image): the centre of each, unscaled, at most tile pixels wide.

    Smaller pictures leave room in their tiles. More than four rows stand two side by side."""
    columns = len(rows[0]) * (2 if len(rows) > 4 else 1)
    tiles = [tile for row in rows for tile in row]
    side = min(tile, max(min(image.size) for _, image in tiles))
    width, height = side + 4, side + 18
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (label, image) in enumerate(tiles):
        x, y = i % columns * width, i // columns * height
        across, down = min(side, image.width), min(side, image.height)
        left, top = (image.width - across) // 2, (image.height - down) // 2
        draw.text((x + 2, y + 2), label, fill="black")
        sheet.paste(image.crop((left, top, left + across, top + down)), (x, y + 16))
    return sheet


WIDTH, HEIGHT = 640, 240  # pixels, of a chart


def draw_charts(charts, path):
    """Draw line charts below each other and save them.

    charts: [(title, [(x, y)], log_scale)]."""
    picture = Image.new("RGB", (WIDTH, len(charts) * HEIGHT), "white")
    for i, chart in enumerate(charts):
        draw_chart(ImageDraw.Draw(picture), i * HEIGHT, *chart)
    save_image(picture, path)


def draw_chart(draw, top, title, points, log_scale):
    left, right, bottom, top = 44, WIDTH - 12, top + HEIGHT - 28, top + 28
    draw.text((left, top - 24), title, fill="black")
    points = [(x, y) for x, y in points if math.isfinite(x + y)]
    if not points:
        return
    xs = [x for x, _ in points]
    ys = [math.log10(max(y, 1e-12)) if log_scale else y for _, y in points]
    y0, y1 = min(ys), max(ys)
    places = []
    for x, y in zip(xs, ys):
        across = x / max(max(xs), 1e-9)
        up = (y - y0) / max(y1 - y0, 1e-9)
        places.append((left + across * (right - left), bottom - up * (bottom - top)))
    for share in (0, 0.5, 1):  # three grid lines
        y = bottom - share * (bottom - top)
        value = y0 + share * (y1 - y0)
        draw.line([(left, y), (right, y)], fill="#dddddd")
        draw.text((4, y - 6), f"{10**value if log_scale else value:.3g}", fill="black")
    draw.text((left, bottom + 8), "0", fill="black")
    draw.text((right - 48, bottom + 8), f"{max(xs):.5g}", fill="black")
    draw.line(places, fill="#1f5fbf", width=2)


# --------------------------------------------------------------------------------------------------

# None: what the checkpoint, the pairs or the machine say
DEFAULTS = dict.fromkeys(["checkpoint", "input", "data", "output", "device", "model", "prompt"])
DEFAULTS |= dict.fromkeys(["steps", "decoder_weight", "degradations"])
DEFAULTS |= dict.fromkeys(["lpips_weights", "fid_weights"])
DEFAULTS |= dict.fromkeys(["overwrite", "skip_bad"], False)
DEFAULTS |= {"seed": 0, "weights": "ema", "sampler": "euler", "guidance": 1.0}
DEFAULTS |= {"condition_guidance": 1.0, "quality": 95, "metrics": [*METRICS, "fid"]}


def make_parser():
    parser = Parser(__doc__, usage="python evaluate.py [flags]", argument_default=SUPPRESS)
    add = parser.add_argument
    add("--checkpoint", help="run folder of train.py, its file best or latest, or a step folder")
    add("--input", nargs="+", help="pictures or folders to restore")
    add("--data", metavar="CSV", help="pairs to measure on")
    text = "restored picture or folder; new folder of scores (default: the next in out)"
    add("--output", help=text)
    add("--seed", type=between(int, 0), help="of all noise (default 0)")
    add("--device", type=check_device, help="default cuda, where there is one")
    add = parser.group("how to restore")
    add("--weights", choices=["ema", "model"], help="averaged (default), or last")
    add("--model", help="where a pretrained model's autoencoder and text encoder are now")
    add("--prompt", help='"Remove JPEG artifacts." (default: "", or the captions of --data)')
    text = "few have the best PSNR (default 1 for tiny, mini; SANA 20); with --data several compare"
    add("--steps", type=between(int, 1, 1000), nargs="+", metavar="N", help=text)
    add("--sampler", choices=list(SAMPLERS), help="euler (default); dpm: DPM-Solver++ 2M")
    factor = between(float, 0, 100)
    add("--guidance", type=factor, help="prompt weight; see model.guided (default 1)")
    add("--condition_guidance", type=factor, help="see model.guided (default 1)")
    text = "how much the decoder sees of the degraded picture, after --stage decoder (default 1)"
    add("--decoder_weight", type=between(float, 0, 1), metavar="W", help=text)
    add = parser.group("with --input")
    add("--overwrite", action="store_true", help="restore again what --output holds already")
    add("--quality", type=between(int, 1, 100), help="of JPEG and WebP (default 95)")
    add = parser.group("with --data")
    text = "such as jpeg gaussian_noise:sigma=25 (default: all but color_jitter)"
    add("--degradations", nargs="+", metavar="NAME", help=text)
    add("--skip_bad", action="store_true", help="leave out rows that cannot be read")
    add("--metrics", nargs="+", choices=DEFAULTS["metrics"], help="default: all four")
    add("--lpips_weights", nargs=2, metavar=("TRUNK", "HEADS"), help="local files")
    add("--fid_weights", metavar="FILE", help="local file of FID's Inception")
    return parser


def parse_args(argv=None):
    """Return the flags. Raises UserError, also for one that has no effect beside the others."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))  # what was typed
    args = Namespace(**(DEFAULTS | given))
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if bool(args.input) == bool(args.data):
        raise UserError("give --input (pictures to restore) or --data (pairs to measure on)")
    if args.input:
        parser.refuse(given, "with --data", "goes with --data, not with --input; leave it out")
        if not args.output:
            raise UserError("--input needs --output: where to write the restored picture")
        if len(args.steps or []) > 1:
            raise UserError("--steps: several numbers compare them on --data; give --input one")
    else:
        parser.refuse(given, "with --input", "goes with --input, not with --data; leave it out")
    if not args.checkpoint:
        reason = "needs --checkpoint: what to restore with"
        parser.refuse(given, "how to restore", reason)
        if args.input:
            raise UserError(f"--input: {reason}")
    for metric in ("lpips", "fid"):
        if f"{metric}_weights" in given and metric not in args.metrics:
            raise UserError(f"--{metric}_weights: --metrics leaves out {metric}; leave it out too")
    return args


def load_pipeline(args):
    """Load --checkpoint and set what it says of flags. Raises UserError for one without effect."""
    pipeline = Pipeline.load(args.checkpoint, args.device, args.model, args.weights)
    if args.model and pipeline.config["autoencoder"]["kind"] != "pretrained":
        raise UserError("--model: this checkpoint is of no pretrained model; leave it out")
    if args.decoder_weight is not None and not pipeline.seeing:
        reason = "this checkpoint has no decoder that sees the degraded image; leave it out"
        raise UserError(f"--decoder_weight: {reason}")
    args.steps = args.steps or [pipeline.steps]
    if args.decoder_weight is None:
        args.decoder_weight = 1.0
    return pipeline


SAMPLING = ["sampler", "seed", "guidance", "condition_guidance", "decoder_weight"]


def sampling_options(args):
    """Return the arguments of Pipeline.restore that flags set, but steps."""
    return {name: getattr(args, name) for name in SAMPLING}


def main():
    args = parse_args()
    use_device(args.device)
    if args.data:
        out = claim_folder(args.output)
        try:
            measure(args, out)
        finally:
            with contextlib.suppress(OSError):
                out.rmdir()  # if nothing was written
        return
    work = list_work(args.input, args.output)
    pipeline = load_pipeline(args)
    options = sampling_options(args) | {"steps": args.steps[0], "prompt": args.prompt or ""}
    if restore_files(pipeline, work, args.overwrite, args.quality, **options):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
