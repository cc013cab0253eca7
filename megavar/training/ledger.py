"""``ledger.jsonl``: what each attempt of a run cost and where its time went."""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megavar import storage
from megavar.parallel.environment import device_name
from megavar.training.observers import Observer, Watched
from megavar.training.provenance import host

PARTS = ("data", "checkpoint", "validation", "preview")
"""Of the time after the start; the rest is training."""


def devices() -> list[dict[str, Any]]:
    """What all ranks compute on: ``host``, ``name`` and ``count`` of each kind. Collective."""
    own = (host(), device_name())
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return [{"host": place, "name": name, "count": found.count((place, name))} for place, name in dict.fromkeys(found)]


class LedgerObserver(Observer):
    """Writes a line when an attempt begins, with the outcome RUNNING, and one when it ends in an orderly way; the last
    line of an attempt counts."""

    def __init__(self) -> None:
        self._created, self._kept = time.time(), 0
        self._first_step: int | None = None
        self._began: float | None = None
        self._memory: float | None = None

    def begin(self, watched: Watched) -> None:
        """See :meth:`Observer.begin`."""
        super().begin(watched)
        self._device, self._count = device_name(), dist.get_world_size()

    def opened(self, step: int) -> None:
        """See :meth:`Observer.opened`."""
        self._kept = step
        if self._first_step is None:
            self._first_step, self._began = step, time.time()
            self._write(step, "RUNNING")

    def logged(self, step: int, record: Mapping[str, float], statistics: Mapping[str, Tensor]) -> None:
        """See :meth:`Observer.logged`."""
        self._memory = record.get("memory_gib", self._memory)

    def saved(self, step: int) -> None:
        """See :meth:`Observer.saved`."""
        self._kept = step

    def ended(self, step: int, outcome: str) -> None:
        """See :meth:`Observer.ended`."""
        self._write(step, outcome)

    def _write(self, step: int, outcome: str) -> None:
        if not self.watched.monitor.is_writer or self._first_step is None or self._began is None:
            return
        ended = time.time()
        seconds = {part: round(self.watched.stopwatch.totals.get(part, 0.0), 3) for part in PARTS}
        training = max(0.0, ended - self._began - sum(seconds.values()))
        path = self.watched.directory.path
        line = {
            "attempt": _lines(path / "attempts.jsonl"),
            "started": round(self._created, 3),
            "ended": round(ended, 3),
            "outcome": outcome,
            "first_step": self._first_step,
            "last_step": step,
            "kept_step": self._kept,
            "devices": self._count,
            "device": self._device,
            "device_hours": (ended - self._created) / 3600 * self._count,
            "memory_gib": self._memory,
            "seconds": {"starting": round(self._began - self._created, 3), "training": round(training, 3), **seconds},
        }
        with contextlib.suppress(OSError):  # a full disk ends no run, and hides no error
            storage.append_line(path / "ledger.jsonl", json.dumps(line))


def _lines(path: Path) -> int:
    try:
        return len(path.read_bytes().splitlines())
    except OSError:
        return 0

