"""One run as its directory describes it, living or not."""

import contextlib
import functools
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megavar.errors import DataError
from megavar.paths import shipped
from megavar.records.alerts import lasting
from megavar.records.curves import Curve
from megavar.records.history import AttemptSummary, attempts_of, read_metrics, summarize
from megavar.records.jobs import QueuedJob, job_name
from megavar.records.reading import json_lines, json_object

ALIVE_SECONDS = 60.0
"""Age of the lock's last sign of life up to which a run counts as living (``megavar.training.checkpoint.lock``)."""
RECENT = 20
"""Logged lines that make up a trend and a pace."""


@dataclass(frozen=True)
class RunRecord:
    """What a directory says."""

    path: Path
    config: dict[str, Any]
    """``config.yaml`` as plain values."""
    lines: list[dict[str, Any]]
    """Regular lines of ``metrics.jsonl``, by step."""
    events: list[dict[str, Any]]
    """Its other lines: spikes, rollbacks."""
    attempts: list[dict[str, Any]]
    """Of the launcher's ledger, or of the starts where no launcher kept one (``records.history``)."""
    starts: int
    """Of the run, by a launcher or by hand."""
    samples: int | None
    """Length of the training data."""
    done: bool
    alive: bool
    """Whether a process trains it now."""

    @classmethod
    def read(cls, path: Path) -> "RunRecord":
        """Read ``path``.

        Raises:
            DataError: it is no run.
        """
        try:
            config = yaml.safe_load((path / "config.yaml").read_text())
            assert isinstance(config, dict) and isinstance(config["run"], dict) and isinstance(config["train"], dict)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AssertionError, KeyError) as error:
            raise DataError(
                f"{path} is no run: its config.yaml cannot be read ({type(error).__name__}). Give the directory that "
                f"run.directory names, runs/NAME by default."
            ) from None
        records = [record for record in json_lines(path / "metrics.jsonl") if isinstance(record.get("step"), int)]
        return cls(
            path, config,
            [record for record in records if "event" not in record],
            [record for record in records if "event" in record],
            attempts_of(path),
            len(json_lines(path / "attempts.jsonl")),
            json_object(path / "data.json").get("samples"),
            (path / "DONE").exists(),
            _is_alive(path / "run.lock"),
        )  # fmt: skip

    @property
    def name(self) -> str:
        """Of the run."""
        return str(self.config["run"].get("name", self.path.name))

    @property
    def step(self) -> int:
        """The last one that was logged."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def total(self) -> int | None:
        """Steps of the whole run; None where nothing says it."""
        train = self.config["train"]
        if train.get("steps") is not None:
            return int(train["steps"])
        if train.get("epochs") is None or self.samples is None:
            return None
        return max(1, round(train["epochs"] * self.samples / train["global_batch_size"]))

    @property
    def job_name(self) -> str:
        """Of its jobs in Slurm's queue."""
        return job_name(self.name, self.path.absolute())

    @property
    def state(self) -> str:
        """As the directory alone says it; see :meth:`state_with`."""
        return self.state_with(None)

    def state_with(self, job: QueuedJob | None) -> str:
        """In a word: ``finished``; ``running``; ``starting``, ``queued`` or ``held`` where a job says so; else how the
        last attempt ended (``failed``, ``preempted``, ``killed``, ...), or ``new``."""
        if self.done:
            return "finished"
        if self.alive:
            return "running"
        if job is not None:
            return "held" if job.is_held else "queued" if job.state == "PENDING" else "starting"
        if self.attempts:
            return str(self.attempts[-1].get("outcome", "killed")).lower()
        return "stopped" if self.lines else "new"

    @property
    def loss(self) -> float | None:
        """The last one that was logged."""
        return next((float(line["loss"]) for line in reversed(self.lines) if "loss" in line), None)

    @property
    def trend(self) -> str:
        """Mean loss of the newest lines against those before: ``↓``, ``→`` (within a hundredth) or ``↑``."""
        losses = [float(line["loss"]) for line in self.lines if "loss" in line][-2 * RECENT :]
        if len(losses) < 4:
            return ""
        half = len(losses) // 2
        before, now = sum(losses[:half]) / half, sum(losses[half:]) / (len(losses) - half)
        if abs(now - before) <= 0.01 * abs(before):
            return "→"
        return "↓" if now < before else "↑"

    @property
    def images_per_second(self) -> float | None:
        """Of the last line."""
        return self.lines[-1].get("images_per_second") if self.lines else None

    @property
    def seconds_left(self) -> float | None:
        """At the pace of the newest lines; None unless it is running."""
        recent = self.lines[-RECENT:]
        if not self.alive or self.done or self.total is None or len(recent) < 2:
            return None
        steps = recent[-1]["step"] - recent[0]["step"]
        pace = (recent[-1]["time"] - recent[0]["time"]) / steps if steps > 0 else 0.0
        return pace * (self.total - self.step)

    @functools.cached_property
    def history(self) -> list[AttemptSummary]:
        """One row per attempt; a dead one that left no end lasted until its last sign."""
        signs = [line["time"] for line in (*self.lines, *self.events) if "time" in line]
        signs += [float(attempt.get("ended") or attempt["started"]) for attempt in self.attempts]
        now = time.time() if self.alive else max(signs, default=0.0) + 1e-3
        return summarize(self.attempts, read_metrics(self.path), now)

    @property
    def restarts(self) -> int:
        """Attempts after the first."""
        return max(0, max(self.starts, len(self.attempts)) - 1)

    @property
    def lost_steps(self) -> int:
        """Steps that were done again, or will be: after the last checkpoint of each attempt that has ended."""
        rows = self.history if not self.alive else self.history[:-1]
        return sum(row.lost_steps for row in rows)

    @property
    def device_hours(self) -> float:
        """Of all attempts."""
        return sum(row.device_hours for row in self.history)

    @property
    def planned_hours(self) -> float | None:
        """Device hours of the whole run at the step time that the plan expects; None where it expects nothing."""
        expected = next((event for event in reversed(self.events) if event["event"] == "expectation"), None)
        if expected is None or self.total is None or not self.history:
            return None
        return float(expected["expected_step_seconds"]) * self.total * self.history[-1].devices / 3600

    @property
    def alerts(self) -> list[dict[str, Any]]:
        """Those that are not over, oldest first; of a run that is done, none."""
        return [] if self.done else lasting(self.events)

    @property
    def validation_points(self) -> list[tuple[int, float]]:
        """Step and loss on held-out samples."""
        return [(event["step"], event["loss"]) for event in self.events
                if event["event"] == "validation" and "loss" in event]  # fmt: skip

    @property
    def reference(self) -> Curve | None:
        """The curve that the configuration names.

        Raises:
            DataError: it is no curve.
        """
        named = (self.config.get("validation") or {}).get("reference")
        if named is None:
            return None
        return Curve.load(shipped(named) or Path(named))

    @property
    def verdict(self) -> str | None:
        """``inside``, ``above`` or ``below`` the band of the reference curve; None without one."""
        try:
            curve = self.reference
        except DataError:
            return None
        if curve is None:
            return None
        name = curve.metric.removeprefix("validation/")
        lines = self.lines if name == curve.metric else [one for one in self.events if one["event"] == "validation"]
        return curve.verdict([(line["step"], line[name]) for line in lines if name in line])

    @functools.cached_property
    def disk_bytes(self) -> int:
        """Of everything in the directory."""
        return sum(bytes for _, bytes in files_of(self.path))


def files_of(run_directory: Path) -> Iterator[tuple[Path, int]]:
    """Files of a run and their sizes; those that a living run removes meanwhile are left out."""
    for folder, _, names in os.walk(run_directory):
        for name in names:
            file = Path(folder, name)
            with contextlib.suppress(OSError):
                found = file.lstat()
                if stat.S_ISREG(found.st_mode):
                    yield file, found.st_size


def _is_alive(lock: Path) -> bool:
    """Whether the owner of a lock lives: looked up where it is of this machine, else by its signs of life."""
    try:
        age = time.time() - lock.stat().st_mtime
    except OSError:
        return False
    owner = json_object(lock)
    try:
        here = (Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").readlink()))
        if here == (owner.get("boot"), owner.get("namespace")):
            os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, KeyError, ValueError, TypeError):
        pass
    return age < ALIVE_SECONDS
