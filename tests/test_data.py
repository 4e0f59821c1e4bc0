"""Pictures, pairs and their draws: read, cropped, degraded, and made by the data.py command."""

import csv
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from data import CsvPairs, DeadLeaves, PairedDataset, load_batches, make_pairs, seed_for
from data import to_image, to_tensor
from degrade import DEGRADATIONS, UserError, parse_degradations

HEADER = "image_path", "condition_image_path", "caption"


def write_csv(path, rows, header=HEADER, encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([header, *rows])
    return path


def coordinates(width, height):
    """An image whose every pixel tells where it is: red = column, green = row."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))


def levels(image):
    return np.asarray(image).astype(int)


# --------------------------------------------------------------------------------------------------
# Pictures.


def test_tensor_and_image_are_inverse_and_round_to_nearest():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    tensor = to_tensor(image)
    assert tensor.min() == -1 and tensor.max() == 1
    assert tensor.shape == (3, 16, 16)
    assert np.array_equal(levels(to_image(tensor)), levels(image))
    assert np.array_equal(levels(to_image(tensor + 0.9 / 255)), levels(image))
    assert levels(to_image(torch.full((3, 1, 1), 1.7))).max() == 255


def test_dead_leaves_have_the_spectrum_of_photographs(photo):
    """Power falls about as 1/f^2 along a line of the log-log spectrum, as in a photograph."""

    def slope(images):
        power = 0
        for image in images:
            grey = np.asarray(image.convert("L"), float)
            window = np.hanning(len(grey))
            windowed = (grey - grey.mean()) * window[:, None] * window
            power = power + abs(np.fft.fft2(windowed)) ** 2
        n = len(power)
        radius = np.hypot(*np.meshgrid(np.fft.fftfreq(n), np.fft.fftfreq(n)))
        edges = np.geomspace(4 / n, 0.35, 9)
        means = []
        for low, high in zip(edges[:-1], edges[1:]):
            ring = (radius >= low) & (radius < high)
            means.append(power[ring].mean())
        centres = np.sqrt(edges[1:] * edges[:-1])
        return np.polyfit(np.log(centres), np.log(means), 1)[0]

    source = DeadLeaves(8, 128, 0)
    leaves = slope([source.load(i)[0] for i in range(8)])
    assert -3 < leaves < -1.5
    assert abs(leaves - slope([photo.crop((128, 128, 256, 256))])) < 1.5


# --------------------------------------------------------------------------------------------------
# Draws.


def test_both_images_of_a_pair_get_the_same_crop_and_flip(tmp_path):
    clean = coordinates(90, 70)
    marked = np.asarray(clean).copy()
    marked[..., 2] = 77
    clean.save(tmp_path / "a.png")
    Image.fromarray(marked).save(tmp_path / "b.png")
    source = CsvPairs(write_csv(tmp_path / "p.csv", [("a.png", "b.png", "x")]))
    dataset = PairedDataset(source, 32)
    places, steps = set(), set()
    for n in range(60):
        item = dataset[n]
        clean = levels(to_image(item["clean"]))
        condition = levels(to_image(item["condition"]))
        assert np.array_equal(clean[..., :2], condition[..., :2])
        assert (condition[..., 2] == 77).all()
        x, y = clean[..., 0], clean[..., 1]
        step = x[0, 1] - x[0, 0]
        assert (np.diff(x) == step).all()
        assert (np.diff(y, axis=0) == 1).all()
        places.add((x.min(), y.min()))
        steps.add(step)
    assert len(places) > 50
    assert steps == {-1, 1}


def test_every_row_is_drawn_once_per_epoch_in_a_new_order():
    dataset = PairedDataset(DeadLeaves(7, 32, 0), 32)
    epochs = []
    for epoch in range(4):
        rows = tuple(int(dataset.order[7 * epoch + i]) for i in range(7))
        assert sorted(rows) == list(range(7))
        epochs.append(rows)
    assert len(set(epochs)) == 4
    assert int(dataset.order[9]) == epochs[1][2]  # any draw can be asked for on its own


def test_seeds_differ_in_each_part():
    seeds = [seed_for(*parts) for parts in [(0, 1, "noise"), (1, 0, "noise"), (0, 1, "order")]]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_captions(tmp_path):
    coordinates(40, 40).save(tmp_path / "a.png")
    own = CsvPairs(write_csv(tmp_path / "p.csv", [("a.png", "", "my words")]))
    dataset = PairedDataset(own, 32)
    drawn = [dataset.plan(n).caption for n in range(1000)]
    assert set(drawn) == {"", "my words"}
    assert 70 <= drawn.count("") <= 130
    auto = CsvPairs(write_csv(tmp_path / "q.csv", [("a.png", "", "")]))
    dataset = PairedDataset(auto, 32, parse_degradations(["jpeg"]), caption_dropout=0)
    for n in range(50):
        caption = dataset.plan(n).caption
        assert "JPEG" in caption or "compression" in caption
    paired = CsvPairs(write_csv(tmp_path / "r.csv", [("a.png", "a.png", "")]))
    assert PairedDataset(paired, 32, caption_dropout=0)[0]["caption"] == ""


def test_a_row_without_a_condition_is_degraded_on_the_fly_and_one_with_is_not(tmp_path):
    coordinates(40, 40).save(tmp_path / "a.png")
    Image.new("RGB", (40, 40), "white").save(tmp_path / "b.png")
    rows = [("a.png", "b.png", ""), ("a.png", "", "")]
    source = CsvPairs(write_csv(tmp_path / "p.csv", rows))
    paired, bare = [PairedDataset(source, 32, training=False)[i] for i in range(2)]
    assert (paired["condition"] == 1).all()
    assert not (bare["condition"] == 1).all()
    assert not torch.equal(bare["condition"], bare["clean"])


@pytest.mark.parametrize("training", [True, False])
def test_captions_are_known_without_opening_an_image(photos, tmp_path, training, monkeypatch):
    rows = []
    for i in range(12):
        picture = photos / f"{i:02d}.png"
        rows.append((picture, picture if i % 2 else "", "given" if i % 3 else ""))
    source = CsvPairs(write_csv(tmp_path / "plan.csv", rows))
    dataset = PairedDataset(source, 32, seed=3, training=training)
    captions = [dataset[i]["caption"] for i in range(12)]
    monkeypatch.setattr(source, "load", None)
    assert [dataset.plan(i).caption for i in range(12)] == captions
    assert len(set(captions)) > 3


# --------------------------------------------------------------------------------------------------
# Threads that open pictures ahead of the training loop.


class Recorded:
    """A data set that notes what it is asked for, and in which thread. Draw 9 cannot be read."""

    def __init__(self):
        self.planned = []
        self.threads = set()

    def plan(self, n):
        assert threading.current_thread() is threading.main_thread()
        self.planned.append(n)

    def prepare(self, n, plan):
        self.threads.add(threading.get_ident())
        if n == 9:
            raise UserError("draw 9")
        picture = Image.new("RGB", (2, 2), (n, n, n))
        return {"clean": picture, "condition": picture, "caption": "", "draw": n}


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_the_draws_in_their_order(workers):
    """And each draw depends on its number alone."""
    dataset = PairedDataset(DeadLeaves(5, 48, 0), 32, seed=3)
    again = PairedDataset(DeadLeaves(5, 48, 0), 32, seed=3)
    draws = [*range(24, 7, -2), 40]
    seen = []
    for batch in load_batches(dataset, 4, draws, workers):
        for i, n in enumerate(batch["draw"]):
            item = again[n]
            assert torch.equal(batch["clean"][i], item["clean"])
            assert torch.equal(batch["condition"][i], item["condition"])
            assert batch["caption"][i] == item["caption"]
            seen.append(n)
    assert seen == draws
    assert not torch.equal(again[3]["condition"], again[8]["condition"])  # of one row


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_stay_two_batches_ahead_and_end(workers):
    before = threading.active_count()
    dataset = Recorded()
    batches = load_batches(dataset, 2, range(100), workers)
    for k in range(4):  # the batches 0 to 3
        assert next(batches)["draw"] == [2 * k, 2 * k + 1]
        assert dataset.planned == list(range(2 * k + 6))
    with pytest.raises(UserError, match="^draw 9$"):  # of batch 4, and no sooner
        next(batches)
    assert threading.active_count() == before
    assert threading.get_ident() not in dataset.threads
    batches = load_batches(Recorded(), 2, range(20, 100), workers)
    next(batches)
    batches.close()
    assert threading.active_count() == before


# --------------------------------------------------------------------------------------------------
# CSV files, good and bad.


def test_paths_headers_and_encodings(tmp_path):
    (tmp_path / "deep").mkdir()
    coordinates(40, 40).save(tmp_path / "é.png")
    coordinates(40, 40).save(tmp_path / "deep/b.png")
    caption = 'with "quotes", a comma\nand a line'
    rows = [("../é.png", "b.png", caption), (tmp_path / "é.png", "", "")]
    header = " image_path", "condition_image_path ", "caption"
    source = CsvPairs(write_csv(tmp_path / "deep/p.csv", rows, header, "utf-8-sig"))
    assert len(source) == 2
    assert [row.caption for row in source.rows] == [caption, ""]
    clean, condition, _ = source.load(1)
    assert np.array_equal(levels(clean), levels(coordinates(40, 40)))
    assert condition is None


def refused(path, *words):
    """Draw the first row of a CSV, which fails in one line with these words."""
    with pytest.raises(UserError) as error:
        PairedDataset(CsvPairs(path), 32)[0]
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.fixture
def pictures(tmp_path):
    """a.png is a good picture, b.png one of another size, broken.png none, cut.png half of one."""
    coordinates(40, 40).save(tmp_path / "a.png")
    coordinates(41, 40).save(tmp_path / "b.png")
    coordinates(31, 90).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    coordinates(200, 200).save(tmp_path / "cut.png", compress_level=0)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:50000])
    return tmp_path


def test_files_that_are_no_csv_are_refused(pictures):
    (pictures / "binary.csv").write_bytes(b"\xff\xfe\x00\x81")
    refused(pictures / "absent.csv", "absent.csv", "no such file")
    refused(pictures / "binary.csv", "binary.csv")
    path = write_csv(pictures / "p.csv", [("a.png",)], ["photo"])
    refused(path, "p.csv", "no column image_path", "photo")
    refused(write_csv(pictures / "p.csv", []), "p.csv", "no row")


BAD_ROWS = [
    ([("a.png", "", ""), ("", "", "x")], ["line 3", "empty"]),
    ([("broken.png", "", "")], ["line 2", "broken.png"]),
    ([("a.png", "b.png", "")], ["line 2", "different sizes", "40x40", "41x40"]),
    ([("a.png", "", "x", "too many")], ["line 2", "more fields"]),
    ([("small.png", "", "")], ["line 2", "31x90", "32-pixel", "--resolution"]),
]


@pytest.mark.parametrize("rows, words", BAD_ROWS)
def test_bad_rows_are_refused_with_the_place(pictures, rows, words):
    refused(write_csv(pictures / "p.csv", rows), "p.csv", *words)


def test_damage_behind_the_header_is_named_when_it_is_drawn(pictures):
    path = write_csv(pictures / "p.csv", [("a.png", "", ""), ("cut.png", "", "")])
    dataset = PairedDataset(CsvPairs(path), 32, training=False)
    with pytest.raises(UserError, match="p.csv, line 3: .*cut.png: cannot read"):
        dataset[1]


def test_with_skip_bad_whole_pictures_are_decoded_and_rows_left_out(pictures, capsys):
    rows = [("cut.png", "", ""), ("a.png", "", "good"), ("a.png", "b.png", ""), ("small.png", "")]
    source = CsvPairs(write_csv(pictures / "p.csv", rows), skip_bad=True, smallest=32)
    assert [row.caption for row in source.rows] == ["good"]
    said = capsys.readouterr().err
    assert said.count("left out: ") == 3
    for line in (2, 4, 5):
        assert f"p.csv, line {line}: " in said
    with pytest.raises(UserError, match="no row that can be used"):
        CsvPairs(write_csv(pictures / "p.csv", rows[:1]), skip_bad=True)


# --------------------------------------------------------------------------------------------------
# The command.


def test_make_pairs_writes_what_training_reads(photos, tmp_path):
    choices = parse_degradations(["gaussian_noise:sigma=25"])
    made = tmp_path / "pairs"
    make_pairs(photos, made, choices, [1], seed=0)
    source = CsvPairs(made / "pairs.csv")
    assert len(source) == 12
    errors = []
    for i, original in enumerate(sorted(photos.iterdir())):
        clean, condition, _ = source.load(i)
        assert np.array_equal(levels(clean), levels(Image.open(original)))
        caption = source.rows[i].caption
        assert any(phrase in caption for phrase in DEGRADATIONS["gaussian_noise"].phrases)
        errors.append((levels(condition) - levels(clean))[32:64].std())
    assert 18 < np.mean(errors) < 25.5  # clipping takes some of the 25
    again = tmp_path / "again"
    make_pairs(photos, again, choices, [1], seed=0)
    written = sorted(made.rglob("*.png"))
    assert len(written) == 24
    for path in [*written, made / "pairs.csv"]:
        assert path.read_bytes() == (again / path.relative_to(made)).read_bytes()
