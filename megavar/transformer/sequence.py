"""What the rows of a sequence are and which of them see which.

A sequence is a list of *segments* (VAR: the token maps of the scales; a raster model: one segment), perhaps followed by
rows of padding. The *rule* says which tokens a token sees:

==================  ==================================================================================
``block_causal``    all tokens of its own and of all earlier segments (VAR section 3.2)
``block_diagonal``  all tokens of its own segment
``causal``          itself and all earlier tokens, whatever their segment
``full``            every token
``table``           all tokens of the segments that ``sees`` lists for its own (SAR's hybrid)
==================  ==================================================================================

No token sees a row of padding; a row of padding sees every token, and nobody reads what it computes.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor

Rule = Literal["block_causal", "block_diagonal", "causal", "full", "table"]
PADDING = -1
"""Kind of a row of padding."""

T = TypeVar("T")


def cached_by_layout(build: Callable[["SequenceLayout", torch.device], T]) -> Callable[..., T]:
    """Keep what ``build`` makes of the last few layouts; a model with a new list of scales in every step forgets.

    Nothing is kept where tensors are not ordinary ones (FakeTensorMode, tracing): they would outlive their mode.
    """
    kept = functools.lru_cache(maxsize=8)(build)

    @functools.wraps(build)
    def cached(layout: "SequenceLayout", device: torch.device | None = None) -> T:
        device = torch.get_default_device() if device is None else torch.device(device)
        if torch.compiler.is_compiling() or torch.utils._python_dispatch._len_torch_dispatch_stack():
            return build(layout, device)
        with torch.inference_mode(False):  # kept tensors must be good for training, too
            return kept(layout, device)

    return cached


@dataclass(frozen=True)
class SequenceLayout:
    """Segments, their visibility, and rows of padding at the end; hashable."""

    sizes: tuple[int, ...]
    """Tokens of each segment."""
    kinds: tuple[int, ...] | None = None
    """What each segment is, in the vocabulary of routers and routing statistics (VAR: the scale's index; FlexVAR: its
    side). None numbers them from 0."""
    rule: Rule = "block_causal"
    padding: int = 0
    """Rows that make the length divisible by the number of tensor-parallel ranks."""
    sees: tuple[tuple[int, ...], ...] = ()
    """Rule ``table``: numbers of the segments that the tokens of each segment see."""

    tokens: int = field(init=False, compare=False)
    """Tokens without padding, L."""
    length: int = field(init=False, compare=False)
    """Rows of the sequence, padding included."""
    bounds: tuple[tuple[int, int], ...] = field(init=False, compare=False)
    """(first row, row after the last) of each segment."""
    unmasked: bool = field(init=False, compare=False)
    """Whether every row sees every token."""

    def __post_init__(self) -> None:
        if self.kinds is None:
            object.__setattr__(self, "kinds", tuple(range(len(self.sizes))))
        ends = (0, *itertools.accumulate(self.sizes))
        one = len(self.sizes) == 1 and self.rule != "causal"
        assert (self.rule == "table") == bool(self.sees) and len(self.sees) in (0, len(self.sizes)), self.sees
        derived = {  # computed here and not when first used: a compiled block could not trace that
            "tokens": ends[-1],
            "length": ends[-1] + self.padding,
            "bounds": tuple(itertools.pairwise(ends)),
            "unmasked": self.rule == "full" or one or ends[-1] == 1,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        assert self.kinds is not None and len(self.kinds) == len(self.sizes), f"{self.kinds} name {self.sizes}"
        assert min(self.kinds, default=0) >= 0 and min(self.sizes, default=1) > 0

    @staticmethod
    def padded(
        sizes: tuple[int, ...], multiple: int = 1, *, kinds: tuple[int, ...] | None = None, rule: Rule = "block_causal"
    ) -> "SequenceLayout":
        """The layout whose length is the next multiple of ``multiple``."""
        return SequenceLayout(sizes, kinds, rule, -sum(sizes) % multiple)

    @staticmethod
    def of_scales(
        sides: tuple[int, ...],
        multiple: int = 1,
        *,
        kinds: tuple[int, ...] | None = None,
        rule: Rule = "block_causal",
    ) -> "SequenceLayout":
        """Square token maps of these side lengths, one after the other, padded to a multiple of ``multiple`` rows."""
        return SequenceLayout.padded(tuple(side * side for side in sides), multiple, kinds=kinds, rule=rule)

    def segment_index(self, device: torch.device | None = None) -> Tensor:
        """Number of the segment of each row, int64 [length]; rows of padding count as one more segment."""
        return _segment_index(self, device)

    def kind_index(self, device: torch.device | None = None) -> Tensor:
        """Kind of each row's segment, int64 [length]; :data:`PADDING` for rows of padding."""
        return _kind_index(self, device)

    def table(self, device: torch.device | None = None) -> Tensor:
        """Rule ``table``: bool [length, length], True where a row (the first dimension) sees another."""
        return _table(self, device)

    def levels(self, device: torch.device | None = None) -> Tensor:
        """Who sees whom: int64 [3, length], row q sees row k if ``levels[1, q] <= levels[0, k] <= levels[2, q]``.

        One form for all rules but ``table``, and one tensor, so that a compiled kernel depends on neither rule nor
        layout.
        """
        assert self.rule != "table", "segments of a table are no intervals"
        return _levels(self, device)


def visible(levels: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Whether rows ``query`` see rows ``key`` (int64, broadcast), bool; see :meth:`SequenceLayout.levels`."""
    level = levels[0, key]
    return (levels[1, query] <= level) & (level <= levels[2, query])


def _rows(layout: SequenceLayout, values: tuple[int, ...], padding: int, device: torch.device) -> Tensor:
    """``values`` repeated by the segments' sizes; fills on the device, so that the host waits for nothing."""
    counted = [*zip(layout.sizes, values, strict=True), (layout.padding, padding)]
    return torch.cat([torch.full((size,), value, dtype=torch.int64, device=device) for size, value in counted])


@cached_by_layout
def _segment_index(layout: SequenceLayout, device: torch.device) -> Tensor:
    return _rows(layout, tuple(range(len(layout.sizes))), len(layout.sizes), device)


@cached_by_layout
def _kind_index(layout: SequenceLayout, device: torch.device) -> Tensor:
    assert layout.kinds is not None
    return _rows(layout, layout.kinds, PADDING, device)


@cached_by_layout
def _table(layout: SequenceLayout, device: torch.device) -> Tensor:
    segments = len(layout.sizes)
    seen = [[key in row for key in range(segments)] + [False] for row in layout.sees]
    of_segments = torch.tensor([*seen, [True] * segments + [False]], device=device)
    segment = layout.segment_index(device)
    return of_segments[segment[:, None], segment[None, :]]


@cached_by_layout
def _levels(layout: SequenceLayout, device: torch.device) -> Tensor:
    segment = layout.segment_index(device)
    row = torch.arange(layout.length, device=device)
    zero = torch.zeros_like(row)
    if layout.rule == "full":
        level, low, high = zero, zero, zero
    elif layout.rule == "causal":
        level, low, high = row, zero, row
    elif layout.rule == "block_causal":
        level, low, high = segment, zero, segment
    else:
        level, low, high = segment, segment, segment
    if layout.padding:
        padding = row >= layout.tokens
        unseen = layout.length + 1
        level, low = level.masked_fill(padding, unseen), low.masked_fill(padding, 0)
        high = high.masked_fill(padding, unseen - 1)
    return torch.stack([level, low, high])
