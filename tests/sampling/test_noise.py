"""The draw of tokens: the right distribution, exact at the edges, the same in any company."""

import numpy as np
import pytest
import torch
from scipy import stats

from megavar.errors import CheckpointError
from megavar.sampling import noise as room
from megavar.sampling.noise import FiniteLogits, Noise, pick

SAMPLES = 200_000
SHARES = torch.tensor([0.0, 0.3, 0.0, 0.05, 0.001, 0.149, 0.5, 0.0])
LARGEST = 1 - 2.0**-53
"""The largest number that ``Noise`` gives."""


def drawn(positions, seed=7, samples=SAMPLES):
    uniform = Noise(seed, torch.arange(samples)).uniform(torch.tensor(positions))
    return pick(SHARES.log().expand(samples, len(positions), -1), uniform)


def test_tokens_have_the_distribution_of_the_logits():
    counts = drawn([3])[:, 0].bincount(minlength=len(SHARES)).double()
    possible = SHARES > 0
    assert counts[~possible].sum() == 0
    expected = SHARES[possible].double() / SHARES.double().sum() * SAMPLES
    assert stats.chisquare(counts[possible].numpy(), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("other", [{"positions": [4]}, {"positions": [3], "seed": 8}])
def test_other_positions_and_seeds_are_independent(other):
    one, two = drawn([3])[:, 0], drawn(**other)[:, 0]
    frequent = [1, 3, 5, 6]
    table = [[int(((one == a) & (two == b)).sum()) for b in frequent] for a in frequent]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_neighbouring_samples_are_independent():
    tokens = drawn([0])[:, 0]
    frequent = [1, 3, 5, 6]
    table = [[int(((tokens[:-1] == a) & (tokens[1:] == b)).sum()) for b in frequent] for a in frequent]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_a_number_depends_on_seed_sample_and_position_alone():
    positions, indices = torch.arange(50), torch.arange(20)
    whole = Noise(3, indices).uniform(positions)
    assert whole.shape == (20, 50) and whole.dtype == torch.float64 and len(whole.unique()) == 1000
    chosen, places = torch.tensor([17, 2, 9]), torch.tensor([40, 0, 7])
    assert torch.equal(Noise(3, chosen).uniform(places), whole[chosen][:, places])
    for other in (Noise(4, indices).uniform(positions), Noise(3, indices).uniform(positions, repetition=1)):
        assert not (other == whole).any()


def test_tokens_do_not_depend_on_how_rows_are_cut(monkeypatch):
    logits = torch.randn(6, 11, 40, generator=torch.Generator().manual_seed(0)) * 3
    uniform = Noise(0, torch.arange(6)).uniform(torch.arange(11))
    whole = pick(logits, uniform)
    monkeypatch.setattr(room, "_ELEMENTS", 100)  # two rows at a time
    assert torch.equal(pick(logits, uniform), whole)
    assert torch.equal(torch.stack([pick(row, place) for row, place in zip(logits, uniform)]), whole)


def test_tokens_are_those_of_exact_arithmetic():
    logits = torch.randn(4000, 300, generator=torch.Generator().manual_seed(1)) * 4
    uniform = Noise(0, torch.arange(4000)).uniform(torch.arange(1))[:, 0]
    reached = np.cumsum(np.exp(logits.double().numpy()), axis=-1)
    exact = [np.searchsorted(row, u * row[-1], side="right") for row, u in zip(reached, uniform.numpy())]
    assert (pick(logits, uniform).numpy() != np.array(exact)).sum() <= 1  # exp in float32 moves intervals by 1e-7


@pytest.mark.parametrize(
    ("shares", "uniform", "token"),
    [
        ([1, 1, 1, 1], 0.0, 0),
        ([1, 1, 1, 1], 0.25, 1),  # an interval holds its beginning, not its end
        ([1, 1, 1, 1], 0.25 - 2.0**-53, 0),
        ([1, 1, 1, 1], LARGEST, 3),
        ([0, 0, 1, 1], 0.0, 2),
        ([1, 1, 0, 0], 0.5, 1),
        ([1, 1, 0, 0], LARGEST, 1),
        ([3, 1, 1, 0], LARGEST, 2),  # 5 x LARGEST rounds up to 5
        ([1, 0, 1e-30, 1], 0.5, 3),  # a share that adds nothing is no interval
        ([0, 1, 0], 0.3, 1),
    ],
)
def test_edges_are_exact(shares, uniform, token):
    logits = torch.tensor(shares, dtype=torch.float32).log()
    assert pick(logits[None], torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


def test_tokens_of_probability_zero_are_never_picked():
    """Every edge of every interval, with zeros everywhere between."""
    shares = torch.rand(200, generator=torch.Generator().manual_seed(0)) * (torch.arange(200) % 3 == 1)
    reached = shares.log().exp().double().cumsum(0)
    edges = (reached / reached[-1]).clamp(max=LARGEST)
    near = torch.cat([edges, edges.nextafter(torch.zeros(())), torch.tensor([0.0, LARGEST], dtype=torch.float64)])
    assert (shares[pick(shares.log().expand(len(near), -1), near)] > 0).all()


def test_without_noise_the_most_likely_token_is_taken():
    logits = torch.randn(5, 7, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pick(logits, None), logits.argmax(-1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_refused(value):
    finite = FiniteLogits()
    finite.note(torch.zeros(3, 4))
    finite.require()
    damaged = torch.tensor([[0.0, value, 1.0]])
    finite.note(damaged)
    assert 0 <= int(pick(damaged, torch.tensor([0.9], dtype=torch.float64))) < 3  # what embeds it must not fail first
    with pytest.raises(CheckpointError, match="not finite"):
        finite.require()
