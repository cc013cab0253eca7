"""What a plan said of a run, beside what is measured."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from megavar.training.observers import Observer, Watched


@dataclass(frozen=True)
class Expectation:
    """What a plan says of a run: of one step, on the fullest rank."""

    step_seconds: float
    memory_bytes: float
    """Without the CUDA context and what fragmentation wastes."""
    source: str
    """``assumed``, or where and when the device's speed was measured."""


class ExpectationObserver(Observer):
    """Compares once, at the first interval without the steps that compile."""

    def __init__(self, expected: Expectation, interval: int) -> None:
        self.expected, self.interval = expected, interval

    def begin(self, watched: Watched) -> None:
        """See :meth:`Observer.begin`."""
        super().begin(watched)
        self._lines, self._due = 0, min(2, math.ceil(watched.total_steps / self.interval))

    def logged(self, step: int, record: Mapping[str, float], statistics: Mapping[str, Tensor]) -> None:
        """See :meth:`Observer.logged`."""
        self._lines += 1
        if self._lines != self._due or "step_seconds" not in record:
            return
        expected, measured = self.expected, record["step_seconds"]
        facts = {
            "expected_step_seconds": expected.step_seconds,
            "step_seconds": measured,
            "step_seconds_ratio": measured / expected.step_seconds,
            "expected_memory_gib": expected.memory_bytes / 2**30,
            "source": expected.source,
        }
        if "memory_gib" in record:
            facts |= {
                "memory_gib": record["memory_gib"],
                "memory_ratio": record["memory_gib"] * 2**30 / expected.memory_bytes,
            }
        self.watched.tell(step, "expectation", **facts)
