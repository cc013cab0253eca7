"""The activation model follows what autograd really keeps."""

import pytest
import torch

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import VARConfig
from megavar.config.parallel import ParallelConfig
from megavar.planning.activations import MicroBatch, activation_bytes, logits_bytes
from megavar.planning.tokenizer_cost import saved_bytes
from tests.planning import models
from tests.planning.models import MEPA, shape_of

SCALES = (1, 2, 4, 6)
IMAGES = 2
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _single(single_process):
    pass


def measured(config, recompute, precision):
    parallel = ParallelConfig(recompute=recompute)
    model = models.build(config, SCALES, parallel=parallel, dtype=TYPES[precision]).train()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    return saved_bytes(lambda: models.forward_loss(model, IMAGES), list(model.parameters()))


def predicted(config, recompute, precision):
    parallel = ParallelConfig(recompute=recompute)
    shape = shape_of(config, scales=SCALES)
    batch = MicroBatch(shape, parallel, IMAGES, TYPES[precision].itemsize, config.attention_kernel)
    parts = activation_bytes(batch, recompute)
    return parts["blocks"] + parts["head"] + logits_bytes(batch)  # saved: one copy, the log-probabilities


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("options", [
    {}, {"attention_kernel": "dense"}, {"qk_l2_norm": False, "shared_adaptive_norm": True},
    {"experts": MEPA}, {"experts": ExpertsChoice.make(number=4, top_k=2, backend="grouped")},
])  # fmt: skip
def test_saved_memory(options, recompute, precision):
    config = VARConfig(depth=3, width=192, heads=4, classes=10, **{"attention_kernel": "prefix"} | options)
    assert predicted(config, recompute, precision) == pytest.approx(measured(config, recompute, precision), rel=0.02)
