"""What runs cost and how fast they draw (MEPA Table 7)."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.analyses.base import AnalysisChoice


class TimesAnalysis(AnalysisChoice):
    """Seconds per drawn image here and now, minutes per epoch as the run's log has them."""

    implementation: ClassVar[str] = "megavar.analysis.kinds.times:Times"

    kind: Literal["times"] = "times"
    batch: int = Field(1, ge=1)
    """Images drawn together. The paper does not say; "inference time per image" is read as one at a time."""
    repeats: int = Field(5, ge=1)
    """Timed draws, after one that is not; the median counts."""
