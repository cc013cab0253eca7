"""What a DeepSpeed JSON file may say: read in DeepSpeed's own dialect, checked more strictly than DeepSpeed does.

DeepSpeed reads hjson (comments, trailing commas), takes keys that begin with ``_`` for comments, and the JSON files of
Hugging Face leave values to the trainer by saying ``"auto"``. All of that is read here. But DeepSpeed passes over
misspelled and repeated keys, takes strings for truth values, and crashes on some of what it accepts: all problems of a
file are reported at once, each with its key.
"""

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import hjson
from pydantic import BaseModel, ValidationError

from megavar.errors import ConfigError
from megavar.parallel.deepspeed_backend import import_deepspeed

AUTO = "auto"
_NUMBER = (int, float)
_DTYPES = ("fp32", "fp16", "bf16")
# Top-level keys of DeepSpeed 0.19 that have a meaning under this trainer (deepspeed/runtime/config.py), with the types
# of their values. None: deepspeed's own models check the section.
_SCALARS: dict[str, Any] = {
    "train_batch_size": int, "train_micro_batch_size_per_gpu": int, "gradient_accumulation_steps": int,
    "gradient_clipping": _NUMBER, "managed_gradient_accumulation": bool, "communication_data_type": _DTYPES,
    "seq_parallel_communication_data_type": _DTYPES, "prescale_gradients": bool, "gradient_predivide_factor": _NUMBER,
    "disable_allgather": bool, "steps_per_print": int, "wall_clock_breakdown": bool, "memory_breakdown": bool,
    "dump_state": bool, "log_level": str, "zero_allow_untested_optimizer": bool, "zero_force_ds_cpu_optimizer": bool,
}  # fmt: skip
_SECTIONS: dict[str, dict[str, Any]] = {
    "comms_logger": {"enabled": bool, "prof_all": bool, "prof_ops": list, "verbose": bool, "debug": bool},
    "flops_profiler": {
        "enabled": bool, "recompute_fwd_factor": _NUMBER, "profile_step": int, "module_depth": int, "top_modules": int,
        "detailed": bool, "output_file": str,
    },
    "aio": {
        "block_size": int, "queue_depth": int, "intra_op_parallelism": int, "single_submit": bool,
        "overlap_events": bool, "use_gds": bool,
    },
    "timers": {"throughput": {"enabled": bool, "synchronized": bool}},
    "data_types": {"grad_accum_dtype": _DTYPES},
}  # fmt: skip
_MODELS = ("zero_optimization", "bf16")
_DECIDED_ELSEWHERE = {
    "optimizer": "the `optimizer` section of the YAML decides it",
    "scheduler": "`optimizer.schedule` in the YAML decides it",
    "fp16": "only bf16 and fp32 are offered: set `train.precision`",
    "amp": "only bf16 and fp32 are offered: set `train.precision`",
    "torch_autocast": "`train.precision` in the YAML decides it",
    "pipeline": "`parallel.pipeline` in the YAML decides it",
    "tensor_parallel": "`parallel.tensor` in the YAML decides it",
    "expert_parallel": "`parallel.expert` in the YAML decides it",
    "activation_checkpointing": "`parallel.recompute` in the YAML decides it",
    "checkpoint": "`train.checkpoint` in the YAML decides it",
    "tensorboard": "the `logging` section of the YAML decides it",
    "wandb": "`logging.wandb` in the YAML decides it",
    "csv_monitor": "`metrics.jsonl` is always written",
    "comet": "the `logging` section of the YAML decides it",
}
_NOT_OFFERED = {
    "zero_optimization.zenflow": None,
    "zero_optimization.stage3_module_granularity_threshold": 0,
    "zero_optimization.module_granularity_threshold": 0,
    "zero_optimization.offload_optimizer.ratio": 1,
    "zero_optimization.offload_optimizer.super_offload": False,
}
"""Keys that this trainer does not work with, and the only value that they may have."""


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file as DeepSpeed reads it.

    Raises:
        ConfigError: it is missing, is not one JSON object, or has a key twice.
    """
    twice: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice.extend(sorted({key for key in keys if keys.count(key) > 1}))
        return dict(pairs)

    try:
        text = path.read_bytes().decode("utf-8-sig")
        try:
            content = json.loads(text, object_pairs_hook=collect)
        except ValueError:  # hjson alone would take the rest of a line for a text where a quote or a value is wrong
            twice.clear()
            content = hjson.loads(text, object_pairs_hook=collect)
    except FileNotFoundError:
        beside = ", ".join(sorted(file.name for file in path.parent.glob("*.json"))) or "none"
        raise ConfigError(f"deepspeed: {path} does not exist. JSON files beside it: {beside}.") from None
    except OSError as error:
        raise ConfigError(f"deepspeed: {path} cannot be read: {error.strerror}. Name a JSON file.") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"deepspeed: {path} is not valid JSON: {reason}. Correct the file.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"deepspeed: {path} must hold one JSON object, not a {type(content).__name__}.")
    if twice:
        raise ConfigError(f"deepspeed: {path} has {' and '.join(map(repr, twice))} twice. Keep one of them.")
    return content


def checked(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The content of a file without comments, ``"auto"`` and what is switched off.

    Raises:
        ConfigError: with all problems of the file: the key, the nearest valid key and the remedy.
    """
    given = {key: value for key, value in content.items() if not key.startswith("_")}
    problems = list(_problems(given))
    if problems:
        raise ConfigError(f"{where}: {'; '.join(problems)}.")
    kept = {key: value for key, value in given.items() if key not in _DECIDED_ELSEWHERE and value is not None}
    return _without_auto(kept)


def _without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if not key.startswith("_") and value != AUTO
    }


def _problems(content: Mapping[str, Any]) -> Iterator[str]:
    for key, value in content.items():
        if key in _DECIDED_ELSEWHERE:
            if not _is_inert(value):
                yield f"remove {key!r}; {_DECIDED_ELSEWHERE[key]}"
        elif key in _SCALARS:
            if value is not None:
                yield from _wrong_type(key, value, _SCALARS[key])
        elif key in _SECTIONS:
            if value is not None:
                yield from _wrong_type(key, value, _SECTIONS[key])
        elif key in _MODELS:
            yield from _wrong_in_model(key, value)
        else:
            known = (*_MODELS, *_SECTIONS, *_SCALARS)
            yield f"unknown key {key!r}{_suggestion(key, known)}: remove it, this trainer does not offer it"
    zero = content.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    profiler = content.get("flops_profiler")
    if isinstance(profiler, dict) and profiler.get("enabled") is True and stage in (0, 1):
        yield "flops_profiler.enabled works with ZeRO stages 2 and 3 only: `logging.profile` in the YAML works with all"


def _is_inert(value: Any) -> bool:
    """Whether a section asks for nothing: switched off, or every value left to the trainer."""
    if not isinstance(value, dict):
        return value is None or value is False
    if "enabled" in value:
        return value["enabled"] in (False, AUTO)
    named = {key: item for key, item in value.items() if key != "type"}
    leaves = [item for part in named.values() for item in (part.values() if isinstance(part, dict) else (part,))]
    return all(leaf is None or leaf is False or leaf == AUTO for leaf in leaves) and bool(named)


def _wrong_type(key: str, value: Any, wanted: Any) -> Iterator[str]:
    """What is wrong with a value of a key, by our own table."""
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            yield f"{key} must be an object, not {value!r}"
            return
        for name, item in value.items():
            if name in wanted:
                yield from _wrong_type(f"{key}.{name}", item, wanted[name])
            elif not name.startswith("_"):
                yield f"{key}.{name} is not valid{_suggestion(name, tuple(wanted))}"
    elif value is None or value == AUTO:
        return
    elif isinstance(wanted, tuple) and isinstance(wanted[0], str):
        if value not in wanted:
            yield f"{key} is {value!r}, but must be one of {', '.join(wanted)}"
    elif not _is_a(value, wanted):
        yield f"{key} is {value!r}, but must be {_in_words(wanted)}"


def _is_a(value: Any, wanted: Any) -> bool:
    if isinstance(value, bool) or wanted is bool:
        return isinstance(value, bool) and wanted is bool
    if wanted is int:
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())  # 5e8
    return isinstance(value, wanted) and not (isinstance(value, float) and not math.isfinite(value))


def _in_words(wanted: Any) -> str:
    words = {bool: "true or false", int: "a whole number", str: "a text", list: "a list"}
    return words.get(wanted, "a number") if isinstance(wanted, type) else "a number"


def _wrong_in_model(name: str, section: Any) -> Iterator[str]:
    """What deepspeed's own model of a section refuses, and what it should."""
    if not isinstance(section, dict):
        yield f"{name} must be an object, not {section!r}"
        return
    model = _section_models()[name]
    stripped = _without_auto(section)
    if name == "zero_optimization" and type(section.get("stage", 0)) is not int:
        stripped.pop("stage", None)
        yield f"zero_optimization.stage is {section['stage']!r}, but nothing else decides it: write 0, 1, 2 or 3"
    found = dict(_wrong_fields(name, stripped, model))
    try:
        model(**stripped)
    except ValidationError as error:
        for problem in error.errors():
            key = ".".join((name, *map(str, problem["loc"])))
            if problem["type"] == "extra_forbidden":
                found[key] = f"is not valid{_suggestion(str(problem['loc'][-1]), tuple(_annotations(model)))}"
            else:
                found.setdefault(key, f"is not valid: {problem['msg']}")
    yield from (f"{key} {text}" for key, text in found.items())


def _annotations(model: type[BaseModel]) -> dict[str, Any]:
    found = {name: field.annotation for name, field in model.model_fields.items()}
    return found | {field.alias: field.annotation for field in model.model_fields.values() if field.alias}


def _wrong_fields(where: str, section: Mapping[str, Any], model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """(key, problem) of types that pydantic would convert ("true" for true), and of what does not work here."""
    annotations = _annotations(model)
    for key, value in section.items():
        annotation = annotations.get(key)
        kinds = [kind for kind in (annotation, *get_args(annotation)) if kind in (bool, int, float)]
        if kinds and value is not None and not any(_is_a(value, _NUMBER if k is float else k) for k in kinds):
            yield f"{where}.{key}", f"is {value!r}, but must be {_in_words(kinds[0])}"
        if f"{where}.{key}" in _NOT_OFFERED and value != _NOT_OFFERED[f"{where}.{key}"]:
            yield f"{where}.{key}", "is not offered by this trainer: remove it"
        inner = next((kind for kind in get_args(annotation) if _is_model(kind)), None)
        if inner is not None and isinstance(value, dict):
            yield from _wrong_fields(f"{where}.{key}", value, inner)
            if value.get("device") == "nvme" and not Path(str(value.get("nvme_path"))).is_dir():
                text = f"is {value.get('nvme_path')!r}, which is no folder of this machine: name one on a local disk"
                yield f"{where}.{key}.nvme_path", text


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _section_models() -> dict[str, Any]:
    import_deepspeed()
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config}


def _suggestion(key: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
