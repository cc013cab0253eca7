"""Reads the small files of a run directory, whatever state a crash left them in."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def json_object(path: Path) -> dict[str, Any]:
    """The object in ``path``; an empty one where there is none, or none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects, one a line; a line that a crash cut off is left out."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    return list(_objects(text))


def metric_lines(directory: Path) -> list[dict[str, Any]]:
    """The regular lines of a run's ``metrics.jsonl``, without events; none where there is no log."""
    return [line for line in json_lines(directory / "metrics.jsonl") if "event" not in line]


def _objects(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record
