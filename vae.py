"""Autoencoders: pixels [B, 3, H, W] in [-1, 1] <-> latents [B, C, H/f, W/f] of about unit variance.

DCAE is SANA's (DC-AE, arXiv 2410.10733), PixelAE the lossless one of the tiny preset. Both have encode, decode, factor
f, channels C, and accept any H, W: encode mirrors the picture to the next multiple of f; crop what decode returns.
Between them: how the weights of all networks of this project are read, from a folder or from the hub.
"""
import contextlib
import itertools
import json
import os
import re
import socket
import threading
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from degrade import UserError, reading, whole_file


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

MOST, LAYERS = 2**20, 256  # above any width or vocabulary, and any depth: a network of more would take minutes to build
OPTIONAL = ("out_channels", "interpolation_scale", "attn_logit_softcapping")  # where None means something


def read_config(what, config, defaults, ignored=(), built={}):
    """config with defaults for what it leaves out. Raises UserError for keys that are neither in defaults nor ignored,
    for values of the keys of built that are not among those it lists, and for others that are unlike their defaults."""
    known = {*defaults, *built, *ignored}
    wrong = [k for k in config if k not in known and k[:1] != "_"]
    wrong += [k for k, values in built.items() if config.get(k, values[0]) not in values]
    wrong += [k for k, default in defaults.items() if k in config and k not in built and not (
        is_like(default, config[k], LAYERS if "layers" in k else MOST) or config[k] is None and k in OPTIONAL)]
    if wrong:
        raise UserError(f"{what} config: {', '.join(f'{k}={config[k]!r}' for k in wrong)} is not supported")
    return defaults | {k: v for k, v in config.items() if k in defaults}


def is_like(default, value, most, least=1):
    """Whether value is of the type of default (or a list of texts, where that is one), and no number below least or above most."""
    if isinstance(value, (list, tuple)):
        inner = default[-1] if isinstance(default, tuple) else default
        return isinstance(default, (tuple, str)) and len(value) <= LAYERS and all(is_like(inner, v, most, 0) for v in value)
    if default is None or isinstance(default, float):
        return type(value) in (int, float) and 0 < value <= most
    return type(value) is type(default) and (isinstance(value, (str, bool)) or least <= value <= most)


def read_json(path):
    """The object that a JSON file holds. Raises UserError."""
    with reading(path, "this JSON"):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    return content


class Pretrained(nn.Module):
    """A network that is read from a checkpoint folder. CLASS: what its config.json says it is; PREFIX: of tensor names."""
    CLASS, PREFIX = None, ""

    @classmethod
    def from_config(cls, folder):
        """The network of folder/config.json on the meta device: shapes, no memory. Raises UserError."""
        config = read_json(Path(folder) / "config.json")
        found = str(config.get("_class_name") or config.get("architectures"))
        if cls.CLASS not in found:
            raise UserError(f"{folder}/config.json describes a {found}; a {cls.CLASS} is needed here")
        with reading(f"{folder}/config.json", f"this {cls.CLASS}"), torch.device("meta"):
            return cls(config)

    @classmethod
    def from_pretrained(cls, folder, dtype=None):
        """With the weights of folder, in dtype (None: as stored). The tensors are mapped from the file, not
        copied, and read once to see that they are finite. Raises UserError."""
        return load_weights(cls.from_config(folder), *weight_files(folder), dtype=dtype).eval()


def weight_files(folder):
    """The safetensors of a checkpoint folder: one file, or the shards of an index; the bf16 variant if there is one."""
    for variant in (".bf16", ""):
        for stem in ("diffusion_pytorch_model", "model"):
            single, index = (Path(folder) / f"{stem}{end}" for end in (
                f"{variant}.safetensors", f".safetensors.index{variant}.json"))
            if index.is_file():
                weight_map = read_json(index).get("weight_map")
                shards = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else ()
                if not shards or any(Path(shard).name != shard for shard in shards):
                    raise UserError(f"{index}: names no shards, or shards outside its folder")
                return [index.parent / shard for shard in sorted(shards)]
            if single.is_file():
                return [single]
    raise UserError(f"{folder}: no diffusion_pytorch_model.safetensors or model.safetensors here")


def load_weights(module, *paths, dtype=None):
    """Fill module from safetensors files. Raises UserError that names the file and the first tensor which is left over, missing, of
    another shape or type, or not finite; nothing is filled then."""
    found, expected = {}, module.state_dict()
    for path in paths:
        with reading(path, "these weights"):
            tensors = load_file(path)
        for name, tensor in tensors.items():
            name = name.removeprefix(getattr(module, "PREFIX", ""))
            if name in found or name not in expected:
                raise UserError(f"{path}: unexpected tensor {name}" + " (it is there twice)" * (name in found))
            like, is_float = expected[name], expected[name].is_floating_point()
            if tensor.shape != like.shape:
                raise UserError(f"{path}: {name} has shape {list(tensor.shape)}, expected {list(like.shape)}")
            if tensor.dtype not in ((torch.float32, torch.bfloat16, torch.float16, torch.float64) if is_float else (like.dtype,)):
                raise UserError(f"{path}: {name} is of type {tensor.dtype}, not {like.dtype}")
            if is_float and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():  # 0.15 s a GB; isfinite takes 2 s
                raise UserError(f"{path}: {name} holds values that are not finite")
            found[name] = tensor.to(dtype) if dtype and is_float else tensor
    if missing := expected.keys() - found.keys():
        raise UserError(f"{paths[0] if len(paths) == 1 else Path(paths[0]).parent}: missing tensor {min(missing)}")
    # onto a module without memory the mapped tensors themselves are put; into any other they are copied
    module.load_state_dict(found, assign=next(module.parameters()).is_meta)
    return module


def save_weights(tensors, path, **about):
    """Write {name: tensor}, and texts about them, to a safetensors file. Raises UserError."""
    with whole_file(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # as other files of this user; the library makes one that nobody else can read
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"} | about)
        except SafetensorError as error:  # a full disk, for one
            raise OSError(error) from None
        partial.chmod(mode)


def find_checkpoint(path):
    """A checkpoint folder, from its own path or from that of its run (whose file `latest` names it)."""
    path, latest = Path(path), Path(path) / "latest"
    folder = path / latest.read_text(errors="replace").strip() if latest.is_file() else path
    if not all(os.path.isfile(folder / name) for name in ("config.json", "ema.safetensors")):
        raise UserError(f"{path}: no checkpoint here; give a run folder (with the file latest) or one of its step folders")
    return folder


def read_run(path):
    """config.json of the checkpoint that path names. Raises UserError."""
    config = read_json(find_checkpoint(path) / "config.json")
    if not all(isinstance(config.get(key), kind) for key, kind in {"model": dict, "args": dict, "step": int}.items()):
        raise UserError(f"{path}: the config.json of its checkpoint is damaged; take another step folder")
    return config


def is_run(name):
    """Whether --model is a folder that train.py wrote: a run, or one of its checkpoints."""
    return (Path(name) / "latest").is_file() or (Path(name) / "ema.safetensors").is_file()


HUB = {name: f"Efficient-Large-Model/{repository}_diffusers" for name, repository in {
    "sana1.5-1.6b": "SANA1.5_1.6B_1024px", "sana1.5-4.8b": "SANA1.5_4.8B_1024px", "sana-0.6b-512": "Sana_600M_512px",
    "sana-1.6b-512": "Sana_1600M_512px", "sana-1.6b": "Sana_1600M_1024px_BF16"}.items()}
PARTS = ("transformer", "vae", "text_encoder")


def find_model(name, parts=PARTS):
    """The folder of a pretrained model, in which transformer/, vae/, text_encoder/, tokenizer/ and scheduler/ lie: a path,
    a short name of HUB, or a hub id (owner/name), of which what parts need is downloaded, unless it is in the hub's cache.
    Raises UserError."""
    if os.path.isdir(name):
        return Path(name)
    repository = HUB.get(name, name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"--model {name}: no such folder; or give tiny, {', '.join(HUB)}, or a hub id such as owner/name")
    from huggingface_hub import HfApi, constants, snapshot_download  # half a second to import: only who downloads waits
    files, problem = None, f"no answer from {constants.ENDPOINT}"
    if constants.HF_HUB_OFFLINE:
        problem = "HF_HUB_OFFLINE is set"
    elif hub_answers(constants.ENDPOINT):
        try:
            files = needed_files([file.rfilename for file in HfApi().model_info(repository, timeout=10).siblings], parts)
        except Exception as error:  # the client has its own errors for each trouble, and those of its HTTP library
            problem = error
    try:
        if files is None:  # then what the cache holds; a missing file is named when it is read
            return Path(snapshot_download(repository, allow_patterns="*/config.json", local_files_only=True))
        return Path(snapshot_download(repository, allow_patterns=files))
    except Exception as error:
        reason = " ".join(str(error if files else problem).split())[:240].rstrip(".")
        raise UserError(f"--model {name}: {reason}{'' if files else ', and it is not in the cache'}. Download it elsewhere and "
                        "give its folder, or take --model tiny, which needs no download") from None


def hub_answers(endpoint):
    """Whether it does within 8 seconds, all its addresses together; its client would try for 23."""
    def ask():
        from huggingface_hub.utils import get_session
        with contextlib.suppress(Exception):
            answers.append(get_session().head(endpoint, timeout=8))
    answers, thread = [], threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(8)
    return bool(answers)


def needed_files(names, parts=PARTS):
    """Of the files of a hub repository those that this project reads: the bf16 weights where there are two sorts."""
    chosen = [n for n in names if n.endswith(("/config.json", "/scheduler_config.json")) or n == "tokenizer/tokenizer.json"]
    for part in parts:
        weights = [n for n in names if n.startswith(f"{part}/") and (n.endswith(".safetensors") or ".safetensors.index" in n)]
        chosen += [n for n in weights if ".bf16" in n] or [n for n in weights if ".fp16" not in n]
    return chosen


PUBLISHED = {  # what it is: (where it lies, under which name it is kept). The name ends in the start of its SHA-256, which is checked.
    "alex": ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", None),
    "vgg": ("https://download.pytorch.org/models/vgg16-397923af.pth", None),
    "alex heads": ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/alex.pth", "lpips_alex-df73285e.pth"),
    "vgg heads": ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth", "lpips_vgg-a78928a0.pth"),
    "inception": ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth", None),
}


def read_published(what, path=None):
    """{name: tensor} of a published file, downloaded once into torch.hub's folder, or of a local copy. Nothing but tensors is
    unpickled. Raises OSError if it cannot be fetched, UserError for a local file that does not hold tensors."""
    before = socket.getdefaulttimeout()
    try:
        if path:
            if not os.path.isfile(path):  # opening a pipe would wait for ever
                raise FileNotFoundError("no such file")
            return dict(torch.load(path, map_location="cpu", weights_only=True))
        socket.setdefaulttimeout(20)
        url, name = PUBLISHED[what]
        return torch.hub.load_state_dict_from_url(url, file_name=name, check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # half a dozen types
        reason = (str(error) or repr(error)).splitlines()[0]
        raise (UserError(f"{path}: not the {what} weights: {reason}") if path else OSError(reason)) from None
    finally:
        socket.setdefaulttimeout(before)


# ----------------------------------------------------------------------------------------------------------------
# DC-AE. Module and parameter names are those of diffusers' AutoencoderDC.

DCAE_DEFAULTS = dict(  # what a missing key of config.json means; one value of a list of types stands for all stages
    in_channels=3, latent_channels=32, attention_head_dim=32, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
    encoder_block_out_channels=(128, 256, 512, 512, 1024, 1024), decoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
    encoder_layers_per_block=(2, 2, 2, 3, 3, 3), decoder_layers_per_block=(3, 3, 3, 3, 3, 3),
    encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)), decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
    downsample_block_type="pixel_unshuffle", upsample_block_type="pixel_shuffle", decoder_norm_types="rms_norm",
    decoder_act_fns="silu", encoder_out_shortcut=True, decoder_in_shortcut=True, decoder_conv_act_fn="relu", scaling_factor=1.0)
DCAE_BUILT = {"downsample_block_type": ("pixel_unshuffle", "Conv"), "upsample_block_type": ("pixel_shuffle", "interpolate"),
              "decoder_conv_act_fn": ("relu", "silu", "relu6")}
TILE = 512  # pixels: pictures above twice that go through in parts, so that memory stays bounded
ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "relu6": F.relu6}


class RMSNorm2d(nn.Module):
    """Each position of [B, C, H, W] divided by the root mean square of its channels, then weight and bias."""

    def __init__(self, dim):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)  # in bf16, all of this in fp32
        x, dtype = x * torch.rsqrt(norm.square() / x.shape[1] + 1e-5), x.dtype
        return x.mul_(self.weight[:, None, None]).add_(self.bias[:, None, None]).to(dtype)


def make_norm(kind, dim):
    return RMSNorm2d(dim) if kind == "rms_norm" else nn.BatchNorm2d(dim)


class ResBlock(nn.Module):
    def __init__(self, dim, norm, activation):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm, self.activation = make_norm(norm, dim), ACTIVATIONS[activation]

    def forward(self, x):
        return self.norm(self.conv2(self.activation(self.conv1(x), inplace=True))).add_(x)  # in place: it is never trained


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
        self.norm_out, self.halo = make_norm(norm, dim), max([k // 2 for k in kernels], default=0)

    def qkv(self, x, inner):                                                # [B, D, H, W], the part that is no halo
        grid, tokens = x.shape[2:], x.flatten(2).transpose(1, 2)            # [B, N, D]
        qkv = torch.cat([self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)], 2)
        qkv = qkv.transpose(1, 2).unflatten(2, grid)                        # [B, 3*D, H, W]
        qkv = torch.cat([qkv] + [project(qkv) for project in self.to_qkv_multiscale], 1)[inner]
        # fp32: the sums run over N terms. Heads are runs of 3*d channels, whatever they were before: so it was trained
        q, k, v = qkv.float().flatten(2).unflatten(1, (-1, 3 * self.head_dim)).chunk(3, dim=2)
        return F.relu(q), F.relu(k), v                                      # [B, h, d, N] each

    def forward(self, x):                                                   # [B, D, H, W]
        # A large picture is gone through twice in tiles: first for the sums over all positions, then for the outputs
        parts, summary, total, out = tiles(x.shape[2:], TILE // 8, self.halo), 0, 0, torch.empty_like(x)
        for outer, inner, _ in parts:
            q, k, v = self.qkv(x[outer], inner)
            summary, total = summary + v @ k.transpose(2, 3), total + k.sum(3).unsqueeze(2)  # [B, h, d, d], [B, h, 1, d]
        for outer, inner, target in parts:
            q = q if len(parts) == 1 else self.qkv(x[outer], inner)[0]
            heads = (summary @ q) / (total @ q + 1e-15)                     # [B, h, d, N]
            tokens = self.to_out(heads.flatten(1, 2).transpose(1, 2).to(x.dtype))  # [B, N, D]
            out[target] = x[target] + self.norm_out(tokens.transpose(1, 2).unflatten(2, x[target].shape[2:]))
        return out                                                          # [B, D, H, W]


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
        def feed_forward(x):
            tokens = self.conv_out(x.flatten(2).transpose(1, 2), x.shape[2:])  # [B, N, D]
            return x + self.conv_out.norm(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))
        return in_tiles(feed_forward, self.attn(x), TILE // 8, 1)


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
    if not (set(kinds) <= {"ResBlock", "EfficientViTBlock"} and set(norms) <= {"rms_norm", "batch_norm"} and set(acts) <= {*ACTIVATIONS}):
        raise UserError(f"DC-AE config: blocks {kinds} with norms {norms} and activations {acts} are not supported")
    for i, (width, count) in enumerate(zip(widths, counts)):
        yield i, width, [ResBlock(width, norms[i], acts[i]) if kinds[i] == "ResBlock" else EfficientViTBlock(
            width, c["attention_head_dim"], c[f"{side}_qkv_multiscales"][i], norms[i]) for _ in range(count)]


class Encoder(nn.Module):
    """The stages of ResBlocks see only what is near: they work in tiles, with exactly the numbers of the whole. What comes
    after them, attention over all positions, is small: an eighth of the side in SANA's."""

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
        self.local, self.factor, self.reach = local_stages(self.down_blocks, full)

    def near(self, x):
        x = self.conv_in(x)
        for stage in self.down_blocks[:self.local]:
            x = stage(x)
        return x

    def forward(self, x):                                                   # [B, 3, H, W]
        x = in_tiles(self.near, x, TILE, self.reach, 1 / self.factor)       # [B, D, H/8, W/8]
        for stage in self.down_blocks[self.local:]:
            x = stage(x)
        return self.conv_out(x) + x.unflatten(1, (self.shortcut, -1)).mean(2) if self.shortcut else self.conv_out(x)


class Decoder(nn.Module):
    """The encoder in reverse: first the attention stages, then the ResBlocks in tiles."""

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
        self.local, self.factor, self.reach = local_stages(self.up_blocks, full)

    def near(self, x):
        for stage in reversed(self.up_blocks[:self.local]):
            x = stage(x)
        return self.conv_out(self.activation(self.norm_out(x)))

    def forward(self, z):                                                   # [B, C, H, W]
        x = self.conv_in(z)
        if self.repeats:
            x = x + z.repeat_interleave(self.repeats, dim=1)
        for stage in reversed(self.up_blocks[self.local:]):
            x = stage(x)                                                    # [B, D, 4H, 4W]
        return in_tiles(self.near, x, TILE // self.factor, self.reach // self.factor, self.factor)


def local_stages(blocks, full):
    """-> (how many of the stages nearest to the pixels have no attention, how many pixels wide one position beyond them is, how
    far they see, in pixels: 3x3 convolutions on ever larger positions, rounded up to a multiple of that width)."""
    count = next((i for i, stage in enumerate(blocks) if any(isinstance(b, EfficientViTBlock) for b in stage)), len(blocks) - 1)
    factor = reach = 1 if full else 2
    for i, stage in enumerate(blocks[:count]):
        reach += factor * (2 * sum(isinstance(b, ResBlock) for b in stage) + 2)
        factor *= 2 if full or i else 1
    return count, factor, -(-reach // factor) * factor


class DCAE(Pretrained):
    """The 32x autoencoder (64x and 128x by config). config: the keys of the checkpoint's vae/config.json. Raises UserError
    for a config that this file does not build.

    Precision: SANA's file holds fp32, which is the reference. bf16 is safe: it has fp32's range, the norms and the sums of
    the attention are taken in fp32; with random weights a round trip is 2% off. fp16 was closer there (0.2%, activations
    up to 40), but it ends at 65,504, and what the published weights reach was not measured: prefer bf16.
    """
    CLASS = "AutoencoderDC"

    def __init__(self, config):
        super().__init__()
        c = read_config("DC-AE", config, DCAE_DEFAULTS, built=DCAE_BUILT)
        self.encoder, self.decoder, self.scaling = Encoder(c), Decoder(c), c["scaling_factor"]
        self.factor, self.channels = 2 ** (len(c["encoder_block_out_channels"]) - 1), c["latent_channels"]

    @torch.no_grad()
    def encode(self, pixels):
        """[B, 3, H, W] in [-1, 1] -> [B, C, H/f, W/f], scaled, fp32. Deterministic: DC-AE has no latent distribution."""
        x = pad_to_multiple(pixels, self.factor)  # channels last, as the tokens of the attention lie: a fifth less memory
        return self.encoder(x.to(self.encoder.conv_out.weight.dtype, memory_format=torch.channels_last)).float() * self.scaling

    @torch.no_grad()
    def decode(self, latents):
        """[B, C, H, W], scaled -> pixels [B, 3, fH, fW], fp32."""
        return self.decoder((latents / self.scaling).to(self.decoder.conv_in.weight.dtype, memory_format=torch.channels_last)).float()


# ----------------------------------------------------------------------------------------------------------------
# Any size.

def tiles(size, tile, halo):
    """Cut a picture of (H, W) positions into squares, or leave one of up to twice their side in one piece.
    -> [(outer, inner, target)], each (..., rows, columns): the part to take, with halo positions around it where there
    are any; what of that part is no halo; where that lies in the picture."""
    if max(size) <= 2 * tile:
        tile = max(size)
    axes = []
    for length in size:
        starts = range(0, length, tile)
        axes.append([(slice(max(0, s - halo), s + tile + halo), slice(min(s, halo), min(s, halo) + tile), slice(s, s + tile)) for s in starts])
    return [tuple((..., rows, columns) for rows, columns in zip(r, c)) for r in axes[0] for c in axes[1]]


def in_tiles(function, x, tile, halo, scale=1):
    """function(x), computed in tiles: the same numbers, if no output of the function depends on what lies further away
    than halo. x [B, C, H, W]; scale: output positions per input position; tile and halo are multiples of 1 / scale."""
    def scaled(at):
        return (..., *(slice(round(side.start * scale), round(side.stop * scale)) for side in at[1:]))
    parts, out = tiles(x.shape[2:], tile, halo), None
    for outer, inner, target in parts:
        part = function(x[outer])
        if len(parts) == 1:
            return part
        out = part.new_empty(*part.shape[:2], *(round(side * scale) for side in x.shape[2:])) if out is None else out
        out[scaled(target)] = part[scaled(inner)]
    return out


def blend_tiles(function, size, tile, overlap):
    """function(at) -> [B, C, h, w], the output for the part `at` of a picture of size (H, W), a (..., rows, columns) index; put
    together from tiles that overlap, blended linearly where they do, so that no seam shows."""
    if max(size) <= tile:
        return function((..., slice(0, size[0]), slice(0, size[1])))
    total = weights = None
    starts = itertools.product(*(tile_starts(side, tile, overlap) for side in size))
    for top, left in tqdm(list(starts), unit="tile", desc="tiles", leave=False, delay=3):
        at = ..., slice(top, top + tile), slice(left, left + tile)
        part = function(at)
        if total is None:
            total, weights = part.new_zeros(*part.shape[:2], *size), part.new_zeros(size)
        weight = ramp(part.shape[2], overlap).to(part)[:, None] * ramp(part.shape[3], overlap).to(part)
        total[at] += weight * part
        weights[at[1:]] += weight
    return total.div_(weights)


def tile_starts(length, tile, overlap):
    """Where tiles that overlap by at least overlap begin, the last one ending at length."""
    return [0] if length <= tile else [*range(0, length - tile, tile - overlap), length - tile]


def ramp(length, overlap):
    """Weights that rise over the overlap from either end, to blend neighbouring tiles."""
    i = torch.arange(length)
    return torch.minimum(i + 1, length - i).clamp(max=overlap) / overlap


def pad_to_multiple(pixels, multiple):
    """Extend [B, C, H, W] right and down by mirroring (without repeating the edge, again and again if the image is
    smaller than the padding) to sides that are multiples. Crop with [..., :H, :W] to undo."""
    for dim in (2, 3):
        n = pixels.shape[dim]
        if n % multiple:
            mirror = torch.arange(-(-n // multiple) * multiple, device=pixels.device) % max(1, 2 * (n - 1))
            pixels = pixels.index_select(dim, torch.where(mirror < n, mirror, 2 * (n - 1) - mirror))
    return pixels
