"""An exponential moving average of the float32 master weights, cut over the ranks exactly as the optimizer's state.

Averaging is elementwise, so the average is exact under any layout; checkpoints store it as logical tensors.
"""

import difflib
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch

from megavar.config.train import EmaConfig
from megavar.errors import ConfigError
from megavar.training.checkpoint.master import exchanged, master_tensors
from megavar.training.engine import Engine


class MovingAverage:
    """The average of one engine's weights."""

    def __init__(self, engine: Engine, config: EmaConfig) -> None:
        self.engine, self.config = engine, config
        self.tensors = [tensor.detach().clone() for tensor in master_tensors(engine.deepspeed)]
        """float32, shaped like ``master_tensors(engine.deepspeed)``: this rank's part."""

    def decay(self, step: int) -> float:
        """Share of the old average that the update after step ``step`` keeps; 0 before the start step."""
        taken = step - self.config.start_step
        if taken < 0:
            return 0.0
        return min(self.config.decay, (1 + taken) / (10 + taken)) if self.config.warmup else self.config.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step ``step``."""
        decay, weights = self.decay(step), master_tensors(self.engine.deepspeed)
        if decay == 0:  # the average is the weights; a lerp could turn an infinite old value into NaN
            torch._foreach_copy_(self.tensors, weights)
        else:
            torch._foreach_lerp_(self.tensors, weights, 1 - decay)

    def as_weights(self) -> AbstractContextManager[None]:
        """Within the block the module computes with the average. Collective; do not train inside."""
        return exchanged(self.engine.deepspeed, self.tensors)


def moving_averages(engines: Mapping[str, Engine], config: EmaConfig | None) -> dict[str, MovingAverage]:
    """The averages that ``train.ema`` asks for, by module.

    Raises:
        ConfigError: it names a module that the recipe does not have.
    """
    if config is None:
        return {}
    names = engines if config.modules is None else config.modules
    for name in names:
        if name not in engines:
            near = difflib.get_close_matches(name, engines, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"train.ema.modules: this recipe trains no module {name!r}; it trains "
                f"{', '.join(map(repr, engines))}.{hint}"
            )
    return {name: MovingAverage(engines[name], config) for name in engines if name in names}
