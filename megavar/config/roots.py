"""Where relative paths of a file lie: beside the file that names them, or in ``paths: {root: DIR}``.

What does not lie beside the file (or in the root) is looked for from the current directory, then among the files that
come with megavar; with a root, only the latter. A file is read before anybody knows which of its texts are paths, and
merged with others before it is decoded. So its texts are marked when it is read, and those that turn out to be paths
are put in their place before decoding.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from megavar.config.choice import Choice
from megavar.paths import expanded

_SHIPPED = ("configs/", "slurm/")


class Marked(str):
    """A text of a file."""

    folder: Path
    """Of the file."""
    root: str | None
    """Of the file's relative paths, if it names one."""


def mark(folder: Path, tree: Any, root: str | None = None) -> Any:
    """``tree``, read from a file in ``folder``, with all texts in it marked."""
    try:
        return _mark(folder, tree, root)
    except RecursionError:  # a list that holds itself: decoding refuses it
        return tree


def _mark(folder: Path, tree: Any, root: str | None) -> Any:
    if isinstance(tree, dict):
        return {key: _mark(folder, value, root) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_mark(folder, value, root) for value in tree]
    if type(tree) is not str:
        return tree
    text = Marked(tree)
    text.folder, text.root = folder, root
    return text


def place(tree: Any, section: type[BaseModel]) -> Any:
    """``tree`` with all marked paths in their places; ``section`` says which texts are paths."""
    if not isinstance(tree, dict):
        return tree
    placed = dict(tree)
    for name, field in section.model_fields.items():
        if name not in tree:
            continue
        value, annotation = tree[name], field.annotation
        if "expanded" in f"{field.metadata} {annotation}":  # megavar.config.base.PathText
            placed[name] = [_found(text) for text in value] if isinstance(value, list) else _found(value)
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
    tags = {one: get_args(one.model_fields["name"].annotation) for one in sections if "name" in one.model_fields}
    named = [one for one, tag in tags.items() if value.get("name") in tag]
    return place(value, (named or sections)[0]) if sections else value


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def _found(value: Any) -> Any:
    if not isinstance(value, Marked) or not value or value.startswith(("~", "$", "/")):
        return value
    in_root = None if value.root is None else Path(value.root) / value
    places = [one for one in (in_root, value.folder / value) if one is not None]
    lies = next((one for one in places if os.path.exists(one)), None)  # noqa: PTH110 (never raises)
    if lies is None and value.startswith(_SHIPPED):
        return str(value)
    lies = lies or in_root
    return str(value) if lies is None else os.path.normpath(expanded(str(lies)))
