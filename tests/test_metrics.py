"""The metrics against their peers, on photographs and random weights of the peers' own classes."""
import math

import lpips
import numpy as np
import pytest
import pytorch_fid.fid_score
import pytorch_fid.inception
import torch
import torchmetrics.functional.image
from PIL import Image
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from data import dead_leaves, to_image, to_tensor
from degrade import UserError
from evaluate import FID, LPIPS, Inception, Metrics, bootstrap, frechet_distance, luma, psnr, ssim
from vae import read_published

SSIM = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)


def pair(photo, size, sigma, seed=0):
    """A part of the photo and a noisy copy, as uint8 [H, W, 3] and as tensors [1, 3, H, W]."""
    rng = np.random.default_rng(seed)
    left, top = (rng.integers(0, 513 - side) for side in size)
    clean = np.asarray(photo.crop((left, top, left + size[0], top + size[1])))
    noisy = np.clip(np.rint(clean + rng.normal(0, sigma, clean.shape)), 0, 255).astype(np.uint8)
    return clean, noisy, *(to_tensor(Image.fromarray(x))[None] for x in (clean, noisy))


def test_psnr_and_ssim_are_scikit_images_on_200_sizes_and_contents(photo):
    rng = np.random.default_rng(0)
    worst = 0
    for seed in range(200):
        size, sigma = rng.integers(11, 160, 2), 10 ** rng.uniform(-0.5, 2.5)
        clean, noisy, a, b = pair(photo, size, sigma, seed)
        if np.array_equal(clean, noisy):
            assert psnr(a, b) == math.inf and ssim(a, b) == 1
            continue
        worst = max(worst, abs(psnr(a, b).item() - peak_signal_noise_ratio(clean, noisy)),
                    abs(ssim(a, b).item() - structural_similarity(clean, noisy, data_range=255, channel_axis=2, **SSIM)))
    assert worst < 1e-5  # of float32 pixels


def test_psnr_and_ssim_are_torchmetrics(photo):
    _, _, a, b = pair(photo, (200, 151), 25)
    a, b = a.double(), b.double()
    assert psnr(a, b).item() == pytest.approx(torchmetrics.functional.image.peak_signal_noise_ratio(a, b, data_range=(-1.0, 1.0)).item(), abs=1e-6)
    # it counts the borders too, where it mirrors the picture
    padded = (torch.nn.functional.pad(x, (5, 5, 5, 5), mode="reflect") for x in (a, b))
    theirs = torchmetrics.functional.image.structural_similarity_index_measure((a + 1) / 2, (b + 1) / 2, data_range=1.0)
    assert ssim(*padded).item() == pytest.approx(theirs.item(), abs=1e-6)
    assert ssim(a.float(), b.float()).item() == pytest.approx(ssim(a, b).item(), abs=1e-6)


def test_luma_is_scikit_images(photo):
    clean, noisy, a, b = pair(photo, (97, 64), 25)
    y = [rgb2ycbcr(x)[..., 0] for x in (clean, noisy)]
    assert np.allclose((luma(a)[0, 0].numpy() + 1) * 127.5, y[0], atol=1e-4)
    assert psnr(luma(a), luma(b)).item() == pytest.approx(peak_signal_noise_ratio(*y, data_range=255), abs=1e-5)
    assert ssim(luma(a), luma(b)).item() == pytest.approx(structural_similarity(*y, data_range=255, **SSIM), abs=1e-6)
    metrics = Metrics(("psnr", "ssim"), y_channel=True)
    assert metrics(a[0], b[0], "x")["psnr"] == pytest.approx(peak_signal_noise_ratio(*y, data_range=255), abs=1e-5)


def test_golden_numbers():
    """Of a procedural picture and of simple changes to it, as scikit-image 0.26 gave them."""
    clean = dead_leaves(96, np.random.default_rng(7))
    other = np.asarray(clean).astype(int)
    changed = {"darker": other * 3 // 4, "shifted": np.roll(other, 1, 1), "grey": np.full_like(other, 128)}
    for name, value in GOLDEN.items():
        a, b = (to_tensor(x)[None] for x in (clean, Image.fromarray(changed[name].astype(np.uint8))))
        assert (psnr(a, b).item(), ssim(a, b).item()) == pytest.approx(value, abs=1e-5), name


GOLDEN = {"darker": (15.168144, 0.930423), "shifted": (20.724615, 0.739467), "grey": (10.98546, 0.253242)}


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_that_of_its_authors(net, photo, published, monkeypatch):
    trunk = read_published(net, published[net])
    ours = LPIPS(trunk, read_published(f"{net} heads", published[f"{net} heads"]), net)
    theirs = lpips.LPIPS(net=net, pretrained=True, pnet_rand=True, verbose=False).eval()
    for name, t in trunk.items():  # their slices hold torchvision's layers under their old numbers
        layer = name.split(".")[1]
        module = next(getattr(s, layer) for s in (getattr(theirs.net, f"slice{i}") for i in range(1, 6)) if hasattr(s, layer))
        getattr(module, name.split(".")[2]).data.copy_(t)
    for size, sigma in (((64, 64), 25), ((201, 97), 10), ((130, 255), 60)):
        _, _, a, b = pair(photo, size, sigma)
        with torch.no_grad():
            expected = theirs(a, b).flatten()
        assert expected.item() > 1e-3 and torch.allclose(ours(a, b), expected, rtol=1e-5, atol=1e-6)
    a = torch.cat([pair(photo, (80, 80), 9, seed)[2] for seed in range(3)])
    assert ours(a, a).tolist() == [0, 0, 0] and torch.allclose(ours(a, a.flip(3))[1:2], ours(a[1:2], a[1:2].flip(3)), rtol=1e-4)


@pytest.fixture(scope="module")
def inceptions(published):
    weights = read_published("inception", published["inception"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: weights)
        return Inception(weights), pytorch_fid.inception.InceptionV3([3]).eval()


def test_inception_is_that_of_pytorch_fid(inceptions, photo):
    ours, theirs = inceptions
    for size in ((299, 299), (64, 100), (512, 301)):
        x = torch.cat([pair(photo, size, 25, seed)[3] for seed in range(2)])
        with torch.no_grad():
            expected = theirs((x + 1) / 2)[0].flatten(1)
        assert expected.std() > 1e-2 and (ours(x) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_fid_is_that_of_pytorch_fid_with_fewer_images_than_features(inceptions, photo):
    """24 images in batches of 5: covariances of rank 23, where theirs adds an epsilon if the root is singular."""
    ours, theirs = inceptions
    fid, features = FID(ours), {"clean": [], "noisy": []}
    clean, noisy = (torch.cat(x) for x in zip(*(pair(photo, (75, 75), 50, seed)[2:] for seed in range(24))))
    for which, images in (("clean", clean), ("noisy", noisy)):
        for batch in images.split(5):
            fid.add(which, batch)
            with torch.no_grad():
                features[which].append(theirs((batch + 1) / 2)[0].flatten(1).double().numpy())
    sets = [np.concatenate(x) for x in features.values()]
    basis = np.linalg.qr(np.concatenate(sets).T)[0]  # of the 48 directions in which anything lies: the same distance, and a root of 48x48, not of 2048x2048
    (m1, s1), (m2, s2) = (((x @ basis).mean(0), np.cov(x @ basis, rowvar=False)) for x in sets)
    expected = pytorch_fid.fid_score.calculate_frechet_distance(m1, s1, m2, s2)
    assert fid.distance("clean", "noisy") == pytest.approx(expected, rel=1e-3) and expected > 1
    assert np.allclose(fid.sets["noisy"][1], sets[1].mean(0), rtol=1e-3) and fid.sets["noisy"][0] == 24
    assert fid.distance("clean", "clean") == pytest.approx(0, abs=1e-6)
    fid.add("one", clean[:1])
    assert math.isnan(fid.distance("clean", "one"))


@pytest.mark.parametrize("count", [40, 64, 200])
def test_frechet_distance_is_scipys(count):
    """64 features: fewer samples than features, as many, and more."""
    rng = np.random.default_rng(count)
    mix = rng.normal(size=(64, 64)) / 8
    sets = [rng.normal(size=(count, 64)) @ mix + 0.1, rng.normal(size=(count, 64)) * 1.5]
    statistics = [(x.mean(0), np.cov(x, rowvar=False)) for x in sets]
    ours = frechet_distance(*(torch.from_numpy(x) for pair in statistics for x in pair))
    assert ours == pytest.approx(pytorch_fid.fid_score.calculate_frechet_distance(*statistics[0], *statistics[1]), rel=1e-3)
    same = [torch.from_numpy(x) for x in statistics[0]]
    assert frechet_distance(*same, *same) == pytest.approx(0, abs=1e-9 if count > 64 else 1e-5)


def test_frechet_distance_by_closed_form():
    """Diagonal covariances commute: |m1 - m2|^2 + sum (s1 - s2)^2."""
    m, s = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([4.0, 9.0, 0.0]).double()
    assert frechet_distance(m, s.diag(), m + 1, torch.diag(torch.tensor([1.0, 1.0, 4.0]).double())) == pytest.approx(3 + 1 + 4 + 4)


def test_weights_that_are_something_else_are_refused(published, tmp_path, monkeypatch):
    alex, vgg, heads = (read_published(name, published[name]) for name in ("alex", "vgg", "alex heads"))
    for arguments in ((vgg, heads), (alex, alex), (alex, read_published("vgg heads", published["vgg heads"]))):
        with pytest.raises(UserError, match="not the weights of LPIPS"):
            LPIPS(*arguments)(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))
    for weights in (alex, {"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}):
        with pytest.raises(UserError, match="Inception"):
            Inception(weights)
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(UserError, match="junk.pth"):
        read_published("alex", tmp_path / "junk.pth")

    class Attack:
        def __reduce__(self):
            return print, ("unpickled",)
    torch.save({"x": Attack()}, tmp_path / "attack.pth")
    with pytest.raises(UserError, match="attack.pth"):
        read_published("alex", tmp_path / "attack.pth")


def test_without_weights_the_other_metrics_go_on(photo, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    metrics = Metrics(("psnr", "ssim", "lpips", "fid"))
    assert metrics.missing.keys() == {"lpips", "fid"} and "no route to host" in metrics.missing["fid"] and metrics.fid is None
    clean, _, a, b = pair(photo, (64, 64), 25)
    values = metrics(a[0], b[0], "x")
    assert math.isnan(values["lpips"]) and values["psnr"] == psnr(b, a).item()


def test_what_is_scored_is_what_is_saved(photo):
    """Half a level above the clean image rounds to it."""
    a = to_tensor(photo.resize((64, 64)))
    assert Metrics()(a, a + 0.3 / 127.5, "x") == {"psnr": math.inf, "ssim": 1.0}
    assert Metrics()(a, torch.full_like(a, 3.0), "x")["psnr"] == pytest.approx(psnr(to_tensor(to_image(torch.ones_like(a)))[None], a[None]).item())


def test_the_bootstrap_covers_the_mean_19_times_of_20():
    rng = np.random.default_rng(0)
    hits = sum(low < 30 < high for low, high in (bootstrap((30 + 2 * rng.standard_normal(40)).tolist(), 300) for _ in range(200)))
    assert 178 <= hits <= 199
    assert bootstrap([1.0, 2.0, 3.0]) == bootstrap([1.0, math.inf, 2.0, 3.0]) and all(map(math.isnan, bootstrap([5.0])))
