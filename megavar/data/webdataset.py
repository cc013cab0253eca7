"""Shards read through their index: random access, so that any order and any resume point is exact."""

import hashlib
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np

from megavar.data.captions import decode_caption
from megavar.data.shards.index import Index, decode_index, index_path
from megavar.data.shards.manifest import Manifest, ShardEntry, read_manifest
from megavar.data.source import DamagedSampleError, Sample, Split
from megavar.errors import ConfigError, DataError

OPEN_FILES = 128
"""Shards that a process keeps open; systems commonly allow a process 1024 files."""
INDEXES = 2048
"""Indexes that a process keeps in memory, 40 kB each for shards of 1250 samples. Mapped files would stay open."""
TAR_HEADER = 512


def read_index(folder: Path, entry: ShardEntry) -> Index:
    """The index of a shard, as the manifest knows it.

    Raises:
        DataError: it is missing or damaged.
    """
    path = index_path(folder / entry.file)
    content = path.read_bytes() if path.is_file() else None
    if content is None or hashlib.sha256(content).hexdigest() != entry.index_sha256:
        raise DataError(
            f"The index {path} is {'missing' if content is None else 'damaged'}. Rebuild it with "
            f"`python -m tools.verify_shards {folder} --repair`."
        )
    return decode_index(content, path)


def caption_key(manifest: Manifest, path: Path, key: str | None) -> str | None:
    """Under which key of the JSON members captions stand; None: they are text.

    Raises:
        ConfigError: that, or whether they are JSON, is not as the index has it.
    """
    if manifest.captions == "txt":
        if key is not None:
            raise ConfigError(
                f"data.source.caption_key={key!r}, but the captions of {path} are in members .txt, as its manifest "
                f"says. Remove the key, or index the tars again with tools/shard_images.py --existing --captions json."
            )
        return None
    if key is None:
        raise ConfigError(
            f"The captions of {path} are in members .json. Set data.source.caption_key to the key that holds them."
        )
    return key


def of_key(key: str | None) -> str:
    """What a fingerprint says of the key of captions."""
    return "" if key is None else f"-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


class ShardFolder:
    """The samples of a folder of shards, in shard order (``megavar/data/shards/__init__.py`` describes the folder)."""

    def __init__(self, split: Split, path: Path, key: str | None = None) -> None:
        """Open ``path``; ``key`` is that of captions in JSON.

        Raises:
            DataError: it is no folder of shards.
            ConfigError: ``key`` does not fit it.
        """
        self.split: Split = split
        self.root = Path(path)
        if not self.root.is_dir():
            raise DataError(
                f"The shard folder {self.root} does not exist. Make it with tools/shard_images.py, or correct the path "
                f"of data.source."
            )
        self.manifest = read_manifest(self.root)
        self.caption_key = caption_key(self.manifest, self.root, key)
        self.class_names = tuple(self.manifest.class_names)
        self.fingerprint = f"shards-{split}-{len(self)}-{self.manifest.checksum[:16]}{of_key(self.caption_key)}"
        self.starts = np.cumsum([0, *(shard.samples for shard in self.manifest.shards)])
        """int64 [shards + 1]: index of the first sample of each shard."""
        self._indexes: OrderedDict[int, Index] = OrderedDict()
        self._files: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 for text-image pairs."""
        return len(self.class_names)

    def __len__(self) -> int:
        return self.manifest.samples

    def read(self, index: int) -> Sample:
        """Sample ``index`` with its encoded image."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        indexed, place = self._index(shard), index - int(self.starts[shard])
        record = indexed.records[place]
        # The tar header before the image names the sample; reading it along costs nothing.
        offset, size = int(record["image_offset"]) - TAR_HEADER, int(record["image_size"])
        content = self._read(shard, offset, TAR_HEADER + size)
        name = content[:100].split(b"\0", 1)[0].decode(errors="replace")
        key = f"{self.manifest.shards[shard].file}/{name}"
        image = content[TAR_HEADER:]
        if len(image) != size:
            raise DamagedSampleError(f"{self._path(shard)} ends before it, at byte {offset + len(content)}")
        text = b""
        if not self.class_names or indexed.version >= 2:
            text = self._read(shard, int(record["caption_offset"]), int(record["caption_size"]))
        if not indexed.agrees(place, image, text):
            raise DamagedSampleError(f"{key}: the image or its caption is not as it was written (checksum)")
        caption = None if self.class_names else decode_caption(text, key, self.caption_key)
        return Sample(key=key, label=int(record["label"]), image=image, caption=caption)

    def _path(self, shard: int) -> Path:
        return self.root / self.manifest.shards[shard].file

    def _index(self, shard: int) -> Index:
        if shard not in self._indexes:
            while len(self._indexes) >= INDEXES:
                self._indexes.popitem(last=False)
            self._indexes[shard] = read_index(self.root, self.manifest.shards[shard])
        self._indexes.move_to_end(shard)
        return self._indexes[shard]

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        parts = []
        while size > 0 and (part := os.pread(self._open(shard), size, offset)):  # may return less than asked for
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)

    def _open(self, shard: int) -> int:
        if self._process != os.getpid():  # a forked worker must not close files of its parent's table by number
            self._files, self._process = OrderedDict(), os.getpid()
        if shard not in self._files:
            while len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            try:
                self._files[shard] = os.open(self._path(shard), os.O_RDONLY)
            except FileNotFoundError as error:
                raise DataError(
                    f"The shard {self._path(shard)} is missing. Mount or restore it, or make it again with "
                    f"`python -m tools.verify_shards {self.root} --repair --source ORIGINALS`."
                ) from error
        self._files.move_to_end(shard)
        return self._files[shard]

    def close(self) -> None:
        """Close the files of this process."""
        if self._process == os.getpid():
            while self._files:
                os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()
