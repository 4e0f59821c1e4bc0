import pytest
import torch
from diffusers import SanaTransformer2DModel

from data import hash_prompts
from model import PRESETS, Restorer, Sana, add_noise, build_restorer, draw_sigma, flow_loss, sample, shift_sigma
from vae import load_weights, save_weights

SMALL = dict(in_channels=8, out_channels=8, num_layers=2, num_attention_heads=3, attention_head_dim=8, num_cross_attention_heads=2,
             cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16, mlp_ratio=2.5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randomized(module, seed=0):
    """Random weights everywhere, also where training would start from zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(seed)) * 0.3)
            seed += 1
    return module


def inputs(batch=2, channels=8, grid=(5, 7), length=6, text_channels=16):
    g = seeded(1)
    mask = torch.arange(length) < torch.tensor([length, 2] * batch)[:batch, None]
    return (torch.randn(batch, channels, *grid, generator=g), torch.rand(batch, generator=g) * 1000,
            torch.randn(batch, length, text_channels, generator=g), mask)


@pytest.mark.parametrize("change", [{}, {"qk_norm": "rms_norm_across_heads"}, {"attention_bias": True}, {"mlp_ratio": 3.3},
                                    {"in_channels": 16}, {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 24},
                                    {"interpolation_scale": 1.0}, {"interpolation_scale": 2.0, "sample_size": 7}, {"patch_size": 2},
                                    {"patch_size": 3, "interpolation_scale": 0.5, "out_channels": 5}, {"timestep_scale": 0.001},
                                    {"out_channels": None}, {"norm_eps": 1e-3}])
@pytest.mark.parametrize("grid", [(5, 7), (1, 3), (9, 4)])
def test_sana_computes_what_diffusers_computes(change, grid):
    config = SMALL | change
    theirs = randomized(SanaTransformer2DModel(**config).float().eval())
    ours = Sana(config)
    ours.load_state_dict(theirs.state_dict())  # strict: the same names, all of them
    patch = config.get("patch_size", 1)
    latents, timestep, text, mask = inputs(channels=config["in_channels"], grid=[side * patch for side in grid])
    # diffusers leaves timestep_scale to the caller
    expected = theirs(latents, text, timestep * config.get("timestep_scale", 1), encoder_attention_mask=mask.float()).sample
    got = ours(latents, timestep, text, mask)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    expected.square().sum().backward()
    got.square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), (dict(theirs.named_parameters())[n] for n, _ in ours.named_parameters())):
        # a matrix of gradients that are zero but for rounding is compared with the largest gradient there is
        scale = max(b.grad.abs().max().item(), 1e-3 * max(p.grad.abs().max().item() for p in theirs.parameters()))
        assert (a.grad - b.grad).abs().max() <= 1e-4 * scale, name


@pytest.mark.parametrize("change", [{}, {"qk_norm": "rms_norm_across_heads"}, {"interpolation_scale": 1.0}])
def test_in_bf16_sana_is_no_further_from_the_fp32_answer_than_diffusers(change):
    config = SMALL | change | {"num_layers": 3}
    theirs = randomized(SanaTransformer2DModel(**config).float().eval())
    ours = Sana(config)
    ours.load_state_dict(theirs.state_dict())
    latents, timestep, text, mask = inputs(batch=4, grid=(12, 10))
    with torch.no_grad():
        exact = theirs(latents, text, timestep, encoder_attention_mask=mask.float()).sample
        latents, text = latents.bfloat16(), text.bfloat16()
        half = ours.bfloat16()(latents, timestep, text, mask), theirs.bfloat16()(latents, text, timestep, encoder_attention_mask=mask.bfloat16()).sample
    mine, peers = ((answer.float() - exact).square().mean().sqrt() for answer in half)
    assert half[0].dtype == torch.bfloat16 and mine <= 1.02 * peers


def test_full_size_sana_has_the_published_number_of_tensors_and_parameters():
    with torch.device("meta"):
        full = Sana({"qk_norm": "rms_norm_across_heads"})
    assert len(full.state_dict()) == 476 and sum(p.numel() for p in full.parameters()) == 1_604_641_952


SMALLER = dict(num_layers=28, num_attention_heads=36, num_cross_attention_heads=16, cross_attention_head_dim=72, cross_attention_dim=1152)


@pytest.mark.parametrize("config", [{}, SMALLER, {"num_layers": 60, "qk_norm": "rms_norm_across_heads"}, {"interpolation_scale": 1.0, "sample_size": 64},
                                    {"interpolation_scale": 2.0, "sample_size": 128}], ids=["1.6B", "0.6B", "4.8B", "2K", "4K"])
def test_published_sizes_have_the_peers_tensors(config):
    with torch.device("meta"):
        ours, theirs = Sana(config), SanaTransformer2DModel(**config)
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}


@pytest.mark.parametrize("config", [{"guidance_embeds": True}, {"norm_elementwise_affine": True}, {"qk_norm": "layer_norm"}, {"depth": 3}])
def test_configs_that_are_not_built_are_refused(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        Sana(SMALL | config)


def test_projection_starts_as_the_text_to_image_model_bit_for_bit():
    sana = randomized(Sana(SMALL))
    latents, timestep, text, mask = inputs()
    condition = torch.randn(latents.shape, generator=seeded(9)) * 100
    restorer = Restorer(sana, "projection")
    assert torch.equal(restorer(latents, condition, timestep, text, mask), sana(latents, timestep, text, mask))
    restorer.projection.weight.data[:, 8:] += 0.01
    assert not torch.allclose(restorer(latents, condition, timestep, text, mask), sana(latents, timestep, text, mask))


def test_widened_patch_embedding_starts_as_the_text_to_image_model():
    sana = randomized(Sana(SMALL))
    latents, timestep, text, mask = inputs()
    before = sana(latents, timestep, text, mask)
    after = Restorer(sana, "widen")(latents, torch.randn(latents.shape, generator=seeded(9)), timestep, text, mask)
    assert (after - before).abs().max() <= 1e-6 * before.abs().max()


def tiny():
    restorer = build_restorer(PRESETS["tiny"])
    restorer.sana.initialize(seeded())
    return restorer


def test_untrained_tiny_restorer_returns_its_input():
    restorer, condition = tiny(), torch.randn(2, 12, 4, 6, generator=seeded())
    text, mask = hash_prompts(["", "remove noise"])
    for steps in (1, 5):
        noise = torch.randn(condition.shape, generator=seeded(1))
        out = sample(lambda x, timestep: restorer(x, condition, timestep, text, mask), noise, steps)
        assert torch.allclose(out, condition, atol=1e-5)


@pytest.mark.parametrize("sampler", ["euler", "dpm"])
def test_samplers_are_exact_on_a_straight_path_whatever_the_steps(sampler):
    x0, noise = torch.randn(2, 2, 8, 4, 4, generator=seeded())
    for steps in (1, 2, 7):
        timesteps = []

        def velocity(x, timestep):  # of the straight line from the point x at sigma to x0
            timesteps.append(timestep[0].item())
            return (x - x0) / sigmas[len(timesteps) - 1]
        sigmas = [shift_sigma((1 if sampler == "euler" else 0.999) * (1 - i / steps), 3.0) for i in range(steps)]
        assert torch.allclose(sample(velocity, noise, steps, sampler), x0, atol=1e-5)
        exact = [1000 * s for s in sigmas]
        assert timesteps == (pytest.approx(exact) if sampler == "euler" else [int(t) for t in exact])
    assert shift_sigma(0.5, 3.0) == 0.75
    with pytest.raises(KeyError, match="heun"):
        sample(velocity, noise, 1, "heun")


def test_one_step_is_the_prediction_of_x0():
    restorer = randomized(Restorer(Sana(SMALL), prediction="residual"))
    latents, _, text, mask = inputs()
    condition = torch.randn(latents.shape, generator=seeded(2))
    at_one = torch.full((2,), 1000.0)
    x0 = latents - restorer(latents, condition, at_one, text, mask)
    one = sample(lambda x, timestep: restorer(x, condition, timestep, text, mask), latents, 1)
    assert torch.allclose(one, x0, atol=1e-4)
    x = restorer.projection.weight.flatten(1) @ torch.cat([latents, condition], 1).flatten(2)
    residual = restorer.sana(x.unflatten(2, (5, 7)), at_one, text, mask)
    assert torch.allclose(x0, condition + residual, rtol=1e-4, atol=1e-4)


def test_flow_loss_is_the_formula():
    x0, condition, noise = torch.randn(3, 2, 8, 5, 7, generator=seeded())
    _, _, text, mask = inputs()
    sigma = torch.tensor([0.05, 0.8])
    velocity = randomized(Restorer(Sana(SMALL)))
    got = flow_loss(velocity, x0, condition, text, mask, sigma, noise)
    for i in range(2):
        x = (1 - sigma[i]) * x0[i] + sigma[i] * noise[i]
        v = velocity(x[None], condition[i:i + 1], 1000 * sigma[i:i + 1], text[i:i + 1], mask[i:i + 1])
        assert torch.allclose(got[i], ((v - (noise[i] - x0[i])) ** 2).mean(), rtol=1e-4)
    error = velocity(add_noise(x0, noise, sigma), condition, 1000 * sigma, text, mask) - (noise - x0)
    constant = error.mean((2, 3)).square().mean(1)  # what mean_weight scales, by Pythagoras
    got = flow_loss(velocity, x0, condition, text, mask, sigma, noise, mean_weight=0.5)
    assert torch.allclose(got, error.square().flatten(1).mean(1) - 0.75 * constant, rtol=1e-4)
    # for a residual prediction: the error of x0 over max(sigma, 0.2)^2
    restorer = tiny()
    x0, condition, noise = torch.randn(3, 2, 12, 4, 4, generator=seeded())
    text, mask = hash_prompts(["", ""])
    expected = (condition - x0).square().flatten(1).mean(1) / sigma.clamp(min=0.2) ** 2
    assert torch.allclose(flow_loss(restorer, x0, condition, text, mask, sigma, noise), expected, rtol=1e-3)
    assert torch.equal(add_noise(x0, noise, torch.tensor([0.0, 1.0])), torch.stack([x0[0], noise[1]]))


def test_sigmas_are_shifted_logit_normal():
    sigma = draw_sigma(20000, seeded(), share_at_one=0.25)
    assert abs((sigma == 1).float().mean() - 0.25) < 0.01
    u = torch.logit(sigma[sigma < 1] / (3 - 2 * sigma[sigma < 1]))  # undo the shift: s / (3 - 2s)
    assert abs(u.mean()) < 0.03 and abs(u.std() - 1) < 0.03


def test_masked_caption_tokens_change_nothing():
    restorer = randomized(Restorer(Sana(SMALL)))
    latents, timestep, text, mask = inputs()
    other = torch.where(mask[..., None], text, 1e3)
    a, b = (restorer(latents, latents, timestep, t, mask) for t in (text, other))
    assert torch.allclose(a, b, atol=1e-5)


def test_a_caption_that_was_read_once_gives_the_same_velocity_at_every_step():
    sana = randomized(Sana(SMALL | {"num_layers": 3}))
    latents, timestep, text, mask = inputs()
    with torch.no_grad():
        read = sana.read(text)
        assert len(read) == 3 and read[0][0].shape[2] == text.shape[1]
        for t in (timestep, timestep / 2):
            assert torch.equal(sana(latents, t, read, mask), sana(latents, t, text, mask))
        assert not torch.equal(sana(latents, timestep, sana.read(text + 1), mask), sana(latents, timestep, text, mask))


def test_hash_prompts():
    text, mask = hash_prompts(["", "Remove JPEG artifacts.", "remove  jpeg"])
    assert text.shape == (3, 4, 256) and mask.sum(1).tolist() == [1, 4, 3]
    assert torch.equal(text[1, :3], text[2, :3]) and set(text[1].unique().tolist()) == {-1, 1}
    assert (text[1, 1] @ text[1, 2]).abs() < 80  # orthogonal up to chance: the standard deviation is 16
    import hashlib
    bits = [int(b) for byte in hashlib.sha256(b"jpeg").digest() for b in f"{byte:08b}"[::-1]]
    assert torch.equal(text[2, 2], torch.tensor(bits) * 2.0 - 1)


def test_weight_files_must_fit(tmp_path):
    sana = randomized(Sana(SMALL))
    path = tmp_path / "w.safetensors"
    save_weights(sana.state_dict(), path)
    again = load_weights(Sana(SMALL), path)
    assert all(torch.equal(a, b) for a, b in zip(sana.parameters(), again.parameters()))
    for change, word in [({"num_layers": 3}, "missing"), ({"num_layers": 1}, "unexpected"), ({"caption_channels": 15}, "shape")]:
        with pytest.raises(ValueError, match=word):
            load_weights(Sana(SMALL | change), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="w.safetensors"):
        load_weights(Sana(SMALL), path)
