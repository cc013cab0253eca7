"""One run as its directory describes it, living or not."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megavar.errors import DataError

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
    """Of the launcher's ledger ``restarts.json``."""
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
        records = [record for record in _json_lines(path / "metrics.jsonl") if isinstance(record.get("step"), int)]
        lock = path / "run.lock"
        data, ledger = _json(path / "data.json"), _json(path / "restarts.json")
        return cls(
            path, config,
            [record for record in records if "event" not in record],
            [record for record in records if "event" in record],
            list(ledger.get("attempts", [])),
            len(_json_lines(path / "attempts.jsonl")),
            data.get("samples"),
            (path / "DONE").exists(),
            lock.exists() and time.time() - lock.stat().st_mtime < ALIVE_SECONDS,
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
    def state(self) -> str:
        """``finished``, ``running``, how the last attempt ended (``failed``, ``preempted``), ``stopped``, ``new``."""
        if self.done:
            return "finished"
        if self.alive:
            return "running"
        if self.attempts and "outcome" in self.attempts[-1]:
            return str(self.attempts[-1]["outcome"]).lower()
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
        if self.state != "running" or self.total is None or len(recent) < 2:
            return None
        steps = recent[-1]["step"] - recent[0]["step"]
        pace = (recent[-1]["time"] - recent[0]["time"]) / steps if steps > 0 else 0.0
        return pace * (self.total - self.step)

    @property
    def disk_bytes(self) -> int:
        """Of everything in the directory."""
        return sum(file.lstat().st_size for file in self.path.rglob("*") if file.is_file() and not file.is_symlink())


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects, one a line; a line that a crash cut off is left out."""
    found = []
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
