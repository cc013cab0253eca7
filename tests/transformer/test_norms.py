"""Norms and tables of rotary positions by hand, where the blocks' own tests cannot see: small values, known angles."""

import math

import pytest
import torch

from megavar.config.parallel import ParallelConfig
from megavar.transformer.megatron_config import transformer_config
from megavar.transformer.norms import AffineLayerNorm, PlainNorm, RMSNorm, normalize
from megavar.transformer.rotary import line_table, plane_table
from tests.transformer import by_hand

WIDTH, EPSILON = 8, 1e-3


@pytest.mark.parametrize("kind", [PlainNorm, AffineLayerNorm, RMSNorm])
@pytest.mark.parametrize("size", [1.0, 1e-2])
def test_a_norm_adds_its_epsilon_to_the_variance(kind, size):
    """At sizes where it decides the result."""
    config = transformer_config(ParallelConfig(), torch.float32, depth=1, width=WIDTH, heads=2, feed_forward=8)
    norm = kind(WIDTH, config, EPSILON)
    weight, bias, hidden = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    hidden = hidden * size
    with torch.no_grad():
        for name, value in (("weight", weight), ("bias", bias)):
            if hasattr(norm, name):
                getattr(norm, name).copy_(value)
    expected = {
        PlainNorm: lambda: by_hand.layer_norm(hidden, 1.0, 0.0, EPSILON),
        AffineLayerNorm: lambda: by_hand.layer_norm(hidden, weight, bias, EPSILON),
        RMSNorm: lambda: by_hand.rms_norm(hidden, weight, EPSILON),
    }[kind]()
    torch.testing.assert_close(norm(hidden).detach(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(normalize(hidden), by_hand.layer_norm(hidden, 1.0, 0.0, 1e-6), rtol=1e-5, atol=1e-6)


def test_angles_of_positions_on_a_line():
    """Pair i of R / 2 turns by position x base^(-2 i / R)."""
    cos, sin = line_table(torch.tensor([0, 3]), 4, base=100.0)
    angles = [[0, 0], [3, 3 * 100**-0.5]]
    expected = [[[f(angle) for angle in row] for row in angles] for f in (math.cos, math.sin)]
    torch.testing.assert_close(torch.stack([cos, sin]), torch.tensor(expected))
    usual = line_table(torch.tensor([1]), 6)[1].asin()  # base 10000
    assert usual.tolist()[0] == pytest.approx([1, 1e4 ** (-1 / 3), 1e4 ** (-2 / 3)])


def test_the_first_half_of_a_plane_is_the_row():
    cos, sin = plane_table(torch.tensor([2]), torch.tensor([1]), 8, base=100.0)
    angles = torch.tensor([[2, 0.2, 1, 0.1]])  # two pairs each, at 1 and 100^(-2 / 4)
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())
