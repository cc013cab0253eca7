"""The sampler of next-scale generators: a sample is a function of its index; its tokens give its image again."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megavar.assembly import build_generator
from megavar.config.loading import load_config
from megavar.errors import CheckpointError
from megavar.sampling.next_scale import decode, noise_of_samples
from megavar.sampling.sampler import NextScaleSampler, TokenDecoder
from megavar.tokenizers.multiscale_vq import MultiScaleVQ

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config():
    given = ["generator.depth=1", "generator.width=16", "generator.heads=2", "sampling.guidance=1.5"]
    return load_config(Path(__file__).parents[2] / "configs/quickstart.yaml", given)


@pytest.fixture
def sampler(config, one_process):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = MultiScaleVQ(config.tokenizer).eval()
    return NextScaleSampler(build_generator(config, None).train(), tokenizer, config.sampling, CPU)


def test_a_sample_is_a_function_of_its_index(sampler):
    images, labels, tokens = sampler.draw(torch.arange(20))
    assert images.shape == (20, 3, 16, 16) and images.dtype == torch.uint8 and sampler.generator.training
    assert tokens.shape == (20, 21) and tokens.dtype == torch.int64 and labels.tolist() == [*range(10)] * 2
    assert len(tokens.unique(dim=0)) == 20 and sampler.stored_type is np.uint16
    mixed = torch.tensor([17, 3, 8])
    for whole, part in zip((images, labels, tokens), sampler.draw(mixed)):
        assert torch.equal(whole[mixed], part)  # in other company, which one thread computes alike


def test_images_are_those_that_decoding_accumulated(sampler, config):
    indices = torch.arange(6)
    images, labels, tokens = sampler.draw(indices)
    sampler.generator.eval()
    noise = noise_of_samples(config.sampling.seed, indices)
    decoded = decode(sampler.generator, sampler.tokenizer.quantizer, labels, config.sampling, noise)
    assert torch.equal(torch.cat(decoded.ids, 1), tokens)
    exact = sampler.tokenizer.decode_features(decoded.feature_maps[-1])
    assert torch.equal(sampler.tokenizer.decode(torch.cat(decoded.ids, 1)), exact)
    assert torch.equal(images, exact.mul(127.5).add(127.5).round().to(torch.uint8))


def test_rounding_is_a_setting(sampler):
    tokens = sampler.draw(torch.arange(6))[2]
    rounded, cut = (TokenDecoder(sampler.tokenizer, CPU, rule)(tokens).int() for rule in ("round", "truncate"))
    assert set((rounded - cut).unique().tolist()) == {0, 1} and 0.4 < (rounded - cut).float().mean() < 0.6


def test_values_that_are_not_finite_do_not_become_black_images(sampler):
    with torch.no_grad():
        sampler.tokenizer.post_quant_conv.bias.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        sampler.draw(torch.arange(2))
