"""The benchmark ``mmbench``."""

from typing import ClassVar, Literal

from megavar.config.base import PathText
from megavar.config.benchmarks.base import BenchmarkChoice


class MMBenchBenchmark(BenchmarkChoice):
    """MMBench: choices that count as right only if they are right in every rotation of the options."""

    implementation: ClassVar[str] = "megavar.evaluation.understanding.mmbench:MMBench"

    name: Literal["mmbench"] = "mmbench"
    path: PathText
    """A table with answers: ``MMBench_DEV_EN.tsv`` (VLMEvalKit) or ``mmbench_dev_20230712.tsv``. Rotations are those of
    the table; a table without any is rotated here."""
