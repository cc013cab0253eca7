"""Speed of drawing against a score (SAR Fig. 1b)."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.analyses.base import AnalysisChoice


class ThroughputAnalysis(AnalysisChoice):
    """Images per second on this device beside the run's score and its parameters."""

    implementation: ClassVar[str] = "megavar.analysis.kinds.throughput:Throughput"

    kind: Literal["throughput"] = "throughput"
    metric: str = "fid"
    """Score that is drawn: its name, or what stands before ``@``."""
    batch: int = Field(64, ge=1)
    """Images drawn together. The paper does not say."""
    repeats: int = Field(3, ge=1)
    """Timed draws, after one that is not; the median counts."""
