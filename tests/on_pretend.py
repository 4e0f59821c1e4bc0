"""What has to hold on a GPU, without one: every path on the pretend GPU, beside the CPU.

tests/test_pretend.py runs it in a process of its own: python -m pytest tests/on_pretend.py -n 0
"""

import copy
import functools
import gc
from argparse import Namespace

import pretend  # before the code under test
import pytest
import torch
from pretend import LAUNCHES, MEMORY, NAME, WAITS
from safetensors.torch import load_file

import bench
import evaluate
import model
import train
import vae
from data import CsvPairs, PairedDataset, to_tensor
from evaluate import Pipeline
from memory import restorer_memory
from model import PRESETS, Prompts
from pipeline import randomize
from test_commands import read_log
from test_train import call, load_newest
from vae import PixelAE

DEVICES = ["cpu", NAME]
FP32 = 1e-4  # of the largest number
BF16 = 0.1  # where the CPU computes in fp32
MOST_WAITS = 4  # of the host in a training step
LAUNCHES_A_BLOCK = 320  # forward and backward, norm, update
FAST = ["--batch_size", 4, "--steps", 2, "--val_every", 2, "--save_every", 1, "--resolution", 32]


def train_on_both(folder, name, *flags, stop=None):
    """Train on the CPU and on the pretend GPU -> both runs. stop: the step that a signal ends.

    In each step the host waits MOST_WAITS times at most.
    """
    runs = []
    waits = []
    train_step = train.train_step

    def counting(*args):
        pretend.reset()
        result = train_step(*args)
        waits.append(WAITS.copy())
        return result

    for device in DEVICES:
        run = folder / f"{name} {device}"
        words = [str(word).replace("DEVICE", device) for word in flags]
        about = [*FAST, *words, "--device", device, "--out", run]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "train_step", counting)
            call("train.py", *about, cwd=folder, stop=stop)
            if stop:
                call("train.py", "--resume", run, cwd=folder)
        runs.append(run)
    assert waits
    for counted in waits:
        assert counted.total() <= MOST_WAITS, counted
    return runs


def error(ours, exact):
    """The distance of two tensors as a share of the size of the second."""
    return ((ours.float().cpu() - exact.float()).norm() / exact.float().norm()).item()


def assert_same_losses(runs, tolerance):
    exact, ours = runs
    for a, b in zip(read_log(ours), read_log(exact), strict=True):
        for key in {"loss", "norm"} & b.keys():
            assert a[key] == pytest.approx(b[key], rel=tolerance), key
        for key in {"restored_psnr", "roundtrip_psnr"} & b.keys():
            assert a[key] == pytest.approx(b[key], abs=0.05)


def assert_same_run(runs):
    """In fp32 each weight, average and first moment (so gradient) is that of the CPU."""
    assert_same_losses(runs, FP32)
    exact, ours = runs
    for name in ("optimizer", "model", "ema"):
        a, b = load_newest(ours, name), load_newest(exact, name)
        assert a.keys() == b.keys()
        for key in a:
            if key.endswith(".B") and name != "optimizer":
                continue  # begins at 0: after two steps it is g / |g|, which magnifies rounding
            if not key.startswith("exp_avg_sq.") and b[key].norm() > 1e-6:
                assert error(a[key], b[key]) < FP32, (name, key)


def assert_nearly_same_run(runs):
    """In bf16 the gradients, all together, are nearly those of the CPU."""
    assert_same_losses(runs, BF16)
    moments = []
    for run in reversed(runs):
        tensors = load_newest(run, "optimizer").items()
        some = [t.float().flatten() for key, t in sorted(tensors) if key.startswith("exp_avg.")]
        moments.append(torch.cat(some))
    assert error(*moments) < BF16


# --------------------------------------------------------------------------------------------------
# The device is as strict as a GPU.


def test_the_device_refuses_what_a_gpu_refuses():
    ours, other = torch.ones(3, device=NAME), torch.ones(3)
    index = torch.tensor([0])
    for mistake in (
        lambda: ours + other,
        lambda: other.add_(ours),
        lambda: torch.cat([ours, other]),
        lambda: torch.stack([ours.sum(), torch.tensor(1.0)]),
        lambda: other[index.to(NAME)],
        lambda: torch.nn.functional.embedding(index, torch.ones(2, 3, device=NAME)),
        lambda: torch.nn.Linear(3, 3)(ours),
        lambda: torch.randn(3, device=NAME, generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match="Expected"):
            mistake()
    with pytest.raises(TypeError, match="numpy"):
        ours.numpy()
    assert (ours * torch.tensor(2.0))[index].item() == 2


def test_it_counts_launches_bytes_waits_and_memory():
    pretend.reset()
    before = pretend.MEMORY.now
    x = torch.ones(1000, device=NAME)
    y = x.view(10, 100)[2:].mul(2)
    assert pretend.MEMORY.now - before == 4000 + 3200
    assert dict(LAUNCHES) == {"ones": 1, "mul": 1}
    assert pretend.BYTES["mul"] == 3200 + 3200
    assert not WAITS
    late = y.to("cpu", non_blocking=True)
    assert late.isnan().all() and not WAITS
    assert y.sum().item() == 1600 and WAITS.total() == 1
    assert (late == 2).all()
    del y
    assert pretend.MEMORY.now - before == 4000


@pytest.mark.parametrize("process", [slice(0, None, 2), slice(1, None, 2)])
def test_a_share_of_the_batch_goes_to_the_device_without_a_wait(process):
    """Every second picture, as the second of two processes has them."""
    pretend.reset()
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    ours = model.to_device(noise[process], NAME)
    assert not WAITS
    assert torch.equal(ours.cpu(), noise[process])


# --------------------------------------------------------------------------------------------------
# Training.


@pytest.mark.parametrize("way", ["projection", "widen"])
def test_sana(way, photos_csv, pipeline_folder, tmp_path):
    """In parts, with checkpointing, stopped and resumed."""
    flags = ["--data", photos_csv, "--model", pipeline_folder, "--conditioning", way]
    flags += ["--accumulate", 2, "--checkpointing"]
    assert_same_run(train_on_both(tmp_path, way, *flags, "--optimizer", "adamw", stop=1))
    bf16 = train_on_both(tmp_path, "bf16", *flags, "--optimizer", "adamw_bf16", stop=1)
    assert_nearly_same_run(bf16)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16"])
def test_the_average_on_the_cpu(optimizer, photos_csv, pipeline_folder, tmp_path):
    """It moves at the last step, by what two steps move it."""
    flags = [*FAST, "--data", photos_csv, "--model", pipeline_folder, "--optimizer", optimizer]
    flags += ["--ema_device", "cpu", "--lr", 1e-3, "--device", NAME, "--out", "run"]
    call("train.py", *flags, cwd=tmp_path, stop=1)
    call("train.py", "--resume", "run", cwd=tmp_path)
    key = "transformer_blocks.0.attn1.to_q.weight"
    file = pipeline_folder / "transformer/diffusion_pytorch_model.safetensors"
    start = load_file(file)[key]
    end = load_newest(tmp_path / "run")[f"sana.{key}"]
    if optimizer == "adamw_bf16":
        end = train.join_fp32(end, load_newest(tmp_path / "run", "optimizer")[f"low.sana.{key}"])
    share = 1 - (3 / 12) ** 2  # the decay of step 2, twice
    moved = load_newest(tmp_path / "run", "ema")[f"sana.{key}"] - start
    assert error(moved, share * (end - start)) < FP32


def test_lora(photos_csv, pipeline_folder, tmp_path):
    flags = ["--data", photos_csv, "--model", pipeline_folder, "--lora", 2, "--checkpointing"]
    assert_nearly_same_run(train_on_both(tmp_path, "lora", *flags))


def test_a_cache(photos_csv, pipeline_folder, tmp_path):
    flags = ["--data", photos_csv, "--model", pipeline_folder]
    for device in DEVICES:
        out = ["--device", device, "--resolution", 32, "--out", f"cache {device}"]
        call("data.py", "cache", *flags, *out, cwd=tmp_path)
    flags += ["--cache", "cache DEVICE", "--optimizer", "adamw"]
    assert_same_run(train_on_both(tmp_path, "cached", *flags))


@pytest.fixture(scope="module")
def presets(photos_csv, published, tmp_path_factory):
    """{name of a stage: [run on the CPU, on the device]} of the preset mini."""
    folder = tmp_path_factory.mktemp("presets")
    flags = ["--data", photos_csv, "--batch_size", 2]
    lpips = ["--lpips_weights", published["alex"], published["alex heads"], "--resolution", 64]
    stages = {
        "autoencoder": ["--model", "mini", "--stage", "autoencoder"],
        "restorer": ["--model", "autoencoder DEVICE"],
        "decoder": ["--model", "restorer DEVICE", "--stage", "decoder", *lpips],
        "LoRA": ["--model", "restorer DEVICE", "--lora", 2],
    }
    runs = {}
    for name, about in stages.items():
        runs[name] = train_on_both(folder, name, *flags, *about)
    return runs


@pytest.mark.parametrize("stage", ["autoencoder", "restorer", "decoder", "LoRA"])
def test_the_stages_of_a_preset(stage, presets):
    assert_same_run(presets[stage])


def test_the_decoder_of_sana(photos_csv, pipeline_folder, tmp_path):
    flags = ["--data", photos_csv, "--batch_size", 2, "--steps", 1]
    train_on_both(tmp_path, "sana", *flags, "--model", pipeline_folder)
    flags += ["--model", "sana DEVICE", "--stage", "decoder", "--latent_steps", 2]
    assert_nearly_same_run(train_on_both(tmp_path, "decoder", *flags))


# --------------------------------------------------------------------------------------------------
# Restoring and measuring.


def restored(pipeline, pixels, **sampling):
    """Restore pixels -> the result, and how often the host waited (not for the prompt)."""
    captions = ["Remove jpeg artifacts."] * len(pixels)
    pipeline.prompts.prepare([*captions, ""])
    pretend.reset()
    return pipeline.restore(pixels, captions, **sampling), WAITS.total()


@pytest.fixture(scope="module")
def sana_run(photos_csv, pipeline_folder, tmp_path_factory):
    """A run of SANA, trained on the CPU."""
    folder = tmp_path_factory.mktemp("sana")
    flags = [*FAST, "--steps", 1, "--data", photos_csv, "--model", pipeline_folder, "--lr", 1e-3]
    call("train.py", *flags, "--device", "cpu", "--out", "run", cwd=folder)
    return folder / "run"


def pipelines(run):
    """Load a run on the CPU and on the device, there in fp32, too."""
    exact, ours = [Pipeline.load(run, device) for device in DEVICES]
    ours.restorer = copy.deepcopy(exact.restorer).to(NAME)
    return exact, ours


def test_prompts(sana_run):
    """Gemma reads them on the device. One more is no more waits."""
    prompts = [Pipeline.load(sana_run, device).prompts for device in DEVICES]
    some = ["Remove noise.", "", "Remove jpeg artifacts.", "Sharpen."]
    waits = []
    for captions in (some, ["Restore."]):
        pretend.reset()
        prompts[1].prepare(captions)
        waits.append(WAITS.total())
    assert LAUNCHES["embedding"] == 1
    exact, exact_mask = prompts[0](some)
    ours, mask = prompts[1](some)
    assert error(ours, exact) < FP32
    assert torch.equal(mask.cpu(), exact_mask)
    assert waits[0] == waits[1]


@pytest.mark.parametrize(
    "sampling",
    [
        {"sampler": "euler"},
        {"sampler": "dpm"},
        {"guidance": 3.0, "condition_guidance": 1.5},
    ],
)
def test_sampling(sampling, sana_run):
    """It equals the CPU, in tiles too, and no step and no tile makes the host wait."""
    exact, ours = pipelines(sana_run)
    pixels = torch.rand(2, 3, 38, 61, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected, _ = restored(exact, pixels, steps=3, **sampling)
    found, waits = restored(ours, pixels.to(NAME), steps=3, **sampling)
    assert error(found, expected) < FP32
    _, more_steps = restored(ours, pixels.to(NAME), steps=6, **sampling)
    assert more_steps == waits


def test_tiles(sana_run, photo, monkeypatch):
    """Of DC-AE."""
    pixels = to_tensor(photo.resize((96, 64)))[None]
    exact, ours = pipelines(sana_run)
    expected, _ = restored(exact, pixels, steps=1)
    _, waits = restored(ours, pixels.to(NAME), steps=1)
    monkeypatch.setattr(vae, "TILE", 16)
    monkeypatch.setattr(vae, "ATTENTION_TILE", 4)
    found, in_tiles = restored(ours, pixels.to(NAME), steps=1)
    assert error(found, expected) < FP32
    assert in_tiles == waits


def test_only_dc_ae_computes_in_tf32(sana_run, photo, monkeypatch):
    linear = torch.nn.functional.linear
    found = set()

    def look(x, weight, bias=None):
        if x.device.type == NAME:
            caller = "DC-AE" if any(weight is p for p in ours.autoencoder.parameters()) else "SANA"
            found.add((caller, torch.backends.cuda.matmul.fp32_precision == "tf32"))
        return linear(x, weight, bias)

    _, ours = pipelines(sana_run)
    monkeypatch.setattr(torch.nn.functional, "linear", look)
    restored(ours, to_tensor(photo.resize((64, 32)))[None].to(NAME), steps=1)
    assert found == {("DC-AE", True), ("SANA", False)}


def test_tiles_of_a_preset_on_pixels(photo, monkeypatch):
    """They are blended. One more tile is no more waits."""
    monkeypatch.setattr(evaluate, "PIXEL_TILE", 96)
    pixels = to_tensor(photo.resize((160, 96)))[None]
    restorer = randomize(model.build_restorer(PRESETS["tiny"]), scale=0.05)
    pipelines = []
    for device in DEVICES:
        parts = copy.deepcopy(restorer).to(device), PixelAE(4), Prompts(PRESETS["tiny"], device)
        pipelines.append(Pipeline(*parts))
    exact, ours = pipelines
    expected, _ = restored(exact, pixels)
    found, waits = restored(ours, pixels.to(NAME))
    assert error(found, expected) < FP32
    wider = torch.cat([pixels, pixels], 3).to(NAME)
    assert restored(ours, wider)[1] == waits


def test_a_picture(sana_run, presets, photo):
    """Pipeline's call, of SANA in bf16: within a level of the CPU's on the average."""
    small = photo.resize((96, 64))
    for run in (sana_run, presets["decoder"][0]):
        pictures = []
        for device in DEVICES:
            picture = Pipeline.load(run, device)(small, "Remove noise.", steps=2)
            pictures.append(to_tensor(picture))
        assert (pictures[1] - pictures[0]).abs().mean() < 2 / 255


def test_the_table_of_scores(presets, photos, published, tmp_path):
    """With LPIPS of a random trunk: the methods of a decoder that sees the degraded picture."""
    table = tmp_path / "two.csv"
    table.write_text(f"image_path\n{photos / '00.png'}\n{photos / '01.png'}\n")
    flags = ["--checkpoint", presets["decoder"][0], "--data", table]
    flags += ["--metrics", "psnr", "ssim", "lpips"]
    flags += ["--lpips_weights", published["alex"], published["alex heads"]]
    tables = []
    for device in DEVICES:
        call("evaluate.py", *flags, "--device", device, "--output", device, cwd=tmp_path)
        tables.append(vae.read_json(tmp_path / device / "scores.json")["methods"])
    exact, ours = tables
    assert list(ours) == ["input", "ceiling", "control", "plain", "restored"]
    for method, scores in ours.items():
        for metric in ("psnr", "ssim", "lpips"):
            value, expected = scores[metric]["mean"], exact[method][metric]["mean"]
            assert value == pytest.approx(expected, rel=1e-3), (method, metric)


def test_fid(photos, published, tmp_path):
    """Inception's features of a picture and its condition; what follows is on the CPU."""
    table = tmp_path / "one.csv"
    table.write_text(f"image_path\n{photos / '00.png'}\n")
    dataset = PairedDataset(CsvPairs(table), None, training=False)
    means = []
    for device in DEVICES:
        metrics = evaluate.Metrics(["fid"], fid_weights=published["inception"], device=device)
        evaluate.evaluate_pairs(dataset, {}, metrics, quiet=True)
        means.append({name: mean for name, (_, mean, _) in metrics.fid.sets.items()})
    assert list(means[1]) == ["input", "clean"]
    for name, mean in means[1].items():
        assert error(mean, means[0][name]) < FP32


# --------------------------------------------------------------------------------------------------
# At full width, from the shapes alone.


@functools.cache
def full_step(flags, layers):
    """Do a training step -> launches, waits, bytes held at most, and what memory.py says."""
    gc.collect()  # what earlier tests have left
    before = MEMORY.now
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretend.USE, "raw", "meta")
        args, stage = bench.settings_and_stage(flags, NAME, layers)
        state = train.State(stage.build_restorer(), args)
        pretend.reset()
        train.train_step(state, stage, stage.batch(), Namespace(count=1))
    count = args.batch_size // args.accumulate
    about = stage.config, stage.autoencoder, args.optimizer, count, args.resolution
    sizes = restorer_memory(*about, args.checkpointing)
    return LAUNCHES.total(), WAITS.total(), MEMORY.most - before, sum(sizes.values())


TWO_PARTS = "--accumulate 2"


@pytest.mark.parametrize("flags", [TWO_PARTS, TWO_PARTS + " --lora 16 --checkpointing"])
def test_peak_memory_is_that_of_the_table_of_cards(flags):
    """Of two parts: while the second is computed, the gradients of the first are there, too."""
    _, _, most, expected = full_step(flags, layers=4)
    assert most == pytest.approx(expected, rel=0.05)


def test_launches_and_waits_of_a_step():
    """A block more adds its own launches; neither it nor a part more adds a wait."""
    fewer, waits, *_ = full_step("", layers=1)
    more, waits_of_more, *_ = full_step("", layers=2)
    _, waits_in_parts, *_ = full_step(TWO_PARTS, layers=4)
    assert more - fewer <= LAUNCHES_A_BLOCK
    assert waits == waits_of_more == waits_in_parts <= MOST_WAITS
