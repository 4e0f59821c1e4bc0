import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


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
