"""How much memory training takes, derived from the shapes alone: nothing is allocated.

The table by card in README.md (`python tests/bench.py memory`). Left out: what the text encoder
takes before training, and what libraries take for themselves.
"""

import conftest  # noqa: F401, puts the project on the path
import torch

import vae
from model import build_restorer

TOKENS = 64  # of a caption
BYTES = {  # optimizer: of a trained weight with its low bits, its gradient, its two moments
    "adamw": (4, 4, 8),
    "adamw_bf16": (2 + 2, 2, 2 + 2),
}
AVERAGE = 4  # bytes: fp32


def restorer_memory(
    config,
    autoencoder,
    optimizer="adamw_bf16",
    count=4,
    side=512,
    checkpointing=False,
    average=True,
    cache=False,
    base_bytes=2,
    processes=1,
):
    """Return {what: bytes} that training a restorer keeps on each device.

    config: "model" of config.json, with "lora". autoencoder: a DCAE, on any device. count, side: of
    the pictures that a process computes at once. average: whether it lies on this device. cache:
    the latents are read from one. base_bytes: of each weight of a LoRA's frozen base, 2 on a GPU.
    """
    with torch.device("meta"):
        restorer = build_restorer(config)
    trained = sum(p.numel() for p in vae.trained_weights(restorer).values())
    frozen = sum(p.numel() for p in restorer.parameters()) - trained
    trained /= processes
    weight, gradient, moments = BYTES[optimizer]
    sizes = {
        "weights": weight * trained + base_bytes * frozen,
        "gradients": gradient * trained,
        "moments": moments * trained,
        "average": AVERAGE * trained if average else 0,
        "autoencoder": 0 if cache else sum(p.nbytes for p in autoencoder.parameters()),
    }
    latents = empty_latents(autoencoder, count, side)
    half = optimizer == "adamw_bf16" or bool(config["lora"]) and base_bytes == 2
    sizes["activations"] = restorer_activations(config, latents, half, checkpointing)
    if not cache:  # one after the other, so the larger one counts
        sizes["activations"] = max(sizes["activations"], encoding_bytes(autoencoder, side))
    return sizes


def decoder_memory(config, autoencoder, count=1, side=512, restorer_bytes=2, processes=1):
    """Return {what: bytes} that training the decoder that sees the degraded picture keeps.

    autoencoder: a DCAE on the meta device; it gets its skips. config: of the frozen restorer, which
    has so many bytes a weight. Another autoencoder encodes. The rest as in restorer_memory.
    """
    frozen = sum(p.nbytes for p in autoencoder.parameters())
    with torch.device("meta"):
        restorer = build_restorer(config)
        autoencoder.add_skips()
    autoencoder.freeze_around_decoder()
    weights = sum(p.numel() for p in autoencoder.parameters())
    trained = sum(p.numel() for p in vae.trained_weights(autoencoder).values()) / processes
    weight, gradient, moments = BYTES["adamw"]
    latents = empty_latents(autoencoder, count, side)
    pixels = torch.empty(count, 3, side, side, device="meta")
    return {
        "weights": weight * weights,
        "gradients": gradient * trained,
        "moments": moments * trained,
        "average": AVERAGE * trained,
        "autoencoder": frozen,
        "restorer": restorer_bytes * sum(p.numel() for p in restorer.parameters()),
        "activations": saved_bytes(autoencoder, pixels, latents),
    }


def empty_latents(autoencoder, count, side):
    grid = side // autoencoder.factor
    return torch.empty(count, autoencoder.channels, grid, grid, device="meta")


def encoding_bytes(autoencoder, side):
    """Return what encoding one picture takes: five tensors of the first stage at once."""
    width = autoencoder.config["encoder_block_out_channels"][0]
    return 4 * 5 * width * min(side, 2 * vae.TILE) ** 2


def restorer_activations(config, latents, half, checkpointing):
    """Return the bytes that autograd keeps of a restorer between forward and backward.

    All blocks are alike: one and two of them tell what each adds.
    """
    kept = []
    for blocks in (1, 2):
        with torch.device("meta"):
            restorer = build_restorer(config | {"sana": config["sana"] | {"num_layers": blocks}})
            if half:
                restorer.sana.to(torch.bfloat16)
            timestep = torch.empty(len(latents))
            text = torch.empty(len(latents), TOKENS, restorer.sana.config["caption_channels"])
        kept.append(saved_bytes(restorer, latents, latents, timestep, text))
    block = kept[1] - kept[0]
    ends = kept[0] - block
    blocks = config["sana"]["num_layers"]
    if not checkpointing:
        return ends + blocks * block
    sana = restorer.sana.config
    positions = len(latents) * latents.shape[2:].numel() / sana["patch_size"] ** 2
    dim = sana["num_attention_heads"] * sana["attention_head_dim"]
    inputs = (2 if half else 4) * positions * dim  # of a block
    return ends + blocks * inputs + block


def saved_bytes(module, *inputs):
    """Count what autograd saves of a forward pass on the meta device; each storage once."""
    kept = {}
    own = {p.untyped_storage()._cdata for p in module.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor  # keeps it alive, so that its id is not reused
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        module(*inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
