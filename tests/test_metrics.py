"""The metrics against their peers, on photographs and random weights of the peers' own classes."""

import math
from pathlib import Path

import lpips
import numpy as np
import pytest
import pytorch_fid.fid_score
import pytorch_fid.inception
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional import image as torchmetrics

from data import to_image, to_tensor
from degrade import UserError
from evaluate import FID, INCEPTION, LPIPS, LPIPS_HEADS, LPIPS_TRUNK, Inception, Metrics
from evaluate import bootstrap, frechet_distance, psnr, read_published, ssim

SSIM = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


def pair(photo, size, sigma, seed=0):
    """A part of the photo and a noisy copy, as uint8 [H, W, 3] and as tensors [1, 3, H, W]."""
    rng = np.random.default_rng(seed)
    left, top = (rng.integers(0, 513 - side) for side in size)
    clean = np.asarray(photo.crop((left, top, left + size[0], top + size[1])))
    noisy = np.rint(clean + rng.normal(0, sigma, clean.shape))
    noisy = np.clip(noisy, 0, 255).astype(np.uint8)
    a = to_tensor(Image.fromarray(clean))[None]
    b = to_tensor(Image.fromarray(noisy))[None]
    return clean, noisy, a, b


# --------------------------------------------------------------------------------------------------
# PSNR and SSIM.


def test_psnr_and_ssim_are_scikit_images_on_200_sizes_and_contents(photo):
    rng = np.random.default_rng(0)
    worst = 0
    for seed in range(200):
        size, sigma = rng.integers(11, 160, 2), 10 ** rng.uniform(-0.5, 2.5)
        clean, noisy, a, b = pair(photo, size, sigma, seed)
        if np.array_equal(clean, noisy):
            assert psnr(a, b) == 100
            assert ssim(a, b) == 1
            continue
        expected_psnr = peak_signal_noise_ratio(clean, noisy)
        expected_ssim = structural_similarity(clean, noisy, data_range=255, channel_axis=2, **SSIM)
        worst = max(worst, abs(psnr(a, b).item() - expected_psnr))
        worst = max(worst, abs(ssim(a, b).item() - expected_ssim))
    assert worst < 1e-5  # of float32 pixels


def test_psnr_and_ssim_are_torchmetrics(photo):
    _, _, a, b = pair(photo, (200, 151), 25)
    a, b = a.double(), b.double()
    expected = torchmetrics.peak_signal_noise_ratio(a, b, data_range=(-1.0, 1.0))
    assert psnr(a, b).item() == pytest.approx(expected.item(), abs=1e-6)
    expected = torchmetrics.structural_similarity_index_measure(
        (a + 1) / 2, (b + 1) / 2, data_range=1.0
    )
    # it counts the borders too, where it mirrors the picture
    padded_a = F.pad(a, (5, 5, 5, 5), mode="reflect")
    padded_b = F.pad(b, (5, 5, 5, 5), mode="reflect")
    assert ssim(padded_a, padded_b).item() == pytest.approx(expected.item(), abs=1e-6)


# --------------------------------------------------------------------------------------------------
# LPIPS.


def lpips_of_its_authors(trunk):
    """Fill their network: its slices hold torchvision's layers under their old numbers."""
    theirs = lpips.LPIPS(net="alex", pretrained=True, pnet_rand=True, verbose=False).eval()
    layers = {}
    for i in range(1, 6):
        layers.update(getattr(theirs.net, f"slice{i}").named_children())
    for name, tensor in trunk.items():
        _, number, part = name.split(".")
        getattr(layers[number], part).data.copy_(tensor)
    return theirs


def test_lpips_is_that_of_its_authors(photo, published):
    trunk = read_published(LPIPS_TRUNK, published["alex"])
    ours = LPIPS(trunk, read_published(LPIPS_HEADS, published["alex heads"]))
    theirs = lpips_of_its_authors(trunk)
    for size, sigma in (((64, 64), 25), ((201, 97), 10), ((130, 255), 60)):
        _, _, a, b = pair(photo, size, sigma)
        with torch.no_grad():
            expected = theirs(a, b).flatten()
        assert expected.item() > 1e-3
        assert torch.allclose(ours(a, b), expected, rtol=1e-5, atol=1e-6)
    several = torch.cat([pair(photo, (80, 80), 9, seed)[2] for seed in range(3)])
    mirrored = several.flip(3)
    assert ours(several, several).tolist() == [0, 0, 0]
    one = ours(several[1:2], mirrored[1:2])
    assert torch.allclose(ours(several, mirrored)[1:2], one, rtol=1e-4)


# --------------------------------------------------------------------------------------------------
# FID.


def both_inceptions(weights):
    """Return this project's network and pytorch-fid's."""
    with pytest.MonkeyPatch.context() as patch:
        name = "load_state_dict_from_url"
        patch.setattr(pytorch_fid.inception, name, lambda *_, **__: weights)
        theirs = pytorch_fid.inception.InceptionV3([3]).eval()
    return Inception(weights), theirs


@pytest.fixture(scope="module")
def inceptions(published):
    return both_inceptions(read_published(INCEPTION, published["inception"]))


def test_inception_is_that_of_pytorch_fid(inceptions, photo):
    ours, theirs = inceptions
    for size in ((299, 299), (64, 100), (512, 301)):
        x = torch.cat([pair(photo, size, 25, seed)[3] for seed in range(2)])
        with torch.no_grad():
            expected = theirs((x + 1) / 2)[0].flatten(1)
        assert expected.std() > 1e-2
        assert (ours(x) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_fid_is_that_of_pytorch_fid_with_fewer_images_than_features(inceptions, photo):
    """9 images in batches of 4: covariances of rank 8."""
    ours, theirs = inceptions
    fid = FID(ours)
    pairs = [pair(photo, (75, 75), 50, seed) for seed in range(9)]
    clean = torch.cat([tensors[2] for tensors in pairs])
    noisy = torch.cat([tensors[3] for tensors in pairs])
    features = {}
    for name, images in (("clean", clean), ("noisy", noisy)):
        found = []
        for batch in images.split(4):
            fid.add(name, batch)
            with torch.no_grad():
                found.append(theirs((batch + 1) / 2)[0].flatten(1).double().numpy())
        features[name] = np.concatenate(found)
    # in the 18 directions in which anything lies: a root of 18x18, not of 2048x2048
    basis = np.linalg.qr(np.concatenate([features["clean"], features["noisy"]]).T)[0]
    statistics = []
    for x in (features["clean"] @ basis, features["noisy"] @ basis):
        statistics += [x.mean(0), np.cov(x, rowvar=False)]
    expected = pytorch_fid.fid_score.calculate_frechet_distance(*statistics)
    assert expected > 1
    assert fid.distance("clean", "noisy") == pytest.approx(expected, rel=1e-3)
    count, mean, _ = fid.sets["noisy"]
    assert count == 9
    assert np.allclose(mean, features["noisy"].mean(0), rtol=1e-3)
    fid.add("one", clean[:1])
    assert math.isnan(fid.distance("clean", "one"))


@pytest.mark.parametrize("count", [40, 64, 200])
def test_frechet_distance_is_scipys(count):
    """64 features: fewer samples than features, as many, and more."""
    rng = np.random.default_rng(count)
    mix = rng.normal(size=(64, 64)) / 8
    first = rng.normal(size=(count, 64)) @ mix + 0.1
    second = rng.normal(size=(count, 64)) * 1.5
    statistics = []
    for x in (first, second):
        statistics += [x.mean(0), np.cov(x, rowvar=False)]
    expected = pytorch_fid.fid_score.calculate_frechet_distance(*statistics)
    mean_a, cov_a, mean_b, cov_b = (torch.from_numpy(x) for x in statistics)
    distance = frechet_distance(mean_a, cov_a, mean_b, cov_b)
    assert distance == pytest.approx(expected, rel=1e-3)
    allowed = 1e-9 if count > 64 else 1e-5
    assert frechet_distance(mean_a, cov_a, mean_a, cov_a) == pytest.approx(0, abs=allowed)


def test_frechet_distance_by_closed_form():
    """Diagonal covariances commute: |m1 - m2|^2 + sum (s1 - s2)^2."""
    mean = torch.tensor([1.0, 2.0, 3.0]).double()
    cov_a = torch.diag(torch.tensor([4.0, 9.0, 0.0])).double()
    cov_b = torch.diag(torch.tensor([1.0, 1.0, 4.0])).double()
    distance = frechet_distance(mean, cov_a, mean + 1, cov_b)
    assert distance == pytest.approx(3 + 1 + 4 + 4)


# --------------------------------------------------------------------------------------------------
# Weights, and what is scored.


def test_weights_that_do_not_fit_are_refused(published):
    trunk = read_published(LPIPS_TRUNK, published["alex"])
    heads = read_published(LPIPS_HEADS, published["alex heads"])
    vgg = Path(lpips.__file__).parent / "weights/v0.1/vgg.pth"
    less = dict(list(trunk.items())[1:])
    for weights in ((less, heads), (trunk, trunk), (trunk, read_published(LPIPS_HEADS, vgg))):
        with pytest.raises(UserError, match="not the weights of LPIPS"):
            LPIPS(*weights)
    with pytest.raises(UserError, match="not the weights of FID's Inception"):
        Inception(trunk)


def test_without_weights_the_other_metrics_go_on(photo, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    metrics = Metrics(["psnr", "ssim", "lpips", "fid"])
    for name in ("lpips", "fid"):
        assert "no route to host" in metrics.missing[name]
    _, _, a, b = pair(photo, (64, 64), 25)
    scores = metrics(a[0], b[0], "x")
    assert math.isnan(scores["lpips"])
    assert scores["psnr"] == psnr(b, a).item()


def test_what_is_scored_is_what_is_saved(photo):
    """0.3 levels above the clean image round to it; what is beyond white is white."""
    clean = to_tensor(photo.resize((64, 64)))
    metrics = Metrics(["psnr", "ssim"])
    assert metrics(clean, clean + 0.3 / 127.5, "x") == {"psnr": 100.0, "ssim": 1.0}
    white = to_tensor(to_image(torch.ones_like(clean)))
    expected = psnr(white[None], clean[None]).item()
    beyond = metrics(clean, torch.full_like(clean, 3.0), "x")
    assert beyond["psnr"] == pytest.approx(expected)


def test_the_bootstrap_covers_the_mean_19_times_of_20():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        values = 30 + 2 * rng.standard_normal(40)
        low, high = bootstrap(values.tolist(), 300)
        hits += low < 30 < high
    assert 178 <= hits <= 199
    assert all(math.isnan(end) for end in bootstrap([5.0]))
