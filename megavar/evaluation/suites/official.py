"""What suites have in common whose scorers run elsewhere, on folders that are written here."""

from abc import abstractmethod
from pathlib import Path
from typing import TypeVar

import torch

from megavar.conditions import Conditions, PromptConditions
from megavar.config.suites.base import SuiteChoice
from megavar.evaluation.base import Scores, Suite
from megavar.evaluation.images import ImageSet
from megavar.evaluation.official.base import OfficialFolder

C = TypeVar("C", bound=SuiteChoice)


class OfficialSuite(Suite[C]):
    """Images of a benchmark's prompts in the folder that its official scorer reads; no metrics of our own."""

    untrained_beside = False

    @abstractmethod
    def folder(self) -> OfficialFolder:
        """The folder, with its prompts."""

    def check(self) -> None:
        """The prompts must be there."""
        self.folder()

    def conditions(self) -> Conditions:
        """Every prompt as often as the scorer expects."""
        folder = self.folder()
        return PromptConditions(self.choice.name, folder.texts(), folder.per_prompt)

    def score(self, images: ImageSet, device: torch.device, work_directory: Path) -> Scores:
        """Write the folder and check it; the notes say how to score it."""
        folder = self.folder()
        root = work_directory / folder.name
        notes = folder.emit(root, images)
        return Scores({}, (), {"name": f"the official scorer of {folder.name}, to be run on {root}"}, notes=notes)
