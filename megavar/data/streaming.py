"""Shards read as streams, for object stores and pipes that offer no random access.

The stream is split into lanes, a number fixed by the configuration and independent of the number of ranks. Every epoch
is a random order of all shards, and the epochs follow each other in one endless line of shards; lane l reads those at
places l, l + lanes, ... of the line from their first to their last sample. Each step takes the next
``global_batch_size / lanes`` samples of every lane. Since the manifest tells how many samples each shard has, the place
of every lane at any step follows from the step number: resuming opens the right shard and passes over the samples
before the right one.

Compared with ``order: index``, samples of a shard always follow each other in the order of the tar (random, but the
same in every epoch), and near the end of an epoch some lanes are in the next one already: with shards of equal size by
one shard each, otherwise by as many as the sizes differ.

Damage under the policy ``skip-and-count``: the samples of a shard are read in a circle. A sample that is damaged is
replaced by the next whole one of the circle; where the shard breaks off, reading goes on from its start. Both depend on
the shard alone, are named in the log, and are counted.
"""

import hashlib
import itertools
import json
import logging
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import webdataset

from megavar.data.batch import Batch, concatenate
from megavar.data.captions import decode_caption
from megavar.data.loader import Loader
from megavar.data.order import Order
from megavar.data.reading import REMEDY, STAND_IN_ATTEMPTS, DamagePolicy, Preparation, Prepared, stack
from megavar.data.shards.checksum import KEY, checksum
from megavar.data.shards.index import IMAGE_EXTENSIONS, Index, index_path
from megavar.data.shards.manifest import FILE_NAME, Manifest, read_manifest
from megavar.data.source import DamagedSampleError, Sample, Split
from megavar.data.text import TextEncoder
from megavar.data.transforms import Transform
from megavar.data.webdataset import INDEXES, caption_key, of_key, read_index
from megavar.errors import ConfigError, DataError, MegavarError

OPENINGS = 3
"""How often a stream that breaks off is opened anew before the shard is taken to be cut."""
Raw = tuple[int, dict[str, Any]]
"""Place in its shard, and members as webdataset reads them."""
log = logging.getLogger(__name__)


class ShardStreams:
    """A folder of shards that is read as streams. Only its manifest needs to be local."""

    def __init__(
        self, split: Split, path: Path, *, url: str | None = None, lanes: int = 8, key: str | None = None
    ) -> None:
        """Read the manifest.

        Args:
            path: folder of the manifest.
            url: where shards come from, with ``{shard}`` for the file name: anything that webdataset opens, such as
                ``pipe:aws s3 cp s3://bucket/train/{shard} -`` or ``https://host/train/{shard}``. Default: ``path``.
            lanes: number of lanes.
            key: of captions in JSON.

        Raises:
            DataError: there is no manifest.
            ConfigError: more lanes than shards, a url without ``{shard}``, or ``key`` does not fit the shards.
        """
        self.split: Split = split
        self.folder = Path(path)
        self.manifest: Manifest = read_manifest(self.folder)
        self.caption_key = caption_key(self.manifest, self.folder, key)
        self._indexes: dict[int, Index | None] = {}
        self.class_names = tuple(self.manifest.class_names)
        self.lanes = lanes
        read = f"{lanes}{of_key(self.caption_key)}"
        self.fingerprint = f"streams-{split}-{len(self)}-{self.manifest.checksum[:16]}-{read}"
        self.starts = [0, *itertools.accumulate(shard.samples for shard in self.manifest.shards)]
        """Index of the first sample of each shard."""
        # An absolute path is nothing but a path; a relative one may look like a URL, or like the command of a pipe.
        self._url = url if url is not None else f"{Path(path).absolute()}/{{shard}}"
        if "{shard}" not in self._url:
            raise ConfigError(f"data.source.url is {self._url!r}: it must contain {{shard}} for the file name.")
        if lanes > len(self.manifest.shards):
            raise ConfigError(
                f"data.source.lanes is {lanes}, but {path} has only {len(self.manifest.shards)} shards and every lane "
                f"reads whole shards. Use fewer lanes, or make more shards."
            )

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 for text-image pairs."""
        return len(self.class_names)

    def __len__(self) -> int:
        return self.manifest.samples

    def read(self, index: int) -> Sample:
        """Streams have no random access."""
        raise ConfigError(
            "data.source.order is stream, which cannot read single samples. Use order: index for evaluation and caches."
        )

    def check(self, shard: int, found: Raw) -> Sample:
        """The sample that was found at a place of a shard, if it is the one that was written there.

        Where the folder holds the index of the shard, image, caption and class are compared with it. Otherwise the
        checksum in the sample's own ``.json`` member counts; tars of other tools have none, and of theirs only the
        first and the last key of each shard are known.

        Raises:
            DamagedSampleError: image, caption or class are not as they were written, or absent.
            DataError: the stream is that of another shard.
        """
        (place, members), entry = found, self.manifest.shards[shard]
        key = str(members["__key__"])
        for known, expected in ((0, entry.first_key), (entry.samples - 1, entry.last_key)):
            if place == known and key != expected:
                raise DataError(
                    f"The stream of {entry.file} is that of another shard: its sample {place} is called {key}, and "
                    f"{self.folder / FILE_NAME} says {expected}. Correct data.source.url, or restore the shard."
                )
        sample = _to_sample(members, entry.file, bool(self.class_names), self.manifest, self.caption_key)
        if shard not in self._indexes:
            while len(self._indexes) >= INDEXES:
                self._indexes.pop(next(iter(self._indexes)))
            has_index = index_path(self.folder / entry.file).is_file()
            self._indexes[shard] = read_index(self.folder, entry) if has_index else None
        index = self._indexes[shard]
        if index is not None:
            assert isinstance(sample.image, bytes)
            same = index.agrees(place, sample.image, members.get(self.manifest.captions, b""))
            if not same or int(index.records[place]["label"]) not in (sample.label, -1):
                raise DamagedSampleError(f"{sample.key}: image, caption or class is not as it was written (index)")
        return sample

    def open(self, shard: int) -> Iterator[dict[str, Any]]:
        """The samples of one shard as webdataset reads them. Ends early where the stream breaks off."""
        file = self.manifest.shards[shard].file
        url = self._url.replace("{shard}", shlex.quote(file) if self._url.startswith("pipe:") else file)

        def note(error: Exception) -> bool:
            log.warning("Reading %s broke off: %s", url, error)
            return True

        samples = webdataset.DataPipeline(lambda: [{"url": url}], webdataset.tarfile_to_samples(handler=note))
        for sample, following in itertools.pairwise(itertools.chain(samples, [None])):
            if following is not None or self._is_complete(sample):  # the last one may be torn
                yield sample

    def _is_complete(self, members: dict[str, Any]) -> bool:
        """Whether a sample has all members that this tool writes; of other tools' samples, an image."""
        own = set() if self.manifest.foreign else {"json", "cls" if self.class_names else "txt"}
        return _image(members) is not None and own <= members.keys()


def _image(members: dict[str, Any]) -> bytes | None:
    return next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)


def lane_shards(streams: ShardStreams, order: Order, lane: int) -> Iterator[tuple[int, int]]:
    """(epoch, shard) in the order in which ``lane`` reads them, without end."""
    count = len(streams.manifest.shards)
    epoch, shards = -1, []
    for place in itertools.count(lane, streams.lanes):
        if place // count != epoch:
            epoch = place // count
            shards = order.locate(epoch * count, (epoch + 1) * count)[1].tolist()
        yield epoch, shards[place % count]


def lane_samples(
    streams: ShardStreams, prepare: Preparation, damaged: DamagePolicy, lane: int, first: int
) -> Iterator[Prepared]:
    """The samples of ``lane`` from its ``first`` on, without end."""
    for epoch, shard in lane_shards(streams, Order(len(streams.manifest.shards), prepare.seed), lane):
        count = streams.manifest.shards[shard].samples
        if first >= count:
            first -= count
            continue
        yield from _shard_samples(streams, prepare, damaged, epoch, shard, first)
        first = 0


def _shard_samples(
    streams: ShardStreams, prepare: Preparation, damaged: DamagePolicy, epoch: int, shard: int, first: int
) -> Iterator[Prepared]:
    entry = streams.manifest.shards[shard]
    circle = itertools.islice(_circle(streams, shard, damaged), first, None)
    indices = torch.arange(streams.starts[shard], streams.starts[shard + 1])
    draws = prepare.draws(torch.full_like(indices, epoch), indices)
    waiting: list[Raw] = []  # read ahead in search of a whole sample

    def prepared(place: int, found: Raw) -> Prepared:
        index = streams.starts[shard] + found[0]
        sample = streams.check(shard, found)
        result = prepare(sample, epoch, index, lambda: draws[found[0]])
        return replace(result, replaced=True) if found[0] != place else result

    for place in range(first, entry.samples):
        own = waiting.pop(0) if waiting else next(circle)
        try:
            result = prepared(place, own)
            problem = f"{entry.file} breaks off before sample {place} of {entry.samples}"
        except DamagedSampleError as error:
            problem = f"Sample {place} of {entry.file} is damaged: {error}"
            if damaged == "fail":
                raise DataError(f"{problem}. {REMEDY}") from None
            result = _next_whole(prepared, place, waiting, circle, problem)
        if result.replaced:
            log.warning("%s. %s stands in for it in epoch %d.", problem, result.sample.key, epoch)
        yield result


def _next_whole(
    prepared: Callable[[int, Raw], Prepared], place: int, waiting: list[Raw], circle: Iterator[Raw], problem: str
) -> Prepared:
    for ahead in range(STAND_IN_ATTEMPTS):
        if ahead == len(waiting):
            waiting.append(next(circle))
        try:
            return replace(prepared(place, waiting[ahead]), replaced=True)
        except DamagedSampleError:
            continue
    raise DataError(
        f"{problem}, and so are the {STAND_IN_ATTEMPTS} samples after it. Check that the storage works, and verify the "
        f"shards."
    )


def _circle(streams: ShardStreams, shard: int, damaged: DamagePolicy) -> Iterator[Raw]:
    """(place, sample) of a shard, beginning anew after the last.

    Raises:
        DataError: the shard breaks off and ``damaged`` is ``fail``, or it has no samples at all.
    """
    entry = streams.manifest.shards[shard]
    place = -1
    for _ in range(OPENINGS):  # connections fail: a shard counts as cut only if it breaks off repeatedly
        for read in itertools.islice(enumerate(streams.open(shard)), place + 1, entry.samples):
            place = read[0]
            yield read
        if place == entry.samples - 1:
            break
    else:
        if damaged == "fail" or place < 0:
            raise DataError(f"The stream of {entry.file} ends after {place + 1} of {entry.samples} samples. {REMEDY}")
    available = place + 1
    while True:
        yield from itertools.islice(enumerate(streams.open(shard)), available)


def _to_sample(
    members: dict[str, Any], file: str, has_classes: bool, manifest: Manifest, caption_key: str | None
) -> Sample:
    """Check and convert a sample as webdataset reads it.

    Raises:
        DamagedSampleError: the image or class is absent, or something is not as it was written.
    """
    key = f"{file}/{members['__key__']}"
    image = _image(members)
    if image is None:
        raise DamagedSampleError(f"{key}: it has no image")
    _check_members(members, key, manifest)
    try:
        label = int(members["cls"]) if has_classes else -1
    except (KeyError, ValueError) as error:
        raise DamagedSampleError(f"{key}: its class cannot be read") from error
    if has_classes and not 0 <= label < len(manifest.class_names):
        raise DamagedSampleError(f"{key}: its class {label} is not one of the {len(manifest.class_names)} classes")
    caption = None if has_classes else decode_caption(members.get(manifest.captions, b""), key, caption_key)
    return Sample(key=key, label=label, image=image, caption=caption)


def _check_members(members: dict[str, Any], key: str, manifest: Manifest) -> None:
    """Compare members with what the ``.json`` member says, if our tool wrote it; others mean other things by it."""
    contents = {name: content for name, content in members.items() if not name.startswith("__")}
    try:
        facts = json.loads(contents.get("json", b""))
        facts = facts if isinstance(facts, dict) else {}
    except ValueError:
        facts = {}
    if KEY in facts or (manifest.version >= 2 and not manifest.foreign):
        same = facts.get(KEY) == checksum(contents, facts)
    else:
        same = manifest.foreign or facts.get("sha256") == hashlib.sha256(_image(members) or b"").hexdigest()
    if not same:
        raise DamagedSampleError(f"{key}: image, caption, class or json is not as it was written (checksum)")


class LaneReads(torch.utils.data.IterableDataset):
    """What a worker process runs: step by step and lane by lane, one batch of the step's samples of that lane."""

    def __init__(
        self,
        streams: ShardStreams,
        prepare: Preparation,
        damaged: DamagePolicy,
        *,
        text: TextEncoder | None,
        lanes: range,
        samples_per_step: int,
        start_step: int,
    ) -> None:
        self.streams = streams
        self.prepare = prepare
        self.damaged: DamagePolicy = damaged
        self.text = text
        self.lanes = lanes
        self.samples_per_step = samples_per_step
        self.start_step = start_step

    def __iter__(self) -> Iterator[Batch | MegavarError]:
        """Batches of every nth lane, without end; n is the number of workers, so that they alternate lane by lane."""
        worker = torch.utils.data.get_worker_info()
        place, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        first = self.start_step * self.samples_per_step
        lanes = [
            lane_samples(self.streams, self.prepare, self.damaged, lane, first) for lane in self.lanes[place::workers]
        ]
        try:
            for lane in itertools.cycle(lanes):
                yield stack(list(itertools.islice(lane, self.samples_per_step)), self.text)
        except MegavarError as error:
            yield error


class StreamLoader(Loader):
    """The loader of streams: takes the same arguments and yields the same kind of batches as :class:`Loader`."""

    def __init__(self, streams: ShardStreams, transform: Transform, **arguments: Any) -> None:
        super().__init__(streams, transform, **arguments)
        batch, ranks = self.global_batch_size, self.data_parallel_size
        if batch % streams.lanes or streams.lanes % ranks:
            raise ConfigError(
                f"data.source.lanes is {streams.lanes}: it must divide the global batch of {batch} samples and be a "
                f"multiple of the {ranks} data-parallel ranks. Change it; it may be as large as the number of shards."
            )
        own = streams.lanes // ranks
        self._reads = LaneReads(
            streams,
            self.reader.prepare,
            self.reader.damaged,
            text=self.reader.text,
            lanes=range(self.data_parallel_rank * own, (self.data_parallel_rank + 1) * own),
            samples_per_step=batch // streams.lanes,
            start_step=self.start_step,
        )

    def _results(self) -> Iterator[Batch | MegavarError]:
        lanes = self._reads.lanes
        workers = max((n for n in range(1, self.workers + 1) if len(lanes) % n == 0), default=0)
        parts = iter(self._reads) if not workers else self._in_workers(self._reads, workers)
        for _ in self._steps():
            step = []
            for part in itertools.islice(parts, len(lanes)):
                if isinstance(part, MegavarError):
                    yield part
                    return
                step.append(part)
            yield from concatenate(step).split(self.micro_batch_size)
