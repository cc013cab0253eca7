"""The directory of checkpoints of a run: names, commit, discovery, retention. Rank 0 only; no process groups here.

``step-00001000/``                 a checkpoint (valid if its manifest is, see manifest.py)
``step-00001000.tmp-<attempt>/``   being written, or left by a run that died
``step-00001000.deleting-<id>/``   being deleted
``step-00001000.replaced-<id>/``   an older checkpoint of the same step, until the new one is in place
``step-00001000.damaged-<id>/``    was found damaged by a run that continued from an older one
``step-00001000.abandoned-<id>/``  newer than the checkpoint a run continued from, though whole
``latest``                         text file with the name of the newest checkpoint: a hint for people and scripts

A checkpoint appears by one rename, after everything in it is on disk. Discovery never trusts ``latest``: it takes the
newest directory with a valid manifest, because a network file system may show one rename without the other.
"""

import logging
import re
import secrets
import time
from pathlib import Path

from megavar import storage
from megavar.errors import CheckpointError
from megavar.training.checkpoint import manifest as manifests
from megavar.training.checkpoint.manifest import DamagedError, Manifest

LATEST = "latest"
_FINAL = re.compile(r"step-(\d{8,})$")
_OTHER = re.compile(r"step-(\d{8,})\.(tmp|deleting|replaced|damaged|abandoned)-\w+$")

_log = logging.getLogger(__name__)


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def is_checkpoint_name(path: Path) -> bool:
    """Whether ``path`` is an existing directory called like a checkpoint; it may be damaged."""
    return _FINAL.match(path.name) is not None and path.is_dir()


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint or of one of its temporary forms."""
    match = _FINAL.match(path.name) or _OTHER.match(path.name)
    assert match, path
    return int(match.group(1))


def list_checkpoints(root: Path) -> list[Path]:
    """Directories of ``root`` that are called a checkpoint, newest step first. They may be damaged."""
    if not root.is_dir():
        return []
    return sorted(filter(is_checkpoint_name, root.iterdir()), key=step_of, reverse=True)


def _list_others(root: Path, *kinds: str) -> list[Path]:
    if not root.is_dir():
        return []
    matches = ((path, _OTHER.match(path.name)) for path in root.iterdir())
    return [path for path, match in matches if match and match.group(2) in kinds]


def _aside(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name.partition('.')[0]}.{kind}-{secrets.token_hex(4)}")


def begin(root: Path, step: int) -> Path:
    """Create the directory in which the checkpoint of ``step`` is going to be written, unique to this attempt."""
    root.mkdir(parents=True, exist_ok=True)
    attempt = _aside(root / checkpoint_name(step), "tmp")
    attempt.mkdir()
    storage.fsync_directory(root)
    return attempt


def commit(attempt: Path) -> Path:
    """Turn a completely written ``attempt`` (manifest included) into the checkpoint; return its final path."""
    root, final = attempt.parent, attempt.parent / checkpoint_name(step_of(attempt))
    storage.fsync_directory(attempt)
    replaced = None
    # An older or damaged checkpoint of the same step, or a link: keep it until the new one is in place.
    if final.exists() or final.is_symlink():
        replaced = _aside(final, "replaced")
        final.rename(replaced)
    attempt.rename(final)
    storage.fsync_directory(root)
    if replaced is not None:
        _delete(replaced)
    return final


def point_latest(final: Path) -> None:
    """Make ``latest`` name ``final``."""
    storage.write_text_atomic(final.parent / LATEST, final.name + "\n")


def _delete(path: Path) -> None:
    """Delete a directory so that a reader never mistakes what is left of it for a checkpoint: manifest first.

    It is renamed before, so that whoever cleans up finishes a deletion that was interrupted. Of a link, the link goes:
    what it points at belongs to somebody else.
    """
    if path.is_symlink():
        path.unlink()
        return
    if not path.match("*.deleting-*"):
        doomed = _aside(path, "deleting")
        path.rename(doomed)
        path = doomed
        storage.fsync_directory(path.parent)
    (path / manifests.FILE_NAME).unlink(missing_ok=True)
    storage.fsync_directory(path)
    storage.remove(path)


def discard(attempt: Path) -> None:
    """Remove a failed attempt, so that it does not fill the disk."""
    storage.remove(attempt)


def set_aside(path: Path, kind: str) -> Path:
    """Rename a checkpoint that the run does not continue from; ``kind`` is ``damaged`` or ``abandoned``."""
    target = _aside(path, kind)
    path.rename(target)
    storage.fsync_directory(path.parent)
    return target


def clean(root: Path) -> None:
    """Remove what a run that died left behind. Call it only while holding the run's lock."""
    for path in _list_others(root, "replaced"):
        final = root / checkpoint_name(step_of(path))
        if not final.exists():  # died between the two renames of a commit
            path.rename(final)
            _log.warning("Restored the checkpoint %s, whose replacement was never completed.", final)
    for path in _list_others(root, "tmp", "deleting", "replaced"):
        _log.info("Removing %s, left by an interrupted run.", path)
        _delete(path)


def move_away(root: Path) -> Path | None:
    """Move all checkpoints of ``root`` out of the way of a fresh start (never deletes); None if there were none."""
    if not root.is_dir() or not any(root.iterdir()):
        return None
    target = root.with_name(f"{root.name}.before-{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(2)}")
    root.rename(target)
    storage.fsync_directory(target.parent)
    return target


def readable(path: Path) -> Manifest | None:
    """The manifest of ``path`` if it and all file sizes are right and this version can read it, else None."""
    try:
        return manifests.read(path)
    except (DamagedError, CheckpointError):
        return None


def prune(root: Path, keep_last: int, keep_every: int, protect: Path) -> list[Path]:
    """Delete old checkpoints, except the last ``keep_last`` and multiples of ``keep_every``.

    Only directories with a readable manifest count towards ``keep_last``, and checkpoints newer than ``protect`` are
    left alone. Set-aside directories go once a checkpoint at least as new as they exists.

    Args:
        root: directory of checkpoints.
        keep_last: how many of the newest readable checkpoints to keep, at least 1; 0 keeps all.
        keep_every: keep steps that are multiples of it; 0 keeps none for that reason.
        protect: the checkpoint whose commit this follows. It must be readable, or nothing is deleted.

    Returns:
        What was deleted.
    """
    if readable(protect) is None:
        _log.warning("Not deleting any old checkpoint, because %s cannot be read back.", protect)
        return []
    deleted = [path for path in _list_others(root, "damaged", "abandoned") if step_of(path) <= step_of(protect)]
    if keep_last:
        older = [path for path in list_checkpoints(root) if step_of(path) < step_of(protect)]
        good = [path for path in older if readable(path) is not None]
        kept = set(good[: keep_last - 1])
        deleted += [path for path in good if path not in kept and not (keep_every and step_of(path) % keep_every == 0)]
    for path in deleted:
        _delete(path)
    return deleted
