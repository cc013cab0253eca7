"""Runs in Prometheus' text format, for node_exporter's textfile collector."""

from collections.abc import Sequence
from typing import Any

_GAUGES = {
    "step": "Steps taken",
    "total_steps": "Steps of the whole run",
    "loss": "Last logged training loss in nats",
    "validation_loss": "Last loss on held-out samples in nats",
    "images_per_second": "Speed of the last log line",
    "seconds_left": "Time to the last step at the present pace",
    "restarts": "Attempts after the first",
    "lost_steps": "Steps that were done again",
    "disk_bytes": "Size of the run directory",
    "device_hours": "Hours of all devices so far",
    "planned_device_hours": "Hours of all devices that the plan expects of the whole run",
}


def exposition(rows: Sequence[dict[str, Any]]) -> str:
    """Gauges ``megavar_<value>{run=..., directory=...}``; what a run does not know is left out."""
    lines = []
    for key, help_text in _GAUGES.items():
        found = [(_labels(row), row[key]) for row in rows if row[key] is not None]
        if found:
            lines += [f"# HELP megavar_{key} {help_text}.", f"# TYPE megavar_{key} gauge"]
            lines += [f"megavar_{key}{{{labels}}} {float(value):.10g}" for labels, value in found]
    lines += ["# HELP megavar_state 1 for the state that a run is in.", "# TYPE megavar_state gauge"]
    lines += [f'megavar_state{{{_labels(row)},state="{row["state"]}"}} 1' for row in rows]
    lines += ["# HELP megavar_alert 1 for every alert that lasts.", "# TYPE megavar_alert gauge"]
    lines += [f'megavar_alert{{{_labels(row)},kind="{alert["kind"]}"}} 1'
              for row in rows for alert in row["alerts"]]  # fmt: skip
    return "\n".join(lines) + "\n"


def _labels(row: dict[str, Any]) -> str:
    """Runs may have one name, seeds of a demo for example."""
    return f'run="{_escaped(row["run"])}",directory="{_escaped(str(row["directory"]))}"'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
