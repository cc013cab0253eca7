"""The file that a score is published in: the numbers together with everything that identifies them.

The same images give the same bytes, whatever number of ranks made them, so nothing here depends on time or place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch_fidelity
from torch import Tensor

import megavar
from megavar.errors import DataError
from megavar.storage import write_json_atomic

FORMAT = 1


@dataclass(frozen=True)
class Result:
    """Scores and their identity; every field is a plain JSON value."""

    suite: str
    """Which set of metrics, for example ``digits`` or ``adm``."""
    metrics: dict[str, float]
    """The numbers; a key names its feature extractor or its sample count where that is not the usual one."""
    count: int
    """Number of images scored."""
    class_histogram: dict[str, int]
    """Images per class label."""
    rounding: str
    """How float images became uint8: ``round`` or ``truncate``, or ``unknown`` for images that came from outside."""
    order: str
    """How images were ordered for the metrics that depend on it."""
    extractor: dict[str, Any]
    """Name and sha256 of the network that made the features."""
    reference: dict[str, Any]
    """What was compared with: name or path, count, sha256 or fingerprint."""
    sampler: dict[str, Any] = field(default_factory=dict)
    """Guidance, filters, temperature, seed and chunk size: the resolved ``sampling`` section."""
    checkpoint: dict[str, Any] = field(default_factory=dict)
    """Which weights: path or run, step, sha256, and whether they are the moving average."""
    notes: list[str] = field(default_factory=list)
    """Warnings that belong to the numbers, for example that recall depends on the number of images."""
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same metrics of what the images are compared with, by name."""
    table: list[dict[str, Any]] = field(default_factory=list)
    """``key``, ``better`` (lower, higher, none) and ``threshold`` of every metric, in the order of the table."""
    missed: list[str] = field(default_factory=list)
    """Metrics whose threshold is not met."""

    def as_dict(self) -> dict[str, Any]:
        """The content of the file."""
        versions = {
            "megavar": megavar.__version__,
            "torch": torch.__version__,
            "torch_fidelity": torch_fidelity.__version__,
        }
        return {"format": FORMAT, **asdict(self), "tf32": False, "versions": versions}


def write_result(path: Path, result: Result) -> None:
    """Write ``result`` to ``path`` as JSON, atomically."""
    write_json_atomic(path, result.as_dict())


def read_result(path: Path) -> dict[str, Any]:
    """Read what ``write_result`` wrote."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a result file of megavar ({error}): evaluate again") from error
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise DataError(f"{path} is not a result file of format {FORMAT}: evaluate again with this version of megavar")
    return dict(content)


def class_histogram(labels: Tensor) -> dict[str, int]:
    """Count of every label in int64 ``labels`` [N], by ascending label."""
    values, counts = labels.unique(sorted=True, return_counts=True)
    return {str(int(value)): int(count) for value, count in zip(values, counts)}
