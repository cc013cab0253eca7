"""Predicts what a run costs before it is submitted: parameters, FLOPs, memory, time, and layouts that fit.

Attributes are loaded on first use, so that FLOPs per image are at hand without importing DeepSpeed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megavar.planning.efficiency import flops_per_image
    from megavar.planning.hardware import peak_of_device
    from megavar.planning.plan import Plan, plan
    from megavar.planning.report import format_plan

__all__ = ["Plan", "flops_per_image", "format_plan", "peak_of_device", "plan"]

_HOMES = {
    "Plan": "plan",
    "flops_per_image": "efficiency",
    "format_plan": "report",
    "peak_of_device": "hardware",
    "plan": "plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(name)
    import importlib

    return getattr(importlib.import_module(f"megavar.planning.{_HOMES[name]}"), name)
