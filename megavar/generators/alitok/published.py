"""AliTok's public transformers (``alitok_b.bin`` ...): the authors' state dict, to and from our logical tensors."""

import re
from collections.abc import Sequence

from torch import Tensor

from megavar.weight_layout import NamedLayout

_BLOCK = {
    "attention_norm": "norm1",
    "attention.linear_qkv": "attn.qkv",
    "attention.q_layernorm": "attn.q_norm",
    "attention.k_layernorm": "attn.k_norm",
    "attention.linear_proj": "attn.proj",
    "feed_forward_norm": "norm2",
    "feed_forward.mlp.linear_fc1_gate": "mlp.w1",
    "feed_forward.mlp.linear_fc1_up": "mlp.w3",
    "feed_forward.mlp.linear_fc2": "mlp.w2",
}
_OUTSIDE = {
    "embedding.weight": "embeddings.weight",
    "norm.weight": "norm.weight",
    "head.weight": "output.weight",
    "head.bias": "output.bias",
}


class AliTokLayout(NamedLayout):
    """Other names, and the fused query-key-value projection in another order."""

    belongs_to = "an AliTok transformer's checkpoint"
    remedy = (
        "Check generator.depth, generator.width, generator.classes, the tokenizer's vocabulary_size and "
        "generator.experts (public checkpoints are dense)."
    )

    def names(self, name: str) -> tuple[str, ...]:
        """The one public tensor that holds ours."""
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if match is None:
            return (_OUTSIDE[name],) if name in _OUTSIDE else ()
        number, part, kind = match.groups()
        return (f"blocks.{number}.{_BLOCK[part]}.{kind}",) if part in _BLOCK else ()

    def split(self, name: str, value: Tensor) -> Sequence[Tensor]:
        """(q, k, v) x head instead of Megatron-core's head x (q, k, v)."""
        if "attention.linear_qkv" in name:
            return [value.unflatten(0, (self.choice.heads, 3, -1)).transpose(0, 1).flatten(0, 2)]
        return [value]

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`split`."""
        (value,) = parts
        if "attention.linear_qkv" in name:
            return value.unflatten(0, (3, self.choice.heads, -1)).transpose(0, 1).flatten(0, 2)
        return value
