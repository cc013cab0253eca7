"""The public FlowAR checkpoints (``FlowAR-S.pth`` ...): the authors' state dict, to and from our logical tensors."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megavar.config.generators.flowar import HEAD_SIZE
from megavar.transformer.rotary import frequencies
from megavar.transformer.sequence import SequenceLayout, visible
from megavar.weight_layout import NamedLayout, heads_first, parts_first

_LAYERS = {
    "attention.linear_qkv": "attn.qkv",
    "attention.linear_proj": "attn.proj",
    "feed_forward.mlp.linear_fc1_gate": "mlp.fc1_g",
    "feed_forward.mlp.linear_fc1_up": "mlp.fc1_x",
    "feed_forward.mlp.linear_fc2": "mlp.fc2",
}
_TRUNK = {**_LAYERS, "modulation.linear": "ada_lin.1"}
_HEAD = {
    **_LAYERS,
    "modulation.linear": "ada_lin",
    "attention_modulation.linear": "ada_lin_attn",
    "feed_forward_modulation.linear": "ada_lin_mlp",
    "query_norm": "norm2_1",
    "source_norm": "norm2_2",
    "cross_attention.query": "crossattn.q",
    "cross_attention.key_value": "crossattn.kv",
    "cross_attention.output": "crossattn.proj",
}
_JUNCTION = {"norm": "encoder_norm", "projection": "decoder_embed"}
_OUTSIDE = {
    "embedding.classes": "class_emb",
    "embedding.projection": "z_proj",
    "embedding.norm": "z_proj_ln",
    "conditioning.norm": "decoder_norm",
    "head.time.first": "flownet.time_embed.mlp.0",
    "head.time.second": "flownet.time_embed.mlp.2",
    "head.condition": "flownet.cond_embed",
    "head.input": "flownet.input_proj",
    "head.modulation.linear": "flownet.final_layer.adaLN_modulation.1",
    "head.projection": "flownet.final_layer.linear",
}
_TABLES = {
    "embedding.position.table": "encoder_pos_embed_learned",
    "junction.position.table": "decoder_pos_embed_learned",
    "conditioning.position.table": "diffusion_pos_embed_learned",
}


class FlowARLayout(NamedLayout):
    """Other names, fused projections in another order, tables with a leading dimension of one; mask and angles are
    computed."""

    belongs_to = "a FlowAR checkpoint"
    remedy = (
        "Check generator.encoder_depth, decoder_depth, width, heads, scales, classes, head_depth, head_width, "
        "head_cross_attention, the tokenizer's channels, and generator.experts (public FlowAR checkpoints are dense)."
    )

    def names(self, name: str) -> tuple[str, ...]:
        """The one public tensor that holds ours."""
        for ours, theirs in _TABLES.items():
            if name.endswith(ours):
                return (theirs,)
        layer, _, kind = name.rpartition(".")
        if layer in _OUTSIDE:
            return (f"{_OUTSIDE[layer]}.{kind}",)
        match = re.fullmatch(r"(head\.)?blocks\.(\d+)\.(.+)", layer)
        if match is None:
            return ()
        head, number, part = match[1], int(match[2]), match[3]
        if head:
            return (f"flownet.res_blocks.{number}.{_HEAD[part]}.{kind}",) if part in _HEAD else ()
        joined = part.removeprefix("junction.")
        if joined != part:
            return (f"{_JUNCTION[joined]}.{kind}",)
        return (f"{self._trunk_block(number)}.{_TRUNK[part]}.{kind}",) if part in _TRUNK else ()

    def _trunk_block(self, number: int) -> str:
        encoder = self.choice.encoder_depth
        return f"encoder_blocks.{number}" if number < encoder else f"decoder_blocks.{number - encoder}"

    def _fused(self, name: str) -> tuple[int, int] | None:
        """Heads and parts (query, key, value) of a fused projection."""
        if "attention.linear_qkv" in name:
            return (self.choice.head_width // HEAD_SIZE if name.startswith("head.") else self.choice.heads), 3
        return (self.choice.head_width // HEAD_SIZE, 2) if "cross_attention.key_value" in name else None

    def split(self, name: str, value: Tensor) -> Sequence[Tensor]:
        """Parts x head instead of Megatron-core's head x parts."""
        fused = self._fused(name)
        if fused is not None:
            return [parts_first(value, *fused)]
        return [value[None] if name.endswith(".table") else value]

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`split`."""
        (value,) = parts
        fused = self._fused(name)
        if fused is not None:
            return heads_first(value, *fused)
        return value[0] if name.endswith(".table") else value

    def ignores(self, published: str) -> bool:
        """The mask, and the angles of rotary positions."""
        return published == "mask" or published.endswith("rope.freqs")

    def computed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Both."""
        choice, found = self.choice, {}
        layout = SequenceLayout.of_scales(choice.scales)
        rows = torch.arange(layout.length)
        seen = visible(layout.levels(torch.device("cpu")), rows[:, None], rows)
        found["mask"] = torch.where(seen, 0.0, float("-inf"))[None, None]
        trunk = frequencies(choice.width // choice.heads // 2)
        for number in range(choice.depth):
            found[f"{self._trunk_block(number)}.attn.rope.freqs"] = trunk
        for number in range(choice.head_depth):
            for part in ("attn", "crossattn") if choice.head_cross_attention else ("attn",):
                found[f"flownet.res_blocks.{number}.{part}.rope.freqs"] = frequencies(HEAD_SIZE // 2)
        return found
