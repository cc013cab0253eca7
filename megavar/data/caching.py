"""Making and verifying caches (the format is described in ``megavar/data/caches.py``).

The parts of a cache are dealt out to ranks like cards; ranks share nothing but the folder, so their number may change
when an interrupted job is started again. Images are encoded in batches that depend on the plan alone. Hence the bytes
do not depend on ranks or interruptions. While work is under way, ``.progress/`` holds the plan and one record per
finished part; whichever rank finds all records writes ``cache.json`` and removes it.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megavar.data.caches import (
    FILE_NAME,
    Cache,
    CachePlan,
    part_name,
    plan_from_json,
    read_cache_file,
)
from megavar.data.loader import leave_signals_to_parent
from megavar.data.pixels import to_float
from megavar.data.progress import PROGRESS, only_one, publish, read_record
from megavar.data.reading import REMEDY, STAND_IN_ATTEMPTS, DamagePolicy, Preparation
from megavar.data.source import DamagedSampleError, Source
from megavar.data.transforms import TenCrop, Transform, decode
from megavar.errors import ConfigError, DataError, MegavarError
from megavar.parallel.seeds import random_bits
from megavar.storage import atomic_file, refuse_link, remove, sha256_of_file, write_bytes_atomic, write_json_atomic

PLAN = "plan.json"
log = logging.getLogger(__name__)
Encode = Callable[[Tensor], Tensor]
"""Images, float32 [B, 3, H, W] in [-1, 1], to token ids, integers [B, L], or to latents [B, ...]."""


def check_views(transform: Transform, views: int) -> None:
    """Refuse numbers of views that the transform cannot fill.

    Raises:
        ConfigError: ten crops need ten views; without randomness there is only one.
    """
    if isinstance(transform, TenCrop) and views != 10:
        raise ConfigError(f"data.source.views is {views}, but the ten-crop transform has 10 views. Set it to 10.")
    if not transform.draws and views != 1:
        raise ConfigError(
            f"data.source.views is {views}, but the transform is not random, so all views would be the same. Set it to "
            f"1, or choose a random transform."
        )


class ViewReader(Dataset):
    """Reads all views of some rows: sample indices -> images, uint8 [rows * views, 3, H, W], and labels."""

    def __init__(
        self, source: Source, transform: Transform, *, seed: int, views: int, damaged: DamagePolicy = "fail"
    ) -> None:
        check_views(transform, views)
        self.source = source
        self.damaged: DamagePolicy = damaged
        self.prepare = Preparation(transform, seed)
        self.views = views

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, list[int]] | MegavarError:
        try:
            read = [self._read(index) for index in indices]
        except MegavarError as error:
            return error
        stacked = torch.from_numpy(np.concatenate([views for views, _ in read])).permute(0, 3, 1, 2).contiguous()
        return stacked, [label for _, label in read]

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        """Views and label of a row. Another sample stands in for a damaged one, if the policy allows that; which one
        depends on the seed and the row alone, so that the bytes of the cache do not depend on ranks."""
        try:
            return self._load(index)
        except DamagedSampleError as error:
            name = f"Sample {index} of {self.source.fingerprint} is damaged: {error}"
        if self.damaged == "fail":
            raise DataError(f"{name}. {REMEDY}")
        for attempt in range(STAND_IN_ATTEMPTS):
            stand_in = int(random_bits(self.prepare.seed, "stand_in", 0, index, attempt) % len(self.source))
            with contextlib.suppress(DamagedSampleError):
                found = self._load(stand_in)
                log.warning("%s. Sample %d stands in for it.", name, stand_in)
                return found
        raise DataError(f"{name}, and so are {STAND_IN_ATTEMPTS} others that were tried in its place. {REMEDY}")

    def _load(self, index: int) -> tuple[np.ndarray, int]:
        try:
            sample = self.source.read(index)
        except OSError as error:
            raise DamagedSampleError(f"it cannot be read ({error})") from error
        assert sample.image is not None
        try:
            return self._views(index, decode(sample.image)), sample.label
        except DamagedSampleError as error:
            raise DamagedSampleError(f"{sample.key}: {error}") from error

    def _views(self, index: int, image: Image) -> np.ndarray:
        transform = self.prepare.transform
        if isinstance(transform, TenCrop):
            views = transform.views(image)
        else:
            rows = self.prepare.draws(torch.arange(self.views), torch.full((self.views,), index))
            views = [transform(image, draws) for draws in rows]
        return np.stack([np.asarray(view) for view in views])


def encode_batches(
    reader: ViewReader, batches: Sequence[Sequence[int]], encode: Encode, *, workers: int, device: torch.device | str
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Read and encode batches of rows; yields arrays [rows, views, ...] and labels."""
    read: Iterator[Any] = map(reader.__getitem__, batches)
    if workers:
        read = iter(
            DataLoader(
                reader,
                sampler=batches,
                batch_size=None,
                num_workers=workers,
                worker_init_fn=leave_signals_to_parent,
                generator=torch.Generator(),
            )
        )
    for result in read:
        if isinstance(result, MegavarError):
            raise result
        images, labels = result
        with torch.no_grad():
            encoded = encode(to_float(images.to(device))).cpu()
        yield encoded.unflatten(0, (len(labels), reader.views)).numpy(), labels


def write_cache(
    folder: Path,
    plan: CachePlan,
    reader: ViewReader,
    encode: Encode,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], Any] = lambda rows: None,
) -> Cache | None:
    """Make this rank's parts of the cache in ``folder``, continuing what an interrupted run has left.

    Args:
        progress: called with a number of finished rows.

    Returns:
        the cache, or None if other ranks are not finished yet.

    Raises:
        DataError: the folder holds something else, or an image is damaged.
        ConfigError: the tokenizer's ids do not fit the format.
    """
    _claim(folder, plan)
    if (folder / FILE_NAME).exists():
        return read_cache_file(folder)
    for part in range(rank, plan.parts, world_size):
        with only_one(folder / PROGRESS / f"lock-{part:05d}"):  # a job that was sent away may still be ending
            if _is_finished(folder, part):
                progress(len(plan.rows_of(part)))
                continue
            if (folder / FILE_NAME).exists():  # another rank has found everything finished, and tidied up
                break
            rows = plan.rows_of(part)
            batches = [rows[start : start + plan.batch_rows] for start in range(0, len(rows), plan.batch_rows)]
            with atomic_file(folder / PROGRESS / part_name(part)) as file:
                for views, labels in encode_batches(reader, batches, encode, workers=workers, device=device):
                    file.write(_to_rows(plan, views, labels).tobytes())
                    progress(len(labels))
            publish(folder, part_name(part))
            write_json_atomic(_record(folder, part), {"sha256": sha256_of_file(folder / part_name(part))})
    with only_one(folder / PROGRESS / "lock-end"):  # ranks tend to finish at the same time
        if not (folder / FILE_NAME).exists():
            hashes = [digest for part in range(plan.parts) if (digest := _recorded(folder, part)) is not None]
            if len(hashes) < plan.parts:
                return None
            write_bytes_atomic(folder / PROGRESS / FILE_NAME, Cache(plan, tuple(hashes)).encode())
            publish(folder, FILE_NAME)
        remove(folder / PROGRESS)
    return read_cache_file(folder)


def _to_rows(plan: CachePlan, views: np.ndarray, labels: list[int]) -> np.ndarray:
    assert views.shape[1:] == (plan.views, *plan.shape), (views.shape, plan)
    if plan.content == "tokens":
        limit = 2**31 if plan.wide else 2**16
        if views.dtype.kind not in "iu" or views.min() < 0 or views.max() >= limit:
            raise ConfigError(
                f"The tokenizer gave {views.dtype} tokens from {views.min()} to {views.max()}, but its token space "
                f"says ids below {limit}. Correct the space of its TokenizerChoice."
            )
    rows = np.zeros(len(labels), dtype=plan.row)
    rows["label"] = labels
    rows["views"] = views
    if plan.content != "tokens" and not np.isfinite(rows["views"]).all():
        raise ConfigError(f"The {plan.content} do not fit into float16. Compute them online instead.")
    return rows


def _record(folder: Path, part: int) -> Path:
    return folder / PROGRESS / f"part-{part:05d}.json"


def _recorded(folder: Path, part: int) -> str | None:
    record = read_record(folder, _record(folder, part).name)
    return None if record is None else record["sha256"]


def _is_finished(folder: Path, part: int) -> bool:
    expected, path = _recorded(folder, part), folder / part_name(part)
    return expected is not None and path.is_file() and sha256_of_file(path) == expected


def _claim(folder: Path, plan: CachePlan) -> None:
    """Make sure that ``folder`` is empty or holds work on the same plan."""
    refuse_link(folder / PROGRESS, DataError)
    under_way = read_record(folder, PLAN)
    if (folder / FILE_NAME).exists():
        found = read_cache_file(folder).plan
        remove(folder / PROGRESS)  # killed between cache.json and the clean-up
    elif under_way is not None:
        found = plan_from_json(under_way)
    elif folder.exists() and any(folder.glob("part-*.bin")):
        raise DataError(f"{folder} contains parts of a cache without a plan. Choose an empty folder.")
    else:
        write_json_atomic(folder / PROGRESS / PLAN, asdict(plan))
        return
    check_plan(folder, found, plan)


def check_plan(folder: Path, found: CachePlan, plan: CachePlan) -> None:
    """Compare what a folder holds with what is wanted.

    Raises:
        DataError: they differ; the message says in what.
    """
    if found != plan:
        wanted = asdict(plan)
        differing = [f"{key} {old!r} -> {wanted[key]!r}" for key, old in asdict(found).items() if old != wanted[key]]
        raise DataError(
            f"{folder} holds a cache made otherwise ({', '.join(differing)}). Choose another folder, or delete this "
            f"one to start anew."
        )


@dataclass(frozen=True)
class CacheReport:
    """What verification found."""

    problems: tuple[str, ...]
    rows: int
    """Rows that were encoded again."""
    agreement: float
    """Share of their tokens that are the same, or of their features within float16 rounding (relative 1e-2)."""


def damaged_parts(folder: Path, progress: Callable[[int], Any] = lambda rows: None) -> list[int]:
    """The parts whose bytes are not those that were written.

    Raises:
        DataError: ``cache.json`` is missing or damaged.
    """
    cache, damaged = read_cache_file(folder), []
    for part, expected in enumerate(cache.part_sha256):
        path = folder / part_name(part)
        if not path.is_file() or sha256_of_file(path) != expected:
            damaged.append(part)
        progress(len(cache.plan.rows_of(part)))
    return damaged


def verify_cache(
    folder: Path,
    reader: ViewReader,
    encode: Encode,
    *,
    rows: int = 1000,
    seed: int = 0,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], Any] = lambda rows: None,
) -> CacheReport:
    """Compare the bytes of all parts with their hashes, and random rows with a fresh encoding.

    A few tokens may differ even if all is well: batches of another size round differently, which can tip the choice
    between two nearly equidistant code vectors. At least 99.9 % should agree.
    """
    plan = read_cache_file(folder).plan
    damaged = damaged_parts(folder, progress)
    problems = [f"{part_name(part)}: missing, or its hash is not the one in {FILE_NAME}" for part in damaged]
    chosen = (random_bits(seed, "verify_cache", torch.arange(rows)) % plan.rows).unique().tolist() if rows else []
    chosen = [row for row in chosen if row // plan.rows_per_part not in damaged]
    batches = [chosen[start : start + plan.batch_rows] for start in range(0, len(chosen), plan.batch_rows)]
    same = total = wrong_labels = 0
    fresh = encode_batches(reader, batches, encode, workers=workers, device=device)
    for batch, (views, labels) in zip(batches, fresh):
        stored = np.stack([_read_row(folder, plan, row) for row in batch])
        wrong_labels += int((stored["label"] != labels).sum())
        if plan.content == "tokens":
            equal = stored["views"] == views
        else:
            equal = np.isclose(stored["views"].astype(np.float32), views, rtol=1e-2, atol=1e-3)
        same, total = same + int(equal.sum()), total + equal.size
    if wrong_labels:
        problems.append(f"{wrong_labels} of {len(chosen)} rows have another label than the source")
    agreement = same / total if total else 1.0
    if agreement < 0.999:
        problems.append(f"only {agreement:.2%} of {len(chosen)} freshly encoded rows agree (99.9% expected)")
    return CacheReport(tuple(problems), len(chosen), agreement)


def _read_row(folder: Path, plan: CachePlan, row: int) -> np.ndarray:
    part, place = divmod(row, plan.rows_per_part)
    return np.memmap(folder / part_name(part), dtype=plan.row, mode="r")[place]


def forget_parts(folder: Path, parts: Sequence[int]) -> None:
    """Reopen a finished cache so that :func:`write_cache` makes ``parts`` again and keeps the others."""
    cache = read_cache_file(folder)
    for part, digest in enumerate(cache.part_sha256):
        if part not in parts:
            write_json_atomic(_record(folder, part), {"sha256": digest})
    write_json_atomic(folder / PROGRESS / PLAN, asdict(cache.plan))
    (folder / FILE_NAME).unlink()
