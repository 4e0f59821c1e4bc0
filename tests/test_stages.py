"""The three stages: an autoencoder, a restorer, and a decoder that sees the degraded image."""

import math
import os
import shutil

import pytest
import torch
from diffusers import AutoencoderDC

import data
import evaluate
import model
import train
import vae
from data import to_tensor
from degrade import UserError
from pipeline import DC_AE, randomize
from test_commands import read_csv, read_log
from test_engine import distance, losses, share
from test_train import assert_same_checkpoint, call, load_newest, parse, refused
from test_vae import CONFIGS, IMAGENET, assert_close, seeded
from vae import DCAE, read_json

F32C32 = {  # SANA's, published
    "attention_head_dim": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}


def pixels_of(photo, height, width):
    return to_tensor(photo.resize((width, height)))[None]


def seeing(config, scale=None):
    """A random DC-AE with skips: of zeros, or random ones."""
    autoencoder = randomize(DCAE(config), scale=0.15).add_skips()
    for skip in autoencoder.skips.values():
        if scale:
            torch.nn.init.normal_(skip.weight, std=scale, generator=seeded(7))
        else:
            torch.nn.init.zeros_(skip.weight)
    return autoencoder.requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# The decoder.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sana", "in-f32"])
def test_before_training_it_is_the_plain_decoder_bit_for_bit(name, dtype, photo, monkeypatch):
    config = CONFIGS[name]
    plain = randomize(DCAE(config), scale=0.15).to(dtype)
    ours = DCAE(config).add_skips().to(dtype)
    published = {key for key in ours.state_dict() if not key.startswith("skips.")}
    assert published == plain.state_dict().keys()
    ours.load_state_dict(plain.state_dict(), strict=False)
    ours.eval()
    side = 4 * plain.factor
    degraded = pixels_of(photo, side, 2 * side)
    latents = plain.encode(degraded)
    assert latents.shape[2:] == (4, 8)
    expected = plain.decode(latents)
    for layout in (torch.contiguous_format, torch.channels_last):
        shown = degraded.contiguous(memory_format=layout)
        assert torch.equal(ours.decode(latents, shown), expected)
    monkeypatch.setattr(vae, "TILE", side // 4)
    monkeypatch.setattr(vae, "ATTENTION_TILE", 4)
    assert torch.equal(ours.decode(latents, degraded), ours.decode(latents))
    # whose tiles are smaller
    assert_close(ours.decode(latents, degraded), plain.decode(latents))


@pytest.mark.parametrize("name", ["sana", "in-f32"])
def test_in_tiles_it_gives_the_same_numbers(name, photo, monkeypatch):
    ours = seeing(CONFIGS[name], scale=0.3)
    degraded = pixels_of(photo, 512, 384)
    latents = ours.encode(degraded)
    whole = ours.decode(latents, degraded)
    assert (whole - ours.decode(latents)).abs().max() > 0.01 * whole.abs().max()
    monkeypatch.setattr(vae, "TILE", 128)
    monkeypatch.setattr(vae, "ATTENTION_TILE", 16)
    assert_close(ours.decode(latents, degraded), whole)
    monkeypatch.setattr(ours.encoder, "halo", 0)
    monkeypatch.setattr(ours.decoder, "halo", 0)
    assert (ours.decode(latents, degraded) - whole).abs().max() > 1e-4 * whole.abs().max()


def test_the_skips_see_the_padded_picture_that_encode_sees(photo):
    ours = seeing(DC_AE, scale=0.3)
    odd = pixels_of(photo, 37, 50)
    latents = ours.encode(odd)
    padded = vae.pad_to_multiple(odd, ours.factor)
    assert padded.shape[2:] == (40, 52)
    assert torch.equal(ours.decode(latents, odd), ours.decode(latents, padded))
    with pytest.raises(ValueError, match="the latents' size"):
        ours.decode(latents, odd[..., :32])
    with pytest.raises(ValueError, match="needs? a decoder with skips"):
        randomize(DCAE(DC_AE)).decode(latents, odd)


def test_the_weight_scales_what_is_added_to_each_image(photo):
    ours = seeing(DC_AE, scale=0.3)
    degraded = pixels_of(photo, 32, 32).repeat(2, 1, 1, 1)
    latents = ours.encode(degraded)
    assert torch.equal(ours.decode(latents, degraded, 0.0), ours.decode(latents))
    each = torch.tensor([0.0, 1.0])[:, None, None, None]
    mixed = ours.decode(latents, degraded, each)
    assert_close(mixed[:1], ours.decode(latents)[:1])
    assert_close(mixed[1:], ours.decode(latents, degraded)[1:])
    for key in ours.gains:
        ours.gains[key] /= 2
    halved = ours.decode(latents, degraded)
    for key in ours.gains:
        ours.gains[key] *= 2
    assert_close(halved, ours.decode(latents, degraded, 0.5))
    ours.bfloat16()
    latents = ours.encode(degraded)
    mixed = ours.decode(latents, degraded, each)
    assert torch.equal(mixed[1], ours.decode(latents, degraded)[1])
    assert torch.equal(mixed[0], ours.decode(latents)[0])


def test_gains_bring_the_features_to_the_size_of_what_they_are_added_to(photo):
    """Computed here by hooks on the peer-named modules, without the code that uses them."""
    ours = seeing(DC_AE)
    degraded = pixels_of(photo, 64, 64)
    latents = ours.encode(degraded) + 1
    seen = {}

    def keep(name):
        return lambda module, inputs, output: seen.__setitem__(name, output)

    hooks = []
    for i in (0, 1):
        hooks.append(ours.encoder.down_blocks[i][-2].register_forward_hook(keep(f"e{i}")))
        hooks.append(ours.decoder.up_blocks[i][0].register_forward_hook(keep(f"d{i}")))
    hooks.append(ours.encoder.down_blocks[1][-1].register_forward_hook(keep("e2")))
    hooks.append(ours.decoder.up_blocks[2].register_forward_hook(keep("d2")))
    gains = ours.measure_gains(latents, degraded)
    for hook in hooks:
        hook.remove()
    assert gains.keys() == {"0", "1", "2"}
    for i in (0, 1, 2):
        expected = seen[f"d{i}"].square().mean().sqrt() / seen[f"e{i}"].square().mean().sqrt()
        assert gains[str(i)] == pytest.approx(expected.item(), rel=1e-5)


def test_the_published_size(photo):
    with torch.device("meta"):
        ours = DCAE(F32C32).add_skips().freeze_around_decoder()
    assert sum(p.numel() for p in ours.parameters()) == 312_250_275 + 606_208
    trained = vae.trained_weights(ours)
    skips = sum(p.numel() for name, p in trained.items() if name.startswith("skips"))
    assert skips == 128**2 + 256**2 + 512**2 + 512**2 == 606_208
    assert sum(p.numel() for p in trained.values()) - skips == pytest.approx(22.4e6, rel=2e-3)


def test_other_stages_in_the_decoder_leave_no_place_for_skips():
    lite = IMAGENET | {"decoder_block_types": "ResBlock"}
    with pytest.raises(ValueError, match="no place for skips"):
        DCAE(lite).add_skips()


# --------------------------------------------------------------------------------------------------
# Gradients: the autoencoder's in-place operations are right under autograd.


@pytest.mark.parametrize("name", ["sana", "plain"])
def test_gradients_of_the_round_trip_are_those_of_diffusers(name):
    """AutoencoderDC does nothing in place."""
    theirs = randomize(AutoencoderDC(**CONFIGS[name]), scale=0.15)
    ours = DCAE(CONFIGS[name]).eval()
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(2, 3, 8 * ours.factor, 8 * ours.factor, generator=seeded())
    target = torch.randn(pixels.shape, generator=seeded(1))
    restored, _ = ours(pixels)
    (restored - target).square().mean().backward()
    latents = theirs.encode(pixels).latent
    (theirs.decode(latents).sample - target).square().mean().backward()
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert (a.grad - b.grad).abs().max() <= 1e-4 * b.grad.abs().max() + 1e-9, key


def plain_block(self, x):
    y = torch.nn.functional.silu(self.conv1(x))
    return x + self.norm(self.conv2(y))


def plain_norm(self, x):
    y = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5)
    return y * self.weight[:, None, None] + self.bias[:, None, None]


def test_gradients_of_the_decoder_are_those_without_operations_in_place(photo, monkeypatch):
    ours = seeing(DC_AE, scale=0.3).freeze_around_decoder()
    degraded = pixels_of(photo, 16, 16).repeat(2, 1, 1, 1)
    latents = torch.randn(2, 8, 4, 4, generator=seeded())
    weight = torch.tensor([1.0, 0.0])[:, None, None, None]

    def gradients():
        ours.zero_grad()
        vae.decoder_loss(ours, latents, degraded, degraded * 0.5, weight).sum().backward()
        return {name: p.grad.clone() for name, p in vae.trained_weights(ours).items()}

    got = gradients()
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)
    monkeypatch.setattr(vae.ResBlock, "forward", plain_block)
    monkeypatch.setattr(vae.RMSNorm2d, "forward", plain_norm)
    for name, expected in gradients().items():
        assert (got[name] - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-9, name
    assert all(gradient.abs().max() > 0 for gradient in got.values())


def test_losses_are_what_they_say(photo):
    ours = seeing(DC_AE, scale=0.3)
    clean = pixels_of(photo, 37, 50)
    latents = ours.encode(clean)
    perceptual = lambda a, b: (a - b).square().flatten(1).sum(1)  # noqa: E731
    whole = ours.decode(latents)[..., :37, :50]
    expected = (whole - clean).abs().mean() + 1e-3 * latents.square().mean()
    assert vae.reconstruction_loss(ours, clean).item() == pytest.approx(expected.item(), rel=1e-5)
    more = vae.reconstruction_loss(ours, clean, perceptual) - vae.reconstruction_loss(ours, clean)
    assert more.item() == pytest.approx(0.1 * (whole - clean).square().sum().item(), rel=1e-4)
    degraded = pixels_of(photo.rotate(90), 37, 50)
    restored = ours.decode(latents, degraded, 0.5)[..., :37, :50]
    loss = vae.decoder_loss(ours, latents, degraded, clean, 0.5)
    assert loss.item() == pytest.approx((restored - clean).abs().mean().item(), rel=1e-5)


def test_lpips_has_a_gradient_where_nothing_is_to_see(published):
    trunk = evaluate.read_published(evaluate.LPIPS_TRUNK, published["alex"])
    heads = evaluate.read_published(evaluate.LPIPS_HEADS, published["alex heads"])
    for tensor in trunk.values():
        tensor.zero_()
    lpips = evaluate.LPIPS(trunk, heads)
    picture = torch.zeros(1, 3, 64, 64, requires_grad=True)
    lpips(picture, torch.ones(1, 3, 64, 64)).sum().backward()
    assert picture.grad.isfinite().all()


# --------------------------------------------------------------------------------------------------
# The loop, from the commands.

FAST = ["--steps", 4, "--batch_size", 2, "--resolution", 32, "--val_every", 4, "--save_every", 2]
FAST += ["--device", "cpu"]
NOISE = ["--degradations", "gaussian_noise:sigma=25"]


@pytest.fixture(scope="module")
def stages(photos_csv, tmp_path_factory):
    """The three commands of the README, four steps each; then a LoRA, and its decoder.

    What they were begun with is deleted, and they are moved.
    """
    folder = tmp_path_factory.mktemp("stages")
    flags = ["--data", photos_csv, *FAST]
    first = ["--model", "mini", "--stage", "autoencoder", "--out", "ae"]
    call("train.py", *flags, *first, cwd=folder)
    flags += NOISE
    second = ["--stage", "decoder", "--out"]
    call("train.py", *flags, "--model", "ae", "--out", "pairs", cwd=folder)
    call("train.py", *flags, "--model", "pairs", *second, "decoder", cwd=folder)
    call("train.py", *flags, "--model", "pairs", "--lora", 2, "--out", "lora", cwd=folder)
    call("train.py", *flags, "--model", "lora", *second, "lora-decoder", cwd=folder)
    return folder


def commands(stages):
    """Return {name: flags} of the three stages, each on what lies in that folder."""
    return {
        "ae": ["--model", "mini", "--stage", "autoencoder"],
        "pairs": ["--model", stages / "ae", *NOISE],
        "decoder": ["--model", stages / "pairs", "--stage", "decoder", *NOISE],
    }


def test_each_stage_logs_and_saves_what_it_trains(stages):
    config = model.read_run(stages / "ae")
    assert config["model"]["stage"] == "autoencoder"
    assert "roundtrip_psnr" in config["validation"]
    assert "restored_psnr" not in config["validation"]
    whole = DCAE(model.PRESETS["mini"]["autoencoder"]["dcae"])
    assert load_newest(stages / "ae", "ema").keys() == whole.state_dict().keys()
    assert any(key.startswith("sana.") for key in load_newest(stages / "pairs", "ema"))
    whole.add_skips().freeze_around_decoder()
    assert load_newest(stages / "decoder", "ema").keys() == vae.trained_weights(whole).keys()
    ema = load_newest(stages / "decoder", "ema")
    assert all(ema[name].abs().sum() > 0 for name in ema if name.startswith("skips"))


def test_a_decoder_begins_as_its_restorer_with_the_plain_decoder(stages):
    """The validation before the first step has the restorer's last scores, which were of the same
    weights, pictures and noise. So has that of a LoRA."""
    for name, before in (("decoder", "pairs"), ("lora", "pairs"), ("lora-decoder", "lora")):
        last = model.read_run(stages / before)["validation"]
        first = [line for line in read_log(stages / name) if line["step"] == 0][0]
        assert last["step"] == 4
        assert first["restored_psnr"] == last["restored_psnr"]
        assert first["restored_ssim"] == last["restored_ssim"]


def test_going_on_is_as_if_it_had_never_stopped(stages, photos_csv, tmp_path):
    """Ended by a signal in the third of four steps, each stage."""
    for name, flags in commands(stages).items():
        call("train.py", "--data", photos_csv, *FAST, *flags, "--out", name, cwd=tmp_path, stop=3)
        assert (tmp_path / name / "latest").read_text() == "step_000003"
        call("train.py", "--resume", name, cwd=tmp_path)
        assert_same_checkpoint(tmp_path / name, stages / name)
    config = model.read_run(tmp_path / "decoder")["model"]
    assert config["decoder"]["gains"].keys() == {"1", "2", "3"}
    assert config["decoder"]["steps"] == 1


def test_a_trained_autoencoder_or_decoder_is_trained_further(stages, photos_csv, tmp_path):
    """From its averages, at a tenth of the rate, with the gains and the base that it has."""
    for name, stage, key in (
        ("ae", "autoencoder", "roundtrip_psnr"),
        ("decoder", "decoder", "restored_psnr"),
    ):
        flags = ["--data", photos_csv, *FAST, "--steps", 1, "--stage", stage]
        output = call("train.py", *flags, "--model", stages / name, "--out", name, cwd=tmp_path)
        assert "trained already: --lr 0.0002, a tenth" in output
        ours, theirs = model.read_run(tmp_path / name), model.read_run(stages / name)
        assert ours["model"] == theirs["model"]
        if stage == "autoencoder":
            first = [line for line in read_log(tmp_path / name) if line["step"] == 0][0]
            assert first[key] == theirs["validation"][key]
    assert os.path.samefile(
        tmp_path / "decoder/base/ema.safetensors", stages / "decoder/base/ema.safetensors"
    )
    assert not (tmp_path / "decoder/base/base").exists()


def test_threads_that_share_a_batch_change_no_stage(stages, photos_csv, tmp_path):
    """The same batches in one thread and in two, from the same start."""
    for name, flags in commands(stages).items():
        words = ["--data", photos_csv, *FAST, *flags, "--out", name]
        call("train.py", *words, cwd=tmp_path, threads=2)
        one, two = load_newest(stages / name), load_newest(tmp_path / name)
        for key in one:
            assert (one[key] - two[key]).abs().max() <= 0.05 * (one[key].abs().max() + 1e-3), key
        assert any(not torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("stage", ["autoencoder", "decoder"])
def test_two_processes_are_one(stage, stages, photos_csv, tmp_path):
    name = {"autoencoder": "ae"}.get(stage, stage)
    flags = ["--data", photos_csv, *FAST, *commands(stages)[name], "--out", "two"]
    share(2, "train.py", *flags, cwd=tmp_path)
    assert losses(tmp_path / "two") == pytest.approx(losses(stages / name), rel=1e-4)
    assert distance(tmp_path / "two", stages / name) < 1e-3
    call("train.py", "--resume", "two", "--steps", 5, cwd=tmp_path)


def test_latents_are_those_of_the_sampler_whatever_is_beside_them(stages):
    stage = object.__new__(train.DecoderStage)
    stage.restorer, config = model.load_restorer(stages / "pairs")
    stage.autoencoder = model.load_autoencoder(config, stages / "pairs/autoencoder")
    stage.prompts = model.Prompts(config)
    condition = torch.rand(3, 3, 32, 32, generator=seeded()) * 2 - 1
    captions = ["", "Remove the noise.", "Sharpen."]
    batch = {"condition": condition, "caption": captions, "draw": [6, 7, 9]}
    for steps in (1, 3, 0):
        flags = "--latent_steps", steps, "--stage", "decoder", "--model", "mini"
        stage.args = parse(*flags, "--device", "cpu")
        latents = stage.restore_latents(batch, slice(None))
        for i, n in enumerate(batch["draw"]):
            seed = data.seed_for(0, n, "latents")
            noise = torch.randn(16, 4, 4, generator=torch.Generator().manual_seed(seed))[None]
            with torch.no_grad():
                expected = stage.autoencoder.encode(condition[i : i + 1])
                prompt = stage.prompts(captions[i : i + 1])
                velocity = model.guided(stage.restorer, expected, prompt, None)
                if steps:
                    expected = model.sample_euler(velocity, noise, steps)
            assert_close(latents[i : i + 1], expected)
            assert_close(stage.restore_latents(batch, slice(i, i + 1)), expected)


# --------------------------------------------------------------------------------------------------
# A run folder is whole.


def parts_of(folder):
    """Return the checkpoints within a run that it stands on."""
    files = folder.rglob("ema.safetensors")
    return {file.parent.relative_to(folder).as_posix() for file in files} - {
        model.find_checkpoint(folder).name
    }


def test_what_a_run_stands_on_lies_in_its_folder(stages):
    """As hard links, so they take no room. A decoder of a LoRA has two levels."""
    latest = {name: model.find_checkpoint(stages / name) for name in ("ae", "pairs", "lora")}
    expected = {
        "ae": {},
        "pairs": {"autoencoder": "ae"},
        "lora": {"autoencoder": "ae", "base": "pairs", "base/autoencoder": "ae"},
        "decoder": {"autoencoder": "ae", "base": "pairs", "base/autoencoder": "ae"},
        "lora-decoder": {
            "autoencoder": "ae",
            "base": "lora",
            "base/autoencoder": "ae",
            "base/base": "pairs",
            "base/base/autoencoder": "ae",
        },
    }
    for name, parts in expected.items():
        assert parts_of(stages / name) == parts.keys() | parts_of(stages / name) & {"step_000002"}
        for part, before in parts.items():
            for file in ("config.json", "rows.json", "ema.safetensors"):
                assert os.path.samefile(stages / name / part / file, latest[before] / file)


@pytest.fixture
def moved(stages, tmp_path):
    """Copies of the runs, each alone in a folder of another name."""
    for name in ("pairs", "lora", "decoder", "lora-decoder"):
        shutil.copytree(stages / name, tmp_path / f"{name} elsewhere/run")
    return tmp_path


@pytest.mark.parametrize("name", ["pairs", "lora", "decoder", "lora-decoder"])
def test_without_its_predecessors_and_moved_a_run_restores_and_goes_on(
    name, moved, stages, photo, monkeypatch
):
    small = photo.resize((50, 37))
    run = moved / f"{name} elsewhere/run"
    before = evaluate.Pipeline.load(stages / name)(small).tobytes()
    assert evaluate.Pipeline.load(run)(small).tobytes() == before
    step = model.find_checkpoint(run)
    assert evaluate.Pipeline.load(step)(small).tobytes() == before
    with monkeypatch.context() as patch:
        patch.chdir(step)
        assert evaluate.Pipeline.load(".")(small).tobytes() == before
    call("train.py", "--resume", run, "--steps", 5, cwd=moved)
    assert (run / "latest").read_text() == "step_000005"

    alone = shutil.copytree(model.find_checkpoint(run), moved / "step_000005")
    part = "autoencoder" if name == "pairs" else "base"
    said = f"step_000005 stands on .*{part}.*; take the whole run"
    with pytest.raises(UserError, match=said):
        evaluate.Pipeline.load(alone)
    flags = ["--model", alone, "--stage", model.stage_of(alone), "--out", "x"]
    assert "take the whole run" in refused("train.py", *flags, cwd=moved)
    assert not (moved / "x").exists()


def test_bases_are_checkpoints_themselves(stages, photo):
    small = photo.resize((50, 37))
    for part, name in (("base", "lora"), ("base/base", "pairs")):
        expected = evaluate.Pipeline.load(stages / name)(small).tobytes()
        assert evaluate.Pipeline.load(stages / "lora-decoder" / part)(small).tobytes() == expected


def test_a_folder_of_a_preset_s_name_is_not_the_preset(stages, tmp_path, monkeypatch):
    shutil.copytree(stages / "ae", tmp_path / "mini")
    monkeypatch.chdir(tmp_path)
    assert not model.is_run("mini")
    assert model.stage_of("./mini") == "autoencoder"


# --------------------------------------------------------------------------------------------------
# The table, and what loads such a checkpoint.


@pytest.fixture(scope="module")
def table(stages, photos_csv):
    """evaluate.py --data with it -> what it prints, the folder of its scores."""
    flags = ["--checkpoint", "decoder", "--data", photos_csv, *NOISE, "--metrics", "psnr", "ssim"]
    return call("evaluate.py", *flags, "--output", "scores", cwd=stages), stages / "scores"


def test_the_table_has_every_row(table, stages):
    output, folder = table
    for label in (
        "degraded input",
        "ceiling: autoencoder alone",
        "control: input's own latents",
        "restored, plain decoder",
        "restored  ",
    ):
        assert label in output
    methods = read_json(folder / "scores.json")["methods"]
    names = ["input", "ceiling", "control", "plain", "restored"]
    assert list(methods) == names
    assert len({round(methods[name]["psnr"]["mean"], 6) for name in names}) == 5


def test_each_row_is_what_it_says(table, stages, photos_csv):
    """The first picture again, from the parts."""
    scores = read_csv(table[1] / "scores.csv")[0]
    choices = data.degrade.parse_degradations(["gaussian_noise:sigma=25"])
    item = data.PairedDataset(data.CsvPairs(photos_csv), None, choices, training=False)[0]
    clean, degraded = item["clean"][None], item["condition"][None]
    restorer, config = model.load_restorer(stages / "decoder")
    plain = model.load_autoencoder(config, stages / "ae/step_000004")
    ours = evaluate.Pipeline.load(stages / "decoder").autoencoder
    prompts = model.Prompts(config)
    size = clean.shape[2:]

    def score(pixels):
        image = data.to_image(pixels[0, :, : size[0], : size[1]])
        return evaluate.psnr(to_tensor(image)[None], clean).item()

    with torch.no_grad():
        expected = {
            "ceiling": score(plain.decode(plain.encode(clean))),
            "control": score(ours.decode(ours.encode(degraded), degraded)),
        }
    for name, autoencoder in (("plain", plain), ("restored", ours)):
        pipeline = evaluate.Pipeline(restorer, autoencoder, prompts)
        expected[name] = score(pipeline.restore(degraded, [item["caption"]]))
    assert {name: float(scores[f"{name}_psnr"]) for name in expected} == expected


def test_a_control_without_the_transformer_can_be_trained(stages, photos_csv, tmp_path):
    """Of no steps: its restored row is its control row, and its latents are the condition's."""
    flags = ["--data", photos_csv, *FAST, *commands(stages)["decoder"], "--latent_steps", 0]
    call("train.py", *flags, "--out", "control", cwd=tmp_path)
    test = ["--data", photos_csv, *NOISE, "--metrics", "psnr", "--output", "scores"]
    call("evaluate.py", "--checkpoint", "control", *test, cwd=tmp_path)
    methods = read_json(tmp_path / "scores/scores.json")["methods"]
    assert methods["restored"]["psnr"] == methods["control"]["psnr"]
    assert methods["plain"]["psnr"] != methods["control"]["psnr"]


def test_the_weight_of_the_decoder_is_a_flag(stages, photos_csv, table):
    flags = ["--data", photos_csv, *NOISE, "--metrics", "psnr", "--decoder_weight", 0.5]
    call("evaluate.py", "--checkpoint", "decoder", *flags, "--output", "half", cwd=stages)
    half, whole = [
        read_json(stages / name / "scores.json")["methods"] for name in ("half", "scores")
    ]
    assert half["plain"]["psnr"] == whole["plain"]["psnr"]
    for name in ("restored", "control"):
        assert half[name]["psnr"]["mean"] != whole[name]["psnr"]["mean"]
    wrong = ["--checkpoint", "pairs", *flags]
    assert "no decoder" in refused("evaluate.py", *wrong, cwd=stages)


def test_a_decoder_s_run_is_not_exported_but_its_base_is(stages, tmp_path):
    command = "model.py", "export"
    line = refused(*command, stages / "decoder", "out", cwd=tmp_path)
    assert line.endswith(f"export {stages / 'decoder/base'}")
    output = call(*command, stages / "decoder/base", "base", cwd=tmp_path)
    assert "x0 - condition, which is no velocity" in output
    call(*command, stages / "pairs", "pairs", cwd=tmp_path)
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "base" / name).read_bytes() == (tmp_path / "pairs" / name).read_bytes()


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--model tiny --stage decoder", "works on pixels"),
        ("--model tiny --stage autoencoder", "begin with .*--model tiny --stage restorer,"),
        ("--model mini", "begin with .*--model mini --stage autoencoder,"),
        ("--model mini --stage decoder", "begin with .*--model mini --stage autoencoder,"),
        ("--model AE --stage decoder", "--stage autoencoder or restorer,"),
        ("--model PAIRS --stage autoencoder", "--stage restorer or decoder,"),
        ("--model DECODER", "--stage decoder,"),
        ("--model PAIRS --resolution 33", "give a multiple of 8"),
        ("--model PAIRS --proj_lr 0.1", "no projection is trained here"),
        ("--model mini --stage autoencoder --lpips_weights a b", "crops of 64 pixels"),
    ],
)
def test_stages_in_another_order_are_refused(flags, said, stages, photos_csv, tmp_path):
    words = flags.split()
    for name in ("ae", "pairs", "decoder"):
        words = [stages / name if word == name.upper() else word for word in words]
    command = ["--data", photos_csv, "--resolution", 32, *words, "--out", "x", "--device", "cpu"]
    with pytest.raises(UserError, match=said):
        call("train.py", *command, cwd=tmp_path)
    assert not (tmp_path / "x").exists()


def test_lpips_is_added_to_the_loss(photos_csv, published, tmp_path):
    weights = ["--lpips_weights", published["alex"], published["alex heads"]]
    flags = ["--data", photos_csv, *FAST, "--resolution", 64, "--model", "mini"]
    flags += ["--stage", "autoencoder", "--steps", 1]
    call("train.py", *flags, "--out", "plain", cwd=tmp_path)
    call("train.py", *flags, *weights, "--out", "lpips", cwd=tmp_path)
    assert losses(tmp_path / "lpips")[0] > losses(tmp_path / "plain")[0]
    wrong = ["--lpips_weights", published["alex heads"], published["alex heads"]]
    said = refused("train.py", *flags, *wrong, "--out", "x", cwd=tmp_path)
    assert "not the weights of LPIPS" in said


def test_an_autoencoder_restores_nothing(stages, photos_csv):
    command = ["--checkpoint", "ae", "--data", photos_csv]
    assert "train a restorer on it" in refused("evaluate.py", *command, cwd=stages)


def test_sana_takes_the_same_third_command(pipeline_folder, photos_csv, tmp_path):
    """Its restorer is in the run, its other parts are named: their place may change."""
    place = shutil.copytree(pipeline_folder, tmp_path / "sana")
    flags = ["--data", photos_csv, *FAST, *NOISE, "--steps", 2]
    call("train.py", *flags, "--model", place, "--out", "pairs", cwd=tmp_path)
    flags += ["--model", "pairs", "--stage", "decoder", "--out", "seeing"]
    call("train.py", *flags, cwd=tmp_path)
    config = model.read_run(tmp_path / "seeing")
    gains = config["model"]["decoder"]["gains"]
    assert gains.keys() == {"0", "1", "2"}
    assert all(math.isfinite(gain) and gain > 0 for gain in gains.values())
    assert config["args"]["accumulate"] == 2  # pictures one by one

    shutil.rmtree(tmp_path / "pairs")
    place.rename(tmp_path / "elsewhere")
    resume = ["--resume", "seeing", "--steps", 3]
    assert "sana" in refused("train.py", *resume, cwd=tmp_path)
    call("train.py", *resume, "--model", "elsewhere", cwd=tmp_path)
    call("train.py", "--resume", "seeing", "--steps", 4, cwd=tmp_path)  # it is known from now on
    test = ["--data", photos_csv, *NOISE, "--metrics", "psnr", "--steps", 1]
    output = call("evaluate.py", "--checkpoint", "seeing", *test, cwd=tmp_path)
    assert "control: input's own latents" in output


def test_a_cache_of_another_autoencoder_is_refused(stages, photos_csv, tmp_path):
    autoencoder = stages / "pairs/autoencoder"
    flags = ["--data", photos_csv, "--resolution", 32, "--device", "cpu"]
    call("data.py", "cache", *flags, "--model", autoencoder, "--out", "cache", cwd=tmp_path)
    other = ["--model", "mini", "--stage", "autoencoder", "--seed", 5, "--out", "ae"]
    call("train.py", *flags, *FAST, *other, "--steps", 1, cwd=tmp_path)
    flags += ["--cache", "cache", "--out", "run"]
    said = refused("train.py", *flags, "--model", "ae", cwd=tmp_path)
    assert "was made with another --model" in said
    call("train.py", *flags, "--model", autoencoder, "--steps", 1, cwd=tmp_path)
