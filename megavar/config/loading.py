"""From YAML files and command-line overrides to a checked :class:`Config`, with errors that help.

A file may name another as ``base``; its own keys win. Lists and alternatives (sections whose ``name`` differs) replace
the base's value, everything else is merged key by key. Overrides are ``dotted.key=value`` with the value in YAML.
"""

import difflib
import importlib
import json
import os
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megavar.config.choice import Choice
from megavar.config.earlier import RENAMED, renewed
from megavar.config.root import Config
from megavar.config.roots import mark, place
from megavar.config.yaml_text import parse_yaml, read_text
from megavar.errors import ConfigError
from megavar.paths import expanded, found

_RESOLVED = frozenset(
    ("run", "recipe", "tokenizer", "generator", "data", "train", "optimizer", "parallel", "deepspeed", "logging",
     "sampling", "evaluation")
)  # fmt: skip
"""A file with all these keys is what :func:`dump` left in a run: its paths are found already."""


def read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The merged content of a YAML file and its bases."""
    path = found(path)
    if path.resolve() in seen:
        raise ConfigError(f"{path} is its own base (through {' -> '.join(map(str, seen))}). Remove one `base:` line.")
    tree = parse_yaml(read_text(path), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} does not hold keys and values at its top level. Start from configs/quickstart.yaml.")
    base, tree = tree.pop("base", None), renewed(tree)
    if "paths" in tree:
        root = _root(path, tree.pop("paths"))
        tree = mark(path.absolute().parent, tree, root) | {"paths": {"root": root}}
    elif not tree.keys() >= _RESOLVED:
        tree = mark(path.absolute().parent, tree)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base must be the path of one YAML file, relative to this file.")
    return merge(read_tree(path.parent / _expanded(base, f"{path}: base"), (*seen, path.resolve())), tree)


def _root(path: Path, paths: Any) -> str:
    """The folder that ``paths`` of the file ``path`` means."""
    if not isinstance(paths, dict) or set(paths) != {"root"} or not isinstance(paths["root"], str):
        raise ConfigError(f"{path}: paths must be {{root: DIR}}, the folder in which this file's relative paths lie.")
    return os.path.normpath(path.absolute().parent / _expanded(paths["root"], f"{path}: paths.root"))


def _expanded(text: str, origin: str) -> str:
    try:
        return expanded(text)
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}.") from None


def merge(base: Any, top: Any, section: str = "") -> Any:
    """``top`` over ``base``, key by key. An alternative of another ``name`` replaces the base's as a whole."""
    if not (isinstance(base, dict) and isinstance(top, dict)):
        return top
    if section != "run" and "name" in base and base["name"] != top.get("name", base["name"]):
        return top
    return base | {key: merge(base[key], value, key) if key in base else value for key, value in top.items()}


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one ``dotted.key=value`` in place."""
    key, separator, text = override.partition("=")
    if not separator or not key or any(not part for part in key.split(".")):
        raise ConfigError(
            f"The override {override!r} is not of the form dotted.key=value, for example optimizer.lr=3e-4."
        )
    *parents, last = RENAMED.get(key, key).split(".")
    value = parse_yaml(text, f"the value of override {key}")
    if value is None and key in RENAMED:  # what has a section of its own now
        *parents, last = parents
    section = tree
    for parent in parents:
        below = section.setdefault(parent, {})
        if below is None:  # a section that is left out
            below = section[parent] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"The override {override!r} goes through {parent}, which holds {below!r} and no keys.")
        section = below
    section[last] = value


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read, merge, override and check a configuration.

    Args:
        path: the YAML file; one that comes with megavar (``configs/...``) is found from everywhere. A run's directory
            stands for its ``config.yaml``, wherever it has been moved.
        overrides: ``dotted.key=value``; their paths are relative to the current directory.

    Raises:
        ConfigError: anything is wrong; the message names key, problem and remedy for every problem found.
    """
    path = _expanded(str(path), "The configuration")
    tree = run_tree(Path(path)) if (Path(path) / "config.yaml").is_file() else read_tree(Path(path))
    for override in overrides:
        apply_override(tree, override)
    root, run = tree.pop("paths", None), tree.get("run")
    if root is not None and isinstance(run, dict) and run.get("directory") is None and run.get("name"):
        run["directory"] = os.path.join(root["root"], "runs", str(run["name"]))  # noqa: PTH118
    import_plugins(tree, str(path))
    return decode(tree, Config, str(path))


def run_tree(directory: Path) -> dict[str, Any]:
    """The configuration of the run in ``directory``, whose own place it may have left."""
    tree = read_tree(directory / "config.yaml")
    if isinstance(tree.get("run"), dict):
        tree["run"]["directory"] = str(directory)
    return tree


def import_plugins(tree: Mapping[str, Any], origin: str) -> None:
    """Import the modules that ``plugins`` of a run names, so that their alternatives exist when it is decoded.

    Raises:
        ConfigError: a module cannot be imported.
    """
    names = tree.get("plugins")
    for name in names if isinstance(names, list) else ():  # anything else is refused by decoding
        try:
            importlib.import_module(str(name))
        except Exception as error:  # whatever a user's module raises while it is imported
            raise ConfigError(
                f"{origin}: plugins: the module {name!r} cannot be imported ({type(error).__name__}: {error}). Modules "
                f"are looked for in the current directory and in PYTHONPATH."
            ) from error


PLUGINS = "MEGAVAR_PLUGINS"
"""Environment variable: modules, separated by commas, that may be imported because something stored asks for them."""


def stored_config(tree: Mapping[str, Any], origin: str) -> Config:
    """Decode a configuration that lies beside weights or in a file of them.

    Raises:
        ConfigError: it is wrong, or asks for modules that nobody else asks for.
    """
    import_stored_plugins(tree, origin)
    return decode(tree, Config, origin)


def import_stored_plugins(tree: Mapping[str, Any], origin: str) -> None:
    """Import the modules that something stored needs, if somebody else says so, too.

    Raises:
        ConfigError: nobody does.
    """
    named = os.environ.get(PLUGINS, "").split(",")
    wanted = tree.get("plugins")
    foreign = [
        str(name) for name in (wanted if isinstance(wanted, list) else ())
        if str(name) not in sys.modules and name not in named
    ]  # fmt: skip
    if foreign:
        names = ",".join(foreign)
        raise ConfigError(
            f"{origin} asks for the modules {names}, and a file beside samples or weights is no reason to run code. If "
            f"they are yours, set {PLUGINS}={names} and start again."
        )
    import_plugins(tree, origin)


Model = typing.TypeVar("Model", bound=BaseModel)


def decode(tree: Mapping[str, Any], model: type[Model], origin: str) -> Model:
    """Decode a tree of plain values strictly into ``model``, its paths where :mod:`megavar.config.roots` puts them."""
    tree = place(renewed(dict(tree)) if model is Config else tree, model)
    try:
        return model.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        problems = [_explain(problem, model, tree) for problem in error.errors(include_url=False)]
        raise ConfigError(f"{origin}: " + " ".join(problems)) from None
    except (TypeError, ValueError, RecursionError) as error:  # dates, sets, lists that hold themselves
        raise ConfigError(f"{origin} holds a value that configurations cannot have: {error}") from None


def with_defaults(tree: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The plain values of a stored configuration, with the keys that it lacks because an older version wrote it.

    Raises:
        ConfigError: this version does not know a key or a value of it.
    """
    import_plugins(tree, origin)
    return json.loads(decode(tree, Config, origin).model_dump_json())


def dump(config: BaseModel) -> str:
    """The configuration as YAML with every key present; loading it gives the same configuration."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, width=120)


def _explain(problem: Mapping[str, Any], model: type[BaseModel], tree: Mapping[str, Any]) -> str:
    location, section = _locate(problem["loc"], model, tree)
    key = ".".join(map(str, location)) or "the configuration"
    if problem["type"] == "extra_forbidden":
        nearest = _nearest(str(location[-1]), section)
        valid = f"Did you mean {nearest!r}?" if nearest else "Valid keys: " + ", ".join(_field_names(section)) + "."
        return f"Unknown key {key}. {valid}"
    if problem["type"] == "missing":
        return f"Key {key} is missing: it has no default."
    if problem["type"] == "choice_tag":  # of megavar.config.choice
        return f"{key}.{problem['msg']}"
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        expected = problem["ctx"].get("expected_tags", "")
        given = problem["ctx"].get("tag")
        alike = difflib.get_close_matches(str(given), re.findall(r"'([^']+)'", expected), 1)
        hint = f" Did you mean {alike[0]!r}?" if alike else ""
        what = f"is {given!r}" if given is not None else "is missing"
        return f"{key}.name {what}; it must be one of {expected or 'the names in the documentation'}.{hint}"
    message = re.sub(r"^(Value error|Assertion failed), ", "", problem["msg"])
    if location:
        given = problem["input"] if not isinstance(problem["input"], dict) else "the section"
        suffix = "" if problem["type"] == "value_error" else f" (given: {given!r})"
        return f"{key}: {message[0].lower() + message[1:]}{suffix}."
    return f"{message}."


def _locate(
    location: Sequence[int | str], model: type[BaseModel], tree: Any
) -> tuple[list[int | str], type[BaseModel]]:
    """Drop union tags from a pydantic location; return it with the section that should hold its last key.

    Args:
        tree: the plain values that were decoded: they say which alternative each section is.
    """
    path: list[int | str] = []
    section, value, field = model, tree, None
    for number, part in enumerate(location):
        if field is not None and part not in section.model_fields and _alternative(field, part) is not None:
            section, field = typing.cast(type[BaseModel], _alternative(field, part)), None
            continue
        path.append(part)
        value = _below(value, part)
        if isinstance(part, str) and part in section.model_fields:
            field = section.model_fields[part].annotation
        if number + 1 < len(location) and field is not None and (below := _section_of(field, value)) is not None:
            section = below
    return path, section


def _below(value: Any, part: int | str) -> Any:
    try:
        return value[part]
    except (KeyError, IndexError, TypeError):
        return None


def _section_of(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The section that an annotated field holds where its plain value is ``value``; None: a plain value."""
    section = next(iter(_sections(annotation)), None)
    if section is not None and issubclass(section, Choice) and section.tag() is None and isinstance(value, dict):
        return section.alternatives().get(str(value.get(section.discriminator, section.default)), section)
    return section


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in typing.get_args(annotation) for section in _sections(argument)]


def _alternative(annotation: Any, tag: int | str) -> type[BaseModel] | None:
    """The member of a tagged union that pydantic's location calls ``tag``."""
    for section in _sections(annotation):
        name = section.model_fields.get("name")
        if (name is not None and tag in typing.get_args(name.annotation)) or section.__name__ == tag:
            return section
    return None


def _field_names(section: type[BaseModel]) -> list[str]:
    return sorted(section.model_fields)


def _nearest(key: str, section: type[BaseModel]) -> str | None:
    found = difflib.get_close_matches(key, _field_names(section), 1, cutoff=0.5)
    return found[0] if found else None
