"""Checkpoints that no run wrote."""

from pathlib import Path
from typing import Any

from torch import Tensor

from megavar.training.checkpoint import manifest as manifests
from megavar.training.checkpoint import shards, store
from megavar.training.checkpoint.manifest import Manifest, ModuleEntry
from megavar.training.checkpoint.state import BUFFER, WEIGHT, key


def write_weights(
    root: Path, module: str, tensors: dict[str, Tensor], buffers: dict[str, Tensor] | None = None, **facts: Any
) -> Path:
    """Write logical tensors as the checkpoint of step 0 of one module, without moments; return its directory."""
    attempt = store.begin(root, 0)
    named = {key(module, WEIGHT, name): value.float().contiguous() for name, value in tensors.items()}
    named |= {key(module, BUFFER, name): value for name, value in (buffers or {}).items()}
    files = tuple(manifests.describe_file(attempt, name) for name in shards.write_alone(attempt, named))
    shapes = {name: list(value.shape) for name, value in tensors.items()}
    entry = ModuleEntry(shapes, 0, buffers=sorted(buffers or {}), has_moments=False)
    manifests.write(attempt, Manifest(0, {module: entry}, {"step": 0}, files=files, **facts))
    return store.commit(attempt)
