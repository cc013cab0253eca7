"""The benchmark ``textvqa``."""

from typing import ClassVar, Literal

from megavar.config.base import PathText
from megavar.config.benchmarks.base import BenchmarkChoice


class TextVQABenchmark(BenchmarkChoice):
    """TextVQA: open questions about writing in images, with ten people's answers each."""

    implementation: ClassVar[str] = "megavar.evaluation.understanding.textvqa:TextVQA"

    name: Literal["textvqa"] = "textvqa"
    path: PathText
    """The published ``TextVQA_0.5.1_val.json``; the folder ``train_images`` lies beside it."""
