"""Writing shards: parallel, resumable after kill -9 at any moment, and always the same bytes.

While work is under way the folder contains ``.progress/``: ``plan.json`` (what is being made), temporary files, and one
``shard-000000.json`` per finished shard, written after its tar and index are in place. A rerun keeps the finished
shards whose hashes still agree and makes the others. The last act is the manifest; then ``.progress`` is removed.
"""

import codecs
import functools
import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from megavar.data.captions import decode_caption
from megavar.data.image_folder import IMAGE_SUFFIXES
from megavar.data.progress import PROGRESS, in_processes, only_one, publish, read_record
from megavar.data.shards.checksum import FORMAT, KEY, checksum, crc_of
from megavar.data.shards.index import RECORD, encode_index, index_path
from megavar.data.shards.listing import Damaged, Listing, Original
from megavar.data.shards.manifest import FILE_NAME, Manifest, ShardEntry, read_manifest
from megavar.data.source import DamagedSampleError
from megavar.data.transforms import decode
from megavar.errors import DataError
from megavar.parallel.seeds import random_bits
from megavar.storage import atomic_file, refuse_link, remove, sha256_of_file, write_bytes_atomic, write_json_atomic

PLAN = "plan.json"


@dataclass(frozen=True)
class Plan:
    """What a folder of shards will contain; everything that its bytes depend on."""

    listing: Listing
    shards: int
    seed: int = 0
    damaged: Damaged = "fail"
    version: int = FORMAT
    """Format of samples and indexes (``checksum.py``)."""

    def arguments(self) -> dict[str, Any]:
        """The part of the plan that the manifest records."""
        version = {} if self.version == 1 else {"format": self.version}
        return version | {
            "kind": self.listing.kind,
            "listing_sha256": self.listing.sha256(),
            "listed": len(self.listing.originals),
            "shards": self.shards,
            "seed": self.seed,
            "damaged": self.damaged,
        }

    def permutation(self) -> np.ndarray:
        """int64 [N]: which original stands at each place."""
        bits = random_bits(self.seed, "shards", torch.arange(len(self.listing.originals)))
        return torch.sort(bits, stable=True).indices.numpy()

    def places(self, shard: int) -> range:
        """The places of the permutation that ``shard`` holds."""
        count = len(self.listing.originals)
        return range(shard * count // self.shards, (shard + 1) * count // self.shards)


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"shard-{shard:06d}.tar"


class _HashingFile(io.RawIOBase):
    """Passes writes on and hashes them."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.size


def _members(root: Path, original: Original, version: int) -> dict[str, bytes]:
    """Extension -> content of the members of one sample, in the order of the tar.

    Raises:
        DamagedSampleError: the image cannot be read or decoded.
    """
    if original.problem is not None:
        raise DamagedSampleError(original.problem)
    suffix = Path(original.path).suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise DamagedSampleError(f"its name does not end in {', '.join(IMAGE_SUFFIXES)}")
    try:
        image = (root / original.path).read_bytes()
        caption = original.caption
        if original.caption_path is not None:
            path = root / original.caption_path
            key = "caption" if path.suffix == ".json" else None
            caption = decode_caption(path.read_bytes().removeprefix(codecs.BOM_UTF8), key=key).strip()
    except OSError as error:
        raise DamagedSampleError(f"it cannot be read ({error.strerror})") from error
    width, height = decode(image).size
    facts = {"height": height, "path": original.path, "sha256": hashlib.sha256(image).hexdigest(), "width": width}
    members = {"jpg" if suffix == ".jpeg" else suffix[1:]: image}
    if original.label >= 0:
        members["cls"] = str(original.label).encode()
    if caption is not None:
        members["txt"] = caption.encode()
    if version >= 2:
        facts[KEY] = checksum(members, facts)
    members["json"] = json.dumps(facts).encode()
    return dict(sorted(members.items()))


def _add_sample(
    tar: tarfile.TarFile, key: str, label: int, members: dict[str, bytes], version: int
) -> np.ndarray:
    """Append one sample and return its index record."""
    record = np.zeros((), dtype=RECORD)
    record["label"] = label
    image = next(content for name, content in members.items() if name not in ("cls", "json", "txt"))
    record["crc32"] = crc_of(image, members.get("txt", b""), version)
    for extension, content in members.items():
        header = tarfile.TarInfo(f"{key}.{extension}")  # mtime, uid and gid are 0, mode is 0644
        header.size = len(content)
        offset = tar.offset + tarfile.BLOCKSIZE
        tar.addfile(header, io.BytesIO(content))
        if extension == "txt":
            record["caption_offset"], record["caption_size"] = offset, len(content)
        elif extension not in ("cls", "json"):
            record["image_offset"], record["image_size"] = offset, len(content)
    return record


def write_shard(plan: Plan, permutation: np.ndarray, shard: int, folder: Path) -> ShardEntry:
    """Write one tar and its index into ``folder``.

    Raises:
        DamagedSampleError: an original is damaged and the plan does not allow leaving it out.
        DataError: nothing is left.
    """
    records, keys, left_out = [], [], []
    path = folder / shard_name(shard)
    temporary = folder / PROGRESS / path.name
    with atomic_file(temporary) as file:
        hashing = _HashingFile(file)
        with tarfile.open(fileobj=hashing, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
            for place in plan.places(shard):
                original = plan.listing.originals[permutation[place]]
                try:
                    members = _members(plan.listing.root, original, plan.version)
                except DamagedSampleError as error:
                    if plan.damaged == "fail":
                        raise DamagedSampleError(f"{plan.listing.root / original.path} is damaged: {error}") from error
                    left_out.append(f"{original.path}: {error}")
                    continue
                records.append(_add_sample(tar, f"{place:09d}", original.label, members, plan.version))
                keys.append(f"{place:09d}")
    if not records:
        raise DataError(f"Every image of {path.name} is damaged, for example {left_out[0]}. Use fewer shards.")
    index = encode_index(np.stack(records), plan.version)
    write_bytes_atomic(folder / PROGRESS / index_path(path).name, index)
    publish(folder, path.name, index_path(path).name)
    counts = Counter(int(record["label"]) for record in records)
    return ShardEntry(
        file=path.name,
        samples=len(records),
        bytes=hashing.size,
        sha256=hashing.digest.hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
        first_key=keys[0],
        last_key=keys[-1],
        class_histogram={str(label): counts[label] for label in sorted(counts)},
        left_out=left_out,
    )


def shard_is_whole(folder: Path, entry: ShardEntry) -> bool:
    """Whether the tar and the index of ``entry`` are there and have the recorded hashes."""
    path = folder / entry.file
    if not path.is_file() or not index_path(path).is_file() or path.stat().st_size != entry.bytes:
        return False
    return sha256_of_file(path) == entry.sha256 and sha256_of_file(index_path(path)) == entry.index_sha256


def _record_name(shard: int) -> str:
    return f"{Path(shard_name(shard)).stem}.json"


def _finished(folder: Path, shard: int) -> ShardEntry | None:
    record = read_record(folder, _record_name(shard))
    return None if record is None else ShardEntry(**record)


def _finish_shard(plan: Plan, permutation: np.ndarray, folder: Path, shard: int) -> int:
    entry = _finished(folder, shard)
    if entry is None or not shard_is_whole(folder, entry):
        try:
            entry = write_shard(plan, permutation, shard, folder)
        except DamagedSampleError as error:
            raise DataError(
                f"{error}. Replace it by a whole image and run the same command again, or run it with --damaged "
                f"leave-out to make shards without such images, which the manifest then lists."
            ) from error
        write_json_atomic(folder / PROGRESS / _record_name(shard), asdict(entry))
    return len(plan.places(shard))


def write_shards(
    plan: Plan,
    folder: Path,
    *,
    processes: int = 1,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int], Any] = lambda samples: None,
) -> Manifest | None:
    """Make the shards of ``plan`` in ``folder``, continuing what an interrupted run has left.

    Args:
        part: (i, n): make only shards i, i + n, ...; n machines with one part each share the work.
        progress: called with a number of finished originals.

    Returns:
        the manifest, or None if other parts are not finished yet.

    Raises:
        DataError: the folder holds something else, or an original is damaged.
    """
    plan = replace(plan, version=_version_of(folder, plan.version))
    arguments = plan.arguments()
    _claim(folder, arguments)
    own = range(part[0], plan.shards, part[1])
    if (folder / FILE_NAME).exists():
        progress(sum(len(plan.places(shard)) for shard in own))
        return read_manifest(folder)
    finish = functools.partial(_finish_shard, plan, plan.permutation(), folder)
    with only_one(folder / PROGRESS / f"lock-{part[0]}"):
        for _, originals in in_processes(finish, own, processes):
            progress(originals)
    with only_one(folder / PROGRESS / "lock-end"):  # parts may finish at the same time
        if not (folder / FILE_NAME).exists():
            entries = [entry for shard in range(plan.shards) if (entry := _finished(folder, shard)) is not None]
            if len(entries) < plan.shards:
                return None
            manifest = Manifest(arguments, list(plan.listing.class_names), entries)
            write_bytes_atomic(folder / PROGRESS / FILE_NAME, manifest.encode())
            publish(folder, FILE_NAME)
        remove(folder / PROGRESS)
    return read_manifest(folder)


def _version_of(folder: Path, new: int) -> int:
    """The format in which work in ``folder`` was begun, or ``new``."""
    if (folder / FILE_NAME).exists():
        return read_manifest(folder).version
    under_way = read_record(folder, PLAN)
    return new if under_way is None else under_way.get("format", 1)


def _claim(folder: Path, arguments: dict[str, Any]) -> None:
    """Make sure that ``folder`` is empty or holds work with the same arguments."""
    refuse_link(folder / PROGRESS, DataError)
    under_way = read_record(folder, PLAN)
    if (folder / FILE_NAME).exists():
        found = read_manifest(folder).arguments
        remove(folder / PROGRESS)  # killed between the manifest and the clean-up
    elif under_way is not None:
        # What is finished under ``fail`` has nothing left out: the rest may be made under ``leave-out``.
        found = under_way | ({"damaged": arguments["damaged"]} if under_way["damaged"] == "fail" else {})
        if found == arguments != under_way:
            write_json_atomic(folder / PROGRESS / PLAN, arguments)
    elif folder.exists() and any(path.suffix in (".tar", ".idx") for path in folder.iterdir()):
        raise DataError(
            f"{folder} contains shards, but neither a {FILE_NAME} nor work of this tool under way. Choose an empty "
            f"folder; to use shards that are there, run with --existing {folder}."
        )
    else:
        write_json_atomic(folder / PROGRESS / PLAN, arguments)
        return
    if found != arguments:
        differing = ", ".join(
            f"{key} {found.get(key)!r} -> {value!r}" for key, value in arguments.items() if found.get(key) != value
        )
        raise DataError(
            f"{folder} holds shards made with other arguments or other originals ({differing}). Choose another folder, "
            f"or delete this one to start anew."
        )
