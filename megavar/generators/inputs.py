"""What recipes and decoding procedures hand to generators of a kind, whichever generator it is."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class ScaleInputs:
    """Token maps of growing side, one after the other: each is predicted from the ones before it.

    In training all scales are there at once. While decoding, ``scale`` says which one is meant, and ``features`` holds
    its rows only. Scales are counted from 0 in the list of all of them.
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
    """Decoding: number of the one scale whose tokens are asked for; None: all of them."""
    only: tuple[int, ...] | None = None
    """Training: numbers of the scales that the sequence consists of (SAR's second pass: the first and a later one,
    which sees no other); None: all of them. ``features`` holds the rows of those after scale 0."""
    start_position: bool = True
    """Whether the tokens of scale 0 carry their learned start position. SAR's code leaves it out in its second pass."""

    targets: Tensor | None = None
    """int64 [B, L]: the true tokens, for generators that compute losses instead of logits (``head_chunks``)."""
    label_smoothing: float = 0.0
    """Of these losses."""

    def maps(self, usual: tuple[int, ...]) -> dict[int, int]:
        """Side of each map of the sequence, coarse to fine, by the number of its scale.

        Args:
            usual: side lengths of the tokenizer's scales.
        """
        sides = self.sides or usual
        numbers = (self.scale,) if self.scale is not None else self.only or tuple(range(len(sides)))
        return {number: sides[number] for number in numbers}


@dataclass
class RasterInputs:
    """Tokens one after the other: each is predicted from the class and the ones before it.

    The sequence is a start row, the class's row, then a row per token. Row 1 + i predicts token i.
    """

    labels: Tensor
    """int64 [B]; the number of classes stands for "no class"."""
    ids: Tensor
    """int64 [B, n]: in training the first n tokens of the order; while decoding those whose rows follow ``start``."""
    order: Tensor | None = None
    """int64 [B, L]: place in the image of the i-th token; None: row by row."""
    sample_keys: Tensor | None = None
    """int64 [B]: identifies (epoch, sample) for dropout; None disables it."""
    start: int = 0
    """Number of the first row; 0 begins with the start row and the class's."""


@dataclass
class FlowScaleInputs:
    """Maps of vectors of growing side, one after the other: the velocity of each is predicted from the ones before it.

    In training all scales are there at once. While drawing, ``scale`` says which one is meant, and ``features`` holds
    its rows only. Scales are counted from 0.
    """

    labels: Tensor
    """int64 [B]; the number of classes stands for "no class"."""
    features: Tensor | None
    """float32 [B, L - L_0, C]: for each scale after the first, the one before it, resized to its side. None for the
    first scale while drawing."""
    noisy: Tensor | None = None
    """float32 [B, L, C]: tokens on their way from noise to data; None asks for what their velocity depends on beside
    them."""
    times: Tensor | None = None
    """float32 [B, K]: how far on the way each scale is, from 1 (noise) to 0."""
    sample_keys: Tensor | None = None
    """int64 [B]: identifies (epoch, sample) for dropout; None disables it."""
    scale: int | None = None
    """Drawing: number of the one scale whose tokens are asked for; None: all of them."""


@dataclass
class QueryInputs:
    """Text, then rows of an image: *queries*, which ask what is at a place, and *latents*, which say it.

    In training each query is followed by its latent. While decoding, inputs hold what comes after the rows in a cache.
    B samples, T rows of text, R of the image, C channels of a latent, A rows that are predicted.
    """

    text: Tensor | None
    """int64 [B, T], with what begins an image; None: the cache has it."""
    places: Tensor
    """int64 [B, R]: place in the map, row by row."""
    latents: Tensor
    """float32 [B, R, C]; queries' are not read."""
    holds: Tensor
    """bool [R]: whether the row is a latent."""
    asks: slice
    """Of the R rows those that are predicted: queries."""
    valid: Tensor | None = None
    """bool [B, rows in the cache + T + R]: False marks padding of the text, which nobody sees. None: all are seen."""
    positions: Tensor | None = None
    """int64 [B, T + R]; None: counted from 0 by ``valid``."""
    noisy: Tensor | None = None
    """float32 [B, A, C]: what is asked for, on its way from noise to data; None asks for what its velocity depends on
    beside it."""
    times: Tensor | None = None
    """float32 [B, A]: how far on the way each of them is, from 1 (noise) to 0."""
    sample_keys: Tensor | None = None
    """int64 [B]: identifies (epoch, sample) for dropout; None disables it."""

    @property
    def text_rows(self) -> int:
        """T."""
        return 0 if self.text is None else self.text.shape[1]


@dataclass
class MaskedInputs:
    """Tokens of which some are masked: these are predicted from the others, in any number at once.

    B samples, L tokens, C channels, M draws of noise for each token.
    """

    labels: Tensor
    """int64 [B]; the number of classes stands for "no class". Not read where ``text`` is."""
    tokens: Tensor
    """float32 [B, L, C]; masked ones are not read."""
    masked: Tensor
    """bool [B, L]."""
    text: Tensor | None = None
    """int64 [B, P]: tokens of the text, for generators that are asked by text."""
    noisy: Tensor | None = None
    """float32 [B, M, L, C]: tokens with noise; None asks for what the prediction depends on beside them."""
    times: Tensor | None = None
    """int64 [B, M, L]: how much."""
    sample_keys: Tensor | None = None
    """int64 [B]: identifies (epoch, sample) for dropout; None disables it."""
