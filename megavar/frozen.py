"""Weights that are used and not trained (a tokenizer, teachers, perceptual networks): which they are.

A path says where weights are, not what they are. What a run computes depends on the bytes, so a run remembers the
:class:`Identity` of every frozen network, writes it into each checkpoint, and refuses to go on with other bytes under
the same path; the same bytes under another path are welcome. A recipe's section of the configuration lists the paths
(``RecipeChoice.frozen_weights``), by a name that says what each is: ``tokenizer``, ``vgg16``, ``guidance.teacher``.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megavar.errors import CheckpointError
from megavar.storage import sha256_of_file

if TYPE_CHECKING:  # identities are compared on login nodes, too, which need no torch
    import torch
    from torch import nn

    from megavar.weight_layout import WeightLayout

TOKENIZER = "tokenizer"
"""Name of the tokenizer whose tokens a generator learns, in every recipe that has one."""
_HASH_KEYS = {"file": "sha256", "checkpoint": "manifest_sha256", "folder": "files_sha256"}
_WEIGHT_FILES = (".safetensors", ".bin", ".pth", ".pt")


@dataclass(frozen=True)
class Identity:
    """What tells weights from all others."""

    kind: Literal["file", "checkpoint", "folder"]
    name: str
    """Of the file or directory: for people, it does not distinguish."""
    sha256: str
    """Of the file; of the checkpoint's manifest, which holds the hashes of its files; of names and hashes of a folder's
    files."""

    def __str__(self) -> str:
        of = {"file": "", "checkpoint": " of its manifest", "folder": " of its files"}[self.kind]
        return f"{self.name} (SHA-256{of} {self.sha256})"

    def same(self, other: Identity) -> bool:
        """Whether both are the same bytes, under whatever name."""
        return (self.kind, self.sha256) == (other.kind, other.sha256)

    def to_json(self) -> dict[str, str]:
        """As it stands in manifests, results and descriptions of samples."""
        return {self.kind: self.name, _HASH_KEYS[self.kind]: self.sha256}

    @staticmethod
    def from_json(record: Mapping[str, str]) -> Identity:
        """The inverse of :meth:`to_json`; other keys are ignored.

        Raises:
            CheckpointError: the record is not one of an identity.
        """
        for kind, hash_key in _HASH_KEYS.items():
            if isinstance(record, Mapping) and kind in record and hash_key in record:
                return Identity(kind, str(record[kind]), str(record[hash_key]))  # type: ignore[arg-type]
        raise CheckpointError(f"{record!r} does not identify weights: what holds it is damaged. Restore it.")


def identify(path: Path | str) -> Identity:
    """The identity of the weights in ``path``: a file, a checkpoint, a run (its newest checkpoint), or a folder with
    files of weights, as transformers keeps a network.

    Raises:
        CheckpointError: there are none.
    """
    from megavar.training.checkpoint.weights import find_checkpoint

    path = Path(path)
    if path.is_file():
        return Identity("file", path.name, _sha256(path))
    try:
        checkpoint, _ = find_checkpoint(path, verify=False)  # loading verifies it
    except CheckpointError:
        if path.is_dir() and any(file.suffix in _WEIGHT_FILES for file in path.iterdir()):
            return Identity("folder", path.name, _sha256_of_folder(path))
        raise
    return Identity("checkpoint", checkpoint.name, _sha256(checkpoint / "manifest.json"))


def _sha256_of_folder(path: Path) -> str:
    """Of its visible files, by name: the network's configuration counts, too."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    names = [file.relative_to(path) for file in files]
    listed = [
        f"{_sha256(file)} {name.as_posix()}\n" for file, name in zip(files, names)
        if not any(part.startswith(".") for part in name.parts)
    ]  # fmt: skip
    return hashlib.sha256("".join(listed).encode()).hexdigest()


def _sha256(path: Path) -> str:
    status = path.stat()
    return _sha256_of(str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=256)
def _sha256_of(path: str, size: int, modified: int, inode: int) -> str:
    """Networks may be gigabytes and are asked for several times in one process; a changed file is hashed again."""
    return sha256_of_file(Path(path))


def load(
    target: nn.Module,
    path: Path,
    layouts: Mapping[str, WeightLayout],
    layout: str = "auto",
    what: str = "The file",
    together: bool = False,
) -> None:
    """Fill a whole network from a run, a checkpoint, an export, or a file in one of its public layouts.

    Args:
        layouts: the network's public layouts by name.
        layout: the one of a file; ``megavar`` for an export, ``auto`` finds out.
        what: what a file should be, for messages.
        together: all ranks call it at this time: one rank of each node verifies a checkpoint for the others.

    Raises:
        CheckpointError: the weights are missing, damaged, or of another network, which is then unchanged.
    """
    from megavar.training.checkpoint.weights import fill, load_weights, shapes_of
    from megavar.weight_file import read_weights_file
    from megavar.weight_folder import is_own_directory

    if is_own_directory(Path(path)):
        load_weights(target, path, whole=True, together=together)
    else:
        fill(target, read_weights_file(Path(path), shapes_of(target), layouts, layout, what=what))


def ready(network: nn.Module, device: torch.device) -> nn.Module:
    """``network`` as it is used where it is not trained: in evaluation mode, without gradients, on ``device``.

    On a CPU the weights of its convolutions are put in the order in which they are used there.

    Raises:
        CheckpointError: what was loaded into it cannot be used.
    """
    import torch

    check_usable(network)
    network = network.eval().requires_grad_(False).to(device)
    return network.to(memory_format=torch.channels_last) if device.type == "cpu" else network


def check_usable(network: nn.Module) -> None:
    """Ask ``network``, if it can tell, whether what was loaded into it can be used: its method ``check_usable``.

    Raises:
        CheckpointError: it cannot.
    """
    check = getattr(network, "check_usable", None)
    if check is not None:
        check()


def identities(records: Mapping[str, Mapping[str, str]]) -> dict[str, Identity]:
    """Identities by name from what a manifest (``Manifest.frozen``) or a description says."""
    return {name: Identity.from_json(record) for name, record in records.items()}


def check_same(before: Mapping[str, Identity], now: Mapping[str, Identity], where: Path, remedy: str) -> None:
    """Compare the networks that were used with those that are about to be used; names in one of them only are fine.

    Args:
        where: the run, checkpoint or directory that was made with ``before``.
        remedy: what to do, beside restoring the weights: a sentence.

    Raises:
        CheckpointError: weights were replaced; names the first, both identities, and the remedy.
    """
    for name in sorted(before.keys() & now.keys()):
        if not before[name].same(now[name]):
            raise CheckpointError(
                f"The weights of {name!r} were replaced: {where} was made with {before[name]}, the configured path now "
                f"holds {now[name]}. Restore the former (they may lie anywhere: correct the path), or {remedy}"
            )
