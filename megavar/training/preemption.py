"""Stopping on request: a signal sets a flag, all ranks agree on the step, the trainer saves and leaves.

Signals reach ranks at different times. A rank that stopped on its own flag would leave the others waiting in a
collective, so the flag is exchanged: the run stops after the first step at whose exchange any rank had seen the signal.
"""

import logging
import signal
import threading
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

_log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
"""USR2 is sent by our batch scripts (NCCL may use USR1), TERM by torchrun, srun and scancel, INT by Ctrl-C."""


class StopRequest:
    """Remembers a stop signal until all ranks can act on it together."""

    def __init__(self) -> None:
        self.seen: signal.Signals | None = None
        self._previous: dict[int, Any] = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.seen == signal.SIGINT:
            raise KeyboardInterrupt  # whoever presses Ctrl-C again does not want to wait
        self.seen = signal.Signals(number)

    def install(self) -> Self:
        """From now on the stop signals only set :attr:`seen`. Call it before anything that takes time."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def restore(self) -> None:
        """Give the signals their former meaning back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def agreed(self) -> bool:
        """Whether any rank has been asked to stop; the same answer on every rank. Collective over the CPU backend."""
        flag = torch.tensor(int(self.seen is not None), dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag.item() and self.seen is not None:
            _log.warning("Stop requested by %s.", self.seen.name)
        return bool(flag.item())
