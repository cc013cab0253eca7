"""Caches of token ids or encoder features, so that a frozen tokenizer runs once instead of in every step.

A cache folder holds ``cache.json`` and parts ``part-00000.bin``, ... of ``rows_per_part`` rows each (the last one may
be shorter). Row r of the cache is sample r of the source. A row is an int32 label followed by K views, little endian::

    tokens   uint16  [K, L]         the tokenizer's ids; int32 where 65536 do not suffice
    features float16 [K, N, D]      a teacher's features of the same images, in a folder of their own beside the others
    latents  float16 [K, C, h, w]   what it encodes to, for recipes whose scales change in every step (FlexVAR, SAR) and
                                    for tokenizers without ids; [K, ...] of any shape

so ``numpy.memmap(part, dtype=[("label", "<i4"), ("views", "<u2", (K, L))])`` reads a part. View v is what the training
transform makes of the sample in epoch v (of the ten-crop transform: its view v). Training in epoch e takes view
``floor(K u)``, where u is the first random number that the transform would get, a hash of (seed, e, r).

Captions are not copied: they are read from the text-image source, without decoding its images.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from megavar.data.source import Sample, Source, Split
from megavar.errors import ConfigError, DataError

FORMAT = "megavar cache 1"
FILE_NAME = "cache.json"
Content = Literal["tokens", "latents", "features"]
ELEMENTS: dict[str, str] = {"tokens": "<u2", "latents": "<f2", "features": "<f2"}
WIDE_IDS = "<i4"
OF_VIEWS = ("views", "rows", "image_size", "transform", "seed", "source", "class_names")
"""What a plan says of the images, whatever is made of them."""
MAPPED_PARTS = 512
"""Parts that a process keeps mapped; each keeps a file open, and systems commonly allow a process 1024."""


@dataclass(frozen=True)
class CachePlan:
    """Everything that the bytes of a cache depend on."""

    content: Content
    views: int
    shape: tuple[int, ...]
    """Of one view: (L,), or that of the latents."""
    rows: int
    rows_per_part: int
    batch_rows: int
    """Rows that are encoded together."""
    image_size: int
    transform: str
    """The training transform with its options."""
    seed: int
    """Of the transform's random numbers."""
    source: str
    """Fingerprint of the images."""
    tokenizer_sha256: str
    """Of the network that made it: the tokenizer, or for features the teacher."""
    class_names: tuple[str, ...]
    wide: bool = False
    """Whether ids need more than 16 bits."""

    @property
    def row(self) -> np.dtype:
        """Type of one row."""
        element = WIDE_IDS if self.wide else ELEMENTS[self.content]
        return np.dtype([("label", "<i4"), ("views", element, (self.views, *self.shape))])

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.rows // self.rows_per_part)

    def rows_of(self, part: int) -> range:
        """The rows that ``part`` holds."""
        return range(part * self.rows_per_part, min(self.rows, (part + 1) * self.rows_per_part))


@dataclass(frozen=True)
class Cache:
    """A finished cache: its plan, and the SHA-256 of every part."""

    plan: CachePlan
    part_sha256: tuple[str, ...]

    def encode(self) -> bytes:
        """The one byte sequence that represents this cache's ``cache.json``."""
        plan = asdict(self.plan)
        if not self.plan.wide:  # a key that most caches do without, and that older versions do not know
            del plan["wide"]
        content: dict[str, Any] = {"format": FORMAT, **plan, "part_sha256": self.part_sha256}
        content["checksum"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return (json.dumps(content, indent=1) + "\n").encode()


def part_name(part: int) -> str:
    """File name of a part."""
    return f"part-{part:05d}.bin"


def plan_from_json(content: dict[str, Any]) -> CachePlan:
    """The inverse of ``asdict``, for plans that went through JSON; other keys are ignored."""
    content = {"wide": False, **content}
    values = {name: content[name] for name in CachePlan.__dataclass_fields__}
    return CachePlan(**values | {"shape": tuple(values["shape"]), "class_names": tuple(values["class_names"])})


def read_cache_file(folder: Path) -> Cache:
    """Read and check the ``cache.json`` of a folder.

    Raises:
        DataError: there is none, or any of its bits is not as written.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise DataError(
            f"{folder} has no {FILE_NAME}, so it is not a finished cache. Make it with `python -m tools.cache_tokens "
            f"CONFIG` (run it again if it was interrupted), or correct data.source.path."
        )
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
        cache = Cache(plan_from_json(content), tuple(content["part_sha256"]))
        same = cache.encode() == raw
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise DataError(
            f"{path} is damaged: its content does not agree with its checksum. Restore it from a copy, or make the "
            f"cache again in another folder."
        )
    return cache


def weights_sha256(module: nn.Module) -> str:
    """Hash of a module's parameters and buffers, to tell which tokenizer a cache was made with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(-1).numpy().tobytes())
    return digest.hexdigest()


class CachedSamples:
    """The rows of a cache as a data source."""

    def __init__(
        self,
        split: Split,
        folder: Path,
        open_images: Callable[[], Source] | None = None,
        features: Path | None = None,
    ) -> None:
        """Open a finished cache.

        Args:
            features: folder of a teacher's features of the same views.
            open_images: opens the source that was cached; called only if that has captions.

        Raises:
            DataError: the cache is absent, unfinished or damaged, or the images have changed since.
        """
        self.split: Split = split
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(
                f"The cache {self.folder} does not exist. Make it with `python -m tools.cache_tokens CONFIG`, or "
                f"correct data.source.path."
            )
        self.cache = read_cache_file(self.folder)
        self.class_names = self.cache.plan.class_names
        content = hashlib.sha256(self.cache.encode()).hexdigest()
        self.fingerprint = f"cache-{split}-{len(self)}-{content[:16]}"
        self._parts: OrderedDict[int, np.ndarray] = OrderedDict()
        self._verified: set[int] = set()
        self.vocabulary: int | None = None
        """Ids are below it, where the tokenizer is known."""
        plan = self.cache.plan
        self._captioned = open_images() if open_images is not None and not self.class_names else None
        if self._captioned is not None and self._captioned.fingerprint != plan.source:
            raise DataError(
                f"The cache {self.folder} was made from {plan.source}, but its captions are to be read from "
                f"{self._captioned.fingerprint}. Correct data.source.images, or make another cache."
            )
        for part in range(plan.parts):
            path, size = self.folder / part_name(part), len(plan.rows_of(part)) * plan.row.itemsize
            if not path.is_file() or path.stat().st_size != size:
                found = f"has {path.stat().st_size} bytes instead of {size}" if path.is_file() else "is missing"
                raise DataError(f"The cache part {path} {found}. Make it again: `python -m tools.cache_tokens CONFIG`.")

        self.features = None if features is None else self._open_features(features)
        if self.features is not None:
            self.fingerprint += f"+{self.features.fingerprint}"

    def _open_features(self, folder: Path) -> "CachedSamples":
        features = CachedSamples(self.split, folder)
        found, wanted = features.cache.plan, self.cache.plan
        same_views = all(getattr(found, key) == getattr(wanted, key) for key in OF_VIEWS)
        if found.content != "features" or not same_views:
            raise DataError(
                f"{folder} does not hold a teacher's features of the views in {self.folder}: it was made of other "
                f"images, or with another transform, number of views or seed. Correct data.source.features, or make it "
                f"with `python -m tools.cache_tokens CONFIG --teacher`."
            )
        return features

    @property
    def num_classes(self) -> int:
        """Number of classes of the images that were cached."""
        return len(self.class_names)

    def __len__(self) -> int:
        return self.cache.plan.rows

    def read(self, index: int) -> Sample:
        """Row ``index``; its views are mapped, not read."""
        plan = self.cache.plan
        part, row = divmod(index, plan.rows_per_part)
        if part not in self._parts:
            while len(self._parts) >= MAPPED_PARTS:
                self._parts.popitem(last=False)
            self._parts[part] = self._map(part)
        self._parts.move_to_end(part)
        stored = self._parts[part][row]
        caption = None if self._captioned is None else self._captioned.read(index).caption
        sample = Sample(key=f"{part_name(part)}[{row}]", label=int(stored["label"]), caption=caption)
        if self.features is not None:
            sample = replace(sample, features=self.features.read(index).features)
        return replace(sample, **{plan.content: stored["views"]})

    def _map(self, part: int) -> np.ndarray:
        """The rows of a part. Its bytes are compared with their hash when this process maps it for the first time.

        Raises:
            DataError: they are others, or say what no tokenizer and no source of this cache can have said.
        """
        plan, path = self.cache.plan, self.folder / part_name(part)
        again = "Make it again: `python -m tools.cache_tokens CONFIG --repair` with the run that the cache is for."
        rows = np.asarray(np.memmap(path, dtype=plan.row, mode="r"))  # indexing the subclass is slow
        if part in self._verified:
            return rows
        if hashlib.sha256(rows.view(np.uint8).data).hexdigest() != self.cache.part_sha256[part]:
            raise DataError(f"The cache part {path} is not as it was written: its hash is another one. {again}")
        if plan.content == "tokens" and self.vocabulary is not None and rows["views"].max() >= self.vocabulary:
            raise DataError(
                f"The cache part {path} holds the token id {rows['views'].max()}, but the tokenizer has only "
                f"{self.vocabulary}. {again}"
            )
        if rows["label"].max() >= max(self.num_classes, 0) or rows["label"].min() < -1:
            raise DataError(
                f"The cache part {path} holds labels from {rows['label'].min()} to {rows['label'].max()}, but the "
                f"cache has {self.num_classes} classes. {again}"
            )
        self._verified.add(part)
        return rows

    def check_teacher(self, sha256: str) -> None:
        """Make sure that the features were made by the teacher with this hash (``assembly.teacher_sha256``).

        Raises:
            ConfigError: they were not.
        """
        assert self.features is not None
        if sha256 != self.features.cache.plan.tokenizer_sha256:
            raise ConfigError(
                f"The features in {self.features.folder} were made by another teacher than the one that a term of this "
                f"run names. Make them with this one (`python -m tools.cache_tokens CONFIG --teacher`), or correct the "
                f"term or its weights."
            )

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Make sure that the cache was made with ``tokenizer``; from now on its ids must be those of its vocabulary.

        Raises:
            ConfigError: it was not.
        """
        self.vocabulary = tokenizer.space.vocabulary
        if weights_sha256(tokenizer) != self.cache.plan.tokenizer_sha256:
            raise ConfigError(
                f"The cache {self.folder} was made with another tokenizer than the one that this run loads. Make a "
                f"cache with this tokenizer (`python -m tools.cache_tokens CONFIG`), or correct the weights."
            )
