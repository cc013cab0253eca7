"""Ends a process whose step hangs, with the stacks of all its threads in the log, so that the job can start again.

Every rank watches itself: a rank that waits in a collective for a dead or stuck peer exceeds the limit as well, so all
ranks leave their stacks and the doctor can tell the one that is different. NCCL's own watchdog, whose limit is that of
the process group, mostly comes too late; so its flight recorder is dumped here, too.
"""

import faulthandler
import logging
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from megavar.config.train import WatchdogConfig
from megavar.errors import ExitCode

_log = logging.getLogger(__name__)
_WINDOW = 64  # step times that make up the median
_LOOK_SECONDS = 5.0
"""Between two looks at the time."""
_RECORDER_SECONDS = 30.0
"""For the dump of the flight recorder, which may hang with the GPU."""


def _end_process() -> None:
    os._exit(ExitCode.HANG)


class Watchdog:
    """Watches the time since the last :meth:`beat`.

    Args:
        config: limits.
        end: called after the stacks were written; replaces the end of the process in tests of the limits.
    """

    def __init__(self, config: WatchdogConfig, end: Callable[[], None] = _end_process) -> None:
        self.config = config
        self._end = end
        self._times: deque[float] = deque(maxlen=_WINDOW)
        self._last = time.monotonic()
        self._step = 0
        self._is_first = True
        self._limit_override: float | None = None
        self._finished = threading.Event()
        self._thread: threading.Thread | None = None

    def limit(self) -> float:
        """Seconds that may pass before the next :meth:`beat`."""
        if self._limit_override is not None:
            return self._limit_override
        if not self._times:
            return self.config.start_seconds
        return max(self.config.minimum_seconds, self.config.factor * statistics.median(self._times))

    def beat(self, step: int) -> None:
        """A step is complete."""
        now = time.monotonic()
        if not self._is_first:  # the first step compiles: it says nothing about the others
            self._times.append(now - self._last)
        self._last, self._step, self._is_first = now, step, False
        self._arm_backstop()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within the block (a save, a load, previews) the limit is ``start_seconds`` and no step time is taken."""
        self._last, self._limit_override = time.monotonic(), self.config.start_seconds
        self._arm_backstop()
        try:
            yield
        finally:
            self._last, self._limit_override = time.monotonic(), None
            self._arm_backstop()

    def _arm_backstop(self) -> None:
        # A hang that holds the interpreter's lock would stop our thread, too. This timer runs without the lock; it
        # can only leave with exit code 1.
        if self._thread is not None:
            faulthandler.dump_traceback_later(2 * self.limit() + 60, exit=True)

    def _watch(self) -> None:
        while not self._finished.wait(self._interval()):
            silent = time.monotonic() - self._last
            if silent > self.limit():
                _log.critical(
                    "HANG: no step for %.0f s after step %d (limit %.0f s). Stacks of all threads follow; the process "
                    "ends with exit code %d.", silent, self._step, self.limit(), ExitCode.HANG,
                )  # fmt: skip
                self._dump()
                dump = threading.Thread(target=dump_flight_recorder, name="flight-recorder", daemon=True)
                dump.start()
                dump.join(_RECORDER_SECONDS)
                time.sleep(2 * self._interval())  # the first end ends all ranks: let the others look at the time, too
                self._end()
                return

    def _interval(self) -> float:
        return min(_LOOK_SECONDS, self.limit() / 4)

    def _dump(self) -> None:
        files = {sys.stderr.fileno(): sys.stderr} if _has_descriptor(sys.stderr) else {}
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler) and handler.stream is not None:
                files[handler.stream.fileno()] = handler.stream
        for file in files.values():
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.flush()

    def __enter__(self) -> Self:
        if self.config.enabled:
            self._last = time.monotonic()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
            self._arm_backstop()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._finished.set()
            faulthandler.cancel_dump_traceback_later()
            self._thread.join(timeout=1)


def dump_flight_recorder() -> None:
    """Write this rank's last collectives to the file that NCCL's watchdog would write, where the launcher names it.

    The files are pickled dictionaries; PyTorch's ``torchfrtrace`` compares those of NCCL.
    """
    prefix, torch = os.environ.get("TORCH_FR_DUMP_TEMP_FILE"), sys.modules.get("torch")
    if not prefix or torch is None or not torch.distributed.is_initialized():
        return
    try:
        bindings = torch._C._distributed_c10d
        dump = bindings._dump_nccl_trace if torch.cuda.is_available() else bindings._dump_fr_trace
        Path(f"{prefix}{torch.distributed.get_rank()}").write_bytes(dump())
    except Exception as error:  # the stacks are there; this must not keep the process from ending
        _log.warning("The flight recorder cannot be written: %s", error)


def _has_descriptor(stream: object) -> bool:
    try:
        return stream.fileno() >= 0  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
