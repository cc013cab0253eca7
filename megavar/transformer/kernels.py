"""Attention kernels: several ways to compute one thing, softmax(q k^T) v over the rows that the sequence layout shows.

==========  =============================================================================================
``dense``   one call with a boolean mask; serves every rule: the reference
``prefix``  one call per segment on the keys it sees; no [L, L] mask in memory, fastest on CPU
``causal``  one call with the causal flag of torch's fused kernels; no mask in memory
``flex``    FlexAttention with a block mask; compiled on CUDA (PyTorch has no CPU backward for it)
==========  =============================================================================================

Shapes: B samples, H query heads and G key heads of this rank (H is a multiple of G), L rows, D head size.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megavar.errors import ConfigError
from megavar.transformer import prefix
from megavar.transformer.sequence import Rule, SequenceLayout, cached_by_layout, visible


@cached_by_layout
def _rule_mask(layout: SequenceLayout, device: torch.device) -> Tensor:
    if layout.rule == "table":
        return layout.table(device)
    row = torch.arange(layout.length, device=device)
    return visible(layout.levels(device), row[:, None], row[None, :])


@cached_by_layout
def _rule_block_mask(layout: SequenceLayout, device: torch.device) -> Any:
    return _make_block_mask(layout, None, device)


def _make_block_mask(layout: SequenceLayout, valid: Tensor | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    levels = layout.levels(device)  # a mask function may hold nothing but tensors, or every new layout compiles anew

    def by_rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(levels, query, key)

    lonely = None if valid is None else _lonely(levels, valid)

    def with_padding(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert valid is not None and lonely is not None
        return (visible(levels, query, key) & valid[batch, key]) | ((query == key) & lonely[batch, query])

    mask, batch = (by_rule, None) if valid is None else (with_padding, valid.shape[0])
    return create_block_mask(mask, batch, None, layout.length, layout.length, device=str(device))


def _lonely(levels: Tensor, valid: Tensor) -> Tensor:
    """Rows that see no valid one, bool [B, L]; see :meth:`SequenceLayout.levels`."""
    level, low, high = levels
    at = torch.zeros(len(valid), valid.shape[1] + 2, dtype=torch.int64, device=valid.device)
    below = F.pad(at.scatter_add_(1, level.expand(len(valid), -1), valid.long()).cumsum(1), (1, 0))
    return below[:, high + 1] == below[:, low]


def _with_lonely(seen: Tensor, itself: Tensor) -> Tensor:
    """``seen`` [B, L, keys], and ``itself`` [L, keys] for rows that would see nothing."""
    return (seen | (itself & ~seen.any(-1, keepdim=True)))[:, None]


@dataclass
class Visibility:
    """Which rows see which in one pass, in the form that a kernel needs; each form is made once for all blocks."""

    layout: SequenceLayout
    valid: Tensor | None = None
    """bool [B, L]: tokens that rows of their sample may see; a row that sees none sees itself. None: all."""
    _made: dict[str, Any] = field(default_factory=dict)

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def mask(self, device: torch.device) -> Tensor:
        """True where a row (second to last dimension) sees another: bool [L, L], or [B, 1, L, L] with ``valid``."""
        return self._once("mask", lambda: self._mask(device))

    def _mask(self, device: torch.device) -> Tensor:
        seen: Tensor = _rule_mask(self.layout, device)
        if self.valid is None:
            return seen
        itself = torch.eye(self.layout.length, dtype=torch.bool, device=device)
        return _with_lonely(seen & self.valid[:, None, :], itself)

    def block_mask(self, device: torch.device) -> Any:
        """The same for FlexAttention."""
        return self._once("block mask", lambda: self._block_mask(device))

    def _block_mask(self, device: torch.device) -> Any:
        if self.valid is None:
            return _rule_block_mask(self.layout, device)
        return _make_block_mask(self.layout, self.valid, device)

    def continued(self, past: int, device: torch.device) -> Tensor | None:
        """The mask [.., L, past + tokens] of rows that follow ``past`` decoded ones; None where they see everything.

        Here ``valid`` is [B, past + L].
        """
        assert self.layout.rule != "block_diagonal", "rows that see nothing earlier need no cache"
        if self.layout.unmasked and self.valid is None:
            return None
        return self._once(f"after {past}", lambda: self._continued(past, device))

    def _continued(self, past: int, device: torch.device) -> Tensor:
        rows, tokens = self.layout.length, self.layout.tokens
        seen = torch.ones(rows, past + tokens, dtype=torch.bool, device=device)
        seen[:, past:] = _rule_mask(self.layout, device)[:, :tokens]
        if self.valid is None:
            return seen
        itself = torch.ones_like(seen).tril(past) & torch.ones_like(seen).triu(past)
        return _with_lonely(seen & self.valid[:, None, : past + tokens], itself)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """torch's attention of [B, H, L, D] queries with [B, G, L, D] keys and values."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
    """[B, H, L, D] by one call with a mask."""
    return attend(q, k, v, scale, visibility.mask(q.device))


def _seen_ranges(layout: SequenceLayout) -> list[tuple[slice, slice]]:
    """Rows and the keys they see, for each segment and for the padding."""
    everything = slice(0, layout.tokens)
    if layout.rule == "full":
        return [(slice(0, layout.length), everything)]
    alone = layout.rule == "block_diagonal"
    ranges = [(slice(start, end), slice(start if alone else 0, end)) for start, end in layout.bounds]
    return ranges + ([(slice(layout.tokens, layout.length), everything)] if layout.padding else [])


def _mask_of_samples(visibility: Visibility, device: torch.device) -> Tensor | None:
    return None if visibility.valid is None else visibility.mask(device)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
    """[B, H, L, D] by one call per segment."""
    if visibility.valid is None and prefix.serves(q, k):
        ranges = tuple((rows.start, rows.stop, keys.start, keys.stop) for rows, keys in _seen_ranges(visibility.layout))
        return prefix.SegmentAttention.apply(q, k, v, ranges, scale)
    mask = _mask_of_samples(visibility, q.device)
    outputs = [
        attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], scale, None if mask is None else mask[..., rows, keys])
        for rows, keys in _seen_ranges(visibility.layout)
    ]
    return torch.cat(outputs, dim=2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
    """[B, H, L, D] by one call with the causal flag; padding at the end is seen by padding alone."""
    return attend(q, k, v, scale, causal=True)


@functools.lru_cache(maxsize=1)
def _flex_function() -> Callable[..., Any]:
    """FlexAttention, compiled on CUDA: for the first length, then a few times for all others (dynamic shapes)."""
    from torch.nn.attention import flex_attention

    function: Callable[..., Any] = flex_attention.flex_attention
    return torch.compile(function) if torch.cuda.is_available() else function


_SMALLEST_HEAD = 16
"""Of FlexAttention's Triton kernels."""


def flex_options(device: torch.device) -> dict[str, Any]:
    """FlexAttention's Triton backend on CUDA, whatever else is installed or becomes its default.

    Its FLASH backend gives wrong gradients at head size 64 on Hopper (flash-attention issues 2623, 2756, 2903).
    """
    return {"BACKEND": "TRITON"} if device.type == "cuda" else {}


def flex_attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
    """[B, H, L, D] by FlexAttention; a part of the graph where a block is compiled."""
    from torch.nn.attention import flex_attention

    plain: Callable[..., Any] = flex_attention.flex_attention
    function = plain if torch.compiler.is_compiling() else _flex_function()
    size, missing = q.shape[-1], _SMALLEST_HEAD - q.shape[-1]
    if missing > 0:  # channels of zeros change nothing
        q, k, v = (F.pad(heads, (0, missing)) for heads in (q, k, v))
    output = function(
        q, k, v, block_mask=visibility.block_mask(q.device), scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=flex_options(q.device),
    )  # fmt: skip
    return output[..., :size] if missing > 0 else output


@dataclass(frozen=True)
class Kernel:
    """A way to compute attention and what it serves."""

    function: Callable[[Tensor, Tensor, Tensor, Visibility, float], Tensor]
    rules: tuple[Rule, ...]
    padded_samples: bool = True
    """Whether it takes ``valid``."""
    prepare: Callable[[Visibility, torch.device], Any] = lambda visibility, device: None
    """Makes what the function reads, so that a compiled graph finds it made."""

    def serves(self, visibility: Visibility) -> bool:
        """Whether it can compute this."""
        return visibility.layout.rule in self.rules and (self.padded_samples or visibility.valid is None)


_ALL: tuple[Rule, ...] = ("block_causal", "block_diagonal", "causal", "full")
KERNELS: dict[str, Kernel] = {
    "dense": Kernel(dense_attention, (*_ALL, "table"), prepare=Visibility.mask),
    "prefix": Kernel(prefix_attention, ("block_causal", "block_diagonal", "full"), prepare=_mask_of_samples),
    "causal": Kernel(causal_attention, ("causal",), padded_samples=False),
    "flex": Kernel(flex_attention, _ALL, prepare=Visibility.block_mask),
}


def choose_kernel(name: str, visibility: Visibility, device: torch.device, *, compiled: bool = False) -> str:
    """The kernel ``name``; ``auto`` chooses by rule and device.

    Args:
        compiled: whether it becomes a part of a graph; ``prefix`` would make one for each list of segments.

    Raises:
        ConfigError: the named kernel does not serve this pass.
    """
    if name == "auto":
        rule = visibility.layout.rule
        plain = {"causal": "causal", "full": "prefix", "table": "dense"}.get(rule)
        if plain is not None and KERNELS[plain].serves(visibility):
            return plain  # torch's fused kernels do these without a mask
        if device.type == "cuda":
            return "flex"
        return "dense" if rule == "causal" or compiled else "prefix"
    if not KERNELS[name].serves(visibility):
        fitting = ", ".join(other for other, kernel in KERNELS.items() if kernel.serves(visibility))
        padded = "" if visibility.valid is None else ", with samples of different lengths"
        raise ConfigError(
            f"generator.attention_kernel={name} does not serve sequences of this model (visibility "
            f"{visibility.layout.rule}{padded}). Choose auto or one of: {fitting}."
        )
    return name
