"""Learning rate and weight decay as pure functions of the step, so that a resumed run needs no scheduler state."""

import math

from megavar.config.optimizer import (
    ConstantSchedule,
    CosineSchedule,
    Lin0Schedule,
    OptimizerConfig,
    ScheduleConfig,
    VarCosineSchedule,
)
from megavar.errors import ConfigError

_VAR_BASE_LR = 1e-4  # VAR's tblr (utils/arg_util.py)
_VAR_WARMUP = 1 / 50  # VAR's warm-up: ep / 50 epochs


def peak_learning_rate(config: OptimizerConfig, global_batch_size: int, module: str = "") -> float:
    """The peak: ``lr`` as it is, else VAR's rule ``base_lr * global_batch_size / 256`` (arg_util.py:260)."""
    override = config.modules.get(module)
    if override is not None and override.lr is not None:
        return override.lr
    if config.lr is not None:
        return config.lr
    return (config.base_lr if config.base_lr is not None else _VAR_BASE_LR) * global_batch_size / 256


def warmup_steps(schedule: ScheduleConfig, steps: int, steps_per_epoch: float) -> int:
    """Length of the warm-up in steps of a run of ``steps`` steps."""
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    if schedule.warmup_epochs is not None:
        return round(schedule.warmup_epochs * steps_per_epoch)
    if schedule.warmup_fraction is not None:
        return round(schedule.warmup_fraction * steps)
    return round(_VAR_WARMUP * steps) if isinstance(schedule, Lin0Schedule | VarCosineSchedule) else 0


def check_warmup(schedule: ScheduleConfig, steps: int, steps_per_epoch: float) -> None:
    """Refuse a warm-up that is longer than the run of ``steps`` steps.

    Raises:
        ConfigError: it is.
    """
    warmup = warmup_steps(schedule, steps, steps_per_epoch)
    if warmup > steps:
        raise ConfigError(
            f"optimizer.schedule warms up for {warmup} steps, but the run has {steps} steps: the peak learning rate "
            f"would never be reached. Shorten the warm-up, or lengthen the run (train.steps or train.epochs)."
        )


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, steps: int, steps_per_epoch: float) -> float:
    """The learning rate with which step ``step`` (from 0) of a run of ``steps`` steps is taken."""
    warmup = warmup_steps(schedule, steps, steps_per_epoch)
    match schedule:
        case ConstantSchedule():
            return peak * (min(1.0, step / warmup) if warmup else 1.0)
        case CosineSchedule():
            if step < warmup:
                return peak * step / warmup
            progress = min(1.0, (step - warmup) / max(1, steps - warmup))
            return schedule.final_lr + (peak - schedule.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        case Lin0Schedule() | VarCosineSchedule():
            return peak * _var_factor(schedule, step, steps, warmup)


def _var_factor(schedule: Lin0Schedule | VarCosineSchedule, step: int, steps: int, warmup: int) -> float:
    """VAR's lr_control.py: the last step, ``steps - 1``, is taken with exactly ``final_ratio``."""
    if step < warmup:
        return schedule.warmup_ratio + (1 - schedule.warmup_ratio) * step / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    if isinstance(schedule, VarCosineSchedule):
        share = 0.5 + 0.5 * math.cos(math.pi * progress)
    elif progress < schedule.flat:
        share = 1.0
    else:
        share = (1 - progress) / (1 - schedule.flat)
    return schedule.final_ratio + (1 - schedule.final_ratio) * share


def weight_decay(config: OptimizerConfig, step: int, steps: int, module: str = "") -> float:
    """The weight decay of step ``step``: half a cosine from ``weight_decay`` to ``final_weight_decay`` (VAR)."""
    override = config.modules.get(module)
    start = config.weight_decay
    if override is not None and override.weight_decay is not None:
        start = override.weight_decay
    end = config.final_weight_decay if config.final_weight_decay is not None else start
    progress = min(1.0, step / max(1, steps - 1))
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * progress))
