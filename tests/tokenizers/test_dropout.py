"""Dropout by sample keys: what is dropped, how much, and that it belongs to samples and layers."""

import pytest
import torch
from torch import nn

from megavar.tokenizers.dropout import SampleDropout, name_dropouts, sample_keys


def layers(rate=0.3):
    model = nn.Sequential(SampleDropout(rate), SampleDropout(rate))
    name_dropouts(model)
    return model.train()


def test_elements_are_dropped_at_the_rate_and_the_mean_stays():
    model, keys = layers(), torch.arange(50)
    with sample_keys(model, keys):
        out = model[0](torch.ones(50, 4, 10, 10))
    assert (out == 0).float().mean() == pytest.approx(0.3, abs=0.01)
    assert out.mean() == pytest.approx(1.0, abs=0.015)
    assert len(out.unique()) == 2


def test_masks_belong_to_samples_and_layers():
    model, keys, x = layers(), torch.tensor([5, 9, 2]), torch.ones(3, 4, 4, 4)
    with sample_keys(model, keys):
        first, second = model[0](x), model[1](x)
    with sample_keys(model, keys.flip(0)):
        assert torch.equal(model[0](x), first.flip(0))
    with sample_keys(model, keys[1:2]):
        assert torch.equal(model[0](x[:1]), first[1:2])
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_it_is_off_in_evaluation_and_needs_keys_in_training():
    model, x = layers(), torch.ones(2, 3)
    assert model.eval()(x) is x
    with pytest.raises(AssertionError, match="sample keys"):
        model.train()(x)
