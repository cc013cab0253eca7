"""An exponential moving average of the float32 master weights, cut over the ranks exactly as the optimizer's state.

Averaging is elementwise, so the average is exact under any layout; checkpoints store it as logical tensors.
"""

from contextlib import AbstractContextManager

import torch

from megavar.config.train import EmaConfig
from megavar.training.checkpoint.master import exchanged, master_tensors
from megavar.training.engine import Engine


class MovingAverage:
    """The average of one engine's weights."""

    def __init__(self, engine: Engine, config: EmaConfig) -> None:
        self.engine, self.config = engine, config
        self.tensors = [tensor.detach().clone() for tensor in master_tensors(engine.deepspeed)]
        """float32, shaped like ``master_tensors(engine.deepspeed)``: this rank's part."""

    def decay(self, step: int) -> float:
        """Share of the old average that the update after step ``step`` keeps."""
        return min(self.config.decay, (1 + step) / (10 + step)) if self.config.warmup else self.config.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step ``step``."""
        torch._foreach_lerp_(self.tensors, master_tensors(self.engine.deepspeed), 1 - self.decay(step))

    def as_weights(self) -> AbstractContextManager[None]:
        """Within the block the module computes with the average. Collective; do not train inside."""
        return exchanged(self.engine.deepspeed, self.tensors)
