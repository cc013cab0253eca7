"""What a loader yields: one micro-batch of one rank."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from megavar.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B samples.

    Samples come as images or, from a cache, as tokens or latents; what the source does not offer is None.
    """

    images: Tensor | None
    """float32 [B, 3, H, W] in [-1, 1]."""
    labels: Tensor
    """int64 [B]: the class, or -1 where the source has no classes."""
    sample_ids: Tensor
    """int64 [B]: index of the sample in its source."""
    epochs: Tensor
    """int64 [B]: how many times the source had been gone through before this sample."""
    tokens: Tensor | None = None
    """int64 [B, L]: token ids of a token cache, scales one after the other."""
    latents: Tensor | None = None
    """float32 [B, C, h, w]: encoder features of a latent cache."""
    features: Tensor | None = None
    """float32 [B, N, D]: a teacher's features of the image, where the cache has them."""
    captions: tuple[str, ...] | None = None
    """B texts of a text-image source."""
    text_ids: Tensor | None = None
    """int64 [B, T]: token ids of the captions in their template (``data.text``), padded on the right."""
    text_mask: Tensor | None = None
    """bool [B, T]: where ``text_ids`` holds a token."""
    replaced: Tensor | None = None
    """bool [B], on the CPU: the sample stands in for a damaged one (see ``megavar.data.reading``)."""

    def __len__(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on ``device``; ``replaced`` stays on the CPU, where it is counted."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if field.name != "replaced" and isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, for asynchronous copies (called by torch's DataLoader)."""
        pinned: dict[str, Any] = {
            field.name: value.pin_memory()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **pinned)

    def split(self, size: int) -> "list[Batch]":
        """Consecutive batches of ``size`` samples, the last one possibly smaller."""
        parts = []
        for start in range(0, len(self), size):
            values = {field.name: getattr(self, field.name) for field in fields(self)}
            sliced: dict[str, Any] = {
                name: None if value is None else value[start : start + size] for name, value in values.items()
            }
            parts.append(Batch(**sliced))
        return parts

    def require_images(self) -> Tensor:
        """``images``, for recipes that cannot do without.

        Raises:
            ConfigError: the data source is a cache of tokens or latents.
        """
        if self.images is None:
            raise ConfigError(
                "This recipe (or one of its terms) needs images, but data.source is a cache of tokens or latents. Set "
                "data.source to the images from which the cache was made; a teacher's features can be cached, too "
                "(data.source.features; python -m tools.cache_tokens CONFIG --teacher)."
            )
        return self.images


def concatenate(batches: Sequence[Batch]) -> Batch:
    """One batch of all samples, in order. The batches must offer the same fields."""
    joined: dict[str, Any] = {}
    for field in fields(Batch):
        values = [getattr(batch, field.name) for batch in batches]
        if values[0] is None:
            joined[field.name] = None
        elif isinstance(values[0], Tensor):
            joined[field.name] = torch.cat(values)
        else:
            joined[field.name] = tuple(itertools.chain(*values))
    return Batch(**joined)
