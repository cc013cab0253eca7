"""What an analysis is: runs in, numbers, arrays and pictures out.

    class Mine(Analysis[MineAnalysis]):
        def look(self, runs):
            counts = {run.name: ... for run in runs}                  # run.config, run.directory, run.observer()
            return Report({"mine": 3.0}, arrays={"counts": ...}, figures={"": draw(counts)})

To add one, write a subclass and an ``AnalysisChoice`` that names it; the command line finds it.
"""

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch

from megavar import storage
from megavar.analysis.observation import Observer
from megavar.config.analyses.base import AnalysisChoice
from megavar.config.root import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

C = TypeVar("C", bound=AnalysisChoice)


@dataclass(frozen=True)
class Subject:
    """A run to look at."""

    config: Config
    device: torch.device
    label: str = ""
    """What pictures call it, where that is not the run's name."""

    @property
    def name(self) -> str:
        """In pictures and results."""
        return self.label or self.config.run.name

    @property
    def directory(self) -> Path:
        """The run's."""
        return Path(self.config.run.path)

    def observer(self, checkpoint: Path | None = None, *, drop_labels: bool = True) -> Observer:
        """The generator with the weights of a checkpoint (default: the newest), to be shown images."""
        return Observer(self.config, self.device, checkpoint or self.directory, drop_labels=drop_labels)


@dataclass(frozen=True)
class Report:
    """What an analysis found."""

    metrics: Mapping[str, float]
    """Of the first run: what tables may name as ``KIND/NAME``."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """All numbers, by run: plain JSON values."""
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Data behind the pictures."""
    figures: Mapping[str, "Figure"] = field(default_factory=dict)
    """Pictures by the end of their name; ``""`` is the main one."""
    text: str = ""
    """For the terminal."""


class Analysis(ABC, Generic[C]):
    """A look at one or several runs. Built by ``Analysis(choice)``."""

    def __init__(self, choice: C) -> None:
        self.choice = choice

    @abstractmethod
    def look(self, runs: Sequence[Subject]) -> Report:
        """Compute.

        Raises:
            ConfigError: the runs have nothing to look at (no experts, no scales).
        """


def write(report: Report, choice: AnalysisChoice, runs: Sequence[Subject], directory: Path) -> list[Path]:
    """Write ``KIND.json``, ``KIND.npz`` and ``KIND*.png`` into ``directory``; return their paths."""
    kind = choice.tag()
    described = {
        "analysis": choice.model_dump(mode="json"),
        "runs": {run.name: str(run.directory) for run in runs},
        "metrics": dict(report.metrics),
        "values": dict(report.values),
    }
    paths = [directory / f"{kind}.json"]
    storage.write_json_atomic(paths[0], json.loads(json.dumps(described)))
    if report.arrays:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **dict(report.arrays))
        paths.append(directory / f"{kind}.npz")
        storage.write_bytes_atomic(paths[-1], buffer.getvalue())
    for ending, figure in report.figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
        paths.append(directory / f"{kind}{ending}.png")
        storage.write_bytes_atomic(paths[-1], buffer.getvalue())
    return paths
