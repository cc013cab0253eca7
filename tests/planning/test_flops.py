"""The FLOP model equals what PyTorch counts while the real generator trains and decodes."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import SCALES, VARConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.tokenizers.multiscale_vq import MultiScaleVQConfig
from megavar.generators.inputs import ScaleInputs
from megavar.planning import flops
from megavar.planning.tokenizer_cost import autoencoder_cost
from megavar.transformer.cache import KeyValueCache
from tests.planning import models
from tests.planning.models import CODE_DIMENSION, MEPA, shape_of

SMALL = (1, 2, 3, 5)


@pytest.fixture(autouse=True)
def _single(single_process):
    pass


def count(config, scales, recompute="none", images=1, backend=SDPBackend.MATH):
    """FLOPs per image of forward and backward."""
    model = models.build(config, scales, parallel=ParallelConfig(recompute=recompute)).train()
    counter = FlopCounterMode(display=False)
    with models.SkipProducts(), counter, sdpa_kernel(backend):
        models.forward_loss(model, images).backward()
    return counter.get_total_flops() / images


@pytest.mark.parametrize(("depth", "experts"), [(12, None), (20, None), (30, None), (12, MEPA), (20, MEPA)])
def test_one_block_of_every_published_width(depth, experts):
    """Costs are linear in the depth: test_kernels_and_recomputation has two blocks."""
    config = VARConfig(depth=1, width=64 * depth, heads=depth, attention_kernel="prefix", experts=experts)
    shape = shape_of(config)
    assert count(config, SCALES[256]) == flops.model_flops(shape)


@pytest.mark.parametrize("kernel", ["dense", "prefix"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("options", [
    {}, {"experts": MEPA}, {"shared_adaptive_norm": True, "qk_l2_norm": False, "feed_forward_ratio": 2.5},
    {"experts": ExpertsChoice.make(number=4, top_k=2, router="scale", backend="megatron")},
])  # fmt: skip
def test_kernels_and_recomputation(kernel, recompute, options):
    config = VARConfig(depth=2, width=64, heads=4, classes=10, attention_kernel=kernel, **options)
    expected = flops.hardware_flops(shape_of(config, scales=SMALL), kernel, recompute, fused=False)
    assert count(config, SMALL, recompute, images=3) == expected


def test_fused_kernels_compute_scores_again():
    config = VARConfig(depth=2, width=64, heads=4, classes=10, attention_kernel="dense")
    expected = flops.hardware_flops(shape_of(config, scales=SMALL), "dense", "none", fused=True)
    assert count(config, SMALL, backend=SDPBackend.FLASH_ATTENTION) == expected


def test_agrees_with_the_count_of_the_reference_code():
    """FlopCounterMode on VAR's own code, which attends with a dense mask: 0.945 TFLOP (notes/trainers.md 5.5)."""
    assert flops.hardware_flops(shape_of(VARConfig(depth=16)), "dense", "none") == pytest.approx(0.945e12, rel=2e-3)


@pytest.mark.parametrize("experts", [None, MEPA])
def test_sampling(experts):
    config = VARConfig(depth=2, width=64, heads=4, classes=10, experts=experts)
    model = models.build(config, SMALL).eval()
    cache, images = KeyValueCache(sum(side * side for side in SMALL)), 2
    counter = FlopCounterMode(display=False)
    with models.SkipProducts(), counter, sdpa_kernel(SDPBackend.MATH):
        for scale, side in enumerate(SMALL):
            features = torch.zeros(images, side * side, CODE_DIMENSION) if scale else None
            model.step(ScaleInputs(torch.zeros(images, dtype=torch.long), features, scale=scale), cache)
    shape = shape_of(config, scales=SMALL)
    assert counter.get_total_flops() / images == flops.sampling_flops(shape, guidance=False)
    assert flops.sampling_flops(shape, guidance=True) == 2 * flops.sampling_flops(shape, guidance=False)


def test_flex_computes_whole_tiles():
    from torch.nn.attention.flex_attention import create_block_mask

    shape = shape_of(VARConfig(depth=16))
    ends = torch.tensor([side * side for side in shape.scales]).cumsum(0)
    scale = torch.searchsorted(ends, torch.arange(shape.tokens), right=True)
    mask = create_block_mask(lambda b, h, q, k: scale[q] >= scale[k], None, None, shape.tokens, shape.tokens, "cpu")
    tiles = int(mask.to_dense().sum())
    assert flops.attention_pairs(shape, "flex") == tiles * flops.FLEX_BLOCK**2
    assert flops.attention_pairs(shape, "visible") / shape.tokens**2 == pytest.approx(0.62, abs=0.01)


def test_tokenizer_costs_are_those_of_the_published_one():
    """0.215 TFLOP for encoding and quantizing 256 pixels (notes/trainers.md 5.5)."""
    cost = autoencoder_cost(MultiScaleVQConfig())
    assert cost.parameters == 108_948_355
    assert cost.encode_flops == pytest.approx(0.215e12, rel=0.01)
    assert cost.decode_flops > cost.encode_flops
