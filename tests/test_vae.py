"""DC-AE against diffusers' AutoencoderDC; any size, in tiles; the tiny preset's autoencoder."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC

import vae
from bench import DC_AE_F32C32, KINDS
from data import to_tensor
from degrade import UserError
from pipeline import DC_AE, randomize
from vae import DCAE, PixelAE, load_pretrained, pad_to_multiple


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def with_another_stage(config, **changes):
    """Repeat the last entry of each list, which halves the side once more."""
    deeper = {}
    for key, value in config.items():
        deeper[key] = value + value[-1:] if isinstance(value, list) else value
    return deeper | changes


# The published families in small widths: sana-1.0/1.1 (strided convolutions, nearest-neighbour up),
# in-1.0 and mix-1.0 of f32, f64 and f128 (pixel shuffles; their batch norm is not built).
IMAGENET = {
    "encoder_block_types": KINDS,
    "decoder_block_types": KINDS,
    "encoder_block_out_channels": [4, 8, 8, 8, 16, 16],
    "decoder_block_out_channels": [4, 8, 8, 8, 16, 16],
    "encoder_layers_per_block": [0, 2, 1, 1, 1, 1],
    "decoder_layers_per_block": [0, 2, 1, 1, 1, 1],
    "encoder_qkv_multiscales": [[]] * 6,
    "decoder_qkv_multiscales": [[]] * 6,
    "attention_head_dim": 4,
    "latent_channels": 8,
}
F64 = with_another_stage(IMAGENET, latent_channels=16)
F128 = with_another_stage(F64)
PLAIN = {
    "latent_channels": 4,
    "encoder_block_out_channels": [8, 16],
    "decoder_block_out_channels": [8, 16],
    "encoder_layers_per_block": [1, 1],
    "decoder_layers_per_block": [1, 1],
    "encoder_qkv_multiscales": [[], []],
    "decoder_qkv_multiscales": [[], []],
}
ODD_HEADS = {"attention_head_dim": 5, "encoder_qkv_multiscales": [[], [], [3, 5]]}
# DC-AE-Lite: SANA's encoder, and a decoder without attention.
LITE = DC_AE | {
    "decoder_block_types": "ResBlock",
    "decoder_layers_per_block": [0, 3, 2],
    "decoder_qkv_multiscales": [[], [], []],
    "upsample_block_type": "pixel_shuffle",
}
CONFIGS = {
    "sana": DC_AE,
    "lite": LITE,
    "in-f32": IMAGENET,
    "in-f64": F64,
    "in-f128": F128,
    "plain": PLAIN,
    "odd heads": DC_AE | ODD_HEADS,
}
# Both spellings of the strided convolution are in published configs.
CONV = DC_AE | {"downsample_block_type": "conv"}


def assert_close(got, expected, what=None):
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max(), what


@pytest.mark.parametrize("name", [*CONFIGS, "conv"])
def test_dcae_computes_what_diffusers_computes(name, tmp_path):
    config = (CONFIGS | {"conv": CONV})[name]
    theirs = randomize(AutoencoderDC(**config), scale=0.15)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(DCAE, tmp_path).requires_grad_(False)
    scaling = config.get("scaling_factor", 1.0)
    assert ours.factor == theirs.spatial_compression_ratio
    # few enough positions for diffusers' quadratic attention, and many
    for height, width in ((1, 1), (3, 2), (8, 7)):
        shape = 2, 3, ours.factor * height, ours.factor * width
        pixels = torch.randn(shape, generator=seeded())
        with torch.no_grad():
            latents = theirs.encode(pixels).latent
            expected = theirs.decode(latents).sample
        assert_close(ours.encode(pixels), latents * scaling, (height, width))
        assert_close(ours.decode(latents * scaling), expected, (height, width))


def test_in_bf16_dcae_is_no_further_from_the_fp32_answer_than_diffusers():
    """The ratio of a few roundings varies by some percent: the mean of many draws tells."""

    def error(got, exact):
        return (got - exact).square().mean().sqrt()

    encoded = []
    decoded = []
    for config in CONFIGS.values():
        scaling = config.get("scaling_factor", 1.0)
        for seed in range(3):
            theirs = randomize(AutoencoderDC(**config), 1000 * seed, scale=0.15)
            ours = DCAE(config).eval()
            ours.load_state_dict(theirs.state_dict())
            shape = 2, 3, 4 * ours.factor, 5 * ours.factor
            pixels = torch.randn(shape, generator=seeded(seed))
            with torch.no_grad():
                latents = theirs.encode(pixels).latent
                picture = theirs.decode(latents).sample
                theirs.bfloat16()
                their_latents = theirs.encode(pixels.bfloat16()).latent
                their_picture = theirs.decode(latents.bfloat16()).sample
            ours.bfloat16()
            our_latents = ours.encode(pixels) / scaling
            our_picture = ours.decode(latents * scaling)
            encoded.append(error(our_latents, latents) / error(their_latents, latents))
            decoded.append(error(our_picture, picture) / error(their_picture, picture))
    assert torch.tensor(encoded).mean() <= 1.02
    assert torch.tensor(decoded).mean() <= 1


def shapes(module):
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def test_full_size_dcae_has_the_published_number_of_tensors_and_parameters():
    with torch.device("meta"):
        full = DCAE(DC_AE_F32C32)
        theirs = AutoencoderDC(**DC_AE_F32C32)
    assert shapes(full) == shapes(theirs)
    assert len(full.state_dict()) == 375
    assert sum(p.numel() for p in full.parameters()) == 312_250_275


def test_configs_that_are_not_built_are_refused():
    norms = ["batch_norm", "rms_norm", "rms_norm"]
    for key, value in [("decoder_norm_types", norms), ("decoder_act_fns", "relu"), ("depth", 3)]:
        with pytest.raises(ValueError, match=f"{key}.* not supported"):
            DCAE(DC_AE | {key: value})


# --------------------------------------------------------------------------------------------------
# In tiles.


def note_tiles(network, monkeypatch):
    """Have the sizes of what goes through the stages that work in tiles noted -> their list."""
    sizes = []
    whole = network.conv_stages

    def noted(x):
        sizes.append(x.shape[2:].numel())
        return whole(x)

    monkeypatch.setattr(network, "conv_stages", noted)
    return sizes


@pytest.mark.parametrize("name", CONFIGS)
def test_large_pictures_go_through_dcae_in_tiles_with_the_same_numbers(name, photo, monkeypatch):
    ours = randomize(DCAE(CONFIGS[name]), scale=0.15)
    side = 512 if ours.factor < 64 else 1024
    pixels = to_tensor(photo.resize((side, side)))[None, :, :, : side - 128]
    latents = ours.encode(pixels)
    whole = ours.decode(latents)

    monkeypatch.setattr(vae, "TILE", side // 4)
    monkeypatch.setattr(vae, "ATTENTION_TILE", side // 32)
    sizes = note_tiles(ours.encoder, monkeypatch), note_tiles(ours.decoder, monkeypatch)
    assert_close(ours.encode(pixels), latents)
    assert_close(ours.decode(latents), whole)
    assert min(map(len, sizes)) >= 12
    assert max(sizes[0]) < pixels[0, 0].numel() / 2


def test_a_halo_that_is_too_small_would_be_noticed(photo, monkeypatch):
    ours = randomize(DCAE(DC_AE), scale=0.15)
    pixels = to_tensor(photo)[None]
    latents = ours.encode(pixels)
    monkeypatch.setattr(vae, "TILE", 128)
    monkeypatch.setattr(vae, "ATTENTION_TILE", 16)
    monkeypatch.setattr(ours.encoder, "halo", 4)
    assert (ours.encode(pixels) - latents).abs().max() > 1e-3 * latents.abs().max()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_tf32_is_set_on_a_gpu_and_taken_back(device, before):
    """Also after an error, and where the caller has set it: torch refuses to mix its two APIs."""
    matmul = torch.backends.cuda.matmul
    assert matmul.fp32_precision == "none"
    try:
        matmul.fp32_precision = before
        with pytest.raises(KeyError), vae.tf32(torch.device(device)):
            assert matmul.fp32_precision == (before if device == "cpu" else "tf32")
            raise KeyError
        assert matmul.fp32_precision == before
    finally:
        matmul.fp32_precision = "none"
    assert not matmul.allow_tf32  # the old API can be read


# --------------------------------------------------------------------------------------------------
# The autoencoder of the tiny preset.


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_pixel_autoencoder_loses_nothing(factor):
    autoencoder = PixelAE(factor)
    pixels = torch.randn(2, 3, 16, 24, generator=seeded())
    latents = autoencoder.encode(pixels)
    assert latents.shape == (2, autoencoder.channels, 16 // factor, 24 // factor)
    assert torch.equal(autoencoder.decode(latents), pixels)
    first_block = pixels[0, 0, :factor, :factor].flatten()
    assert torch.equal(latents[0, : factor**2, 0, 0], first_block * 2)


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (2, 3), (8, 12)])
def test_padding_mirrors(size):
    pixels = torch.randn(1, 3, *size, generator=seeded())
    margins = [(0, 0), (0, 0)]
    for side in size:
        margins.append((0, math.ceil(side / 4) * 4 - side))
    expected = np.pad(pixels.numpy(), margins, "reflect")
    assert np.array_equal(pad_to_multiple(pixels, 4).numpy(), expected)
    ours = randomize(DCAE(DC_AE))  # of a factor of 4
    assert torch.equal(ours.encode(pixels), ours.encode(torch.from_numpy(expected)))


# --------------------------------------------------------------------------------------------------
# Files.


def test_a_digest_is_of_the_whole_file(tmp_path):
    """Two long files that differ in one byte, wherever it is."""
    content = bytearray(3_000_000)
    digests = set()
    for place in (0, 1_234_567, 2_999_999):
        content[place] ^= 1
        (tmp_path / "a").write_bytes(content)
        assert vae.file_digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()
        digests.add(vae.file_digest(tmp_path / "a"))
    assert len(digests) == 3


def test_json_is_strict(tmp_path):
    content = {"a": [1.5, math.nan, -math.inf], "b": {"c": math.inf, "d": "NaN", "é": None}}
    vae.write_json(tmp_path / "a.json", content)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")

    expected = {"a": [1.5, None, None], "b": {"c": None, "d": "NaN", "é": None}}
    assert json.loads(text, parse_constant=pytest.fail) == expected
    assert vae.read_json(tmp_path / "a.json") == expected


def test_weights_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write .*a.safetensors"):
        vae.save_weights({"w": torch.ones(3)}, tmp_path / "file/a.safetensors")
    vae.save_weights({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    modes = [(tmp_path / name).stat().st_mode for name in ("a.safetensors", "file")]
    assert modes[0] == modes[1]  # who may read it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "file"]
