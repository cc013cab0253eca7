"""Finds what a person should look at while a run goes on, and tells of it once: when it begins, and when it is over.

Values are those of the log lines, so nothing is computed or synchronized for it; a thread looks for steps that do not
end. On the first rank only.
"""

import contextlib
import logging
import math
import shutil
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from megavar import notify
from megavar.config.alerts import AlertsConfig
from megavar.records.alerts import lasting
from megavar.records.reading import json_lines
from megavar.training.monitor import expert_load
from megavar.training.observers import Observer
from megavar.wording import duration, size

_log = logging.getLogger(__name__)
_FEWEST = 5
"""Values that make a median."""
_DAY = 86400.0
Found = Iterator[tuple[str, str, dict[str, float]]]
"""Kind, message and facts of what is odd now."""


class AlertsObserver(Observer):
    """Judges every log line.

    Args:
        uniform_loss: what guessing gives, in nats; None where losses are of another kind.
    """

    def __init__(self, config: AlertsConfig, uniform_loss: float | None = None) -> None:
        self.config, self.uniform_loss = config, uniform_loss
        self._active: dict[str, int] = {}
        """Kinds that last, and the step at which they began."""
        self._telling = threading.RLock()
        self._commands: list[threading.Thread] = []
        self._thread: threading.Thread | None = None
        self._norms: deque[float] = deque(maxlen=config.window)
        self._speeds: deque[float] = deque(maxlen=config.window)
        self._free: deque[tuple[float, int]] = deque(maxlen=config.window)
        self._durations: deque[float] = deque(maxlen=config.window)
        self._checkpoint_bytes = self._slow_lines = 0
        self._last, self._ended = time.monotonic(), threading.Event()

    # -- the life of a run --------------------------------------------------------------------------------------------

    def opened(self, step: int) -> None:
        """See :meth:`Observer.opened`."""
        if not self.watched.monitor.is_writer:
            return
        self._checkpoint_bytes = self._newest_checkpoint()
        self._last = time.monotonic()
        # What lasted when the process before ended, or at the step that a rollback went back to.
        written = json_lines(self.watched.directory.metrics)
        with self._telling:
            self._active = {alert["kind"]: alert["step"] for alert in lasting(written)}
        if self.config.stall_seconds is not None and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="alerts", daemon=True)
            self._thread.start()

    def stepped(self, step: int) -> None:
        """See :meth:`Observer.stepped`."""
        now = time.monotonic()
        self._durations.append(now - self._last)
        self._last = now

    def logged(self, step: int, record: Mapping[str, float], statistics: Mapping[str, Tensor]) -> None:
        """See :meth:`Observer.logged`."""
        if not self.watched.monitor.is_writer:
            return
        self._settle(step, [*self._of_line(record), *(self._of_disk() if self.config.disk else ())])
        self._last = time.monotonic()

    def happened(self, step: int, event: str, facts: Mapping[str, Any]) -> None:
        """See :meth:`Observer.happened`."""
        if not self.watched.monitor.is_writer:
            return
        if event == "loss_spike":
            message = f"the loss jumped to {facts['loss']:.4g}: the median of the lines before is {facts['median']:.4g}"
            self._raise(step, event, message, {})
        elif event in ("not_finite", "rolled_back", "diverged"):
            words = {
                "not_finite": "loss or gradient is not finite: the step is not applied",
                "rolled_back": f"went back from step {facts.get('from_step')} to the last checkpoint",
                "diverged": "the loss has diverged: the run ends",
            }
            self._notify(step, event, words[event], {})

    def saved(self, step: int) -> None:
        """See :meth:`Observer.saved`."""
        if self.watched.monitor.is_writer:
            self._checkpoint_bytes = self._newest_checkpoint()
        self._last = time.monotonic()

    def previewed(self, step: int) -> None:
        """See :meth:`Observer.previewed`."""
        self._last = time.monotonic()

    def ended(self, step: int, outcome: str) -> None:
        """See :meth:`Observer.ended`."""
        self._ended.set()
        until = time.monotonic() + notify.HURRY
        for command in self._commands:
            command.join(max(0.0, until - time.monotonic()))

    # -- what is odd --------------------------------------------------------------------------------------------------

    def _of_line(self, record: Mapping[str, float]) -> Found:
        config, loss, norm = self.config, record.get("loss"), record.get("gradient_norm")
        guess = self.uniform_loss
        if config.loss_above_uniform and guess and loss is not None and loss > config.loss_above_uniform * guess:
            message = f"the loss {loss:.4g} is far above {guess:.4g}, which guessing gives"
            yield "loss_above_uniform", message, {"seen": loss, "uniform": guess}
        if norm is not None and math.isfinite(norm):
            median = _median(self._norms)
            self._norms.append(norm)
            if config.gradient_norm is not None and median and norm > config.gradient_norm * median:
                yield "gradient_norm", (
                    f"the gradient norm {norm:.3g} is {norm / median:.0f} times the median of the lines before"
                ), {"gradient_norm": norm, "median": median}  # fmt: skip
        load = expert_load(record)
        if config.expert_share is not None and load is not None and load[0] < config.expert_share:
            yield "expert_collapse", (
                f"an expert of some block gets {load[0]:.1%} of its fair share of the tokens"
            ), {"smallest_load": load[0], "largest_load": load[1]}  # fmt: skip
        yield from self._of_speed(record)

    def _of_speed(self, record: Mapping[str, float]) -> Found:
        config, speed, waiting = self.config, record.get("images_per_second"), record.get("data_wait_share", 0.0)
        if speed is not None:
            median = _median(self._speeds)
            self._speeds.append(speed)
            slow = config.throughput is not None and median is not None and speed < config.throughput * median
            self._slow_lines = self._slow_lines + 1 if slow else 0
            if self._slow_lines >= 2 and median:  # one may be another's doing
                yield "throughput_drop", (
                    f"{speed:.3g} images/s is {speed / median:.0%} of the median of the lines before"
                ), {"images_per_second": speed, "median": median}  # fmt: skip
        if config.data_wait_share is not None and waiting > config.data_wait_share:
            yield "stalled_data", f"{waiting:.0%} of the time goes into waiting for samples", {"share": waiting}

    def _of_disk(self) -> Found:
        path = self.watched.directory.path
        try:
            free = shutil.disk_usage(path).free
        except OSError:
            return
        now = time.monotonic()
        self._free.append((now, free))
        facts = {"free_bytes": float(free), "checkpoint_bytes": float(self._checkpoint_bytes)}
        if free < 1.05 * self._checkpoint_bytes:
            yield "disk", (
                f"the next checkpoint needs {size(self._checkpoint_bytes)}, and {size(free)} are free where {path} lies"
            ), facts  # fmt: skip
            return
        began, before = self._free[0]
        if now - began < 600 or before <= free:  # a checkpoint that replaces another one is no trend
            return
        left = free / (before - free) * (now - began)
        if left < min(_DAY, self.watched.monitor.seconds_left()):
            yield "disk", f"the disk of {path} will be full in {duration(left)} at this pace", facts

    def _newest_checkpoint(self) -> int:
        """Bytes of the largest checkpoint; 0 where there is none yet."""
        found = [0]
        with contextlib.suppress(OSError):
            for folder in self.watched.directory.checkpoints.glob("step-*"):
                found.append(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
        return max(found)

    def _watch(self) -> None:
        """In a thread: a step that takes far too long."""
        assert self.config.stall_seconds is not None
        while not self._ended.wait(min(5.0, self.config.stall_seconds / 4)):
            inside, silent = self.watched.stopwatch.inside, time.monotonic() - self._last
            last = self.watched.step == self.watched.total_steps
            if last or inside not in (None, "data"):  # a save, a preview, a validation takes its time
                self._last = time.monotonic()
                continue
            steps = list(self._durations)
            limit = max(self.config.stall_seconds, 10 * statistics.median(steps)) if steps else (
                10 * self.config.stall_seconds
            )  # fmt: skip
            if silent > limit:
                kind, what = ("stalled_data", ": it waits for samples") if inside else ("stalled_step", "")
                self._raise(self.watched.step, kind, f"no step for {duration(silent)}{what}", {"seconds": silent})

    # -- telling ------------------------------------------------------------------------------------------------------

    def _settle(self, step: int, found: list[tuple[str, str, dict[str, float]]]) -> None:
        for kind, message, facts in found:
            self._raise(step, kind, message, facts)
        lasting = {kind for kind, _, _ in found}
        with self._telling:
            over = [kind for kind, began in self._active.items() if kind not in lasting and began < step]
            for kind in over:
                del self._active[kind]
        for kind in over:
            self.watched.tell(step, "alert_over", kind=kind)

    def _raise(self, step: int, kind: str, message: str, facts: dict[str, float]) -> None:
        """Tell of an alert, unless it lasts already."""
        with self._telling:
            if kind in self._active:
                return
            self._active[kind] = step
        self.watched.tell(step, "alert", kind=kind, message=message, **facts)
        self._notify(step, kind, message, facts)

    def _notify(self, step: int, kind: str, message: str, facts: dict[str, float]) -> None:
        """Training does not wait for the operator's command."""
        name, path = self.watched.monitor.name, str(self.watched.directory.path.absolute())
        command = threading.Thread(
            target=notify.notify, args=(name, path, kind, message), kwargs={"step": step, **facts}, daemon=True
        )
        command.start()
        self._commands = [*(other for other in self._commands if other.is_alive()), command]


def _median(values: deque[float]) -> float | None:
    return statistics.median(values) if len(values) >= _FEWEST else None
