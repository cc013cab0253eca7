"""What follows a step whose loss or gradient was not finite: skip it, roll back, or give up.

The engine has already refused to apply such a step, by the global gradient norm and thus on all ranks alike (a loss
that is not finite makes the gradient so, see ``Engine.run``). This class only counts, so it decides alike.
"""

import math
import statistics
from collections import deque
from enum import Enum
from typing import Any

from megavar.config.train import RecoveryConfig

DIVERGED_LOSSES = 5
"""Logged losses whose median is compared with the first one."""


class Verdict(Enum):
    """What the trainer does after a step."""

    CONTINUE = "continue"
    ROLL_BACK = "roll_back"
    STOP = "stop"


class Recovery:
    """Counts bad steps and rollbacks."""

    def __init__(self, config: RecoveryConfig) -> None:
        self.config = config
        self.consecutive = 0
        """Bad steps since the last good one."""
        self.skipped = 0
        """Bad steps of the whole run."""
        self.rollbacks = 0
        """Rollbacks since the last new checkpoint."""
        self.first_loss: float | None = None
        """The first one that was logged in the run."""
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._last: deque[float] = deque(maxlen=DIVERGED_LOSSES)

    def judge(self, applied: bool, last: bool = False) -> Verdict:
        """Take in whether the step was applied. The ``last`` of a run must be: it may not be skipped."""
        if applied:
            self.consecutive = 0
            return Verdict.CONTINUE
        self.consecutive += 1
        self.skipped += 1
        if self.consecutive <= self.config.skips and not last:
            return Verdict.CONTINUE
        return Verdict.ROLL_BACK if self.rollbacks < self.config.rollbacks else Verdict.STOP

    def rolled_back(self) -> None:
        """The trainer has gone back to a checkpoint."""
        self.rollbacks += 1
        self.consecutive = 0
        self._losses.clear()
        self._last.clear()

    def saved(self) -> None:
        """The trainer has saved a new checkpoint, which it does after an applied step only."""
        assert self.consecutive == 0
        self.rollbacks = 0

    def spike(self, loss: float | None) -> float | None:
        """Take in a logged loss; return the median of the recent past if this one stands out above it.

        Losses of skipped steps are not finite; they are on record as such, and have no place in a median.
        """
        if loss is None or not math.isfinite(loss):
            return None
        median = statistics.median(self._losses) if len(self._losses) >= 10 else None
        self._losses.append(loss)
        return median if median is not None and loss > self.config.spike_factor * median > 0 else None

    def diverged(self, loss: float | None) -> tuple[float, float] | None:
        """Take in a logged loss; return the first one and the median of the last :data:`DIVERGED_LOSSES`, if these show
        that the run has left what it began with far behind. One spike shows nothing.
        """
        if loss is None or not math.isfinite(loss):
            return None
        if self.first_loss is None:
            self.first_loss = loss
        self._last.append(loss)
        factor, median = self.config.divergence_factor, statistics.median(self._last)
        if factor is None or len(self._last) < DIVERGED_LOSSES or not median > factor * self.first_loss > 0:
            return None
        return self.first_loss, median

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"skipped": self.skipped, "first_loss": self.first_loss}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; earlier versions did not keep the first loss."""
        self.skipped, self.first_loss = state["skipped"], state.get("first_loss")
