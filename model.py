"""SANA, the flow-matching linear-attention transformer, and what turns it into an image restorer.

    python model.py export out/RUN restorer/     a trained restorer as diffusers' SanaTransformer2DModel reads it

Papers: SANA (arXiv 2410.10629), SANA 1.5 (2501.18427), flow matching / rectified flow (2210.02747, 2209.03003).
Letters used in the shape comments:
    B batch    C latent channels    H, W latent grid    N = H*W image tokens    D width    h heads    d = D/h
    L caption tokens (padded to the longest of the batch)

The convention of sigma, the one that SANA's checkpoints were trained with, everywhere in this project:
sigma in [0, 1] is the NOISE fraction. x_sigma = (1 - sigma) * x0 + sigma * noise, so sigma = 1 is pure noise, and the velocity is
dx/dsigma = noise - x0. (Some texts call the clean fraction sigma. Mixing the two trains against the pretrained weights.)
"""
import heapq
import json
import math
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from degrade import Parser, UserError, make_folder, reading, run_script, write_text
from vae import GLUMBConv, Pretrained, find_checkpoint, find_model, is_run, load_weights, read_config, read_json, save_weights

# ----------------------------------------------------------------------------------------------------------------
# The transformer. Module and parameter names are those of the diffusers checkpoints, so weights load by name.

SANA_DEFAULTS = dict(  # what a missing key of config.json means, as diffusers has it
    in_channels=32, out_channels=32, num_attention_heads=70, attention_head_dim=32, num_layers=20, num_cross_attention_heads=20,
    cross_attention_head_dim=112, cross_attention_dim=2240, caption_channels=2304, mlp_ratio=2.5, attention_bias=False,
    sample_size=32, patch_size=1, norm_eps=1e-6, interpolation_scale=None, qk_norm=None, timestep_scale=1.0)
SANA_IGNORED = ("dropout", "guidance_embeds_scale")  # they do not change the network; of these keys, the values that this file builds:
SANA_BUILT = {"guidance_embeds": (False,), "norm_elementwise_affine": (False,), "qk_norm": (None, "rms_norm_across_heads")}


class Attention(nn.Module):
    """The weights of both kinds of attention: queries from the image tokens, keys and values from source_dim channels."""

    def __init__(self, dim, source_dim, heads, head_dim, bias, qk_norm):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.to_q = nn.Linear(dim, inner, bias=bias)
        self.to_k, self.to_v = (nn.Linear(source_dim, inner, bias=bias) for _ in range(2))
        self.norm_q, self.norm_k = (nn.RMSNorm(inner, eps=1e-5) if qk_norm else nn.Identity() for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])

    def split(self, t):                                                     # [B, N, h*d] -> [B, h, N, d]
        return t.unflatten(2, (self.heads, -1)).transpose(1, 2)


class LinearAttention(Attention):
    """ReLU linear attention (SANA, section 2.2): softmax(QK^T)V becomes relu(Q)(relu(K)^T V), whose cost grows
    with N instead of N^2, because the sum over all tokens, relu(K)^T V, is one d x d matrix per head."""

    def forward(self, x):                                                   # [B, N, D]
        q = self.split(F.relu(self.norm_q(self.to_q(x))).float())           # [B, h, N, d]
        k = self.split(F.relu(self.norm_k(self.to_k(x))).float())           # fp32: the sums run over N terms
        v = self.split(self.to_v(x).float())                                # [B, h, N, d]
        summary = k.transpose(2, 3) @ v                                     # [B, h, d, d]
        total = k.sum(2).unsqueeze(3)                                       # [B, h, d, 1]
        out = (q @ summary) / (q @ total + 1e-15)                           # [B, h, N, d]
        return self.to_out[0](out.transpose(1, 2).flatten(2).to(x.dtype))   # [B, N, D]


class CrossAttention(Attention):
    """Softmax attention from image tokens to caption tokens."""

    def read(self, text):                                                   # [B, L, D]
        return self.split(self.norm_k(self.to_k(text))), self.split(self.to_v(text))  # 2 * [B, h, L, d]

    def forward(self, x, k, v, text_mask):                                  # [B, N, D], 2 * [B, h, L, d], [B, L] or None
        q = self.split(self.norm_q(self.to_q(x)))                           # [B, h, N, d]
        mask = None if text_mask is None else text_mask[:, None, None, :]   # [B, 1, 1, L], True = attend
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)       # [B, h, N, d]
        return self.to_out[0](out.transpose(1, 2).flatten(2))               # [B, N, D]


class SanaBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.eps, dim, qk_norm = c["norm_eps"], c["num_attention_heads"] * c["attention_head_dim"], c["qk_norm"] is not None
        self.attn1 = LinearAttention(dim, dim, c["num_attention_heads"], c["attention_head_dim"], c["attention_bias"], qk_norm)
        self.attn2 = CrossAttention(dim, c["cross_attention_dim"], c["num_cross_attention_heads"],
                                    c["cross_attention_head_dim"], True, qk_norm)
        self.ff = GLUMBConv(dim, c["mlp_ratio"])
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim))

    def forward(self, x, modulation, k, v, text_mask, grid):                # [B, N, D], [B, 6, D], 2 * [B, h, L, d], [B, L]
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + modulation).chunk(6, dim=1)
        x = x + gate1 * self.attn1(modulate(x, shift1, scale1, self.eps))   # [B, N, D]
        x = x + self.attn2(x, k, v, text_mask)                              # [B, N, D]
        return x + gate2 * self.ff(modulate(x, shift2, scale2, self.eps), grid)  # [B, N, D]


def modulate(x, shift, scale, eps):
    """Adaptive layer norm (DiT, arXiv 2212.09748): x [B, N, D], shift and scale [B, 1, D]."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class PatchEmbed(nn.Module):
    """Patches of patch x patch latents to tokens. The 512 and 1024 px models have no position embedding, the 2K and 4K ones
    add fixed sines and cosines (scale = interpolation_scale), stretched so that any grid spans 0 to base / scale."""

    def __init__(self, channels, dim, patch=1, base=None, scale=None):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)
        self.base, self.scale = base, scale

    def forward(self, x):                                                   # [B, C, H, W]
        x = self.proj(x)                                                    # [B, D, H, W]
        if self.scale is not None:
            rows, columns = (self._waves(n, x) for n in x.shape[2:])        # [D/2, H], [D/2, W]
            columns, rows = columns[:, None].expand(-1, x.shape[2], -1), rows[:, :, None].expand(-1, -1, x.shape[3])
            x = (x + torch.cat([columns, rows])).to(x.dtype)
        return x.flatten(2).transpose(1, 2).contiguous()                    # [B, N, D], laid out so: a fifth of tiny's time

    def _waves(self, n, x):
        at = torch.arange(n, device=x.device).float() / (n / self.base) / self.scale
        quarter = x.shape[1] // 4
        frequency = 10000 ** -(torch.arange(quarter, device=x.device).double() / quarter)
        angle = frequency[:, None] * at.double()                            # [D/4, n]
        return torch.cat([angle.sin(), angle.cos()]).float()                # [D/2, n]


class MLP(nn.Module):
    """linear_1, activation, linear_2: the checkpoint's names for the timestep and the caption embedder."""

    def __init__(self, d_in, dim, activation):
        super().__init__()
        self.linear_1, self.linear_2, self.activation = nn.Linear(d_in, dim), nn.Linear(dim, dim), activation

    def forward(self, x):
        return self.linear_2(self.activation(self.linear_1(x)))


class TimeEmbed(nn.Module):
    """AdaLN-single (PixArt-alpha, arXiv 2310.00426): one modulation for all blocks, to which each adds its table."""

    def __init__(self, dim):
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": MLP(256, dim, F.silu)})
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, timestep):                                            # [B] in [0, 1000]
        frequency = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=timestep.device))
        angle = timestep.float()[:, None] * frequency                       # [B, 128]
        wave = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.linear.weight.dtype)  # [B, 256]
        embedding = self.emb["timestep_embedder"](wave)                     # [B, D]
        return self.linear(F.silu(embedding)).unflatten(1, (6, -1)), embedding  # [B, 6, D], [B, D]


class Sana(Pretrained):
    """The SANA transformer: noisy latent, timestep and caption in, velocity out.

    config: the keys of the checkpoint's transformer/config.json (SANA_DEFAULTS where one is missing).
    Raises UserError for a key or value that this file does not build.
    """
    CLASS = "SanaTransformer2DModel"

    def __init__(self, config):
        super().__init__()
        self.config = c = read_config("SANA", config, SANA_DEFAULTS, SANA_IGNORED, SANA_BUILT)
        c["out_channels"] = c["out_channels"] or c["in_channels"]
        dim = c["num_attention_heads"] * c["attention_head_dim"]
        self.patch_embed = PatchEmbed(c["in_channels"], dim, c["patch_size"], c["sample_size"] // c["patch_size"],
                                      c["interpolation_scale"])
        self.time_embed = TimeEmbed(dim)
        self.caption_projection = MLP(c["caption_channels"], dim, lambda t: F.gelu(t, approximate="tanh"))
        self.caption_norm = nn.RMSNorm(dim, eps=1e-5)
        self.transformer_blocks = nn.ModuleList([SanaBlock(c) for _ in range(c["num_layers"])])
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim))
        self.proj_out = nn.Linear(dim, c["patch_size"] ** 2 * c["out_channels"])
        self.checkpointing = False  # True: keep no activations inside blocks, compute them again for the gradient

    def read(self, text):
        """text [B, L, caption_channels] -> its keys and values in each block, the same at every step of sampling."""
        text = self.caption_norm(self.caption_projection(text.to(self.proj_out.weight.dtype)))  # [B, L, D]
        return [block.attn2.read(text) for block in self.transformer_blocks]

    def forward(self, latents, timestep, text, text_mask=None):
        """latents [B, C, H, W], timestep [B] = 1000 * sigma, text [B, L, caption_channels] or what read() made of it, text_mask
        [B, L] (True = a real token; None = all are) -> velocity [B, C_out, H, W]. H and W are multiples of patch_size."""
        patch = self.config["patch_size"]
        grid = latents.shape[2] // patch, latents.shape[3] // patch
        x = self.patch_embed(latents)                                       # [B, N, D]
        modulation, embedding = self.time_embed(timestep * self.config["timestep_scale"])  # [B, 6, D], [B, D]
        for block, (k, v) in zip(self.transformer_blocks, self.read(text) if torch.is_tensor(text) else text):
            rest = modulation, k, v, text_mask, grid
            x = checkpoint(block, x, *rest, use_reentrant=False) if self.checkpointing else block(x, *rest)  # [B, N, D]
        shift, scale = (self.scale_shift_table + embedding[:, None]).chunk(2, dim=1)
        x = self.proj_out(modulate(x, shift, scale, 1e-6)).transpose(1, 2)  # [B, patch^2*C_out, N]
        if patch > 1:  # the checkpoint has the channel last, pixel_shuffle wants it first
            x = x.unflatten(1, (patch**2, -1)).transpose(1, 2).flatten(1, 2)
        return F.pixel_shuffle(x.unflatten(2, grid), patch)                 # [B, C_out, H, W]

    def initialize(self, generator):
        """Fill every weight for training from scratch: Xavier matrices, zero biases, no modulation (gates 1, shifts and
        scales 0), and a zero last layer, so that an untrained network answers 0."""
        for name, p in self.named_parameters():
            if name.endswith(("bias", "scale_shift_table")) or name.startswith(("proj_out", "time_embed.linear")):
                nn.init.zeros_(p)
                if name.endswith("scale_shift_table") and len(p) == 6:
                    nn.init.ones_(p.data[2::3])                             # the two gates
            elif "norm" in name:
                nn.init.ones_(p)
            elif "conv_depth" in name:
                nn.init.kaiming_uniform_(p, a=math.sqrt(5), generator=generator)
            else:
                nn.init.xavier_uniform_(p.data.flatten(1), generator=generator)
        return self


# ----------------------------------------------------------------------------------------------------------------
# From text-to-image to restoration: the degraded image enters beside the noisy latent.

MIN_SIGMA = 1e-3  # below it a residual prediction is not divided any further
SHIFT = 3.0  # SANA's resolution shift, for training and sampling alike (6 for its 4K model: see shift_sigma)


class Restorer(nn.Module):
    """SANA with a second input, the latent of the degraded image (the condition).

    sana: built for C channels. conditioning: how the condition enters,
      "projection": a 1x1 convolution 2C -> C in front, identity on the noisy latent and zero on the condition, so that
                    before training the output is the text-to-image model's, bit for bit;
      "widen":      the patch embedding takes 2C channels, its new half zero: the same start without the squeeze to C;
      "none":       it does not: a text-to-image model, to start a restorer from.
    prediction: what the network's output means, "velocity": noise - x0, as SANA's weights were trained;
      "residual": x0 - condition, for training from scratch: a network that answers 0 returns the input, not noise.
    """

    def __init__(self, sana, conditioning="projection", prediction="velocity", shift=SHIFT):
        super().__init__()
        channels = sana.config["out_channels"]
        self.sana, self.conditioning, self.prediction, self.shift = sana, conditioning, prediction, shift
        with torch.no_grad():
            if conditioning == "projection":
                if sana.config["in_channels"] != channels:
                    raise UserError("this model takes the condition already: --conditioning widen")
                self.projection = nn.Conv2d(2 * channels, channels, 1, bias=False)
                self.projection.weight.copy_(torch.eye(channels, 2 * channels)[:, :, None, None])
            elif conditioning == "widen":
                old = sana.patch_embed.proj
                if old.in_channels == channels:  # an exported restorer is widened already
                    new = nn.Conv2d(2 * channels, old.out_channels, old.kernel_size, old.stride, device=old.weight.device)
                    new.weight.zero_()[:, :channels].copy_(old.weight)
                    new.bias.copy_(old.bias)
                    sana.patch_embed.proj = new.to(old.weight.dtype)
        if conditioning not in ("projection", "widen", "none") or prediction not in ("velocity", "residual"):
            raise ValueError(f"conditioning {conditioning!r}, prediction {prediction!r}: not built here")

    def forward(self, latents, condition, timestep, text, text_mask=None):
        """latents, condition [B, C, H, W]; the rest as Sana.forward has it -> velocity [B, C, H, W]."""
        x = latents if self.conditioning == "none" else torch.cat([latents, condition], 1)  # [B, C or 2C, H, W]
        dtype = self.sana.proj_out.weight.dtype                             # fp32 or bf16
        if self.conditioning == "projection":
            # as a matrix product: a GPU may run fp32 convolutions in TF32, which would not be the identity
            x = (self.projection.weight.flatten(1) @ x.float().flatten(2)).unflatten(2, x.shape[2:])
        out = self.sana(x.to(dtype), timestep, text, text_mask).to(latents.dtype)  # [B, C, H, W]
        if self.prediction == "velocity":
            return out
        sigma = (timestep / 1000).clamp(min=MIN_SIGMA)[:, None, None, None]
        return (latents - (condition + out)) / sigma                        # v = (x_sigma - x0) / sigma


# The tiny preset: small enough to train from scratch on a laptop, on pixels instead of latents (vae.PixelAE).
PRESETS = {"tiny": {
    "autoencoder": {"factor": 2}, "conditioning": "widen", "prediction": "residual",
    "sana": {"in_channels": 12, "out_channels": 12, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 32,
             "num_cross_attention_heads": 2, "cross_attention_head_dim": 32, "cross_attention_dim": 64,
             "caption_channels": 256, "mlp_ratio": 2.5, "qk_norm": "rms_norm_across_heads"}}}


def build_restorer(config):
    """A preset, or "model" of a checkpoint's config.json -> Restorer with unset weights. Raises UserError."""
    c = read_config("model", config, {"shift": SHIFT, "name": ""}, ("autoencoder", "conditioning", "prediction", "sana"))
    sana, pixels = Sana(config["sana"]), config["autoencoder"]
    if not pixels:
        config["name"]  # says where the autoencoder is
    elif 3 * read_config("autoencoder", pixels, {"factor": 0})["factor"] ** 2 != sana.config["out_channels"]:
        raise UserError(f"the autoencoder {pixels} does not give the {sana.config['out_channels']} channels of the transformer")
    return Restorer(sana, config["conditioning"], config["prediction"], c["shift"])


# ----------------------------------------------------------------------------------------------------------------
# Flow matching. The loss and the sampler are two readings of one line: x_sigma = (1 - sigma) * x0 + sigma * noise.

def shift_sigma(sigma, shift=SHIFT):
    """Move sigmas towards 1, as high resolutions need (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def draw_sigma(count, generator, share_at_one=0.0, shift=SHIFT, mean=0.0, std=1.0):
    """[count] sigmas to train at: sigmoid of a normal draw, shifted; a share of them exactly 1, where one step starts."""
    sigma = shift_sigma((mean + std * torch.randn(count, generator=generator)).sigmoid(), shift)
    return torch.where(torch.rand(count, generator=generator) < share_at_one, 1.0, sigma)


def add_noise(x0, noise, sigma):
    """x_sigma. x0, noise [B, C, H, W], sigma [B]."""
    sigma = sigma[:, None, None, None]
    return (1 - sigma) * x0 + sigma * noise


def flow_loss(restorer, x0, condition, text, text_mask, sigma, noise, mean_weight=1.0):
    """[B]: mean squared error of the velocity, each image's own. A residual prediction is of x0, whose error the
    velocity divides by sigma; the weight bounds that division at sigma 0.2. mean_weight scales the part of the error
    that is constant over the image."""
    velocity = restorer(add_noise(x0, noise, sigma), condition, 1000 * sigma, text, text_mask)
    error = velocity.float() - (noise - x0).float()
    error = error - (1 - mean_weight) * error.mean((2, 3), keepdim=True)
    loss = error.square().flatten(1).mean(1)
    return loss * (sigma / 0.2).clamp(max=1).square() if restorer.prediction == "residual" else loss


@torch.no_grad()
def sample(velocity, noise, steps, sampler="euler", shift=SHIFT):
    """Follow dx/dsigma = velocity(x, timestep) from noise at sigma = 1 to an image at 0. noise [B, C, H, W] -> the same shape.

    "euler": one step gives x0 as predicted from pure noise, the mean of all clean images that fit the condition: the best
    PSNR; more steps settle on one of them. Its sigmas are linspace(1, 0, steps + 1), shifted. (diffusers' Euler shifts its
    smallest sigma twice: at 5 steps its timesteps are 1000, 900, 751, 503 and 9, and the last step does nothing.)
    "dpm": DPM-Solver++ 2M (arXiv 2211.01095), SANA's own: it starts at sigma 0.999, and the network sees whole timesteps.
    """
    x, x0_before, log_snr_before = noise, None, None
    sigmas = shift_sigma(torch.linspace({"euler": 1, "dpm": 0.999}[sampler], 0, steps + 1, dtype=torch.float64), shift).tolist()
    for sigma, following in zip(sigmas, sigmas[1:]):
        timestep = 1000 * sigma if sampler == "euler" else int(1000 * sigma)
        v = velocity(x, torch.full((len(x),), timestep, device=x.device, dtype=torch.float32))
        if sampler == "euler":
            x = x + (following - sigma) * v
            continue
        x0 = x - sigma * v
        log_snr, target = math.log((1 - sigma) / sigma), x0
        if x0_before is not None and following > 0:  # extrapolate x0 to the middle of the step, in log SNR
            step = math.log((1 - following) / following) - log_snr
            target = x0 + 0.5 * step / (log_snr - log_snr_before) * (x0 - x0_before)
        ratio = following / sigma
        x, x0_before, log_snr_before = ratio * x + (1 - ratio) * target, x0, log_snr
    return x


def guided(predict, prompt, empty, guidance=1.0, blind=None, condition_guidance=1.0):
    """Classifier-free guidance (arXiv 2207.12598): the velocity, moved away from the empty prompt's, and from that of no condition (InstructPix2Pix,
    2211.09800). predict, blind: with and without it, of (x, timestep, text, text_mask); prompt, empty: (text, text_mask) -> velocity(x, timestep)."""
    def velocity(x, timestep):
        v = predict(x, timestep, *prompt)
        if guidance == condition_guidance == 1:
            return v
        plain = predict(x, timestep, *empty)
        v = plain + guidance * (v - plain)
        return v if condition_guidance == 1 else v + (condition_guidance - 1) * (plain - blind(x, timestep, *empty))
    return velocity


# ----------------------------------------------------------------------------------------------------------------
# Text.

def pad_text(rows):
    """[[L, ...]] of several lengths -> text [B, longest L, ...], text_mask [B, longest L] bool."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    text = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return text, torch.arange(text.shape[1], device=text.device) < lengths[:, None]


class GemmaTokenizer:
    """Byte-pair encoding as tokenizer.json of Gemma describes it: added tokens are cut out of the text first, in what
    remains a space becomes "\u2581", characters become tokens (bytes where the vocabulary lacks one), and neighbours
    merge, the pair that was learnt first before all others. Raises UserError for a file that asks for anything else."""

    def __init__(self, folder):
        spec = read_json(path := Path(folder) / "tokenizer.json")
        with reading(path, "this tokenizer"):
            model, added = spec["model"], spec.get("added_tokens") or []
            self.vocab = model["vocab"]
            merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
            # (left id, right id) -> (rank, merged id)
            self.merges = {(self.vocab[a], self.vocab[b]): (rank, self.vocab[a + b]) for rank, (a, b) in enumerate(merges)}
            self.bytes = [self.vocab[f"<0x{byte:02X}>"] for byte in range(256)]
            self.added = {token["content"]: token["id"] for token in added}
            self.bos, split = self.added["<bos>"], spec.get("pre_tokenizer") or {"type": None}
            checks = {"model": model["type"] == "BPE", "pre_tokenizer": split["type"] is None or (split["type"], split.get("pattern")) == (
                "Split", {"String": " "}),  # splitting at spaces does nothing: the normalizer leaves none
                "normalizer": spec["normalizer"] == {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
                "ids": all(type(i) is int and 0 <= i < 2**31 for i in [*self.vocab.values(), *self.added.values()])}
            wrong = [key for key, fine in checks.items() if not fine]
            wrong += [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges") if model.get(key)]
            wrong += [f"added token {token['content']!r}" for token in added
                      if not isinstance(token["content"], str) or any(map(token.get, ("lstrip", "rstrip", "single_word", "normalized")))]
            if wrong:
                raise ValueError(f"not of Gemma's kind: {', '.join(wrong)}")
        self.pattern = re.compile(f"({'|'.join(map(re.escape, sorted(filter(None, self.added), key=len, reverse=True)))})")  # longest first

    def encode(self, text):
        """text -> [<bos>, ...] token ids."""
        ids = [self.bos]
        for i, part in enumerate(self.pattern.split(text)):
            ids += [self.added[part]] if i % 2 else self._merge(part.replace(" ", "\u2581"))
        return ids

    def _merge(self, text):
        ids = []
        for character in text:
            known = self.vocab.get(character)
            ids += [self.bytes[byte] for byte in character.encode("utf-8", "replace")] if known is None else [known]
        # a linked list of tokens, and a heap of the possible merges; one that another has overtaken is skipped
        before, after, heap = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1)), []

        def consider(left, right):
            if left >= 0 and right < len(ids) and (ids[left], ids[right]) in self.merges:
                rank, merged = self.merges[ids[left], ids[right]]
                heapq.heappush(heap, (rank, left, merged))
        for i in range(len(ids) - 1):
            consider(i, i + 1)
        while heap:
            _, i, merged = heapq.heappop(heap)
            j = after[i]
            if ids[i] is None or j == len(ids) or self.merges.get((ids[i], ids[j]), (0, None))[1] != merged:
                continue
            ids[i], ids[j], after[i] = merged, None, after[j]
            if after[i] < len(ids):
                before[after[i]] = i
            consider(before[i], i), consider(i, after[i])
        return [token for token in ids if token is not None]


GEMMA_DEFAULTS = dict(vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
                      num_key_value_heads=4, head_dim=256, rms_norm_eps=1e-6, query_pre_attn_scalar=256.0,
                      attn_logit_softcapping=50.0, sliding_window=4096, rope_theta=10000.0)
GEMMA_BUILT = {"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,), "rope_type": ("default",),
               "use_bidirectional_attention": (None, False)}


class GemmaNorm(nn.Module):
    """RMS norm. The weight is stored as its distance from 1, and multiplied in fp32 before the cast back to bf16."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), self.eps).type_as(x)


class GemmaLayer(nn.Module):
    """Attention and feed-forward, each between two norms."""

    def __init__(self, c):
        super().__init__()
        self.c, dim, hidden, eps = c, c["hidden_size"], c["intermediate_size"], c["rms_norm_eps"]
        queries, keys = (c[name] * c["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
        self.self_attn = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in {
            "q_proj": (dim, queries), "k_proj": (dim, keys), "v_proj": (dim, keys), "o_proj": (queries, dim)}.items()})
        self.mlp = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in {
            "gate_proj": (dim, hidden), "up_proj": (dim, hidden), "down_proj": (hidden, dim)}.items()})
        self.input_layernorm, self.post_attention_layernorm = GemmaNorm(dim, eps), GemmaNorm(dim, eps)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = GemmaNorm(dim, eps), GemmaNorm(dim, eps)

    def forward(self, x, cos, sin, allowed):                                # [B, L, D], 2 * [L, d], [B, 1, L, L]
        def rotate(t):  # by position: the halves of each head are the two coordinates (RoFormer, arXiv 2104.09864)
            a, b = t.chunk(2, dim=3)
            return t * cos + torch.cat([-b, a], 3) * sin
        normed = self.input_layernorm(x)
        q, k, v = (self.self_attn[name](normed).unflatten(2, (-1, self.c["head_dim"])).transpose(1, 2)
                   for name in ("q_proj", "k_proj", "v_proj"))              # [B, h, L, d], keys and values of fewer h
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        logits = q @ k.transpose(2, 3) * self.c["query_pre_attn_scalar"] ** -0.5
        if cap := self.c["attn_logit_softcapping"]:
            logits = torch.tanh(logits / cap) * cap
        weights = logits.masked_fill(~allowed, -math.inf).softmax(3, dtype=torch.float32).to(q.dtype)
        x = x + self.post_attention_layernorm(self.self_attn["o_proj"]((weights @ v).transpose(1, 2).flatten(2)))
        normed = self.pre_feedforward_layernorm(x)
        gate = F.gelu(self.mlp["gate_proj"](normed), approximate="tanh")
        return x + self.post_feedforward_layernorm(self.mlp["down_proj"](gate * self.mlp["up_proj"](normed)))


class Gemma2(Pretrained):
    """The body of the Gemma-2 language model (arXiv 2408.00118), whose last hidden state is SANA's text embedding."""
    CLASS, PREFIX = "Gemma2", "model."  # some files were saved with the language-model head's wrapper around the body

    def __init__(self, config):
        super().__init__()
        config = (config.get("rope_parameters") or {}) | config
        # the other keys of its config are about generating and saving
        self.c = c = read_config("Gemma", {k: v for k, v in config.items() if k in GEMMA_DEFAULTS | GEMMA_BUILT},
                                 GEMMA_DEFAULTS, built=GEMMA_BUILT)
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList([GemmaLayer(c) for _ in range(c["num_hidden_layers"])])
        self.norm = GemmaNorm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, ids, mask):
        """ids, mask (True = a real token) [B, L], padded on the right -> [B, L, D]. Raises UserError beyond the sliding
        window, which every second layer would have."""
        length = ids.shape[1]
        if length > self.c["sliding_window"]:
            raise UserError(f"a prompt of {length} tokens; at most {self.c['sliding_window']}")
        x = self.embed_tokens(ids)
        x = x * torch.tensor(self.c["hidden_size"] ** 0.5, dtype=x.dtype)   # rounded to bf16 first, as it was trained
        half = self.c["head_dim"] // 2
        frequency = self.c["rope_theta"] ** -(torch.arange(half, device=x.device).float() / half)
        angle = torch.arange(length, device=x.device)[:, None] * frequency.repeat(2)  # [L, d]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        allowed = torch.ones(length, length, dtype=torch.bool, device=x.device).tril() & mask.bool()[:, None, None]
        for layer in self.layers:
            x = layer(x, cos, sin, allowed)                                 # [B, L, D]
        return self.norm(x)


# What SANA's prompts were preceded by in its training, word for word (the text is the model authors').
INSTRUCTION = """\
Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image generation. Evaluate the level of detail in the user prompt:
- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial relationships to create vivid and concrete scenes.
- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.
Here are examples of how to transform or refine prompts:
- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.
- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.
Please generate only the enhanced description for the prompt below and avoid including any additional commentary or evaluations:
User Prompt: """


@torch.no_grad()
def encode_prompts(tokenizer, gemma, prompts, batch_size=8, length=300):
    """SANA's text conditioning -> for each prompt a [L, D] of L <= length tokens. A prompt follows the instruction, of
    whose tokens only the first and the last are kept; the empty one, for guidance and dropout, stands alone. Nothing
    is padded up to length: cross-attention gives padding a weight of exactly 0."""
    head, device, rows = len(tokenizer.encode(INSTRUCTION)), gemma.norm.weight.device, []
    for start in tqdm(range(0, len(prompts), batch_size), unit="batch", desc="prompts", disable=len(prompts) <= batch_size):
        batch = [prompt.lower().strip() for prompt in prompts[start:start + batch_size]]
        ids = [tokenizer.encode(INSTRUCTION + prompt if prompt else "") for prompt in batch]
        if max(map(max, ids)) >= gemma.c["vocab_size"]:
            raise UserError(f"tokenizer.json numbers tokens beyond the {gemma.c['vocab_size']} that the text encoder knows")
        for prompt, row in zip(batch, ids):
            if len(row) > head + length - 2:
                print(f"the prompt {prompt[:40]!r}... is cut to {length - 2} tokens", file=sys.stderr)
        padded, mask = pad_text([torch.tensor(row[:head + length - 2], device=device) for row in ids])
        for prompt, count, states in zip(batch, mask.sum(1), gemma(padded, mask).cpu()):
            rows.append(torch.cat([states[:1], states[head - 1:count]]) if prompt else states[:count])
    return rows


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints of train.py, and export.

def load_restorer(path, weights="ema"):
    """-> (Restorer, "model" of the checkpoint's config.json). Raises UserError for anything that does not fit."""
    folder = find_checkpoint(path)
    config = read_json(folder / "config.json")
    with reading(folder / "config.json", "this restorer"), torch.device("meta"):
        restorer = build_restorer(config["model"])
    return load_weights(restorer, folder / f"{weights}.safetensors").eval(), config["model"]


def starting_point(name, config, generator):
    """The Restorer that training begins with. name: --model; config: "model" of config.json, which describe_model made of it."""
    if is_run(name):
        restorer, _ = load_restorer(name)
        return restorer if restorer.conditioning == config["conditioning"] else Restorer(
            restorer.sana, config["conditioning"], config["prediction"], restorer.shift)
    if config["autoencoder"]:
        restorer = build_restorer(config)
        restorer.sana.initialize(generator)
        return restorer
    sana = Sana.from_pretrained(find_model(config["name"]) / "transformer", torch.float32)
    return Restorer(sana, config["conditioning"], config["prediction"], config["shift"])


def export(path, out, weights="ema"):
    """Write a trained restorer as diffusers' SanaTransformer2DModel reads it: in_channels = 2C, the latent and then the
    condition. The projection P in front of the patch embedding W is one linear map with it: W(Px) = (WP)x."""
    restorer, _ = load_restorer(path, weights)
    tensors, sana = restorer.sana.state_dict(), restorer.sana.config
    if restorer.conditioning == "projection":
        w, p = tensors["patch_embed.proj.weight"], restorer.projection.weight[:, :, 0, 0].detach()
        tensors["patch_embed.proj.weight"] = torch.einsum("dcyx,ck->dkyx", w.double(), p.double()).to(w.dtype)
    about, out = {"_class_name": Sana.CLASS, "_prediction": restorer.prediction}, make_folder(out)
    if (out / "config.json").exists():
        raise UserError(f"{out} holds a model already; choose another folder")
    save_weights(tensors, out / "diffusion_pytorch_model.safetensors")
    write_text(out / "config.json", json.dumps(about | sana | {"in_channels": 2 * sana["out_channels"]}, indent=1))
    print(f"{out}: {sum(t.numel() for t in tensors.values()) / 1e6:.2f} M parameters, in_channels {2 * sana['out_channels']}")


def main():
    parser = Parser(__doc__)
    parser.add_argument("command", choices=["export"])
    parser.add_argument("checkpoint", help="run folder of train.py, or one of its step folders")
    parser.add_argument("out", help="folder to write: config.json and diffusion_pytorch_model.safetensors")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema", help="the averaged weights, or the last ones")
    args = parser.parse_args()
    export(args.checkpoint, args.out, args.weights)


if __name__ == "__main__":
    run_script(main)
