"""What recipes and decoding procedures hand to generators of a kind, whichever generator it is."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class ScaleInputs:
    """Token maps of growing side, one after the other: each is predicted from the ones before it.

    In training all scales are there at once. While decoding, ``scale`` says which one is meant, and ``features`` holds
    its rows only.
    """

    labels: Tensor
    """int64 [B]; the number of classes stands for "no class"."""
    features: Tensor | None
    """float32 [B, L - first, D]: before each scale after the first, what is known of the image, resized to that scale.
    None for the first scale while decoding: it is predicted from the label alone."""
    sample_keys: Tensor | None = None
    """int64 [B]: identifies (epoch, sample) for dropout and drop path; None disables them."""
    sides: tuple[int, ...] | None = None
    """Side lengths of the token maps, coarse to fine; None: the ones of the tokenizer."""
    scale: int | None = None
    """Decoding: index of the one scale whose tokens are asked for; None: all of them."""
