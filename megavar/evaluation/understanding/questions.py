"""What a benchmark of understanding is: questions about images, and what answers to all of them score.

To add one, write a subclass of :class:`Benchmark` and a ``BenchmarkChoice`` that names it.
"""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from PIL import Image

from megavar.config.benchmarks.base import BenchmarkChoice
from megavar.errors import DataError
from megavar.evaluation.table import Metric

C = TypeVar("C", bound=BenchmarkChoice)


@dataclass(frozen=True)
class Question:
    """One image, one text, one answer."""

    text: str
    """What stands after the image, wording of the benchmark included."""
    image: Callable[[], bytes]
    """The encoded image."""
    options: tuple[str, ...] = ()
    """Answers that are possible, as a model would write them; none: the question is open."""

    def picture(self) -> Image.Image:
        """The image, RGB.

        Raises:
            DataError: it cannot be decoded.
        """
        try:
            return Image.open(io.BytesIO(self.image())).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"The image of the question {self.text[:80]!r} cannot be decoded ({error}).") from error


class Benchmark(ABC, Generic[C]):
    """A benchmark that was read. Built by ``Benchmark(choice, prompts)``, which reads its files but no image of them.

    Raises:
        DataError: files are missing, or are not those of the benchmark.
    """

    longest: ClassVar[int]
    """Tokens of an answer at most."""
    table: ClassVar[tuple[Metric, ...]]
    """What is printed; every metric goes into the result file."""

    def __init__(self, choice: C, prompts: str) -> None:
        self.choice, self.prompts = choice, prompts
        self.questions: tuple[Question, ...] = tuple(self.read(Path(choice.path)))
        if not self.questions:
            raise DataError(f"{choice.path} holds no questions: name the published files of {choice.name}.")

    @abstractmethod
    def read(self, path: Path) -> Sequence[Question]:
        """The questions, in the order of the files."""

    @abstractmethod
    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """What ``answers``, one for each question as the model wrote it, are worth."""

    @property
    def identity(self) -> dict[str, Any]:
        """What is asked, its images left aside: plain JSON values."""
        asked = json.dumps([[question.text, question.options] for question in self.questions])
        return {
            "name": self.choice.name,
            "file": Path(self.choice.path).name,
            "questions": len(self.questions),
            "sha256": hashlib.sha256(asked.encode()).hexdigest(),
        }


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return sum(values) / len(values) if values else float("nan")
