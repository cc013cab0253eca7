"""The benchmark ``ai2d``."""

from typing import ClassVar, Literal

from megavar.config.base import PathText
from megavar.config.benchmarks.base import BenchmarkChoice


class AI2DBenchmark(BenchmarkChoice):
    """AI2D: choices about diagrams."""

    implementation: ClassVar[str] = "megavar.evaluation.understanding.ai2d:AI2D"

    name: Literal["ai2d"] = "ai2d"
    path: PathText
    """VLMEvalKit's ``AI2D_TEST.tsv``, or ``AI2D_TEST_NO_MASK.tsv``. Results name the file."""
