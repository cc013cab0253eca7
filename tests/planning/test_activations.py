"""Measured without memory and with experts of equal loads, a rank keeps what autograd really keeps."""

import pytest
import torch

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import VARConfig
from megavar.config.parallel import ParallelConfig
from megavar.planning.ledger import saved_bytes
from megavar.planning.measure import Request, measure
from megavar.transformer import prefix
from tests.planning import models
from tests.planning.models import MEPA, space_of

SCALES = (1, 2, 4, 6)
IMAGES = 2
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


OPTIONS = [
    {}, {"attention_kernel": "dense"}, {"qk_l2_norm": False, "shared_adaptive_norm": True},
    {"experts": MEPA}, {"experts": ExpertsChoice.make(number=4, top_k=2, backend="grouped")},
]  # fmt: skip
HOW = [("none", "fp32"), ("none", "bf16"), ("selective", "bf16"), ("full", "bf16")]
CASES = [(options, *how) for options in range(len(OPTIONS)) for how in HOW]


def config_of(options):
    return VARConfig(depth=3, width=192, heads=4, classes=10, **{"attention_kernel": "prefix"} | OPTIONS[options])


@pytest.fixture(scope="module")
def costs():
    requests = [
        Request(config_of(options), space_of(SCALES), recompute=recompute, precision=precision)
        for options, recompute, precision in CASES
    ]
    return dict(zip(CASES, measure(requests), strict=True))


def measured(config, recompute, precision):
    parallel = ParallelConfig(recompute=recompute)
    model = models.build(config, SCALES, parallel=parallel, dtype=TYPES[precision]).train()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    return saved_bytes(lambda: models.forward_loss(model, IMAGES), list(model.parameters()))


@pytest.mark.parametrize("case", CASES)
def test_saved_memory(single_process, costs, case, monkeypatch):
    monkeypatch.setattr(prefix, "serves", lambda q, k: False)  # plans are for GPUs
    options, recompute, precision = case
    predicted = sum(part.saved.at(IMAGES) + part.routed.at(IMAGES) for part in costs[case].parts)
    assert predicted == pytest.approx(measured(config_of(options), recompute, precision), rel=0.02)
