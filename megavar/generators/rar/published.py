"""The public RAR checkpoints (``rar_b.bin`` ...): the authors' state dict, to and from our logical tensors."""

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
    "feed_forward.mlp.linear_fc1": "mlp.fc1",
    "feed_forward.mlp.linear_fc2": "mlp.fc2",
    "modulation.linear": "adaLN_modulation.1",
}
_OUTSIDE = {
    "embedding.begin": "cls_token",
    "embedding.position": "pos_embed",
    "embedding.target": "target_aware_pos_embed",
    "embedding.step": "timesteps_embeddings",
    "embedding.table.weight": "embeddings.weight",
    "head.modulation.linear.weight": "adaln_before_head.adaLN_modulation.1.weight",
    "head.modulation.linear.bias": "adaln_before_head.adaLN_modulation.1.bias",
    "head.projection.weight": "lm_head.weight",
    "head.projection.bias": "lm_head.bias",
}
_LEADING_DIMENSIONS = {
    "embedding.begin": 2, "embedding.position": 1, "embedding.target": 1, "embedding.step": 1
}  # fmt: skip


class RARLayout(NamedLayout):
    """Other names, the fused query-key-value projection in another order, and leading dimensions of one."""

    belongs_to = "a RAR checkpoint"
    remedy = (
        "Check generator.depth, generator.width, generator.classes, generator.spare_positions, generator.spare_steps, "
        "the tokenizer's vocabulary_size and generator.experts (public RAR checkpoints are dense)."
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
        return [value[(None,) * _LEADING_DIMENSIONS.get(name, 0)]]

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`split`."""
        (value,) = parts
        if "attention.linear_qkv" in name:
            return value.unflatten(0, (3, self.choice.heads, -1)).transpose(0, 1).flatten(0, 2)
        return value[(0,) * _LEADING_DIMENSIONS.get(name, 0)]
