"""Where the time of a run went: attempts, lost steps, and seconds in each state."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megavar.records.reading import json_lines, json_object

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
    devices: int
    """GPUs, or processes where there are none."""

    @property
    def lost_steps(self) -> int:
        """Steps after the last checkpoint: they are repeated. Known to the interval of the log."""
        return max(0, self.reached_step - self.kept_step)

    @property
    def device_hours(self) -> float:
        """Of all devices, from the start of the attempt to its end; waiting in the queue is not counted."""
        return self.devices * sum(spent for state, spent in self.seconds.items() if state != "waiting") / 3600


def read_metrics(run_directory: Path) -> list[dict[str, Any]]:
    """All lines of ``metrics.jsonl`` and of those set aside when a run continued earlier, in order of time."""
    records = []
    for name in ("metrics.jsonl", "metrics.discarded.jsonl"):
        for record in json_lines(run_directory / name):
            try:
                records.append({**record, "time": float(record["time"]), "step": int(record["step"])})
            except (ValueError, KeyError, TypeError):
                continue
    return sorted(records, key=lambda record: record["time"])


def attempts_of(run_directory: Path) -> list[dict[str, Any]]:
    """Entries for :func:`summarize`: of the launcher's ledger, or of the starts where none kept one."""
    attempts = list(json_object(run_directory / "restarts.json").get("attempts", []))
    if attempts:
        return attempts
    lines: dict[int, dict[str, Any]] = {}
    for line in json_lines(run_directory / "ledger.jsonl"):
        lines[line.get("attempt", 0)] = line  # the last one of an attempt counts
    found: list[dict[str, Any]] = []
    starts = json_lines(run_directory / "attempts.jsonl")
    for number, start in enumerate(starts, 1):
        line = lines.get(number, {})
        before = found[-1].get("steps_after", [0]) if found else [0]
        entry: dict[str, Any] = {
            "attempt": number,
            "nodes": list(dict.fromkeys(device["host"] for device in start.get("devices", ()))),
            "devices": sum(device["count"] for device in start.get("devices", ()))
            or start.get("layout", {}).get("world_size", 1),
            "started": line.get("started") or _time_of(start),
            "steps_before": [line["first_step"]] if line else before,
        }
        if line.get("outcome", "RUNNING") != "RUNNING":
            entry |= {"ended": line["ended"], "outcome": line["outcome"], "steps_after": [line["kept_step"]]}
        elif number == len(starts):
            entry["steps_after"] = [_newest_checkpoint(run_directory)]
        elif not line:  # of an earlier version, which kept no books of it: nothing is called lost
            until = _time_of(starts[number])
            logged = [one["step"] for one in read_metrics(run_directory) if entry["started"] <= one["time"] < until]
            entry["steps_after"] = [max(logged, default=before[0])]
        found.append(entry)
    return found


def _newest_checkpoint(run_directory: Path) -> int:
    """Step of the newest whole checkpoint; 0 where there is none."""
    names = [path.parent.name[5:] for path in (run_directory / "checkpoints").glob("step-*/manifest.json")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def _time_of(start: dict[str, Any]) -> float:
    """Of a line of ``attempts.jsonl``; earlier versions wrote it for people only."""
    if "time" in start:
        return float(start["time"])
    try:
        return datetime.strptime(start["started_at"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (KeyError, ValueError):
        return 0.0


def summarize(attempts: Iterable[dict[str, Any]], metrics: list[dict[str, Any]], now: float) -> list[AttemptSummary]:
    """Combine the ledger ``restarts.json`` with the metrics.

    Args:
        attempts: as :func:`attempts_of` or the ledger ``restarts.json`` has them.
        metrics: as :func:`read_metrics` returns them.
        now: unix time until which an attempt without an end is counted.
    """
    entries, rows = list(attempts), []
    for index, entry in enumerate(entries):
        following = entries[index + 1] if index + 1 < len(entries) else None
        began = entry["started"]
        horizon = max(began, following["started"] if following else now)
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
                entry.get("outcome", "KILLED" if following else "RUNNING"),
                first,
                kept,
                reached,
                _seconds(records, waited=max(0.0, began - before), began=began, ended=ended, kept=kept),
                int(entry.get("devices") or len(entry.get("nodes", [])) * entry.get("tasks_per_node", 1) or 1),
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
