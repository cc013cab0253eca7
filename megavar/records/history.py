"""Where the time of a run went: attempts, lost steps, and seconds in each state."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATES = ("waiting", "starting", "training", "saving", "repeated", "stopping")
"""In the queue between attempts; from the start of an attempt to its first metrics; steps that were kept; of these,
waiting for checkpoints; steps after the last checkpoint, done again later; from the last metrics to the end."""


@dataclass(frozen=True)
class AttemptSummary:
    """One row of the history."""

    attempt: int
    job: str
    nodes: int
    outcome: str
    first_step: int
    """The step it continued from."""
    kept_step: int
    """Of the newest checkpoint when it ended."""
    reached_step: int
    """The last one that was logged."""
    seconds: dict[str, float]
    """By state."""

    @property
    def lost_steps(self) -> int:
        """Steps after the last checkpoint: they are repeated. Known to the interval of the log."""
        return max(0, self.reached_step - self.kept_step)


def read_metrics(run_directory: Path) -> list[dict[str, Any]]:
    """All lines of ``metrics.jsonl`` and of those set aside when a run continued earlier, in order of time."""
    records = []
    for name in ("metrics.jsonl", "metrics.discarded.jsonl"):
        path = run_directory / name
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
                records.append({**record, "time": float(record["time"]), "step": int(record["step"])})
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a crash
    return sorted(records, key=lambda record: record["time"])


def summarize(attempts: Iterable[dict[str, Any]], metrics: list[dict[str, Any]], now: float) -> list[AttemptSummary]:
    """Combine the ledger ``restarts.json`` with the metrics.

    Args:
        attempts: entries of the ledger.
        metrics: as :func:`read_metrics` returns them.
        now: unix time until which an attempt without an end is counted.
    """
    entries, rows = list(attempts), []
    for index, entry in enumerate(entries):
        following = entries[index + 1] if index + 1 < len(entries) else None
        began, horizon = entry["started"], following["started"] if following else now
        records = [record for record in metrics if began <= record["time"] < horizon]
        ended = entry.get("ended") or (min(horizon, records[-1]["time"]) if records and following else horizon)
        steps = entry.get("steps_after") or (following["steps_before"] if following else entry["steps_before"])
        first, kept = max(entry["steps_before"][-1], 0), max(steps[-1], 0)
        reached = max([kept, first, *(record["step"] for record in records)])
        before = entries[index - 1].get("ended", began) if index else began
        rows.append(
            AttemptSummary(
                entry["attempt"],
                str(entry.get("job", "")),
                len(entry.get("nodes", [])),
                entry.get("outcome", "LOST" if following else "RUNNING"),
                first,
                kept,
                reached,
                _seconds(records, waited=max(0.0, began - before), began=began, ended=ended, kept=kept),
            )
        )
    return rows


def _seconds(
    records: list[dict[str, Any]], *, waited: float, began: float, ended: float, kept: int
) -> dict[str, float]:
    seconds = dict.fromkeys(STATES, 0.0) | {"waiting": waited}
    if not records:
        return seconds | {"starting": ended - began}
    first, last = records[0]["time"], records[-1]["time"]
    turn = max([record["time"] for record in records if record["step"] <= kept], default=first)
    saving = sum(record.get("checkpoint_seconds", 0.0) for record in records if record["step"] <= kept)
    return seconds | {
        "starting": first - began,
        "saving": saving,
        "training": max(0.0, turn - first - saving),
        "repeated": last - turn,
        "stopping": max(0.0, ended - last),
    }
