"""Public checkpoints of raster transformers with timm's names: blocks by a table, one fused projection."""

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from megavar.weight_layout import NamedLayout, heads_first, parts_first

ATTENTION = {
    "attention_norm": "norm1",
    "attention.linear_qkv": "attn.qkv",
    "attention.q_layernorm": "attn.q_norm",
    "attention.k_layernorm": "attn.k_norm",
    "attention.linear_proj": "attn.proj",
    "feed_forward_norm": "norm2",
}
"""Parts of a block, ours and theirs, that the families share."""


class RasterLayout(NamedLayout):
    """Other names, and the fused query-key-value projection in another order."""

    block: ClassVar[Mapping[str, str]]
    """Public name of each of a block's parts."""
    outside: ClassVar[Mapping[str, str]]
    """Public name of each tensor outside the blocks."""

    def names(self, name: str) -> tuple[str, ...]:
        """The one public tensor that holds ours."""
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if match is None:
            return (self.outside[name],) if name in self.outside else ()
        number, part, kind = match.groups()
        return (f"blocks.{number}.{self.block[part]}.{kind}",) if part in self.block else ()

    def split(self, name: str, value: Tensor) -> Sequence[Tensor]:
        """(q, k, v) x head instead of Megatron-core's head x (q, k, v)."""
        if "attention.linear_qkv" in name:
            return [parts_first(value, self.choice.heads)]
        return [value]

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`split`."""
        (value,) = parts
        if "attention.linear_qkv" in name:
            return heads_first(value, self.choice.heads)
        return value
