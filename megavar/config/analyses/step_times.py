"""How long every step of decoding takes (reAR Fig. 5: sampling with a cache of keys and values)."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.analyses.base import AnalysisChoice


class StepTimesAnalysis(AnalysisChoice):
    """Seconds of every call of the generator while images are drawn here and now."""

    implementation: ClassVar[str] = "megavar.analysis.kinds.step_times:StepTimes"

    kind: Literal["step_times"] = "step_times"
    batch: int = Field(128, ge=1)
    """Images drawn together (the paper: 128)."""
    repeats: int = Field(3, ge=1)
    """Timed draws, after one that is not; the median counts."""
    steps: tuple[int, ...] = (16, 240)
    """Steps, from 1, whose times are named in the results; those that do not exist are left out."""
