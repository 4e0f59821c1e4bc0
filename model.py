"""SANA, the flow-matching linear-attention transformer, and what turns it into an image restorer.

    python model.py export out/RUN restorer/     write a trained restorer for diffusers

Papers: SANA (arXiv 2410.10629), SANA 1.5 (2501.18427), flow matching (2210.02747, 2209.03003).
Letters used in the shape comments:
    B batch    C latent channels    H, W latent grid    N = H*W image tokens    D width    h heads
    d = D/h    L caption tokens (padded to the longest of the batch)

The convention of sigma, everywhere in this project, is that of SANA's checkpoints.
sigma in [0, 1] is the NOISE fraction: x_sigma = (1 - sigma) * x0 + sigma * noise. sigma = 1 is pure
noise, and the velocity is dx/dsigma = noise - x0. (Some texts call the clean fraction sigma. Mixing
the two trains against the pretrained weights.)
"""
import functools
import hashlib
import math
import os
import re
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from degrade import Parser, UserError, explain_errors, run_script
from vae import DCAE, PARTS, PixelAE, file_digest, load_config, load_pretrained, load_weights
from vae import read_config, read_json, resolve_model, save_weights, weight_files, write_json

# --------------------------------------------------------------------------------------------------
# The transformer. Module and parameter names are those of diffusers' checkpoints.

SANA_DEFAULTS = {  # what a missing key of config.json means, as diffusers has it
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "attention_bias": False,
    "sample_size": 32,
    "patch_size": 1,
    "norm_eps": 1e-6,
    "norm_elementwise_affine": False,
    "interpolation_scale": None,
    "guidance_embeds": False,
    "guidance_embeds_scale": 0.1,  # of guidance_embeds alone
    "qk_norm": None,
    "timestep_scale": 1.0,
    "dropout": 0.0,  # of training from scratch; not applied here
}
SANA_SUPPORTED = {
    "guidance_embeds": [False],
    "norm_elementwise_affine": [False],
    "patch_size": [1],  # of every published SANA
    "qk_norm": [None, "rms_norm_across_heads"],
}


class Sana(nn.Module):
    """The SANA transformer: noisy latent, timestep and caption in, velocity out.

    config: the keys of the checkpoint's transformer/config.json, SANA_DEFAULTS where one is
    missing. Raises ValueError for a key or value that this file does not build."""

    CLASS = "SanaTransformer2DModel"

    def __init__(self, config):
        super().__init__()
        c = read_config("SANA", config, SANA_DEFAULTS, SANA_SUPPORTED)
        c["out_channels"] = c["out_channels"] or c["in_channels"]
        self.config = c
        self.checkpointing = False  # True: keep no activations in blocks, compute them again
        dim = c["num_attention_heads"] * c["attention_head_dim"]
        sample_size, scale = c["sample_size"], c["interpolation_scale"]
        self.patch_embed = PatchEmbed(c["in_channels"], dim, sample_size, scale)
        self.time_embed = TimeEmbed(dim)
        self.caption_projection = MLP(c["caption_channels"], dim, nn.GELU(approximate="tanh"))
        self.caption_norm = nn.RMSNorm(dim, eps=1e-5)
        self.transformer_blocks = nn.ModuleList([SanaBlock(c) for _ in range(c["num_layers"])])
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim))
        self.proj_out = nn.Linear(dim, c["out_channels"])

    def forward(self, latents, timestep, text, text_mask=None):
        """Predict the velocity [B, C_out, H, W].

        latents [B, C, H, W]. timestep [B] = 1000 * sigma. text [B, L, caption_channels]. text_mask
        [B, L] bool, True = a real token; None = all are. Raises ValueError for another mask."""
        if text_mask is not None and text_mask.dtype != torch.bool:
            raise ValueError(f"text_mask is {text_mask.dtype}: give bool, True = a real token")
        grid = latents.shape[2:]
        x = self.patch_embed(latents).to(self.proj_out.weight.dtype)  # [B, N, D]
        # [B, 6, D] and [B, D]
        modulation, embedding = self.time_embed(timestep * self.config["timestep_scale"])
        text = self.caption_projection(text.to(self.proj_out.weight.dtype))
        text = self.caption_norm(text)                              # [B, L, D]
        added = None
        if text_mask is not None:  # what the softmax of attention to the caption adds
            added = torch.zeros_like(text_mask, dtype=x.dtype).masked_fill(~text_mask, -math.inf)
            added = added[:, None, None, :]                         # [B, 1, 1, L]
        for block in self.transformer_blocks:
            inputs = x, modulation, text, added, grid
            if self.checkpointing:
                # a block draws no random numbers: their state need not be kept
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)                                  # [B, N, D]
        shift, scale = (self.scale_shift_table + embedding[:, None]).chunk(2, dim=1)
        x = self.proj_out(modulate(x, shift, scale, 1e-6))          # [B, N, C_out]
        return x.transpose(1, 2).unflatten(2, grid)                 # [B, C_out, H, W]

    def initialize(self, generator):
        """Fill every weight for training from scratch.

        Matrices are Xavier, depthwise convolutions Kaiming, biases zero. There is no modulation
        (gates 1, shifts and scales 0). The last layer is zero, so the untrained output is 0."""
        zero = "proj_out", "time_embed.linear"
        for name, p in self.named_parameters():
            if name.endswith(("bias", "scale_shift_table")) or name.startswith(zero):
                nn.init.zeros_(p)
                if name.endswith("scale_shift_table") and len(p) == 6:  # a block's, with gates
                    nn.init.ones_(p.data[2::3])  # shift, scale, gate, shift, scale, gate
            elif "norm" in name:
                nn.init.ones_(p)
            elif "conv_depth" in name:
                nn.init.kaiming_uniform_(p, a=math.sqrt(5), generator=generator)
            else:
                nn.init.xavier_uniform_(p.data.flatten(1), generator=generator)
        return self


class SanaBlock(nn.Module):
    """Linear attention among image tokens, attention to the caption, a convolutional network."""

    def __init__(self, c):
        super().__init__()
        dim = c["num_attention_heads"] * c["attention_head_dim"]
        qk_norm = c["qk_norm"] is not None
        self.eps = c["norm_eps"]
        shape = c["num_attention_heads"], c["attention_head_dim"]
        self.attn1 = LinearAttention(dim, dim, *shape, c["attention_bias"], qk_norm)
        shape = c["num_cross_attention_heads"], c["cross_attention_head_dim"]
        self.attn2 = CrossAttention(dim, c["cross_attention_dim"], *shape, True, qk_norm)
        self.ff = GLUMBConv(dim, c["mlp_ratio"])
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim))

    def forward(self, x, modulation, text, added, grid):
        """x [B, N, D], modulation [B, 6, D], text [B, L, D], added: the mask, see Sana.forward."""
        modulation = self.scale_shift_table + modulation            # [B, 6, D]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        x = x + gate1 * self.attn1(modulate(x, shift1, scale1, self.eps))
        x = x + self.attn2(x, text, added)
        x = x + gate2 * self.ff(modulate(x, shift2, scale2, self.eps), grid)
        return x                                                    # [B, N, D]


def modulate(x, shift, scale, eps):
    """Adaptive layer norm (DiT, arXiv 2212.09748). x [B, N, D], shift and scale [B, 1, D]."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class Attention(nn.Module):
    """The weights of both kinds of attention. Keys and values come from source_dim channels."""

    def __init__(self, dim, source_dim, heads, head_dim, bias, qk_norm):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(dim, inner, bias=bias)
        self.to_k = nn.Linear(source_dim, inner, bias=bias)
        self.to_v = nn.Linear(source_dim, inner, bias=bias)
        self.norm_q = nn.RMSNorm(inner, eps=1e-5) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(inner, eps=1e-5) if qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])

    def split(self, t):                                             # [B, N, h*d]
        return t.unflatten(2, (self.heads, -1)).transpose(1, 2)     # [B, h, N, d]


class LinearAttention(Attention):
    """ReLU linear attention (SANA, section 2.2).

    softmax(QK^T)V becomes relu(Q)(relu(K)^T V). Its cost grows with N and not with N^2, because
    the sum over all tokens, relu(K)^T V, is one d x d matrix a head."""

    def forward(self, x):                                           # [B, N, D]
        q = self.split(F.relu(self.norm_q(self.to_q(x))).float())   # [B, h, N, d]
        k = self.split(F.relu(self.norm_k(self.to_k(x))).float())   # fp32: sums run over N terms
        v = self.split(self.to_v(x).float())                        # [B, h, N, d]
        summary = k.transpose(2, 3) @ v                             # [B, h, d, d]
        total = k.sum(2).unsqueeze(3)                               # [B, h, d, 1]
        out = (q @ summary) / (q @ total + 1e-15)                   # [B, h, N, d]
        out = out.transpose(1, 2).flatten(2)                        # [B, N, h*d]
        return self.to_out[0](out.to(x.dtype))                      # [B, N, D]


class CrossAttention(Attention):
    """Softmax attention from image tokens to caption tokens."""

    def forward(self, x, text, added):
        """x [B, N, D], text [B, L, D] -> [B, N, D].

        added: [B, 1, 1, L], 0 or (for padding) -inf, added before the softmax; None: all 0."""
        q = self.split(self.norm_q(self.to_q(x)))                   # [B, h, N, d]
        k = self.split(self.norm_k(self.to_k(text)))                # [B, h, L, d]
        v = self.split(self.to_v(text))                             # [B, h, L, d]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=added)  # [B, h, N, d]
        return self.to_out[0](out.transpose(1, 2).flatten(2))       # [B, N, D]


STRIP = 4096  # tokens whose hidden channels stay in a CPU's cache


class GLUMBConv(nn.Module):
    """The feed-forward network (Mix-FFN, SANA section 2.2; the class name is the checkpoint's).

    1x1 convolution, 3x3 depthwise convolution, gate, 1x1 convolution. Without a position embedding
    (see PatchEmbed), only the 3x3 tells the transformer where a token is. Tokens [B, N, C] are a
    channels-last image: the 1x1 convolutions are plain matrix products, and the depthwise one
    needs no copy."""

    def __init__(self, dim, ratio):
        super().__init__()
        hidden = int(ratio * dim)
        self.conv_inverted = PointwiseConv(dim, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = PointwiseConv(hidden, dim, 1, bias=False)

    def forward(self, x, grid):                                     # [B, N, D], (H, W)
        if x.device.type != "cpu" or torch.is_grad_enabled() or x.shape[1] <= STRIP:
            return self.mix(x, grid)
        # A CPU waits for memory here, so it takes a strip of rows at a time. The 3x3 convolution
        # sees one more row above and below.
        height, width = grid
        rows = max(1, STRIP // width)
        x = x.unflatten(1, grid)                                    # [B, H, W, D]
        out = torch.empty_like(x)
        for top in range(0, height, rows):
            first, last = max(0, top - 1), min(height, top + rows + 1)
            strip = last - first, width
            mixed = self.mix(x[:, first:last].flatten(1, 2), strip).unflatten(1, strip)
            out[:, top : top + rows] = mixed[:, top - first : top - first + rows]
        return out.flatten(1, 2)                                    # [B, N, D]

    def mix(self, x, grid):                                         # [B, N, D], (H, W)
        x = F.silu(self.conv_inverted(x))                           # [B, N, 2*hidden]
        x = x.unflatten(1, grid).permute(0, 3, 1, 2)                # [B, 2*hidden, H, W]
        x = self.conv_depth(x).permute(0, 2, 3, 1).flatten(1, 2)    # [B, N, 2*hidden]
        x, gate = x.chunk(2, dim=2)                                 # [B, N, hidden] each
        return self.conv_point(x * F.silu(gate))                    # [B, N, D]


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution of tokens: the weight is the checkpoint's, the work a matrix product."""

    def forward(self, x):                                           # [B, N, D]
        return F.linear(x, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Turn each position of the latents into a token (the name is the checkpoint's).

    The 512 and 1024 px models have no position embedding. The 2K and 4K ones add fixed sines and
    cosines (scale = interpolation_scale), stretched so that any grid spans 0 to side / scale."""

    def __init__(self, channels, dim, side, scale=None):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, 1)
        self.side = side
        self.scale = scale

    def forward(self, x):                                           # [B, C, H, W]
        x = self.proj(x.to(self.proj.weight.dtype))                 # [B, D, H, W]
        if self.scale is not None:
            height, width = x.shape[2:]
            rows = self.waves(height, x)[:, :, None].expand(-1, -1, width)      # [D/2, H, W]
            columns = self.waves(width, x)[:, None, :].expand(-1, height, -1)   # [D/2, H, W]
            x = (x + torch.cat([columns, rows])).to(x.dtype)
        # Contiguous tokens spare every later operation a change of layout.
        return x.flatten(2).transpose(1, 2).contiguous()            # [B, N, D]

    def waves(self, n, x):
        position = torch.arange(n, device=x.device).float() / (n / self.side) / self.scale
        quarter = x.shape[1] // 4
        frequency = 10000 ** -(torch.arange(quarter, device=x.device).double() / quarter)
        angle = frequency[:, None] * position.double()              # [D/4, n]
        return torch.cat([angle.sin(), angle.cos()]).float()        # [D/2, n]


class MLP(nn.Module):
    """linear_1, activation, linear_2: the checkpoint's names."""

    def __init__(self, d_in, dim, activation):
        super().__init__()
        self.linear_1 = nn.Linear(d_in, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.activation = activation

    def forward(self, x):
        return self.linear_2(self.activation(self.linear_1(x)))


class TimeEmbed(nn.Module):
    """AdaLN-single (PixArt-alpha, arXiv 2310.00426): one modulation, to which each block adds."""

    def __init__(self, dim):
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": MLP(256, dim, nn.SiLU())})
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, timestep):                                    # [B] in [0, 1000]
        index = torch.arange(128, device=timestep.device)
        frequency = torch.exp(-math.log(10000) / 128 * index)
        angle = timestep.float()[:, None] * frequency               # [B, 128]
        wave = torch.cat([angle.cos(), angle.sin()], dim=1)         # [B, 256]
        embedding = self.emb["timestep_embedder"](wave.to(self.linear.weight.dtype))
        modulation = self.linear(F.silu(embedding)).unflatten(1, (6, -1))
        return modulation, embedding                                # [B, 6, D], [B, D]


# --------------------------------------------------------------------------------------------------
# From text-to-image to restoration: the degraded image enters beside the noisy latent.

MIN_SIGMA = 1e-3  # below it a residual prediction is not divided any further
SHIFT = 3.0  # SANA's resolution shift (6 for its 4K model), see shift_sigma


class Restorer(nn.Module):
    """SANA with a second input, the latent of the degraded image (the condition).

    sana: takes and gives C channels. One that is widened already (an exported restorer) is refused.
    conditioning: how the condition enters.
      "projection"  a 1x1 convolution 2C -> C in front, identity on the noisy latent and zero on
                    the condition. Before training the output is the text-to-image model's, bit
                    for bit.
      "widen"       the patch embedding takes 2C channels, the new ones with zero weights: the
                    same start without the squeeze to C. (From scratch, initialize() fills all.)
      "none"        not at all: a text-to-image model, to start a restorer from.
    prediction: what the network's output means.
      "velocity"    noise - x0, as SANA's weights were trained.
      "residual"    x0 - condition, for training from scratch: a network that answers 0 returns the
                    condition, not noise.
    Raises ValueError."""

    def __init__(self, sana, conditioning="projection", prediction="velocity", shift=SHIFT):
        super().__init__()
        if conditioning not in ("projection", "widen", "none"):
            raise ValueError(f"conditioning {conditioning!r} is not supported")
        if prediction not in ("velocity", "residual"):
            raise ValueError(f"prediction {prediction!r} is not supported")
        channels, given = sana.config["out_channels"], sana.config["in_channels"]
        if given != channels:
            what = f"a transformer that takes {given} channels and gives {channels}"
            raise ValueError(f"{what} is a restorer already (exported?); train its run further")
        self.sana = sana
        self.conditioning = conditioning
        self.prediction = prediction
        self.shift = shift
        if conditioning == "projection":
            self.projection = Projection(channels)
        if conditioning == "widen":
            sana.patch_embed.proj = widen(sana.patch_embed.proj)
            sana.config["in_channels"] = 2 * channels

    def forward(self, latents, condition, timestep, text, text_mask=None):
        """latents, condition [B, C, H, W], timestep [B] = 1000 sigma -> velocity [B, C, H, W].

        text, text_mask: the captions' embeddings, as Sana.forward takes them."""
        x = latents
        if self.conditioning != "none":
            x = torch.cat([latents, condition], dim=1)              # [B, 2C, H, W]
        if self.conditioning == "projection":
            x = self.projection(x)                                  # [B, C, H, W]
        out = self.sana(x, timestep, text, text_mask).to(latents.dtype)  # [B, C, H, W]
        if self.prediction == "velocity":
            return out
        x0 = condition + out
        # x_sigma = x0 + sigma * velocity, solved for the velocity
        sigma = (timestep / 1000).clamp(min=MIN_SIGMA)[:, None, None, None]
        return (latents - x0) / sigma


class Projection(nn.Module):
    """A 1x1 convolution 2C -> C that starts as identity | zero. Its weights stay fp32.

    Written as a matrix product: a GPU may run convolutions in TF32, which is not the identity."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(channels, 2 * channels)[:, :, None, None])

    def forward(self, x):                                           # [B, 2C, H, W]
        out = self.weight.flatten(1) @ x.float().flatten(2)         # [C, 2C] @ [B, 2C, N]
        return out.unflatten(2, x.shape[2:])                        # [B, C, H, W]


@torch.no_grad()
def widen(conv):
    """Return a patch embedding with twice the inputs, the new ones with zero weights."""
    wide = nn.Conv2d(2 * conv.in_channels, conv.out_channels, 1)
    wide.to(conv.weight.device, conv.weight.dtype)
    wide.weight.zero_()[:, : conv.in_channels].copy_(conv.weight)
    wide.bias.copy_(conv.bias)
    return wide


class LoRA(nn.Module):
    """A frozen linear map W plus a trained low-rank update (arXiv 2106.09685).

    Computes W x + B A x (the paper's alpha is the rank). B starts at zero: before training the
    output is W x, bit for bit. A [rank, d_in] and B [d_out, rank]."""

    def __init__(self, linear, rank):
        super().__init__()
        d_out, d_in = linear.weight.shape[:2]
        self.linear = linear
        self.A = nn.Parameter(torch.empty(rank, d_in))
        self.B = nn.Parameter(torch.zeros(d_out, rank))

    def forward(self, x):                                           # [B, N, d_in]
        low = F.linear(x, self.A)                                   # [B, N, rank]
        return self.linear(x) + F.linear(low, self.B)               # [B, N, d_out]

    @torch.no_grad()
    def merge(self):
        """Return the linear map with the change added to its weight."""
        change = self.B.double() @ self.A.double()                  # [d_out, d_in]
        weight = self.linear.weight
        weight.copy_(weight.double() + change.view_as(weight))
        return self.linear


def add_lora(restorer, rank, generator=None):
    """Freeze a restorer and add trainable low-rank updates to its blocks, in place.

    The layer that takes the condition (the projection, or the widened patch embedding) is trained
    in full. generator: fills A; None leaves A unset."""
    restorer.requires_grad_(False)
    for block in restorer.sana.transformer_blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, (nn.Linear, PointwiseConv)):
                lora = LoRA(module, rank)
                if generator:
                    nn.init.normal_(lora.A, std=lora.A.shape[1] ** -0.5, generator=generator)
                block.set_submodule(name, lora)
    if restorer.conditioning == "projection":
        restorer.projection.requires_grad_(True)
    if restorer.conditioning == "widen":
        restorer.sana.patch_embed.proj.requires_grad_(True)
    return restorer


def merge_lora(restorer):
    """Invert add_lora: the changes become part of the weights, in place."""
    for block in restorer.sana.transformer_blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, LoRA):
                block.set_submodule(name, module.merge())
    return restorer


# --------------------------------------------------------------------------------------------------
# Flow matching. Loss and samplers read one line: x_sigma = (1 - sigma) * x0 + sigma * noise.


def shift_sigma(sigma, shift=SHIFT):
    """Move sigmas towards 1, or towards 0 if shift < 1 (SD3, arXiv 2403.03206, eq. 23).

    The more pixels show the same thing, the more noise it takes to hide it: high resolutions need a
    shift above 1. But a degraded picture shows most of the image already. The detail it leaves open
    has a standard deviation of about 0.1 (that of the latents is 1), and is decided at sigmas of
    that size. With shift 3 hardly any sampling step falls there. It is the default all the same:
    SANA was trained with it, and one step, which gives the best PSNR, starts at sigma 1 with any
    shift. (tests/BENCH.md, "Texture", compares them.)"""
    return shift * sigma / (1 + (shift - 1) * sigma)


def draw_sigma(count, generator, share_at_one=0.0, shift=SHIFT):
    """Draw sigmas to train at, [count]: the sigmoid of N(0, 1), shifted.

    share_at_one: probability that a sigma is exactly 1 instead, where one-step sampling starts."""
    sigma = shift_sigma(torch.randn(count, generator=generator).sigmoid(), shift)
    at_one = torch.rand(count, generator=generator) < share_at_one
    return torch.where(at_one, 1.0, sigma)


def add_noise(x0, noise, sigma):
    """Return x_sigma. x0, noise [B, C, H, W], sigma [B]."""
    sigma = sigma[:, None, None, None]
    return (1 - sigma) * x0 + sigma * noise


def flow_loss(restorer, x0, condition, text, text_mask, sigma, noise, mean_weight=1.0):
    """Return the objective of each image, [B]. Training minimizes its mean and nothing else.

    error = predicted velocity - (noise - x0)
    velocity prediction:  mean error^2
    residual prediction:  sqrt( mean (sigma * error)^2 + 1e-6 )
    - Times sigma, the velocity's error is that of x0 (for sigma >= MIN_SIGMA): a residual
      prediction is judged by its x0.
    - The square root divides each image's gradient by its error. Otherwise images that stay far
      from clean, whatever the network does, would dominate.
    - mean_weight (1 without color_jitter) scales the error's mean over each channel of an image,
      which is brightness. The image gives no clue to how its brightness was changed. At full weight
      this error drowned all learning (trained on all six degradations, PSNR for Gaussian noise with
      sigma 25: 20.4 -> 20.4 dB after 1,600 steps, but 26.8 dB after 800 with mean_weight 0.1)."""
    velocity = restorer(add_noise(x0, noise, sigma), condition, 1000 * sigma, text, text_mask)
    error = velocity.float() - (noise - x0).float()                 # [B, C, H, W]
    if restorer.prediction == "residual":
        error = error * sigma[:, None, None, None]
    error = error - (1 - mean_weight) * error.mean((2, 3), keepdim=True)
    loss = error.square().flatten(1).mean(1)                        # [B]
    if restorer.prediction == "residual":
        loss = (loss + 1e-6).sqrt()
    return loss


@torch.no_grad()
def sample_euler(velocity, noise, steps, shift=SHIFT):
    """Follow dx/dsigma = velocity(x, timestep) from noise at sigma = 1 to an image at sigma = 0.

    velocity: a function, see guided. noise [B, C, H, W] -> the same shape. One step gives x0 as
    predicted from pure noise, about the mean of all clean images that fit the condition: the best
    PSNR. More steps settle on one of them. Sigmas are linspace(1, 0, steps + 1), moved towards 1 by
    shift_sigma."""
    x = noise
    sigmas = shift_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        v = velocity(x, torch.full((len(x),), 1000 * sigma, device=x.device))
        x = x + (next_sigma - sigma) * v
    return x


@torch.no_grad()
def sample_dpm(velocity, noise, steps, shift=SHIFT):
    """Sample as sample_euler does, but with DPM-Solver++ 2M (arXiv 2211.01095), SANA's sampler.

    Each step mixes x with a target. To first order this is the predicted x0, as in Euler's step. To
    second order, x0 is corrected by its change since the previous step. Sigma starts at 0.999
    before the shift, because log SNR is infinite at 1. Timesteps are rounded down to whole numbers,
    as in diffusers."""
    x = noise
    x0_before, log_snr_before = None, None
    sigmas = shift_sigma(torch.linspace(0.999, 0, steps + 1, dtype=torch.float64), shift).tolist()
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        timestep = float(int(1000 * sigma))
        v = velocity(x, torch.full((len(x),), timestep, device=x.device))
        x0 = x - sigma * v
        log_snr = math.log((1 - sigma) / sigma)
        target = x0
        if x0_before is not None and next_sigma > 0:
            # second order: extrapolate x0 to the middle of the step, in log SNR
            step = math.log((1 - next_sigma) / next_sigma) - log_snr
            target = x0 + 0.5 * step / (log_snr - log_snr_before) * (x0 - x0_before)
        ratio = next_sigma / sigma
        x = ratio * x + (1 - ratio) * target
        x0_before = x0
        log_snr_before = log_snr
    return x


SAMPLERS = {"euler": sample_euler, "dpm": sample_dpm}


def guided(restorer, condition, prompt, empty, guidance=1.0, condition_guidance=1.0):
    """Make the velocity function of a sampler, with classifier-free guidance.

    v = plain + guidance * (prompted - plain) + (condition_guidance - 1) * (plain - blind)
    prompted: with condition and prompt; plain: with the empty prompt; blind: with the empty prompt
    and zeros as condition. If both factors are 1, only the prompted velocity is computed, and empty
    may be None. (arXiv 2207.12598; InstructPix2Pix, 2211.09800.)
    prompt, empty: (text, text_mask). Return velocity(x, timestep)."""

    def velocity(x, timestep):
        v = restorer(x, condition, timestep, *prompt)
        if guidance == 1 and condition_guidance == 1:
            return v
        plain = restorer(x, condition, timestep, *empty)
        v = plain + guidance * (v - plain)
        if condition_guidance != 1:
            blind = restorer(x, torch.zeros_like(condition), timestep, *empty)
            v = v + (condition_guidance - 1) * (plain - blind)
        return v

    return velocity


# --------------------------------------------------------------------------------------------------
# Presets and checkpoints. The "model" part of a checkpoint's config.json says what to build:
#   name         a preset, or a pretrained model: short name, hub id or folder
#   stage        what was trained: "autoencoder", "restorer", or its "decoder"
#   autoencoder  {"kind": "pixels", "factor": f}: PixelAE; {"kind": "own", "dcae": config}: trained
#                in the stage autoencoder; {"kind": "pretrained"}: the DC-AE of name
#   digests      {part: SHA-256 of its weights} of a pretrained model, or of an own autoencoder
#   sana         the transformer's config; conditioning, prediction, shift: Restorer's arguments
#   enlarge      factor by which pictures are enlarged before they are restored
#   keeps_grey   whether grey pictures stay grey: the clean pictures of grey conditions were grey
#   lora         rank, if the trained weights are low-rank updates
#   base         True: the weights are only changes (LoRA, decoder) to a restorer in RUN/base/
#   decoder      of the decoder that sees the degraded image: "dcae", its config; "gains", the
#                factors of its skips; "steps" of its restorer's sampler
#
# A run folder is whole:
#   RUN/step_N/         a checkpoint: config.json, rows.json, weights, averages, optimizer
#   RUN/latest, best    name one of them
#   RUN/base/           the checkpoint that a LoRA or a decoder is a change of
#   RUN/autoencoder/    the checkpoint of a preset's own autoencoder
# The last two may stand on others, within them: the decoder of a LoRA of a run has base/ (the
# LoRA), base/base/ (the run that it changes), and the same autoencoder/ in each.

STAGES = ["autoencoder", "restorer", "decoder"]
MODEL_DEFAULTS = {
    "name": "",
    "stage": "restorer",
    "autoencoder": {"kind": "pretrained"},
    "digests": {},
    "conditioning": "projection",
    "prediction": "velocity",
    "shift": SHIFT,
    "sana": {},
    "enlarge": 1,
    "keeps_grey": True,
    "lora": None,
    "base": False,
    "decoder": None,
}


def small_sana(channels, layers, heads):
    """Return the config of a transformer that trains on a laptop, of width 32 * heads."""
    return {
        "in_channels": channels,
        "out_channels": channels,
        "num_layers": layers,
        "num_attention_heads": heads,
        "num_cross_attention_heads": heads,
        "cross_attention_head_dim": 32,
        "cross_attention_dim": 32 * heads,
        "caption_channels": 256,
        "qk_norm": "rms_norm_across_heads",
    }


FROM_SCRATCH = MODEL_DEFAULTS | {"conditioning": "widen", "prediction": "residual"}
MINI_DCAE = {
    "latent_channels": 16,
    "encoder_block_out_channels": [32, 32, 64, 128],
    "decoder_block_out_channels": [48, 48, 96, 128],
    "encoder_layers_per_block": [0, 1, 1, 1],  # it begins at half the side
    "decoder_layers_per_block": [0, 3, 2, 2],
    "encoder_qkv_multiscales": [[], [], [], []],
    "decoder_qkv_multiscales": [[], [], [], []],
}
PRESETS = {
    # on pixels instead of latents
    "tiny": FROM_SCRATCH | {
        "name": "tiny",
        "autoencoder": {"kind": "pixels", "factor": 4},
        "sana": small_sana(channels=48, layers=4, heads=3),
    },
    # the whole latent method on a laptop: its own autoencoder, and SANA on the latents
    "mini": FROM_SCRATCH | {
        "name": "mini",
        "autoencoder": {"kind": "own", "dcae": MINI_DCAE},
        "sana": small_sana(channels=16, layers=6, heads=4),
    },
}

# The stages that may be trained next. A preset or a pretrained model is told by the kind of its
# autoencoder, a run by the stage that it was.
NEXT_STAGES = {
    "pixels": ["restorer"],
    "own": ["autoencoder"],
    "pretrained": ["restorer"],
    "autoencoder": ["autoencoder", "restorer"],
    "restorer": ["restorer", "decoder"],
    "decoder": ["decoder"],
}


def build_restorer(config):
    """Build a Restorer with unset weights. config: a preset, or "model" of a config.json.

    Raises ValueError."""
    restorer = Restorer(Sana(config["sana"]), *restorer_options(config))
    return add_lora(restorer, config["lora"]) if config["lora"] else restorer


def restorer_options(config):
    return config["conditioning"], config["prediction"], config["shift"]


def describe_model(name, stage, conditioning=None, lora=None, shift=None):
    """Return the "model" part of config.json for a new run of a stage. Raises UserError.

    name: of --model: a preset, a run of train.py, or a pretrained model. conditioning, lora (rank),
    shift: None keeps what that model has."""
    stage_before = stage_of(name)
    if stage_before:
        before = read_run(name)["model"]
    else:
        before = PRESETS.get(name) or describe_pretrained(name)
    possible = NEXT_STAGES[stage_before or before["autoencoder"]["kind"]]
    if stage == "decoder" and before["autoencoder"]["kind"] == "pixels":
        raise UserError(f"--stage decoder: {name} works on pixels, which lose nothing")
    if stage not in possible:
        advice = f"begin with python train.py --model {name} --stage {' or '.join(possible)}"
        raise UserError(f"--stage {stage} cannot follow {name}: {advice}, and give its run next")
    config = before | {"stage": stage}
    if config["autoencoder"]["kind"] == "own" and stage != "autoencoder":
        weights = find_autoencoder(name) / "ema.safetensors"
        config["digests"] = {"autoencoder": file_digest(weights)}
    if stage == "restorer":
        describe_restorer(config, name, conditioning, lora)
        config["shift"] = shift or config["shift"]
    if stage == "decoder":
        config["base"] = True
    return config


def describe_restorer(config, name, conditioning, lora):
    """Set conditioning and LoRA in the config of a new restorer. Raises UserError."""
    trained = stage_of(name) == "restorer"
    learnt = config["conditioning"] if trained else "none"
    if conditioning and learnt not in ("none", conditioning):
        raise UserError(f"--conditioning {conditioning}: {name} has learnt {learnt} already")
    if conditioning:
        config["conditioning"] = conditioning
    elif config["conditioning"] == "none":  # not inherited: a restorer is what is wanted
        config["conditioning"] = "projection"
    if conditioning == "none":  # there is nothing that a residual could be added to
        config["prediction"] = "velocity"
    if lora and config["lora"] not in (None, lora):
        raise UserError(f"--lora {lora}: {name} has rank {config['lora']} already")
    if lora and not config["lora"]:
        if not trained and config["autoencoder"]["kind"] != "pretrained":
            raise UserError(f"--lora: {name} is not trained yet, and LoRA is a change of what is")
        config["lora"] = lora
        config["base"] = trained
    with torch.device("meta"):
        try:
            build_restorer(config)  # what cannot be built is said before anything is loaded
        except ValueError as error:
            raise UserError(f"--model {name}: {error}") from None


def describe_pretrained(name):
    folder = resolve_model(name)
    shift = SHIFT
    if (folder / "scheduler/scheduler_config.json").is_file():
        shift = read_json(folder / "scheduler/scheduler_config.json").get("flow_shift", SHIFT)
    return MODEL_DEFAULTS | {
        "name": full_name(name),
        "digests": {part: weights_digest(folder / part) for part in PARTS},
        "shift": shift,
        "sana": load_config(Sana, folder / "transformer").config,
    }


def full_name(name):
    """Return the full path of a folder; another name of a pretrained model as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


@functools.cache  # gigabytes, asked for again and again
def weights_digest(folder):
    """Return one SHA-256 of all weight files of a folder in the hub's layout."""
    digests = [file_digest(path) for path in weight_files(folder)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def pretrained_part(config, part):
    """Return the folder of a part of the pretrained model that a config names.

    Raises UserError if it is gone, or holds other weights than the run was trained with."""
    folder = resolve_model(config["name"], [part]) / part
    if weights_digest(folder) != config["digests"][part]:
        raise UserError(f"{folder} holds other weights than this run was trained with; see --model")
    return folder


def is_run(name):
    """Say whether name is a run of train.py, one of its checkpoints, or a file that names one."""
    if name in PRESETS:  # ./mini is a folder of that name
        return False
    try:
        find_checkpoint(name)
    except UserError:
        return False
    return True


def stage_of(name):
    """Return which stage a run was; None for a name that is no run."""
    return read_run(name)["model"]["stage"] if is_run(name) else None


def find_checkpoint(path):
    """Return the checkpoint folder that a path names. Raises UserError.

    path: a run (whose file `latest` names it), that file or `best`, or the checkpoint itself."""
    folder = Path(path)
    pointer = folder if folder.is_file() else folder / "latest"
    if pointer.name in ("best", "latest") and pointer.is_file():
        folder = pointer.parent / pointer.read_text(errors="replace").strip()
    if not (folder / "config.json").is_file() or not (folder / "ema.safetensors").is_file():
        raise UserError(f"{path}: no checkpoint here; give a run folder or one of its step folders")
    return folder


def read_run(path):
    """Read config.json of the checkpoint that path names. Raises UserError."""
    file = find_checkpoint(path) / "config.json"
    config = read_json(file)
    with explain_errors(file, "this run"):
        if config["model"].keys() != MODEL_DEFAULTS.keys():
            raise ValueError("it was made by another version of this program")
    return config


def rows_trained_on(name):
    """Return the digests of the clean pictures that the weights of --model name have seen."""
    if not is_run(name):
        return set()
    rows = read_json(find_checkpoint(name) / "rows.json")
    return {digest for _, digest, _ in rows["trained"]} | set(rows["before"])


def run_of(checkpoint):
    """Return the folder that holds base/ and autoencoder/ of a checkpoint."""
    checkpoint = checkpoint.resolve()  # it may be "."
    return checkpoint.parent if checkpoint.name.startswith("step_") else checkpoint


def find_part(checkpoint, part):
    """Return the checkpoint that another stands on. Raises UserError if it is missing.

    part: "base" or "autoencoder"."""
    folder = run_of(checkpoint) / part
    if not (folder / "ema.safetensors").is_file():
        raise UserError(f"{checkpoint} stands on {part}/ of its run; take the whole run folder")
    return folder


def find_autoencoder(path):
    """Return the checkpoint of the own autoencoder that path is or has. Raises UserError."""
    checkpoint = find_checkpoint(path)
    if read_run(checkpoint)["model"]["stage"] == "autoencoder":
        return checkpoint
    return find_part(checkpoint, "autoencoder")


def link_parts(name, config, run):
    """Put what a new run stands on into its folder: base/ and autoencoder/. Raises UserError.

    name: of --model. config: describe_model(name, ...)."""
    if not is_run(name):
        return
    checkpoint = find_checkpoint(name)
    before = read_run(checkpoint)["model"]
    if config["autoencoder"]["kind"] == "own" and config["stage"] != "autoencoder":
        link_checkpoint(find_autoencoder(checkpoint), run / "autoencoder")
    if config["base"]:
        # a LoRA or a decoder that is trained further keeps its base
        further = before["base"] and before["stage"] == config["stage"]
        link_checkpoint(find_part(checkpoint, "base") if further else checkpoint, run / "base")


def link_checkpoint(source, target):
    """Put a checkpoint, and what it stands on, into a new folder.

    Files become hard links, which take no room and outlive the source; else copies. (A checkpoint's
    files are never changed, only replaced.)"""

    def link(file, place):
        try:
            os.link(file, place)
        except OSError:  # another disk, or a file system without links
            shutil.copyfile(file, place)

    shutil.rmtree(target, ignore_errors=True)  # of a start that was killed
    target.mkdir(parents=True)
    for file in ("config.json", "rows.json", "ema.safetensors"):
        link(source / file, target / file)
    for part in ("base", "autoencoder"):
        if (run_of(source) / part).is_dir():
            link_checkpoint(run_of(source) / part, target / part)


def initial_restorer(name, config, generator):
    """Make the Restorer that training begins with. config: describe_model(name, ...).

    A restorer's run gives its averaged weights, a pretrained model SANA's; a layer for the
    condition is added where there is none. All other weights are random. Raises UserError."""
    if stage_of(name) == "restorer":
        restorer, before = load_restorer(name)
        restorer = with_options(restorer, config)
        if before["lora"]:
            return restorer
    elif config["autoencoder"]["kind"] == "pretrained":
        restorer = pretrained_restorer(config)
    else:
        restorer = build_restorer(config)
        restorer.sana.initialize(generator)
    if config["lora"]:
        add_lora(restorer, config["lora"], generator)
    return restorer


def pretrained_restorer(config):
    """Load the pretrained transformer, with a new layer for the condition. Raises UserError."""
    sana = load_pretrained(Sana, pretrained_part(config, "transformer"), torch.float32)
    return Restorer(sana, *restorer_options(config))


def with_options(restorer, config):
    """Return a restorer as config describes it: with a condition, if it had none."""
    if restorer.conditioning != config["conditioning"]:
        return Restorer(restorer.sana, *restorer_options(config))
    restorer.shift = config["shift"]
    return restorer


def load_restorer(path, weights="ema", name=None):
    """Load a Restorer and the "model" part of its config.json. Raises UserError.

    path: a run or checkpoint; for a decoder's, load the restorer that it belongs to. weights:
    "ema", the averaged ones, or "model", the last ones. name: the present place of the pretrained
    model, if it has moved since training."""
    folder = find_checkpoint(path)
    config = read_run(folder)["model"]
    config["name"] = name or config["name"]
    if config["stage"] == "autoencoder":
        raise UserError(f"{path} is an autoencoder; train a restorer on it: --model {path}")
    file = folder / f"{weights}.safetensors"
    if config["base"]:
        restorer, _ = load_restorer(find_part(folder, "base"), name=config["name"])
    elif config["lora"]:
        restorer = pretrained_restorer(config)
    else:
        with explain_errors(folder / "config.json", "this restorer"), torch.device("meta"):
            restorer = build_restorer(config)
        load_weights(restorer, file)
    if config["lora"] and config["stage"] == "restorer":
        restorer = add_lora(with_options(restorer, config), config["lora"])
        load_weights(restorer, file, trained=True)
    return restorer.eval(), config


def export(path, out, weights="ema"):
    """Write a trained restorer as diffusers' SanaTransformer2DModel reads it. Raises UserError.

    Its in_channels is 2C (C without a condition): the latent, then the condition. The projection P
    and the patch embedding W that follows it become one linear map: W(Px) = (WP)x."""
    out = Path(out)
    if (out / "config.json").exists():
        raise UserError(f"{out} holds a model already; choose another folder")
    restorer, about = load_restorer(path, weights)
    if about["stage"] == "decoder":
        base = find_part(find_checkpoint(path), "base")
        raise UserError(f"{path} is a decoder, and diffusers has no such; export {base}")
    merge_lora(restorer)
    tensors = restorer.sana.state_dict()
    if restorer.conditioning == "projection":
        w = tensors["patch_embed.proj.weight"]                      # [D, C, 1, 1]
        p = restorer.projection.weight.detach()                     # [C, 2C, 1, 1]
        product = w.double().flatten(1) @ p.double().flatten(1)     # [D, 2C]
        tensors["patch_embed.proj.weight"] = product.to(w.dtype)[:, :, None, None]
    channels = tensors["patch_embed.proj.weight"].shape[1]
    config = restorer.sana.config | {"_class_name": Sana.CLASS, "in_channels": channels}
    save_weights(tensors, out / "diffusion_pytorch_model.safetensors")
    write_json(out / "config.json", config)
    count = sum(t.numel() for t in tensors.values())
    print(f"{out}: {count / 1e6:.2f} M parameters, in_channels {channels}")
    meaning = {"velocity": "noise - x0", "residual": "x0 - condition, which is no velocity"}
    print(f"it predicts {meaning[restorer.prediction]}; sample with shift {restorer.shift:g}")


# --------------------------------------------------------------------------------------------------
# Text: tokenizer, Gemma-2, and SANA's way of asking it.


def pad_text(rows):
    """[[L, D], ...] of several lengths -> text [B, longest L, D], text_mask [B, longest L] bool."""
    lengths = torch.tensor([len(row) for row in rows])
    text = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return text, torch.arange(text.shape[1]) < lengths[:, None]


def to_device(tensor, device):
    """Copy a tensor of the CPU to a device. From pinned memory, a GPU does not make us wait."""
    if str(device).startswith("cuda"):
        tensor = tensor.contiguous().pin_memory()  # with gaps, it would be copied once more
        return tensor.to(device, non_blocking=True)
    return tensor.to(device)  # an Apple GPU would read freed memory: pytorch issue 189690


class GemmaTokenizer:
    """Byte-pair encoding as Gemma's tokenizer.json describes it.

    1. Added tokens are cut out of the text, the longest first.
    2. In what remains a space becomes "▁".
    3. Each character becomes a token, or its bytes where the vocabulary lacks it.
    4. Neighbours merge, the pair that was learnt first before all others.
    Raises UserError for a file that asks for anything else."""

    def __init__(self, folder):
        path = Path(folder) / "tokenizer.json"
        spec = read_json(path)
        with explain_errors(path, "this tokenizer"):
            check_tokenizer(spec)
            self.vocab = spec["model"]["vocab"]
            self.bytes = [self.vocab[f"<0x{byte:02X}>"] for byte in range(256)]
            self.added = {token["content"]: token["id"] for token in spec["added_tokens"]}
            self.bos = self.added["<bos>"]
            self.ranks = {}  # (left id, right id) -> rank
            self.merged = []  # by rank, the id of left + right
            for rank, merge in enumerate(spec["model"]["merges"]):
                left, right = merge.split(" ") if isinstance(merge, str) else merge
                self.ranks[self.vocab[left], self.vocab[right]] = rank
                self.merged.append(self.vocab[left + right])
            longest_first = sorted(self.added, key=len, reverse=True)
            self.pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(self, text):
        """text -> [<bos>, ...] token ids."""
        ids = [self.bos]
        for i, piece in enumerate(self.pattern.split(text)):
            if i % 2:  # what matched the pattern
                ids.append(self.added[piece])
            else:
                ids += self.merge(self.characters(piece.replace(" ", "▁")))
        return ids

    def characters(self, text):
        ids = []
        for character in text:
            if character in self.vocab:
                ids.append(self.vocab[character])
            else:
                ids += [self.bytes[byte] for byte in character.encode("utf-8", "replace")]
        return ids

    def merge(self, ids):
        """Merge two neighbours at a time: the pair of the lowest rank, at its leftmost place.

        (GPT-2's loop merges all places of a pair at once. Where a token can be made in several
        ways, as in Gemma's vocabulary, that gives other tokens.) 10,000 merges take seconds."""
        never = len(self.merged)
        ranks = [self.ranks.get(pair, never) for pair in zip(ids, ids[1:])]
        while True:
            best = min(ranks, default=never)
            if best == never:
                return ids
            i = ranks.index(best)
            ids[i : i + 2] = [self.merged[best]]
            del ranks[i]
            for left in (i - 1, i):  # the pairs of the new token
                if 0 <= left < len(ranks):
                    ranks[left] = self.ranks.get((ids[left], ids[left + 1]), never)


def check_tokenizer(spec):
    """Raise ValueError if a tokenizer.json asks for more than GemmaTokenizer does."""
    model = spec["model"]
    if model["type"] != "BPE":
        raise ValueError(f"a {model['type']} model, not BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(key):
            raise ValueError(f"{key} is not supported")
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if spec["normalizer"] != spaces:
        raise ValueError(f"normalizer {spec['normalizer']} is not supported")
    split = spec.get("pre_tokenizer") or {}
    # To split at spaces does nothing: the normalizer leaves none.
    if split and (split["type"], split.get("pattern")) != ("Split", {"String": " "}):
        raise ValueError(f"pre_tokenizer {split} is not supported")
    for token in spec["added_tokens"]:
        if any(token.get(key) for key in ("lstrip", "rstrip", "single_word", "normalized")):
            raise ValueError(f"added token {token['content']!r} is not supported")


GEMMA_DEFAULTS = {  # of Gemma-2-2b; the other keys of its config are about generating and saving
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "sliding_window": 4096,
    "rope_theta": 10000.0,
    "rope_type": "default",
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "use_bidirectional_attention": None,
}
GEMMA_SUPPORTED = {
    "rope_type": ["default"],
    "hidden_activation": ["gelu_pytorch_tanh"],
    "attention_bias": [False],
    "use_bidirectional_attention": [None, False],
}


class Gemma2(nn.Module):
    """The body of the Gemma-2 language model (arXiv 2408.00118).

    Its last hidden state is SANA's text embedding. config: the keys of text_encoder/config.json.
    Raises ValueError for one that this file does not build."""

    CLASS = "Gemma2"
    PREFIX = "model."  # of tensor names in files that hold a language model around the body

    def __init__(self, config):
        super().__init__()
        config = (config.get("rope_parameters") or {}) | config
        config = {key: value for key, value in config.items() if key in GEMMA_DEFAULTS}
        c = read_config("Gemma", config, GEMMA_DEFAULTS, GEMMA_SUPPORTED)
        self.config = c
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList([GemmaLayer(c) for _ in range(c["num_hidden_layers"])])
        self.norm = GemmaNorm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, ids, mask):
        """ids, mask (True = a real token) [B, L], padded on the right -> [B, L, D].

        Raises UserError if L exceeds the sliding window: the windowed attention of every second
        layer is not implemented."""
        length = ids.shape[1]
        if length > self.config["sliding_window"]:
            limit = self.config["sliding_window"]
            raise UserError(f"a prompt of {length} tokens; at most {limit}")
        x = self.embed_tokens(ids)                                  # [B, L, D]
        scale = torch.tensor(self.config["hidden_size"] ** 0.5, dtype=x.dtype)
        x = x * scale                                               # rounded to bf16 as in training
        head_dim = self.config["head_dim"]
        even = torch.arange(0, head_dim, 2, device=x.device).float()
        frequency = self.config["rope_theta"] ** -(even / head_dim)  # [d/2]
        position = torch.arange(length, device=x.device)
        angle = position[:, None] * frequency.repeat(2)             # [L, d]
        rotation = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        allowed = causal & mask.bool()[:, None, None]               # [B, 1, L, L]
        for layer in self.layers:
            x = layer(x, rotation, allowed)                         # [B, L, D]
        return self.norm(x)


class GemmaLayer(nn.Module):
    """Attention and feed-forward, each between two norms."""

    def __init__(self, c):
        super().__init__()
        dim, eps = c["hidden_size"], c["rms_norm_eps"]
        self.self_attn = GemmaAttention(c)
        self.mlp = GemmaMLP(dim, c["intermediate_size"])
        self.input_layernorm = GemmaNorm(dim, eps)
        self.post_attention_layernorm = GemmaNorm(dim, eps)
        self.pre_feedforward_layernorm = GemmaNorm(dim, eps)
        self.post_feedforward_layernorm = GemmaNorm(dim, eps)

    def forward(self, x, rotation, allowed):                        # [B, L, D]
        y = self.self_attn(self.input_layernorm(x), rotation, allowed)
        x = x + self.post_attention_layernorm(y)
        y = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(y)


class GemmaAttention(nn.Module):
    """Causal attention; several query heads share one head of keys and values."""

    def __init__(self, c):
        super().__init__()
        dim, head_dim = c["hidden_size"], c["head_dim"]
        queries = c["num_attention_heads"] * head_dim
        keys = c["num_key_value_heads"] * head_dim
        self.head_dim = head_dim
        self.shared_by = c["num_attention_heads"] // c["num_key_value_heads"]
        self.scale = c["query_pre_attn_scalar"] ** -0.5
        self.softcap = c["attn_logit_softcapping"]
        self.q_proj = nn.Linear(dim, queries, bias=False)
        self.k_proj = nn.Linear(dim, keys, bias=False)
        self.v_proj = nn.Linear(dim, keys, bias=False)
        self.o_proj = nn.Linear(queries, dim, bias=False)

    def split(self, t):                                             # [B, L, h*d]
        return t.unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # [B, h, L, d]

    def forward(self, x, rotation, allowed):                        # [B, L, D], 2 * [L, d]
        q = rotate(self.split(self.q_proj(x)), *rotation)           # [B, h, L, d]
        k = rotate(self.split(self.k_proj(x)), *rotation).repeat_interleave(self.shared_by, dim=1)
        v = self.split(self.v_proj(x)).repeat_interleave(self.shared_by, dim=1)
        logits = q @ k.transpose(2, 3) * self.scale                 # [B, h, L, L]
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logits = logits.masked_fill(~allowed, -math.inf)
        weights = logits.softmax(3, dtype=torch.float32).to(q.dtype)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2))  # [B, L, D]


def rotate(t, cos, sin):
    """Rotate each pair (a_i, b_i) by an angle set by its position (RoFormer, arXiv 2104.09864)."""
    a, b = t.chunk(2, dim=3)
    return t * cos + torch.cat([-b, a], dim=3) * sin


class GemmaMLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):                                           # [B, L, D]
        gate = F.gelu(self.gate_proj(x), approximate="tanh")
        return self.down_proj(gate * self.up_proj(x))


class GemmaNorm(nn.Module):
    """RMS norm. The weight is stored as its distance from 1.

    The product with it is taken in fp32, before the cast back to bf16."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), self.eps).type_as(x)


# What preceded SANA's prompts in its training, word for word (the text is the model authors').
INSTRUCTION = """\
Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image generation. Evaluate the level of detail in the user prompt:
- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial relationships to create vivid and concrete scenes.
- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.
Here are examples of how to transform or refine prompts:
- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.
- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.
Please generate only the enhanced description for the prompt below and avoid including any additional commentary or evaluations:
User Prompt: """  # noqa: E501


@torch.no_grad()
def encode_prompts(tokenizer, gemma, prompts, batch_size=8, length=300):
    """Compute SANA's text conditioning: for each prompt, [L, D] with L <= length tokens.

    The encoder reads the instruction, then the prompt. Of the instruction's rows only the first
    (<bos>) and the last are kept. The empty prompt, for guidance and dropout, is read without an
    instruction. Nothing is padded up to length: cross-attention gives padding a weight of exactly
    0. Raises UserError.

    Example: <bos>, 99 instruction tokens and 5 prompt tokens (intro = 100). Rows 0 and 99 to 104
    are kept: <bos>, the last instruction token, the prompt."""
    intro = len(tokenizer.encode(INSTRUCTION))
    longest = intro + length - 2  # so that <bos>, that last one and the prompt are length tokens
    rows = []
    starts = range(0, len(prompts), batch_size)
    for start in tqdm(starts, unit="batch", desc="prompts", disable=len(starts) == 1):
        batch = [prompt.lower().strip() for prompt in prompts[start : start + batch_size]]
        ids = []
        for prompt in batch:
            tokens = tokenizer.encode(INSTRUCTION + prompt if prompt else "")
            if max(tokens) >= gemma.config["vocab_size"]:
                raise UserError("tokenizer.json has more tokens than the text encoder knows")
            if len(tokens) > longest:
                cut = f"the prompt {prompt[:40]!r}... is cut to {length - 2} tokens"
                print(cut, file=sys.stderr)
            ids.append(torch.tensor(tokens[:longest]))
        padded, mask = [to_device(t, gemma.norm.weight.device) for t in pad_text(ids)]
        states = gemma(padded, mask).cpu()                          # [B, L, D]
        for prompt, tokens, row in zip(batch, ids, states):
            row = row[: len(tokens)]
            if prompt:
                row = torch.cat([row[:1], row[intro - 1 :]])
            rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------
# What stands around the transformer, frozen: pixels become latents, captions become embeddings.


def split_words(prompt):
    """Return the words of a prompt: runs of letters, digits and the marks that belong to them.

    They are in lower case and composed (Unicode's NFC): an accent may be typed in two ways."""
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", prompt).lower())
    kinds = [unicodedata.category(c)[0] for c in text]
    return "".join(c if kind in "LNM" else " " for c, kind in zip(text, kinds)).split()


def hash_prompts(prompts):
    """Embed prompts without a text encoder -> text [B, L, 256], text_mask [B, L] bool.

    Each word becomes the 256 bits of its SHA-256 as -1 and 1. So words are nearly orthogonal, and
    the same on every machine. The empty word stands first, as <bos> does elsewhere."""
    rows = []
    for prompt in prompts:
        words = split_words(prompt)
        digests = b"".join(hashlib.sha256(word.encode()).digest() for word in ["", *words])
        bits = np.unpackbits(np.frombuffer(digests, np.uint8), bitorder="little")
        rows.append(torch.from_numpy(bits).view(-1, 256).float() * 2 - 1)   # [L, 256]
    return pad_text(rows)


class Prompts:
    """Turn captions into embeddings.

    config: "model" of config.json. The Gemma of a pretrained model encodes each distinct caption
    once and is then freed; presets have hash_prompts."""

    def __init__(self, config, device="cpu"):
        self.config = config
        self.hashed = config["autoencoder"]["kind"] != "pretrained"
        self.device = str(device)
        self.known = {}

    def prepare(self, captions):
        """Encode the captions that are new. Call it once with all: each call loads the encoder."""
        new = sorted(set(captions) - self.known.keys())
        if not new or self.hashed:
            return
        folder = pretrained_part(self.config, "text_encoder")
        dtype = torch.float32 if self.device == "cpu" else None  # a CPU is slow in bf16
        gemma = load_pretrained(Gemma2, folder, dtype).to(self.device)
        width = gemma.config["hidden_size"]
        check_width(folder, "numbers a token", width, self.config["sana"]["caption_channels"])
        tokenizer = GemmaTokenizer(folder.parent / "tokenizer")
        # one by one on a CPU: rounding does not depend on the batch, so resuming is exact
        batch_size = 1 if self.device == "cpu" else 8
        self.known.update(zip(new, encode_prompts(tokenizer, gemma, new, batch_size)))
        del gemma
        torch.cuda.empty_cache()  # for the training that follows, also of another process

    def __call__(self, captions):
        """[B] captions -> text [B, L, D], text_mask [B, L] bool or None, on the device.

        None: no caption is padded."""
        if self.hashed:
            text, mask = hash_prompts(captions)
        else:
            self.prepare(captions)
            text, mask = pad_text([self.known[caption] for caption in captions])
        mask = None if mask.all() else to_device(mask, self.device)
        return to_device(text, self.device), mask


def load_autoencoder(config, path):
    """Load the autoencoder for the "model" of a config.json, frozen. Raises UserError.

    path: the run or checkpoint that is or has a preset's own autoencoder; not used for others."""
    kind = config["autoencoder"]["kind"]
    if kind == "pixels":
        return PixelAE(config["autoencoder"]["factor"])
    if kind == "own":
        with torch.device("meta"):
            autoencoder = DCAE(config["autoencoder"]["dcae"])
        load_weights(autoencoder, find_autoencoder(path) / "ema.safetensors")
    else:
        vae = pretrained_part(config, "vae")
        autoencoder = load_pretrained(DCAE, vae, torch.float32)
        check_width(vae, "channels", autoencoder.channels, config["sana"]["out_channels"])
    return autoencoder.requires_grad_(False).eval()


def check_width(folder, what, given, taken):
    if given != taken:
        raise UserError(f"{folder} gives {given} {what}, the transformer takes {taken}")


def load_decoder(config, checkpoint, weights="ema"):
    """Load the autoencoder whose decoder sees the degraded image, frozen. Raises UserError."""
    autoencoder = load_autoencoder(config, checkpoint)
    autoencoder.add_skips(config["decoder"]["gains"]).freeze_around_decoder()
    load_weights(autoencoder, checkpoint / f"{weights}.safetensors", trained=True)
    return autoencoder.requires_grad_(False)


def check_resolution(sides, autoencoder):
    """Raise UserError for a crop that the model cannot take."""
    for side in sides:
        if side % autoencoder.factor:
            raise UserError(f"--resolution {side}: give a multiple of {autoencoder.factor}")


# --------------------------------------------------------------------------------------------------


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("command", choices=["export"])
    add("checkpoint", help="run folder of train.py, or one of its step folders")
    add("out", help="folder to write: config.json and diffusion_pytorch_model.safetensors")
    add("--weights", choices=["ema", "model"], default="ema", help="averaged, or the last ones")
    args = parser.parse_args()
    export(args.checkpoint, args.out, args.weights)


if __name__ == "__main__":
    run_script(main)
