"""Autoencoders: pixels [B, 3, H, W] in [-1, 1] <-> latents [B, C, H/f, W/f] of variance near 1.

A latent is the small grid that the transformer works on instead of pixels: at f = 32 a picture of
1024x1024 pixels is 32x32 positions of C numbers, so 1,024 tokens and not a million.
PixelAE is lossless and serves the tiny preset. DCAE is SANA's (DC-AE, arXiv 2410.10733). Both have
encode, decode, factor (f) and channels (C). encode accepts any H, W: it pads the picture to the
next multiple of f by mirroring it. Crop what decode returns. DCAE.add_skips lets the decoder see
the degraded picture.

The last section reads and writes the weight files of all networks in this project.
Letters in shape comments: B batch, C latent channels, D channels of a stage, H, W its grid,
N = H*W tokens, h heads, d channels of a head.
"""
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from degrade import UserError, atomic_write, explain_errors


class PixelAE(nn.Module):
    """Turn each factor x factor block of pixels into one latent position, 3 * factor^2 channels.

    Nothing is lost. Latents are pixels (-1 to 1) times 2, for a variance near 1: the pixels of
    photographs have a standard deviation of about 0.5."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.channels = 3 * factor**2

    def encode(self, pixels):
        """[B, 3, H, W] -> [B, 3f^2, H/f, W/f]."""
        return F.pixel_unshuffle(pad_to_multiple(pixels, self.factor), self.factor) * 2

    def decode(self, latents):
        """[B, 3f^2, H, W] -> [B, 3, fH, fW]."""
        return F.pixel_shuffle(latents / 2, self.factor)


# --------------------------------------------------------------------------------------------------
# DC-AE. Module and parameter names are those of diffusers' AutoencoderDC.

DCAE_DEFAULTS = {  # diffusers' defaults for keys that config.json leaves out
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": "ResBlock",  # one for all stages, or a list
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "pixel_unshuffle",
    "upsample_block_type": "pixel_shuffle",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "decoder_conv_act_fn": "relu",
    "scaling_factor": 1.0,
}
DCAE_SUPPORTED = {  # what SANA's own has, and the mini preset's
    "encoder_block_types": ["ResBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "EfficientViTBlock"],
    "downsample_block_type": ["pixel_unshuffle", "Conv", "conv"],
    "upsample_block_type": ["pixel_shuffle", "interpolate"],
    "decoder_norm_types": ["rms_norm"],
    "decoder_act_fns": ["silu"],
    "encoder_out_shortcut": [True],
    "decoder_in_shortcut": [True],
    "decoder_conv_act_fn": ["relu"],
}
TILE = 512  # pixels a side; pictures with a side of over two tiles are cut up, to bound memory
ATTENTION_TILE = TILE // 8  # the same in positions of the attention stages, 8 pixels wide in SANA


class RMSNorm2d(nn.Module):
    """Divide each position by the root mean square of its channels, then scale and shift."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x):                                           # [B, D, H, W]
        # the sum runs over D terms: fp32, also for bf16 inputs
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        y = x * torch.rsqrt(norm.square() / x.shape[1] + 1e-5)
        y = y.mul_(self.weight[:, None, None]).add_(self.bias[:, None, None])
        return y.to(x.dtype)


class ResBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm = RMSNorm2d(dim)

    def forward(self, x):                                           # [B, D, H, W]
        y = F.silu(self.conv1(x), inplace=True)                     # autograd copies what it needs
        return self.norm(self.conv2(y)).add_(x)


class MultiscaleProjection(nn.Module):
    """Mix q, k, v over a kernel x kernel window: depthwise convolution, then 1x1 in groups of d."""

    def __init__(self, channels, heads, kernel):
        super().__init__()
        self.proj_in = nn.Conv2d(
            channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False
        )
        self.proj_out = nn.Conv2d(channels, channels, 1, groups=3 * heads, bias=False)

    def forward(self, x):                                           # [B, 3D, H, W]
        return self.proj_out(self.proj_in(x))


class MultiscaleAttention(nn.Module):
    """ReLU linear attention at several scales (EfficientViT, arXiv 2205.14756).

    Position i gives sum_j v_j (k_j . q_i) / sum_j (k_j . q_i), where q and k have passed a ReLU.
    Without a softmax the sum over j can be taken first: v k^T, one d x d matrix per head. So a
    large picture is processed in tiles twice: first for this sum, then for the outputs."""

    def __init__(self, dim, head_dim, kernels):
        super().__init__()
        heads = dim // head_dim
        width = heads * head_dim
        self.head_dim = head_dim
        self.halo = max(kernels, default=0) // 2
        self.to_q = nn.Linear(dim, width, bias=False)
        self.to_k = nn.Linear(dim, width, bias=False)
        self.to_v = nn.Linear(dim, width, bias=False)
        self.to_qkv_multiscale = nn.ModuleList()
        for kernel in kernels:
            self.to_qkv_multiscale.append(MultiscaleProjection(3 * width, heads, kernel))
        self.to_out = nn.Linear(width * (1 + len(kernels)), dim, bias=False)
        self.norm_out = RMSNorm2d(dim)

    def qkv(self, x, core):
        """x [B, D, H, W]; core: the index of what is no halo -> q, k, v [B, h, d, N]."""
        tokens = x.flatten(2).transpose(1, 2)                       # [B, N, D]
        qkv = torch.cat([self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)], 2)
        qkv = qkv.transpose(1, 2).unflatten(2, x.shape[2:])         # [B, 3D, H, W]
        scales = [qkv]
        for project in self.to_qkv_multiscale:
            scales.append(project(qkv))
        qkv = torch.cat(scales, 1)[core].float().flatten(2)        # fp32: sums run over N terms
        # The channels are q, k, v of scale 1, then q, k, v of scale 2. They are cut into runs of
        # 3*d. Each run is one head, and its thirds serve as q, k, v whatever they were before: the
        # published weights were trained this way.
        q, k, v = qkv.unflatten(1, (-1, 3 * self.head_dim)).chunk(3, dim=2)
        return F.relu(q), F.relu(k), v                              # [B, h, d, N] each

    def forward(self, x):                                           # [B, D, H, W]
        cuts = cut_tiles(x.shape[2:], ATTENTION_TILE, self.halo)
        summary = 0
        total = 0
        for outer, core, _ in cuts:
            q, k, v = self.qkv(x[outer], core)
            summary = summary + v @ k.transpose(2, 3)               # [B, h, d, d]
            total = total + k.sum(3).unsqueeze(2)                   # [B, h, 1, d]
        out = torch.empty_like(x)
        for outer, core, target in cuts:
            if len(cuts) > 1:  # with one tile, the q from above is still valid
                q, _, _ = self.qkv(x[outer], core)
            attended = (summary @ q) / (total @ q + 1e-15)          # [B, h, d, N]
            tokens = self.to_out(attended.flatten(1, 2).transpose(1, 2).to(x.dtype))
            grid = x[target].shape[2:]
            out[target] = x[target] + self.norm_out(tokens.transpose(1, 2).unflatten(2, grid))
        return out                                                  # [B, D, H, W]


class GLUMBConv(nn.Module):
    """The gated feed-forward network: 1x1 convolution, 3x3 depthwise convolution, gate, 1x1."""

    def __init__(self, dim):
        super().__init__()
        hidden = 4 * dim
        self.conv_inverted = nn.Conv2d(dim, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, dim, 1, bias=False)
        self.norm = RMSNorm2d(dim)

    def forward(self, x):                                           # [B, D, H, W]
        y = self.conv_depth(F.silu(self.conv_inverted(x)))          # [B, 8D, H, W]
        y, gate = y.chunk(2, dim=1)                                 # [B, 4D, H, W] each
        y = self.conv_point(y * F.silu(gate))                       # [B, D, H, W]
        return x + self.norm(y)


class EfficientViTBlock(nn.Module):
    def __init__(self, dim, head_dim, kernels):
        super().__init__()
        self.attn = MultiscaleAttention(dim, head_dim, kernels)
        self.conv_out = GLUMBConv(dim)

    def forward(self, x):                                           # [B, D, H, W]
        x = self.attn(x)
        return in_tiles(lambda index: self.conv_out(x[index]), x.shape[2:], ATTENTION_TILE, halo=1)


class Down(nn.Module):
    """Halve the side.

    The shortcut beside the convolution makes DC-AE trainable (section 3.2): pixel_unshuffle, then
    the mean over groups of channels."""

    def __init__(self, dim, dim_out, kind, shortcut=True):
        super().__init__()
        self.unshuffle = kind == "pixel_unshuffle"
        self.shortcut = shortcut
        self.dim_out = dim_out
        if self.unshuffle:
            self.conv = nn.Conv2d(dim, dim_out // 4, 3, padding=1)
        else:
            self.conv = nn.Conv2d(dim, dim_out, 3, stride=2, padding=1)

    def forward(self, x):                                           # [B, D, H, W]
        y = self.conv(x)
        if self.unshuffle:
            y = F.pixel_unshuffle(y, 2)
        if self.shortcut:
            y = y + F.pixel_unshuffle(x, 2).unflatten(1, (self.dim_out, -1)).mean(2)
        return y                                                    # [B, D_out, H/2, W/2]


class Up(nn.Module):
    """Double height and width. The shortcut mirrors Down's: repeat channels, then pixel_shuffle."""

    def __init__(self, dim, dim_out, kind, shortcut=True):
        super().__init__()
        self.interpolate = kind == "interpolate"
        self.shortcut = shortcut
        self.repeats = 4 * dim_out // dim
        self.conv = nn.Conv2d(dim, dim_out if self.interpolate else 4 * dim_out, 3, padding=1)

    def forward(self, x):                                           # [B, D, H, W]
        if self.interpolate:
            y = self.conv(F.interpolate(x, scale_factor=2))
        else:
            y = F.pixel_shuffle(self.conv(x), 2)
        if self.shortcut:
            y = y + F.pixel_shuffle(x.repeat_interleave(self.repeats, dim=1), 2)
        return y                                                    # [B, D_out, 2H, 2W]


def make_stages(c, coder):
    """Return a list of blocks per stage. c: the config. coder: "encoder" or "decoder"."""
    widths = c[f"{coder}_block_out_channels"]
    kinds = c[f"{coder}_block_types"]
    if isinstance(kinds, str):
        kinds = [kinds] * len(widths)
    kernels = c[f"{coder}_qkv_multiscales"]
    stages = []
    for i, length in enumerate(c[f"{coder}_layers_per_block"]):
        blocks = []
        for _ in range(length):
            if kinds[i] == "ResBlock":
                blocks.append(ResBlock(widths[i]))
            else:
                blocks.append(EfficientViTBlock(widths[i], c["attention_head_dim"], kernels[i]))
        stages.append(blocks)
    return stages


def find_conv_stages(stages, full_resolution):
    """Find the stages that can work in tiles: those nearest to the pixels, before any attention.

    -> (depth, factor, halo): how many they are, the width in pixels of one position after them,
    and how far they see in pixels. Each 3x3 convolution sees one position further, and a position
    doubles in width from stage to stage. halo is rounded up to a multiple of factor. Without
    attention, depth is all stages but the last.
    SANA's encoder has three such stages of two blocks, at 1, 2 and 4 pixels a position. It sees
    1 + (1 + 2 + 4) * (2 * 2 + 2) = 43 pixels, rounded up to 48; factor is 8."""
    depth = len(stages) - 1
    for i, blocks in enumerate(stages):
        if any(isinstance(block, EfficientViTBlock) for block in blocks):
            depth = i
            break
    factor = 1 if full_resolution else 2  # else conv_in halves the side, in place of stage 0
    receptive_field = factor
    for i, blocks in enumerate(stages[:depth]):
        receptive_field += factor * (2 * len(blocks) + 2)  # 2 per block, and for Down or Up
        if full_resolution or i > 0:
            factor *= 2
    return depth, factor, -(-receptive_field // factor) * factor


class Encoder(nn.Module):
    """Stages of ResBlocks, which are local, then stages of attention, which see everything.

    The conv stages work in tiles, with the result of the whole picture up to rounding. The grid
    after them is small: an eighth of the picture's height and width in SANA's DC-AE."""

    def __init__(self, c):
        super().__init__()
        widths = c["encoder_block_out_channels"]
        kind = c["downsample_block_type"]
        stages = make_stages(c, "encoder")
        full_resolution = len(stages[0]) > 0  # an empty first stage: begin at half the side
        if full_resolution:
            self.conv_in = nn.Conv2d(c["in_channels"], widths[0], 3, padding=1)
        else:
            self.conv_in = Down(c["in_channels"], widths[1], kind, shortcut=False)
        self.depth, self.factor, self.halo = find_conv_stages(stages, full_resolution)
        self.down_blocks = nn.ModuleList()
        for i, blocks in enumerate(stages):
            if blocks and i + 1 < len(stages):
                blocks.append(Down(widths[i], widths[i + 1], kind))
            self.down_blocks.append(nn.Sequential(*blocks))
        self.conv_out = nn.Conv2d(widths[-1], c["latent_channels"], 3, padding=1)

    def conv_stages(self, x):
        """Run the conv stages on pixels [B, 3, H, W].

        -> {stage: the input of its Down}, and under the key self.depth the output of the last. In
        SANA [B, 128, H, W], [B, 256, H/2, W/2], [B, 512, H/4, W/4] and [B, 512, H/8, W/8]."""
        x = self.conv_in(x)
        features = {}
        for i, stage in enumerate(self.down_blocks[: self.depth]):
            if len(stage):
                features[i] = stage[:-1](x)
                x = stage[-1](features[i])
        features[self.depth] = x
        return features

    def forward(self, x):                                           # [B, 3, H, W]
        def encode_tile(index):
            return self.conv_stages(x[index])[self.depth]

        x = in_tiles(encode_tile, x.shape[2:], TILE, self.halo, 1 / self.factor)  # [B, D, H/8, W/8]
        for stage in self.down_blocks[self.depth :]:
            x = stage(x)
        z = self.conv_out(x)                                        # [B, C, H/f, W/f]
        return z + x.unflatten(1, (z.shape[1], -1)).mean(2)


class Decoder(nn.Module):
    """The encoder in reverse: stages of attention, then stages of ResBlocks in tiles."""

    def __init__(self, c):
        super().__init__()
        widths = c["decoder_block_out_channels"]
        kind = c["upsample_block_type"]
        stages = make_stages(c, "decoder")
        full_resolution = len(stages[0]) > 0
        self.conv_in = nn.Conv2d(c["latent_channels"], widths[-1], 3, padding=1)
        self.repeats = widths[-1] // c["latent_channels"]
        self.depth, self.factor, self.halo = find_conv_stages(stages, full_resolution)
        self.up_blocks = nn.ModuleList()
        for i, blocks in enumerate(stages):
            if blocks and i + 1 < len(stages):
                blocks.insert(0, Up(widths[i + 1], widths[i], kind))
            self.up_blocks.append(nn.Sequential(*blocks))
        last = widths[0] if full_resolution else widths[1]
        self.norm_out = RMSNorm2d(last)
        if full_resolution:
            self.conv_out = nn.Conv2d(last, c["in_channels"], 3, padding=1)
        else:
            self.conv_out = Up(last, c["in_channels"], kind, shortcut=False)

    def attention_stages(self, z):                                  # [B, C, H, W]
        x = self.conv_in(z) + z.repeat_interleave(self.repeats, dim=1)
        for stage in reversed(self.up_blocks[self.depth :]):
            x = stage(x)
        return x                                                    # [B, D, 4H, 4W] in SANA's

    def conv_stages(self, x, skip=None):
        """Run the conv stages on features [B, D, H, W] -> pixels.

        skip: skip(i, x) -> x may add to x before the blocks of stage i. skip(self.depth, x) comes
        first, before all of these stages."""
        skip = skip or (lambda i, x: x)
        x = skip(self.depth, x)
        for i in reversed(range(self.depth)):
            stage = self.up_blocks[i]
            if len(stage):
                x = stage[1:](skip(i, stage[0](x)))
        return self.conv_out(F.relu(self.norm_out(x)))


class DCAE(nn.Module):
    """DC-AE: f = 32 in SANA, 8 in mini. Its decoder can also see the degraded image.

    config: the keys of the checkpoint's vae/config.json. Raises ValueError for a key or value that
    is not supported.

    Precision: SANA's file holds fp32, which is the reference. bf16 is safe: it has fp32's range,
    and norms and attention sum in fp32. With random weights a round trip in bf16 is 2% off."""

    CLASS = "AutoencoderDC"

    def __init__(self, config):
        super().__init__()
        c = read_config("DC-AE", config, DCAE_DEFAULTS, DCAE_SUPPORTED)
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        self.scaling = c["scaling_factor"]
        self.config = c
        self.channels = c["latent_channels"]
        self.factor = 2 ** (len(c["encoder_block_out_channels"]) - 1)
        self.gains = {}  # of the skips, by stage; see add_skips

    def forward(self, pixels, latents=None, weight=1.0):
        """Encode and decode pixels; or, given latents, decode those and show the decoder pixels.

        -> pixels, latents. Both are one method because FSDP gathers the weights only here."""
        if latents is None:
            latents = self.encode(pixels)
            return self.decode(latents), latents
        return self.decode(latents, pixels, weight), latents

    def encode(self, pixels):
        """[B, 3, H, W] in [-1, 1] -> [B, C, H/f, W/f], fp32. Deterministic: nothing is sampled."""
        with tf32(pixels.device):
            z = self.encoder(self.prepare_pixels(pixels))
        return z.float() * self.scaling

    def prepare_pixels(self, pixels):
        """Pad, cast and lay out channels_last, like the attention's tokens: a fifth less memory."""
        dtype = self.encoder.conv_out.weight.dtype
        x = pad_to_multiple(pixels, self.factor)
        return x.to(dtype, memory_format=torch.channels_last)

    def decode(self, latents, degraded=None, weight=1.0):
        """[B, C, H, W] -> pixels [B, 3, fH, fW], fp32.

        degraded: pixels that the skips show to the decoder; padded as in encode they must be of
        size fH x fW. weight: factor of the skips in [0, 1], a number or, per image, [B, 1, 1, 1].
        Raises ValueError for degraded pixels of another size, or if there are no skips."""
        z = (latents / self.scaling).to(self.decoder.conv_in.weight.dtype)
        with tf32(latents.device):
            x = self.decoder.attention_stages(z.contiguous(memory_format=torch.channels_last))
        factor, halo = self.decoder.factor, self.decoder.halo
        if self.gains:  # the same tiles with and without degraded pixels: the same rounding
            halo += self.encoder.halo
        if degraded is not None:
            pixels = self.prepare_pixels(degraded)
            size = self.factor * latents.shape[2], self.factor * latents.shape[3]
            if not self.gains or pixels.shape[2:] != size:
                raise ValueError("degraded pixels need a decoder with skips, and the latents' size")

        def decode_tile(index):
            if degraded is None:
                return self.decoder.conv_stages(x[index])
            features = self.encoder.conv_stages(pixels[scale_index(index, factor)])

            def skip(i, x):
                strength = weight.to(x.dtype) if torch.is_tensor(weight) else weight
                return x + strength * self.gains[str(i)] * self.skips[str(i)](features[i])

            return self.decoder.conv_stages(x[index], skip)

        return in_tiles(decode_tile, x.shape[2:], TILE // factor, halo // factor, factor).float()

    def add_skips(self, gains=None):
        """Add skips from the encoder of the degraded pixels to the decoder, in place. Return self.

        The latents have lost the fine detail; the degraded picture still holds it. At each conv
        stage and on the grid after them, the encoder's features pass a 1x1 convolution that starts
        at zero and are added to the decoder's. So decode starts as the published decoder, bit for
        bit.
        gains: {stage: factor of its skip}, as measure_gains returns it; None: all 1. Raises
        ValueError if the stages of encoder and decoder do not match."""
        encoder, decoder = self.encoder, self.decoder
        places = [i for i, stage in enumerate(encoder.down_blocks) if len(stage)]
        mirrored = [i for i, stage in enumerate(decoder.up_blocks) if len(stage)]
        if (places, encoder.depth, encoder.factor) != (mirrored, decoder.depth, decoder.factor):
            raise ValueError("the decoder's stages are not the encoder's: no place for skips")
        self.skips = nn.ModuleDict()
        for i in places:
            if i <= encoder.depth:
                seen = self.config["encoder_block_out_channels"][i]
                width = self.config["decoder_block_out_channels"][i]
                skip = nn.Conv2d(seen, width, 1, bias=False)
                nn.init.zeros_(skip.weight)
                self.skips[str(i)] = skip
        self.skips.to(decoder.conv_in.weight)
        self.gains = gains or dict.fromkeys(self.skips, 1.0)
        return self

    @torch.no_grad()
    def measure_gains(self, latents, degraded):
        """Return {stage: RMS of the decoder's features / RMS of the encoder's, before its skip}.

        With these factors all skips learn at the same rate, however large the decoder's features
        are (17,516 against 1 in a small autoencoder: without a factor nothing was learnt). They
        are measured once, as an RMS within each tile would make the result depend on the tiles."""
        pixels = self.prepare_pixels(degraded)
        features = self.encoder.conv_stages(pixels)
        gains = {}

        def note(i, x):
            gains[str(i)] = (rms(x) / rms(features[i])).item()
            return x

        z = (latents / self.scaling).to(pixels)
        self.decoder.conv_stages(self.decoder.attention_stages(z), note)
        return gains

    def freeze_around_decoder(self):
        """Freeze all but the skips and the decoder's conv stages, in place. Return self."""
        self.requires_grad_(False)
        self.skips.requires_grad_(True)
        decoder = self.decoder
        for module in (decoder.up_blocks[: decoder.depth], decoder.norm_out, decoder.conv_out):
            module.requires_grad_(True)
        return self

    def initialize(self, generator):
        """Initialize the weights for training from scratch, in place. Return self.

        ResBlock and GLUMBConv start as the identity: the norm at the end of their branch multiplies
        by 0. The other norms, attention's norm_out too, stay as constructed: ones and zeros."""
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.zeros_(p)
            elif p.dim() > 1:
                nn.init.kaiming_uniform_(p, a=math.sqrt(5), generator=generator)
            elif "norm" not in name:
                nn.init.zeros_(p)
        return self


def rms(x):
    return x.float().square().mean().sqrt()


PERCEPTUAL = 0.1  # weight of LPIPS relative to L1, where LPIPS is used


@contextlib.contextmanager
def tf32(device):
    """Let matrix products on a GPU round fp32 to TF32's 11 bits, as convolutions do by default."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if device.type != "cpu":
        matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def reconstruction_loss(autoencoder, clean, perceptual=None):
    """Return the loss of each image's round trip, [B]: mean |decode(encode(x)) - x| + penalty.

    clean [B, 3, H, W]. perceptual: a function of two batches -> [B], such as LPIPS, added if given.
    The penalty, on the mean squared latent, is all that keeps latents from growing: without it
    their standard deviation was 36 after a minute, with it 0.5 at the end."""
    restored, latents = autoencoder(clean)
    return picture_loss(restored, clean, perceptual) + 1e-3 * latents.square().flatten(1).mean(1)


def decoder_loss(autoencoder, latents, degraded, clean, weight, perceptual=None):
    """Return each image's loss for the decoder that sees the degraded image, [B].

    latents: the restorer's output for the degraded pixels, not the latents of the clean ones. So
    the decoder learns to correct the restorer's errors (StableSR, arXiv 2305.07015). weight
    [B, 1, 1, 1]: factor of the skips, 0 for some images, so that users can choose it later."""
    restored, _ = autoencoder(degraded, latents, weight)
    return picture_loss(restored, clean, perceptual)


def picture_loss(restored, clean, perceptual=None):
    restored = restored[..., : clean.shape[2], : clean.shape[3]]
    loss = (restored - clean).abs().flatten(1).mean(1)
    if perceptual:
        loss = loss + PERCEPTUAL * perceptual(restored, clean)
    return loss


# --------------------------------------------------------------------------------------------------
# Any size: padding, and two kinds of tiles.


def pad_to_multiple(pixels, multiple):
    """Pad [B, C, H, W] at the right and bottom until both sides divide by multiple.

    Mirrors without repeating the edge, again and again if the padding is larger than the picture.
    Undo with [..., :H, :W]."""
    for dim in (2, 3):
        n = pixels.shape[dim]
        if n % multiple == 0:
            continue
        padded = -(-n // multiple) * multiple
        period = max(1, 2 * (n - 1))
        index = torch.arange(padded, device=pixels.device) % period
        index = torch.where(index < n, index, period - index)
        pixels = pixels.index_select(dim, index)
    return pixels


def cut_tiles(size, tile, halo):
    """Cut a picture of size (H, W) into square tiles; leave it whole if no side exceeds two tiles.

    -> [(outer, core, target)], each an index (..., rows, columns). outer: the tile and a halo
    around it, cut at the picture's edges. core: the tile within outer. target: the tile within the
    picture. Indices may end beyond the picture: slicing stops at its edge.
    Of tiles of 512 with a halo of 48 the second spans 464:1072 (outer), in it 48:560 is the core,
    and 512:1024 the target."""

    def cut(start):
        margin = min(start, halo)
        outer = slice(start - margin, start + tile + halo)
        return outer, slice(margin, margin + tile), slice(start, start + tile)

    if max(size) <= 2 * tile:
        tile = max(size)
    cuts = []
    for top, left in itertools.product(range(0, size[0], tile), range(0, size[1], tile)):
        cuts.append([(..., rows, columns) for rows, columns in zip(cut(top), cut(left))])
    return cuts


def in_tiles(function, size, tile, halo, scale=1):
    """Run function in tiles. The result is that of one call if function sees at most halo far.

    function: index (..., rows, columns) into its input -> [B, C, h, w]. size: (H, W) of the input.
    scale: output positions per input position, 1/8 for SANA's encoder. tile and halo count input
    positions and are multiples of 1 / scale."""
    cuts = cut_tiles(size, tile, halo)
    if len(cuts) == 1:
        return function(cuts[0][0])
    out = None
    for outer, core, target in cuts:
        y = function(outer)
        if out is None:
            height, width = round(size[0] * scale), round(size[1] * scale)
            out = y.new_empty(*y.shape[:2], height, width)
        out[scale_index(target, scale)] = y[scale_index(core, scale)]
    return out


def scale_index(index, scale):
    """Return the index (..., rows, columns) of the same area on a grid of other resolution."""
    rows, columns = index[1:]
    return (
        ...,
        slice(round(rows.start * scale), round(rows.stop * scale)),
        slice(round(columns.start * scale), round(columns.stop * scale)),
    )


def blend_tiles(function, size, tile, overlap):
    """Run function on overlapping tiles and blend them without seams -> [B, C, H, W].

    size: (H, W). function: index (..., rows, columns) of a tile -> [B, C, h, w], of its size."""
    if max(size) <= tile:
        return function((..., slice(0, size[0]), slice(0, size[1])))
    total = None
    starts = [tile_starts(side, tile, overlap) for side in size]
    corners = list(itertools.product(*starts))
    for top, left in tqdm(corners, unit="tile", desc="tiles", leave=False, delay=3):
        rows = slice(top, top + tile)
        columns = slice(left, left + tile)
        y = function((..., rows, columns))
        if total is None:
            total = y.new_zeros(y.shape[:2] + tuple(size))
            weights = y.new_zeros(size)
        weight = ramp(y.shape[2], overlap, y.device)[:, None] * ramp(y.shape[3], overlap, y.device)
        total[..., rows, columns] += weight * y
        weights[rows, columns] += weight
    return total.div_(weights)


def tile_starts(length, tile, overlap):
    """Return the starts of tiles that overlap by overlap or more. The last one ends at length."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def ramp(length, overlap, device):
    """Return weights [length] that rise to 1 from both ends, linearly over the overlap."""
    i = torch.arange(length, device=device)
    return torch.minimum(i + 1, length - i).clamp(max=overlap) / overlap


# --------------------------------------------------------------------------------------------------
# Files: written whole or not at all, weights loaded strictly.


def file_digest(path):
    """Return the SHA-256 of a whole file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path, text):
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def strict_json(content, indent=None):
    """Return JSON that every reader takes: a number that is not finite becomes null."""
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)
    return json.dumps(content, indent=indent)


def write_json(path, content):
    write_text(path, strict_json(content, indent=1))


def read_json(path):
    """Read the object that a JSON file holds. Raises UserError."""
    with explain_errors(path, "this JSON"):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    return content


def read_config(what, config, defaults, supported):
    """Return config with defaults for what it leaves out.

    supported: {key: the values that this project builds}. Raises ValueError for any other value of
    those keys, and for keys that are not in defaults. Keys with an underscore are notes."""
    result = dict(defaults)
    for key, value in config.items():
        if key.startswith("_"):
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        unknown = key not in defaults
        if unknown or key in supported and any(v not in supported[key] for v in values):
            raise ValueError(f"{what} config: {key}={value!r} is not supported")
        result[key] = value
    return result


def load_config(network, folder):
    """Build a network (a class with CLASS) from folder/config.json on the meta device: shapes only.

    Raises UserError."""
    path = Path(folder) / "config.json"
    config = read_json(path)
    found = str(config.get("_class_name") or config.get("architectures"))
    if network.CLASS not in found:
        raise UserError(f"{path} describes a {found}; a {network.CLASS} is needed here")
    with explain_errors(path, f"this {network.CLASS}"), torch.device("meta"):
        return network(config)


def load_pretrained(network, folder, dtype=None):
    """Build a network and load its weights from a checkpoint folder in the hub's layout.

    dtype None: as stored. Tensors are mapped from the file, and copied only to convert them to
    dtype. Raises UserError."""
    return load_weights(load_config(network, folder), *weight_files(folder), dtype=dtype).eval()


def weight_files(folder):
    """Return the safetensors files of a folder: a single one, or the shards that an index names.

    Prefers a bf16 variant. Raises UserError if the folder has neither, or the index no shards."""
    for variant in (".bf16", ""):
        for stem in ("diffusion_pytorch_model", "model"):
            index = Path(folder) / f"{stem}.safetensors.index{variant}.json"
            single = Path(folder) / f"{stem}{variant}.safetensors"
            if index.is_file():
                with explain_errors(index, "this index"):
                    shards = set(read_json(index)["weight_map"].values())
                    if not shards:
                        raise ValueError("it names no shards")
                    return [index.parent / Path(shard).name for shard in sorted(shards)]
            if single.is_file():
                return [single]
    raise UserError(f"{folder}: no diffusion_pytorch_model.safetensors or model.safetensors here")


def load_weights(module, *paths, dtype=None, trained=False):
    """Load safetensors files into a module and return it.

    trained: the files hold exactly the parameters that require a gradient. Raises UserError that
    names a file and the first tensor that is unexpected, missing, of the wrong shape or kind (float
    or integer), or not finite. The module is unchanged then."""
    expected = trained_weights(module) if trained else module.state_dict()
    found = {}
    for path in paths:
        with explain_errors(path, "these weights"):
            tensors = load_file(path)
        for name, tensor in tensors.items():
            name = name.removeprefix(getattr(module, "PREFIX", ""))
            if name not in expected or name in found:
                raise UserError(f"{path}: unexpected tensor {name}")
            check_tensor(tensor, expected[name], f"{path}: {name}")
            if tensor.is_floating_point():
                tensor = tensor.to(dtype or tensor.dtype)
            found[name] = tensor
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise UserError(f"{paths[0]}: missing tensor {missing[0]}")
    # A module of load_config (on the meta device: shapes without memory) takes the mapped tensors
    # themselves; any other one copies them.
    meta = next(module.parameters()).is_meta
    module.load_state_dict(found, assign=meta, strict=not trained)
    return module


def trained_weights(module):
    """Return {name: parameter} of those that take a gradient; the others are frozen."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def check_tensor(tensor, like, where):
    if tensor.shape != like.shape:
        raise UserError(f"{where} has shape {list(tensor.shape)}, expected {list(like.shape)}")
    if tensor.is_floating_point() != like.is_floating_point() or tensor.is_complex():
        raise UserError(f"{where} is of type {tensor.dtype}, not {like.dtype}")
    # test only the minimum and maximum: 0.15 s a GB, where isfinite of every number takes 2 s
    if like.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise UserError(f"{where} holds values that are not finite")


def save_weights(tensors, path, **about):
    """Write {name: tensor}, and texts about them, to a safetensors file. Raises UserError."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        try:
            save_file(contiguous, partial, metadata={"format": "pt"} | about)
        except SafetensorError as error:  # a full disk, for example
            raise OSError(error) from None
        with contextlib.suppress(OSError):  # the library makes a file that nobody else can read
            partial.chmod(mode)


HUB = {"sana1.5-1.6b": "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers"}  # short names
PARTS = ["transformer", "vae", "text_encoder"]


def resolve_model(name, parts=PARTS):
    """Return the folder of a pretrained model, with transformer/, vae/, text_encoder/, tokenizer/.

    name: a path, a short name of HUB, or a hub id (owner/name). Of a hub model the
    files of parts are downloaded unless cached; without a network the cache is used. Raises
    UserError."""
    if os.path.isdir(name):
        return Path(name)
    repository = HUB.get(name, name)
    local = os.path.isdir(os.path.dirname(name))  # a folder was meant: out/typo
    if local or not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        names = ", ".join(["tiny", "mini", *HUB])
        raise UserError(f"--model {name}: no such folder; give {names}, a hub id, or a run")
    from huggingface_hub import HfApi, snapshot_download  # half a second, which only this needs

    reason = None
    try:
        listed = HfApi().model_info(repository, timeout=10).siblings
        options = {"allow_patterns": needed_files([file.rfilename for file in listed], parts)}
    except Exception as error:  # the client raises many types: no network, no such id, ...
        # use what the cache holds; reading a file that is missing there raises and names it
        reason = f"{str(error)[:240]}; and not in the cache"
        options = {"allow_patterns": "*/config.json", "local_files_only": True}
    try:
        return Path(snapshot_download(repository, **options))
    except Exception as error:
        reason = reason or str(error)[:240]
        advice = "download it elsewhere and give its folder, or take --model tiny, which needs none"
        raise UserError(f"--model {name}: {reason}; {advice}") from None


def needed_files(names, parts=PARTS):
    """Return those of a repository's file names that this project reads.

    Of each part, takes bf16 weights if there are any, else all weights but fp16."""
    ends = ("/config.json", "/scheduler_config.json", "tokenizer/tokenizer.json")
    chosen = [name for name in names if name.endswith(ends)]
    for part in parts:
        weights = []
        for name in names:
            if name.startswith(f"{part}/") and ".safetensors" in name and ".fp16" not in name:
                weights.append(name)
        chosen += [name for name in weights if ".bf16" in name] or weights
    return chosen
