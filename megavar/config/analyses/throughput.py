"""How fast runs draw (reAR Fig. 5)."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.analyses.base import AnalysisChoice


class ThroughputAnalysis(AnalysisChoice):
    """Images per second here and now, the time of every step of decoding, and the score beside it."""

    implementation: ClassVar[str] = "megavar.analysis.kinds.throughput:Throughput"

    kind: Literal["throughput"] = "throughput"
    batch: int = Field(128, ge=1)
    """Images drawn together."""
    repeats: int = Field(3, ge=1)
    """Timed draws, after one that is not; medians count."""
    steps: tuple[int, ...] = (16, 240)
    """Steps of decoding, from 1, whose times are named in the results; those that do not exist are left out."""
    metric: str = "fid"
    """Score that is drawn against images per second, where runs are scored: its name, or what stands before ``@``."""
