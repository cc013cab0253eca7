"""Finding damage in a folder of shards, and repairing what can be repaired."""

import functools
import hashlib
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megavar.data.progress import PROGRESS, in_processes
from megavar.data.shards.index import RECORD, build_index, encode_index, index_path
from megavar.data.shards.listing import Listing
from megavar.data.shards.manifest import FILE_NAME, Manifest, ShardEntry, read_manifest, write_manifest
from megavar.data.shards.writing import Plan, shard_is_whole, shard_name, write_shard
from megavar.data.source import DamagedSampleError
from megavar.data.transforms import decode
from megavar.errors import DataError
from megavar.storage import sha256_of_file, write_bytes_atomic


@dataclass(frozen=True)
class Problem:
    """Something that is not as the manifest says."""

    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


@dataclass(frozen=True)
class _Findings:
    problems: list[Problem]
    key_hashes: np.ndarray
    """int64 [n]: a hash of every key, to find duplicates between shards."""


def verify_shards(
    folder: Path, *, full: bool, processes: int = 1, progress: Callable[[int], Any] = lambda samples: None
) -> list[Problem]:
    """Compare a folder of shards with its manifest.

    Args:
        full: read everything: hashes of tars and indexes, the members of each tar, agreement of index and tar, every
            image decoded, class range and histogram, duplicate keys. Otherwise presence and sizes only.
        progress: called with a number of verified samples.

    Raises:
        DataError: there is no manifest, or it is damaged itself.
    """
    manifest = read_manifest(folder)
    problems = [
        Problem(path.name, "not mentioned in the manifest")
        for path in sorted(folder.iterdir())
        if path.suffix in (".tar", ".idx") and path.with_suffix(".tar").name not in {s.file for s in manifest.shards}
    ]
    if not full:
        for entry in manifest.shards:
            problems += _quick_problems(folder, entry)
            progress(entry.samples)
        return problems
    check = functools.partial(_full_check, folder, manifest)
    found: dict[int, _Findings] = {}
    for shard, findings in in_processes(check, range(len(manifest.shards)), processes):
        found[shard] = findings
        progress(manifest.shards[shard].samples)
    for shard in range(len(manifest.shards)):
        problems += found[shard].problems
    keys = np.sort(np.concatenate([findings.key_hashes for findings in found.values()]))
    if duplicates := int((keys[1:] == keys[:-1]).sum()):
        problems.append(Problem("manifest.json", f"{duplicates} keys occur more than once in the shards"))
    return problems


def _quick_problems(folder: Path, entry: ShardEntry) -> list[Problem]:
    problems = []
    index = index_path(folder / entry.file)
    expected_index_bytes = len(encode_index(np.zeros(0, dtype=RECORD))) + entry.samples * RECORD.itemsize
    for path, size in ((folder / entry.file, entry.bytes), (index, expected_index_bytes)):
        if not path.is_file():
            problems.append(Problem(path.name, "missing"))
        elif path.stat().st_size != size:
            problems.append(Problem(path.name, f"{path.stat().st_size} bytes instead of {size}"))
    return problems


def _full_check(folder: Path, manifest: Manifest, shard: int) -> _Findings:
    entry = manifest.shards[shard]
    path = folder / entry.file
    problems = _quick_problems(folder, entry)
    damaged = {problem.file for problem in problems}
    index = index_path(path)
    if index.name not in damaged and sha256_of_file(index) != entry.index_sha256:
        problems.append(Problem(index.name, "its hash is not the one in the manifest"))
    if not path.is_file():
        return _Findings(problems, np.zeros(0, dtype=np.int64))
    if path.name not in damaged and sha256_of_file(path) != entry.sha256:
        problems.append(Problem(path.name, "its hash is not the one in the manifest"))
    try:
        records, keys = build_index(path)
    except DataError as error:
        return _Findings([*problems, Problem(path.name, str(error))], np.zeros(0, dtype=np.int64))
    problems += [Problem(path.name, message) for message in _content_problems(path, manifest, entry, records, keys)]
    hashes = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys]
    return _Findings(problems, np.frombuffer(b"".join(hashes), dtype=np.int64))


def _content_problems(
    path: Path, manifest: Manifest, entry: ShardEntry, records: np.ndarray, keys: list[str]
) -> list[str]:
    messages = []
    if hashlib.sha256(encode_index(records)).hexdigest() != entry.index_sha256:
        messages.append("its samples do not agree with its index")
    if (len(keys), keys[0], keys[-1]) != (entry.samples, entry.first_key, entry.last_key):
        messages.append(
            f"{len(keys)} samples {keys[0]}..{keys[-1]} instead of {entry.samples} samples "
            f"{entry.first_key}..{entry.last_key}"
        )
    labels = Counter(records["label"].tolist())
    if {str(label): count for label, count in labels.items()} != entry.class_histogram:
        messages.append("its class histogram is not the one in the manifest")
    if manifest.class_names and not all(0 <= label < len(manifest.class_names) for label in labels):
        messages.append(f"it has classes outside 0..{len(manifest.class_names) - 1}")
    with path.open("rb") as file:
        for record, key in zip(records, keys):
            file.seek(int(record["image_offset"]))
            try:
                decode(file.read(int(record["image_size"])))
            except DamagedSampleError as error:
                messages.append(f"sample {key}: {error}")
    return messages


def repair_shards(folder: Path, *, source: Listing | None = None) -> list[str]:
    """Repair what can be repaired.

    An index is rebuilt from a tar whose hash is right. A tar that is damaged or missing is made again from the
    originals, if they are given and are those that the manifest describes. Nothing is replaced unless the result has
    the hash that the manifest demands.

    Returns:
        what was done, one line per file.

    Raises:
        DataError: the manifest is damaged, or something cannot be repaired (after repairing the rest).
    """
    manifest = read_manifest(folder)
    done, hopeless = [], []
    plan = _original_plan(manifest, source) if source is not None else None
    for shard, entry in enumerate(manifest.shards):
        path = folder / entry.file
        if shard_is_whole(folder, entry):
            continue
        if path.is_file() and sha256_of_file(path) == entry.sha256:
            write_bytes_atomic(index_path(path), encode_index(build_index(path)[0]))
            done.append(f"{index_path(path).name}: rebuilt from {path.name}")
        elif plan is not None:
            done.append(_rewrite(plan, shard, folder, entry))
        else:
            hopeless.append(path.name)
    if hopeless:
        raise DataError(
            f"{', '.join(hopeless)} in {folder} can only be made again from the originals: give the path that the "
            f"shards were made from as --source. Repaired: {', '.join(done) or 'nothing'}."
        )
    return done


def _original_plan(manifest: Manifest, source: Listing) -> Plan:
    arguments = manifest.arguments
    if "shards" not in arguments:
        raise DataError("These shards were made by another tool, so megavar cannot make them again from originals.")
    plan = Plan(source, arguments["shards"], arguments["seed"], arguments["damaged"])
    if plan.arguments() != arguments:
        raise DataError(
            f"{source.root} is not what the shards were made from: it lists {len(source.originals)} images (manifest: "
            f"{arguments['listed']}), and paths, classes or captions differ. Give the original folder or file."
        )
    return plan


def _rewrite(plan: Plan, shard: int, folder: Path, entry: ShardEntry) -> str:
    """Make a shard aside, and put it in place only if it has the right hash."""
    aside = folder / PROGRESS / "repair"
    made = write_shard(plan, plan.permutation(), shard, aside)
    if made != entry:
        raise DataError(
            f"{entry.file} made again from {plan.listing.root} differs from the manifest: the originals have changed "
            f"since. The result is kept in {aside}; the damaged file is untouched."
        )
    for name in (shard_name(shard), index_path(Path(shard_name(shard))).name):
        (aside / name).replace(folder / name)
    shutil.rmtree(folder / PROGRESS)
    return f"{entry.file}: made again from {plan.listing.root}"


def adopt_shards(
    folder: Path,
    *,
    class_names: list[str] | None = None,
    processes: int = 1,
    progress: Callable[[int], Any] = lambda samples: None,
) -> Manifest:
    """Give the WebDataset tars of another tool an index and a manifest. The tars are not changed.

    Args:
        class_names: names of the classes; by default their numbers.

    Raises:
        DataError: there are no tars, there is a manifest already, or a tar is damaged.
    """
    if (folder / FILE_NAME).exists():
        raise DataError(f"{folder} has a {FILE_NAME} already. Remove it first if it does not describe these shards.")
    files = sorted(path.name for path in folder.glob("*.tar"))
    if not files:
        raise DataError(f"{folder} contains no .tar files. Name the folder of the WebDataset shards.")
    entries: dict[int, ShardEntry] = {}
    for shard, entry in in_processes(functools.partial(_adopt, folder, files), range(len(files)), processes):
        entries[shard] = entry
        progress(1)
    largest = max(int(label) for entry in entries.values() for label in entry.class_histogram)
    names = class_names if class_names is not None else [str(label) for label in range(largest + 1)]
    if largest >= len(names):
        raise DataError(f"The shards in {folder} have class {largest}, but only {len(names)} class names were given.")
    manifest = Manifest({"kind": "existing"}, names, [entries[shard] for shard in range(len(files))])
    write_manifest(folder, manifest)
    return manifest


def _adopt(folder: Path, files: list[str], shard: int) -> ShardEntry:
    path = folder / files[shard]
    records, keys = build_index(path)
    index = encode_index(records)
    write_bytes_atomic(index_path(path), index)
    labels = Counter(records["label"].tolist())
    return ShardEntry(
        file=path.name,
        samples=len(keys),
        bytes=path.stat().st_size,
        sha256=sha256_of_file(path),
        index_sha256=hashlib.sha256(index).hexdigest(),
        first_key=keys[0],
        last_key=keys[-1],
        class_histogram={str(label): labels[label] for label in sorted(labels)},
    )
