"""Fixtures that several test files share: a photograph, small pictures, toy weights."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

torch.set_num_threads(1)  # tests run beside other work, where more threads spin and wait

# torchvision, which peers import, has no build for CPUs of this torch: it cannot be imported
# without the two operators that it describes.
OPERATORS = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(scope="session")
def photo():
    """A real photograph, 512x512 RGB, that ships inside scikit-image's wheel."""
    from skimage import data

    return Image.fromarray(data.astronaut())


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of twelve 96x80 procedural pictures."""
    from data import dead_leaves

    folder = tmp_path_factory.mktemp("photos")
    for i in range(12):
        picture = dead_leaves(96, np.random.default_rng(i))
        picture.crop((0, 0, 96, 80)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def photos_csv(photos, tmp_path_factory):
    """They as --data: eleven to train on and one to validate with.

    The demo would draw hundreds and validate with eight large ones.
    """
    path = tmp_path_factory.mktemp("csv") / "photos.csv"
    lines = ["image_path"]
    for photo in sorted(photos.glob("*.png")):
        lines.append(str(photo))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def pipeline():
    """A toy SANA pipeline with random weights, of diffusers' and transformers' classes."""
    from pipeline import tiny_pipeline

    return tiny_pipeline()


@pytest.fixture(scope="session")
def pipeline_folder(pipeline, tmp_path_factory):
    """The same as diffusers saves it: the layout of the hub."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Files in the layout of the published ones -> {"alex", "alex heads", "inception": path}.

    Of the peers' own classes with random weights; LPIPS' heads are the real ones.
    """
    import lpips
    import torchvision

    from pipeline import random_inception

    folder = tmp_path_factory.mktemp("published")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        alex = torchvision.models.alexnet(weights=None)
        inception = random_inception()
    features = {}
    for name, tensor in alex.state_dict().items():
        if "classifier" not in name:
            features[name] = tensor
    torch.save(features, folder / "alex.pth")
    torch.save(inception.state_dict(), folder / "inception.pth")
    return {
        "alex": folder / "alex.pth",
        "alex heads": Path(lpips.__file__).parent / "weights/v0.1/alex.pth",
        "inception": folder / "inception.pth",
    }
