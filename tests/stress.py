"""The long attacks: prints what was tried and what survived.

    python tests/stress.py                                     all: about an hour and a half
    python tests/stress.py tables weights kills --share 0.1

Ends with an error where something did not survive.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

import attacks  # puts the project on the path
import endurance
from data import dead_leaves

# Each takes an empty folder, a number of times, and what make_inputs returns -> what survived.


def tables(folder, count, inputs):
    return fuzz(attacks.tables, folder, count)


def pictures(folder, count, inputs):
    return fuzz(attacks.pictures, folder, count)


def weights(folder, count, inputs):
    return fuzz(attacks.weight_files, folder, count)


def fuzz(attack, folder, count):
    counts, wrong = attack(folder, range(count))
    assert not wrong, "\n".join(wrong[:20])
    return f"{counts['worked']} worked, {counts['refused']} refused in one line"


def training(folder, count, inputs):
    steps = endurance.kill_training(inputs["csv"], folder, count)
    seen = f"{len(steps)} different steps were seen, the run reached step {max(steps)}"
    return f"{count} times killed with -9: all checkpoints load, {seen}"


def caching(folder, count, inputs):
    return describe_kills(*endurance.kill_caching(inputs["csv"], folder, count))


def pairs(folder, count, inputs):
    return describe_kills(*endurance.kill_pairs(inputs["photos"], folder, count))


def export(folder, count, inputs):
    return describe_kills(*endurance.kill_export(inputs["run"], folder, count))


def evaluation(folder, count, inputs):
    killed, ended = endurance.kill_evaluation(inputs["run"], inputs["photos"], folder, count)
    return describe_kills(killed, ended)


def describe_kills(killed, ended):
    nothing = "nothing half-made was taken for whole, and the rest was made"
    return f"{killed} times killed with -9, {ended} times ended; {nothing}"


def long(folder, count, inputs):
    early, late, before, after = endurance.long_training(folder, count)
    assert late < early + 0.1
    memory = f"{early:.3f} GB of memory after a tenth, {late:.3f} at the end"
    return f"{count} steps: {memory}; a step took {before * 1e3:.1f} ms, then {after * 1e3:.1f}"


def many(folder, count, inputs):
    few, all_of_them = endurance.many_pictures(inputs["run"], folder, count)
    assert all_of_them < few + 0.05
    return f"{count} pictures restored in {all_of_them:.3f} GB, {count // 20} in {few:.3f}"


def large(folder, count, inputs):
    side = 500 * round(count**0.5 / 500)
    seconds, memory = endurance.large_picture(inputs["run"], folder, side)
    assert memory < 8
    return f"{side * side / 1e6:.0f} megapixels restored in {seconds:.0f} s and {memory:.2f} GB"


def rows(folder, count, inputs):
    seconds, memory = endurance.large_csv(inputs["photos"], folder, count)
    return f"a CSV of {count} rows is drawn from after {seconds:.1f} s, with {memory:.2f} GB more"


ATTACKS = {  # name: (function, its full number)
    "tables": (tables, 5000),
    "pictures": (pictures, 5000),
    "weights": (weights, 2450),
    "training": (training, 400),
    "caching": (caching, 150),
    "pairs": (pairs, 150),
    "export": (export, 150),
    "evaluation": (evaluation, 150),
    "long": (long, 20_000),
    "many": (many, 2000),
    "rows": (rows, 100_000),
    "large": (large, 100_000_000),
}
KILLS = ["training", "caching", "pairs", "export", "evaluation"]


def make_inputs(folder):
    """Make twelve small photos, a CSV of them, and a run of two steps."""
    photos, table = folder / "photos", folder / "photos.csv"
    photos.mkdir()
    lines = ["image_path"]
    for i in range(12):
        dead_leaves(96, np.random.default_rng(i)).save(photos / f"{i:02d}.png")
        lines.append(str(photos / f"{i:02d}.png"))
    table.write_text("\n".join(lines))
    command = ["train.py", *endurance.TRAIN, "--data", table, "--steps", 2, "--out", "run"]
    endurance.finish(command, folder)
    return {"photos": photos, "csv": table, "run": folder / "run"}


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    choices = [[], "kills", *ATTACKS]
    parser.add_argument("what", nargs="*", choices=choices, help="default: all; kills: those of -9")
    parser.add_argument("--share", type=float, default=1.0, help="of the full numbers (default 1)")
    args = parser.parse_args()
    names = []
    for what in args.what or ATTACKS:
        names += KILLS if what == "kills" else [what]
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        inputs = make_inputs(place)
        for name in dict.fromkeys(names):  # each once
            folder = place / name
            folder.mkdir()
            attack, count = ATTACKS[name]
            start = time.monotonic()
            survived = attack(folder, max(20, int(count * args.share)), inputs)
            print(f"{name}: {survived} ({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
