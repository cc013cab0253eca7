"""Finding damage in a folder of shards, and repairing what can be repaired."""

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megavar.data.captions import Member
from megavar.data.progress import PROGRESS, in_processes
from megavar.data.shards.checksum import FORMAT
from megavar.data.shards.index import MAGIC, RECORD, build_index, encode_index, index_path
from megavar.data.shards.listing import Listing, list_originals
from megavar.data.shards.manifest import FILE_NAME, Manifest, ShardEntry, is_plain_name, read_manifest, write_manifest
from megavar.data.shards.writing import Plan, shard_is_whole, write_shard
from megavar.data.source import DamagedSampleError
from megavar.data.transforms import decode
from megavar.errors import DataError
from megavar.storage import fsync_directory, refuse_link, remove, sha256_of_file, write_bytes_atomic

_PACKED = re.compile(r"\.(tgz|tar\.(gz|bz2|xz|zst))$")
_REPAIR = "repair"
"""Where shards are made again."""


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
    if manifest.foreign:  # other tools may count anew in every shard
        return problems
    keys = np.sort(np.concatenate([findings.key_hashes for findings in found.values()]))
    twice = keys[1:][keys[1:] == keys[:-1]]
    if len(twice):
        files = [manifest.shards[shard].file for shard in sorted(found) if twice[0] in found[shard].key_hashes]
        message = f"{len(twice)} keys occur more than once in the shards, one of them in {' and '.join(files)}"
        problems.append(Problem(FILE_NAME, message))
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
    try:
        return _findings(folder, manifest, manifest.shards[shard])
    except OSError as error:
        problem = Problem(manifest.shards[shard].file, f"it or its index cannot be read ({error})")
        return _Findings([problem], np.zeros(0, dtype=np.int64))


def _findings(folder: Path, manifest: Manifest, entry: ShardEntry) -> _Findings:
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
        records, keys = build_index(path, manifest.version, manifest.captions)
    except DataError as error:
        return _Findings([*problems, Problem(path.name, str(error))], np.zeros(0, dtype=np.int64))
    problems += [Problem(path.name, message) for message in _content_problems(path, manifest, entry, records, keys)]
    hashes = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys]
    return _Findings(problems, np.frombuffer(b"".join(hashes), dtype=np.int64))


def _content_problems(
    path: Path, manifest: Manifest, entry: ShardEntry, records: np.ndarray, keys: list[str]
) -> list[str]:
    messages = []
    if hashlib.sha256(encode_index(records, manifest.version)).hexdigest() != entry.index_sha256:
        messages.append("its samples do not agree with its index")
    if (len(keys), keys[0], keys[-1]) != (entry.samples, entry.first_key, entry.last_key):
        messages.append(
            f"{len(keys)} samples {keys[0]}..{keys[-1]} instead of {entry.samples} samples "
            f"{entry.first_key}..{entry.last_key}"
        )
    if len(set(keys)) < len(keys):
        messages.append(f"{len(keys) - len(set(keys))} keys occur more than once in it")
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


def list_sharded(manifest: Manifest, path: Path) -> Listing:
    """The originals at ``path``, listed as they were when the shards of ``manifest`` were made.

    Raises:
        DataError: the shards were made by another tool, or nothing is there.
    """
    if manifest.foreign:
        raise DataError("These shards were made by another tool: make damaged ones again with that, not with --source.")
    return list_originals(manifest.arguments["kind"], path, manifest.arguments["damaged"])


def repair_shards(
    folder: Path,
    *,
    source: Listing | None = None,
    processes: int = 1,
    progress: Callable[[int], Any] = lambda samples: None,
) -> list[str]:
    """Repair what can be repaired.

    An index is rebuilt from a tar whose hash is right. A tar that is damaged or missing is made again from the
    originals, if they are given and are those that the manifest describes. Nothing is replaced unless the result has
    the hash that the manifest demands.

    Args:
        progress: called with a number of samples looked after.

    Returns:
        what was done, one line per file.

    Raises:
        DataError: the manifest is damaged, or something cannot be repaired (after repairing the rest).
    """
    manifest = read_manifest(folder)
    plan = _original_plan(manifest, source) if source is not None else None
    for aside in (folder / PROGRESS, folder / PROGRESS / _REPAIR, folder / PROGRESS / _REPAIR / PROGRESS):
        refuse_link(aside, DataError)
    remake = None if plan is None else functools.partial(_remake, plan, plan.permutation(), folder)
    repair = functools.partial(_repair, folder, manifest, remake)
    repairs: dict[int, _Repair] = {}
    for shard, result in in_processes(repair, range(len(manifest.shards)), processes):
        repairs[shard] = result
        progress(manifest.shards[shard].samples)
    remove(folder / PROGRESS)
    results = [repairs[shard] for shard in range(len(manifest.shards))]
    done = [result.done for result in results if result.done]
    hopeless = [result.hopeless for result in results if result.hopeless]
    if hopeless:
        reason = "; ".join(hopeless)
        if plan is None:
            reason = f"{', '.join(hopeless)} can only be made again from the originals: give their path as --source"
        raise DataError(f"{folder} is not repaired. {reason}. Repaired: {', '.join(done) or 'nothing'}.")
    return done


@dataclass(frozen=True)
class _Repair:
    """What became of one shard; neither text if it was whole."""

    done: str = ""
    hopeless: str = ""


def _original_plan(manifest: Manifest, source: Listing) -> Plan:
    arguments = manifest.arguments
    plan = Plan(source, arguments["shards"], arguments["seed"], arguments["damaged"], manifest.version)
    if plan.arguments() != arguments:
        raise DataError(
            f"{source.root} is not what the shards were made from: it lists {len(source.originals)} images (manifest: "
            f"{arguments['listed']}), and paths, classes or captions differ. Give the original folder or file."
        )
    return plan


def _repair(
    folder: Path, manifest: Manifest, remake: Callable[[int, ShardEntry], _Repair] | None, shard: int
) -> _Repair:
    entry = manifest.shards[shard]
    path = folder / entry.file
    try:
        if shard_is_whole(folder, entry):
            return _Repair()
        only_index = path.is_file() and sha256_of_file(path) == entry.sha256
    except OSError:  # a bad block of the disk
        only_index = False
    if only_index:
        index = index_path(path)
        records, _ = build_index(path, manifest.version, manifest.captions)
        write_bytes_atomic(index, encode_index(records, manifest.version))
        return _Repair(done=f"{index.name}: rebuilt from {path.name}")
    if remake is None:
        return _Repair(hopeless=entry.file)
    return remake(shard, entry)


def _remake(plan: Plan, permutation: np.ndarray, folder: Path, shard: int, entry: ShardEntry) -> _Repair:
    """Make a shard aside, and put it in place only if it has the right hash."""
    aside = folder / PROGRESS / _REPAIR
    try:
        made = write_shard(plan, permutation, shard, aside)
    except DataError as error:
        return _Repair(hopeless=f"{entry.file} cannot be made again ({error})")
    if made != entry:
        return _Repair(hopeless=f"{entry.file} would become another one, because its originals have changed since")
    for name in (entry.file, index_path(Path(entry.file)).name):
        (aside / name).replace(folder / name)
    fsync_directory(folder)
    return _Repair(done=f"{entry.file}: made again from {plan.listing.root}")


def adopt_shards(
    folder: Path,
    *,
    captions: Member = "txt",
    processes: int = 1,
    progress: Callable[[int], Any] = lambda samples: None,
) -> Manifest:
    """Give the WebDataset tars of another tool an index and a manifest. The tars are not changed.

    Classes are named by their numbers.

    Args:
        captions: the member of a sample that holds its caption.

    Raises:
        DataError: there are no tars, there is a manifest already, a tar is damaged, an index is in the way, or only
            some samples have a class.
    """
    if (folder / FILE_NAME).exists():
        raise DataError(f"{folder} has a {FILE_NAME} already. Remove it first if it does not describe these shards.")
    files = sorted(path.name for path in folder.glob("*.tar"))
    if not files:
        packed = next((path.name for path in sorted(folder.iterdir()) if _PACKED.search(path.name)), None)
        raise DataError(
            f"{folder} contains no .tar files, but compressed ones such as {packed}. Decompress them first."
            if packed
            else f"{folder} contains no .tar files. Name the folder of the WebDataset shards."
        )
    odd = [file for file in files if not is_plain_name(file)]
    if odd:
        raise DataError(
            f"{folder} contains {odd[0]!r}{f' and {len(odd) - 1} more' if len(odd) > 1 else ''}: names of shards hold "
            f"letters, digits and . _ - + = @ , only, because they become parts of URLs and commands. Rename them."
        )
    for index in (index_path(folder / file) for file in files):
        if index.exists() and not index.read_bytes().startswith(MAGIC):
            raise DataError(f"{index} is an index of another kind. Move such files away: megavar's own have that name.")
    entries: dict[int, ShardEntry] = {}
    for shard, entry in in_processes(functools.partial(_adopt, folder, files, captions), range(len(files)), processes):
        entries[shard] = entry
        progress(1)
    largest = max(int(label) for entry in entries.values() for label in entry.class_histogram)
    if largest >= 0 and (bare := [entry for entry in entries.values() if "-1" in entry.class_histogram]):
        raise DataError(
            f"{sum(entry.class_histogram['-1'] for entry in bare)} samples of {folder} have no class (.cls), for "
            f"example in {bare[0].file}, but others have one. Give each or none a class."
        )
    names = [str(label) for label in range(largest + 1)]
    arguments = {"kind": "existing", "format": FORMAT} | ({} if captions == "txt" else {"captions": captions})
    manifest = Manifest(arguments, names, [entries[shard] for shard in range(len(files))])
    write_manifest(folder, manifest)
    return manifest


def _adopt(folder: Path, files: list[str], captions: Member, shard: int) -> ShardEntry:
    path = folder / files[shard]
    records, keys = build_index(path, captions=captions)
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
