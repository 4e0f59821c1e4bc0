"""The long attacks: python tests/stress.py [--kills 200]. Prints what was tried and what survived."""
import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

import conftest  # noqa: F401, puts the project on the path
from data import dead_leaves
from test_engine import kill_and_load

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--kills", type=int, default=200)
args = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    folder, start = Path(folder), time.monotonic()
    for i in range(12):
        dead_leaves(96, np.random.default_rng(i)).save(folder / f"{i}.png")
    (folder / "photos.csv").write_text("image_path\n" + "".join(f"{i}.png\n" for i in range(12)))
    loaded = kill_and_load(folder / "photos.csv", folder / "run", args.kills)
    print(f"kill -9 of training at {args.kills} random instants: every checkpoint loads; {len(loaded)} different steps were found, "
          f"the run reached step {max(loaded)} ({time.monotonic() - start:.0f} s)")
