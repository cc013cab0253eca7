"""What every data source is: an indexed collection of samples."""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from megavar.errors import DataError

Split = Literal["train", "test"]


class DamagedSampleError(DataError):
    """One sample cannot be read or decoded; the message says why, the reader adds which."""


class UnreadableSampleError(DamagedSampleError):
    """The file system failed while the sample was read; the sample may be whole."""


@dataclass(frozen=True)
class Sample:
    """One sample as stored. Exactly one of ``image``, ``tokens`` and ``latents`` is set."""

    key: str
    """Names the sample in messages: a path, or a key in a shard."""
    label: int
    """Class index, or -1 where the source has no classes."""
    image: np.ndarray | bytes | None = None
    """uint8 [H, W, 3], or an encoded image (JPEG, PNG, WebP) that is decoded where it is used."""
    caption: str | None = None
    tokens: np.ndarray | None = None
    """uint16 [V, L]: token ids of V views."""
    latents: np.ndarray | None = None
    """float16 [V, C, h, w]: encoder features of V views."""
    features: np.ndarray | None = None
    """float16 [V, N, D]: a teacher's features of the same views, beside tokens or latents."""


class Source(Protocol):
    """An indexed collection. Reading is random access, and the same index is always the same sample."""

    split: Split
    class_names: tuple[str, ...]
    """Empty where samples have no class (text-image pairs)."""
    fingerprint: str
    """Changes when the content changes; stored in checkpoints and caches."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """Read sample ``index``.

        Raises:
            DamagedSampleError: the sample cannot be read or decoded.
        """
        ...


def content_fingerprint(source: Source) -> str:
    """What identifies a source where stored results of its images are used again.

    Most fingerprints cover the content. A source whose fingerprint does not (a folder of files) offers
    ``content_sha256()``, which reads everything.
    """
    content = getattr(source, "content_sha256", None)
    return source.fingerprint if content is None else f"{source.fingerprint}-{content()[:16]}"
