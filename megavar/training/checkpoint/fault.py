"""Deliberate death at a named phase of a save, for tests that a run killed anywhere can continue.

``MEGAVAR_FAULT=phase`` or ``phase:rank`` (rank 0 without one) makes that rank kill itself with SIGKILL the first time
it reaches the phase. Without the variable every function here does nothing.
"""

import os
import signal
from typing import Any

PHASES = ("before_shards", "inside_shard", "after_shards", "before_manifest", "before_rename", "before_latest")
"""The phases of a save, in order. The last three exist on rank 0 only."""

VARIABLE = "MEGAVAR_FAULT"


def armed(phase: str, rank: int) -> bool:
    """Whether rank ``rank`` is to die at ``phase``."""
    assert phase in PHASES
    wanted, _, wanted_rank = os.environ.get(VARIABLE, "").partition(":")
    return wanted == phase and int(wanted_rank or 0) == rank


def point(phase: str, rank: int) -> None:
    """Die here if told so."""
    if armed(phase, rank):
        os.kill(os.getpid(), signal.SIGKILL)


class DyingStream:
    """A binary file that kills the process after ``limit`` bytes, with those bytes on disk."""

    def __init__(self, stream: Any, limit: int) -> None:
        self._stream = stream
        self._left = limit

    def write(self, data: Any) -> int:
        """Write ``data``, or its beginning and die."""
        view = memoryview(data).cast("B")
        if len(view) >= self._left:
            self._stream.write(view[: self._left])
            self._stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= len(view)
        return self._stream.write(view)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
