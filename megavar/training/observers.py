"""What watches a run without being part of what is trained: alerts, ledger, routing, validation, console.

The trainer calls every method of :class:`Observer` on every rank at the same steps; an observer that only writes files
looks at ``watched.monitor.is_writer``. None of them may change weights, optimizer states or random numbers, and none
may synchronize the device in :meth:`Observer.stepped`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from megavar.errors import ExitCode, MegavarError
from megavar.parallel.topology import Topology
from megavar.recipes.base import Recipe
from megavar.training.engine import Engine
from megavar.training.monitor import Monitor, Stopwatch
from megavar.training.run_directory import RunDirectory
from megavar.training.watchdog import Watchdog


class Watched(Protocol):
    """What observers may know of the trainer."""

    directory: RunDirectory
    monitor: Monitor
    stopwatch: Stopwatch
    watchdog: Watchdog
    recipe: Recipe
    engines: dict[str, Engine]
    topology: Topology
    micro_batch_size: int
    total_steps: int
    step: int
    """Steps taken."""

    def tell(self, step: int, event: str, **facts: Any) -> None:
        """Write a line of ``metrics.jsonl`` and let all observers know."""
        ...


class Observer:
    """Watches; methods that a kind does not need do nothing."""

    def begin(self, watched: Watched) -> None:
        """Before the first step of this process."""
        self.watched = watched

    def opened(self, step: int) -> None:
        """Training goes on after ``step``: at the start of the process, and after a rollback."""

    def stepped(self, step: int) -> None:
        """A step is complete. Called every step: it must cost nothing."""

    def logged(self, step: int, record: Mapping[str, float], statistics: Mapping[str, Tensor]) -> None:
        """A line of metrics has been written.

        Args:
            record: losses, norms, rates, speeds; equal on all ranks but for speeds.
            statistics: sums since the line before, over all ranks, on the CPU (``Recipe.summarize``).
        """

    def happened(self, step: int, event: str, facts: Mapping[str, Any]) -> None:
        """Something that is no regular metric: a spike, a rollback, an alert, a validation."""

    def saved(self, step: int) -> None:
        """The checkpoint of ``step`` is written, or handed over to be."""

    def previewed(self, step: int) -> None:
        """Samples were drawn, where the run draws any."""

    def ended(self, step: int, outcome: str) -> None:
        """This process trains no more; ``outcome`` is the name of an exit code."""


class Observers(Observer):
    """Several as one."""

    def __init__(self, each: Sequence[Observer]) -> None:
        self._each = tuple(each)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around all of training: tells how it ended."""
        outcome = ExitCode.FAILED
        try:
            yield
            outcome = ExitCode.FINISHED if self.watched.directory.done else ExitCode.PREEMPTED
        except MegavarError as error:
            outcome = error.exit_code
            raise
        finally:
            self.ended(self.watched.step, outcome.name)

    def begin(self, watched: Watched) -> None:
        """See :meth:`Observer.begin`."""
        super().begin(watched)
        for one in self._each:
            one.begin(watched)

    def opened(self, step: int) -> None:
        """See :meth:`Observer.opened`."""
        for one in self._each:
            one.opened(step)

    def stepped(self, step: int) -> None:
        """See :meth:`Observer.stepped`."""
        for one in self._each:
            one.stepped(step)

    def logged(self, step: int, record: Mapping[str, float], statistics: Mapping[str, Tensor]) -> None:
        """See :meth:`Observer.logged`."""
        for one in self._each:
            one.logged(step, record, statistics)

    def happened(self, step: int, event: str, facts: Mapping[str, Any]) -> None:
        """See :meth:`Observer.happened`."""
        for one in self._each:
            one.happened(step, event, facts)

    def saved(self, step: int) -> None:
        """See :meth:`Observer.saved`."""
        for one in self._each:
            one.saved(step)

    def previewed(self, step: int) -> None:
        """See :meth:`Observer.previewed`."""
        for one in self._each:
            one.previewed(step)

    def ended(self, step: int, outcome: str) -> None:
        """See :meth:`Observer.ended`."""
        for one in self._each:
            one.ended(step, outcome)
