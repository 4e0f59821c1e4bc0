"""What the table and the files of evaluate.py --data say, and which flags it refuses."""

import csv
import io
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import degrade
import evaluate
from data import to_image, to_tensor
from degrade import UserError
from evaluate import Metrics, Pipeline, list_work, restore_files, shares_of_the_way, summarize
from model import PRESETS, build_restorer
from vae import save_weights


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
    restorer = build_restorer(PRESETS["tiny"])
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2):
        restorer.sana.initialize(generator)
        torch.nn.init.normal_(restorer.sana.proj_out.weight, std=0.05, generator=generator)
        checkpoint = folder / f"step_{step:06d}"
        save_weights(restorer.state_dict(), checkpoint / "ema.safetensors")
        changed = {name: tensor * 1.1 for name, tensor in restorer.state_dict().items()}
        save_weights(changed, checkpoint / "model.safetensors")
        config = {"step": step, "model": PRESETS["tiny"], "args": {}}
        (checkpoint / "config.json").write_text(json.dumps(config))
    (folder / "best").write_text("step_000001")
    (folder / "latest").write_text("step_000002")
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


def rows_of(**columns):
    """{"input_psnr": [..], ...} -> rows."""
    count = len(next(iter(columns.values())))
    rows = []
    for i in range(count):
        row = {"image": str(i), "condition": "", "degradation": ["a" if i < 2 else "b"]}
        rows.append(row | {name: values[i] for name, values in columns.items()})
    return rows


def test_means_and_their_intervals():
    """A picture too small for SSIM has none, whatever the method."""
    rows = rows_of(
        input_psnr=[20.0, 22.0, 30.0, 24.0],
        restored_psnr=[21.0, 25.0, 100.0, 26.0],
        input_ssim=[0.5, math.nan, 0.7, 0.6],
        restored_ssim=[0.6, math.nan, 1.0, 0.8],
    )
    summary = summarize(rows, ["input", "restored"], Metrics(["psnr", "ssim"]))
    assert summary["input"]["psnr"]["mean"] == 24
    assert summary["restored"]["psnr"]["mean"] == 43
    assert 20 <= summary["input"]["psnr"]["low"] < 24 < summary["input"]["psnr"]["high"] <= 30
    assert summary["input"]["ssim"]["mean"] == pytest.approx(0.6)
    assert summary["restored"]["ssim"]["mean"] == pytest.approx(0.8)
    one = summarize(rows[:1], ["input"], Metrics(["psnr"]))["input"]["psnr"]
    assert one["mean"] == 20 and math.isnan(one["low"])


def test_the_table_counts_equal_pictures_and_those_too_small(command, tmp_path, capsys):
    """Of four outputs one is perfect; one pair is too small for SSIM."""
    write_pairs(tmp_path, ["0.png", "1.png", "2.png", "3.png"])
    for name in ("clean", "noisy"):
        path = tmp_path / name / "3.png"
        Image.open(path).crop((0, 0, 9, 32)).save(path)
    for i, levels in enumerate([4, 0, 2, 4]):
        clean = Image.open(tmp_path / f"clean/{i}.png")
        save(brighter(clean, levels), tmp_path / f"others/{i}.png")
    command("--data", "pairs.csv", "--compare", "others", "--metrics", "psnr", "ssim")
    output = capsys.readouterr().out
    assert "PSNR ends at 100 dB, where pictures are equal to the clean ones: compared 1" in output
    assert "SSIM: 1 of 4 images are too small for it" in output
    text = (tmp_path / "out/evaluation/scores.json").read_text()
    report = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    psnr = {name: scores["psnr"]["mean"] for name, scores in report["methods"].items()}
    assert psnr["input"] == pytest.approx(db(8))
    assert psnr["compared"] == pytest.approx((2 * db(4) + db(2) + 100) / 4)
    assert report["images"][1]["compared_psnr"] == 100
    assert report["images"][3]["compared_ssim"] is None


def test_groups_of_degradations_are_named_as_they_are(command, tmp_path, capsys):
    write_pairs(tmp_path, ["0.png", "1.png"], "motion blur")
    save(picture(0), tmp_path / "others/0.png")
    save(brighter(picture(1), 4), tmp_path / "others/1.png")
    command("--data", "pairs.csv", "--compare", "others", "--metrics", "psnr")
    output = capsys.readouterr().out
    group = [line for line in output.splitlines() if line.startswith("with ")]
    assert len(group) == 1
    assert group[0].split(")")[0] == "with motion blur (2"
    assert group[0].split(")")[1].strip() == f"{db(8):.2f} -> {(100 + db(4)) / 2:.2f}"
    rows = read_csv(tmp_path / "out/evaluation/scores.csv")
    assert [row["degradation"] for row in rows] == ["motion blur"] * 2


# --------------------------------------------------------------------------------------------------
# --compare.


def compare_scores(command, folder, *words):
    words = "--data", "pairs.csv", "--compare", "others", "--metrics", "psnr", *words
    command(*words, "--overwrite")
    return [float(row["compared_psnr"]) for row in read_csv(folder / "out/evaluation/scores.csv")]


@pytest.mark.parametrize("below", ["others/noisy", "others", "others/clean"])
def test_pictures_are_matched_by_their_paths(command, tmp_path, below):
    """Two scenes have pictures of one name."""
    write_pairs(tmp_path, ["a/0.png", "b/0.png"])
    save(picture(0), tmp_path / below / "a/0.tif")
    save(brighter(picture(1), 4), tmp_path / below / "b/0.bmp")
    assert compare_scores(command, tmp_path) == [100, pytest.approx(db(4))]


def test_a_name_that_only_one_picture_has_is_found_in_any_folder(command, tmp_path):
    write_pairs(tmp_path, ["x.png", "y.png"])
    save(brighter(picture(0), 2), tmp_path / "others/deep/down/x.png")
    save(brighter(picture(1), 4), tmp_path / "others/y.png")
    assert compare_scores(command, tmp_path) == pytest.approx([db(2), db(4)])


def test_the_clean_name_is_taken_where_the_degraded_one_is_not_there(command, tmp_path):
    save(picture(0), tmp_path / "clean/x.png")
    save(picture(1), tmp_path / "noisy/x_noisy.png")
    save(brighter(picture(0), 4), tmp_path / "others/x.png")
    (tmp_path / "pairs.csv").write_text(
        "image_path,condition_image_path\nclean/x.png,noisy/x_noisy.png\n"
    )
    assert compare_scores(command, tmp_path) == [pytest.approx(db(4))]


COMPARE_REFUSED = [  # pictures in others/, and what the line says
    (["a/0.png"], ["nothing is named like noisy/b/1.png", "pairs.csv, line 3"]),
    (["a/0.png", "a/0.bmp", "b/1.png"], ["0.png", "0.bmp", "extension", "line 2"]),
    (["0.png"], ["nothing is named like noisy/b/1.png"]),
    (["a/0.png", "p/1.png", "q/1.png"], ["p/1.png", "q/1.png", "both named like", "line 3"]),
]


@pytest.mark.parametrize("names, says", COMPARE_REFUSED)
def test_what_cannot_be_matched_is_refused(command, tmp_path, names, says):
    write_pairs(tmp_path, ["a/0.png", "b/1.png"])
    for name in names:
        save(picture(0), tmp_path / "others" / name)
    with pytest.raises(UserError) as error:
        compare_scores(command, tmp_path)
    assert all(word in str(error.value) for word in says), error.value


def test_a_picture_that_fits_two_rows_is_refused(command, tmp_path):
    write_pairs(tmp_path, ["a/0.png", "b/0.png"])
    save(picture(0), tmp_path / "others/0.png")
    with pytest.raises(UserError, match=r"others/0.png fits line 2 and line 3 of pairs.csv"):
        compare_scores(command, tmp_path)


def test_two_rows_of_one_condition_share_a_picture(command, tmp_path):
    write_pairs(tmp_path, ["0.png"])
    with open(tmp_path / "pairs.csv", "a") as file:
        file.write("clean/0.png,noisy/0.png,other words,\n")
    save(brighter(picture(0), 4), tmp_path / "others/0.png")
    assert compare_scores(command, tmp_path) == pytest.approx([db(4), db(4)])


# --------------------------------------------------------------------------------------------------
# The files that are written.


@pytest.mark.parametrize("end", [KeyboardInterrupt, UserError])
def test_scores_are_kept_when_measuring_ends_early(command, tmp_path, monkeypatch, capsys, end):
    names = ["0.png", "1.png", "2.png"]
    write_pairs(tmp_path, names, "jpeg:quality=20 downscale:factor=2")
    draw = evaluate.PairedDataset.draw

    def fail(dataset, i):
        if i == 2:
            assert len(read_csv(tmp_path / "o/scores.csv")) == 2  # already
            raise end("stop")
        return draw(dataset, i)

    monkeypatch.setattr(evaluate.PairedDataset, "draw", fail)
    (tmp_path / "o").mkdir()
    for name in ("scores.csv", "scores.json"):
        (tmp_path / "o" / name).write_text("of another evaluation")
    words = "--data", "pairs.csv", "--compare", "clean", "--metrics", "psnr", "--output", "o"
    with pytest.raises(end):
        command(*words, "--overwrite")
    assert "scores.csv has the scores of 2 images" in capsys.readouterr().err
    rows = read_csv(tmp_path / "o/scores.csv")
    columns = ["image", "condition", "degradation", "input_psnr", "compared_psnr"]
    assert [list(row) for row in rows] == [columns] * 2
    first = list(rows[0].values())
    assert first[:3] == ["clean/0.png", "noisy/0.png", "jpeg; downscale"]
    assert float(first[3]) == pytest.approx(db(8))
    assert first[4] == "100.0"
    assert not (tmp_path / "o/scores.json").exists()


def test_nothing_is_left_if_nothing_was_measured(command, tmp_path, monkeypatch):
    write_pairs(tmp_path, ["0.png"])
    save(picture(0, 41), tmp_path / "others/0.png")
    with pytest.raises(UserError, match="41x32, the pair is 40x32"):
        command("--data", "pairs.csv", "--compare", "others", "--metrics", "psnr")
    assert not (tmp_path / "out/evaluation/scores.csv").exists()


def test_a_second_evaluation_writes_elsewhere(command, tmp_path):
    write_pairs(tmp_path, ["0.png"])
    words = "--data", "pairs.csv", "--compare", "clean", "--metrics", "psnr"
    for _ in range(3):
        command(*words)
    folders = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert folders == ["evaluation", "evaluation-2", "evaluation-3"]
    command(*words, "--output", "mine")
    (tmp_path / "mine/scores.csv").write_text("kept")
    with pytest.raises(UserError, match="--output mine holds scores already.*--overwrite"):
        command(*words, "--output", "mine")
    assert (tmp_path / "mine/scores.csv").read_text() == "kept"
    command(*words, "--output", "mine", "--overwrite")
    assert len(read_csv(tmp_path / "mine/scores.csv")) == 1
    command(*words, "--overwrite")
    assert len(list((tmp_path / "out").iterdir())) == 3


# --------------------------------------------------------------------------------------------------
# What is scored, and what is saved of it.


def test_grey_answers_are_scored_grey(run_folder):
    """The network's answer has colours; the picture that is saved for a grey one has none."""
    pipeline = Pipeline.load(run_folder)
    grey = picture(3, mode="L")
    pixels = to_tensor(grey)
    restored = pipeline.restore(pixels[None], [""], seed=4)[0]
    assert (restored[0] - restored[1]).abs().max() > 0.01
    saved = pipeline(grey, seed=4)
    assert saved.mode == "L"
    item = {"condition": pixels, "clean": pixels, "grey": True}
    method = evaluate.restoring_method(pipeline, [""], "cpu", seed=4)
    assert to_image(method(0, item)).convert("L").tobytes() == saved.tobytes()
    scored = to_image(method(0, item))
    assert scored.tobytes() == saved.convert("RGB").tobytes()
    method = evaluate.ceiling_method(pipeline.autoencoder, "cpu")
    ceiling = method(0, item | {"clean": to_tensor(picture(5))})
    method = evaluate.restoring_method(pipeline, [""], "cpu", seed=4)
    assert to_image(ceiling).tobytes() == picture(5, mode="L").convert("RGB").tobytes()
    colour = to_image(method(0, item | {"grey": False}))
    assert colour.tobytes() == to_image(restored).tobytes()


def test_the_scores_of_grey_pairs_are_those_of_the_saved_pictures(command, run_folder, tmp_path):
    save(picture(0, mode="L"), tmp_path / "clean.png")
    save(picture(1, mode="L"), tmp_path / "grey.png")
    (tmp_path / "pairs.csv").write_text("image_path,condition_image_path\nclean.png,grey.png\n")
    words = "--checkpoint", run_folder, "--data", "pairs.csv", "--metrics", "psnr"
    command(*words, "--save_pictures")
    restored = Image.open(tmp_path / "out/evaluation/pictures/grey.png")
    assert restored.mode == "L"
    clean = np.asarray(Image.open(tmp_path / "clean.png"), float)
    error = np.mean((clean - np.asarray(restored, float)) ** 2)
    row = read_csv(tmp_path / "out/evaluation/scores.csv")[0]
    assert float(row["restored_psnr"]) == pytest.approx(10 * math.log10(255**2 / error), abs=1e-4)


def test_restored_pictures_are_saved_under_their_names(command, run_folder, tmp_path):
    write_pairs(tmp_path, ["a/0.png", "b/0.png"])
    (tmp_path / "lists").mkdir()
    lines = ["image_path,condition_image_path", "../clean/a/0.png,../noisy/a/0.png"]
    lines.append("../clean/b/0.png,")
    (tmp_path / "lists/pairs.csv").write_text("\n".join(lines))
    words = "--checkpoint", run_folder, "--data", "lists/pairs.csv", "--metrics", "psnr", "ssim"
    command(*words, "--save_pictures")
    pictures = tmp_path / "out/evaluation/pictures"
    files = sorted(path for path in pictures.rglob("*") if path.is_file())
    assert files == [pictures / "clean/b/0.png", pictures / "noisy/a/0.png"]
    expected = Pipeline.load(run_folder)(tmp_path / "noisy/a/0.png", "")
    row = read_csv(tmp_path / "out/evaluation/scores.csv")[0]
    assert row["condition"] == "../noisy/a/0.png"
    assert Image.open(pictures / "noisy/a/0.png").tobytes() == expected.tobytes()

    command(*words, "--save_pictures", "--sweep", "1,2")
    swept = tmp_path / "out/evaluation-2/pictures"
    for steps in (1, 2):
        assert (swept / f"steps_{steps}/noisy/a/0.png").is_file()


def test_two_pictures_of_one_name_are_not_saved(command, run_folder, tmp_path):
    write_pairs(tmp_path, ["0.png", "0.bmp"])
    words = "--checkpoint", run_folder, "--data", "pairs.csv", "--metrics", "psnr"
    both = "line 2 and line 3 of pairs.csv have one name, noisy/0.png"
    with pytest.raises(UserError, match=both):
        command(*words, "--save_pictures")
    command(*words)


def test_a_border_is_not_scored(command, tmp_path):
    write_pairs(tmp_path, ["0.png"])
    output = brighter(picture(0), 4)
    output.paste((0, 0, 0), (0, 0, 40, 3))
    save(output, tmp_path / "others/0.png")
    assert compare_scores(command, tmp_path)[0] < 20
    cut = compare_scores(command, tmp_path, "--crop_border", 3)
    assert cut == [pytest.approx(db(4))]
    assert compare_scores(command, tmp_path, "--crop_border", 10) == [pytest.approx(db(4))]
    with pytest.raises(UserError, match=r"pairs.csv, line 2: .*--crop_border 11"):
        compare_scores(command, tmp_path, "--crop_border", 11)


def test_the_border_is_cut_from_all_that_is_scored(published):
    """Pictures that differ in their borders alone are alike for SSIM, LPIPS and FID too."""
    weights = (published["alex"], published["alex heads"]), published["inception"]
    metrics = Metrics(["psnr", "ssim", "lpips", "fid"], False, *weights, crop_border=5)
    clean = to_tensor(picture(0, 80, 76))
    framed = torch.ones_like(clean)
    framed[:, 5:-5, 5:-5] = clean[:, 5:-5, 5:-5]
    assert metrics(clean, framed, "x") == {"psnr": 100.0, "ssim": 1.0, "lpips": 0.0}
    metrics(clean, clean, "z")
    assert torch.equal(metrics.fid.sets["x"][1], metrics.fid.sets["z"][1])
    metrics.fid.add("cut", clean[None, :, 5:-5, 5:-5])
    assert torch.equal(metrics.fid.sets["x"][1], metrics.fid.sets["cut"][1])
    smaller = metrics(clean[:, :, :70], framed[:, :, :70], "y")
    assert math.isnan(smaller["lpips"])


def test_the_border_is_cut_for_fid_in_the_whole_command(command, published, tmp_path):
    write_pairs(tmp_path, ["0.png", "1.png", "2.png"])
    for i in range(3):
        framed = Image.new("RGB", (40, 32), "white")
        framed.paste(picture(i).crop((4, 4, 36, 28)), (4, 4))
        save(framed, tmp_path / f"others/{i}.png")
    words = "--data", "pairs.csv", "--compare", "others", "--metrics", "psnr", "fid"
    words += "--fid_weights", published["inception"]
    for border in (0, 4):
        command(*words, "--crop_border", border, "--overwrite")
        report = json.loads((tmp_path / "out/evaluation/scores.json").read_text())
        distance = report["methods"]["compared"]["fid"]
        assert distance < 1e-4 if border else distance > 0.01


# --------------------------------------------------------------------------------------------------
# Which checkpoint.


def test_weights_and_the_files_that_name_a_checkpoint(command, run_folder, tmp_path):
    save(picture(0), tmp_path / "a.png")
    seen = set()
    for name, step in [("best", 1), ("latest", 2)]:
        for weights in ("ema", "model"):
            words = "--checkpoint", run_folder / name, "--weights", weights
            command(*words, "--input", "a.png", "--output", f"{name}_{weights}.png")
            folder = run_folder / f"step_{step:06d}"
            expected = Pipeline.load(folder, weights=weights)(tmp_path / "a.png")
            restored = Image.open(tmp_path / f"{name}_{weights}.png")
            assert restored.tobytes() == expected.tobytes()
            seen.add(restored.tobytes())
    assert len(seen) == 4
    default = Pipeline.load(run_folder)(tmp_path / "a.png").tobytes()
    assert default == Image.open(tmp_path / "latest_ema.png").tobytes()
    (tmp_path / "best").write_text("step_9")
    with pytest.raises(UserError, match="step_9: no checkpoint here"):
        Pipeline.load(tmp_path / "best")


# --------------------------------------------------------------------------------------------------
# Flags without an effect.

DATA = "--data pairs.csv --checkpoint RUN"
INPUT = "--input a.png --output o.png --checkpoint RUN"
COMPARE = "--data pairs.csv --compare clean"
IDLE = [
    (f"{DATA} --quality 80", "--quality goes with --input"),
    (f"{DATA} --grid=g.png", "--grid goes with --input"),
    (f"{INPUT} --sweep 1,2", "--sweep goes with --data"),
    (f"{INPUT} --compare clean", "--compare goes with --data"),
    (f"{INPUT} --metrics psnr", "--metrics goes with --data"),
    (f"{INPUT} --y_channel", "--y_channel goes with --data"),
    (f"{INPUT} --lpips_weights a b", "--lpips_weights goes with --data"),
    (f"{INPUT} --fid_weights a", "--fid_weights goes with --data"),
    (f"{INPUT} --degradations jpeg", "--degradations goes with --data"),
    (f"{INPUT} --save_pictures", "--save_pictures goes with --data"),
    (f"{INPUT} --crop_border 2", "--crop_border goes with --data"),
    (f"{INPUT} --skip_bad", "--skip_bad goes with --data"),
    (f"{DATA} --sweep 1,2 --steps 1", "--steps has no effect beside --sweep"),
    (f"{COMPARE} --prompt x", "--prompt needs --checkpoint"),
    (f"{COMPARE} --steps 1", "--steps needs --checkpoint"),
    (f"{COMPARE} --sampler euler", "--sampler needs --checkpoint"),
    (f"{COMPARE} --average 1", "--average needs --checkpoint"),
    (f"{COMPARE} --guidance 1", "--guidance needs --checkpoint"),
    (f"{COMPARE} --condition_guidance=1", "--condition_guidance needs --checkpoint"),
    (f"{COMPARE} --weights ema", "--weights needs --checkpoint"),
    (f"{COMPARE} --model x", "--model needs --checkpoint"),
    (f"{COMPARE} --sweep 1", "--sweep needs --checkpoint"),
    (f"{COMPARE} --save_pictures", "--save_pictures needs --checkpoint"),
    (f"{COMPARE} --metrics psnr --lpips_weights a b", "--lpips_weights has no effect"),
    (f"{COMPARE} --metrics psnr --fid_weights a", "--fid_weights has no effect"),
    (f"{COMPARE} --metrics lpips --y_channel", "--y_channel has no effect"),
    (f"{COMPARE} --degradations jpeg", "--degradations"),
]


@pytest.mark.parametrize("words, says", IDLE)
def test_a_flag_without_an_effect_is_refused(command, tmp_path, run_folder, words, says):
    write_pairs(tmp_path, ["0.png"])
    save(picture(0), tmp_path / "a.png")
    with pytest.raises(UserError) as error:
        command(*words.replace("RUN", str(run_folder)).split())
    assert str(error.value).startswith(says)
    assert not (tmp_path / "out").exists() and not (tmp_path / "o.png").exists()


# --------------------------------------------------------------------------------------------------
# Restoring folders.


def test_a_format_that_cannot_be_written_becomes_png(command, run_folder, tmp_path, capsys):
    """FITS, which Pillow opens and does not save: a header of 80-byte cards in blocks of 2880."""
    cards = ["SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 20", "NAXIS2  = 14", "END"]
    header = "".join(card.ljust(80) for card in cards).ljust(2880)
    pixels = bytes(np.arange(280, dtype=np.uint8)).ljust(2880, b"\0")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/star.fits").write_bytes(header.encode() + pixels)
    save(picture(0), tmp_path / "in/b.jpg")
    words = "--checkpoint", run_folder, "--input", "in", "--output", "out"
    command(*words)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.jpg", "star.png"]
    assert Image.open(tmp_path / "out/star.png").size == (20, 14)
    line = next(line for line in capsys.readouterr().out.splitlines() if ".png" in line)
    assert "1 picture(s), such as in/star.fits" in line
    with pytest.raises(UserError, match="o.fits: give a file name"):
        list_work(["in/b.jpg"], "o.fits")


def test_a_name_that_is_too_long_stops_its_picture_only(run_folder, tmp_path, capsys):
    pipeline = Pipeline.load(run_folder)
    save(picture(0), tmp_path / "a.png")
    deep = tmp_path / "out" / "/".join(["deep" * 50] * 25) / "a.png"
    work = [(tmp_path / "a.png", deep), (tmp_path / "a.png", tmp_path / "out/a.png")]
    work.append((tmp_path / "a.png", tmp_path / f"out/{'b' * 300}.png"))
    assert restore_files(pipeline, work) == 2
    assert (tmp_path / "out/a.png").is_file()
    captured = capsys.readouterr()
    assert captured.err.count("left out: cannot write") == 2
    assert "restored 1 image(s)" in captured.out


def test_names_that_the_terminal_cannot_encode(command, run_folder, tmp_path, monkeypatch):
    write_pairs(tmp_path, ["0.png"], "floué 模糊")
    save(picture(0), tmp_path / "模.png")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    degrade.run_script(lambda: None)  # as every script begins
    command("--data", "pairs.csv", "--compare", "clean", "--metrics", "psnr", "--output", "模")
    command("--checkpoint", run_folder, "--input", "模.png", "--output", "糊.png")
    terminal.seek(0)
    printed = terminal.read()
    assert r"with flou\xe9 \u6a21\u7cca (1)" in printed
    assert r"restored 1 image(s) -> \u7cca.png" in printed
    rows = read_csv(tmp_path / "模/scores.csv")
    assert rows[0]["degradation"] == "floué 模糊"
