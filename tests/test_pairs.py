"""Pairs as people have them: what data.py refuses, converts, says and keeps apart.

Each test has the value that is right. Most of these once gave a wrong one without a word.
"""

import hashlib
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_data import coordinates, levels, write_csv

import data
import degrade
from data import CsvPairs, PairedDataset, list_images, list_rows, make_pairs, match_folders
from degrade import UserError, parse_degradations
from model import PRESETS, Prompts
from vae import PixelAE

NOISE = parse_degradations(["gaussian_noise:sigma=25"])
DRAWING = {
    "degradations": parse_degradations(degrade.DEFAULT_DEGRADATIONS),
    "max_degradations": 3,
    "caption_dropout": 0.1,
    "seed": 0,
}


def datasets(path, val=None, crop=16, seed=0, **others):
    """The data sets of training and validation of a table, and list_rows of those held out."""
    return data.make_datasets(path, val, crop, DRAWING | {"seed": seed}, **others)


def names(dataset):
    return [dataset.source.rows[i].name for i in dataset.rows]


def noise_picture(size, seed):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(values.astype(np.uint8))


def made_of(folder, count, size=(20, 20)):
    """Write count different pictures into a folder -> their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        noise_picture(size, i).save(folder / f"{i:02d}.png")
    return [f"{i:02d}.png" for i in range(count)]


def write_pictures(folder, *paths, size=(20, 20)):
    for name in paths:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        coordinates(*size).save(folder / name)


# --------------------------------------------------------------------------------------------------
# Grey, transparency.


def test_grey_is_degraded_in_one_channel(tmp_path, photo):
    """Noise of sigma 25 in three channels would be 14.4 once it is grey again."""
    grey = photo.convert("L")
    (tmp_path / "photos").mkdir()
    grey.save(tmp_path / "photos/grey.png")
    make_pairs(tmp_path / "photos", tmp_path / "out", NOISE, [1], seed=0)
    for kind in ("clean", "condition"):
        assert Image.open(tmp_path / f"out/{kind}/00000_grey.png").mode == "L"
    source = CsvPairs(write_csv(tmp_path / "p.csv", [("photos/grey.png",)], ["image_path"]))
    item = PairedDataset(source, None, NOISE, training=False, max_degradations=1)[0]
    assert item["grey"]
    assert torch.equal(item["condition"][0], item["condition"][1])
    middle = (levels(grey) > 100) & (levels(grey) < 150)  # where nothing is clipped
    noise = ((item["condition"] - item["clean"])[0] * 127.5).numpy()[middle]
    assert abs(noise.std() - 25) < 0.3


def test_transparent_pixels_are_refused_and_opaque_ones_are_not(tmp_path, capsys):
    opaque = coordinates(40, 40).convert("RGBA")
    opaque.save(tmp_path / "opaque.png")
    opaque.putpixel((3, 3), (1, 2, 3, 254))
    opaque.save(tmp_path / "hidden.png")
    path = write_csv(tmp_path / "p.csv", [("opaque.png", "", ""), ("hidden.png", "", "")])
    with pytest.raises(UserError, match="line 3: .*hidden.png has transparent pixels"):
        CsvPairs(path)
    assert len(CsvPairs(path, skip_bad=True)) == 1
    out = tmp_path.parent / f"{tmp_path.name}-out"
    for refused in ("hidden.png", "exists already"):  # a half-made folder is not gone on with
        with pytest.raises(UserError, match=refused):
            make_pairs(tmp_path, out, NOISE, [1], seed=0)
    make_pairs(tmp_path, tmp_path.parent / f"{out.name}2", NOISE, [1], 0, skip_bad=True)
    said = capsys.readouterr()
    assert "1 pairs in" in said.out and "1 pictures left out" in said.out
    assert said.err.count("hidden.png has transparent pixels") == 2  # a row and a picture


@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_grey_pictures_may_be_stored_as_rgb(tmp_path, extension):
    color, grey = tmp_path / f"c.{extension}", tmp_path / f"g.{extension}"
    noise_picture((20, 20), 0).save(color)
    noise_picture((20, 20), 0).convert("L").convert("RGB").save(grey)
    noise_picture((20, 20), 0).convert("L").save(tmp_path / "l.png")
    for clean, condition, expected in (
        (color.name, grey.name, False),
        (grey.name, "l.png", True),
        (grey.name, grey.name, True),
        (color.name, color.name, None),
    ):
        source = CsvPairs(write_csv(tmp_path / "p.csv", [(clean, condition, "")]))
        assert source.about_conditions().get("keeps_grey") == expected


@pytest.mark.parametrize("clean, expected", [("LLL", True), ("LLR", False), ("RRR", False)])
def test_grey_conditions_with_coloured_clean_pictures_do_not_keep_grey(
    tmp_path, clean, expected, capsys
):
    rows = []
    for i, mode in enumerate(clean):
        picture = noise_picture((20, 20), i)
        if mode == "L":
            picture = picture.convert("L")
        picture.save(tmp_path / f"c{i}.png")
        noise_picture((20, 20), i).convert("L").save(tmp_path / f"g{i}.png")
        rows.append((f"c{i}.png", f"g{i}.png", ""))
    source = CsvPairs(write_csv(tmp_path / "p.csv", rows))
    assert source.about_conditions() == {"enlarge": 1, "keeps_grey": expected}
    said = capsys.readouterr().out
    count = clean.count("R")
    assert (f"{count} of 3 grey conditions have a coloured clean picture" in said) == bool(count)
    item = PairedDataset(source, None, training=False)[2]
    assert (item["grey"], item["clean_grey"]) == (True, clean[2] == "L")
    for i, mode in enumerate(clean):  # degraded on the fly
        about = CsvPairs(write_csv(tmp_path / "p.csv", [(f"c{i}.png", "", "")])).about_conditions()
        assert about == {"enlarge": 1} | ({"keeps_grey": True} if mode == "L" else {})


def test_out_of_memory_on_one_picture_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    made_of(tmp_path / "in", 3)
    apply_recipe = degrade.apply_recipe
    for error in (MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")):
        calls = itertools.count()

        def apply(image, recipe, rng):
            if next(calls) == 1:
                raise error
            return apply_recipe(image, recipe, rng)

        with monkeypatch.context() as patch:
            patch.setattr(degrade, "apply_recipe", apply)
            out = tmp_path / type(error).__name__
            make_pairs(tmp_path / "in", out, NOISE, [1], seed=0, skip_bad=True)
        said = capsys.readouterr()
        assert "01.png: out of memory" in said.err
        assert "2 pairs in" in said.out and "1 pictures left out" in said.out


# --------------------------------------------------------------------------------------------------
# The text of a CSV.

HEADER = b"image_path,condition_image_path,caption\n"
BAD_LINES = {  # name: (the line, what is said)
    "stray quote": (b'01.png,,"Remove "noise" please."\n', "expected after.* close every quote"),
    "open quote": (b'01.png,,"Remove noise.\n', "close every quote"),
    "open quote before others": (b'01.png,,"Remove\n02.png,,"a"\n', "close every quote"),
    "Latin-1": ("01.png,,Körnung\n".encode("latin-1"), "0xf6.* save the table as CSV UTF-8"),
    "Windows-1252": ("01.png,,“noise”\n".encode("cp1252"), "save the table as CSV UTF-8"),
    "endless cell": (b"01.png,," + 140_000 * b"x" + b"\n", "larger than field limit"),
    "too many fields": (b"01.png,,a,b\n", "more fields than columns"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_what_is_no_csv_is_refused_with_its_line_and_left_out(tmp_path, name, capsys):
    made_of(tmp_path, 4)
    line, says = BAD_LINES[name]
    end = b'03.png,,"two\nlines"\n'
    (tmp_path / "p.csv").write_bytes(HEADER + b"00.png,,\n" + line + end)
    with pytest.raises(UserError, match=f"p.csv, line 3: .*{says}"):
        CsvPairs(tmp_path / "p.csv")
    source = CsvPairs(tmp_path / "p.csv", skip_bad=True)
    kept = ["00.png", "02.png", "03.png"] if b"02.png" in line else ["00.png", "03.png"]
    assert [row.name for row in source.rows] == kept
    assert source.rows[-1].caption == "two\nlines"
    assert source.rows[-1].line == 2 + line.count(b"\n") + 1
    said = capsys.readouterr().err
    assert "p.csv, line 3:" in said and said.count("left out: ") == 1


NO_CSV = {
    "semicolons": (HEADER.replace(b",", b";") + b"00.png;;\n", "line 1: semicolons stand between"),
    "tabs": (HEADER.replace(b",", b"\t") + b"00.png\t\t\n", "line 1: tabs stand between"),
    "UTF-16": ("image_path\n00.png\n".encode("utf-16"), "UTF-16.* save it as CSV UTF-8"),
    "UTF-16 without a mark": ("image_path\n00.png\n".encode("utf-16-be"), "UTF-16"),
    "nothing": (b"", "an empty file"),
    "an open quote in the header": (b'"image_path\n00.png\n', "line 1: .* close every quote"),
}


@pytest.mark.parametrize("name", NO_CSV)
def test_a_table_of_another_kind_is_named(tmp_path, name):
    made_of(tmp_path, 1)
    content, says = NO_CSV[name]
    (tmp_path / "p.csv").write_bytes(content)
    for skip_bad in (False, True):
        with pytest.raises(UserError, match=says):
            CsvPairs(tmp_path / "p.csv", skip_bad)


def test_a_csv_made_on_windows_is_read(tmp_path):
    """Its separators, its line ends; a backslash may also be part of a name."""
    (tmp_path / "a").mkdir()
    made_of(tmp_path / "a", 2)
    noise_picture((20, 20), 2).save(tmp_path / "b\\c.png")
    rows = b"image_path,condition_image_path\r\na\\00.png,.\\a\\01.png\r\nb\\c.png,\r\n"
    (tmp_path / "p.csv").write_bytes(rows)
    first, second = CsvPairs(tmp_path / "p.csv").rows
    assert first.paths() == [tmp_path / "a/00.png", tmp_path / "a/01.png"]
    assert second.clean == tmp_path / "b\\c.png"


# --------------------------------------------------------------------------------------------------
# Folders and names.


def test_names_that_are_no_utf8_get_a_table(tmp_path):
    write_pictures(tmp_path / "in", "a.png")
    os.rename(tmp_path / "in/a.png", os.fsencode(tmp_path) + b"/in/K\xf6rn.png")
    make_pairs(tmp_path / "in", tmp_path / "out", NOISE, [1], seed=0)
    assert CsvPairs(tmp_path / "out/pairs.csv").rows[0].clean.name == "00000_K?rn.png"


def test_accents_are_matched_and_grouped_however_they_are_typed(tmp_path, capsys):
    write_pictures(tmp_path / "clean", "K\u00f6rn.png")
    write_pictures(tmp_path / "noisy", "Ko\u0308rn.png")
    match_folders(tmp_path / "clean", tmp_path / "noisy", tmp_path / "m.csv")
    assert "1 pairs in" in capsys.readouterr().out
    names = [f"{i:02d}.png" for i in range(2)]
    made_of(tmp_path, 2)
    lines = [f"{names[0]},Zo\u00eb", f"{names[1]},Zoe\u0308"]
    (tmp_path / "g.csv").write_text("\n".join(["image_path,group", *lines]), encoding="utf-8")
    assert len(set(data.find_units(CsvPairs(tmp_path / "g.csv")).values())) == 1


def test_a_link_that_leads_nowhere_is_counted(tmp_path, capsys):
    write_pictures(tmp_path / "in", "a.png")
    (tmp_path / "in/b.png").symlink_to("gone.png")
    assert [path.name for path in list_images(tmp_path / "in")] == ["a.png"]
    assert "left out: 1 files that cannot be read" in capsys.readouterr().err


def test_long_names_stay_legal_and_two_stay_two(tmp_path):
    names = ["x" * 250 + "a.png", "x" * 250 + "b.png", "é" * 125 + ".png", "y" * 240 + ".png"]
    assert max(len(os.fsencode(name)) for name in names) == 255
    write_pictures(tmp_path / "in", *names)
    make_pairs(tmp_path / "in", tmp_path / "out", NOISE, [1], seed=0)
    made = sorted(path.name for path in (tmp_path / "out/clean").iterdir())
    assert len(made) == 4 and all(len(os.fsencode(name)) <= 255 for name in made)
    source = CsvPairs(tmp_path / "out/pairs.csv")
    assert [path.name for row in source.rows for path in row.paths()] == [
        name for name in made for _ in range(2)
    ]
    stems = [degrade.fit_name(name.removesuffix(".png"), ".jpeg") for name in names[:2]]
    assert len(set(stems)) == 2 and all(name.endswith(".jpeg") for name in stems)


def test_which_files_of_a_folder_are_pictures(tmp_path, capsys):
    shown = ["a.png", "b.jfif", "c.tga", "deep/d.jp2"]
    hidden = [".ipynb_checkpoints/e.png", "@eaDir/e.png", "__MACOSX/e.png", ".e.png"]
    write_pictures(tmp_path, "elsewhere/e.png", *[f"photos/{name}" for name in shown + hidden])
    for name in ("notes.txt", "more.txt", "film.mov"):
        (tmp_path / "photos" / name).write_text("x")
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos/link")
    os.symlink(tmp_path / "photos", tmp_path / "photos/loop")
    found = list_images(tmp_path / "photos")
    below = [path.relative_to(tmp_path / "photos").as_posix() for path in found]
    assert below == [*shown, "link/e.png"]
    assert "left out: 3 files that cannot be read as pictures, such as film.mov" in (
        capsys.readouterr().err
    )
    (tmp_path / "photos/img.heic").write_text("x")
    list_images(tmp_path / "photos")
    assert "4 files" in (said := capsys.readouterr().err)
    assert "such as img.heic; save photos as JPEG or PNG" in said


LAYOUTS = {
    "equal names": ("clean/a/1.png", "noisy/a/1.jpg", "clean", "noisy", ""),
    "GoPro": ("gopro/scene/sharp/1.png", "gopro/scene/blur/1.png", "gopro", "gopro", "sharp=blur"),
    "SIDD": ("sidd/01/01_GT_10.png", "sidd/01/01_NOISY_10.png", "sidd", "sidd", "GT=NOISY"),
    "one folder written two ways": ("a/1_GT.png", "a/1_NOISY.png", "a", "a/../a", "GT=NOISY"),
    "DIV2K": ("HR/0001.png", "LR/X4/0001x4.png", "HR", "LR/X4", ".png=x4.png"),
    "one within the other": ("data/1.png", "data/noisy/1.png", "data", "data/noisy", ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_folders_become_a_csv(layout, tmp_path, capsys):
    clean, degraded, first, second, pattern = LAYOUTS[layout]
    alone = str(Path(clean).with_name(f"9{Path(clean).name}"))
    write_pictures(tmp_path, clean, degraded, alone)
    folders = tmp_path / first, tmp_path / second
    table = tmp_path / "tables/pairs.csv"
    with pytest.raises(UserError, match="--skip_bad leaves it out"):
        match_folders(*folders, table, pattern)
    assert not table.exists()
    match_folders(*folders, table, pattern, skip_bad=True)
    said = capsys.readouterr()
    assert "1 pairs in" in said.out
    assert said.err.count("has no partner") == (2 if "within" in layout else 1)
    assert [row.name for row in CsvPairs(table).rows] == [f"../{clean},../{degraded}"]
    with pytest.raises(UserError, match="pairs.csv exists already"):
        match_folders(*folders, table, pattern, skip_bad=True)


def test_what_match_refuses(tmp_path):
    write_pictures(tmp_path, "clean/1.png", "noisy/1.png", "noisy/1.jpg", "alone/2.png")
    cases = [
        ("clean", "noisy", "", "1.(jpg|png) and .*1.(jpg|png) have one name, 1; leave one out"),
        ("noisy", "clean", "", "have one name, 1; leave one out"),
        ("clean", "clean", "", "--pattern"),
        ("clean", "alone", "", "1.png: no 1 in .*alone"),
    ]
    for clean, degraded, pattern, message in cases:
        with pytest.raises(UserError, match=message):
            match_folders(tmp_path / clean, tmp_path / degraded, tmp_path / "p.csv", pattern)
    with pytest.raises(UserError, match="no picture of .*clean has a partner"):
        match_folders(tmp_path / "clean", tmp_path / "alone", tmp_path / "p.csv", skip_bad=True)
    with pytest.raises(UserError, match="data.py match"):
        CsvPairs(tmp_path / "clean")


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


# --------------------------------------------------------------------------------------------------
# Rows: columns, sizes, what is said at the start.


def test_columns_are_named_that_are_doubled_or_not_used(tmp_path, capsys):
    coordinates(40, 40).save(tmp_path / "a.png")
    CsvPairs(write_csv(tmp_path / "p.csv", [("a.png", "x")], ["image_path", "prompt"]))
    assert "not used: column 'prompt'" in capsys.readouterr().out
    header = ["image_path", "caption", "caption"]
    with pytest.raises(UserError, match="two columns caption"):
        CsvPairs(write_csv(tmp_path / "p.csv", [("a.png", "x", "y")], header))


def test_degradations_of_paired_rows_are_refused(tmp_path):
    coordinates(40, 40).save(tmp_path / "a.png")
    paired = CsvPairs(write_csv(tmp_path / "p.csv", [("a.png", "a.png", "")]))
    bare = CsvPairs(write_csv(tmp_path / "q.csv", [("a.png", "", "")]))
    with pytest.raises(UserError, match="--max_degradations: every row of .* has a condition"):
        data.refuse_useless_flags({"max_degradations": 1}, paired, paired)
    data.refuse_useless_flags({"max_degradations": 1, "seed": 1}, paired, bare)


def test_a_pair_that_exif_turns_says_so(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    coordinates(40, 30).save(tmp_path / "turned.jpg", exif=exif)
    coordinates(40, 30).save(tmp_path / "plain.png")
    with pytest.raises(UserError, match="turned upright by EXIF: 40x30 and 30x40"):
        CsvPairs(write_csv(tmp_path / "p.csv", [("plain.png", "turned.jpg", "")]))


@pytest.mark.parametrize("factor, odd", [(2, (1, 0)), (3, (2, 1)), (4, (0, 3)), (8, (7, 7))])
def test_a_clean_picture_is_cut_to_a_multiple(tmp_path, factor, odd, capsys):
    """Small pictures are often made with their sides rounded down."""
    size = 10 * factor + odd[0], 12 * factor + odd[1]
    coordinates(*size).save(tmp_path / "a.png")
    noise_picture((10, 12), 0).save(tmp_path / "b.png")
    path = write_csv(tmp_path / "p.csv", [("a.png", "b.png", "")])
    source = CsvPairs(path, smallest=10 * factor)
    assert source.enlarge == factor
    assert f"1 clean pictures cut to a multiple of {factor} pixels" in source.summary()
    clean, condition, _ = source.load(0)
    assert clean.size == condition.size == (10 * factor, 12 * factor)
    assert np.array_equal(levels(clean), levels(coordinates(*clean.size)))
    with pytest.raises(UserError, match=f"the picture is {10 * factor}x{12 * factor}, smaller"):
        CsvPairs(path, smallest=10 * factor + 1)


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_smaller_conditions_are_enlarged(tmp_path, factor, capsys):
    small = noise_picture((10, 12), 0)
    small.resize((10 * factor, 12 * factor)).save(tmp_path / "a.png")
    small.save(tmp_path / "b.png")
    path = write_csv(tmp_path / "p.csv", [("a.png", "b.png", "")])
    source = CsvPairs(path)
    assert f"{factor} times smaller" in capsys.readouterr().out
    assert source.enlarge == factor
    _, condition, _ = source.load(0)
    expected = small.resize((10 * factor, 12 * factor), Image.Resampling.BICUBIC)
    assert np.array_equal(levels(condition), levels(expected))
    whole = write_csv(tmp_path / "v.csv", [("a.png", "a.png", "")])
    with pytest.raises(UserError, match=f"1 and {factor} times smaller conditions"):
        datasets(path, whole, crop=8)


def test_other_sizes_are_not_taken_for_rounded_ones(tmp_path):
    """Rounded up, or one pixel off without a factor."""
    coordinates(41, 31).save(tmp_path / "a.png")
    for size in ((21, 16), (40, 31), (41, 30)):
        noise_picture(size, 0).save(tmp_path / "b.png")
        with pytest.raises(UserError, match="a pair of different sizes"):
            CsvPairs(write_csv(tmp_path / "p.csv", [("a.png", "b.png", "")]))


def test_a_row_of_another_factor_is_refused(tmp_path):
    noise_picture((40, 40), 0).save(tmp_path / "a.png")
    noise_picture((10, 10), 1).save(tmp_path / "b.png")
    rows = [("a.png", "b.png", "")] * 4 + [("a.png", "a.png", "")]
    path = write_csv(tmp_path / "p.csv", rows)
    with pytest.raises(UserError, match="line 6: a pair of different sizes.* 40x40 and 40x40"):
        CsvPairs(path)
    source = CsvPairs(path, skip_bad=True)
    assert (len(source), source.enlarge) == (4, 4)


def test_small_pictures_are_refused_before_the_start(tmp_path):
    some = made_of(tmp_path, 18, (90, 70))
    path = write_csv(tmp_path / "p.csv", [(name,) for name in [*some, "small.png"]], ["image_path"])
    noise_picture((14, 60), 99).save(tmp_path / "small.png")
    with pytest.raises(UserError, match="line 20: the picture is 14x60, .* or a smaller --resol"):
        datasets(path)
    _, val_set, _ = datasets(path, skip_bad=True)
    assert val_set[0]["clean"].shape == (3, 70, 90)  # whole, though its crop is 192


# --------------------------------------------------------------------------------------------------
# What is held out, and stays so.


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def expected_units(folder, rows):
    """Return the units of (name, group), as the rule says: {key: names}, by brute force."""
    sets = []
    for name, group in rows:
        marks = {digest(folder / name)}
        if group:
            marks.add("group " + hashlib.sha256(group.encode()).hexdigest())
        sets.append(marks)
    for a, b in [*itertools.permutations(range(len(sets)), 2)] * 3:
        if sets[a] & sets[b]:
            sets[a] |= sets[b]
    units = {}
    for (name, _), marks in zip(rows, sets):
        keys = sorted(mark.removeprefix("group ") for mark in marks if mark.startswith("group"))
        units.setdefault((keys or sorted(marks))[0], []).append(name)
    return units


@pytest.mark.parametrize("groups", [0, 7, 2])
def test_whole_units_are_held_out_in_the_order_of_their_hashes(tmp_path, groups):
    """Whatever the seed and the order of the rows are. b/ has copies of six pictures of a/."""
    rng = np.random.default_rng(groups)
    made_of(tmp_path / "a", 24)
    made_of(tmp_path / "b", 6)
    rows = []
    for path in sorted(tmp_path.rglob("*.png")):
        group = f"scene {rng.integers(groups)}" if groups and rng.random() < 0.7 else ""
        rows.append((path.relative_to(tmp_path).as_posix(), group))
    units = expected_units(tmp_path, rows)
    expected = []
    for key in sorted(units):
        if len(expected) < 3 and len(units[key]) <= 15:
            expected += units[key]
    chosen = []  # by content: which one of two copies is measured is open
    for seed in (0, 1):
        rng.shuffle(rows)
        path = write_csv(tmp_path / "p.csv", rows, ["image_path", "group"])
        train_set, val_set, held_out = datasets(path, seed=seed)
        assert {name for name, _, _ in held_out} == set(expected)
        assert names(val_set) == [name for name, _, _ in held_out][:3]
        assert {*names(train_set), *expected} == {name for name, _ in rows}
        assert len(train_set) == 30 - len(expected)
        measured = {digest(tmp_path / name) for name in names(val_set)}
        chosen.append(measured)
        if held_out:
            assert datasets(path, kept=held_out)[2] == held_out  # when the run is resumed
    assert chosen[0] == chosen[1]
    assert expected or groups == 2


def test_at_most_eight_of_ten_rows_each_are_measured(tmp_path, capsys):
    for count, expected in ((9, 0), (10, 1), (99, 8)):
        some = made_of(tmp_path, count)
        path = write_csv(tmp_path / "p.csv", [(name,) for name in some], ["image_path"])
        train_set, val_set, held_out = datasets(path)
        assert len(held_out) == expected
        assert len(train_set) == count - expected
        assert len(val_set) == (expected or 8)
        said = "validation is on pictures that are trained on" in capsys.readouterr().out
        assert said == (expected == 0)


def test_a_run_keeps_the_pictures_that_it_held_out(tmp_path):
    """When its table grows, shrinks, gets captions, or has its files renamed."""
    some = made_of(tmp_path, 60)
    header = ["image_path", "caption"]
    rows = [(name, "") for name in [*some[:28], some[0], some[1]]]
    train_set, _, kept = datasets(write_csv(tmp_path / "p.csv", rows, header))
    assert datasets(tmp_path / "p.csv", kept=kept)[2] == kept

    def held_out(rows):
        path = write_csv(tmp_path / "q.csv", rows, header)
        more, val_set, now = datasets(path, kept=kept)
        assert names(val_set) == [name for name, _, _ in now][: len(rows) // 10]
        assert not set(names(more)) & {name for name, _, _ in now}
        return [name for name, _, _ in now]

    assert held_out([(name, "new") for name in reversed(some)]) == [name for name, _, _ in kept]
    gone = kept[1][0]
    left = held_out([(name, "") for name in some if name != gone])
    assert left == [name for name, _, _ in kept if name != gone]
    (tmp_path / kept[0][0]).rename(tmp_path / "renamed.png")
    assert held_out([(path.name, "") for path in tmp_path.glob("*.png")])[0] == "renamed.png"


def test_val_data_is_what_is_validated_and_is_not_trained_on(tmp_path, capsys):
    some = made_of(tmp_path, 20)
    made_of(tmp_path / "copies", 6)
    path = write_csv(tmp_path / "p.csv", [(name,) for name in some], ["image_path"])
    val = write_csv(tmp_path / "copies/v.csv", [(name,) for name in some[:6]], ["image_path"])
    train_set, val_set, held_out = datasets(path, val)
    assert names(val_set) == [name for name, _, _ in held_out] == some[:6]
    assert names(train_set) == some[6:]
    assert "6 rows of" in capsys.readouterr().out
    with pytest.raises(UserError, match="all rows share a picture or group with --val_data"):
        datasets(val, path)


# --------------------------------------------------------------------------------------------------
# Rows by digest, and the cache.


@pytest.fixture
def table(tmp_path):
    """Twelve pictures, of which the last is a large BMP."""
    some = made_of(tmp_path, 11)
    noise_picture((900, 700), 11).save(tmp_path / "large.bmp")
    rows = [(name, "") for name in [*some, "large.bmp"]]
    return write_csv(tmp_path / "p.csv", rows, ["image_path", "caption"])


def test_pixels_in_the_middle_of_a_large_file_are_noticed(table, tmp_path):
    train_set = PairedDataset(CsvPairs(table), 16, **DRAWING)
    before = list_rows(train_set)
    expected = fill_cache(tmp_path / "cache", train_set)
    image = Image.open(tmp_path / "large.bmp").copy()
    image.putpixel((450, 350), (1, 2, 3))
    image.save(tmp_path / "large.bmp")
    repainted = PairedDataset(CsvPairs(table), 16, **DRAWING)
    with pytest.raises(UserError, match="began: the files or texts of the row large.bmp have"):
        data.check_same(before, list_rows(repainted), "began")
    with pytest.raises(UserError, match="made of other pictures: .* row large.bmp have changed"):
        data.CachedDataset(tmp_path / "cache", expected, repainted)
    with pytest.raises(UserError, match="began: the row large.bmp was where nothing is now"):
        data.check_same(before, before[:-1], "began")


def fill_cache(folder, train_set):
    """Cache two epochs of a data set with the model tiny -> its fingerprint."""
    expected = data.fingerprint(PRESETS["tiny"], DRAWING, 16)
    index = expected | {"epochs": 2, "rows": list_rows(train_set)}
    prompts = Prompts(PRESETS["tiny"])
    data.make_cache(folder, index, train_set, train_set, PixelAE(4), prompts, "cpu", 2)
    return expected


def test_a_cache_has_the_draws_that_training_would_make(table, tmp_path):
    train_set = PairedDataset(CsvPairs(table), 16, **DRAWING)
    expected = fill_cache(tmp_path / "cache", train_set)
    cached = data.CachedDataset(tmp_path / "cache", expected, train_set)
    for n in range(24):
        item = train_set[n]
        for key in ("clean", "condition"):
            latents = PixelAE(4).encode(item[key][None])[0]
            assert torch.equal(cached[n][key], latents.half().float())
        assert (cached[n]["caption"], cached[n]["draw"]) == (item["caption"], n)
    # then the same draws come again, in another order
    plans = [cached.plan(n) for n in range(24, 48)]
    assert sorted(plans) == list(range(24)) != plans
    assert torch.equal(cached[24]["clean"], cached[plans[0]]["clean"])


def test_a_cache_folder_is_new_or_an_unfinished_cache(table, tmp_path):
    train_set = PairedDataset(CsvPairs(table), 16, **DRAWING)
    for folder in (tmp_path / "letters", tmp_path / "empty"):
        folder.mkdir()
        if folder.name == "letters":
            (folder / "dear.txt").write_text("mine")
        with pytest.raises(UserError, match=f"{folder.name}: it exists already"):
            fill_cache(folder, train_set)
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["dear.txt"]
    folder = tmp_path / "cache"
    expected = fill_cache(folder, train_set)
    whole = {path: load_file(path) for path in folder.rglob("*/*.safetensors")}
    for path in sorted(whole)[5:]:
        path.unlink()
    fill_cache(folder, train_set)
    for path, latents in whole.items():
        assert all(torch.equal(x, latents[key]) for key, x in load_file(path).items())
    data.CachedDataset(folder, expected, train_set)


def test_a_cache_of_other_flags_or_pictures_is_refused(table, tmp_path):
    train_set = PairedDataset(CsvPairs(table), 16, **DRAWING)
    folder = tmp_path / "cache"
    expected = fill_cache(folder, train_set)
    for name, value in (("resolution", 32), ("seed", 1)):
        with pytest.raises(UserError, match=f"--{name} .*this run has {value}"):
            data.CachedDataset(folder, expected | {name: value}, train_set)
    with pytest.raises(UserError, match="was made with another --model"):
        data.CachedDataset(folder, expected | {"model": "x"}, train_set)
    write_csv(table, [("00.png", "new words"), ("01.png", "")], ["image_path", "caption"])
    other = PairedDataset(CsvPairs(table), 16, **DRAWING)
    with pytest.raises(UserError, match="texts of the row 00.png have changed"):
        data.CachedDataset(folder, expected, other)
    with pytest.raises(UserError, match="holds another cache"):
        fill_cache(folder, other)
    path = data.draw_path(folder, 3)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="0000003.safetensors: cannot read this part"):
        data.CachedDataset(folder, expected, train_set)[3]
