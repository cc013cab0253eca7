"""Traces of a few steps, on request."""

import logging
from pathlib import Path
from typing import Any

import torch

from megavar.config.logging import ProfileConfig

_log = logging.getLogger(__name__)


class Profiler:
    """Records the steps that the configuration names; does nothing on other ranks or without configuration."""

    def __init__(self, config: ProfileConfig | None, directory: Path, rank: int) -> None:
        self.config = config if config is not None and rank in config.ranks else None
        self.directory, self.rank = directory, rank
        self._begun = 0
        self._trace: Any = None

    def step_begins(self) -> None:
        """Call before every step."""
        if self.config is None:
            return
        if self._begun == self.config.after:
            self._start()
        elif self._begun == self.config.after + self.config.steps:
            self._stop()
        self._begun += 1

    def _start(self) -> None:
        assert self.config is not None
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            if self.config.memory:
                torch.cuda.memory._record_memory_history()
        self._trace = torch.profiler.profile(activities=activities, record_shapes=True)
        self._trace.start()

    def _stop(self) -> None:
        assert self.config is not None
        self._trace.stop()
        self.directory.mkdir(parents=True, exist_ok=True)
        place = self.directory / f"rank-{self.rank:04d}.trace.json.gz"
        self._trace.export_chrome_trace(str(place))
        self._trace = None
        if torch.cuda.is_available() and self.config.memory:
            torch.cuda.memory._dump_snapshot(str(self.directory / f"rank-{self.rank:04d}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        _log.info("Wrote the trace of %d steps to %s.", self.config.steps, place)
