"""Truncation depends on values alone. That it is VAR's is shown by tests/parity."""

import pytest
import torch

from megavar.sampling.filters import truncate


def kept(logits, **settings):
    return truncate(torch.tensor(logits), **settings).isfinite().nonzero().flatten().tolist()


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [3, 4, 1, 0, 2]])
def test_equal_tokens_share_one_fate_in_any_order(order):
    """Shares 0.4, 0.2, 0.2, 0.1, 0.1."""
    logits = torch.tensor([0.4, 0.2, 0.2, 0.1, 0.1]).log()

    def survivors(**settings):
        result = truncate(logits[order], **settings).isfinite()
        return sorted(order[place] for place in result.nonzero().flatten().tolist())

    assert survivors(top_k=2) == [0, 1, 2]
    assert survivors(top_p=0.5) == [0, 1, 2]
    assert survivors(top_k=4) == [0, 1, 2, 3, 4]
    assert survivors(top_k=2, top_p=0.45) == [0]  # 0.4 of 0.8 is half
    assert survivors(top_k=2, top_p=0.55) == [0, 1, 2]


def test_the_most_likely_token_always_stays():
    assert kept([0.0, 5.0, 1.0], top_p=1e-9) == [1] == kept([0.0, 5.0, 1.0], top_k=1)


def test_nothing_is_removed_where_nothing_is_asked_for():
    logits = torch.randn(3, 8)
    for settings in ({}, {"top_k": 8, "top_p": 1.0}, {"top_k": 20}):
        assert truncate(logits, **settings) is logits


def test_the_nucleus_is_the_smallest_set_that_reaches_its_share():
    logits = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * 2
    result = truncate(logits, top_p=0.8)
    shares = logits.double().softmax(-1).masked_fill(result == -torch.inf, 0)
    assert (shares.sum(-1) >= 0.8 - 1e-6).all()
    least = shares.masked_fill(shares == 0, 1).amin(-1)
    assert (shares.sum(-1) - least < 0.8 + 1e-6).all()
