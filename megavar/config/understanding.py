"""What a vision-language model still understands after its parts learned to draw (VGT Table 1)."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from megavar.config.base import PathText, Section
from megavar.config.benchmarks.base import BenchmarkChoice


class UnderstandingConfig(Section):
    """Benchmarks for the model that the run began with and for the same with what the run trained in its place.

    Computed by ``megavar evaluate CONFIG --understanding``. Models answer through transformers' own classes
    (``pip install 'megavar[vlm]'``), one question at a time.
    """

    model: PathText
    """Folder of the vision-language model in transformers' form: ``InternVL3-1B-hf``, ``Qwen2.5-VL-3B-Instruct``."""
    benchmarks: Annotated[tuple[BenchmarkChoice, ...], Field(strict=False, min_length=1)]
    """What is asked."""
    prompts: Literal["internvl", "vlmevalkit", "qwen2_vl"] = "internvl"
    """Whose wording stands around questions: InternVL's evaluation code, VLMEvalKit's for any model, or Qwen2-VL's."""
    answers: Literal["generated", "likelihood"] = "generated"
    """``generated``: greedily, and read as the benchmark does. ``likelihood``: the option of largest probability;
    questions without options are still generated."""
    tiles: PositiveInt | None = None
    """InternVL: at most so many tiles of an image, beside one of the whole of it. None: as the folder says (12);
    InternVL's scripts take 6."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and activations."""
    chunk_size: int = Field(32, ge=1)
    """Questions that a rank answers before it stores them; what is stored is not asked again."""

    @model_validator(mode="after")
    def _once_each(self) -> Self:
        names = [benchmark.name for benchmark in self.benchmarks]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"benchmarks names {repeated[0]} twice, and both would have the same scores' names. Score the second "
                f"file in a run of `megavar evaluate` of its own."
            )
        return self
