"""The benchmark ``mme``."""

from typing import ClassVar, Literal

from megavar.config.base import PathText
from megavar.config.benchmarks.base import BenchmarkChoice


class MMEBenchmark(BenchmarkChoice):
    """MME: a pair of yes/no questions for every image. ``mme_p`` is its perception score, at most 2000."""

    implementation: ClassVar[str] = "megavar.evaluation.understanding.mme:MME"

    name: Literal["mme"] = "mme"
    path: PathText
    """VLMEvalKit's ``MME.tsv``, or the released folder ``MME_Benchmark_release_version``."""
