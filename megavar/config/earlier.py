"""Keys that earlier versions called otherwise: their files and runs still mean what they meant."""

from typing import Any

RENAMED = {
    "evaluation.samples": "sampling.number",
    "recipe.initial_weights": "train.initial_weights.path",  # of tokenizers
}
"""Dotted keys, and what they are called now."""


def renewed(tree: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``tree`` in which earlier names are replaced; their values win, as only the earlier key was read."""
    for old, new in RENAMED.items():
        section, key = old.split(".")
        if not isinstance(tree.get(section), dict) or key not in tree[section]:
            continue
        value = tree[section][key]
        tree = tree | {section: {name: kept for name, kept in tree[section].items() if name != key}}
        *parents, last = new.split(".")
        if value is not None:
            tree = _with(tree, [*parents, last], value)
        elif len(parents) == 2 and parents[1] not in (tree.get(parents[0]) or {}):
            tree = _with(tree, parents, None)  # no such section, whatever a base says
    return tree


def _with(tree: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    first, *rest = path
    below = tree.get(first)
    return tree | {first: _with(below if isinstance(below, dict) else {}, rest, value) if rest else value}
