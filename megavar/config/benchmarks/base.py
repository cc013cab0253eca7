"""The kind of all benchmarks of understanding: questions about images, and how answers are scored."""

from typing import ClassVar

from megavar.config.base import PathText
from megavar.config.choice import Choice


class BenchmarkChoice(Choice):
    """A benchmark; :class:`megavar.evaluation.understanding.questions.Benchmark` is what it configures."""

    package: ClassVar[str] = "megavar.config.benchmarks"

    name: str
    """Which one."""
    path: PathText
    """Its published files, on this machine."""
