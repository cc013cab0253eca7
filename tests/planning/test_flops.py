"""Measured operations equal what PyTorch counts while the real generator trains and decodes."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import SCALES, VARConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.procedures.next_scale import NextScaleSampling
from megavar.config.tokenizers.multiscale_vq import MultiScaleVQConfig
from megavar.generators.inputs import ScaleInputs
from megavar.planning.attention_cost import FLEX_TILE, attention_pairs
from megavar.planning.measure import DrawRequest, Request, drawing_flops, measure, tokenizer_cost
from megavar.transformer.cache import KeyValueCache
from megavar.transformer.kernels import Visibility
from megavar.transformer.sequence import SequenceLayout
from tests.planning import models
from tests.planning.models import CODE_DIMENSION, MEPA, space_of

SMALL, IMAGES = (1, 2, 3, 5), 3
OPTIONS = [
    {}, {"experts": MEPA}, {"shared_adaptive_norm": True, "qk_l2_norm": False, "feed_forward_ratio": 2.5},
    {"experts": ExpertsChoice.make(number=4, top_k=2, router="scale", backend="megatron")},
]  # fmt: skip
CASES = [
    (options, kernel, recompute)
    for options in range(len(OPTIONS))
    for kernel, recompute in (("prefix", "none"), ("prefix", "selective"), ("prefix", "full"), ("dense", "none"))
]
REFERENCE = VARConfig(depth=16, attention_kernel="dense")


def config_of(options, kernel):
    return VARConfig(depth=2, width=64, heads=4, classes=10, attention_kernel=kernel, **OPTIONS[options])


@pytest.fixture(scope="module")
def costs():
    requests = [
        Request(config_of(options, kernel), space_of(SMALL), recompute=recompute, precision="fp32")
        for options, kernel, recompute in CASES
    ]
    *measured, reference = measure([*requests, Request(REFERENCE, space_of())])
    return dict(zip(CASES, measured, strict=True)) | {"reference": reference}


def counted(config, recompute):
    """FLOPs per image of forward and backward with fused attention."""
    model = models.build(config, SMALL, parallel=ParallelConfig(recompute=recompute)).train()
    counter = models.flop_counter()
    with models.SkipProducts(), counter, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        models.forward_loss(model, IMAGES).backward()
    return counter.get_total_flops() / IMAGES


@pytest.mark.parametrize("case", CASES)
def test_kernels_and_recomputation(single_process, costs, case):
    options, kernel, recompute = case
    assert costs[case].hardware_flops == counted(config_of(options, kernel), recompute)
    assert costs[case].model_flops == costs[options, "prefix", "none"].model_flops


def test_agrees_with_the_count_of_the_reference_code(costs):
    """FlopCounterMode on VAR's own code, which attends with a dense mask: 0.945 TFLOP (notes/trainers.md 5.5)."""
    assert costs["reference"].hardware_flops == pytest.approx(0.945e12, rel=2e-3)


@pytest.mark.parametrize("options", [0, 1])
def test_sampling(single_process, options):
    config = config_of(options, "prefix")
    model = models.build(config, SMALL).eval()
    cache, images = KeyValueCache(model.space.length), 2
    counter = models.flop_counter()
    with models.SkipProducts(), counter, sdpa_kernel(SDPBackend.MATH):
        for scale, side in enumerate(SMALL):
            features = torch.zeros(images, side * side, CODE_DIMENSION) if scale else None
            model.step(ScaleInputs(torch.zeros(images, dtype=torch.long), features, scale=scale), cache)
    tokenizer = MultiScaleVQConfig(scales=SMALL, base_channels=32)
    plain, guided = (DrawRequest(config, tokenizer, NextScaleSampling(guidance=scale)) for scale in (0.0, 1.5))
    assert drawing_flops(plain) == counter.get_total_flops() / images
    assert drawing_flops(guided) == 2 * drawing_flops(plain)


@pytest.mark.parametrize("rule", ["block_causal", "block_diagonal", "causal", "full"])
def test_pairs_of_masks(rule):
    layout = SequenceLayout.of_scales(SCALES[256], rule=rule)
    visibility = Visibility(layout)
    assert attention_pairs(layout, "visible") == int(visibility.mask(torch.device("cpu")).sum())
    assert attention_pairs(layout, "dense") == layout.tokens**2
    tiles = visibility.block_mask(torch.device("cpu")).to_dense()
    assert attention_pairs(layout, "flex") == int(tiles.sum()) * FLEX_TILE**2


def test_tokenizer_costs_are_those_of_the_published_one():
    """0.215 TFLOP for encoding and quantizing 256 pixels (notes/trainers.md 5.5)."""
    cost = tokenizer_cost(MultiScaleVQConfig())
    assert cost.parameters == 108_948_355
    assert cost.encode_flops == pytest.approx(0.215e12, rel=0.01)
    assert cost.decode_flops > cost.encode_flops
