"""Weights of a checkpoint without the run that wrote it: for sampling, evaluation and conversion."""

from collections.abc import Container, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from megavar.errors import CheckpointError
from megavar.training.checkpoint import manifest as manifests
from megavar.training.checkpoint import shards, store
from megavar.training.checkpoint.manifest import DamagedError, Manifest, ModuleEntry
from megavar.training.checkpoint.state import (
    AVERAGE,
    BUFFER,
    WEIGHT,
    as_stored,
    key,
    logical_by_parameter,
    persistent_buffers,
    tensor_place,
)

HEADS = "heads."
"""Beginning of the names of heads that a recipe's terms train beside a generator."""


def find_checkpoint(path: Path, verify: bool = True) -> tuple[Path, Manifest]:
    """The checkpoint meant by ``path``: a checkpoint, a directory of checkpoints or a run directory (their newest).

    Args:
        path: what a person wrote.
        verify: read every byte of a candidate and compare hashes, as one must before using it.

    Raises:
        CheckpointError: there is none, or what there is is damaged. Unlike a run that resumes, a reader who named
            one checkpoint gets that one or an error, never an older one.
    """
    path = Path(path)
    newest = [*store.list_checkpoints(path)[:1], *store.list_checkpoints(path / "checkpoints")[:1]]
    if newest:
        path = newest[0]
    elif not store.is_checkpoint_name(path) and not (path / manifests.FILE_NAME).exists():
        raise CheckpointError(
            f"{path} is not a checkpoint and holds none. Name a checkpoint (step-00001000), a directory of "
            f"checkpoints, or a run directory."
        )
    try:
        manifest = manifests.read(path)
        problem = manifests.damage(path, manifest.files) if verify else None
    except DamagedError as error:
        problem = str(error)
    if problem:
        raise CheckpointError(f"{path} is damaged: {problem}. Name an older checkpoint, or restore it from a backup.")
    return path, manifest


def module_of(path: Path, manifest: Manifest, module: str | None, ema: bool) -> tuple[str, ModuleEntry]:
    """A module of a checkpoint by name; None: the first, which is what the run was for.

    Raises:
        CheckpointError: there is no such module, or no average of it though ``ema``.
    """
    module = next(iter(manifest.modules)) if module is None else module
    if module not in manifest.modules:
        raise CheckpointError(f"{path} holds no module {module!r}; it holds {', '.join(manifest.modules)}.")
    entry = manifest.modules[module]
    if ema and not entry.has_average:
        raise CheckpointError(
            f"{path} holds no average of the weights of {module!r}: the run had no EMA. Ask for the weights themselves."
        )
    return module, entry


def stored_key(stored: Container[str], module: str, name: str, ema: bool) -> str:
    """Key of a logical tensor, or of its average, among those that are ``stored``."""
    average = key(module, AVERAGE, name)
    return average if ema and average in stored else key(module, WEIGHT, name)  # frozen parameters have no average


def read_weights(
    path: Path, module: str | None = None, ema: bool = False, verify: bool = True
) -> dict[str, Tensor]:
    """All weights and buffers of one module, whole, by logical name.

    Args:
        path: see :func:`find_checkpoint`.
        module: name of the module in its recipe; None: the recipe's first, a generator or a tokenizer.
        ema: the moving average instead of the weights.
        verify: see :func:`find_checkpoint`. Of many processes that read the same checkpoint, one is enough.

    Returns:
        float32 CPU tensors; buffers in their own dtype.

    Raises:
        CheckpointError: no such checkpoint, module or average, or files are damaged.
    """
    path, manifest = find_checkpoint(path, verify)
    module, entry = module_of(path, manifest, module, ema)
    stored = shards.index(path)
    keys = {name: stored_key(stored.keys(), module, name, ema) for name in entry.tensors}
    keys |= {name: key(module, BUFFER, name) for name in entry.buffers}
    templates = {wanted: torch.empty(stored[wanted][0], dtype=stored[wanted][1]) for wanted in keys.values()}
    shards.read(path, templates)
    return {name: templates[wanted] for name, wanted in keys.items()}


@torch.no_grad()
def load_weights(
    target: nn.Module,
    path: Path,
    module: str | None = None,
    ema: bool = False,
    verify: bool = True,
    *,
    whole: bool = False,
) -> Manifest:
    """Fill the parameters and buffers of ``target``, which may be one rank's part of any layout (not of ZeRO-3).

    Every rank calls it and reads what it needs, without communication. Arguments as in :func:`read_weights`.

    Args:
        whole: ``target`` is the whole model, so the checkpoint may have no other tensors than its; heads of a recipe's
            terms are no part of a model.

    Returns:
        The manifest of the checkpoint.

    Raises:
        CheckpointError: as :func:`read_weights`, or ``target`` is another model.
    """
    path, manifest = find_checkpoint(path, verify)
    module, entry = module_of(path, manifest, module, ema)
    stored = shards.index(path).keys()
    parameters, buffers = dict(target.named_parameters()), persistent_buffers(target)
    names = logical_by_parameter(target)
    values, templates = {}, {}
    own = {tensor.name for tensors in names.values() for tensor in tensors}
    if whole and (foreign := sorted(name for name in entry.tensors.keys() - own if not name.startswith(HEADS))):
        raise CheckpointError(
            f"{path} is a checkpoint of another model: {module} has {', '.join(foreign[:4])} there and not here. "
            f"Give the configuration the checkpoint was trained with."
        )
    for parameter, tensors in names.items():
        values[parameter] = torch.empty(parameters[parameter].shape, dtype=torch.float32)
        for tensor in tensors:
            if entry.tensors.get(tensor.name) != list(tensor.shape):
                there = f"has shape {entry.tensors[tensor.name]}" if tensor.name in entry.tensors else "is missing"
                raise CheckpointError(
                    f"{path} is a checkpoint of another model: {module}/{tensor.name} {there} there and has shape "
                    f"{list(tensor.shape)} here. Give the configuration the checkpoint was trained with."
                )
            wanted = stored_key(stored, module, tensor.name, ema)
            templates[wanted] = as_stored(tensor, tensor.local(values[parameter]))
    for name in set(buffers) & set(entry.buffers):
        templates[key(module, BUFFER, name)] = torch.empty_like(buffers[name], device="cpu")
    shards.read(path, templates)
    for parameter, value in values.items():
        parameters[parameter].copy_(value)
    for name in set(buffers) & set(entry.buffers):
        buffers[name].copy_(templates[key(module, BUFFER, name)])
    return manifest


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every logical tensor and persistent buffer of which ``module`` holds a part, by name."""
    shapes = {tensor.name: tensor.shape for tensors in logical_by_parameter(module).values() for tensor in tensors}
    return shapes | {name: tuple(buffer.shape) for name, buffer in persistent_buffers(module).items()}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The logical tensors and persistent buffers of a module that is whole on this rank, by name."""
    parameters = dict(module.named_parameters())
    tensors = {
        tensor.name: tensor.local(parameters[parameter]).detach()
        for parameter, logical in logical_by_parameter(module).items()
        for tensor in logical
    }
    return tensors | dict(persistent_buffers(module))


@torch.no_grad()
def fill(target: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give ``target``, which may be one rank's part of any layout (not of ZeRO-3), its part of whole ``tensors``.

    Args:
        tensors: logical tensors and buffers by name, checked by the caller; those that are absent are left as they are.
    """
    rank, size = tensor_place()
    parameters = dict(target.named_parameters())
    for parameter, logical in logical_by_parameter(target).items():
        for tensor in logical:
            if tensor.name in tensors:
                part = tensor.shard(tensors[tensor.name], rank, size)
                tensor.local(parameters[parameter]).copy_(part)
    for name, buffer in persistent_buffers(target).items():
        if name in tensors:
            buffer.copy_(tensors[name])
