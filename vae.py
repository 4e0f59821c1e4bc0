"""Autoencoders: pixels [B, 3, H, W] in [-1, 1] <-> latents [B, C, H/f, W/f] of about unit variance.

DCAE is SANA's (DC-AE, arXiv 2410.10733), PixelAE the lossless one of the tiny preset. Both have encode, decode, factor
f, channels C, and accept any H, W: encode mirrors the picture to the next multiple of f; crop what decode returns.
Between them: how the weights of all networks of this project are read, from a folder or from the hub.
"""
import json
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from degrade import UserError, whole_file


class PixelAE:
    """Loses nothing: each factor x factor block of pixels becomes one latent position of 3 * factor^2 channels, times 2
    (photographs have a standard deviation of about 0.5)."""

    def __init__(self, factor):
        self.factor, self.channels = factor, 3 * factor**2

    def encode(self, pixels):
        """[B, 3, H, W] -> [B, 3f^2, H/f, W/f]."""
        return F.pixel_unshuffle(pad_to_multiple(pixels, self.factor), self.factor) * 2

    def decode(self, latents):
        """[B, 3f^2, H, W] -> [B, 3, fH, fW]."""
        return F.pixel_shuffle(latents / 2, self.factor)


# ----------------------------------------------------------------------------------------------------------------
# Weight files. A checkpoint folder in the hub's layout is config.json beside safetensors, one file or several shards.


def read_config(what, config, defaults, ignored=(), built={}):
    """config with defaults for what it leaves out. Raises UserError for keys that are neither in defaults nor ignored,
    and for values of the keys of built that are not among those it lists."""
    known = {*defaults, *built, *ignored}
    wrong = [k for k in config if k not in known and k[0] != "_"]
    wrong += [k for k, values in built.items() if config.get(k, values[0]) not in values]
    if wrong:
        raise UserError(f"{what} config: {', '.join(f'{k}={config[k]!r}' for k in wrong)} is not supported")
    return defaults | {k: v for k, v in config.items() if k in defaults}


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


class Pretrained(nn.Module):
    """A network that is read from a checkpoint folder. CLASS: what its config.json says it is; PREFIX: of tensor names."""
    CLASS, PREFIX = None, ""

    @classmethod
    def from_pretrained(cls, folder, dtype=None):
        """The network of folder/config.json with the weights of folder, in dtype (None: as stored). Built without memory,
        then filled with tensors that are mapped from the file: a page is read when it is first used. Raises UserError."""
        config = read_json(Path(folder) / "config.json")
        found = config.get("_class_name") or (config.get("architectures") or ["nameless class"])[0]
        if not found.startswith(cls.CLASS):
            raise UserError(f"{folder}/config.json describes a {found}; a {cls.CLASS} is needed here")
        try:
            with torch.device("meta"):
                module = cls(config)
        except UserError:
            raise
        except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
            raise UserError(f"{folder}/config.json does not describe a {cls.CLASS}: {error!r}") from None
        return load_weights(module, *weight_files(folder), dtype=dtype).eval()


def weight_files(folder):
    """The safetensors of a checkpoint folder: one file, or the shards of an index; the bf16 variant if there is one."""
    for variant in (".bf16", ""):
        for stem in ("diffusion_pytorch_model", "model"):
            single, index = (Path(folder) / f"{stem}{end}" for end in (
                f"{variant}.safetensors", f".safetensors.index{variant}.json"))
            if index.is_file():
                shards = set(read_json(index).get("weight_map", {}).values())
                if not shards or any(Path(shard).name != shard for shard in shards):
                    raise UserError(f"{index}: names no shards, or shards outside its folder")
                return [index.parent / shard for shard in sorted(shards)]
            if single.is_file():
                return [single]
    raise UserError(f"{folder}: no diffusion_pytorch_model.safetensors or model.safetensors here")


def load_weights(module, *paths, dtype=None):
    """Fill module from safetensors files. Raises UserError that names the first tensor which is missing, left over or
    of another shape; nothing is filled then."""
    found = {}
    for path in paths:
        try:
            found |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot read these weights: {error}") from None
    where, expected = paths[0] if len(paths) == 1 else Path(paths[0]).parent, module.state_dict()
    found = {name.removeprefix(getattr(module, "PREFIX", "")): tensor for name, tensor in found.items()}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            raise UserError(f"{where}: {'missing' if name not in found else 'unexpected'} tensor {name}")
        if found[name].shape != expected[name].shape:
            raise UserError(f"{where}: {name} has shape {list(found[name].shape)}, expected {list(expected[name].shape)}")
    if dtype:
        found = {name: t.to(dtype) if t.is_floating_point() else t for name, t in found.items()}
    # onto a module without memory the mapped tensors themselves are put; into any other they are copied
    module.load_state_dict(found, assign=next(module.parameters()).is_meta)
    return module


def save_weights(tensors, path):
    """Write {name: tensor} to a safetensors file. Raises UserError."""
    with whole_file(path) as partial:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, for one
            raise OSError(error) from None


HUB = {name: f"Efficient-Large-Model/{repository}_diffusers" for name, repository in {
    "sana1.5-1.6b": "SANA1.5_1.6B_1024px", "sana1.5-4.8b": "SANA1.5_4.8B_1024px", "sana-0.6b-512": "Sana_600M_512px",
    "sana-1.6b-512": "Sana_1600M_512px", "sana-1.6b": "Sana_1600M_1024px_BF16"}.items()}


def find_model(name):
    """The folder of a pretrained model with transformer/, vae/, text_encoder/ and tokenizer/ in it: a path, a short name of
    HUB, or a hub id (owner/name). From the hub comes only what is needed and not in its cache yet. Raises UserError."""
    if os.path.isdir(name):
        return Path(name)
    repository = HUB.get(name, name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"--model {name}: no such folder; or give tiny, {', '.join(HUB)}, or a hub id such as owner/name")
    from huggingface_hub import HfApi, constants, snapshot_download  # half a second to import: only who downloads waits
    online = not constants.HF_HUB_OFFLINE
    try:
        if online:  # asked before the hub's client, which would try for 23 seconds
            urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=8).close()
    except urllib.error.HTTPError:
        pass  # an answer is an answer
    except (OSError, ValueError):
        online = False
    try:
        if not online:  # the folder alone; load_pretrained names what may be missing in it
            return Path(snapshot_download(repository, allow_patterns="transformer/config.json", local_files_only=True))
        files = [file.rfilename for file in HfApi().model_info(repository, timeout=10).siblings]
        return Path(snapshot_download(repository, allow_patterns=needed_files(files)))
    except Exception as error:  # the hub's client has its own errors for each, and passes on those of its HTTP library
        reason = str(error).strip().split("\n")[0] if online else f"no answer from {constants.ENDPOINT}, and not in the cache"
        raise UserError(f"--model {name}: {reason or type(error).__name__}. Download it elsewhere and give its folder, or take "
                        "--model tiny, which needs no download") from None


def needed_files(names):
    """Of the files of a hub repository those that this project reads: the bf16 weights where there are two sorts."""
    chosen = [n for n in names if n.endswith("/config.json") or n == "tokenizer/tokenizer.json"]
    for part in ("transformer/", "vae/", "text_encoder/"):
        weights = [n for n in names if n.startswith(part) and (n.endswith(".safetensors") or ".safetensors.index" in n)]
        chosen += [n for n in weights if ".bf16" in n] or [n for n in weights if ".fp16" not in n]
    return chosen


# ----------------------------------------------------------------------------------------------------------------
# DC-AE. Module and parameter names are those of diffusers' AutoencoderDC.

DCAE_DEFAULTS = dict(  # what a missing key of config.json means; one value of a list of types stands for all stages
    in_channels=3, latent_channels=32, attention_head_dim=32, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
    encoder_block_out_channels=(128, 256, 512, 512, 1024, 1024), decoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
    encoder_layers_per_block=(2, 2, 2, 3, 3, 3), decoder_layers_per_block=(3, 3, 3, 3, 3, 3),
    encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)), decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
    downsample_block_type="pixel_unshuffle", upsample_block_type="pixel_shuffle", decoder_norm_types="rms_norm",
    decoder_act_fns="silu", encoder_out_shortcut=True, decoder_in_shortcut=True, decoder_conv_act_fn="relu", scaling_factor=1.0)
ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "relu6": F.relu6}


class RMSNorm2d(nn.Module):
    """Each position of [B, C, H, W] divided by the root mean square of its channels, then weight and bias."""

    def __init__(self, dim):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-5)  # in bf16, all of this in fp32
        return (x * scale * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def make_norm(kind, dim):
    return RMSNorm2d(dim) if kind == "rms_norm" else nn.BatchNorm2d(dim)


class ResBlock(nn.Module):
    def __init__(self, dim, norm, activation):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm, self.activation = make_norm(norm, dim), ACTIVATIONS[activation]

    def forward(self, x):
        return x + self.norm(self.conv2(self.activation(self.conv1(x))))


class MultiscaleProjection(nn.Module):
    """q, k and v as seen through a k x k window: depthwise convolution, then a 1x1 convolution within each head."""

    def __init__(self, channels, heads, kernel):
        super().__init__()
        self.proj_in = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.proj_out = nn.Conv2d(channels, channels, 1, groups=3 * heads, bias=False)

    def forward(self, x):
        return self.proj_out(self.proj_in(x))


class MultiscaleAttention(nn.Module):
    """ReLU linear attention (model.LinearAttention explains it) at several scales (EfficientViT, arXiv 2205.14756)."""

    def __init__(self, dim, head_dim, kernels, norm):
        super().__init__()
        self.head_dim, inner = head_dim, dim // head_dim * head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.to_qkv_multiscale = nn.ModuleList([MultiscaleProjection(3 * inner, dim // head_dim, k) for k in kernels])
        self.to_out = nn.Linear(inner * (1 + len(kernels)), dim, bias=False)
        self.norm_out = make_norm(norm, dim)

    def forward(self, x):                                                   # [B, D, H, W]
        grid, tokens = x.shape[2:], x.flatten(2).transpose(1, 2)            # [B, N, D]
        qkv = torch.cat([self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)], 2)
        qkv = qkv.transpose(1, 2).unflatten(2, grid)                        # [B, 3*D, H, W]
        qkv = torch.cat([qkv] + [project(qkv) for project in self.to_qkv_multiscale], 1)
        # fp32: the sums run over N terms. Heads are runs of 3*d channels, whatever they were before: so it was trained
        q, k, v = qkv.float().flatten(2).unflatten(1, (-1, 3 * self.head_dim)).chunk(3, dim=2)  # [B, h, d, N]
        q, k = F.relu(q), F.relu(k)
        out = (v @ k.transpose(2, 3)) @ q                                   # [B, h, d, N]
        out = out / (k.sum(3).unsqueeze(2) @ q + 1e-15)                     # [B, h, d, N]
        out = self.to_out(out.flatten(1, 2).transpose(1, 2).to(x.dtype))    # [B, N, D]
        return x + self.norm_out(out.transpose(1, 2).unflatten(2, grid))    # [B, D, H, W]


class GLUMBConv(nn.Module):
    """The gated feed-forward part of DC-AE and of SANA (Mix-FFN in its section 2.2; the class name is the checkpoint's): 1x1
    convolution, 3x3 depthwise convolution, gate, 1x1 convolution. The 3x3 is the transformer's only sense of place.
    Tokens stay [B, N, C], which is the channels-last image: the 1x1 convolutions are then plain matrix products and
    the depthwise one needs no copy."""

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


class EfficientViTBlock(nn.Module):
    def __init__(self, dim, head_dim, kernels, norm):
        super().__init__()
        self.attn = MultiscaleAttention(dim, head_dim, kernels, norm)
        self.conv_out = GLUMBConv(dim, 4)
        self.conv_out.norm = RMSNorm2d(dim)

    def forward(self, x):                                                   # [B, D, H, W]
        x = self.attn(x)
        tokens = self.conv_out(x.flatten(2).transpose(1, 2), x.shape[2:])   # [B, N, D]
        return x + self.conv_out.norm(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


class Down(nn.Module):
    """Half the side: a strided convolution, or one followed by pixel_unshuffle; beside it the shortcut that gives DC-AE
    its trainability: pixel_unshuffle, then the mean over groups of channels (section 3.2)."""

    def __init__(self, dim, dim_out, kind, shortcut=True):
        super().__init__()
        self.unshuffle, self.shortcut, self.dim_out = kind == "pixel_unshuffle", shortcut, dim_out
        self.conv = nn.Conv2d(dim, dim_out // 4 if self.unshuffle else dim_out, 3, 1 if self.unshuffle else 2, padding=1)

    def forward(self, x):                                                   # [B, D, H, W]
        y = F.pixel_unshuffle(self.conv(x), 2) if self.unshuffle else self.conv(x)
        return y + F.pixel_unshuffle(x, 2).unflatten(1, (self.dim_out, -1)).mean(2) if self.shortcut else y


class Up(nn.Module):
    """Twice the side; the shortcut, the inverse of Down's, repeats channels and shuffles them into pixels."""

    def __init__(self, dim, dim_out, kind, shortcut=True):
        super().__init__()
        self.interpolate, self.shortcut, self.repeats = kind == "interpolate", shortcut, dim_out * 4 // dim
        self.conv = nn.Conv2d(dim, dim_out if self.interpolate else dim_out * 4, 3, padding=1)

    def forward(self, x):                                                   # [B, D, H, W]
        y = self.conv(F.interpolate(x, scale_factor=2)) if self.interpolate else F.pixel_shuffle(self.conv(x), 2)
        return y + F.pixel_shuffle(x.repeat_interleave(self.repeats, dim=1), 2) if self.shortcut else y


def stages(c, side):
    """For each stage of one side ("encoder" or "decoder") of a config: (index, width, [blocks])."""
    widths, counts = c[f"{side}_block_out_channels"], c[f"{side}_layers_per_block"]

    def each(value):
        return [value] * len(widths) if isinstance(value, str) else value
    norms, acts = (each(c[f"{side}_{key}"] if side == "decoder" else default)
                   for key, default in (("norm_types", "rms_norm"), ("act_fns", "silu")))
    kinds = each(c[f"{side}_block_types"])
    if not set(kinds) <= {"ResBlock", "EfficientViTBlock"} or not set(norms) <= {"rms_norm", "batch_norm"}:
        raise UserError(f"DC-AE config: blocks {kinds} with norms {norms} are not supported")
    for i, (width, count) in enumerate(zip(widths, counts)):
        yield i, width, [ResBlock(width, norms[i], acts[i]) if kinds[i] == "ResBlock" else EfficientViTBlock(
            width, c["attention_head_dim"], c[f"{side}_qkv_multiscales"][i], norms[i]) for _ in range(count)]


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        widths, kind, latent = c["encoder_block_out_channels"], c["downsample_block_type"], c["latent_channels"]
        full = c["encoder_layers_per_block"][0] > 0  # does the first stage work at full resolution, or is it skipped?
        self.conv_in = (nn.Conv2d(c["in_channels"], widths[0], 3, padding=1) if full
                        else Down(c["in_channels"], widths[1], kind, shortcut=False))
        self.down_blocks = nn.ModuleList()
        for i, width, blocks in stages(c, "encoder"):
            self.down_blocks.append(nn.Sequential(
                *blocks, *([Down(width, widths[i + 1], kind)] if blocks and i + 1 < len(widths) else [])))
        self.conv_out = nn.Conv2d(widths[-1], latent, 3, padding=1)
        self.shortcut = latent if c["encoder_out_shortcut"] else None

    def forward(self, x):
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        return self.conv_out(x) + x.unflatten(1, (self.shortcut, -1)).mean(2) if self.shortcut else self.conv_out(x)


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        widths, kind, latent = c["decoder_block_out_channels"], c["upsample_block_type"], c["latent_channels"]
        self.conv_in = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.repeats = widths[-1] // latent if c["decoder_in_shortcut"] else None
        self.up_blocks = nn.ModuleList()
        for i, width, blocks in stages(c, "decoder"):
            self.up_blocks.append(nn.Sequential(
                *([Up(widths[i + 1], width, kind)] if blocks and i + 1 < len(widths) else []), *blocks))
        full = c["decoder_layers_per_block"][0] > 0
        last = widths[0] if full else widths[1]
        self.norm_out, self.activation = RMSNorm2d(last), ACTIVATIONS[c["decoder_conv_act_fn"]]
        self.conv_out = (nn.Conv2d(last, c["in_channels"], 3, padding=1) if full
                         else Up(last, c["in_channels"], kind, shortcut=False))

    def forward(self, z):
        x = self.conv_in(z)
        if self.repeats:
            x = x + z.repeat_interleave(self.repeats, dim=1)
        for stage in reversed(self.up_blocks):
            x = stage(x)
        return self.conv_out(self.activation(self.norm_out(x)))


class DCAE(Pretrained):
    """The 32x autoencoder (64x and 128x by config). config: the keys of the checkpoint's vae/config.json.

    Pictures above UNTILED pixels go through in overlapping tiles that are blended linearly, so that memory stays bounded.
    Raises ValueError for a config that this file does not build.
    """
    CLASS = "AutoencoderDC"
    UNTILED, TILE, OVERLAP = 1024, 768, 256  # pixels

    def __init__(self, config):
        super().__init__()
        c = read_config("DC-AE", config, DCAE_DEFAULTS)
        self.encoder, self.decoder, self.scaling = Encoder(c), Decoder(c), c["scaling_factor"]
        self.factor, self.channels = 2 ** (len(c["encoder_block_out_channels"]) - 1), c["latent_channels"]

    @torch.no_grad()
    def encode(self, pixels):
        """[B, 3, H, W] in [-1, 1] -> [B, C, H/f, W/f], scaled, fp32. Deterministic: DC-AE has no latent distribution."""
        x = pad_to_multiple(pixels, self.factor).to(self.encoder.conv_out.weight.dtype)
        return self._tiled(self.encoder, x, 1 / self.factor, self.factor).float() * self.scaling

    @torch.no_grad()
    def decode(self, latents):
        """[B, C, H, W], scaled -> pixels [B, 3, fH, fW], fp32."""
        z = (latents / self.scaling).to(self.decoder.conv_in.weight.dtype)
        return self._tiled(self.decoder, z, self.factor, 1).float()

    def _tiled(self, network, x, scale, unit):
        """unit: input positions per latent position."""
        pixels = self.factor // unit  # per input position
        if max(x.shape[2:]) * pixels <= self.UNTILED:
            return network(x)
        return in_tiles(lambda at: network(x[at]), x.shape[2:], self.TILE // pixels, self.OVERLAP // pixels, scale)


# ----------------------------------------------------------------------------------------------------------------
# Any size.

def pad_to_multiple(pixels, multiple):
    """Extend [B, C, H, W] right and down by mirroring (without repeating the edge, again and again if the image is
    smaller than the padding) to sides that are multiples. Crop with [..., :H, :W] to undo."""
    for dim in (2, 3):
        n = pixels.shape[dim]
        if n % multiple:
            mirror = torch.arange(-(-n // multiple) * multiple, device=pixels.device) % max(1, 2 * (n - 1))
            pixels = pixels.index_select(dim, torch.where(mirror < n, mirror, 2 * (n - 1) - mirror))
    return pixels


def in_tiles(function, size, tile, overlap, scale=1):
    """Compute a large picture in overlapping tiles, blended linearly over their overlaps.

    function(at) -> [B, C, h, w], the output for the part `at` of the input, a (..., rows, columns) index.
    size: (H, W) of the input; tile, overlap: in input positions; scale: output positions per input position.
    """
    total = weights = None
    for top in tile_starts(size[0], tile, overlap):
        for left in tile_starts(size[1], tile, overlap):
            part = function((..., slice(top, top + tile), slice(left, left + tile)))
            if total is None:
                shape = [round(side * scale) for side in size]
                total, weights = part.new_zeros(*part.shape[:2], *shape), part.new_zeros(shape)
            height, width = part.shape[2:]
            y, x = round(top * scale), round(left * scale)
            weight = ramp(height, overlap * scale).to(part)[:, None] * ramp(width, overlap * scale).to(part)
            total[..., y:y + height, x:x + width] += weight * part
            weights[y:y + height, x:x + width] += weight
    return total.div_(weights)


def tile_starts(length, tile, overlap):
    """Where tiles that overlap by at least overlap begin, the last one ending at length."""
    return [0] if length <= tile else [*range(0, length - tile, tile - overlap), length - tile]


def ramp(length, overlap):
    """Weights that rise over the overlap from either end, to blend neighbouring tiles."""
    i = torch.arange(length)
    return torch.minimum(i + 1, length - i).clamp(max=overlap) / overlap
