import csv

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data import CsvPairs, DeadLeaves, PairedDataset, collate, make_pairs, seed_for, to_image, to_tensor
from degrade import PHRASES, UserError, parse_degradations


def write_csv(path, rows, header=("image_path", "condition_image_path", "caption"), encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([header, *rows])
    return path


def coordinates(width, height):
    """An image whose every pixel tells where it is: red = column, green = row."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))


def test_tensor_and_image_are_inverse_and_round_to_nearest():
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    tensor = to_tensor(levels)
    assert tensor.min() == -1 and tensor.max() == 1 and tensor.shape == (3, 16, 16)
    assert np.array_equal(np.asarray(to_image(tensor)), np.asarray(levels))
    assert np.array_equal(np.asarray(to_image(tensor + 0.9 / 255)), np.asarray(levels))
    assert np.asarray(to_image(torch.full((3, 1, 1), 1.7))).max() == 255


def test_both_images_of_a_pair_get_the_same_crop_and_flip(tmp_path):
    clean = coordinates(90, 70)
    condition = np.asarray(clean).copy()
    condition[..., 2] = 77
    clean.save(tmp_path / "a.png"), Image.fromarray(condition).save(tmp_path / "b.png")
    source = CsvPairs(write_csv(tmp_path / "p.csv", [("a.png", "b.png", "x")]))
    dataset, seen = PairedDataset(source, 32), set()
    for n in range(60):
        item = dataset[n]
        clean, condition = (np.asarray(to_image(item[key])).astype(int) for key in ("clean", "condition"))
        assert np.array_equal(clean[..., :2], condition[..., :2]) and (condition[..., 2] == 77).all()
        x, y = clean[..., 0], clean[..., 1]
        step = x[0, 1] - x[0, 0]
        assert abs(step) == 1 and (np.diff(x) == step).all() and (np.diff(y, axis=0) == 1).all()
        seen.add((x.min(), y.min(), step))
    assert len({s[0] for s in seen}) > 20 and len({s[1] for s in seen}) > 15 and {s[2] for s in seen} == {-1, 1}


def test_every_row_is_drawn_once_per_epoch_in_a_new_order():
    dataset = PairedDataset(DeadLeaves(7, 32, 0), 32)
    epochs = [[int(dataset._row(7 * epoch + i)) for i in range(7)] for epoch in range(4)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and len({tuple(e) for e in epochs}) == 4
    assert int(dataset._row(9)) == epochs[1][2]  # any draw can be asked for on its own


@pytest.mark.parametrize("workers", [1, 2])
def test_on_the_fly_pairs_do_not_depend_on_the_number_of_workers(workers):
    def batches(workers, first):
        loader = DataLoader(PairedDataset(DeadLeaves(5, 48, 0), 32, seed=3), 4, sampler=range(first, 24),
                            num_workers=workers, collate_fn=collate)
        return list(loader)
    alone, split, later = batches(0, 0), batches(workers, 0), batches(workers, 8)
    for a, b in [*zip(alone, split, strict=True), *zip(alone[2:], later, strict=True)]:
        assert torch.equal(a["clean"], b["clean"]) and torch.equal(a["condition"], b["condition"]) and a["caption"] == b["caption"]
    assert not torch.equal(alone[0]["condition"], alone[1]["condition"])


def test_seeds_differ_in_each_part():
    seeds = {seed_for(s, i, w) for s in range(5) for i in range(5) for w in ("noise", "order")}
    assert len(seeds) == 50 and all(0 <= s < 2**63 for s in seeds)


def test_captions(tmp_path):
    coordinates(40, 40).save(tmp_path / "a.png")
    own = CsvPairs(write_csv(tmp_path / "p.csv", [("a.png", "", "my words")]))
    drawn = [PairedDataset(own, 32)[n]["caption"] for n in range(1000)]
    assert set(drawn) == {"", "my words"} and 70 <= drawn.count("") <= 130
    auto = CsvPairs(write_csv(tmp_path / "q.csv", [("a.png", "", "")]))
    dataset = PairedDataset(auto, 32, parse_degradations(["jpeg"]), caption_dropout=0)
    assert all("JPEG" in c or "compression" in c for c in (dataset[n]["caption"] for n in range(50)))
    paired = CsvPairs(write_csv(tmp_path / "r.csv", [("a.png", "a.png", "")]))
    assert PairedDataset(paired, 32, caption_dropout=0)[0]["caption"] == ""


def test_degradation_modes(tmp_path):
    coordinates(40, 40).save(tmp_path / "a.png"), Image.new("RGB", (40, 40), "white").save(tmp_path / "b.png")
    source = CsvPairs(write_csv(tmp_path / "p.csv", [("a.png", "b.png", "")]))
    white = lambda mode: bool((PairedDataset(source, 32, degradation=mode)[0]["condition"] == 1).all())
    assert white("auto") and white("paired") and not white("on_the_fly")
    bare = CsvPairs(write_csv(tmp_path / "q.csv", [("a.png",)], ["image_path"]))
    assert isinstance(PairedDataset(bare, 32, degradation="paired")[0], UserError)
    assert not isinstance(PairedDataset(bare, 32)[0], UserError)


def test_captions_are_known_without_opening_an_image(photos, tmp_path):
    rows = [(photos / f"{i:02d}.png", photos / f"{i:02d}.png" if i % 2 else "", "given" if i % 3 else "") for i in range(12)]
    source = CsvPairs(write_csv(tmp_path / "plan.csv", rows))
    for options in ({}, {"degradation": "on_the_fly"}, {"training": False}):
        dataset = PairedDataset(source, 32, seed=3, **options)
        items = [dataset.draw(i)["caption"] for i in range(12)]
        source.load, load = None, source.load
        assert [dataset.plan(i)[2] for i in range(12)] == items and len(set(items)) > 3
        source.load = load


def test_paths_headers_and_encodings(tmp_path):
    (tmp_path / "deep").mkdir()
    coordinates(40, 40).save(tmp_path / "é.png"), coordinates(40, 40).save(tmp_path / "deep/b.png")
    path = write_csv(tmp_path / "deep/p.csv", [("../é.png", "b.png", 'with "quotes", a comma\nand a line'), (tmp_path / "é.png", "", "")],
                     header=(" image_path", "condition_image_path ", "caption"), encoding="utf-8-sig")
    source = CsvPairs(path)
    assert len(source) == 2 and source.peek(0)[1].endswith("and a line") and source.peek(0)[0]
    assert source.load(1)[1] is None and source.peek(1) == (False, "")


def test_bad_csvs_are_refused_with_the_place(tmp_path):
    coordinates(40, 40).save(tmp_path / "a.png"), coordinates(41, 40).save(tmp_path / "b.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "empty.csv").write_bytes(b""), (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81")

    def refused(rows, words, **options):
        with pytest.raises(UserError) as error:
            dataset = PairedDataset(CsvPairs(rows if isinstance(rows, type(tmp_path)) else write_csv(tmp_path / "p.csv", rows, **options)), 32)
            dataset.draw(0)
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    refused(tmp_path / "absent.csv", ["absent.csv", "no such file"])
    refused(tmp_path / "empty.csv", ["empty.csv", "file is empty"])
    refused(tmp_path / "binary.csv", ["binary.csv"])
    refused([], ["no rows"])
    refused([("a.png",)], ["no column image_path", "photo"], header=["photo"])
    refused([("a.png", "", ""), ("", "", "x")], ["line 3", "empty"])
    refused([("gone.png", "", "")], ["line 2", "gone.png"])
    refused([("broken.png", "", "")], ["line 2", "broken.png"])
    refused([("a.png", "b.png", "")], ["line 2", "different sizes", "40x40", "41x40"])
    refused([("a.png", "", "x", "too many")], ["line 2", "more fields"])
    coordinates(31, 90).save(tmp_path / "small.png")
    refused([("small.png", "", "")], ["line 2", "31x90", "--resolution 28"])


def test_make_pairs_writes_what_training_reads(photos, tmp_path):
    make_pairs(photos, tmp_path / "pairs", parse_degradations(["gaussian_noise:sigma=25"]), [1], seed=0)
    source = CsvPairs(tmp_path / "pairs/pairs.csv")
    assert len(source) == 12
    errors = []
    for i, original in enumerate(sorted(photos.iterdir())):
        (clean, condition, _), (_, caption) = source.load(i), source.peek(i)
        assert np.array_equal(np.asarray(clean), np.asarray(Image.open(original))) and any(phrase in caption for phrase in PHRASES["gaussian_noise"])
        errors.append((np.asarray(condition).astype(float) - np.asarray(clean))[32:64].std())
    assert 18 < np.mean(errors) < 25.5  # clipping takes some of the 25
    with pytest.raises(UserError, match="exists already"):
        make_pairs(photos, tmp_path / "pairs", parse_degradations(["jpeg"]), [1], seed=0)
    again = tmp_path / "again"
    make_pairs(photos, again, parse_degradations(["gaussian_noise:sigma=25"]), [1], seed=0)
    for path in (tmp_path / "pairs").rglob("*.png"):
        assert path.read_bytes() == (again / path.relative_to(tmp_path / "pairs")).read_bytes()


def test_dead_leaves_have_the_spectrum_of_photographs(photo):
    """Power falls about as 1/f^2 along a line of the log-log spectrum, as in the photograph beside it."""
    def slope(images):
        power = 0
        for image in images:
            grey = np.asarray(image.convert("L"), float)
            window = np.hanning(len(grey))
            power = power + abs(np.fft.fft2((grey - grey.mean()) * window[:, None] * window)) ** 2
        n = len(power)
        radius = np.hypot(*np.meshgrid(np.fft.fftfreq(n), np.fft.fftfreq(n)))
        bins = np.geomspace(4 / n, 0.35, 9)
        means = [power[(radius >= low) & (radius < high)].mean() for low, high in zip(bins, bins[1:])]
        return np.polyfit(np.log(np.sqrt(bins[1:] * bins[:-1])), np.log(means), 1)[0]
    leaves = slope([DeadLeaves(8, 128, 0).load(i)[0] for i in range(8)])
    assert -3 < leaves < -1.5 and abs(leaves - slope([photo.crop((128, 128, 256, 256))])) < 1.5
