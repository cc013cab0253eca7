"""What a suite is: which images a generator is asked for, and how they are scored.

To add one, write a subclass of :class:`Suite` and a ``SuiteChoice`` that names it
(``evaluation: {suite: {name: ...}}``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from megavar.conditions import Conditions
from megavar.config.data import DataConfig
from megavar.config.suites.base import SuiteChoice
from megavar.evaluation.images import ImageSet
from megavar.evaluation.table import Metric
from megavar.parallel.environment import Environment

C = TypeVar("C", bound=SuiteChoice)


@dataclass(frozen=True)
class Scores:
    """What a suite found."""

    metrics: dict[str, float]
    table: tuple[Metric, ...]
    """Directions and thresholds for printing; empty prints every metric."""
    extractor: dict[str, Any] = field(default_factory=dict)
    """Name and sha256 of the network behind the numbers."""
    reference: dict[str, Any] = field(default_factory=dict)
    """What the images were compared with."""
    notes: list[str] = field(default_factory=list)


class Suite(ABC, Generic[C]):
    """A set of metrics for a generator. Built by ``Suite(choice, data)``, which reads no files."""

    untrained_beside: bool = True
    """Whether the initial weights are sampled and scored, too, for a row of the table."""
    images_kept: int | None = None
    """Images worth keeping beside the tokens; None: all."""

    def __init__(self, choice: C, data: DataConfig) -> None:
        self.choice = choice
        self.data = data

    @property
    def label(self) -> str:
        """The name in result files, for example ``digits`` or ``adm/torch-fidelity``."""
        return self.choice.name

    @abstractmethod
    def check(self) -> None:
        """Refuse settings that do not fit the data, and files that are not there, before anything is trained or drawn.

        Raises:
            ConfigError: with the suites that do fit.
            CheckpointError, DataError: files are missing or of another kind.
        """

    def conditions(self) -> Conditions | None:
        """What images are asked for; None: whatever the generator draws (classes in turn, captions of the data)."""
        return None

    def take_features(self, images: ImageSet, place: Environment, work_directory: Path) -> None:
        """What all ranks do for a score, perhaps while ``images`` are drawn, as reading draws them. Collective.

        Results that :meth:`score` needs go into ``work_directory``. Nothing by default: a suite that looks at all
        images together does so in :meth:`score`.
        """

    @abstractmethod
    def score(self, images: ImageSet, device: torch.device, work_directory: Path) -> Scores:
        """Score ``images`` after :meth:`take_features`. On one rank; the others need not wait for it."""

    def baselines(self, count: int) -> dict[str, dict[str, float]]:
        """Scores of samplers that need no network, ``count`` images each, for the table beside the model."""
        return {}

    def ceiling(self, reconstruct: Callable[[Tensor], Tensor]) -> dict[str, dict[str, float]]:
        """Scores of true images that went through the tokenizer, for the table; nothing by default.

        Args:
            reconstruct: uint8 [B, 3, S, S] on the CPU to the same.
        """
        return {}
