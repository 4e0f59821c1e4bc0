"""What the table and the files of evaluate.py --data say, and which flags it refuses."""

import csv
import json
import math
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import data
import evaluate
from data import to_image, to_tensor
from degrade import UserError
from evaluate import Metrics, Pipeline, list_work, means, summarize
from test_evaluate import write_step
from vae import file_digest


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A function: run evaluate.py with these words, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        evaluate.main()

    return run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of the tiny preset with two checkpoints; in the second, all weights differ."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    for step in (1, 2):
        write_step(folder, step)
    (folder / "best").write_text("step_000001")
    return folder


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def picture(seed, width=40, height=32, mode="RGB"):
    """Low-contrast noise, so that brighter and darker copies are not clipped."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(64, 192, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels).convert(mode)


def brighter(image, levels):
    return image.point(lambda level: level + levels)


def db(levels):
    """PSNR of a picture that is so many levels brighter."""
    return 20 * math.log10(255 / levels)


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_pairs(folder, names, more=""):
    """pairs.csv: clean/NAME and noisy/NAME, 8 levels brighter, for each of names."""
    lines = ["image_path,condition_image_path,caption,degradation"]
    for i, name in enumerate(names):
        save(picture(i), folder / "clean" / name)
        save(brighter(picture(i), 8), folder / "noisy" / name)
        lines.append(f"clean/{name},noisy/{name},x,{more}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")


# --------------------------------------------------------------------------------------------------
# Means.


def test_means_and_their_intervals():
    """A picture too small for SSIM has none, whatever the method."""
    rows = []
    for psnr, ssim in [(20.0, 0.5), (22.0, math.nan), (100.0, 1.0), (26.0, 0.6)]:
        rows.append({"image": "x", "restored_psnr": psnr, "restored_ssim": ssim})
    assert means(rows) == {"restored_psnr": 42, "restored_ssim": pytest.approx(0.7)}
    summary = summarize(rows, ["restored"], Metrics(["psnr", "ssim"]))["restored"]
    assert summary["psnr"]["mean"] == 42
    assert 20 <= summary["psnr"]["low"] < 42 < summary["psnr"]["high"] <= 100
    one = summarize(rows[:1], ["restored"], Metrics(["psnr"]))["restored"]["psnr"]
    assert one["mean"] == 20 and math.isnan(one["low"])


def test_the_table_says_which_pictures_are_too_small(command, tmp_path, capsys):
    write_pairs(tmp_path, ["0.png", "1.png"])
    for name in ("clean", "noisy"):
        path = tmp_path / name / "1.png"
        Image.open(path).crop((0, 0, 9, 32)).save(path)
    command("--data", "pairs.csv", "--metrics", "psnr", "ssim")
    assert "SSIM: 1 of 2 images are too small for it" in capsys.readouterr().out
    text = (tmp_path / "out/evaluation/scores.json").read_text()
    report = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert report["images"][1]["conditions_ssim"] is None


def test_groups_of_degradations_are_named_as_they_are(command, tmp_path, run_folder, capsys):
    write_pairs(tmp_path, ["0.png", "1.png"], "motion blur")
    command("--data", "pairs.csv", "--metrics", "psnr", "--checkpoint", run_folder)
    output = capsys.readouterr().out
    group = [line.strip() for line in output.splitlines() if line.startswith("with ")]
    rows = read_csv(tmp_path / "out/evaluation/scores.csv")
    restored = sum(float(row["restored_psnr"]) for row in rows) / 2
    assert len(group) == 1
    assert group[0].startswith("with motion blur (2)")
    assert group[0].endswith(f" {db(8):.2f} -> {restored:.2f}")


# --------------------------------------------------------------------------------------------------
# Without a checkpoint: the conditions as they are, such as another program's outputs.


def test_another_programs_pictures_are_scored_as_they_are(command, tmp_path, capsys):
    """Listed by data.py match, in another format. One of three is perfect."""
    for i, levels in enumerate([4, 0, 2]):
        save(picture(i), tmp_path / f"clean/deep/{i}.png")
        save(brighter(picture(i), levels), tmp_path / f"theirs/deep/{i}.tif")
    data.match_folders("clean", "theirs", "theirs.csv")
    command("--data", "theirs.csv", "--metrics", "psnr", "ssim")
    said = "PSNR ends at 100 dB, where pictures equal the clean ones: conditions 1\n"
    assert said in capsys.readouterr().out
    report = json.loads((tmp_path / "out/evaluation/scores.json").read_text())
    assert list(report["methods"]) == ["conditions"]
    expected = [db(4), 100, db(2)]
    assert [row["conditions_psnr"] for row in report["images"]] == pytest.approx(expected)
    assert report["methods"]["conditions"]["psnr"]["mean"] == pytest.approx(sum(expected) / 3)


def test_conditions_that_are_not_there_or_smaller_are_not_scored(command, tmp_path):
    write_pairs(tmp_path, ["0.png"])
    with open(tmp_path / "pairs.csv", "a") as file:
        file.write("clean/0.png,,,\n")
    with pytest.raises(UserError, match="pairs.csv, line 3: no condition to score"):
        command("--data", "pairs.csv", "--metrics", "psnr")
    write_pairs(tmp_path, ["0.png"])
    save(picture(0, 20, 16), tmp_path / "noisy/0.png")
    with pytest.raises(UserError, match="conditions 2 times smaller than .* need --checkpoint"):
        command("--data", "pairs.csv", "--metrics", "psnr")
    assert not list((tmp_path / "out").iterdir())


# --------------------------------------------------------------------------------------------------
# The files that are written.


def test_scores_are_kept_when_measuring_ends_early(command, tmp_path, monkeypatch):
    write_pairs(tmp_path, ["0.png", "1.png", "2.png"], "jpeg:quality=20 downscale:factor=2")
    draw = evaluate.PairedDataset.__getitem__

    def fail(dataset, i):
        if i == 2:
            assert len(read_csv(tmp_path / "o/scores.csv")) == 2  # already
            raise KeyboardInterrupt
        return draw(dataset, i)

    monkeypatch.setattr(evaluate.PairedDataset, "__getitem__", fail)
    with pytest.raises(KeyboardInterrupt):
        command("--data", "pairs.csv", "--metrics", "psnr", "--output", "o")
    rows = read_csv(tmp_path / "o/scores.csv")
    columns = ["image", "condition", "degradation", "conditions_psnr"]
    assert [list(row) for row in rows] == [columns] * 2
    first = list(rows[0].values())
    assert first[:3] == ["clean/0.png", "noisy/0.png", "jpeg; downscale"]
    assert float(first[3]) == pytest.approx(db(8))


def test_each_evaluation_claims_a_folder(command, tmp_path, monkeypatch):
    """Also one that begins while another measures."""
    write_pairs(tmp_path, ["0.png"])
    words = "--data", "pairs.csv", "--metrics", "psnr"
    evaluate_pairs = evaluate.evaluate_pairs

    def begin_another(*arguments, **options):
        monkeypatch.setattr(evaluate, "evaluate_pairs", evaluate_pairs)
        command(*words)
        return evaluate_pairs(*arguments, **options)

    monkeypatch.setattr(evaluate, "evaluate_pairs", begin_another)
    command(*words)
    for name in ("evaluation", "evaluation-2"):
        assert len(read_csv(tmp_path / f"out/{name}/scores.csv")) == 1
    with pytest.raises(UserError, match="--output out exists already; name a new folder"):
        command(*words, "--output", "out")


# --------------------------------------------------------------------------------------------------
# What is scored, and what is saved of it.


def test_the_scores_of_grey_pairs_are_those_of_the_saved_pictures(command, run_folder, tmp_path):
    """The network's answer has colours; the picture that is saved for a grey one has none."""
    save(picture(0, mode="L"), tmp_path / "clean.png")
    save(picture(1, mode="L"), tmp_path / "grey.png")
    (tmp_path / "pairs.csv").write_text("image_path,condition_image_path\nclean.png,grey.png\n")
    words = "--checkpoint", run_folder
    command(*words, "--data", "pairs.csv", "--metrics", "psnr")
    command(*words, "--input", "grey.png", "--output", "restored.png")
    restored = Image.open(tmp_path / "restored.png")
    assert restored.mode == "L"
    pixels = to_tensor(picture(1, mode="L"))[None]
    answer = Pipeline.load(run_folder).restore(pixels, [""])[0]
    assert (answer[0] - answer[1]).abs().max() > 0.01
    assert restored.tobytes() == to_image(answer).convert("L").tobytes()
    error = np.mean((np.asarray(picture(0, mode="L"), float) - np.asarray(restored)) ** 2)
    row = read_csv(tmp_path / "out/evaluation/scores.csv")[0]
    assert float(row["restored_psnr"]) == pytest.approx(10 * math.log10(255**2 / error), abs=1e-4)


def test_several_steps_are_compared(command, run_folder, tmp_path):
    write_pairs(tmp_path, ["0.png"])
    words = "--checkpoint", run_folder, "--data", "pairs.csv", "--metrics", "psnr", "ssim"
    command(*words, "--steps", 1, 2)
    methods = json.loads((tmp_path / "out/evaluation/scores.json").read_text())["methods"]
    assert list(methods) == ["input", "ceiling", "steps_1", "steps_2"]


# --------------------------------------------------------------------------------------------------
# Which checkpoint.


def test_weights_and_the_files_that_name_a_checkpoint(command, run_folder, tmp_path):
    save(picture(0), tmp_path / "a.png")
    seen = set()
    for name, step, weights in [("best", 1, "ema"), ("latest", 2, "ema"), ("latest", 2, "model")]:
        words = "--checkpoint", run_folder / name, "--weights", weights, "--overwrite"
        command(*words, "--input", "a.png", "--output", "o.png")
        pipeline = Pipeline.load(run_folder / f"step_{step:06d}", weights=weights)
        restored = Image.open(tmp_path / "o.png").tobytes()
        assert restored == pipeline(tmp_path / "a.png").tobytes()
        seen.add(restored)
    assert len(seen) == 3
    (tmp_path / "best").write_text("step_9")
    with pytest.raises(UserError, match="best: no checkpoint here"):
        Pipeline.load(tmp_path / "best")


# --------------------------------------------------------------------------------------------------
# What a run says of its training.


def test_rows_that_were_trained_on_are_counted(command, run_folder, tmp_path, capsys):
    """Known by content: one in this run, one in a run before it, one renamed, one held out."""
    shutil.copytree(run_folder, tmp_path / "run")
    write_pairs(tmp_path, ["0.png", "1.png", "2.png", "3.png", "4.png"])
    digests = [file_digest(tmp_path / f"clean/{i}.png") for i in range(5)]
    rows = {
        "trained": [["a", digests[0], "x"], ["renamed", digests[2], "x"], ["gone", "0", "x"]],
        "held_out": [["b", digests[3], "x"]],
        "before": [digests[1], digests[0]],
    }
    (tmp_path / "run/step_000001/rows.json").write_text(json.dumps(rows))
    words = "--data", "pairs.csv", "--metrics", "psnr", "--checkpoint"
    command(*words, tmp_path / "run/best")
    said = "pairs.csv: the checkpoint was trained on 3 of these 5 rows\n"
    assert said in capsys.readouterr().out
    command(*words, tmp_path / "run")  # its step_000002
    assert "trained on" not in capsys.readouterr().out


def test_pictures_get_as_many_degradations_as_in_training(command, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    save(picture(0), tmp_path / "0.png")
    (tmp_path / "pairs.csv").write_text("image_path\n" + "0.png\n" * 12)
    words = "--data", "pairs.csv", "--metrics", "psnr", "--checkpoint", "run", "--output"
    config = json.loads((tmp_path / "run/step_000002/config.json").read_text())
    for most in (3, 1):  # 3 is also the default
        (tmp_path / "run/step_000002/config.json").write_text(json.dumps(config))
        command(*words, f"scores{most}")
        rows = read_csv(tmp_path / f"scores{most}/scores.csv")
        assert max(len(row["degradation"].split("; ")) for row in rows) == most
        config["args"]["max_degradations"] = 1


# --------------------------------------------------------------------------------------------------
# Flags without an effect.

DATA = "--data pairs.csv --checkpoint RUN"
INPUT = "--input a.png --output o.png --checkpoint RUN"
ALONE = "--data pairs.csv"
IDLE = [
    (f"{DATA} --overwrite", "--overwrite: goes with --input"),
    (f"{INPUT} --steps 1 2", "--steps: several numbers"),
    (f"{INPUT} --metrics psnr", "--metrics: goes with --data"),
    (f"{ALONE} --sampler euler", "--sampler: needs --checkpoint"),
    (f"{ALONE} --weights ema", "--weights: needs --checkpoint"),
    (f"{ALONE} --metrics psnr --lpips_weights a b", "--lpips_weights: --metrics leaves out"),
    (f"{ALONE} --degradations jpeg", "--degradations: every row"),
    (f"{DATA} --decoder_weight 1", "--decoder_weight: this checkpoint"),
]


def test_a_flag_without_an_effect_is_refused(command, tmp_path, run_folder):
    write_pairs(tmp_path, ["0.png"])
    save(picture(0), tmp_path / "a.png")
    for words, says in IDLE:
        with pytest.raises(UserError) as error:
            command(*words.replace("RUN", str(run_folder)).split())
        assert str(error.value).startswith(says)
    assert not list(tmp_path.glob("out/*")) and not (tmp_path / "o.png").exists()


# --------------------------------------------------------------------------------------------------
# Restoring folders.


def test_missing_inputs_and_dangerous_outputs_are_refused(tmp_path):
    save(picture(0), tmp_path / "in/b.jpg")
    refused = [
        ([tmp_path / "in/*.jpg"], "o.png", r"\*.jpg: no such file"),
        ([tmp_path / "in"], tmp_path / "in/x", "lies inside"),
        ([tmp_path / "in/b.jpg"], tmp_path / "in", "write over the input"),
    ]
    for sources, target, says in refused:
        with pytest.raises(UserError, match=says):
            list_work(sources, target)
