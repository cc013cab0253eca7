"""VGT's published files ``vgt_ae_*.pth``: names of the original InternViT, ours elsewhere; the teacher is passed over.

In ``vgt_ae_internvl3.pth`` the encoder has the names of InternVL's own code, in ``vgt_ae_qwen25vl.pth`` those of
transformers.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from megavar.config.tokenizers.vgt_ae import InternViTConfig
from megavar.weight_layout import NamedLayout, Shape

_PARTS = {"projection.blocks.": "down_blocks.", "projection.out.": "down_mlp.", "encoder.projector.": "mlp1."}
_EMBEDDINGS = {
    "cls_token": "class_embedding",
    "position_embeddings": "position_embedding",
    "patch_embeddings.projection": "patch_embedding",
}
_LAYER = {
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
}
_NUMBERED = re.compile(r"encoder\.layer\.(\d+)\.(.+)")
_SPLIT = re.compile(r"(.*\.attn)\.([qkv])\.(weight|bias)")
_JOINED = re.compile(r"(.*\.attn)\.qkv\.(weight|bias)")


class VGTAELayout(NamedLayout):
    """See the module."""

    belongs_to = "a VGT-AE"
    remedy = "Check tokenizer.encoder, decoder, semantic_width, channels and posterior."

    def names(self, name: str) -> tuple[str, ...]:
        """The authors' name; InternViT's queries, keys and values still apart (``attn.q``)."""
        for ours, theirs in _PARTS.items():
            if name.startswith(ours):
                return (name.replace(ours, theirs, 1),)
        if not name.startswith("encoder.tower."):
            return (name,)
        inner = name.removeprefix("encoder.tower.")
        return (f"encoder.{internvit_name(inner) if self._is_internvit else inner}",)

    def ignores(self, published: str) -> bool:
        """The frozen copy that the encoder was distilled from."""
        return published.startswith(("teacher.", "teacher_mlp1."))

    def export(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`megavar.weight_layout.WeightLayout.export`."""
        state = super().export(tensors)
        return joined(state) if self._is_internvit else state

    def load(
        self, state: Mapping[str, Tensor], expected: Mapping[str, Shape], passed: Mapping[str, Shape] = {}
    ) -> dict[str, Tensor]:
        """See :meth:`megavar.weight_layout.WeightLayout.load`."""
        return super().load(apart(state) if self._is_internvit else state, expected, passed)

    @property
    def _is_internvit(self) -> bool:
        return isinstance(self.choice.encoder, InternViTConfig)


def internvit_name(name: str) -> str:
    """transformers' name of a tensor of InternViT in InternVL's own code, which has one tensor ``qkv`` for three."""
    numbered = _NUMBERED.fullmatch(name)
    table = _EMBEDDINGS if numbered is None else _LAYER
    inner = name if numbered is None else numbered[2]
    inner = re.sub(r"attention\.([qkv])_proj", r"attn.\1", inner)
    for theirs, own in table.items():
        inner = inner.replace(theirs, own)
    return inner if numbered is None else f"encoder.layers.{numbered[1]}.{inner}"


def apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors ``attn.qkv`` as three, ``attn.q``, ``attn.k`` and ``attn.v``."""
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        match = _JOINED.fullmatch(name)
        if match is None or value.shape[0] % 3:
            result[name] = value
        else:
            result |= {f"{match[1]}.{part}.{match[2]}": rows for part, rows in zip("qkv", value.chunk(3))}
    return result


def joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`apart`."""
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        match = _SPLIT.fullmatch(name)
        if match is None:
            result[name] = value
        elif match[2] == "q":
            parts = [state[f"{match[1]}.{part}.{match[3]}"] for part in "qkv"]
            result[f"{match[1]}.qkv.{match[3]}"] = torch.cat(parts)
    return result
