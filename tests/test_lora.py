"""Low-rank changes of a frozen restorer, against peft on diffusers' module."""

import peft
import pytest
import torch
from diffusers import SanaTransformer2DModel

import evaluate
import model
import train
from data import to_tensor
from degrade import UserError
from model import LoRA, Restorer, Sana, add_lora, merge_lora
from test_commands import read_log
from test_engine import distance, losses, share
from test_model import QK_NORM, SMALL, inputs, randomized, seeded, twins
from test_train import assert_same_checkpoint, call, load_newest, parse, refused
from vae import trained_weights

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point"]
FAST = ["--batch_size", 2, "--resolution", 32, "--val_every", 6, "--save_every", 3]
FAST += ["--steps", 6, "--device", "cpu"]


def with_lora(sana, rank=3, conditioning="projection"):
    """A Restorer whose low-rank changes are random."""
    restorer = add_lora(Restorer(sana, conditioning), rank, seeded(3))
    for i, module in enumerate(m for m in restorer.modules() if isinstance(m, LoRA)):
        torch.nn.init.normal_(module.B, std=0.3, generator=seeded(i))
    return restorer.eval()


def answer(restorer, dtype=torch.float32):
    latents, timestep, text, text_mask = inputs()
    condition = torch.randn(latents.shape, generator=seeded(9))
    with torch.no_grad():
        return restorer(latents.to(dtype), condition.to(dtype), timestep, text.to(dtype), text_mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conditioning", ["projection", "widen"])
def test_before_training_it_is_the_base_bit_for_bit(conditioning, dtype):
    sana = randomized(Sana(SMALL | QK_NORM)).to(dtype)
    expected = answer(Restorer(sana, conditioning), dtype)
    sana = randomized(Sana(SMALL | QK_NORM)).to(dtype)
    restorer = add_lora(Restorer(sana, conditioning), 4, seeded())
    restorer.sana.to(dtype)
    assert torch.equal(answer(restorer, dtype), expected)


def test_a_merged_model_is_the_unmerged_one():
    restorer = with_lora(randomized(Sana(SMALL | QK_NORM)))
    before = answer(restorer)
    base = answer(Restorer(randomized(Sana(SMALL | QK_NORM)), "projection"))
    assert (before - base).abs().max() > 0.1 * before.abs().max()
    merge_lora(restorer)
    assert not any(isinstance(module, LoRA) for module in restorer.modules())
    assert (answer(restorer) - before).abs().max() <= 1e-5 * before.abs().max()


def test_the_same_changes_give_what_peft_gives():
    """Output and gradients of A and B, on diffusers' module."""
    theirs, sana = twins(SMALL | QK_NORM)
    ours = add_lora(Restorer(sana, "none"), 3, seeded())
    # only the blocks: other layers of SANA have linear maps of these names nowhere
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=TARGETS, bias="none")
    theirs = peft.get_peft_model(theirs, config)
    pairs = {}
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            short = name.removeprefix("base_model.model.")
            pairs[
                "sana."
                + short.replace(".lora_A.default.weight", ".A").replace(
                    ".lora_B.default.weight", ".B"
                )
            ] = p
    trained = trained_weights(ours)
    assert trained.keys() == pairs.keys()
    assert len(trained) == 2 * 2 * (4 + 4 + 2)
    with torch.no_grad():
        for i, (name, p) in enumerate(trained.items()):
            p.copy_(torch.randn(p.shape, generator=seeded(i)) * 0.3)
            pairs[name].copy_(p.view_as(pairs[name]))
    latents, timestep, text, text_mask = inputs()
    got = ours(latents, None, timestep, text, text_mask)
    expected = theirs(
        hidden_states=latents,
        timestep=timestep,
        encoder_hidden_states=text,
        encoder_attention_mask=text_mask,
        return_dict=False,
    )[0]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    got.square().mean().backward()
    expected.square().mean().backward()
    for name, p in trained.items():
        gradient = pairs[name].grad.view_as(p)
        assert (p.grad - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)


@pytest.mark.parametrize("conditioning", ["projection", "widen"])
def test_what_takes_the_condition_is_trained_in_full(conditioning):
    restorer = with_lora(Sana(SMALL), conditioning=conditioning)
    names = [name for name in trained_weights(restorer) if not name.endswith((".A", ".B"))]
    expected = {
        "projection": ["projection.weight"],
        "widen": ["sana.patch_embed.proj.weight", "sana.patch_embed.proj.bias"],
    }
    assert names == expected[conditioning]


# --------------------------------------------------------------------------------------------------
# From the commands.


@pytest.fixture(scope="module")
def runs(photos_csv, pipeline_folder, tmp_path_factory):
    """A run of LoRA on a pretrained model, one on a restorer, and that restorer."""
    folder = tmp_path_factory.mktemp("lora")
    flags = ["--data", photos_csv, *FAST]
    call("train.py", *flags, "--model", pipeline_folder, "--lora", 2, "--out", "sana", cwd=folder)
    call("train.py", *flags, "--out", "tiny", cwd=folder)
    call("train.py", *flags, "--model", "./tiny", "--lora", 2, "--out", "more", cwd=folder)
    return folder


def test_a_checkpoint_holds_only_what_was_trained(runs):
    for name in ("model", "ema"):
        for run_folder in ("sana", "more"):
            tensors = load_newest(runs / run_folder, name)
            rest = [key for key in tensors if not key.endswith((".A", ".B"))]
            widened = ["sana.patch_embed.proj.bias", "sana.patch_embed.proj.weight"]
            assert sorted(rest) == (["projection.weight"] if run_folder == "sana" else widened)
            assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    moved = [key for key, t in load_newest(runs / "sana", "ema").items() if t.abs().max() > 0]
    assert any(key.endswith(".B") for key in moved)


def test_resuming_is_exact(runs, photos_csv, pipeline_folder, tmp_path):
    """Also in two parts of a batch, with activations computed twice; also in two processes."""
    flags = ["--data", photos_csv, *FAST, "--model", pipeline_folder, "--lora", 2]
    call("train.py", *flags, "--out", "half", cwd=tmp_path, stop=3)
    call("train.py", "--resume", "half", cwd=tmp_path)
    assert_same_checkpoint(tmp_path / "half", runs / "sana")
    parts = ["--accumulate", 2, "--checkpointing", "--out", "parts"]
    call("train.py", *flags, *parts, cwd=tmp_path)
    assert losses(tmp_path / "parts") == pytest.approx(losses(runs / "sana"), rel=1e-4)
    share(2, "train.py", *flags, "--out", "two", cwd=tmp_path)
    assert losses(tmp_path / "two") == pytest.approx(losses(runs / "sana"), rel=1e-4)
    assert distance(tmp_path / "two", runs / "sana") < 1e-3


def test_it_restores_as_any_other_and_as_its_export(runs, photo, tmp_path):
    pipeline = evaluate.Pipeline.load(runs / "sana")
    small = photo.resize((96, 64))
    restored = to_tensor(pipeline(small, steps=2))
    merge_lora(pipeline.restorer)
    merged = to_tensor(pipeline(small, steps=2))
    assert (restored - merged).abs().max() <= 1.01 / 127.5  # one level
    output = call("model.py", "export", runs / "sana", "exported", cwd=tmp_path)
    assert "in_channels 16" in output
    theirs = SanaTransformer2DModel.from_pretrained(tmp_path / "exported")
    latents, timestep, _, _ = inputs()
    condition = torch.randn(latents.shape, generator=seeded(9))
    text = torch.randn(2, 5, 32, generator=seeded(4))
    with torch.no_grad():
        loaded, _ = model.load_restorer(runs / "sana")
        got = loaded(latents, condition, timestep, text)
        both = torch.cat([latents, condition], 1)
        mask = torch.ones(2, 5)
        expected = theirs(both, text, timestep, encoder_attention_mask=mask, return_dict=False)[0]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_going_on_from_it_keeps_its_base(runs, photos_csv, tmp_path):
    flags = ["--data", photos_csv, *FAST, "--model", runs / "more"]
    call("train.py", *flags, "--steps", 1, "--out", "again", cwd=tmp_path)
    before, now = model.read_run(runs / "more"), model.read_run(tmp_path / "again")
    assert now["model"] == before["model"]
    assert now["model"]["lora"] == now["args"]["lora"] == 2
    assert not (tmp_path / "again/base/base").exists()
    first = [line for line in read_log(tmp_path / "again") if line["step"] == 0][0]
    assert first["restored_psnr"] == before["validation"]["restored_psnr"]
    wrong = refused("train.py", *flags, "--lora", 8, "--out", "x", cwd=tmp_path)
    assert "has rank 2 already" in wrong
    wrong = refused("train.py", "--data", photos_csv, *FAST, "--lora", 4, cwd=tmp_path)
    assert "not trained yet" in wrong


@pytest.fixture
def place(pipeline, tmp_path):
    """The pretrained model, its weights in several files."""
    pipeline.save_pretrained(tmp_path / "place", max_shard_size="20KB")
    assert len(list((tmp_path / "place").glob("*/*-of-*.safetensors"))) > 6
    return tmp_path / "place"


def test_a_pretrained_model_that_has_moved_is_named(photos_csv, place, photo, tmp_path):
    """By --model, with --resume and in evaluate.py; also below a decoder."""
    flags = ["--data", photos_csv, *FAST, "--model", place]
    call("train.py", *flags, "--lora", 2, "--out", "lora", cwd=tmp_path)
    flags = ["--data", photos_csv, *FAST, "--model", "lora", "--stage", "decoder"]
    call("train.py", *flags, "--steps", 1, "--out", "decoder", cwd=tmp_path)
    small = photo.resize((32, 32))
    elsewhere = tmp_path / "elsewhere"
    for name in ("lora", "decoder"):
        place.rename(elsewhere)
        resume = "train.py", "--resume", name, "--steps"
        with pytest.raises(UserError, match="place"):
            evaluate.Pipeline.load(tmp_path / name)
        assert "place" in refused(*resume, 7, cwd=tmp_path)
        moved = evaluate.Pipeline.load(tmp_path / name, model=elsewhere)
        restored = moved(small, steps=1)
        elsewhere.rename(place)
        assert evaluate.Pipeline.load(tmp_path / name)(small, steps=1) == restored
        place.rename(elsewhere)
        call(*resume, 7, "--model", "elsewhere", cwd=tmp_path)
        call(*resume, 8, cwd=tmp_path)  # it is known from now on
        evaluate.Pipeline.load(tmp_path / name)
        elsewhere.rename(place)


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_other_weights_in_its_place_are_refused(part, photos_csv, place, photo, tmp_path):
    """By a digest of all files: here one bit of the last one has changed."""
    flags = ["--data", photos_csv, *FAST, "--model", place, "--lora", 2, "--steps", 1]
    call("train.py", *flags, "--out", "run", cwd=tmp_path)
    place = place.rename(tmp_path / "elsewhere")
    file = sorted((place / part).glob("*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    said = f"{part} holds other weights than this run was trained with"
    resume = "train.py", "--resume", "run", "--steps", 7, "--model", place
    assert said in refused(*resume, cwd=tmp_path)
    with pytest.raises(UserError, match=said):
        evaluate.Pipeline.load(tmp_path / "run", model=place)(photo.resize((32, 32)), steps=1)


def test_memory_is_kept_for_what_is_trained_alone(pipeline_folder):
    """No gradient, no moments, no average of the base; on a GPU it would be bf16."""
    args = parse("--model", pipeline_folder, "--lora", 2, "--device", "cpu")
    config = model.describe_model(str(pipeline_folder), "restorer", lora=2)
    restorer = model.initial_restorer(str(pipeline_folder), config, seeded())
    state = train.State(restorer, args)
    assert state.weights.keys() == state.average.keys() == state.own.keys()
    assert state.weights.keys() == state.moments.keys()
    assert len(state.adamw.state) == len(state.weights)
    assert all(name.endswith((".A", ".B")) or "projection" in name for name in state.weights)
