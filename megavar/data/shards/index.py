"""The ``.idx`` file beside a shard: where each sample's image and caption lie, for random access.

Format, little endian: 16 bytes ``megavar index 2\\n``, the number of samples as uint64, 8 zero bytes, then per sample,
in the order of the tar, a record of 32 bytes (:data:`RECORD`). Sizes are in bytes, offsets count from the start of the
tar. The CRC-32 of image and caption lets a reader notice damage that a JPEG decoder would accept (``checksum.py``); in
files of format 1 it is of the image alone.
"""

import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megavar.data.captions import Member
from megavar.data.shards.checksum import FORMAT, crc_of
from megavar.errors import DataError

MAGIC = b"megavar index "
HEADER_BYTES = 32
RECORD = np.dtype(
    [
        ("image_offset", "<u8"),
        ("caption_offset", "<u8"),
        ("image_size", "<u4"),
        ("crc32", "<u4"),
        ("caption_size", "<u4"),
        ("label", "<i4"),
    ]
)
"""``label`` is -1 and ``caption_size`` 0 where a sample has none."""
CLASSES = 1_000_000
"""Class numbers are below this: every class has a name in the manifest, so an image number must not pass for one."""
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")


def index_path(shard: Path) -> Path:
    """The index of a shard lies beside it."""
    return shard.with_suffix(".idx")


def encode_index(records: np.ndarray, version: int = FORMAT) -> bytes:
    """The content of an index file for ``records`` of type :data:`RECORD`."""
    return _magic(version) + np.uint64(len(records)).tobytes() + bytes(8) + records.astype(RECORD).tobytes()


def _magic(version: int) -> bytes:
    return MAGIC + f"{version}\n".encode()


@dataclass(frozen=True)
class Index:
    """A decoded index file."""

    records: np.ndarray
    """Of type :data:`RECORD`."""
    version: int

    def agrees(self, place: int, image: bytes, caption: bytes) -> bool:
        """Whether image and caption of the sample at ``place`` are as they were written."""
        return crc_of(image, caption, self.version) == int(self.records[place]["crc32"])


def decode_index(content: bytes, path: Path) -> Index:
    """The ``content`` of the index file ``path``.

    Raises:
        DataError: the file is not a whole index.
    """
    count = int.from_bytes(content[16:24], "little")
    version = next((version for version in range(1, FORMAT + 1) if content[:16] == _magic(version)), None)
    if version is None or len(content) != HEADER_BYTES + count * RECORD.itemsize or count == 0:
        raise DataError(f"{path} is not a whole shard index. Rebuild it with tools/verify_shards.py --repair.")
    return Index(np.frombuffer(content, dtype=RECORD, offset=HEADER_BYTES), version)


@dataclass
class TarSample:
    """The members of one sample in a tar: (offset, size) by extension."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def image(self) -> tuple[int, int] | None:
        """Offset and size of the image."""
        return next((self.members[name] for name in IMAGE_EXTENSIONS if name in self.members), None)


_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}


def _begins(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def walk_tar(path: Path) -> list[TarSample]:
    """Group the members of a WebDataset tar by key: the name up to the first dot of its last component.

    As in webdataset, names without a dot or with one in front (``._0001.jpg`` of a Mac) are no members.

    Raises:
        DataError: the tar is damaged or empty, or a sample has two members of the same name.
    """
    samples: list[TarSample] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not (stem and extension):
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if not samples or samples[-1].key != key:
                    samples.append(TarSample(key))
                if extension.lower() in samples[-1].members:
                    raise DataError(f"{path} has {member.name} twice in a row. Give every sample a key of its own.")
                samples[-1].members[extension.lower()] = (member.offset_data, member.size)
            end = tar.offset
    except tarfile.TarError as error:
        if beginning := next((name for start, name in _COMPRESSED.items() if _begins(path, start)), None):
            raise DataError(
                f"{path} is compressed with {beginning}, which offers no random access. Decompress it first."
            ) from error
        raise DataError(f"{path} is not a whole tar file ({error}). Make it again from the originals.") from error
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read()
    if len(rest) < tarfile.BLOCKSIZE or any(rest):  # tarfile takes a damaged header or a clean cut for the end
        raise DataError(f"{path} breaks off at byte {end}, or is damaged there. Make it again from the originals.")
    if not samples:
        raise DataError(f"{path} contains no samples. Make it again from the originals, or remove it.")
    return samples


def build_index(path: Path, version: int = FORMAT, captions: Member = "txt") -> tuple[np.ndarray, list[str]]:
    """Index an existing shard by walking through it.

    Args:
        version: format of the index.
        captions: the member that holds them; samples with a class have none.

    Returns:
        records of type :data:`RECORD`, and the keys.

    Raises:
        DataError: the tar is damaged, or a sample has no image or a class that is not a class number.
    """
    samples = walk_tar(path)
    records = np.zeros(len(samples), dtype=RECORD)
    with path.open("rb") as file:

        def content(place: tuple[int, int]) -> bytes:
            file.seek(place[0])
            data = file.read(place[1])
            if len(data) != place[1]:
                raise DataError(f"{path} ends before its last sample. Make it again from the originals.")
            return data

        for record, sample in zip(records, samples):
            if sample.image is None:
                raise DataError(f"Sample {sample.key} of {path} has no image ({', '.join(IMAGE_EXTENSIONS)}).")
            record["image_offset"], record["image_size"] = sample.image
            caption = sample.members.get(captions, (0, 0))
            record["caption_offset"], record["caption_size"] = caption
            record["crc32"] = crc_of(content(sample.image), content(caption), version)
            record["label"] = -1
            if "cls" in sample.members:
                label = content(sample.members["cls"]).strip()
                if not label.isdigit() or int(label) >= CLASSES:
                    raise DataError(f"The class of sample {sample.key} of {path} is not a number below {CLASSES}.")
                record["label"] = int(label)
    return records, [sample.key for sample in samples]
