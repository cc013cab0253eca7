"""State dicts in what training scripts save: inside their checkpoints, and under the names that wrappers give.

VAR's scripts save ``{"trainer": {"var_wo_ddp": ..., "vae_local": ...}, "args": ...}``, others ``{"model": ...}`` or
``{"state_dict": ...}``; data parallelism puts ``module.`` before every name, ``torch.compile`` puts ``_orig_mod.``
somewhere into them. None of it says anything about the weights.
"""

from collections.abc import Mapping

from torch import Tensor

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes of wrappers, wherever they stand in a name."""
_PREFIX = "module."
_DEPTH = 4


def state_dicts(content: object) -> dict[str, dict[str, Tensor]]:
    """Every plain state dict (names to tensors) in ``content`` by its place: ``trainer.var_wo_ddp``, "" for the whole.

    The state of an optimizer is none: it goes by numbers.
    """
    found: dict[str, dict[str, Tensor]] = {}
    _collect(content, "", _DEPTH, found)
    return found


def _collect(content: object, place: str, depth: int, found: dict[str, dict[str, Tensor]]) -> None:
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        return
    if all(isinstance(value, Tensor) for value in content.values()):
        if content or not place:
            found[place] = dict(content)
    elif depth:
        for name, value in content.items():
            _collect(value, f"{place}.{name}" if place else name, depth - 1, found)


def without_wrappers(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict under the names of the model itself, and what was taken out of them."""
    renamed = {".".join(part for part in name.split(".") if part not in _WRAPPERS): name for name in state}
    removed = [f"{wrapper}." for wrapper in _WRAPPERS if any(wrapper in name.split(".") for name in state)]
    while renamed and all(name.startswith(_PREFIX) for name in renamed):
        renamed = {name.removeprefix(_PREFIX): original for name, original in renamed.items()}
        removed.append(_PREFIX)
    if len(renamed) != len(state) or not removed:  # two names would become one
        return dict(state), ()
    return {name: state[original] for name, original in renamed.items()}, tuple(dict.fromkeys(removed))
