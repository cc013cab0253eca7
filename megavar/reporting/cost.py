"""What a run cost: device hours by state, beside the plan."""

from dataclasses import dataclass

from megavar.records.history import STATES
from megavar.records.run import files_of
from megavar.reporting.facts import RunFacts

FOLDERS = ("checkpoints", "generated", "samples", "logs", "analysis", "routing", "report")


@dataclass(frozen=True)
class Cost:
    """Of one run."""

    devices: int
    device: str
    hours: dict[str, float]
    """Device hours by state; waiting in the queue costs none and is wall time."""
    lost_steps: int
    starts: int
    planned_hours: float | None
    """Device hours of all steps at the predicted pace; None where nothing was predicted."""
    expected: dict[str, float]
    """``step_seconds`` and ``memory_gib``, as predicted."""
    measured: dict[str, float]
    """The same, as measured."""
    source: str
    """Of the prediction."""
    disk: dict[str, int]
    """Bytes by folder."""

    @property
    def total(self) -> float:
        """Device hours without waiting."""
        return sum(hours for state, hours in self.hours.items() if state != "waiting")


def cost_of(run: RunFacts) -> Cost:
    """Add up attempts and events."""
    hours = dict.fromkeys(STATES, 0.0)
    for attempt in run.attempts:
        for state, seconds in attempt.seconds.items():
            hours[state] = hours.get(state, 0.0) + seconds / 3600 * (1 if state == "waiting" else attempt.devices)
    events = [event for event in run.record.events if event["event"] == "expectation"]
    event = events[-1] if events else {}
    expected = {"step_seconds": event.get("expected_step_seconds"), "memory_gib": event.get("expected_memory_gib")}
    pace = _median([float(line["step_seconds"]) for line in run.record.lines if "step_seconds" in line])
    memory = [float(line["memory_gib"]) for line in run.record.lines if "memory_gib" in line]
    measured = {"step_seconds": pace, "memory_gib": max(memory) if memory else None}
    planned = None
    if expected["step_seconds"] is not None and run.record.total:
        planned = float(expected["step_seconds"]) * run.record.total * run.devices / 3600
    return Cost(
        run.devices, str(run.start.get("device") or "unknown device"), hours,
        sum(attempt.lost_steps for attempt in run.attempts[:-1]), max(1, len(run.attempts), len(run.starts)), planned,
        {key: float(value) for key, value in expected.items() if value is not None},
        {key: value for key, value in measured.items() if value is not None}, str(event.get("source", "")), _disk(run),
    )  # fmt: skip


def _disk(run: RunFacts) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for file, size in files_of(run.path):
        top = file.relative_to(run.path).parts[0]
        place = top if top in FOLDERS else "other"
        sizes[place] = sizes.get(place, 0) + size
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
