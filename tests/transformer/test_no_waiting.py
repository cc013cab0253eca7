"""Nothing in a step or in decoding asks the device for a number: the host never waits for it.

Layouts: ``tests/distributed/test_no_waiting.py``.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megavar.generators.inputs import ScaleInputs
from megavar.sampling.filters import truncate
from megavar.sampling.noise import Noise, pick
from megavar.transformer.cache import KeyValueCache
from tests.transformer import foreign_router, tiny

assert foreign_router.AboveMeanExperts.variable_number
pytestmark = pytest.mark.usefixtures("one_process")

WAITING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Waits(TorchDispatchMode):
    """Records calls that need a value on the host, or a size that only the device knows."""

    def __init__(self):
        super().__init__()
        self.found, self.calls = [], 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.calls += 1
        masks = function is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in arguments[1]
        )
        if function in WAITING or masks:
            self.found.append(str(function))
        return function(*arguments, **(options or {}))


def waits(experts):
    model = tiny.model(tiny.config(experts, drop_path=0.3))
    given, targets = tiny.inputs()
    given.sample_keys = torch.arange(3)
    mode = Waits()
    with mode:
        tiny.loss(model(given), targets).backward()
    return mode.found


ROUTERS = ("scale_token", "scale", "above_mean", "expert_choice", "zero_computation")
EXPERTS = [None, *({"backend": "grouped", "router": router} for router in ROUTERS)]


@pytest.mark.parametrize("experts", EXPERTS)
def test_a_step_waits_for_nothing(experts):
    assert waits(experts) == []


@pytest.mark.parametrize("experts", EXPERTS)
def test_decoding_waits_for_nothing(experts):
    """All scales of a small model, with guidance, routing statistics of half of the samples, and draws."""
    model, mode = tiny.model(tiny.config(experts)).eval(), Waits()
    cache, counted, given = KeyValueCache(tiny.TOKENS), torch.arange(4) < 2, tiny.inputs(4)[0]
    noise = Noise(0, torch.arange(2))
    with mode, torch.no_grad():
        for scale, side in enumerate(tiny.SCALES):
            start = sum(other * other for other in tiny.SCALES[:scale])
            features = None if scale == 0 else given.features[:, start - 1 : start - 1 + side * side]
            inputs = ScaleInputs(given.labels, features, sides=tiny.SCALES, scale=scale)
            logits = model.step(inputs, cache, counted).chunk(2)[0]
            pick(truncate(logits, 5, 0.9), noise.uniform(torch.arange(start, start + side * side)))
    assert mode.found == [] and cache.length(0) == tiny.TOKENS


def test_the_search_finds_what_waits():
    mode = Waits()
    with mode:
        torch.ones(3).sum().item()
        torch.ones(3)[torch.tensor([True, False, True])]
    assert len(mode.found) == 2
