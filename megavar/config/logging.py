"""What a run reports while it trains."""

from typing import Literal

from pydantic import Field

from megavar.config.base import PathText, Section


class WandbConfig(Section):
    """Weights & Biases. The run's own ``metrics.jsonl`` is complete without it."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    """``offline`` writes to the run directory and can be sent later with ``wandb sync``."""
    project: str = "megavar"
    """Project name."""
    entity: str | None = None
    """User or team; default: the one of your login."""


class ProfileConfig(Section):
    """A trace of some steps in ``profiles/``, to open in https://ui.perfetto.dev."""

    after: int = Field(10, ge=1)
    """Steps after the start (or restart) of the process before recording begins."""
    steps: int = Field(3, ge=1)
    """Steps to record."""
    ranks: tuple[int, ...] = Field((0,), strict=False)
    """Ranks that record."""
    memory: bool = False
    """Also write a snapshot of CUDA's allocator, to open in https://pytorch.org/memory_viz."""


class LoggingConfig(Section):
    """Metrics, progress and previews."""

    interval: int = Field(10, ge=1)
    """Steps between lines in ``metrics.jsonl``. Losses are averaged, not sampled, over the steps in between."""
    samples_interval: int | None = Field(None, ge=1)
    """Steps between grids of samples in ``samples/``; none by default, the end of the run draws one in any case."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """A bar on a terminal, plain lines elsewhere (``auto``), or one of them always."""
    lines_seconds: float = Field(30.0, ge=0)
    """Least time between plain progress lines."""
    calibration: PathText | None = None
    """File of ``megavar plan --calibrate`` of this kind of device. The run's metrics compare the step time and the
    memory that a plan expects with what is measured; without it, on known GPUs, with what a plan assumes."""
    profile: ProfileConfig | None = None
    """Record a trace of the trainer; none by default."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
