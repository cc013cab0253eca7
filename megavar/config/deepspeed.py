"""DeepSpeed JSON: read, validated (``deepspeed_json.py``), and completed with what the run decides.

DeepSpeed clips gradients at 1.0 when nothing was asked: here clipping is always written out, and a value that
contradicts the run's YAML is an error that names both places.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavar.config.deepspeed_json import checked, read_json
from megavar.config.parallel import ParallelConfig
from megavar.errors import ConfigError
from megavar.parallel.rules import check_zero
from megavar.paths import found


@dataclass(frozen=True)
class DeepSpeedPlan:
    """What goes to ``deepspeed.initialize``, and what was changed on the way."""

    json: dict[str, Any]
    """The completed configuration."""
    stage: int
    """The ZeRO stage that runs."""
    clip_norm: float
    """Largest global gradient norm; 0 does not clip. The JSON says 0 for stage 0, where the engine clips itself."""
    notes: tuple[str, ...]
    """Changes that the person who wrote the JSON should know of."""


def load_deepspeed_json(path: Path) -> dict[str, Any]:
    """Read and validate a DeepSpeed JSON file.

    Raises:
        ConfigError: the file is missing, is not a JSON object, or holds keys or values that are not offered.
    """
    return validate_deepspeed(read_json(found(path)), str(path))


def validate_deepspeed(content: dict[str, Any], where: str) -> dict[str, Any]:
    """Check all keys of a DeepSpeed configuration; ``where`` names it in errors.

    Returns:
        What it asks for: without comments, ``"auto"`` and what is switched off.

    Raises:
        ConfigError: with all problems: the keys, the nearest valid keys and the remedies.
    """
    return checked(content, where)


def complete_deepspeed(
    content: dict[str, Any],
    *,
    where: str,
    parallel: ParallelConfig,
    data_parallel_size: int,
    global_batch_size: int,
    micro_batch_size: int,
    precision: str,
    gradient_clipping: float,
    has_experts: bool = False,
    device_type: str = "cpu",
) -> DeepSpeedPlan:
    """Add to a validated configuration what the run decides.

    Args:
        content: the JSON file's content.
        where: its name, for errors.
        global_batch_size: ``train.global_batch_size``.
        micro_batch_size: samples per rank and micro-batch.
        precision: ``train.precision``.
        gradient_clipping: ``optimizer.gradient_clipping``.
        has_experts: whether the module has experts.

    Raises:
        ConfigError: JSON and YAML contradict each other, or the layout does not work with this ZeRO stage.
    """
    result = copy.deepcopy(content)
    zero = result.setdefault("zero_optimization", {})
    asked = int(zero.get("stage", 0))
    _check_layout(where, asked, zero, parallel)
    accumulation = global_batch_size // (micro_batch_size * data_parallel_size)
    decided = {
        "train_batch_size": (global_batch_size, "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (accumulation, "what train.global_batch_size and train.micro_batch_size imply,"),
        "gradient_clipping": (gradient_clipping, "optimizer.gradient_clipping"),
    }
    for key, (value, place) in decided.items():
        given = result.get(key, "auto")
        if given != "auto" and given != value:
            raise ConfigError(
                f"{where} says {key}={given}, but {place} in the YAML is {value}. Remove {key} from the JSON (the YAML "
                f"decides it) or make them equal."
            )
    bf16 = result.setdefault("bf16", {})
    if bf16.get("enabled", "auto") not in ("auto", precision == "bf16"):
        raise ConfigError(
            f"{where} says bf16.enabled={bf16['enabled']}, but train.precision in the YAML is {precision!r}. Remove it "
            f"from the JSON or make them agree."
        )
    bf16["enabled"] = precision == "bf16"
    stage, notes = _effective_stage(asked, parallel, precision, has_experts)
    profiled = result.get("flops_profiler", {}).get("enabled", False)  # offered with stages 2 and 3
    if not profiled and _shards_nothing(stage, zero, parallel, precision, data_parallel_size):
        stage = 0
    _check_accumulation_type(where, result, stage, precision)
    zero["stage"] = stage
    if device_type == "cpu" or stage <= 1:
        zero["overlap_comm"] = False  # needs streams; with externally driven micro-batches only stages 2 and 3 offer it
    result.update(
        # DeepSpeed sees one "micro-batch" per step: Megatron-core's schedules accumulate.
        train_batch_size=micro_batch_size * data_parallel_size,
        train_micro_batch_size_per_gpu=micro_batch_size,
        gradient_accumulation_steps=1,
        managed_gradient_accumulation=False,
        gradient_clipping=gradient_clipping if stage > 0 else 0.0,
        # torch's fused AdamW on CPU tensors needs no JIT compilation, unlike DeepSpeedCPUAdam.
        zero_force_ds_cpu_optimizer=False,
    )
    result.setdefault("steps_per_print", 2**62)
    return DeepSpeedPlan(json=result, stage=stage, clip_norm=gradient_clipping, notes=tuple(notes))


def _check_layout(where: str, stage: int, zero: dict[str, Any], parallel: ParallelConfig) -> None:
    try:
        check_zero(parallel, stage)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    offload = {name for name in ("offload_optimizer", "offload_param") if _is_offloaded(zero.get(name))}
    if offload and stage == 0:
        raise ConfigError(f"{where}: {' and '.join(sorted(offload))} needs ZeRO stage 1 or higher; stage is 0.")
    if "offload_param" in offload and stage != 3:
        raise ConfigError(f"{where}: offload_param needs ZeRO stage 3; stage is {stage}. Remove it or set stage 3.")
    if zero.get("overlap_comm") and stage == 1:
        raise ConfigError(f"{where}: overlap_comm is offered with ZeRO stages 2 and 3 only; stage is 1. Remove it.")


def _is_offloaded(section: Any) -> bool:
    return isinstance(section, dict) and section.get("device", "none") != "none"


def _effective_stage(asked: int, parallel: ParallelConfig, precision: str, has_experts: bool) -> tuple[int, list[str]]:
    """Stage 0 runs as stage 1 where DeepSpeed's stage 0 would clip by a wrong gradient norm."""
    reasons = {
        "bf16": precision == "bf16",
        "pipeline stages": parallel.pipeline > 1,
        "experts with expert or tensor parallelism": has_experts and (parallel.expert > 1 or parallel.tensor > 1),
    }
    present = [reason for reason, holds in reasons.items() if holds]
    if asked > 0 or not present:
        return asked, []
    return 1, [f"ZeRO stage 0 runs as stage 1: with {' and '.join(present)} DeepSpeed's stage 0 computes a wrong norm "
               f"for clipping. The mathematics is the same."]  # fmt: skip


def _shards_nothing(
    stage: int, zero: dict[str, Any], parallel: ParallelConfig, precision: str, data_parallel_size: int
) -> bool:
    """Whether one process has its float32 weights to itself: stage 0 computes the same update in place.

    DeepSpeed's stages 1 and 2 would flatten all gradients, step a second copy of all weights and copy it back: a tenth
    of the step of a small model on a CPU. In bf16 that copy is the float32 master copy, which is needed.
    """
    alone = data_parallel_size == parallel.tensor == parallel.pipeline == parallel.expert == 1
    offloaded = any(_is_offloaded(zero.get(name)) for name in ("offload_optimizer", "offload_param"))
    return stage in (1, 2) and alone and precision == "fp32" and not offloaded


def _check_accumulation_type(where: str, content: dict[str, Any], stage: int, precision: str) -> None:
    dtype = content.get("data_types", {}).get("grad_accum_dtype")
    if dtype not in (None, "auto", "fp32") or (dtype == "fp32" and precision == "bf16" and stage <= 1):
        raise ConfigError(
            f"{where}: data_types.grad_accum_dtype={dtype!r} is not offered with ZeRO stage {stage} and {precision}. "
            f'Remove it, or use stage 2 or 3 with "fp32".'
        )
