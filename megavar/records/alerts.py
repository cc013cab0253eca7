"""Which alerts last."""

from collections.abc import Iterable
from typing import Any


def lasting(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the lines of ``metrics.jsonl`` with an event, in their order: the alerts that are not over, oldest first."""
    active: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.get("event") == "alert":
            active[event["kind"]] = event
        elif event.get("event") == "alert_over":
            active.pop(event["kind"], None)
    return list(active.values())
