"""``manifest.json``: what a shard folder contains, with its own checksum."""

import functools
import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megavar.data.captions import Member
from megavar.data.shards import checksum
from megavar.errors import DataError
from megavar.storage import write_bytes_atomic

FORMAT = "megavar shards 1"
FILE_NAME = "manifest.json"


_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@,-]*\.tar")


def is_plain_name(file: str) -> bool:
    """Whether ``file`` may be the name of a shard: nothing that a shell, a URL or a file system takes for more."""
    return isinstance(file, str) and _FILE.fullmatch(file) is not None


@dataclass(frozen=True)
class ShardEntry:
    """One shard."""

    file: str
    """Its plain name: it lies in the folder of the manifest, or where ``data.source.url`` says."""
    samples: int
    bytes: int
    sha256: str
    index_sha256: str
    first_key: str
    last_key: str
    class_histogram: dict[str, int]
    """Samples per class index (decimal), classes without samples left out; -1 counts samples without class."""
    left_out: list[str] = field(default_factory=list)
    """Originals that could not be decoded when the shard was made, as ``path: reason``."""


@dataclass(frozen=True)
class Manifest:
    """The whole folder."""

    arguments: dict[str, Any]
    """How the shards were made; the same arguments and originals give the same bytes."""
    class_names: list[str]
    shards: list[ShardEntry]

    @property
    def version(self) -> int:
        """Format of samples and indexes (``checksum.py``)."""
        return self.arguments.get("format", 1)

    @property
    def foreign(self) -> bool:
        """Whether another tool has written the tars."""
        return self.arguments.get("kind") == "existing"

    @property
    def captions(self) -> Member:
        """The member of a sample that holds its caption."""
        member: Member = self.arguments.get("captions", "txt")
        return member

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    def summary(self) -> str:
        """Numbers of images, shards and classes, and how evenly images are spread over classes."""
        text = f"{self.samples} images in {len(self.shards)} shards"
        if not self.class_names:
            return f"{text}, without classes"
        counts = self.class_histogram
        balance = sorted(counts.get(str(label), 0) for label in range(len(self.class_names)))
        spread = f"{balance[0]} to {balance[-1]}" if balance[0] != balance[-1] else f"{balance[0]}"
        return f"{text}, {len(self.class_names)} classes of {spread} images"

    @property
    def class_histogram(self) -> dict[str, int]:
        """Samples of each class over all shards, as in :class:`ShardEntry`."""
        histogram: Counter[str] = Counter()
        for shard in self.shards:
            histogram.update(shard.class_histogram)
        return {label: histogram[label] for label in sorted(histogram, key=int)}

    def encode(self) -> bytes:
        """The one byte sequence that represents this manifest: JSON, one line per key and per shard."""
        return self._encoded

    @functools.cached_property
    def _encoded(self) -> bytes:
        content: dict[str, Any] = {
            "format": FORMAT,
            "arguments": self.arguments,
            "samples": self.samples,
            "bytes": sum(shard.bytes for shard in self.shards),
            "class_names": self.class_names,
            "class_histogram": self.class_histogram,
            "left_out": [reason for shard in self.shards for reason in shard.left_out],
        }
        lines = [f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in content.items()]
        shards = ",\n".join(f"  {json.dumps(vars(shard))}" for shard in self.shards)
        body = "".join(["{\n", *lines, ' "shards": [\n', shards, "\n ],\n"]).encode()
        return body + f' "checksum": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()

    @property
    def checksum(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(self._encoded).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of ``folder`` atomically."""
    write_bytes_atomic(folder / FILE_NAME, manifest.encode())


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a shard folder.

    Raises:
        DataError: there is none, or any of its bits is not as written.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise DataError(
            f"{folder} has no {FILE_NAME}, so it is not a finished folder of shards. Make shards with "
            f"tools/shard_images.py (run it again if it was interrupted), or give existing tars a manifest with its "
            f"--existing option."
        )
    raw = path.read_bytes()
    damaged = DataError(
        f"{path} is damaged: its content does not agree with its checksum. Restore it from a copy, or make the shards "
        f"again in another folder with tools/shard_images.py."
    )
    try:
        content = json.loads(raw)
        manifest = Manifest(
            arguments=content["arguments"],
            class_names=content["class_names"],
            shards=[ShardEntry(**entry) for entry in content["shards"]],
        )
        same = manifest.encode() == raw
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged from error
    if not same:
        raise damaged
    _check_entries(path, manifest)
    return manifest


def _check_entries(path: Path, manifest: Manifest) -> None:
    """A checksum shows damage, not good will: whoever made the shards made it, too."""
    if not isinstance(manifest.arguments, dict) or manifest.version not in range(1, checksum.FORMAT + 1):
        raise DataError(f"{path} describes shards of a format that this version of megavar does not know. Update it.")
    for entry in manifest.shards:
        if not is_plain_name(entry.file):
            raise DataError(
                f"{path} names the shard {entry.file!r}. Shards are files of the folder itself, with letters, digits "
                f"and . _ - + = @ , in their names. Do not use these shards unless you know who made them."
            )
        numbers = (entry.samples, entry.bytes)
        texts = (entry.sha256, entry.index_sha256, entry.first_key, entry.last_key, *entry.left_out)
        if not all(type(number) is int and number > 0 for number in numbers) or not all(
            isinstance(text, str) for text in texts
        ):
            raise DataError(f"{path} does not say in numbers and texts what {entry.file} holds. Make the shards again.")
    twice = [file for file, times in Counter(entry.file for entry in manifest.shards).items() if times > 1]
    if twice or not manifest.shards:
        problem = f"names {twice[0]} twice" if twice else "names no shards"
        raise DataError(f"{path} {problem}. Make the shards again in another folder with tools/shard_images.py.")
