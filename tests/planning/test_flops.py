"""Measured operations equal what PyTorch counts while the real generator trains and decodes."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megavar.conditions import Condition
from megavar.config.choice import resolve
from megavar.config.denoising_mlp import DenoisingMLPConfig
from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.mar import MARConfig
from megavar.config.generators.query_ar import QueryARConfig
from megavar.config.generators.var import SCALES, VARConfig
from megavar.config.language_model import LanguageModelConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.procedures.mar import MARSampling
from megavar.config.procedures.next_scale import NextScaleSampling
from megavar.config.procedures.query_ar import QuerySampling
from megavar.config.tokenizers.kl_vae import KLVAEConfig
from megavar.config.tokenizers.multiscale_vq import MultiScaleVQConfig
from megavar.config.tokenizers.titok import TiTokConfig
from megavar.config.tokenizers.vision import VisionTransformerConfig
from megavar.data.text import Text
from megavar.generators.inputs import ScaleInputs
from megavar.planning.attention_cost import FLEX_TILE, attention_pairs
from megavar.planning.measure import DrawRequest, Request, drawing_flops, measure, tokenizer_cost
from megavar.sampling.noise import Noise
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


LATENTS = KLVAEConfig(image_side=32, latent_channels=2, base_channels=8, channel_multipliers=(1, 1, 2, 2),
                      residual_blocks=1, norm_groups=4, patch=1)  # fmt: skip
HEAD = DenoisingMLPConfig(width=24, depth=2)
TEXT, DEPTH, HEADS, WIDTH = 6, 2, 4, 32
DRAWN = {
    "query_ar": (QueryARConfig, QuerySampling(steps=3)),
    "query_ar, groups": (QueryARConfig, QuerySampling(steps=3, tokens_per_step=5, context="release", solver="euler")),
    "mar": (MARConfig, MARSampling(iterations=5, steps=3, guidance=2.0)),
}


def drawn_model(kind):
    if kind is MARConfig:
        return MARConfig(width=WIDTH, encoder_depth=1, decoder_depth=DEPTH, heads=HEADS, head=HEAD, classes=None,
                         text_vocabulary=40, buffer=TEXT)  # fmt: skip
    sizes = LanguageModelConfig(vocabulary=40, width=WIDTH, depth=DEPTH, heads=HEADS, groups=2, feed_forward=48)
    return QueryARConfig(language_model=sizes, query_sides=(5, 5), head=HEAD, text_length=TEXT, image_start=(7,))


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("case", DRAWN)
def test_drawing_of_vectors(case):
    """Repeated flows are counted once and added as often as they run; attention to the cache is counted, not run."""
    config, sampling = drawn_model(DRAWN[case][0]), DRAWN[case][1]
    model, procedure, space = resolve(config)(config, LATENTS.space).eval(), resolve(sampling)(sampling), LATENTS.space
    indices, text = torch.zeros(1, dtype=torch.long), torch.zeros(1, TEXT, dtype=torch.long)
    asked = Text(text, torch.ones_like(text, dtype=torch.bool))
    condition = Condition(indices, ("a",), -1, asked, asked)
    counter = models.flop_counter()
    with counter, sdpa_kernel(SDPBackend.MATH):
        procedure.draw(model, SimpleNamespace(space=space), condition, Noise(0, indices))
    hidden = 0  # pairs of the first pass that a mask hides, counted by torch
    if isinstance(config, QueryARConfig):
        rows = TEXT + 1 + procedure.sizes(space.length)[0]
        hidden = rows * (rows - 1) // 2 * 4 * WIDTH * DEPTH * 2
    assert drawing_flops(DrawRequest(config, LATENTS, sampling)) == counter.get_total_flops() - hidden


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


VISION = VisionTransformerConfig(width=16, depth=1, heads=2)


@pytest.mark.parametrize("choice", [
    KLVAEConfig(image_side=16, latent_channels=2, base_channels=8, channel_multipliers=(1, 2), residual_blocks=1,
                norm_groups=4, patch=1),
    TiTokConfig(image_side=32, tokens=4, quantization="vae", legacy=False, code_dimension=4,
                encoder=VISION, decoder=VISION),
], ids=lambda choice: choice.name)  # fmt: skip
def test_training_of_vectors_is_measured(choice):
    assert (tokenizer_cost(choice).training_bytes or 0) > 0
