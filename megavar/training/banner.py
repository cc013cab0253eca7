"""The first words of a run."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from megavar.training.console import card
from megavar.training.observers import Observer


class BannerObserver(Observer):
    """Says what begins, once, when it is known from which step; and alerts, as they come."""

    def __init__(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        self.title, self.rows, self._said = title, list(rows), False

    def opened(self, step: int) -> None:
        """See :meth:`Observer.opened`."""
        if self._said:
            return
        self._said = True
        starts = f"after step {step} of {self.watched.total_steps}, from its checkpoint" if step else "at step 0"
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        rows = [*self.rows, ("starts", f"{starts} ({stamp})")]
        self.watched.monitor.console.say(card(self.title, rows))

    def happened(self, step: int, event: str, facts: Mapping[str, Any]) -> None:
        """See :meth:`Observer.happened`."""
        if event == "alert":
            stamp = time.strftime("%H:%M:%S")
            monitor = self.watched.monitor
            monitor.console.say(f"{stamp}  {monitor.name}  ALERT at step {step}: {facts['message']}")
