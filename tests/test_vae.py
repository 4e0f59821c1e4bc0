"""DC-AE against diffusers' AutoencoderDC; the autoencoder of the tiny preset; any size, in tiles."""
import math

import numpy as np
import pytest
import torch
import vae
from diffusers import AutoencoderDC

from data import to_tensor
from degrade import UserError
from pipeline import DC_AE, randomize
from vae import DCAE, PixelAE, pad_to_multiple


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def stages(n, res):
    return ["ResBlock"] * res + ["EfficientViTBlock"] * (n - res)


# The published families in small widths: sana-1.0/1.1 (strided convolutions, nearest-neighbour up), in-1.0 and mix-1.0 of
# f32, f64 and f128 (pixel shuffles, no convolution at full resolution, batch norm in the decoder), and one of all defaults.
IMAGENET = dict(encoder_block_types=stages(6, 3), decoder_block_types=stages(6, 3), encoder_block_out_channels=[4, 8, 8, 8, 16, 16],
                decoder_block_out_channels=[4, 8, 8, 8, 16, 16], encoder_layers_per_block=[0, 2, 1, 1, 1, 1], decoder_layers_per_block=[0, 2, 1, 1, 1, 1],
                encoder_qkv_multiscales=[[]] * 6, decoder_qkv_multiscales=[[]] * 6, decoder_norm_types=["batch_norm"] * 3 + ["rms_norm"] * 3,
                decoder_act_fns=["relu"] * 3 + ["silu"] * 3, attention_head_dim=4, latent_channels=8)
F64 = {key: value + value[-1:] for key, value in IMAGENET.items() if isinstance(value, list)} | {"latent_channels": 16, "attention_head_dim": 4}
F128 = {key: value + value[-1:] for key, value in F64.items() if isinstance(value, list)} | {"latent_channels": 16, "attention_head_dim": 4}
PLAIN = dict(latent_channels=4, encoder_block_out_channels=[8, 16], decoder_block_out_channels=[8, 16], encoder_layers_per_block=[1, 1],
             decoder_layers_per_block=[1, 1], encoder_qkv_multiscales=[[], []], decoder_qkv_multiscales=[[], []], encoder_out_shortcut=False,
             decoder_in_shortcut=False, decoder_conv_act_fn="silu")
CONFIGS = {"sana": DC_AE, "in-f32": IMAGENET, "in-f64": F64, "in-f128": F128, "plain": PLAIN,
           "odd heads": DC_AE | {"attention_head_dim": 5, "encoder_qkv_multiscales": [[], [], [3, 5]]}}


@pytest.mark.parametrize("name", CONFIGS)
def test_dcae_computes_what_diffusers_computes(name, tmp_path):
    theirs = randomize(AutoencoderDC(**CONFIGS[name]), scale=0.15)
    theirs.save_pretrained(tmp_path)
    ours, scaling = DCAE.from_pretrained(tmp_path), CONFIGS[name].get("scaling_factor", 1.0)
    assert ours.factor == theirs.spatial_compression_ratio
    for grid in ((1, 1), (3, 2), (8, 7)):  # few enough positions for diffusers' quadratic attention, and many
        pixels = torch.randn(2, 3, *(ours.factor * side for side in grid), generator=seeded())
        with torch.no_grad():
            latents = theirs.encode(pixels).latent
            expected = theirs.decode(latents).sample
        got, decoded = ours.encode(pixels), ours.decode(latents * scaling)
        assert (got - latents * scaling).abs().max() <= 1e-5 * (latents * scaling).abs().max(), grid
        assert (decoded - expected).abs().max() <= 1e-5 * expected.abs().max(), grid


def test_in_bf16_dcae_is_no_further_from_the_fp32_answer_than_diffusers():
    """The error of a toy network is a few roundings, so the ratio to the peer's varies by some percent from draw to draw: the
    mean over all configs and three draws is what tells."""
    ratios = []
    for config in CONFIGS.values():
        for seed in range(3):
            theirs, ours = randomize(AutoencoderDC(**config), 1000 * seed, scale=0.15), DCAE(config).eval()
            ours.load_state_dict(theirs.state_dict())
            pixels, scaling = torch.randn(2, 3, 4 * ours.factor, 5 * ours.factor, generator=seeded(seed)), config.get("scaling_factor", 1.0)
            with torch.no_grad():
                latents = theirs.encode(pixels).latent
                exact = latents, theirs.decode(latents).sample
                peer = theirs.bfloat16().encode(pixels.bfloat16()).latent, theirs.decode(latents.bfloat16()).sample
            ours.bfloat16()
            half = ours.encode(pixels) / scaling, ours.decode(latents * scaling)
            ratios.append([((h - e).square().mean() / (p - e).square().mean()).sqrt() for h, p, e in zip(half, peer, exact)])
    encoded, decoded = torch.tensor(ratios).mean(0)
    assert encoded <= 1.02 and decoded <= 1, (encoded, decoded)


def test_dcae_gradients_are_not_kept():
    ours = randomize(DCAE(DC_AE))
    assert not ours.encode(torch.zeros(1, 3, 8, 8, requires_grad=True)).requires_grad


def test_full_size_dcae_has_the_published_number_of_tensors_and_parameters():
    config = dict(DC_AE, latent_channels=32, attention_head_dim=32, encoder_block_types=stages(6, 3), decoder_block_types=stages(6, 3),
                  encoder_block_out_channels=[128, 256, 512, 512, 1024, 1024], decoder_block_out_channels=[128, 256, 512, 512, 1024, 1024],
                  encoder_layers_per_block=[2, 2, 2, 3, 3, 3], decoder_layers_per_block=[3] * 6, encoder_qkv_multiscales=[[], [], [], [5], [5], [5]],
                  decoder_qkv_multiscales=[[], [], [], [5], [5], [5]])
    with torch.device("meta"):
        full, theirs = DCAE(config), AutoencoderDC(**config)
    assert {n: t.shape for n, t in full.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    assert len(full.state_dict()) == 375 and sum(p.numel() for p in full.parameters()) == 312_250_275
    assert full.factor == 32 and full.channels == 32


@pytest.mark.parametrize("change", [{"encoder_block_types": "ViTBlock"}, {"decoder_norm_types": "layer_norm"}, {"depth": 3}])
def test_configs_that_are_not_built_are_refused(change):
    with pytest.raises(UserError, match="not supported"):
        DCAE(DC_AE | change)


def test_any_size_is_mirrored_to_the_multiple():
    ours, pixels = randomize(DCAE(DC_AE)), torch.randn(1, 3, 13, 6, generator=seeded())
    padded = torch.from_numpy(np.pad(pixels.numpy(), [(0, 0), (0, 0), (0, 3), (0, 2)], "reflect"))
    assert torch.equal(ours.encode(pixels), ours.encode(padded)) and ours.encode(pixels).shape == (1, 8, 4, 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_large_pictures_go_through_dcae_in_tiles_with_the_same_numbers(name, photo, monkeypatch):
    ours = randomize(DCAE(CONFIGS[name]), scale=0.15)
    side = 512 if ours.factor < 64 else 1024
    pixels = to_tensor(photo.resize((side, side)))[None, :, :, :side - 128]
    latents = ours.encode(pixels)
    whole, sizes = ours.decode(latents), []
    for module in ours.modules():
        module.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[2:].numel()) if args[0].dim() == 4 else None)
    near = ours.encoder.near, ours.decoder.near
    monkeypatch.setattr(vae, "TILE", side // 4)
    for network, function in zip((ours.encoder, ours.decoder), near):
        monkeypatch.setattr(network, "near", lambda x, function=function: (sizes.append(-x.shape[2:].numel()), function(x))[1])
    tiled = ours.encode(pixels)
    decoded = ours.decode(latents)
    assert len([size for size in sizes if size < 0]) >= 24  # twelve tiles or more each way
    assert (tiled - latents).abs().max() <= 1e-5 * latents.abs().max()
    assert (decoded - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_a_halo_that_is_too_small_would_be_noticed(photo, monkeypatch):
    ours = randomize(DCAE(DC_AE), scale=0.15)
    pixels = to_tensor(photo)[None]
    latents = ours.encode(pixels)
    monkeypatch.setattr(vae, "TILE", 128), monkeypatch.setattr(ours.encoder, "reach", 4)
    assert (ours.encode(pixels) - latents).abs().max() > 1e-3 * latents.abs().max()


# The autoencoder of the tiny preset.

@pytest.mark.parametrize("factor", [2, 4, 8])
def test_pixel_autoencoder_loses_nothing(factor):
    autoencoder, pixels = PixelAE(factor), torch.randn(2, 3, 16, 24, generator=seeded())
    latents = autoencoder.encode(pixels)
    assert latents.shape == (2, autoencoder.channels, 16 // factor, 24 // factor)
    assert torch.equal(autoencoder.decode(latents), pixels)
    assert torch.equal(latents[0, :factor**2, 0, 0], pixels[0, 0, :factor, :factor].flatten() * 2)


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (2, 3), (8, 12)])
def test_padding_mirrors(size):
    pixels = torch.randn(1, 3, *size, generator=seeded())
    padded = pad_to_multiple(pixels, 4)
    extra = [(0, 0), (0, 0)] + [(0, math.ceil(s / 4) * 4 - s) for s in size]
    assert np.array_equal(padded.numpy(), np.pad(pixels.numpy(), extra, "reflect"))
