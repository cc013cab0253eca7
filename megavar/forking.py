"""A new run that goes on from a checkpoint of another, under other settings.

Where the tensors stay what they are, all goes on: weights, moments of the optimizer, averages, step, place in the data.
With other classes the weights go on, rows of class embeddings matched by the names of the classes; the rest begins
anew.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import megavar
from megavar import storage
from megavar.config.choice import resolve
from megavar.config.loading import apply_override, dump, import_stored_plugins, run_tree, stored_config
from megavar.config.recipes.base import GENERATOR_MODULE
from megavar.config.root import Config
from megavar.data.build import build_source
from megavar.errors import ConfigError
from megavar.generators.base import Generator
from megavar.library.loading import class_names
from megavar.training.checkpoint import store
from megavar.training.checkpoint.manifest import FILE_NAME as MANIFEST
from megavar.training.checkpoint.manifest import Manifest
from megavar.training.checkpoint.weights import find_checkpoint, read_weights
from megavar.weight_file import About, write_export

PARENT, INITIAL_FILE = "parent.json", "initial.safetensors"


@dataclass(frozen=True)
class Fork:
    """What came of it."""

    directory: Path
    parent: str
    step: int
    continues: bool
    """Whether optimizer and step go on, not the weights alone."""
    differences: Mapping[str, tuple[Any, Any]]
    kept: tuple[str, ...] = ()
    """Classes whose rows were taken, by name."""
    new: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    also: tuple[str, ...] = field(default=())
    """What else a person should know: sentences."""


def fork(parent: Path, directory: Path, overrides: Sequence[str], step: int | None = None) -> Fork:
    """Make ``directory`` a run that begins with a checkpoint of the run ``parent``; nothing of the parent changes.

    Args:
        overrides: ``dotted.key=value``, of the new run's configuration.
        step: of the checkpoint (default: the newest).

    Raises:
        ConfigError: the directory is taken, settings contradict each other, or nothing would be left to train.
        CheckpointError: the checkpoint is missing or damaged.
    """
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{directory} is not empty. Name a new directory for the fork, or delete this one.")
    before = _decoded(parent, run_tree(parent))
    tree = _tree(parent, directory, overrides)
    after = _decoded(parent, tree)
    checkpoint, manifest = find_checkpoint(parent if step is None else _checkpoint_of(parent, step))
    old, names = class_names(parent), _names(after)
    classes_change = _count(before) is not None and names != old and before.data != after.data
    if classes_change or _count(before) != _count(after):
        if not any(word.startswith("generator.classes=") for word in overrides) and names:
            tree["generator"]["classes"] = len(names)
        after = _decoded(parent, tree)
        result = _with_classes(before, after, checkpoint, manifest, directory, old, names)
    else:
        result = _continued(before, after, checkpoint, manifest, directory)
    _record(result, parent, checkpoint, manifest)
    return result


def _tree(parent: Path, directory: Path, overrides: Sequence[str]) -> dict[str, Any]:
    tree = run_tree(parent)
    for override in overrides:
        apply_override(tree, override)
    named = {word.partition("=")[0] for word in overrides}
    tree["run"]["directory"] = str(directory)
    if "run.name" not in named:
        tree["run"]["name"] = directory.name
    tree["train"]["fresh"] = False
    for one, other in (("train.steps", "epochs"), ("train.epochs", "steps")):  # give one: the other goes
        if one in named and f"train.{other}" not in named:
            tree["train"][other] = None
    return tree


def _decoded(parent: Path, tree: dict[str, Any]) -> Config:
    import_stored_plugins(tree, str(parent / "config.yaml"))
    return stored_config(tree, str(parent / "config.yaml"))


def _checkpoint_of(parent: Path, step: int) -> Path:
    path = parent / "checkpoints" / store.checkpoint_name(step)
    if not path.is_dir():
        there = ", ".join(str(store.step_of(found)) for found in store.list_checkpoints(parent / "checkpoints"))
        raise ConfigError(f"{parent} has no checkpoint of step {step}. There are those of steps {there or '(none)'}.")
    return path


def _count(config: Config) -> int | None:
    return None if config.generator is None else config.generator.class_count


def _names(config: Config) -> tuple[str, ...]:
    return tuple(build_source(config.data).class_names)


def differing(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys with both values; name and place of the run are no difference."""

    def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
        if isinstance(tree, dict) and tree:
            return {name: leaf for key, value in tree.items() for name, leaf in flat(value, f"{prefix}{key}.").items()}
        return {prefix.rstrip("."): tree}

    one, other = (flat(config.model_dump(mode="json", exclude={"run"})) for config in (before, after))
    keys = sorted(one.keys() | other.keys())
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def _continued(before: Config, after: Config, checkpoint: Path, manifest: Manifest, directory: Path) -> Fork:
    """Everything goes on: the checkpoint becomes the new run's own."""
    changes = differing(before, after)
    shapes = [key for key in changes if key.startswith(("generator.", "tokenizer.", "recipe.name")) and _shapes(key)]
    if shapes:
        raise ConfigError(
            f"{', '.join(shapes)} would make another model than the checkpoint's. Fork with the same sizes, or begin a "
            f"run of its own with train.initial_weights.path={checkpoint}."
        )
    total = after.train.total_steps(len(build_source(after.data)))
    if total <= manifest.step:
        raise ConfigError(
            f"The checkpoint is of step {manifest.step} and the new run would end at step {total}. Give more: "
            f"train.steps={manifest.step * 2}, or --step with an earlier checkpoint."
        )
    parent = checkpoint.parent.parent
    with _whole(directory):
        target = directory / "checkpoints" / checkpoint.name
        shutil.copytree(checkpoint, target, copy_function=_link)
        store.point_latest(target)
        _write_config(directory, after)
        kept = ["weights.json"] + (["data.json"] if before.data.source == after.data.source else [])
        for name in kept:
            if (parent / name).exists():
                shutil.copyfile(parent / name, directory / name)
    also = () if before.data.source == after.data.source else ("The data are others; the run goes on at its step.",)
    return Fork(directory, str(parent), manifest.step, True, changes, also=also)


def _shapes(key: str) -> bool:
    """Whether a key of a model decides shapes: rates of dropping and the attention's kernel do not."""
    return not any(word in key for word in ("drop", "kernel", "coefficient", "backend"))


def _with_classes(
    before: Config, after: Config, checkpoint: Path, manifest: Manifest, directory: Path,
    old: tuple[str, ...], names: tuple[str, ...],
) -> Fork:  # fmt: skip
    """Weights go on, with rows of classes matched by name."""
    count, previous = _count(after), _count(before)
    if previous is None or count is None:
        raise ConfigError("One of both generators is not asked by class. Begin a run of its own.")
    if len(old) != previous or len(names) != count:
        raise ConfigError(
            f"Classes are matched by their names, of which the parent has {len(old)} for {previous} classes and the "
            f"new data have {len(names)} for {count}. Set generator.classes={len(names) or 'N'}; earlier versions did "
            f"not write names down: add class_names to their data.json."
        )
    changes = differing(before, after)
    assert after.generator is not None
    tensors = read_weights(checkpoint, GENERATOR_MODULE, verify=False)
    generator: type[Generator] = resolve(after.generator)
    table = generator.class_table
    tensors[table] = matched(tensors[table], old, names)
    file = directory / INITIAL_FILE
    initial = {"path": str(file.absolute())}
    tree = json.loads(after.model_dump_json())
    tree["train"]["initial_weights"] = initial
    final = stored_config(tree, str(directory / "config.yaml"))
    assert final.generator is not None
    about = About(
        GENERATOR_MODULE, manifest.step, "model", final.generator.model_dump(mode="json"),
        {}, class_names=names, config=json.loads(final.model_dump_json()),
    )  # fmt: skip
    with _whole(directory):
        directory.mkdir(parents=True, exist_ok=True)
        write_export(file, tensors, about)
        _write_config(directory, final)
    return Fork(
        directory, str(checkpoint.parent.parent), manifest.step, False, changes,
        tuple(name for name in names if name in old), tuple(name for name in names if name not in old),
        tuple(name for name in old if name not in names),
        ("Optimizer, averages and step begin anew: their rows were those of the old classes.",),
    )  # fmt: skip


def matched(table: Tensor, old: Sequence[str], new: Sequence[str]) -> Tensor:
    """The class table of ``new`` classes, from that of ``old`` ones: float [rows, C].

    The last rows are the classes by label, then "no class"; others before them (codes) stay. A class without a namesake
    begins as "no class", which is what the model knows of any image.
    """
    first = table.shape[0] - len(old) - 1
    rows = [table[first + old.index(name)] if name in old else table[-1] for name in new]
    return torch.cat([table[:first], torch.stack([*rows, table[-1]])])


def _link(source: str, target: str) -> None:
    """Checkpoints are never changed, so that a second name of a file suffices, where the file system has them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_config(directory: Path, config: Config) -> None:
    storage.write_text_atomic(directory / "config.yaml", dump(config))


class _whole:
    """A directory that is made whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __enter__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            storage.remove(self.directory)


def _record(result: Fork, parent: Path, checkpoint: Path, manifest: Manifest) -> None:
    described = {
        "run": yaml.safe_load((parent / "config.yaml").read_text())["run"]["name"],
        "directory": str(parent.absolute()),
        "checkpoint": checkpoint.name,
        "step": manifest.step,
        "manifest_sha256": storage.sha256_of_file(checkpoint / MANIFEST),
        "continues": result.continues, "differences": {key: list(values) for key, values in result.differences.items()},
        "classes": {"kept": result.kept, "new": result.new, "dropped": result.dropped}, "megavar": megavar.__version__,
    }  # fmt: skip
    storage.write_json_atomic(result.directory / PARENT, described)
