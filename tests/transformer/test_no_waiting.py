"""Neither a forward nor a backward pass asks the device for a number: the host never waits for it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.transformer import tiny

pytestmark = pytest.mark.usefixtures("one_process")
WAITING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Waits(TorchDispatchMode):
    """Records calls that need a value on the host, or a size that only the device knows."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
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


ROUTERS = ("scale_token", "scale", "expert_choice", "zero_computation")


@pytest.mark.parametrize("experts", [None, *({"backend": "grouped", "router": router} for router in ROUTERS)])
def test_a_step_waits_for_nothing(experts):
    assert waits(experts) == []


def test_the_search_finds_what_waits():
    mode = Waits()
    with mode:
        torch.ones(3).sum().item()
        torch.ones(3)[torch.tensor([True, False, True])]
    assert len(mode.found) == 2
