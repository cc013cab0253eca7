"""The public MAR checkpoints (``checkpoint-last.pth``): the authors' state dict, to and from our logical tensors."""

import re
from collections.abc import Sequence

from torch import Tensor

from megavar.generators.denoising_mlp import published_name
from megavar.weight_layout import NamedLayout, heads_first, parts_first

_BLOCK = {
    "attention_norm": "norm1",
    "attention.linear_qkv": "attn.qkv",
    "attention.linear_proj": "attn.proj",
    "feed_forward_norm": "norm2",
    "feed_forward.mlp.linear_fc1": "mlp.fc1",
    "feed_forward.mlp.linear_fc2": "mlp.fc2",
}
_OUTSIDE = {
    "embedding.condition": "class_emb",
    "embedding.projection": "z_proj",
    "embedding.norm": "z_proj_ln",
    "conditioning.norm": "decoder_norm",
}
_JUNCTION = {"junction.norm": "encoder_norm", "junction.projection": "decoder_embed"}
_TABLES = {
    "embedding.position": "encoder_pos_embed_learned",
    "embedding.nothing": "fake_latent",
    "conditioning.position": "diffusion_pos_embed_learned",
    "junction.mask_token": "mask_token",
    "junction.position": "decoder_pos_embed_learned",
}
_LEADING = {"fake_latent": 1, "mask_token": 2}
"""Leading dimensions of one; other tables have one."""


class MARLayout(NamedLayout):
    """Other names, fused projections in another order, tables with leading dimensions of one."""

    belongs_to = "a MAR checkpoint"
    remedy = (
        "Check generator.encoder_depth, decoder_depth, width, heads, buffer, classes and head, and the tokenizer's "
        "channels."
    )

    def names(self, name: str) -> tuple[str, ...]:
        """The one public tensor that holds ours."""
        if name.startswith("head."):
            found = published_name(name.removeprefix("head."), self.choice.head)
            return () if found is None else (f"diffloss.net.{found}",)
        numbered = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        inner = numbered[2] if numbered else name
        if inner in _TABLES:
            return (_TABLES[inner],)
        layer, _, kind = inner.rpartition(".")
        outside = _OUTSIDE | _JUNCTION
        if layer in outside:
            return (f"{outside[layer]}.{kind}",)
        if numbered is None or layer not in _BLOCK:
            return ()
        number, encoder = int(numbered[1]), self.choice.encoder_depth
        stack = f"encoder_blocks.{number}" if number < encoder else f"decoder_blocks.{number - encoder}"
        return (f"{stack}.{_BLOCK[layer]}.{kind}",)

    def _leading(self, name: str) -> int:
        inner = re.sub(r"blocks\.\d+\.", "", name)
        return _LEADING.get(_TABLES[inner], 1) if inner in _TABLES else 0

    def split(self, name: str, value: Tensor) -> Sequence[Tensor]:
        """Parts x head instead of Megatron-core's head x parts."""
        if ".linear_qkv." in name:
            return [parts_first(value, self.choice.heads)]
        return [value[(None,) * self._leading(name)]]

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`split`."""
        (value,) = parts
        if ".linear_qkv." in name:
            return heads_first(value, self.choice.heads)
        return value[(0,) * self._leading(name)]
