"""The weights with which a new run begins, if not with random ones: from a checkpoint or a file, under any layout.

What comes is float32 and goes into the optimizer's master weights, so nothing is lost where the module computes in
bfloat16. Optimizer state, step counts and averages are those of a new run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megavar.errors import CheckpointError
from megavar.training.checkpoint import manifest as manifests
from megavar.training.checkpoint import shards
from megavar.training.checkpoint.manifest import ModuleEntry
from megavar.training.checkpoint.ranks import Ranks
from megavar.training.checkpoint.state import (
    BUFFER,
    ModuleState,
    Restorer,
    describe,
    key,
    logical_by_parameter,
    persistent_buffers,
    stage,
    tensor_place,
    to_local,
)
from megavar.training.checkpoint.weights import find_checkpoint, module_of, read_weights, stored_key
from megavar.weight_file import names_in_export
from megavar.weight_folder import is_own_directory
from megavar.weight_layout import Shape, differences

ReadFile = Callable[[Path, Mapping[str, Shape], tuple[str, ...]], dict[str, Tensor]]
"""(path, shapes of the whole model, beginnings of names not to take) -> tensors; ``read_weights_file`` with a model's
layouts."""


@dataclass(frozen=True)
class InitialWeights:
    """Where they come from."""

    path: Path
    """A run, a checkpoint, or a file."""
    read_file: ReadFile
    fresh: tuple[str, ...] = ()
    """Beginnings of the names of tensors that keep their random values."""
    ema: bool = False
    """Take the moving average from a checkpoint."""


@dataclass
class _Source:
    """What was found."""

    available: set[str]
    """The model's tensors and buffers that come from it."""
    read: Callable[[dict[str, Tensor], Mapping[str, Any]], None]
    """Fill templates (as stored, or a local part of a file's tensor) by logical name."""


def begin(name: str, state: ModuleState, initial: InitialWeights, ranks: Ranks) -> None:
    """Put initial weights into module ``name`` of a new run. Collective; nothing is written unless all could be read.

    Raises:
        CheckpointError: the weights are missing or damaged, or are not those of this model.
        CheckpointAccessError: one rank could not read them.
    """
    described = describe(state, ranks)
    model = _whole_shapes(described, state, ranks)
    source, error = None, None
    try:
        of_ours = is_own_directory(initial.path)
        source = _open_checkpoint(initial, model, ranks) if of_ours else _open_file(initial, model)
    except CheckpointError as failure:
        error = failure
    _raise_together(error, ranks)
    assert source is not None
    staged = stage(name, state) if model.keys() - source.available else {}
    buffers = sorted(set(described.buffers) & source.available)
    entry = ModuleEntry(described.tensors, step=0, buffers=buffers, has_moments=False)
    restorer, failed = Restorer(name, state, entry), None
    try:
        _fill(name, restorer, source, staged, state)
    except Exception as failure:  # on this rank only: the others must not enter the collectives below
        failed = failure
    ranks.agree(failed, f"Reading {initial.path}")
    restorer.finish()


def read_whole(initial: InitialWeights, model: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The tensors with which a run of a whole ``model`` (shapes by name) would begin, without those that stay random.

    Raises:
        CheckpointError: as :func:`begin`.
    """
    if not is_own_directory(initial.path):
        return _read_file(initial, model)
    path, _ = find_checkpoint(initial.path)
    tensors = read_weights(path, None, initial.ema, verify=False)
    taken = _check_taken(initial, path, model, {name: tuple(value.shape) for name, value in tensors.items()})
    return {name: tensors[name] for name in taken}


def _fill(name: str, restorer: Restorer, source: _Source, staged: Mapping[str, Tensor], state: ModuleState) -> None:
    """Fill the restorer's templates from the source, or where it has nothing from the module as it is."""
    logical = {t.name: t for tensors in logical_by_parameter(state.engine.module).values() for t in tensors}
    wanted: dict[str, Tensor] = {}
    for stored, template in restorer.templates.items():
        tensor = stored.removeprefix(f"{name}/").partition("/")[2]
        if tensor in source.available:
            wanted[tensor] = template
        else:
            to_local(template).copy_(to_local(staged[stored]))
    source.read(wanted, logical)


def _whole_shapes(described: ModuleEntry, state: ModuleState, ranks: Ranks) -> dict[str, Shape]:
    """Shape of every logical tensor and buffer of the module, those of other stages and experts too. Collective."""
    shapes: dict[str, Shape] = {name: tuple(shape) for name, shape in described.tensors.items()}
    mine = {name: tuple(buffer.shape) for name, buffer in persistent_buffers(state.engine.module).items()}
    for buffers in ranks.gather(mine):
        shapes |= buffers
    return shapes


def _raise_together(error: CheckpointError | None, ranks: Ranks) -> None:
    """What is wrong with the weights is mostly found by all ranks alike: raise the first one's finding everywhere."""
    first = next((found for found in ranks.gather(error) if found is not None), None)
    if first is not None:
        raise first


def _check_fresh(initial: InitialWeights, names: set[str]) -> None:
    for prefix in initial.fresh:
        if not any(name.startswith(prefix) for name in names):
            parts = sorted({name.partition(".")[0] for name in names})
            raise CheckpointError(
                f"train.initial_weights.fresh: no tensor of this model begins with {prefix!r}. Its parts are "
                f"{', '.join(parts)}."
            )


def _read_file(initial: InitialWeights, model: Mapping[str, Shape]) -> dict[str, Tensor]:
    tensors = initial.read_file(initial.path, model, initial.fresh)
    _check_fresh(initial, set(model) | names_in_export(initial.path))
    return tensors


def _open_file(initial: InitialWeights, model: Mapping[str, Shape]) -> _Source:
    tensors = _read_file(initial, model)
    rank, size = tensor_place()

    def read(templates: dict[str, Tensor], logical: Mapping[str, Any]) -> None:
        for name, template in templates.items():
            part = logical[name].shard(tensors[name], rank, size) if name in logical else tensors[name]
            to_local(template).copy_(part)

    return _Source(set(tensors), read)


def _open_checkpoint(initial: InitialWeights, model: Mapping[str, Shape], ranks: Ranks) -> _Source:
    path, manifest = find_checkpoint(initial.path, verify=False)
    problem = manifests.damage(path, manifest.files[ranks.rank :: ranks.size])
    if problem:
        raise CheckpointError(f"{path} is damaged: {problem}. Name an older checkpoint, or restore it from a backup.")
    module, entry = module_of(path, manifest, None, initial.ema)
    stored = shards.index(path)
    there = {name: tuple(shape) for name, shape in entry.tensors.items()}
    there |= {name: tuple(stored[key(module, BUFFER, name)][0]) for name in entry.buffers}
    taken = _check_taken(initial, path, model, there)

    def read(templates: dict[str, Tensor], logical: Mapping[str, Any]) -> None:
        keys = {name: stored_key(stored.keys(), module, name, initial.ema) for name in logical.keys() & templates}
        keys |= {name: key(module, BUFFER, name) for name in templates.keys() - logical.keys()}
        shards.read(path, {keys[name]: template for name, template in templates.items()})

    return _Source(taken, read)


def _check_taken(
    initial: InitialWeights, path: Path, model: Mapping[str, Shape], there: Mapping[str, Shape]
) -> set[str]:
    """The names of what a checkpoint with the tensors ``there`` gives to ``model``, after checking that they fit."""
    _check_fresh(initial, set(model) | set(there))
    expected, given = ({n: s for n, s in of.items() if not n.startswith(initial.fresh)} for of in (model, there))
    problems = differences(expected, given)
    if problems:
        raise CheckpointError(
            f"{path} is a checkpoint of another model: {'; '.join(problems)}. Give the configuration that it was "
            f"trained with, or name the parts that may stay fresh in train.initial_weights.fresh."
        )
    return set(given)
