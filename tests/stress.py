"""The long attacks: python tests/stress.py [--minutes M] [WHAT ...]. Prints what was tried and what survived; exit status 1 if anything did not."""
import argparse
import itertools
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

import attacks
from data import dead_leaves
from test_engine import kill_and_load


def kills(folder, numbers):
    """kill -9 of training at random instants, one for each number."""
    for i in range(12):
        dead_leaves(96, np.random.default_rng(i)).save(folder / f"{i}.png")
    (folder / "photos.csv").write_text("image_path\n" + "".join(f"{i}.png\n" for i in range(12)))
    loaded = kill_and_load(folder / "photos.csv", folder / "run", len(numbers))
    print(f"every checkpoint loads; {len(loaded)} different steps were found, the run reached step {max(loaded)}")
    return Counter(survived=len(numbers)), []


ATTACKS = {"kills": (kills, 200), "tables": (attacks.tables, 5000), "pictures": (attacks.pictures, 5000), "weight_files": (attacks.weight_files, 2000)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"{', '.join(ATTACKS)} (default: all)")
    parser.add_argument("--minutes", type=float, help="go on with new cases until each attack has had that long, instead of its usual number")
    args = parser.parse_args()
    failed = False
    for name in args.what or ATTACKS:
        attack, count = ATTACKS[name]
        start, counts, wrong = time.monotonic(), Counter(), []
        for first in itertools.count(0, count):
            with tempfile.TemporaryDirectory() as folder:
                more, problems = attack(Path(folder), range(first, first + count))
            counts, wrong = counts + more, wrong + problems
            seconds = time.monotonic() - start
            if seconds > 60 * (args.minutes or 0):
                break
        print(f"{name}: {sum(counts.values())} cases in {seconds:.0f} s: {', '.join(f'{n} {outcome}' for outcome, n in counts.items())}; {len(wrong)} went wrong")
        print("\n".join(wrong))
        failed |= bool(wrong)
    sys.exit(failed)


if __name__ == "__main__":
    main()
