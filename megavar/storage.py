"""Files that are either whole or absent: temporary file, fsync, rename. Nothing here writes or deletes through a link.

A symbolic link in a folder of ours may lead into another run, or anywhere: a link is replaced or unlinked, and what it
points at stays as it is.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megavar.errors import MegavarError

_log = logging.getLogger(__name__)


def fsync_directory(path: Path) -> None:
    """Make renames inside the directory ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears under ``path`` only if the block ends without an exception."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``: a reader sees the old file or the new one, never a part."""
    with atomic_file(path) as file:
        file.write(content)


def write_text_atomic(path: Path, text: str) -> None:
    """Write UTF-8 ``text`` to ``path`` atomically."""
    write_bytes_atomic(path, text.encode())


def write_json_atomic(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path`` atomically."""
    write_text_atomic(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def remove(path: Path) -> None:
    """Delete a file, a link (never what it points at) or a whole directory; what cannot be deleted stays."""
    path = Path(path)
    if path.is_symlink() or not path.is_dir():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)  # unlinks the links inside


def drop_link(path: Path) -> None:
    """Unlink ``path`` if it is a link, because a file is about to be written there."""
    if Path(path).is_symlink():
        _log.warning("%s is a symbolic link: a file of its own begins in its place.", path)
        Path(path).unlink(missing_ok=True)


def open_to_append(path: Path) -> io.FileIO:
    """Open a file for appending, unbuffered, a new one where there is none or a link."""
    drop_link(path)
    return io.FileIO(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644), "a")


def append_line(path: Path, text: str) -> None:
    """Append one line of UTF-8 ``text``."""
    with open_to_append(path) as file:
        file.write(f"{text}\n".encode())


_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")
_LEFT_FOR = 3600.0


def remove_leftovers(directory: Path) -> None:
    """Remove temporary files that :func:`atomic_file` left in ``directory`` when its process was killed.

    Younger ones than an hour stay: another process may still be writing them.
    """
    for path in Path(directory).iterdir() if Path(directory).is_dir() else ():
        with contextlib.suppress(OSError):
            if _TEMPORARY.fullmatch(path.name) and time.time() - path.lstat().st_mtime > _LEFT_FOR:
                path.unlink()


def link(path: Path, target: str) -> None:
    """Let ``path`` be a link to ``target``, relative to its folder; a former link is replaced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.symlink_to(target)
    temporary.replace(path)


def refuse_link(path: Path, kind: type[MegavarError]) -> None:
    """Make sure that ``path``, in which files are about to be made, is not a link to somewhere else.

    Raises:
        MegavarError: of type ``kind``: it is.
    """
    if Path(path).is_symlink():
        raise kind(f"{path} is a symbolic link, and nothing is written through it. Remove it, and start again.")


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of the content of ``path``."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
