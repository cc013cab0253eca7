"""Closed-form parameter counts equal those of the real modules."""

import pytest

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import SCALES, VARConfig
from megavar.planning.parameters import count_parameters
from tests.planning.models import MEPA, shape_of, without_memory

D36 = VARConfig(depth=36, shared_adaptive_norm=True)


@pytest.fixture(autouse=True)
def _single(single_process):
    pass


@pytest.mark.parametrize(
    ("config", "resolution", "published"),
    [
        (VARConfig(depth=12), 256, 133_186_960),
        (VARConfig(depth=16), 256, 310_283_520),
        (VARConfig(depth=20), 256, 600.917e6),
        (VARConfig(depth=24), 256, 1033.399e6),
        (VARConfig(depth=30), 256, 2010.020e6),
        (D36, 512, 2353.894e6),
        (VARConfig(depth=12, experts=MEPA), 256, 529.9e6),
        (VARConfig(depth=16, experts=MEPA), 256, 1250.5e6),
        (VARConfig(depth=20, experts=MEPA), 256, 2.44e9),
    ],
)
def test_total_equals_the_real_model_and_the_published_one(config, resolution, published):
    real = sum(parameter.numel() for parameter in without_memory(config, SCALES[resolution]).parameters())
    counted = count_parameters(shape_of(config, resolution)).total
    assert counted == real
    assert counted == pytest.approx(published, rel=2e-3 if published == 2.44e9 else 1e-4)


@pytest.mark.parametrize(("depth", "published"), [(12, 246.60e6), (16, 579.01e6), (20, 1.126e9)])
def test_activated_parameters_are_those_of_mepa(depth, published):
    counted = count_parameters(shape_of(VARConfig(depth=depth, experts=MEPA))).activated
    assert counted == pytest.approx(published, rel=5e-4)


@pytest.mark.parametrize("options", [
    {"qk_l2_norm": False}, {"feed_forward_ratio": 2.5}, {"width": 96, "heads": 3}, {"shared_adaptive_norm": True},
    {"experts": ExpertsChoice.make(number=6, top_k=2, router="scale", backend="megatron")},
    {"experts": ExpertsChoice.make(number=4, top_k=4, scale_embedding_in_router=True, backend="grouped")},
])  # fmt: skip
def test_variants_equal_the_real_model(options):
    config = VARConfig(depth=3, classes=10, **options)
    real = sum(parameter.numel() for parameter in without_memory(config, (2, 3, 4)).parameters())
    assert count_parameters(shape_of(config, scales=(2, 3, 4))).total == real
