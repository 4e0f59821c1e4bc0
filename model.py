"""SANA, the flow-matching linear-attention transformer, and what turns it into an image restorer.

Papers: SANA (arXiv 2410.10629), SANA 1.5 (2501.18427), flow matching / rectified flow (2210.02747, 2209.03003).

Letters used in the shape comments:
    B batch    C latent channels    H, W latent grid    N = H*W image tokens    D width    h heads    d = D/h
    L caption tokens (padded to the longest of the batch)

The convention of sigma, the one that SANA's checkpoints were trained with, everywhere in this project:
sigma in [0, 1] is the NOISE fraction. x_sigma = (1 - sigma) * x0 + sigma * noise, so sigma = 1 is pure noise,
and the velocity is dx/dsigma = noise - x0. (Some texts name the clean fraction sigma: the same straight path
walked the other way. Mixing the two trains against the pretrained weights.)
"""
import hashlib
import math

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

# ----------------------------------------------------------------------------------------------------------------
# The transformer. Module and parameter names are those of the diffusers checkpoints, so weights load by name.

SANA_DEFAULTS = dict(  # what a missing key of config.json means, as diffusers has it
    in_channels=32, out_channels=32, num_attention_heads=70, attention_head_dim=32, num_layers=20,
    num_cross_attention_heads=20, cross_attention_head_dim=112, cross_attention_dim=2240, caption_channels=2304,
    mlp_ratio=2.5, attention_bias=False, patch_size=1, norm_eps=1e-6, qk_norm=None)
# keys that do not change the network, and values of others that this file does not build
SANA_IGNORED = {"sample_size", "dropout", "guidance_embeds_scale"}
SANA_REFUSED = {"guidance_embeds": (False,), "interpolation_scale": (None,), "timestep_scale": (1.0,),
                "norm_elementwise_affine": (False,), "qk_norm": (None, "rms_norm_across_heads"), "patch_size": (1,)}


class LinearAttention(nn.Module):
    """ReLU linear attention (SANA, section 2.2): softmax(QK^T)V becomes relu(Q)(relu(K)^T V), whose cost grows
    with N instead of N^2, because the sum over all tokens, relu(K)^T V, is one d x d matrix per head."""

    def __init__(self, dim, heads, bias, qk_norm):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(dim, dim, bias=bias)
        self.to_v = nn.Linear(dim, dim, bias=bias)
        self.norm_q = nn.RMSNorm(dim, eps=1e-5) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(dim, eps=1e-5) if qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x):                                                   # [B, N, D]
        def split(t):                                                       # fp32: the sums run over N terms
            return t.float().unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, h, N, d]
        q = split(F.relu(self.norm_q(self.to_q(x))))                        # [B, h, N, d]
        k = split(F.relu(self.norm_k(self.to_k(x))))                        # [B, h, N, d]
        v = split(self.to_v(x))                                             # [B, h, N, d]
        summary = k.transpose(2, 3) @ v                                     # [B, h, d, d]
        total = k.sum(2).unsqueeze(3)                                       # [B, h, d, 1]
        out = (q @ summary) / (q @ total + 1e-15)                           # [B, h, N, d]
        return self.to_out[0](out.transpose(1, 2).flatten(2).to(x.dtype))   # [B, N, D]


class CrossAttention(nn.Module):
    """Softmax attention from image tokens to caption tokens."""

    def __init__(self, dim, text_dim, heads, head_dim, qk_norm):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.to_q = nn.Linear(dim, inner)
        self.to_k = nn.Linear(text_dim, inner)
        self.to_v = nn.Linear(text_dim, inner)
        self.norm_q = nn.RMSNorm(inner, eps=1e-5) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(inner, eps=1e-5) if qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])

    def forward(self, x, text, text_mask):                                  # [B, N, D], [B, L, D], [B, L] or None
        def split(t):
            return t.unflatten(2, (self.heads, -1)).transpose(1, 2)
        q = split(self.norm_q(self.to_q(x)))                                # [B, h, N, d]
        k = split(self.norm_k(self.to_k(text)))                             # [B, h, L, d]
        v = split(self.to_v(text))                                          # [B, h, L, d]
        mask = None if text_mask is None else text_mask[:, None, None, :]   # [B, 1, 1, L], True = attend
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)       # [B, h, N, d]
        return self.to_out[0](out.transpose(1, 2).flatten(2))               # [B, N, D]


class GLUMBConv(nn.Module):
    """The gated feed-forward part, Mix-FFN in SANA's section 2.2 (the class name is the checkpoint's): 1x1 convolution,
    3x3 depthwise convolution, gate, 1x1 convolution. The 3x3 is the transformer's only sense of place. Tokens stay
    [B, N, C], which is the channels-last image: the 1x1 convolutions are then plain matrix products and the depthwise
    one needs no copy."""

    def __init__(self, dim, ratio):
        super().__init__()
        hidden = int(ratio * dim)
        self.conv_inverted = nn.Conv2d(dim, hidden * 2, 1)
        self.conv_depth = nn.Conv2d(hidden * 2, hidden * 2, 3, padding=1, groups=hidden * 2)
        self.conv_point = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x, grid):                                             # [B, N, D], (H, W)
        x = F.silu(F.linear(x, self.conv_inverted.weight.flatten(1), self.conv_inverted.bias))
        x = self.conv_depth(x.unflatten(1, grid).permute(0, 3, 1, 2))       # [B, 2*hidden, H, W]
        x, gate = x.permute(0, 2, 3, 1).flatten(1, 2).chunk(2, dim=2)       # [B, N, hidden] each
        return F.linear(x * F.silu(gate), self.conv_point.weight.flatten(1))  # [B, N, D]


class SanaBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        dim, qk_norm = c["num_attention_heads"] * c["attention_head_dim"], c["qk_norm"] is not None
        self.eps = c["norm_eps"]
        self.attn1 = LinearAttention(dim, c["num_attention_heads"], c["attention_bias"], qk_norm)
        self.attn2 = CrossAttention(dim, c["cross_attention_dim"], c["num_cross_attention_heads"],
                                    c["cross_attention_head_dim"], qk_norm)
        self.ff = GLUMBConv(dim, c["mlp_ratio"])
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim))

    def forward(self, x, modulation, text, text_mask, grid):                # [B, N, D], [B, 6, D], [B, L, D], [B, L]
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + modulation).chunk(6, dim=1)
        x = x + gate1 * self.attn1(modulate(x, shift1, scale1, self.eps))   # [B, N, D]
        x = x + self.attn2(x, text, text_mask)                              # [B, N, D]
        return x + gate2 * self.ff(modulate(x, shift2, scale2, self.eps), grid)  # [B, N, D]


def modulate(x, shift, scale, eps):
    """Adaptive layer norm (DiT, arXiv 2212.09748): x [B, N, D], shift and scale [B, 1, D]."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class PatchEmbed(nn.Module):
    def __init__(self, channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, 1)

    def forward(self, x):                                                   # [B, C, H, W]
        return self.proj(x).flatten(2).transpose(1, 2)                      # [B, N, D]


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


class Sana(nn.Module):
    """The SANA transformer: noisy latent, timestep and caption in, velocity out.

    config: the keys of the checkpoint's transformer/config.json (SANA_DEFAULTS where one is missing).
    Raises ValueError for a key or value that this file does not build.
    """

    def __init__(self, config):
        super().__init__()
        unknown = [k for k in config if k not in SANA_DEFAULTS | SANA_REFUSED and k not in SANA_IGNORED and k[0] != "_"]
        refused = [k for k, built in SANA_REFUSED.items() if config.get(k, built[0]) not in built]
        if unknown or refused:
            raise ValueError(f"SANA config: {', '.join(f'{k}={config[k]!r}' for k in unknown + refused)} is not supported")
        self.config = c = SANA_DEFAULTS | {k: v for k, v in config.items() if k in SANA_DEFAULTS}
        dim = c["num_attention_heads"] * c["attention_head_dim"]
        self.patch_embed = PatchEmbed(c["in_channels"], dim)
        self.time_embed = TimeEmbed(dim)
        self.caption_projection = MLP(c["caption_channels"], dim, lambda t: F.gelu(t, approximate="tanh"))
        self.caption_norm = nn.RMSNorm(dim, eps=1e-5)
        self.transformer_blocks = nn.ModuleList([SanaBlock(c) for _ in range(c["num_layers"])])
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim))
        self.proj_out = nn.Linear(dim, c["out_channels"])

    def forward(self, latents, timestep, text, text_mask=None):
        """latents [B, C, H, W], timestep [B] = 1000 * sigma, text [B, L, caption_channels], text_mask [B, L] (True =
        a real token; None = all are) -> velocity [B, C_out, H, W]."""
        grid = latents.shape[2:]
        x = self.patch_embed(latents)                                       # [B, N, D]
        modulation, embedding = self.time_embed(timestep)                   # [B, 6, D], [B, D]
        text = self.caption_norm(self.caption_projection(text))             # [B, L, D]
        for block in self.transformer_blocks:
            x = block(x, modulation, text, text_mask, grid)                 # [B, N, D]
        shift, scale = (self.scale_shift_table + embedding[:, None]).chunk(2, dim=1)
        x = self.proj_out(modulate(x, shift, scale, 1e-6))                  # [B, N, C_out]
        return x.transpose(1, 2).unflatten(2, grid)                         # [B, C_out, H, W]

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


class Restorer(nn.Module):
    """SANA with a second input, the latent of the degraded image (the condition).

    sana: built for C channels. conditioning: how the condition enters,
      "projection": a 1x1 convolution 2C -> C in front, identity on the noisy latent and zero on the condition, so that
                    before training the output is the text-to-image model's, bit for bit;
      "widen":      the patch embedding takes 2C channels, its new half zero: the same start without the squeeze to C.
    prediction: what the network's output means,
      "velocity": noise - x0, as SANA's weights were trained;
      "residual": x0 - condition, for networks trained from scratch whose condition is already near the answer: an
                  untrained network, answering 0, returns the input image instead of noise.
    """

    def __init__(self, sana, conditioning="projection", prediction="velocity"):
        super().__init__()
        channels = sana.config["out_channels"]
        self.sana, self.conditioning, self.prediction = sana, conditioning, prediction
        with torch.no_grad():
            if conditioning == "projection":
                self.projection = nn.Conv2d(2 * channels, channels, 1, bias=False)
                self.projection.weight.copy_(torch.eye(channels, 2 * channels)[:, :, None, None])
            elif conditioning == "widen":
                old = sana.patch_embed.proj
                sana.patch_embed = PatchEmbed(2 * channels, old.out_channels)
                sana.patch_embed.proj.weight.copy_(torch.cat([old.weight, torch.zeros_like(old.weight)], 1))
                sana.patch_embed.proj.bias.copy_(old.bias)
            else:
                raise ValueError(f"conditioning {conditioning!r}: projection or widen")
        if prediction not in ("velocity", "residual"):
            raise ValueError(f"prediction {prediction!r}: velocity or residual")

    def forward(self, latents, condition, timestep, text, text_mask=None):
        """latents, condition [B, C, H, W], timestep [B] = 1000 * sigma, text [B, L, caption_channels], text_mask
        [B, L] -> velocity [B, C, H, W]."""
        x = torch.cat([latents, condition], 1)                              # [B, 2C, H, W]
        if self.conditioning == "projection":
            # as a matrix product: a GPU may run fp32 convolutions in TF32, which would not be the identity
            x = (self.projection.weight.flatten(1) @ x.float().flatten(2)).unflatten(2, x.shape[2:]).to(latents.dtype)
        out = self.sana(x, timestep, text, text_mask)                       # [B, C, H, W]
        if self.prediction == "velocity":
            return out
        sigma = (timestep / 1000).clamp(min=MIN_SIGMA)[:, None, None, None]
        return (latents - (condition + out)) / sigma                        # v = (x_sigma - x0) / sigma


# The tiny preset: small enough to train from scratch on a laptop, on pixels instead of latents (vae.PixelAE).
PRESETS = {
    "tiny": {
        "autoencoder": {"factor": 2}, "conditioning": "widen", "prediction": "residual",
        "sana": {"in_channels": 12, "out_channels": 12, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 32,
                 "num_cross_attention_heads": 2, "cross_attention_head_dim": 32, "cross_attention_dim": 64,
                 "caption_channels": 256, "mlp_ratio": 2.5, "qk_norm": "rms_norm_across_heads"},
    },
}


def build_restorer(config):
    """A preset, or "model" of a checkpoint's config.json -> Restorer with unset weights."""
    return Restorer(Sana(config["sana"]), config["conditioning"], config["prediction"])


# ----------------------------------------------------------------------------------------------------------------
# Flow matching. The loss and the sampler are two readings of one line: x_sigma = (1 - sigma) * x0 + sigma * noise.

SHIFT = 3.0  # SANA's, for training and sampling alike


def shift_sigma(sigma, shift=SHIFT):
    """Move sigmas towards 1, as high resolutions need (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def draw_sigma(count, generator, share_at_one=0.0, shift=SHIFT):
    """[count] sigmas to train at: sigmoid of a normal draw, shifted; a share of them exactly 1, where a one-step
    restoration starts."""
    sigma = shift_sigma(torch.randn(count, generator=generator).sigmoid(), shift)
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
def sample(restorer, condition, text, text_mask, noise, steps, shift=SHIFT):
    """Euler's method along dx/dsigma = velocity from sigma = 1 (noise) to 0. One step gives x0 as predicted from pure
    noise, the mean of all clean images that fit the condition: the best PSNR. More steps settle on one of them.
    condition, noise [B, C, H, W] -> [B, C, H, W]."""
    x, sigmas = noise, shift_sigma(torch.linspace(1, 0, steps + 1), shift).tolist()
    for sigma, following in zip(sigmas, sigmas[1:]):
        timestep = torch.full((len(x),), 1000 * sigma, device=x.device)
        x = x + (following - sigma) * restorer(x, condition, timestep, text, text_mask)
    return x


# ----------------------------------------------------------------------------------------------------------------
# Text.

def hash_prompts(prompts):
    """Embeds prompts without a text encoder: each word becomes the 256 bits of its SHA-256 as -1 and 1, so words are
    nearly orthogonal, and the same on every machine. The empty word stands first, as <bos> does elsewhere.
    -> text [B, L, 256], text_mask [B, L] bool."""
    rows = []
    for prompt in prompts:
        words = [""] + "".join(c if c.isalnum() else " " for c in prompt.lower()).split()
        digests = torch.tensor([list(hashlib.sha256(word.encode()).digest()) for word in words])  # [L, 32] bytes
        rows.append((digests[:, :, None] >> torch.arange(8) & 1).flatten(1).float() * 2 - 1)      # [L, 256]
    text = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return text, torch.arange(text.shape[1]) < lengths[:, None]


# ----------------------------------------------------------------------------------------------------------------
# Weight files.

def save_weights(tensors, path):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def load_weights(module, path):
    """Fill module from a safetensors file. Raises ValueError that names the first tensor which is missing, left over
    or of another shape; nothing is filled then."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot read these weights: {error}") from None
    expected = module.state_dict()
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            raise ValueError(f"{path}: {'missing' if name not in found else 'unexpected'} tensor {name}")
        if found[name].shape != expected[name].shape:
            raise ValueError(f"{path}: {name} has shape {list(found[name].shape)}, expected {list(expected[name].shape)}")
    module.load_state_dict(found)
    return module
