"""What GenEval and DPG-Bench have in common: their scorers run elsewhere, on folders that are written here."""

from abc import abstractmethod
from pathlib import Path
from typing import TypeVar

import torch

from megavar.conditions import Conditions, PromptConditions
from megavar.config.suites.base import SuiteChoice
from megavar.evaluation import layouts
from megavar.evaluation.base import Scores, Suite
from megavar.evaluation.images import ImageSet

C = TypeVar("C", bound=SuiteChoice)


class OfficialSuite(Suite[C]):
    """Images of a benchmark's prompts in the folders that its official scorer reads; no metrics of our own."""

    untrained_beside = False
    benchmark: layouts.Suite
    """Which folders."""

    @property
    @abstractmethod
    def prompt_file(self) -> Path:
        """The user's copy of the official prompts."""

    @property
    @abstractmethod
    def per_prompt(self) -> int:
        """Images per prompt."""

    def check(self) -> None:
        """The prompts must be there."""
        layouts.read_prompts(self.benchmark, self.prompt_file)

    def conditions(self) -> Conditions:
        """Every prompt ``per_prompt`` times."""
        found = layouts.read_prompts(self.benchmark, self.prompt_file)
        texts = found.values() if isinstance(found, dict) else (prompt["prompt"] for prompt in found)
        return PromptConditions(self.choice.name, tuple(texts), self.per_prompt)

    def score(self, images: ImageSet, device: torch.device, work_directory: Path) -> Scores:
        """Write the folders and check them; the notes say how to score them."""
        root = work_directory / self.benchmark
        notes = layouts.emit(self.benchmark, root, self.prompt_file, images, per_prompt=self.per_prompt)
        return Scores({}, (), {"name": f"the official scorer of {self.benchmark}, to be run on {root}"}, notes=notes)
