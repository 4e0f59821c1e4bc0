"""The transformer against diffusers', and from text-to-image to restoration: loss and samplers."""

import hashlib
import json
import unicodedata
from unittest.mock import Mock, call

import pytest
import torch
from diffusers import SanaTransformer2DModel

import model
from degrade import UserError
from model import PRESETS, SAMPLERS, GLUMBConv, Restorer, Sana, add_noise, build_restorer
from model import draw_sigma, flow_loss, guided, hash_prompts, sample_euler, split_words

SMALL = {
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": 16,
    "mlp_ratio": 2.5,
}
QK_NORM = {"qk_norm": "rms_norm_across_heads"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randomized(module, seed=0):
    """Fill all weights at random, also those where training would start from zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(seed)) * 0.3)
            seed += 1
    return module


def inputs(batch=2, channels=8, grid=(5, 7), length=6, text_channels=16):
    """Draw latents, timestep, text and text_mask, of which every second text has two tokens."""
    generator = seeded(1)
    lengths = torch.tensor([length, 2] * batch)[:batch]
    latents = torch.randn(batch, channels, *grid, generator=generator)
    timestep = torch.rand(batch, generator=generator) * 1000
    text = torch.randn(batch, length, text_channels, generator=generator)
    return latents, timestep, text, torch.arange(length) < lengths[:, None]


def twins(config):
    """Make diffusers' transformer and this project's, with the same random weights."""
    theirs = randomized(SanaTransformer2DModel(**config).float().eval())
    ours = Sana(config)
    ours.load_state_dict(theirs.state_dict())  # strict: the same names, all of them
    return theirs, ours


def shapes(module):
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


# --------------------------------------------------------------------------------------------------
# The transformer.

CHANGES = [
    {},
    QK_NORM,
    {"attention_bias": True},
    {"mlp_ratio": 3.3},
    {"in_channels": 16},
    {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 24},
    {"interpolation_scale": 2.0, "sample_size": 7},
    {"interpolation_scale": 0.5, "out_channels": 5},
    {"timestep_scale": 0.001},
    {"out_channels": None},
    {"norm_eps": 1e-3},
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("grid", [(5, 7), (1, 3), (9, 4)])
def test_sana_computes_what_diffusers_computes(change, grid):
    config = SMALL | change
    theirs, ours = twins(config)
    latents, timestep, text, mask = inputs(channels=config["in_channels"], grid=grid)
    # diffusers leaves timestep_scale to the caller
    scaled = timestep * config.get("timestep_scale", 1)
    expected = theirs(latents, text, scaled, encoder_attention_mask=mask.float()).sample
    got = ours(latents, timestep, text, mask)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()

    expected.square().sum().backward()
    got.square().sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, p in ours.named_parameters():
        gradient = gradients[name]
        # one that is zero but for rounding is compared with the largest gradient there is
        scale = max(gradient.abs().max().item(), 1e-3 * largest)
        assert (p.grad - gradient).abs().max() <= 1e-4 * scale, name


@pytest.mark.parametrize("strip, rows", [(1, 3), (20, 6), (44, 9)])
def test_strips_of_the_feed_forward_part_change_nothing(strip, rows, monkeypatch):
    sana = randomized(Sana(SMALL))
    latents, timestep, text, mask = inputs(grid=(9, 5))
    heights = []
    mix = GLUMBConv.mix

    def watch(self, x, grid):
        heights.append(grid[0])
        return mix(self, x, grid)

    with torch.no_grad():
        whole = sana(latents, timestep, text, mask)
        monkeypatch.setattr(GLUMBConv, "mix", watch)
        monkeypatch.setattr(model, "STRIP", strip)
        assert (sana(latents, timestep, text, mask) - whole).abs().max() <= 1e-5
    assert max(heights) == rows


@pytest.mark.parametrize("change", [{}, QK_NORM, {"interpolation_scale": 1.0}])
def test_in_bf16_sana_is_no_further_from_the_fp32_answer_than_diffusers(change):
    theirs, ours = twins(SMALL | change | {"num_layers": 3})
    latents, timestep, text, mask = inputs(batch=4, grid=(12, 10))
    with torch.no_grad():
        exact = theirs(latents, text, timestep, encoder_attention_mask=mask.float()).sample
        ours.bfloat16()
        theirs.bfloat16()
        latents = latents.bfloat16()
        text = text.bfloat16()
        got = ours(latents, timestep, text, mask)
        peer = theirs(latents, text, timestep, encoder_attention_mask=mask.bfloat16()).sample
    assert got.dtype == torch.bfloat16
    error = (got.float() - exact).square().mean().sqrt()
    assert error <= 1.02 * (peer.float() - exact).square().mean().sqrt()


SIZE_0_6B = {
    "num_layers": 28,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}


def test_published_sizes_have_the_peers_tensors():
    high_resolution = {"interpolation_scale": 2.0, "sample_size": 128}  # 4K
    for config in (QK_NORM, SIZE_0_6B, high_resolution):
        with torch.device("meta"):
            ours = Sana(config)
            theirs = SanaTransformer2DModel(**config)
        assert shapes(ours) == shapes(theirs)
        if config is QK_NORM:  # SANA 1.5
            assert len(ours.state_dict()) == 476
            assert sum(p.numel() for p in ours.parameters()) == 1_604_641_952


def test_configs_that_are_not_built_are_refused():
    for key, value in [("guidance_embeds", True), ("qk_norm", "layer_norm"), ("depth", 3)]:
        with pytest.raises(ValueError, match=key):
            Sana(SMALL | {key: value})


def test_masked_caption_tokens_change_nothing():
    """Without a mask all tokens are real."""
    restorer = randomized(Restorer(Sana(SMALL)))
    latents, timestep, text, mask = inputs()

    def answer(text, *mask):
        return restorer(latents, latents, timestep, text, *mask)

    other = torch.where(mask[..., None], text, 1e3)
    assert torch.allclose(answer(other, mask), answer(text, mask), atol=1e-5)
    assert torch.allclose(answer(text), answer(text, torch.ones_like(mask)), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="text_mask .* bool"):
        answer(text, mask.float())  # it would be added to the logits


# --------------------------------------------------------------------------------------------------
# The restorer.


@pytest.mark.parametrize("conditioning, error", [("projection", 0), ("widen", 1e-6)])
def test_a_restorer_starts_as_the_text_to_image_model(conditioning, error):
    sana = randomized(Sana(SMALL))
    latents, timestep, text, mask = inputs()
    condition = torch.randn(latents.shape, generator=seeded(9)) * 100
    before = sana(latents, timestep, text, mask)
    restorer = Restorer(sana, conditioning)
    after = restorer(latents, condition, timestep, text, mask)
    assert (after - before).abs().max() <= error * before.abs().max()
    layer = restorer.projection if conditioning == "projection" else sana.patch_embed.proj
    layer.weight.data[:, 8:] += 0.01
    assert not torch.allclose(restorer(latents, condition, timestep, text, mask), before)


@pytest.mark.parametrize("conditioning", ["projection", "widen", "none"])
def test_a_transformer_that_is_widened_already_is_refused(conditioning):
    exported = Sana(SMALL | {"in_channels": 16})
    widened = Restorer(Sana(SMALL), "widen").sana
    for sana in (exported, widened):
        with pytest.raises(ValueError, match="takes 16 channels and gives 8"):
            Restorer(sana, conditioning)


def test_untrained_tiny_restorer_returns_its_input():
    restorer = build_restorer(PRESETS["tiny"])
    restorer.sana.initialize(seeded())
    condition = torch.randn(2, 48, 4, 6, generator=seeded())
    prompt = hash_prompts(["", "remove noise"])
    velocity = guided(restorer, condition, prompt, prompt)
    for steps in (1, 5):
        noise = torch.randn(condition.shape, generator=seeded(1))
        assert torch.allclose(sample_euler(velocity, noise, steps), condition, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# The samplers.


class StraightPath:
    """The velocity of the straight line from the point x, at the sigma of its step, to x0."""

    def __init__(self, x0, sigmas):
        self.x0 = x0
        self.sigmas = sigmas
        self.timesteps = []

    def __call__(self, x, timestep):
        assert timestep.shape == x.shape[:1]
        sigma = self.sigmas[len(self.timesteps)]
        self.timesteps.append(timestep[0].item())
        return (x - self.x0) / sigma


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("sampler, start", [("euler", 1), ("dpm", 0.999)])
def test_samplers_are_exact_on_a_straight_path_whatever_the_steps(sampler, start, steps):
    x0, noise = torch.randn(2, 2, 8, 4, 4, generator=seeded())
    evenly = [start * (1 - i / steps) for i in range(steps)]
    sigmas = [3 * sigma / (1 + 2 * sigma) for sigma in evenly]  # with a shift of 3
    velocity = StraightPath(x0, sigmas)
    assert torch.allclose(SAMPLERS[sampler](velocity, noise, steps), x0, atol=1e-5)
    timesteps = [1000 * sigma for sigma in sigmas]
    if sampler == "dpm":
        timesteps = [int(timestep) for timestep in timesteps]
    assert velocity.timesteps == pytest.approx(timesteps)


def test_one_step_is_the_prediction_of_x0():
    restorer = randomized(Restorer(Sana(SMALL), prediction="residual"))
    latents, _, text, mask = inputs()
    condition = torch.randn(latents.shape, generator=seeded(2))
    velocity = guided(restorer, condition, (text, mask), (text, mask))
    x0 = sample_euler(velocity, latents, 1)
    at_one = torch.full((2,), 1000.0)
    both = torch.cat([latents, condition], 1).flatten(2)
    projected = restorer.projection.weight.flatten(1) @ both
    residual = restorer.sana(projected.unflatten(2, (5, 7)), at_one, text, mask)
    assert torch.allclose(x0, condition + residual, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# The loss.


def test_noise_fraction_0_is_the_image_and_1_is_the_noise():
    x0, noise = torch.randn(2, 2, 12, 4, 4, generator=seeded())
    expected = torch.stack([x0[0], noise[1]])
    assert torch.equal(add_noise(x0, noise, torch.tensor([0.0, 1.0])), expected)


def test_flow_loss_is_the_mean_squared_error_with_less_weight_on_its_constant_part():
    x0, condition, noise = torch.randn(3, 2, 8, 5, 7, generator=seeded())
    _, _, text, mask = inputs()
    sigma = torch.tensor([0.05, 0.8])
    restorer = randomized(Restorer(Sana(SMALL)))
    share = sigma[:, None, None, None]
    x = (1 - share) * x0 + share * noise
    error = restorer(x, condition, 1000 * sigma, text, mask) - (noise - x0)
    constant = error.mean((2, 3), keepdim=True)  # of each image and channel
    varying = error - constant
    for mean_weight in (0, 0.1, 0.5, 1):
        got = flow_loss(restorer, x0, condition, text, mask, sigma, noise, mean_weight)
        # by Pythagoras: the error's square is the sum of the squares of the two parts
        expected = varying.square().mean((1, 2, 3))
        expected = expected + (mean_weight * constant).square().mean((1, 2, 3))
        assert torch.allclose(got, expected, rtol=1e-4)


class Answer(torch.nn.Module):
    """In place of a transformer: it answers the same residual, whatever it is given."""

    def __init__(self, residual):
        super().__init__()
        self.residual = torch.nn.Parameter(residual)
        self.proj_out = torch.nn.Linear(1, 1)
        self.config = {"in_channels": 8, "out_channels": 8}

    def forward(self, latents, timestep, text, text_mask):
        return self.residual


def test_flow_loss_of_a_residual_prediction_is_its_closed_form():
    """The root of mse + 1e-6, where mse is that of x0, whatever sigma is (from MIN_SIGMA)."""
    x0, condition, noise, residual = torch.randn(4, 5, 8, 5, 7, generator=seeded()).double()
    residual[4] = x0[4] - condition[4]  # perfect: there the gradient of a plain root is infinite
    sigma = torch.tensor([0.01, 0.1, 0.2, 0.6, 1.0], dtype=torch.float64)
    restorer = Restorer(Answer(residual), "none", prediction="residual")
    losses = flow_loss(restorer, x0, condition, None, None, sigma, noise)
    error = (x0 - condition - residual).square().mean((1, 2, 3))
    assert torch.allclose(losses.double(), (error + 1e-6).sqrt(), rtol=1e-5)
    losses.sum().backward()
    assert restorer.sana.residual.grad.isfinite().all()


def test_sigmas_are_shifted_logit_normal():
    sigma = draw_sigma(20000, seeded(), share_at_one=0.25)
    assert abs((sigma == 1).float().mean() - 0.25) < 0.01
    below_one = sigma[sigma < 1]
    normal = torch.logit(below_one / (3 - 2 * below_one))  # undo the shift: s / (3 - 2s)
    assert abs(normal.mean()) < 0.03
    assert abs(normal.std() - 1) < 0.03


# --------------------------------------------------------------------------------------------------
# Captions without a text encoder.


@pytest.mark.parametrize("text", ["Débruiter", "İyi", "हिन्दी में", "ở đâu", "e\u0301\u0323"])
def test_words_do_not_depend_on_how_accents_are_typed(text):
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    both, _ = hash_prompts([*forms, "Debruiter"])
    assert torch.equal(both[0], both[1])
    assert not torch.equal(both[0], both[2])
    assert len(split_words(text)) == len(text.split())  # marks belong to their word


def test_a_mask_is_given_only_where_something_is_padded():
    prompts = model.Prompts(PRESETS["tiny"])
    assert prompts(["remove noise", "less grain"])[1] is None
    assert prompts(["remove noise", "grain"])[1].tolist() == [[True] * 3, [True, True, False]]


def test_hash_prompts():
    text, mask = hash_prompts(["", "Remove JPEG artifacts.", "remove  jpeg"])
    assert text.shape == (3, 4, 256)
    assert mask.sum(1).tolist() == [1, 4, 3]
    assert torch.equal(text[1, :3], text[2, :3])
    assert set(text[1].unique().tolist()) == {-1, 1}
    # orthogonal up to chance: the standard deviation is 16
    assert (text[1, 1] @ text[1, 2]).abs() < 80
    number = int.from_bytes(hashlib.sha256(b"jpeg").digest(), "little")
    bits = [number >> place & 1 for place in range(256)]
    assert torch.equal(text[2, 2], torch.tensor(bits) * 2.0 - 1)


# --------------------------------------------------------------------------------------------------
# Runs.


def test_a_run_is_named_by_its_files_too_and_of_this_version(tmp_path):
    step = tmp_path / "step_000002"
    step.mkdir()
    (step / "ema.safetensors").touch()
    (tmp_path / "best").write_text("step_000002")
    config = {"model": model.MODEL_DEFAULTS | {"name": "x"}}
    (step / "config.json").write_text(json.dumps(config))
    for name in (tmp_path / "best", step):
        assert model.is_run(name)
        assert model.read_run(name) == config
    assert not model.is_run(tmp_path)  # without the file latest
    (step / "config.json").write_text(json.dumps({"model": config["model"] | {"vae": None}}))
    with pytest.raises(UserError, match="config.json: cannot read this run"):
        model.read_run(step)
    (step / "config.json").write_text(json.dumps({"model": {"name": "x"}}))
    with pytest.raises(UserError, match="made by another version of this program"):
        model.stage_of(step)


def test_only_a_copy_from_pinned_memory_goes_on_meanwhile():
    """On other devices the memory of a tensor that is not kept may be read too late."""
    tensor = Mock()
    model.to_device(tensor, torch.device("cuda", 1))
    pinned = tensor.contiguous().pin_memory()
    assert pinned.to.call_args == call(torch.device("cuda", 1), non_blocking=True)
    for device in ("mps", "cpu"):
        model.to_device(tensor, device)
        assert tensor.to.call_args == call(device)
