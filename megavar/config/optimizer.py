"""The optimizer, its learning-rate rule and its schedules."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megavar.config.base import Section


class _Warmup(Section):
    """How long the learning rate rises; give at most one of the three."""

    warmup_steps: int | None = Field(None, ge=0)
    """Length of the warm-up in steps."""
    warmup_epochs: float | None = Field(None, ge=0)
    """Length of the warm-up in epochs of the training data, fractions allowed."""
    warmup_fraction: float | None = Field(None, ge=0, lt=1)
    """Length of the warm-up as a share of the run."""

    @model_validator(mode="after")
    def _one_length(self) -> "_Warmup":
        names = ("warmup_steps", "warmup_epochs", "warmup_fraction")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other: keep one of them")
        return self


class ConstantSchedule(_Warmup):
    """The peak learning rate throughout, after an optional linear warm-up from 0."""

    name: Literal["constant"] = "constant"


class Lin0Schedule(_Warmup):
    """VAR's ``lin0``: linear warm-up, flat, linear decay (FoundationVision/VAR, utils/lr_control.py)."""

    name: Literal["lin0"] = "lin0"
    warmup_ratio: float = Field(0.005, ge=0, le=1)
    """Learning rate of step 0 over the peak. Without a warm-up length the warm-up is 1/50 of the run, VAR's rule."""
    flat: float = Field(0.05, ge=0, lt=1)
    """Share of the steps after the warm-up that stay at the peak."""
    final_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate of the last step over the peak (VAR's ``wpe``: 0.1 for d16 and d20, 0.01 for d24, d30 and d36)."""


class VarCosineSchedule(_Warmup):
    """VAR's ``cos``: linear warm-up, then half a cosine that ends exactly on the last step."""

    name: Literal["var_cosine"] = "var_cosine"
    warmup_ratio: float = Field(0.005, ge=0, le=1)
    """Learning rate of step 0 over the peak. Without a warm-up length the warm-up is 1/50 of the run, VAR's rule."""
    final_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate of the last step over the peak."""


class CosineSchedule(_Warmup):
    """Linear warm-up from 0, then half a cosine from the peak to ``final_lr`` (RAR, reAR, TiTok)."""

    name: Literal["cosine"] = "cosine"
    final_lr: float = Field(1e-5, ge=0, le=100.0)
    """Learning rate at the end of the run. RAR: 1e-5 with peak 4e-4, 62500 of 250000 steps of warm-up."""


ScheduleConfig = Annotated[
    ConstantSchedule | Lin0Schedule | VarCosineSchedule | CosineSchedule, Field(discriminator="name")
]


Beta = Annotated[float, Field(ge=0, lt=1)]
"""A decay rate of Adam: the share of an old average that a step keeps."""
LARGEST_RATE = 100.0
"""Of learning rates: beyond it there is a slip of the pen, never a training."""


class OptimizerOverrides(Section):
    """Values of one module where they differ from the others' (a discriminator's learning rate)."""

    lr: float | None = Field(None, gt=0, le=LARGEST_RATE)
    """Peak learning rate of this module."""
    weight_decay: float | None = Field(None, ge=0, le=LARGEST_RATE)
    """Weight decay of this module."""
    betas: tuple[Beta, Beta] | None = Field(None, strict=False)
    """Adam's decay rates for this module."""
    gradient_clipping: float | None = Field(None, ge=0)
    """Largest global gradient norm of this module; 0 does not clip."""


class OptimizerConfig(Section):
    """AdamW. The defaults are VAR's (train.py:117-121, arg_util.py:260-264)."""

    lr: float | None = Field(None, gt=0, le=LARGEST_RATE)
    """Peak learning rate as it is. Give this or ``base_lr``."""
    base_lr: float | None = Field(None, gt=0, le=LARGEST_RATE)
    """Peak learning rate for a global batch of 256 images; the peak is ``base_lr * train.global_batch_size / 256``.
    Without ``lr`` and ``base_lr`` it is VAR's 1e-4."""
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), strict=False)
    """Adam's decay rates."""
    epsilon: float = Field(1e-8, gt=0, lt=1)
    """Adam's epsilon."""
    weight_decay: float = Field(0.05, ge=0, le=LARGEST_RATE)
    """Weight decay of the parameters that the recipe lets decay."""
    final_weight_decay: float | None = Field(None, ge=0, le=LARGEST_RATE)
    """Weight decay at the last step, reached along half a cosine (VAR-d30: 0.08). Default: constant."""
    gradient_clipping: float = Field(2.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    schedule: ScheduleConfig = Lin0Schedule()
    """Learning rate over the run."""
    modules: dict[str, OptimizerOverrides] = Field(default_factory=dict)
    """Other values for single modules of the recipe, by module name."""

    @model_validator(mode="after")
    def _one_rate(self) -> "OptimizerConfig":
        if self.lr is not None and self.base_lr is not None:
            raise ValueError("lr and base_lr contradict each other: keep lr (the peak) or base_lr (per 256 images)")
        return self
