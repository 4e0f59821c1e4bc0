"""The long attacks. Prints what was tried and what survived; ends with an error where something did not.

    python tests/stress.py                          all, at their full numbers: about an hour and a half on two cores
    python tests/stress.py tables weights kills --share 0.1
"""
import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

import attacks  # puts the project on the path
import endurance
from degrade import dead_leaves


def fuzz(attack):
    def run(folder, count, **_):
        counts, wrong = attack(folder, range(count))
        assert not wrong, "\n".join(wrong[:20])
        return f"{counts['worked']} worked, {counts['refused']} refused in one line"
    return run


def kills(kill):
    def run(folder, count, **inputs):
        killed, ended = kill(folder, count, **inputs)
        return f"{killed} times killed with -9, {ended} times ended; nothing half-made was taken for whole, and the rest was made"
    return run


def kill_training(folder, count, csv, **_):
    steps = endurance.kill_training(csv, folder, count)
    return f"{count} times killed with -9: all checkpoints load, {len(steps)} different steps were seen, the run reached step {max(steps)}"


def long(folder, count, **_):
    early, late, *seconds = endurance.long_training(folder, count)
    assert late < early + 0.1
    return f"{count} steps: {early:.3f} GB of memory after a tenth, {late:.3f} at the end; a step took {seconds[0] * 1e3:.1f} ms, then {seconds[1] * 1e3:.1f}"


def many(folder, count, run, **_):
    few, all_of_them = endurance.many_pictures(run, folder, count)
    assert all_of_them < few + 0.05
    return f"{count} pictures restored in {all_of_them:.3f} GB, {count // 20} in {few:.3f}"


def large(folder, count, run, **_):
    seconds, memory = endurance.large_picture(run, folder, 500 * round(count ** 0.5 / 500))
    assert memory < 8
    return f"a picture of {count / 1e6:.0f} megapixels restored in {seconds:.0f} s and {memory:.2f} GB"


def rows(folder, count, photos, **_):
    seconds, memory = endurance.large_csv(photos, folder, count)
    return f"a CSV of {count} rows is read and drawn from after {seconds:.1f} s, with {memory:.2f} GB more"


ATTACKS = {  # name: (function, its full number)
    "tables": (fuzz(attacks.tables), 5000), "pictures": (fuzz(attacks.pictures), 5000), "weights": (fuzz(attacks.weight_files), 2450),
    "training": (kill_training, 400), "caching": (kills(lambda folder, n, csv, **_: endurance.kill_caching(csv, folder, n)), 150),
    "pairs": (kills(lambda folder, n, photos, **_: endurance.kill_pairs(photos, folder, n)), 150),
    "export": (kills(lambda folder, n, run, **_: endurance.kill_export(run, folder, n)), 150),
    "evaluation": (kills(lambda folder, n, run, photos, **_: endurance.kill_evaluation(run, photos, folder, n)), 150),
    "long": (long, 20_000), "many": (many, 2000), "rows": (rows, 100_000), "large": (large, 100_000_000)}
KILLS = ["training", "caching", "pairs", "export", "evaluation"]  # what "kills" stands for


def make_inputs(folder):
    """Twelve small photos, a CSV of them, a run of two steps."""
    photos, csv = folder / "photos", folder / "photos.csv"
    photos.mkdir()
    for i in range(12):
        dead_leaves(96, np.random.default_rng(i)).save(photos / f"{i:02d}.png")
    csv.write_text("image_path\n" + "".join(f"{path}\n" for path in sorted(photos.glob("*.png"))))
    endurance.finish(["train.py", *endurance.TRAIN, "--data", csv, "--steps", 2, "--out", "run"], folder)
    return {"photos": photos, "csv": csv, "run": folder / "run"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[[], "kills", *ATTACKS], help="default: all; kills: the five that kill")
    parser.add_argument("--share", type=float, default=1.0, help="of the full numbers (default 1)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        inputs = make_inputs(Path(place))
        names = [name for what in args.what or ATTACKS for name in (KILLS if what == "kills" else [what])]
        for name in dict.fromkeys(names):  # each once
            (Path(place) / name).mkdir()
            attack, count = ATTACKS[name]
            start = time.monotonic()
            told = attack(Path(place) / name, max(20, int(count * args.share)), **inputs)
            print(f"{name}: {told} ({time.monotonic() - start:.0f} s)", flush=True)
