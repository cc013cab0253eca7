"""Drawing token by token costs what its rows cost: work grows by a constant from step to step, nothing is copied."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megavar.conditions import Condition
from megavar.config.generators.alitok import AliTokConfig
from megavar.config.generators.rar import RARConfig
from megavar.config.procedures.raster import RasterSampling
from megavar.config.token_space import TokenSpace
from megavar.generators.alitok import AliTok
from megavar.generators.rar import RAR
from megavar.sampling.noise import Noise
from megavar.sampling.procedures.raster import Raster

pytestmark = pytest.mark.usefixtures("single_process")
SPACE = TokenSpace("grid", (6,), 36, 24, 4, image_side=12)
SIZES = {"depth": 2, "width": 32, "heads": 4, "classes": 5}


class Reserved(TorchDispatchMode):
    """Bytes of memory that operations reserve for their results."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        given = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((arguments, options))
                 if isinstance(tensor, torch.Tensor)}  # fmt: skip
        result = function(*arguments, **(options or {}))
        made = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)}  # fmt: skip
        self.bytes += sum(size for place, size in made.items() if place not in given)
        return result


@pytest.mark.parametrize("kind", ["rar", "alitok"])
def test_a_step_costs_its_rows_and_attention(kind: str) -> None:
    model = RAR(RARConfig(**SIZES), SPACE, seed=1)
    if kind == "alitok":
        model = AliTok(AliTokConfig(prefix_tokens=0, grid=6, **SIZES), SPACE, seed=1)
    condition, noise = Condition(torch.arange(4), classes=5), Noise(0, torch.arange(4))
    steps = Raster(RasterSampling(guidance=4.0)).steps(model.eval(), SPACE.length, condition, noise)
    flops, reserved = [], []
    for _ in range(SPACE.length):
        with FlopCounterMode(display=False) as work, Reserved() as memory:
            next(steps)
        flops.append(work.get_total_flops())
        reserved.append(memory.bytes)
    growth = {late - early for early, late in itertools.pairwise(flops[1:])}
    per_row = 2 * 2 * 8 * SIZES["depth"] * SIZES["width"]  # products with a key and a value, eight samples
    assert growth == {per_row}
    # Keys and values of all steps are reserved at once, by the first; later steps reserve for their own rows alone.
    assert reserved[0] > 2 * SIZES["depth"] * 8 * (SPACE.length + 1) * SIZES["width"] * 4
    assert len(set(reserved[1:])) == 1, reserved


def test_guidance_is_constant_at_power_zero() -> None:
    """reAR appendix E draws its pictures with a constant guidance of 4."""
    procedure = Raster(RasterSampling(guidance=4.0, guidance_power=0.0))
    assert [procedure.scale(step, 256) for step in (0, 1, 255)] == pytest.approx([4.0] * 3)
