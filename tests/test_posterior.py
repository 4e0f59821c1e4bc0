"""Loss and sampler on a case whose posterior is known in closed form: do samples come from it?

Each number of a picture is by itself: one of two narrow peaks, whose degraded version has gaussian
noise. Given the degraded number, the clean one is a mixture of two gaussians.
"""

import torch

from model import Restorer, Sana, draw_sigma, flow_loss, sample_euler
from test_model import seeded

PEAK, WIDTH, NOISE = 0.1, 0.03, 0.1
SHIFT = 0.1  # of the size of what is uncertain here
SMALL = {
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 2,
    "num_attention_heads": 1,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 1,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 32,
    "caption_channels": 8,
    "qk_norm": "rms_norm_across_heads",
}


def draw_pair(shape, generator):
    peak = torch.where(torch.rand(shape, generator=generator) < 0.5, -PEAK, PEAK)
    clean = peak + WIDTH * torch.randn(shape, generator=generator)
    return clean, clean + NOISE * torch.randn(shape, generator=generator)


def posterior(degraded):
    """Return the mixture of the clean number: weights and means of its peaks, and their std."""
    centers = torch.tensor([-PEAK, PEAK])
    variance = 1 / (1 / WIDTH**2 + 1 / NOISE**2)
    apart = degraded[..., None] - centers
    weights = (-(apart**2) / (2 * (WIDTH**2 + NOISE**2))).softmax(-1)
    means = variance * (centers / WIDTH**2 + degraded[..., None] / NOISE**2)
    return weights, means, variance**0.5


def draw_posterior(degraded, generator):
    weights, means, std = posterior(degraded)
    second = torch.rand(degraded.shape, generator=generator) > weights[..., 0]
    peak = torch.where(second, means[..., 1], means[..., 0])
    return peak + std * torch.randn(degraded.shape, generator=generator)


def exact_velocity(degraded):
    """Return the velocity of a perfect network: (x - E[x0 | x, degraded]) / sigma."""
    weights, means, std = posterior(degraded)

    def velocity(x, timestep):
        sigma = timestep[0] / 1000
        share = 1 - sigma
        variance = share**2 * std**2 + sigma**2
        apart = x[..., None] - share * means
        now = (weights.log() - apart**2 / (2 * variance)).softmax(-1)
        x0 = means + share * std**2 / variance * apart
        return (x - (now * x0).sum(-1)) / sigma

    return velocity


def distance(a, b):
    """Return the Wasserstein-1 distance of two samples of equal size."""
    return (a.flatten().sort()[0] - b.flatten().sort()[0]).abs().mean().item()


def sample(velocity, degraded, steps, shift, generator):
    noise = torch.randn(degraded.shape, generator=generator)
    return sample_euler(velocity, noise, steps, shift)


def test_the_sampler_draws_from_the_posterior():
    generator = seeded()
    degraded = torch.full((1, 1, 100, 100), 0.02)  # both peaks are possible
    truth = draw_posterior(degraded, generator)
    weights, means, std = posterior(degraded[0, 0, 0, 0])
    mean = (weights * means).sum()
    spread = ((weights * (std**2 + means**2)).sum() - mean**2).sqrt()
    distances = []
    for steps in (1, 2, 4, 8, 20, 50):
        found = sample(exact_velocity(degraded), degraded, steps, SHIFT, generator)
        distances.append(distance(found, truth))
        assert abs(found.mean() - mean) < 0.05 * spread
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.8 * spread  # all at the mean
    assert distances[-1] < 0.03 * spread
    assert abs(found.std() / spread - 1) < 0.03
    # 20 steps draw half of the spread with SANA's shift, and all but a twentieth with this one
    for shift, low, high in ((3.0, 0.4, 0.6), (SHIFT, 0.95, 1.05)):
        found = sample(exact_velocity(degraded), degraded, 20, shift, generator)
        assert low < found.std() / spread < high


def test_a_trained_network_draws_from_the_posterior():
    """One step answers the mean, more steps fill the peaks."""
    generator = seeded()
    restorer = Restorer(Sana(SMALL), "widen", "residual", SHIFT)
    restorer.sana.initialize(generator)
    optimizer = torch.optim.AdamW(restorer.parameters(), betas=(0.9, 0.99), weight_decay=0)
    text = torch.zeros(16, 1, 8)
    last = 500
    for step in range(last):
        clean, degraded = draw_pair((16, 3, 8, 8), generator)
        sigma = draw_sigma(16, generator, 0.1, SHIFT)
        noise = torch.randn(clean.shape, generator=generator)
        loss = flow_loss(restorer, clean, degraded, text, None, sigma, noise).mean()
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, step / 20, 2 - 2 * step / last)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(restorer.parameters(), 0.2)
        optimizer.step()
    clean, degraded = draw_pair((1, 3, 64, 64), generator)
    truth = draw_posterior(degraded, generator)
    weights, means, _ = posterior(degraded)
    mean = (weights * means).sum(-1)
    middle = degraded.abs() < 0.3 * PEAK  # both peaks are possible
    error, distances, spreads = {}, {}, {}
    for steps in (1, 4, 20):
        velocity = lambda x, timestep: restorer(x, degraded, timestep, text[:1])
        found = sample(velocity, degraded, steps, SHIFT, generator)
        error[steps] = (found - clean).square().mean().sqrt().item()
        distances[steps] = distance(found[middle], truth[middle])
        spreads[steps] = (found[middle].std() / truth[middle].std()).item()
    best = (mean - clean).square().mean().sqrt().item()
    drawn = (truth - clean).square().mean().sqrt().item()  # about the root of 2 times as much
    assert best < error[1] < 1.05 * best
    assert error[1] < error[4] < error[20] < 1.1 * drawn
    assert distances[20] < distances[4] < distances[1]
    assert distances[20] < 0.2 * distances[1]
    assert spreads[1] < 0.3
    assert 0.9 < spreads[20] < 1.1
