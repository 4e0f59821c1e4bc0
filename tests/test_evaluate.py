"""The restoring of pictures of any mode and size, in tiles or whole, and what is printed of it."""

import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
from data import CsvPairs, PairedDataset, seed_for, to_tensor
from degrade import UserError
from evaluate import Pipeline, draw_grid, psnr, restore_files, ssim
from model import PRESETS, Prompts, build_restorer
from test_degrade import display_p3
from test_train import call
from vae import PixelAE, blend_tiles, save_weights, tile_starts


def random_pixels(*shape, seed=1):
    """Uniform in [-1, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def levels(image):
    return np.asarray(image)


def random_tiny(seed):
    """Return a restorer of the tiny preset with random weights, also in the last layer."""
    restorer = build_restorer(PRESETS["tiny"])
    generator = torch.Generator().manual_seed(seed)
    restorer.sana.initialize(generator)
    torch.nn.init.normal_(restorer.sana.proj_out.weight, std=0.05, generator=generator)
    return restorer.eval()


def write_step(folder, step):
    """Write a checkpoint of random weights as a run of train.py leaves it; another a step."""
    tensors = random_tiny(step).state_dict()
    checkpoint = folder / f"step_{step:06d}"
    save_weights(tensors, checkpoint / "ema.safetensors")
    changed = {name: tensor * 1.1 for name, tensor in tensors.items()}
    save_weights(changed, checkpoint / "model.safetensors")
    config = {"step": step, "model": PRESETS["tiny"], "args": {}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    rows = {"trained": [], "held_out": [], "before": []}
    (checkpoint / "rows.json").write_text(json.dumps(rows))
    (folder / "latest").write_text(checkpoint.name)


@pytest.fixture(scope="module")
def tiny():
    return Pipeline(random_tiny(1), PixelAE(4), Prompts(PRESETS["tiny"]))


# --------------------------------------------------------------------------------------------------
# PSNR and SSIM.


def test_metrics_by_closed_form():
    a = torch.zeros(2, 3, 16, 16)
    assert psnr(a, a).tolist() == [100] * 2
    assert psnr(a, a + 0.02).tolist() == pytest.approx([40] * 2)
    c1 = 0.02**2  # two flat images: only the luminance term is left
    expected = (2 * 0.05 + c1) / (0.25 + 0.01 + c1)
    assert ssim(a - 0.5, a - 0.9).tolist() == pytest.approx([expected] * 2)
    with pytest.raises(ValueError, match="SSIM needs 11x11 pixels, not 10x16"):
        ssim(a[..., :10], a[..., :10])


# --------------------------------------------------------------------------------------------------
# Pipeline.restore: tensors.


def test_an_image_is_restored_alike_whatever_is_beside_it(tiny):
    pixels = random_pixels(3, 3, 21, 30)
    captions = ["", "Remove JPEG artifacts.", "Fix the gaussian noise and the blur."]
    together = tiny.restore(pixels, captions, steps=3, seed=5)
    assert together.shape == pixels.shape
    assert together.abs().max() <= 1
    for i in range(3):
        alone = tiny.restore(pixels[i : i + 1], captions[i : i + 1], steps=3, seed=5)
        assert torch.allclose(together[i], alone[0], atol=1e-5)
    other_seed = tiny.restore(pixels, captions, steps=3, seed=6)
    assert not torch.allclose(together, other_seed, atol=1e-3)


def test_restore_refuses_integers_and_values_outside_its_range(tiny):
    pixels = random_pixels(1, 3, 8, 8)
    refused = [
        torch.full((1, 3, 8, 8), 1, dtype=torch.uint8),
        pixels.index_fill(3, torch.tensor([5]), 1.001),  # one column alone
        torch.full((1, 3, 8, 8), math.nan),
    ]
    for wrong in refused:
        with pytest.raises(ValueError, match=r"give floats in \[-1, 1\]"):
            tiny.restore(wrong, [""])
    assert tiny.restore(torch.ones(1, 3, 8, 8), [""]).shape == (1, 3, 8, 8)


def test_guidance(tiny):
    """Both guidances by their formula, on one Euler step, which shows the velocity."""
    prompt = "Remove JPEG artifacts."
    how = {"captions": [prompt], "seed": 3}
    pixels = random_pixels(1, 3, 16, 16) / 2
    condition = tiny.autoencoder.encode(pixels)
    generator = torch.Generator().manual_seed(seed_for(3, 0, "restore"))
    noise = torch.randn(48, 4, 4, generator=generator)[None]

    def predict(text, condition):
        timestep = torch.full((1,), 1000.0)
        with torch.no_grad():
            return noise - tiny.restorer(noise, condition, timestep, *tiny.prompts([text]))

    full = predict(prompt, condition)
    restored = tiny.restore(pixels, **how)
    assert torch.allclose(restored, tiny.autoencoder.decode(full).clamp(-1, 1), atol=1e-5)
    plain = predict("", condition)
    blind = predict("", torch.zeros_like(condition))
    assert not torch.allclose(full, plain, atol=1e-3)
    guided = tiny.autoencoder.decode(blind + 1.3 * (plain - blind) + 2.5 * (full - plain))
    restored = tiny.restore(pixels, **how, guidance=2.5, condition_guidance=1.3)
    assert torch.allclose(restored, guided.clamp(-1, 1), atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Tiles.


def test_tiles_of_a_local_function_give_what_it_gives_untiled():
    """A 5x5 convolution: blended tiles agree but near their own borders."""
    x = torch.randn(1, 1, 100, 60, generator=torch.Generator().manual_seed(0))
    kernel = torch.randn(1, 1, 5, 5, generator=torch.Generator().manual_seed(1))
    whole = F.conv2d(x, kernel, padding=2)
    tiled = blend_tiles(lambda at: F.conv2d(x[at], kernel, padding=2), (100, 60), 48, 16)
    assert torch.allclose(tiled[..., 2:12, 2:12], whole[..., 2:12, 2:12], atol=1e-5)
    tripled = blend_tiles(lambda at: x[at] * 3, (100, 60), 48, 16)
    assert torch.allclose(tripled, x * 3, atol=1e-6)  # without borders, exactly


def test_tiles_cover_the_image_without_seams(tiny, monkeypatch):
    pixels = random_pixels(1, 3, 210, 333)
    whole = tiny.restore(pixels, [""])
    monkeypatch.setattr(evaluate, "PIXEL_TILE", 128)
    monkeypatch.setattr(evaluate, "OVERLAP", 32)
    assert tile_starts(334, 128, 32) == [0, 96, 192, 206]
    assert tile_starts(128, 128, 32) == [0]
    tiled = tiny.restore(pixels, [""])
    assert psnr(tiled, whole) > 30
    assert not torch.equal(tiled, whole)


# --------------------------------------------------------------------------------------------------
# Pipeline(picture) and evaluate.py: pictures of any size and mode.


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(33, 22), (1, 1), (7, 300)])
def test_modes_and_sizes_are_kept(tiny, photo, mode, size):
    image = photo.resize(size).convert(mode)
    if mode.endswith("A"):
        image.putalpha(Image.linear_gradient("L").resize(size))
    restored = tiny(image, steps=1)
    assert restored.mode == mode
    assert restored.size == size
    if mode.endswith("A"):
        assert np.array_equal(levels(restored)[..., -1], levels(image)[..., -1])
    if size != (1, 1):
        assert not np.array_equal(levels(restored), levels(image))


def test_paths_images_and_arrays_are_restored_as_evaluate_does(photo, tmp_path, monkeypatch):
    small = photo.resize((40, 28))
    palette = small.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    pictures = {"L": small.convert("L"), "RGB": small, "RGBA": palette}  # by the mode restored
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    for mode, picture in pictures.items():
        picture.save(before / f"{mode}.png")
    write_step(tmp_path / "run", 1)
    command = ["evaluate.py", "--checkpoint", tmp_path / "run", "--input", before]
    command += ["--output", after, "--prompt", "Remove JPEG artifacts.", "--steps", 2]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    evaluate.main()
    pipeline = Pipeline.load(tmp_path / "run")
    for mode, picture in pictures.items():
        path = before / f"{mode}.png"
        expected = Image.open(after / path.name)
        assert (expected.mode, expected.size) == (mode, small.size)
        given = [path, str(path), Image.open(path)]
        if mode != "RGBA":
            given.append(np.asarray(picture))  # uint8 [H, W] or [H, W, 3]
        for one in given:
            restored = pipeline(one, "Remove JPEG artifacts.", steps=2)
            assert restored.mode == mode
            assert np.array_equal(levels(restored), levels(expected))


def test_a_device_may_be_an_object(pipeline_folder, photos_csv, photo, tmp_path):
    flags = ["--data", photos_csv, "--model", pipeline_folder, "--resolution", 32, "--steps", 1]
    call("train.py", *flags, "--batch_size", 1, "--device", "cpu", "--out", "run", cwd=tmp_path)
    by_name, by_object = (Pipeline.load(tmp_path / "run", d) for d in ("cpu", torch.device("cpu")))
    small = photo.resize((64, 32))
    restored = [pipeline(small, "Remove noise.", steps=1) for pipeline in (by_name, by_object)]
    assert restored[0].tobytes() == restored[1].tobytes()


def test_what_is_restored_is_srgb_and_upright(tiny, photo, tmp_path, capsys):
    small = photo.resize((20, 14))
    red, green, blue = small.split()
    swapped = Image.merge("RGB", (green, red, blue))
    turned = Image.Exif()
    turned[0x0112] = 6
    small.save(tmp_path / "plain.png")
    swapped.save(tmp_path / "rgb.png", icc_profile=display_p3())
    swapped.save(tmp_path / "turned.png", exif=turned, icc_profile=display_p3())
    small.convert("CMYK").save(tmp_path / "cmyk.tif")
    names = "plain.png", "rgb.png", "turned.png", "cmyk.tif"
    work = [(tmp_path / name, tmp_path / "out" / name) for name in names]
    assert restore_files(tiny, work) == 0
    said = capsys.readouterr().err
    assert f"2 pictures, such as {tmp_path / 'rgb.png'}: its colour profile is" in said
    assert f"{tmp_path / 'cmyk.tif'}: CMYK without a usable colour profile" in said
    plain, rgb, turned, cmyk = (Image.open(out) for _, out in work)
    assert abs(levels(rgb) - levels(plain)).max() <= 2
    assert turned.size == (14, 20)
    assert cmyk.mode == "RGB"
    in_memory = tiny(Image.open(tmp_path / "turned.png"))
    assert np.array_equal(levels(in_memory), levels(turned))
    for picture in (rgb, turned, cmyk):
        assert "icc_profile" not in picture.info
        assert 0x0112 not in picture.getexif()


# --------------------------------------------------------------------------------------------------
# What is measured and drawn.


def test_grids_show_the_centre_of_large_small_and_narrow_pictures(photo):
    small, narrow = photo.resize((20, 10)), photo.resize((6, 200))
    grid = draw_grid([[("a", photo), ("b", photo)], [("c", small), ("d", narrow)]], tile=64)
    assert grid.size == (2 * 68, 2 * 82)
    first = grid.crop((0, 16, 64, 80))
    assert np.array_equal(levels(first), levels(photo.crop((224, 224, 288, 288))))
    assert np.array_equal(levels(grid.crop((0, 98, 20, 108))), levels(small))
    centre = narrow.crop((0, 68, 6, 132))
    assert np.array_equal(levels(grid.crop((68, 98, 74, 162))), levels(centre))
    assert levels(grid.crop((20, 98, 64, 162))).min() == 255


def test_what_was_done_to_an_image_is_read_from_recipe_or_column(photos, tmp_path):
    clean, condition = photos / "00.png", photos / "01.png"
    lines = [
        "image_path,condition_image_path,degradation",
        f"{clean},,",
        f"{clean},{condition},jpeg:quality=20 gaussian_blur:kernel=3",
        f"{clean},{condition},",
    ]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    dataset = PairedDataset(CsvPairs(tmp_path / "a.csv"), None, [("jpeg", {})], training=False)
    named = [dataset.name_degradations(i) for i in range(3)]
    assert named == [["jpeg"], ["jpeg", "gaussian_blur"], []]


def test_tiles_fit_blocks_of_three_pixels():
    """1024 and 64 are no multiples of 3: tiles are cut where blocks end."""
    config = PRESETS["tiny"] | {"autoencoder": {"kind": "pixels", "factor": 3}}
    config["sana"] = config["sana"] | {"in_channels": 27, "out_channels": 27}
    restorer = build_restorer(config)
    restorer.sana.initialize(torch.Generator().manual_seed(0))  # its answer is its input
    pipeline = Pipeline(restorer.eval(), PixelAE(3), Prompts(config))
    pixels = torch.rand(1, 3, 1200, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.allclose(pipeline.restore(pixels, [""]), pixels, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Files that are restored.


def test_a_grey_picture_is_coloured_if_training_did_so(tiny, photo):
    grey = photo.resize((20, 14)).convert("L")
    assert tiny(grey).mode == "L"
    coloring = Pipeline(tiny.restorer, tiny.autoencoder, tiny.prompts, keeps_grey=False)
    restored = coloring(grey)
    assert restored.mode == "RGB"
    assert np.ptp(levels(restored), axis=2).max() > 0
    grey.putalpha(grey.copy())
    assert coloring(grey).mode == "RGBA"
    item = {"condition": to_tensor(grey), "grey": True}
    for pipeline, channels in ((tiny, 1), (coloring, 3)):
        restored = evaluate.restoring_method(pipeline, [""], "cpu")(0, item)
        assert len(restored.flatten(1).unique(dim=0)) == channels


def test_out_of_memory_on_one_picture_does_not_stop_the_others(tiny, photo, tmp_path, capsys):
    work = []
    for i in range(3):
        photo.resize((20 + i, 14)).save(tmp_path / f"{i}.png")
        work.append((tmp_path / f"{i}.png", tmp_path / f"out/{i}.png"))

    class Short(Pipeline):
        error = None

        def __call__(self, picture, **sampling):
            if picture.width == 21:
                raise self.error
            return super().__call__(picture, **sampling)

    pipeline = Short(tiny.restorer, tiny.autoencoder, tiny.prompts)
    for pipeline.error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert restore_files(pipeline, work, overwrite=True) == 1
        assert f"failed: {work[1][0]}: out of memory" in capsys.readouterr().err
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "2.png"]
        with pytest.raises(UserError, match="1.png: out of memory"):
            restore_files(pipeline, work[1:2])
    pipeline.error = RuntimeError("a mistake in this program")
    with pytest.raises(RuntimeError):
        restore_files(pipeline, work, overwrite=True)


def test_where_restored_pictures_go(photo, tmp_path, capsys):
    """Formats that would lose something become PNG; two files never become one."""
    small = photo.resize((20, 14))
    (tmp_path / "in").mkdir()
    small.save(tmp_path / "in/a.gif")
    small.save(tmp_path / "in/b.jpg")
    small.convert("LA").save(tmp_path / "c.png")
    (tmp_path / "in/d.png").write_bytes(b"damaged")
    out = tmp_path / "out"
    work = evaluate.list_work([tmp_path / "in", tmp_path / "c.png"], out)
    assert [path.name for _, path in work] == ["a.png", "b.jpg", "d.png", "c.png"]
    assert f"{out / 'a.gif'}: .gif: not a format" in capsys.readouterr().err
    for target, name in (("o.jpg", "o.png"), ("o", "o.png"), ("o.webp", "o.webp")):
        [(_, path)] = evaluate.list_work([tmp_path / "c.png"], tmp_path / target)
        assert path == tmp_path / name
    small.save(tmp_path / "in/a.png")
    with pytest.raises(UserError, match="two inputs have the same name"):
        evaluate.list_work([tmp_path / "in"], out)


def test_a_picture_too_large_for_its_format_is_refused_before_the_work(tiny, tmp_path, monkeypatch):
    Image.new("L", (8200, 2)).save(tmp_path / "a.png")
    pipeline = Pipeline(tiny.restorer, tiny.autoencoder, tiny.prompts, enlarge=2)
    monkeypatch.setattr(pipeline, "restore", None)
    with pytest.raises(UserError, match="o.webp: WEBP holds sides of at most 16,383 pixels, not"):
        restore_files(pipeline, [(tmp_path / "a.png", tmp_path / "o.webp")])
