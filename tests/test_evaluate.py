import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import evaluate
from data import CsvPairs, PairedDataset, Prompts, seed_for, to_tensor
from degrade import draw_grid
from evaluate import mean_of, psnr, restore, restore_files, restore_image, ssim
from model import PRESETS, build_restorer
from vae import PixelAE, blend_tiles, tile_starts


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
    tiled = blend_tiles(lambda at: torch.nn.functional.conv2d(x[at], kernel, padding=2), (100, 60), 48, 16)
    assert torch.allclose(tiled[..., 2:12, 2:12], whole[..., 2:12, 2:12], atol=1e-5) and tiled.shape == whole.shape
    assert torch.allclose(blend_tiles(lambda at: x[at] * 3, (100, 60), 48, 16), x * 3, atol=1e-6)  # without borders, exactly


def test_tiles_cover_the_image_without_seams(tiny, monkeypatch):
    """With an untrained last layer the answer is the input itself, in tiles too; with weights, tiles stay close."""
    pixels = torch.rand(1, 3, 210, 333, generator=torch.Generator().manual_seed(1)) * 2 - 1
    whole = restore(*tiny, pixels, [""])
    monkeypatch.setattr(evaluate, "TILE", 128), monkeypatch.setattr(evaluate, "OVERLAP", 32)
    assert tile_starts(334, 128, 32) == [0, 96, 192, 206] and tile_starts(128, 128, 32) == [0]
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
    assert mean_of(rows) == {"p": 25, "q": 5} and mean_of(rows[:2])["q"] == math.inf
    grid = draw_grid([[("a", photo), ("b", photo), ("c", photo)]] * 2, tile=64)
    assert np.array_equal(np.asarray(grid.crop((68, 16, 132, 80))), np.asarray(photo.crop((224, 224, 288, 288))))


def test_averaging_and_guidance(tiny):
    """The mean over seeds; and both guidances by their formula, on one Euler step, which shows the velocity."""
    pixels, how = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) - 0.5, dict(captions=["Remove JPEG artifacts."], seed=3)
    singles = []
    restorer, autoencoder, prompts = tiny
    for k in range(3):
        noise = torch.randn(12, 8, 8, generator=torch.Generator().manual_seed(seed_for(3, k, "restore")))[None]
        condition = autoencoder.encode(pixels)

        def x0(text, condition):
            return noise - restorer(noise, condition, torch.full((1,), 1000.0), *prompts([text]))
        with torch.no_grad():
            full, plain, blind = x0(how["captions"][0], condition), x0("", condition), x0("", torch.zeros_like(condition))
        singles.append(autoencoder.decode(full))
        if k == 0:
            assert torch.allclose(restore(*tiny, pixels, **how), singles[0].clamp(-1, 1), atol=1e-5)
            guided = blind + 1.3 * (plain - blind) + 2.5 * (full - plain)
            assert torch.allclose(restore(*tiny, pixels, **how, guidance=2.5, condition_guidance=1.3), autoencoder.decode(guided).clamp(-1, 1), atol=1e-4)
            assert not torch.allclose(full, plain, atol=1e-3)
    assert torch.allclose(restore(*tiny, pixels, **how, average=3), (sum(singles) / 3).clamp(-1, 1), atol=1e-5)


def test_colour_profiles_stay_with_pictures_they_fit(tiny, photo, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    how = dict(zip(("restorer", "autoencoder", "prompts"), tiny)) | {"caption": ""}
    small = photo.resize((20, 14))
    small.save(tmp_path / "rgb.png", icc_profile=profile), small.convert("CMYK").save(tmp_path / "cmyk.tif", icc_profile=profile[:16] + b"CMYK" + profile[20:])
    turned = Image.Exif()
    turned[0x0112] = 6
    small.save(tmp_path / "turned.jpg", exif=turned, icc_profile=profile)
    work = [(tmp_path / name, tmp_path / "out" / name) for name in ("rgb.png", "cmyk.tif", "turned.jpg")]
    assert restore_files(work, **how) == 0
    out = {path.name: Image.open(path) for _, path in work}
    assert out["rgb.png"].info["icc_profile"] == out["turned.jpg"].info["icc_profile"] == profile and "icc_profile" not in out["cmyk.tif"].info
    assert out["turned.jpg"].size == (14, 20) and 0x0112 not in out["turned.jpg"].getexif() and out["cmyk.tif"].mode == "RGB"


def test_what_was_done_to_an_image_is_read_from_recipe_column_or_caption(photos, tmp_path):
    (tmp_path / "a.csv").write_text("image_path,condition_image_path,caption,degradation\n" + "\n".join(
        f"{photos}/00.png,{condition},{caption},{written}" for condition, caption, written in (
            ("", "", ""), (photos / "01.png", "x", "rain:amount=3 jpeg:quality=20"), (photos / "01.png", "Undo soft focus and JPEG blocking.", ""),
            (photos / "01.png", "Make it nice.", ""))))
    dataset = PairedDataset(CsvPairs(tmp_path / "a.csv"), None, [("jpeg", {})], training=False)
    assert [dataset.name_degradations(i) for i in range(4)] == ["jpeg", "rain jpeg", "jpeg gaussian_blur", ""]
