"""The public VAR checkpoints (``var_d16.pth`` ...): the authors' state dict, to and from our logical tensors."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megavar.errors import CheckpointError
from megavar.weight_layout import NamedLayout, heads_first, parts_first

_BLOCK = {
    "attention.linear_qkv.q_bias": "attn.q_bias",
    "attention.linear_qkv.v_bias": "attn.v_bias",
    "attention.q_layernorm.log_temperature": "attn.scale_mul_1H11",
    "attention.linear_qkv.weight": "attn.mat_qkv.weight",
    "attention.linear_proj.weight": "attn.proj.weight",
    "attention.linear_proj.bias": "attn.proj.bias",
    "feed_forward.mlp.linear_fc1.weight": "ffn.fc1.weight",
    "feed_forward.mlp.linear_fc1.bias": "ffn.fc1.bias",
    "feed_forward.mlp.linear_fc2.weight": "ffn.fc2.weight",
    "feed_forward.mlp.linear_fc2.bias": "ffn.fc2.bias",
    "modulation.linear.weight": "ada_lin.1.weight",
    "modulation.linear.bias": "ada_lin.1.bias",
    "modulation.offset": "ada_gss",
}
_OUTSIDE = {
    "embedding.start_position": "pos_start",
    "embedding.position": "pos_1LC",
    "embedding.features.weight": "word_embed.weight",
    "embedding.features.bias": "word_embed.bias",
    "embedding.classes.weight": "class_emb.weight",
    "embedding.scale": "lvl_embed.weight",
    "shared_modulation.linear.weight": "shared_ada_lin.1.weight",
    "shared_modulation.linear.bias": "shared_ada_lin.1.bias",
    "head.modulation.linear.weight": "head_nm.ada_lin.1.weight",
    "head.modulation.linear.bias": "head_nm.ada_lin.1.bias",
    "head.projection.weight": "head.weight",
    "head.projection.bias": "head.bias",
}
_LEADING_DIMENSIONS = {"embedding.start_position": 1, "embedding.position": 1, "modulation.offset": 2}
_BUFFERS = re.compile(r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias")


class VARLayout(NamedLayout):
    """Other names, the rows of the fused query-key-value projection in another order, and leading dimensions of one.

    Public checkpoints are dense. Their persistent buffers (scale indices, the attention mask, zero key biases) are
    computed for an export and ignored in a file; our model needs none of them.
    """

    belongs_to = "a VAR checkpoint"
    remedy = (
        "Check generator.depth, generator.classes, generator.shared_adaptive_norm, the tokenizer's scales and "
        "generator.experts (public VAR checkpoints are dense)."
    )

    def names(self, name: str) -> tuple[str, ...]:
        """The one public tensor that holds ours."""
        block, inner = _place(name)
        published = (_OUTSIDE if block is None else _BLOCK).get(inner)
        if published is None:
            return ()
        return (published if block is None else f"blocks.{block}.{published}",)

    def split(self, name: str, value: Tensor) -> Sequence[Tensor]:
        """(q, k, v) x head instead of Megatron-core's head x (q, k, v); [1, H, 1, 1] temperatures."""
        inner = _place(name)[1]
        if inner == "attention.linear_qkv.weight":
            value = parts_first(value, self.choice.attention_heads)
        elif inner == "attention.q_layernorm.log_temperature":
            value = value.reshape(1, -1, 1, 1)
        return [value[(None,) * _LEADING_DIMENSIONS.get(inner, 0)]]

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`split`."""
        inner = _place(name)[1]
        (value,) = parts
        if inner == "attention.linear_qkv.weight":
            return heads_first(value, self.choice.attention_heads)
        if inner == "attention.q_layernorm.log_temperature":
            return value.flatten()
        return value[(0,) * _LEADING_DIMENSIONS.get(inner, 0)]

    def export(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`megavar.weight_layout.WeightLayout.export`; refuses experts."""
        if self.choice.experts is not None:
            raise CheckpointError(
                "A VAR with experts has no counterpart in the authors' layout. Export it as safetensors instead "
                "(tools/convert_checkpoint.py to a .safetensors file)."
            )
        return super().export(tensors)

    def ignores(self, published: str) -> bool:
        """The buffers."""
        return _BUFFERS.fullmatch(published) is not None

    def computed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The buffers: scale of each token [1, L], mask [1, 1, L, L], zero key biases [H D]."""
        sides = torch.tensor(self.space.sides)
        scale = torch.repeat_interleave(torch.arange(len(sides)), sides * sides)
        mask = torch.where(scale[:, None] >= scale[None, :], 0.0, -torch.inf)
        buffers = {"lvl_1L": scale[None], "attn_bias_for_masking": mask[None, None]}
        for number in range(self.choice.depth):
            buffers[f"blocks.{number}.attn.zero_k_bias"] = torch.zeros_like(state[f"blocks.{number}.attn.q_bias"])
        return buffers


def _place(name: str) -> tuple[str | None, str]:
    """Block number, or None outside the blocks, and the rest of one of our names."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    return (match.group(1), match.group(2)) if match else (None, name)
