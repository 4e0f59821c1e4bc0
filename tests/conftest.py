import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# torchvision, which peers import, has no build for CPUs of this torch: without the two operators it describes it cannot be imported
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
        dead_leaves(96, np.random.default_rng(i)).crop((0, 0, 96, 80)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def photos_csv(photos, tmp_path_factory):
    """They as --data: eleven to train on and one to validate with, where the demo would draw hundreds and validate with eight large ones."""
    path = tmp_path_factory.mktemp("csv") / "photos.csv"
    path.write_text("image_path\n" + "".join(f"{photo}\n" for photo in sorted(photos.glob("*.png"))))
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
    """Files in the layout of the published ones, of the peers' own classes with random weights; LPIPS' heads are the real ones.
    -> {"alex", "alex heads", "vgg", "vgg heads", "inception": path}"""
    import lpips
    import torchvision
    from pipeline import random_inception
    folder, heads = tmp_path_factory.mktemp("published"), Path(lpips.__file__).parent / "weights/v0.1"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = {"alex": torchvision.models.alexnet(weights=None), "vgg": torchvision.models.vgg16(weights=None), "inception": random_inception()}
    for name, model in models.items():
        torch.save({key: t for key, t in model.state_dict().items() if "classifier" not in key}, folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in models} | {f"{net} heads": heads / f"{net}.pth" for net in ("alex", "vgg")}
