"""Paths between data and noise, and the numbers they are made of."""

import torch

from megavar import flow_matching
from megavar.parallel import seeds
from megavar.sampling.noise import Noise


def test_velocity_is_the_derivative_of_the_path() -> None:
    data, noise = (torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1))
    times, step = torch.tensor([[0.0], [0.2], [0.5], [0.9], [1.0]]).double(), 1e-6
    after, before = (flow_matching.interpolate(data, noise, times + by) for by in (step, -step))
    torch.testing.assert_close((after - before) / (2 * step), flow_matching.velocity(data, noise), rtol=0, atol=1e-8)


def test_euler_follows_the_exact_velocity_from_noise_to_data() -> None:
    data, noise = torch.full((2, 4), 3.0), torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([1.0, 0.7, 0.25, 0.0], dtype=torch.float64)
    found = flow_matching.euler(lambda x, t: (x - data) / t, noise, times)
    torch.testing.assert_close(found, data, rtol=0, atol=1e-6)


def test_normal_numbers_are_normal_and_belong_to_their_sample() -> None:
    drawn = Noise(7, torch.arange(64)).normal(torch.arange(100), 16)
    assert drawn.shape == (64, 100, 16)
    wide = drawn.double()
    moments = [float(wide.pow(power).mean()) for power in (1, 2, 3, 4)]
    torch.testing.assert_close(torch.tensor(moments), torch.tensor([0.0, 1.0, 0.0, 3.0]), rtol=0, atol=0.06)
    pairs = (wide[..., 1:] * wide[..., :-1], wide[:, 1:] * wide[:, :-1], wide[1:] * wide[:-1])
    assert max(abs(float(pair.mean())) for pair in pairs) < 0.02
    alone = Noise(7, torch.tensor([41])).normal(torch.tensor([13, 99]), 16)
    torch.testing.assert_close(alone[0], drawn[41, [13, 99]], rtol=0, atol=0)
    again = Noise(7, torch.tensor([41])).normal(torch.tensor([13]), 16, repetition=1)
    assert float((again[0, 0] - drawn[41, 13]).abs().max()) > 0.1


def test_times_are_pushed_towards_noise() -> None:
    times = flow_matching.logit_normal(seeds.normal(0, "times", torch.arange(1000)))
    assert 0 < float(times.min()) < 0.1 and 0.9 < float(times.max()) < 1
    moved = flow_matching.shifted(times, 3.0)
    assert bool((moved > times).all()) and float(flow_matching.shifted(torch.tensor(1.0), 3.0)) == 1.0
