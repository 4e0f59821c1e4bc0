import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import evaluate
from data import Prompts, to_tensor
from evaluate import draw_grid, in_tiles, mean_of, psnr, restore, restore_image, ssim
from model import PRESETS, build_restorer
from vae import PixelAE


@pytest.mark.parametrize("size", [(512, 512), (11, 11), (37, 64)])
@pytest.mark.parametrize("sigma", [1, 25, 120])
def test_psnr_and_ssim_are_scikit_images(photo, size, sigma):
    clean = np.asarray(photo.crop((50, 80, 50 + size[0], 80 + size[1])))
    noisy = np.clip(np.rint(clean + np.random.default_rng(0).normal(0, sigma, clean.shape)), 0, 255).astype(np.uint8)
    a, b = (to_tensor(Image.fromarray(x))[None] for x in (clean, noisy))
    assert psnr(a, b).item() == pytest.approx(peak_signal_noise_ratio(clean, noisy), abs=1e-5)
    expected = structural_similarity(clean, noisy, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                     data_range=255, channel_axis=2)
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-6)


def test_metrics_by_closed_form():
    a = torch.zeros(2, 3, 16, 16)
    assert psnr(a, a).tolist() == [math.inf] * 2 and ssim(a, a).tolist() == [1, 1]
    assert torch.allclose(psnr(a, a + 0.02), torch.full((2,), 40.0, dtype=torch.float64))
    c1 = 0.02**2  # two flat images: only the luminance term is left
    assert ssim(a - 0.5, a - 0.9).tolist() == pytest.approx([(2 * 0.05 + c1) / (0.25 + 0.01 + c1)] * 2)
    with pytest.raises(ValueError):
        ssim(a[..., :10], a[..., :10])


@pytest.fixture(scope="module")
def tiny():
    restorer = build_restorer(PRESETS["tiny"])
    generator = torch.Generator().manual_seed(0)
    restorer.sana.initialize(generator)
    torch.nn.init.normal_(restorer.sana.proj_out.weight, std=0.05, generator=generator)
    return restorer.eval(), PixelAE(2), Prompts()


def test_an_image_is_restored_alike_whatever_is_beside_it(tiny):
    pixels = torch.rand(3, 3, 21, 30, generator=torch.Generator().manual_seed(1)) * 2 - 1
    captions = ["", "Remove JPEG artifacts.", "Fix the gaussian noise and the blur."]
    together = restore(*tiny, pixels, captions, steps=3, seed=5)
    for i in range(3):
        assert torch.allclose(together[i], restore(*tiny, pixels[i:i + 1], captions[i:i + 1], steps=3, seed=5)[0], atol=1e-5)
    assert together.shape == pixels.shape and together.abs().max() <= 1
    assert not torch.allclose(together, restore(*tiny, pixels, captions, steps=3, seed=6), atol=1e-3)
    assert not torch.allclose(together, restore(*tiny, pixels, ["", "", ""], steps=3, seed=5), atol=1e-3)


def test_tiles_of_a_local_function_give_what_it_gives_untiled():
    """A 5x5 convolution sees 2 positions around each: tiles that overlap by 16, blended, agree but near the tiles' own borders."""
    x, kernel = torch.randn(1, 1, 100, 60, generator=torch.Generator().manual_seed(0)), torch.randn(1, 1, 5, 5, generator=torch.Generator().manual_seed(1))
    whole = torch.nn.functional.conv2d(x, kernel, padding=2)
    tiled = in_tiles(lambda at: torch.nn.functional.conv2d(x[at], kernel, padding=2), (100, 60), 48, 16)
    assert torch.allclose(tiled[..., 2:12, 2:12], whole[..., 2:12, 2:12], atol=1e-5) and tiled.shape == whole.shape
    # without borders, exactly; at twice and at half the size too
    assert torch.allclose(in_tiles(lambda at: x[at] * 3, (100, 60), 48, 16), x * 3, atol=1e-6)
    up = in_tiles(lambda at: x[at].repeat_interleave(2, 2).repeat_interleave(2, 3), (100, 60), 48, 16, scale=2)
    assert torch.allclose(up, x.repeat_interleave(2, 2).repeat_interleave(2, 3), atol=1e-6)
    down = in_tiles(lambda at: x[at][..., ::4, ::4], (100, 60), 48, 16, scale=1 / 4)
    assert torch.allclose(down, x[..., ::4, ::4], atol=1e-6)


def test_tiles_cover_the_image_without_seams(tiny, monkeypatch):
    """With an untrained last layer the answer is the input itself, in tiles too; with weights, tiles stay close."""
    pixels = torch.rand(1, 3, 210, 333, generator=torch.Generator().manual_seed(1)) * 2 - 1
    whole = restore(*tiny, pixels, [""])
    monkeypatch.setattr(evaluate, "TILE", 128), monkeypatch.setattr(evaluate, "OVERLAP", 32)
    assert evaluate.tile_starts(334, 128, 32) == [0, 96, 192, 206] and evaluate.tile_starts(128, 128, 32) == [0]
    tiled = restore(*tiny, pixels, [""])
    assert psnr(tiled, whole) > 30 and not torch.equal(tiled, whole)
    identity = build_restorer(PRESETS["tiny"])
    identity.sana.initialize(torch.Generator().manual_seed(0))
    assert torch.allclose(restore(identity, *tiny[1:], pixels, [""]), pixels, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(33, 22), (1, 1), (7, 300)])
def test_modes_and_sizes_are_kept(tiny, photo, mode, size):
    image = photo.resize(size).convert(mode)
    if "A" in mode:
        image.putalpha(Image.linear_gradient("L").resize(size))
    restored = restore_image(image, "", **dict(zip(("restorer", "autoencoder", "prompts"), tiny)), steps=1)
    assert restored.mode == mode and restored.size == size
    if "A" in mode:
        assert np.array_equal(np.asarray(restored.getchannel("A")), np.asarray(image.getchannel("A")))
    if size != (1, 1):
        assert not np.array_equal(np.asarray(restored), np.asarray(image))


def test_means_leave_out_what_is_not_finite_and_grids_show_the_centre(photo):
    rows = [{"image": "a", "p": 20.0, "q": math.inf}, {"image": "b", "p": 30.0, "q": math.inf}, {"image": "c", "p": math.nan, "q": 5.0}]
    assert mean_of(rows) == {"p": 25, "q": 5} and math.isnan(mean_of(rows[:2])["q"])
    grid = draw_grid([[("a", photo), ("b", photo), ("c", photo)]] * 2, tile=64)
    assert np.array_equal(np.asarray(grid.crop((68, 16, 132, 80))), np.asarray(photo.crop((224, 224, 288, 288))))
