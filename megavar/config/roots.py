"""``paths: {root: DIR}`` of a file: all relative paths that this file names lie there.

A file is read before anybody knows which of its texts are paths, and merged with others before it is decoded. So its
texts are marked when it is read, and those that turn out to be paths are put under their root before decoding.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from megavar.config.choice import Choice
from megavar.paths import expanded

_SHIPPED = ("configs/", "slurm/")


class Rooted(str):
    """A text of a file with a root."""

    root: str


def mark(root: str, tree: Any) -> Any:
    """``tree`` with all texts in it marked."""
    if isinstance(tree, dict):
        return {key: mark(root, value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [mark(root, value) for value in tree]
    if type(tree) is not str:
        return tree
    text = Rooted(tree)
    text.root = root
    return text


def place(tree: Any, section: type[BaseModel]) -> Any:
    """``tree`` with all marked paths under their roots; ``section`` says which texts are paths."""
    if not isinstance(tree, dict):
        return tree
    placed = dict(tree)
    for name, field in section.model_fields.items():
        if name not in tree:
            continue
        value, annotation = tree[name], field.annotation
        if "expanded" in f"{field.metadata} {annotation}":  # megavar.config.base.PathText
            placed[name] = [_under(text) for text in value] if isinstance(value, list) else _under(value)
        elif isinstance(value, list):
            placed[name] = [_inside(item, annotation) for item in value]
        else:
            placed[name] = _inside(value, annotation)
    return placed


def _inside(value: Any, annotation: Any) -> Any:
    """A value that may be a section."""
    if not isinstance(value, dict):
        return value
    sections = list(_sections(annotation))
    for kind in sections:
        if issubclass(kind, Choice) and kind.tag() is None:
            chosen = kind.alternatives().get(str(value.get(kind.discriminator, kind.default)))
            return value if chosen is None else place(value, chosen)
    tags = {one: one.model_fields["name"].default for one in sections if "name" in one.model_fields}
    named = [one for one, tag in tags.items() if tag == value.get("name")]
    return place(value, (named or sections)[0]) if sections else value


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def _under(value: Any) -> Any:
    if not isinstance(value, Rooted) or value.startswith(("~", "$")):
        return value
    inside = Path(value.root) / value
    if value.startswith(_SHIPPED) and not inside.exists():
        return value
    return os.path.normpath(expanded(str(inside)))
