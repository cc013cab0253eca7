"""The manifest of a checkpoint: what it holds and how to tell that it is whole.

A directory is a checkpoint if and only if it holds a ``manifest.json`` whose own checksum, and the size and SHA-256 of
every file it lists, are right. torch's distributed checkpoint loads a file with a flipped bit without complaint
(notes/trainers.md §4.2), so nothing is read before it was verified.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megavar import storage
from megavar.errors import CheckpointError

T = TypeVar("T")
_STEP = re.compile(r"step-(\d{8,})(?:\.|$)")
_NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*")
"""Names of files lie in the checkpoint itself, never elsewhere."""

FILE_NAME = "manifest.json"
FORMAT = 2
"""What is written. 1: until commit 9f0263a; 2: with ``frozen``. All formats up to this one are read."""
READ_AGAIN_SECONDS = (1.0, 5.0)
"""A network file system that fails to read is asked once more after each of these pauses before its word counts."""


class DamagedError(Exception):
    """A checkpoint directory that is not whole; the text names the file and what is wrong with it."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    name: str
    """Path relative to the checkpoint."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ModuleEntry:
    """One trained module of a checkpoint."""

    tensors: dict[str, list[int]]
    """Full shape of every logical tensor by name."""
    step: int
    """Optimizer steps taken."""
    step_exceptions: dict[str, int] = field(default_factory=dict)
    """Optimizer steps of the tensors that took another number of them (ZeRO-0: those that once had no gradient)."""
    buffers: list[str] = field(default_factory=list)
    """Names of the persistent buffers."""
    has_average: bool = False
    """Whether an exponential moving average of the weights is stored."""
    has_moments: bool = True
    """Whether the optimizer's moments are stored; converted weights have none, and training starts with zeros."""

    @property
    def identity(self) -> str:
        """Hash of names and shapes: equal for equal architectures."""
        return hashlib.sha256(json.dumps(self.tensors, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """Everything a reader must know before it opens a shard."""

    step: int
    """Trainer steps taken."""
    modules: dict[str, ModuleEntry]
    state: dict[str, Any]
    """The trainer's scalars, JSON."""
    layout: dict[str, Any] = field(default_factory=dict)
    """World size, parallel sizes and ZeRO stage of the run that wrote it. For people: any layout can load it."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Library versions, git revision, hash of the resolved configuration, time."""
    files: tuple[FileEntry, ...] = ()
    frozen: dict[str, dict[str, str]] = field(default_factory=dict)
    """Identity of every frozen network of the run by name, as :class:`megavar.frozen.Identity` writes it."""
    format: int = FORMAT


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest`` into ``directory``, atomically and durably."""
    content = asdict(manifest)
    content["files"] = [asdict(entry) for entry in manifest.files]
    for name, module in manifest.modules.items():
        content["modules"][name]["identity"] = module.identity
    content = json.loads(json.dumps(content))  # as a reader will see it: lists for tuples, strings for keys
    storage.write_json_atomic(directory / FILE_NAME, {"checksum": _checksum(content), **content})


def read(directory: Path) -> Manifest:
    """Read and check the manifest of ``directory``, and the presence and size of every file it lists.

    Raises:
        DamagedError: the manifest or a listed file is missing or wrong.
        CheckpointError: a newer version wrote it. Nothing is wrong with it, so an older one must not take its place.
    """
    path = directory / FILE_NAME
    try:
        content = json.loads(_patiently(path.read_bytes))
        checksum = content.pop("checksum")
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} is not a manifest ({error})") from None
    if _checksum(content) != checksum:
        raise DamagedError(f"{path} does not match its own checksum")
    try:
        manifest = _decode(path, content)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} is not a manifest ({error})") from None
    named = _STEP.match(directory.name)
    if named and int(named[1]) != manifest.step:
        raise DamagedError(f"{directory} was renamed: its manifest is that of step {manifest.step}")
    for entry in manifest.files:
        if not _NAME.fullmatch(entry.name):
            raise DamagedError(f"{path} lists {entry.name!r}, which is no file of a checkpoint")
        _check_size(directory, entry)
    return manifest


def _decode(path: Path, content: dict[str, Any]) -> Manifest:
    if content["format"] > FORMAT:
        by = content.get("provenance", {})
        raise CheckpointError(
            f"{path} was written by a newer megavar (version {by.get('megavar', 'unknown')}, commit "
            f"{by.get('commit') or 'unknown'}): it has format {content['format']}, this version reads formats 1 to "
            f"{FORMAT}. Use that version, or continue the run in a copy of its directory without this checkpoint."
        )
    for module in content["modules"].values():
        module.pop("identity")
    modules = {name: ModuleEntry(**module) for name, module in content["modules"].items()}
    files = tuple(FileEntry(**entry) for entry in content["files"])
    return Manifest(**content | {"modules": modules, "files": files, "format": FORMAT})


def _patiently(read: Callable[[], T]) -> T:
    for pause in READ_AGAIN_SECONDS:
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(pause)
    return read()


def _check_size(directory: Path, entry: FileEntry) -> None:
    path = directory / entry.name
    try:
        size = _patiently(path.stat).st_size
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    if size != entry.bytes:
        raise DamagedError(f"{path} has {size} bytes instead of {entry.bytes}")


def describe_file(directory: Path, name: str) -> FileEntry:
    """Size and hash of ``directory/name`` as it is now."""
    path = directory / name
    return FileEntry(name, path.stat().st_size, storage.sha256_of_file(path))


def damage(directory: Path, entries: Iterable[FileEntry], threads: int = 8) -> str | None:
    """The first thing wrong with ``entries`` (presence, size, content), or None. Reads every byte, in threads."""

    def check(entry: FileEntry) -> str | None:
        try:
            _check_size(directory, entry)
            actual = _patiently(lambda: storage.sha256_of_file(directory / entry.name))
        except (DamagedError, OSError) as error:
            return str(error)
        if actual != entry.sha256:
            return (
                f"{directory / entry.name} has changed since it was written: its SHA-256 begins with {actual[:12]} "
                f"instead of {entry.sha256[:12]}"
            )
        return None

    with ThreadPoolExecutor(max_workers=threads) as pool:
        return next((problem for problem in pool.map(check, entries) if problem), None)
