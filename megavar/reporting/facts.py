"""All that the directory of a run says, gathered for a page."""

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megavar.records.history import AttemptSummary
from megavar.records.run import RunRecord
from megavar.reporting.scores import Scored, latest, scores_of

PARENT = "parent.json"
"""In a run that was forked: from what."""
MARKS = {"loss_spike": "spike", "not_finite": "not finite", "rolled_back": "rollback", "diverged": "diverged"}
"""Events that curves show, and their words."""


@dataclass(frozen=True)
class RunFacts:
    """One run."""

    record: RunRecord
    name: str
    """Unique among the runs of a page."""

    @classmethod
    def read(cls, paths: list[Path]) -> "list[RunFacts]":
        """Of several runs; those of equal names are told apart by their directories.

        Raises:
            DataError: a directory is no run.
        """
        records = [RunRecord.read(path) for path in paths]
        names = [record.name for record in records]
        return [
            cls(record, record.name if names.count(record.name) == 1 else str(record.path)) for record in records
        ]

    @property
    def path(self) -> Path:
        """The directory."""
        return self.record.path

    @property
    def config(self) -> dict[str, Any]:
        """Of the run, as plain values."""
        return self.record.config

    def text(self, name: str) -> str:
        """Content of a file in the directory; empty where there is none."""
        try:
            return (self.path / name).read_text(errors="replace")
        except OSError:
            return ""

    def json(self, name: str) -> dict[str, Any]:
        """Of a file in the directory; nothing where there is none."""
        try:
            content = json.loads(self.text(name))
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    @cached_property
    def scores(self) -> list[Scored]:
        """The newest last."""
        return scores_of(self.path)

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """``attempts.jsonl``: where, with what."""
        found = []
        for line in self.text("attempts.jsonl").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return [start for start in found if isinstance(start, dict)]

    @property
    def start(self) -> dict[str, Any]:
        """The last one."""
        return self.starts[-1] if self.starts else {}

    @property
    def devices(self) -> int:
        """Of the last start."""
        return int(self.start.get("layout", {}).get("world_size", 1))

    @cached_property
    def attempts(self) -> list[AttemptSummary]:
        """Where the time of each went."""
        return self.record.history

    @property
    def restarts(self) -> list[int]:
        """Steps from which later attempts continued."""
        return [attempt.first_step for attempt in self.attempts[1:]]

    @property
    def marks(self) -> list[tuple[int, str]]:
        """What happened, and when."""
        found = [(event["step"], MARKS[event["event"]]) for event in self.record.events if event["event"] in MARKS]
        return sorted([*found, *((step, "restart") for step in self.restarts)])

    @property
    def previews(self) -> list[tuple[int, Path]]:
        """Grids of the same seeds at several steps."""
        found = [(int(match[1]), path) for path in (self.path / "samples").glob("step-*.png")
                 if (match := re.fullmatch(r"step-(\d+)\.png", path.name))]  # fmt: skip
        return sorted(found)

    @property
    def grid(self) -> Path | None:
        """The newest overview of samples: of those that were scored, else a preview."""
        generated = self.path / "generated"
        scored = [generated / s.path.stem.split("-", 2)[-1] / "grid.png" for s in latest(self.scores)]
        drawn = [*(path for path in scored if path.is_file())] or sorted(
            (path for path in generated.glob("*/grid.png") if not path.parent.name.startswith("untrained")),
            key=lambda path: path.stat().st_mtime,
        )
        return drawn[-1] if drawn else (self.previews[-1][1] if self.previews else None)

    @property
    def parameters(self) -> int | None:
        """Of the first module, by its newest checkpoint."""
        for path in sorted((self.path / "checkpoints").glob("step-*/manifest.json"), reverse=True):
            try:
                modules = json.loads(path.read_text())["modules"]
                tensors = next(iter(modules.values()))["tensors"]
                return sum(math.prod(shape) for name, shape in tensors.items() if not name.startswith("heads."))
            except (OSError, ValueError, KeyError, StopIteration, TypeError, AttributeError):
                continue
        return None

    @property
    def verdict(self) -> tuple[bool | None, str]:
        """Whether all is well (None: cannot be said), and the sentence that says it."""
        record, missed = self.record, [key for scored in latest(self.scores) for key in scored.missed]
        judged = any(metric.threshold is not None for scored in latest(self.scores) for metric in scored.table)
        at = f"step {record.step}" + (f" of {record.total}" if record.total else "")
        if any(event["event"] == "diverged" for event in record.events):
            return False, f"diverged at {at}"
        if record.state != "finished":
            return (None if record.state in ("running", "new", "preempted") else False), f"{record.state} at {at}"
        if not judged:
            return None, f"finished at {at}; " + ("scores have no thresholds" if self.scores else "not scored")
        if missed:
            return False, f"finished at {at}; misses {', '.join(missed)}"
        return True, f"finished at {at}; meets every threshold"


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    if isinstance(tree, dict) and tree:
        return {name: leaf for key, value in tree.items() for name, leaf in flatten(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): tree}


def differences(configs: dict[str, dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Keys in which configurations differ, with the value of each (``…`` where one has no such key).

    Where a run lies and what it is called is no difference.
    """
    flat = [flatten(config) for config in configs.values()]
    keys = sorted(set().union(*flat) - {"run.name", "run.directory"})
    rows = [(key, [values.get(key, "…") for values in flat]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values[1:])]
