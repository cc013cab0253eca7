"""The sampler: a sample is a function of its index; its stored tokens give its image again, for any token space."""

import numpy as np
import pytest
import torch
from torch import nn

from megavar.conditions import ClassConditions, PromptConditions
from megavar.config.procedures.next_scale import NextScaleSampling
from megavar.config.token_space import TokenSpace
from megavar.errors import CheckpointError
from megavar.sampling.noise import pick
from megavar.sampling.sampler import PIXELS_AT_ONCE, Sampler, TokenDecoder

CPU = torch.device("cpu")
IDS = TokenSpace("line", (), 6, 50, 3, 4)
SPACES = {
    "uint16": IDS,
    "int32": TokenSpace("line", (), 6, 100_000, 3, 4),
    "float32": TokenSpace("latent", (2,), 4, None, 3, 4),
}


class Tokenizer:
    """Images whose pixels are the sum of an image's tokens."""

    def __init__(self, space):
        self.space = space

    def decode(self, tokens):
        total = tokens.double().flatten(1).sum(1)
        return total.sin().float()[:, None, None, None].expand(-1, 3, 4, 4)


class Procedure:
    """Tokens of noise and condition, at random."""

    def draw(self, generator, tokenizer, condition, noise):
        assert not generator.training and not torch.is_grad_enabled()
        uniform = noise.uniform(torch.arange(tokenizer.space.length))
        if tokenizer.space.vocabulary is None:
            return uniform[..., None].float() * generator.weight[0] + condition.labels[:, None, None]
        return pick(torch.zeros(*uniform.shape, tokenizer.space.vocabulary), uniform)


def sampler(space, conditions=ClassConditions(10), **settings):  # noqa: B008
    generator = nn.Linear(3, 1)
    return Sampler(generator, Tokenizer(space), Procedure(), conditions, NextScaleSampling(**settings), CPU)


@pytest.mark.parametrize("stored", SPACES)
def test_a_sample_is_a_function_of_its_index_in_any_space(stored):
    space = SPACES[stored]
    drawing = sampler(space)
    drawn = drawing.draw(torch.arange(20))
    tokens = drawn.arrays["tokens"]
    assert drawing.generator.training and drawn.images.shape == (20, 3, 4, 4) and drawn.images.dtype == torch.uint8
    assert tokens.dtype == stored and tokens.shape == (20, space.length, *([] if space.vocabulary else [3]))
    assert drawn.arrays["labels"].tolist() == [*range(10)] * 2 and len(np.unique(tokens, axis=0)) == 20
    if stored == "int32":
        assert tokens.max() > 2**16
    mixed = torch.tensor([17, 3, 8])
    again = drawing.draw(mixed)
    assert torch.equal(again.images, drawn.images[mixed])
    assert all(np.array_equal(again.arrays[name], array[mixed]) for name, array in drawn.arrays.items())


@pytest.mark.parametrize("stored", SPACES)
def test_images_come_from_what_is_stored(stored):
    drawing = sampler(SPACES[stored])
    drawn = drawing.draw(torch.arange(6))
    assert torch.equal(drawing.decoder(drawn.arrays["tokens"]), drawn.images)


def test_images_are_decoded_in_pieces(monkeypatch):
    """Of so many pixels, so that memory does not depend on the number of samples of a chunk."""
    sizes = []

    class Counting(Tokenizer):
        def decode(self, tokens):
            sizes.append(len(tokens))
            return super().decode(tokens)

    tokens = sampler(IDS).draw(torch.arange(7)).arrays["tokens"]
    whole = TokenDecoder(Counting(IDS), CPU)(tokens)
    monkeypatch.setitem(PIXELS_AT_ONCE, "cpu", 3 * IDS.image_side**2)
    assert torch.equal(TokenDecoder(Counting(IDS), CPU)(tokens), whole) and sizes == [7, 3, 3, 1]


def test_prompts_reach_the_chunk():
    drawn = sampler(IDS, PromptConditions("suite", ("a", "b"), 2)).draw(torch.arange(4))
    assert drawn.arrays["captions"].tolist() == ["a", "a", "b", "b"] and "labels" not in drawn.arrays


def test_the_seed_decides_the_noise():
    one, two = (sampler(IDS, seed=seed).draw(torch.arange(20)).arrays["tokens"] for seed in (0, 1))
    assert (one != two).mean() > 0.9


def test_rounding_is_a_setting():
    tokens = np.arange(400).reshape(-1, 1)
    rounded, cut = (TokenDecoder(Tokenizer(IDS), CPU, rule)(tokens).int() for rule in ("round", "truncate"))
    assert set((rounded - cut).unique().tolist()) == {0, 1} and 0.4 < (rounded - cut).float().mean() < 0.6


def test_values_that_are_not_finite_do_not_become_black_images():
    with pytest.raises(CheckpointError, match="not finite"):
        TokenDecoder(Tokenizer(IDS), CPU)(np.array([[np.inf]], np.float32))
