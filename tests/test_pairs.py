"""Pairs as people have them: what data.py refuses, converts, says and keeps apart.

Each test has the value that is right. All of these once gave a wrong one without a word.
"""

import json
import os
import unicodedata
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_commands import run
from test_data import coordinates, levels, write_csv

import data
import degrade
from data import CsvPairs, PairedDataset, list_images, make_datasets, make_pairs, match_folders
from degrade import UserError, parse_degradations

NOISE = parse_degradations(["gaussian_noise:sigma=25"])


def flags(path, **others):
    """The flags of make_datasets, as train.py has them by default."""
    defaults = {
        "data": path,
        "val_data": None,
        "val_count": None,
        "degradations": degrade.DEFAULT_DEGRADATIONS,
        "max_degradations": 3,
        "caption_dropout": 0.1,
        "seed": 0,
        "skip_bad": False,
        "resolution": 16,
    }
    return Namespace(**(defaults | others))


def noise_picture(size, seed, mode="RGB"):
    channels = () if mode == "L" else (3,)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels))
    return Image.fromarray(values.astype(np.uint8), mode)


def made_of(folder, count, size=(40, 40)):
    """Write count different pictures into a folder -> their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for i in range(count):
        noise_picture(size, i).save(folder / f"{i:02d}.png")
        names.append(f"{i:02d}.png")
    return names


# --------------------------------------------------------------------------------------------------
# Grey, transparency, bits, profiles.


def test_grey_is_degraded_in_one_channel(tmp_path, photo):
    """Noise of sigma 25 in three channels would be 14.4 once it is grey again."""
    grey = photo.convert("L")
    grey.save(tmp_path / "grey.png")
    source = CsvPairs(write_csv(tmp_path / "p.csv", [("grey.png",)], ["image_path"]))
    item = PairedDataset(source, None, NOISE, training=False, max_degradations=1).draw(0)
    assert item["grey"]
    assert torch.equal(item["condition"][0], item["condition"][1])
    middle = (levels(grey) > 100) & (levels(grey) < 150)  # where nothing is clipped
    noise = ((item["condition"] - item["clean"])[0] * 127.5).numpy()[middle]
    assert abs(noise.std() - 25) < 0.3


def test_pairs_and_degrade_keep_grey(tmp_path, photo, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    photo.convert("L").save(tmp_path / "photos/grey.png")
    make_pairs(tmp_path / "photos", tmp_path / "out", NOISE, [1], seed=0)
    for kind in ("clean", "condition"):
        assert Image.open(tmp_path / f"out/{kind}/00000_grey.png").mode == "L"
    words = ["degrade.py", tmp_path / "photos/grey.png", tmp_path / "noisy.png"]
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    degrade.main()
    assert Image.open(tmp_path / "noisy.png").mode == "L"


def test_transparent_pixels_are_refused_and_opaque_ones_are_not(tmp_path, capsys):
    opaque = coordinates(40, 40).convert("RGBA")
    opaque.save(tmp_path / "opaque.png")
    opaque.putpixel((3, 3), (1, 2, 3, 254))
    opaque.save(tmp_path / "hidden.png")
    rows = [("opaque.png", "", ""), ("hidden.png", "", "")]
    path = write_csv(tmp_path / "p.csv", rows)
    with pytest.raises(UserError, match="line 3: .*hidden.png has transparent pixels"):
        CsvPairs(path)
    assert len(CsvPairs(path, skip_bad=True)) == 1
    assert capsys.readouterr().err.count("left out: ") == 1
    with pytest.raises(UserError, match="hidden.png"):
        make_pairs(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", NOISE, [1], seed=0)


# --------------------------------------------------------------------------------------------------
# Folders and names.


def test_which_files_of_a_folder_are_pictures(tmp_path, capsys):
    picture = coordinates(40, 40)
    for name in ("a.png", "b.jfif", "c.tga", "deep/d.jp2"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "photos" / name)
    for folder in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
        (tmp_path / "photos" / folder).mkdir()
        picture.save(tmp_path / "photos" / folder / "thumbnail.png")
    (tmp_path / "photos/notes.txt").write_text("x")
    (tmp_path / "photos/more.txt").write_text("x")
    (tmp_path / "photos/film.mov").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    picture.save(tmp_path / "elsewhere/e.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos/link")
    os.symlink(tmp_path / "photos", tmp_path / "photos/loop")
    found = list_images(tmp_path / "photos")
    names = [path.relative_to(tmp_path / "photos").as_posix() for path in found]
    assert names == ["a.png", "b.jfif", "c.tga", "deep/d.jp2", "link/e.png"]
    assert "left out: 1 .mov, 2 .txt" in capsys.readouterr().err


def test_a_name_in_another_unicode_form_is_named(tmp_path):
    composed = unicodedata.normalize("NFC", "é.png")
    coordinates(40, 40).save(tmp_path / unicodedata.normalize("NFD", composed))
    with pytest.raises(UserError, match="line 2: no file .* another Unicode form"):
        CsvPairs(write_csv(tmp_path / "p.csv", [(composed, "", "")]))


LAYOUTS = {
    "equal names": ("clean/a/1.png", "noisy/a/1.jpg", "clean", "noisy", ""),
    "GoPro": ("gopro/scene/sharp/1.png", "gopro/scene/blur/1.png", "gopro", "gopro", "sharp=blur"),
    "SIDD": ("sidd/01/01_GT_10.png", "sidd/01/01_NOISY_10.png", "sidd", "sidd", "GT=NOISY"),
    "one folder written two ways": ("a/1_GT.png", "a/1_NOISY.png", "a", "a/../a", "GT=NOISY"),
    "DIV2K": ("HR/0001.png", "LR/X4/0001x4.png", "HR", "LR", ".png=x4.png"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_folders_become_a_csv(layout, tmp_path, capsys):
    clean, degraded, first, second, pattern = LAYOUTS[layout]
    picture = coordinates(40, 40)
    alone = Path(clean).with_name(f"9{Path(clean).name}")
    for name in (clean, degraded, alone):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / name)
    match_folders(tmp_path / first, tmp_path / second, tmp_path / "pairs.csv", pattern)
    output = capsys.readouterr()
    assert "1 pairs" in output.out and "1 pictures without a partner" in output.out
    assert output.err.count("no partner: ") == 1
    rows = CsvPairs(tmp_path / "pairs.csv").rows
    assert [row.name for row in rows] == [f"{clean},{degraded}"]


def test_two_partners_are_refused(tmp_path):
    for name in ("clean/1.png", "noisy/1.png", "noisy/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        coordinates(40, 40).save(tmp_path / name)
    with pytest.raises(UserError, match="1.jpg and .*1.png"):
        match_folders(tmp_path / "clean", tmp_path / "noisy", tmp_path / "pairs.csv")
    with pytest.raises(UserError, match="data.py match"):
        CsvPairs(tmp_path / "clean")


# --------------------------------------------------------------------------------------------------
# Rows: columns, sizes, what is said at the start.


def test_columns_that_are_not_used_are_named(tmp_path, capsys):
    coordinates(40, 40).save(tmp_path / "a.png")
    CsvPairs(write_csv(tmp_path / "p.csv", [("a.png", "x")], ["image_path", "prompt"]))
    assert "not used: column 'prompt'" in capsys.readouterr().out


def test_the_line_at_the_start_counts_rows(tmp_path, capsys):
    names = made_of(tmp_path, 20)
    rows = [(name, name if i < 12 else "", "x" if i < 5 else "") for i, name in enumerate(names)]
    train_set, val_set = make_datasets(flags(write_csv(tmp_path / "p.csv", rows)))
    counts = "20 rows, 12 with a condition, 8 degraded on the fly, 5 with captions, "
    assert f"{counts}2 for validation" in capsys.readouterr().out
    assert (len(train_set), len(val_set)) == (18, 2)


def test_degradations_of_paired_rows_are_refused(tmp_path, monkeypatch):
    names = made_of(tmp_path, 12)
    path = write_csv(tmp_path / "p.csv", [(name, name, "") for name in names])
    monkeypatch.setattr("sys.argv", ["train.py", "--degradations", "jpeg"])
    with pytest.raises(UserError, match="--degradations: every row of .* has a condition"):
        make_datasets(flags(path))


def test_a_pair_that_exif_turns_says_so(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    coordinates(40, 30).save(tmp_path / "turned.jpg", exif=exif)
    coordinates(40, 30).save(tmp_path / "plain.png")
    with pytest.raises(UserError, match="40x30.*turned.jpg is turned by its EXIF"):
        CsvPairs(write_csv(tmp_path / "p.csv", [("plain.png", "turned.jpg", "")]))


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_smaller_conditions_are_enlarged(tmp_path, factor, capsys):
    small = noise_picture((10, 12), 0)
    small.resize((10 * factor, 12 * factor)).save(tmp_path / "a.png")
    small.save(tmp_path / "b.png")
    source = CsvPairs(write_csv(tmp_path / "p.csv", [("a.png", "b.png", "")]))
    assert f"{factor} times smaller" in capsys.readouterr().out
    assert source.enlarge == factor
    _, condition, _ = source.load(0)
    expected = small.resize((10 * factor, 12 * factor), Image.Resampling.BICUBIC)
    assert np.array_equal(levels(condition), levels(expected))


def test_different_factors_in_one_csv_are_refused(tmp_path):
    for name, side in (("a.png", 40), ("b.png", 20), ("c.png", 10)):
        coordinates(side, side).save(tmp_path / name)
    rows = [("a.png", "b.png", ""), ("a.png", "c.png", "")]
    with pytest.raises(UserError, match="line 3: a pair of different sizes, 40x40 and 10x10"):
        CsvPairs(write_csv(tmp_path / "p.csv", rows))


def test_small_pictures_are_refused_before_the_start_and_have_their_own_crop(tmp_path, capsys):
    names = made_of(tmp_path, 18, (90, 70))
    noise_picture((14, 60), 99).save(tmp_path / "small.png")
    rows = [(name,) for name in [*names, "small.png"]]
    path = write_csv(tmp_path / "p.csv", rows, ["image_path"])
    with pytest.raises(UserError, match="line 20: the picture is 14x60.*--resolution 12"):
        make_datasets(flags(path))
    _, val_set = make_datasets(flags(path, skip_bad=True))
    assert val_set.draw(0)["clean"].shape == (3, 70, 90)  # not the 14 pixels of the small one
    noise_picture((3, 60), 99).save(tmp_path / "small.png")
    with pytest.raises(UserError) as error:
        make_datasets(flags(path))
    assert "--resolution" not in str(error.value)


def test_restoring_enlarges_as_training_did(tmp_path):
    """Pairs of a factor of 2, trained, restored with what the run knows and with --enlarge."""
    rows = []
    for i in range(12):
        large = noise_picture((48, 40), i)
        large.save(tmp_path / f"{i}.png")
        large.resize((24, 20)).save(tmp_path / f"{i}x2.png")
        rows.append((f"{i}.png", f"{i}x2.png", ""))
    write_csv(tmp_path / "p.csv", rows[:11])
    write_csv(tmp_path / "v.csv", rows[10:])
    words = ["--data", "p.csv", "--val_data", "v.csv", "--val_count", 2, "--resolution", 32]
    output = run("train.py", *words, "--steps", 2, "--workers", 0, cwd=tmp_path)
    assert "2 times smaller" in output and "2 for validation (v.csv)" in output
    assert "10 images" in output  # 10.png is one to validate with
    config = json.loads((tmp_path / "out/p/config.json").read_text())
    assert config["held_out"] == ["10.png,10x2.png", "11.png,11x2.png"]
    restore = "evaluate.py", "--checkpoint", "out/p", "--input", "0x2.png", "--output"
    for flags, size in (((), (48, 40)), (("--enlarge", 4), (96, 80)), (("--enlarge", 1), (24, 20))):
        run(*restore, "o.png", *flags, "--overwrite", cwd=tmp_path)
        assert Image.open(tmp_path / "o.png").size == size
    measured = run("evaluate.py", "--checkpoint", "out/p", "--data", "v.csv", cwd=tmp_path)
    assert "2 rows, 2 with a condition" in measured


# --------------------------------------------------------------------------------------------------
# What is held out, and stays so.


def test_copies_of_a_held_out_picture_are_not_trained_on(tmp_path):
    names = made_of(tmp_path / "a", 20)
    made_of(tmp_path / "b", 20)  # the same pictures in another folder
    rows = [(f"a/{name}",) for name in names] + [(f"a/../b/{name}",) for name in names]
    train_set, val_set = make_datasets(flags(write_csv(tmp_path / "p.csv", rows, ["image_path"])))
    held_out = {row[-6:] for row in data.row_names(val_set)}
    trained = {row[-6:] for row in data.row_names(train_set)}
    assert len(val_set) == 4
    assert held_out and not held_out & trained
    assert len(train_set) == 2 * (20 - len(held_out))


def test_rows_of_a_group_stay_together(tmp_path):
    names = made_of(tmp_path, 20)
    rows = [(name, "scene" + str(i // 5)) for i, name in enumerate(names)]
    path = write_csv(tmp_path / "p.csv", rows, ["image_path", "group"])
    train_set, val_set = make_datasets(flags(path))
    trained = {int(name[:2]) // 5 for name in data.row_names(train_set)}
    held_out = {int(name[:2]) // 5 for name in data.row_names(val_set)}
    assert held_out and trained == {0, 1, 2, 3} - held_out


def test_held_out_pictures_stay_held_out_when_a_csv_grows(tmp_path):
    names = made_of(tmp_path, 40)
    path = write_csv(tmp_path / "p.csv", [(name,) for name in names[:20]], ["image_path"])
    _, val_set = make_datasets(flags(path))
    kept = data.row_names(val_set)
    path = write_csv(tmp_path / "p.csv", [(name,) for name in reversed(names)], ["image_path"])
    train_set, val_set = make_datasets(flags(path), kept=kept)
    assert data.row_names(val_set) == kept
    assert len(train_set) == 38 and not set(kept) & set(data.row_names(train_set))


def test_val_data_is_what_is_validated_and_is_not_trained_on(tmp_path, capsys):
    names = made_of(tmp_path, 20)
    path = write_csv(tmp_path / "p.csv", [(name,) for name in names], ["image_path"])
    val = write_csv(tmp_path / "v.csv", [(name,) for name in names[:6]], ["image_path"])
    train_set, val_set = make_datasets(flags(path, val_data=val, val_count=5))
    assert data.row_names(val_set) == names[:5]
    assert data.row_names(train_set) == names[5:]
    assert "5 more share a picture or group" in capsys.readouterr().out


def test_another_picture_under_the_same_name_and_size_is_named(tmp_path):
    names = made_of(tmp_path, 20)
    path = write_csv(tmp_path / "p.csv", [(name,) for name in names], ["image_path"])
    train_set, _ = make_datasets(flags(path))
    before = json.loads(json.dumps(data.row_digests(train_set)))
    data.check_same(before, data.row_digests(train_set), "x")
    victim = data.row_names(train_set)[3]
    content = bytearray((tmp_path / victim).read_bytes())
    content[100] ^= 1
    (tmp_path / victim).write_bytes(content)
    train_set, _ = make_datasets(flags(path))
    with pytest.raises(UserError, match=f"the row {victim} are not what they were"):
        data.check_same(before, data.row_digests(train_set), "x")


def test_two_folders_with_one_seed_get_different_noise(tmp_path):
    noises = []
    for folder, value in (("train", 100), ("test", 101)):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 40), (value,) * 3).save(tmp_path / folder / "a.png")
        make_pairs(tmp_path / folder, tmp_path / f"{folder}-out", NOISE, [1], seed=0)
        condition = Image.open(tmp_path / f"{folder}-out/condition/00000_a.png")
        noises.append(levels(condition) - value)
    correlation = np.corrcoef(noises[0].ravel(), noises[1].ravel())[0, 1]
    assert abs(correlation) < 0.06  # four standard deviations


def test_jitter_is_known_of_pairs_that_were_made_before(tmp_path):
    coordinates(40, 40).save(tmp_path / "a.png")
    header = ["image_path", "condition_image_path", "degradation"]
    for text, expected in (("color_jitter:contrast=1.2", {"color_jitter"}), ("", set())):
        path = write_csv(tmp_path / "p.csv", [("a.png", "a.png", text)], header)
        assert PairedDataset(CsvPairs(path), 32).degradation_names() == expected


def test_a_degradation_of_two_words_is_one_group(tmp_path):
    coordinates(40, 40).save(tmp_path / "a.png")
    header = ["image_path", "condition_image_path", "degradation"]
    texts = "motion blur", "jpeg:quality=9 downscale:factor=2"
    path = write_csv(tmp_path / "p.csv", [("a.png", "a.png", text) for text in texts], header)
    dataset = PairedDataset(CsvPairs(path), None, training=False)
    assert dataset.name_degradations(0) == ["motion blur"]
    assert dataset.name_degradations(1) == ["jpeg", "downscale"]


# --------------------------------------------------------------------------------------------------
# What a second pair of eyes found.


def test_pictures_that_differ_in_the_middle_alone_are_not_copies(tmp_path):
    digests = set()
    for i in range(20):
        image = Image.new("L", (700, 700))
        image.paste(noise_picture((60, 60), i, "L"), (320, 320))
        image.save(tmp_path / f"{i}.bmp")
        digests.add(data.file_digest(tmp_path / f"{i}.bmp"))
    assert len(digests) == 20


def test_the_held_out_pictures_that_are_left_stay_held_out(tmp_path):
    names = made_of(tmp_path, 40)
    path = write_csv(tmp_path / "p.csv", [(name,) for name in names], ["image_path"])
    kept = data.row_names(make_datasets(flags(path))[1])
    left = [name for name in names if name != kept[1]]
    path = write_csv(tmp_path / "p.csv", [(name,) for name in left], ["image_path"])
    _, val_set = make_datasets(flags(path), kept=kept)
    assert data.row_names(val_set) == [kept[0], *kept[2:]]


def test_one_misfit_does_not_change_the_factor(tmp_path):
    rows = []
    for i in range(4):
        noise_picture((40, 40), i).save(tmp_path / f"{i}.png")
        noise_picture((10, 10), i).save(tmp_path / f"{i}x4.png")
        rows.append((f"{i}.png", f"{i}x4.png", ""))
    rows.append(("0.png", "1.png", ""))
    path = write_csv(tmp_path / "p.csv", rows)
    with pytest.raises(UserError, match="line 6: a pair of different sizes, 40x40 and 40x40"):
        CsvPairs(path)
    source = CsvPairs(path, skip_bad=True)
    assert (len(source), source.enlarge) == (4, 4)


def test_no_picture_is_its_own_partner(tmp_path):
    for name in ("data/1.png", "data/noisy/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        coordinates(40, 40).save(tmp_path / name)
    out = tmp_path / "pairs.csv"
    with pytest.raises(UserError, match="--pattern"):
        match_folders(tmp_path / "data", tmp_path / "data", out)
    match_folders(tmp_path / "data", tmp_path / "data/noisy", out)
    assert [row.name for row in CsvPairs(out).rows] == ["data/1.png,data/noisy/1.png"]


def test_doubled_columns_are_refused(tmp_path):
    coordinates(40, 40).save(tmp_path / "a.png")
    for name in ("caption", "image_path"):
        header = ["image_path", name, "caption"]
        with pytest.raises(UserError, match=f"two columns {name}"):
            CsvPairs(write_csv(tmp_path / "p.csv", [("a.png", "x", "y")], header))
