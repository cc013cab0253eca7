"""Names in which others publish vision transformers: timm, transformers, and the authors of DINOv2 and MoCo v3.

Only reading is offered: nobody trains these networks here. Strict, as all weight layouts: a file of another size or
variant is refused, and says which names it is about.
"""

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from megavar.config.teachers.vit import ViTTeacherChoice
from megavar.errors import CheckpointError
from megavar.weight_layout import NamedLayout, Shape

Names = dict[str, str | tuple[str, ...]]
_NAME = re.compile(r"(?:blocks\.(?P<block>\d+)\.)?(?P<part>.+?)(?P<kind>\.weight|\.bias)?")


class TimmLayout(NamedLayout):
    """timm's ``VisionTransformer``: DINOv2, MoCo v3."""

    belongs_to = "a vision transformer as timm stores it"
    remedy = "Check the teacher's name and size (and registers)."
    parts: ClassVar[Names] = {
        "patches": "patch_embed.proj",
        "class_token": "cls_token",
        "registers": "reg_token",
        "position": "pos_embed",
        "norm_1": "norm1",
        "attention.qkv": "attn.qkv",
        "attention.projection": "attn.proj",
        "scale_1": "ls1.gamma",
        "norm_2": "norm2",
        "feed_forward.rise": "mlp.fc1",
        "feed_forward.fall": "mlp.fc2",
        "scale_2": "ls2.gamma",
        "norm": "norm",
    }
    """Our parts in their names; several where they keep what we join."""
    block: ClassVar[str] = "blocks."
    """What the names of blocks begin with."""
    prefix: ClassVar[str] = ""
    """What all names begin with."""
    class_position: ClassVar[bool] = False
    """Whether the class token of a network with registers has a position; timm adds it to the token."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Beginnings of names that carry nothing for us."""
    choice: ViTTeacherChoice

    def names(self, name: str) -> tuple[str, ...]:
        """One, or several where they keep what we join."""
        block, part, kind = _parts_of(name)
        public = self._public(part, kind)
        place = f"{self.block}{block}." if block is not None else ""
        return tuple(f"{self.prefix}{place}{one}{kind}" for one in public)

    def _public(self, part: str, kind: str) -> tuple[str, ...]:
        found = self.parts[part]
        return (found,) if isinstance(found, str) else found

    @property
    def _drops_position(self) -> bool:
        return self.choice.shape.registers > 0 and not self.class_position

    def split(self, name: str, value: Tensor) -> Sequence[Tensor]:
        """Equal rows for each of their parts; positions without that of the class token where they have none."""
        if name == "position" and self._drops_position:
            return [value[:, 1:]]
        return value.chunk(len(self.names(name)))

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`split`."""
        if name == "position" and self._drops_position:
            return torch.cat([torch.zeros_like(parts[0][:, :1]), parts[0]], 1)
        return torch.cat(list(parts))

    def ignores(self, published: str) -> bool:
        """What only their training used."""
        return published.startswith(self.unused) if self.unused else False

    def export(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Refused."""
        raise CheckpointError(f"{type(self).__name__} only reads: teachers are not trained here.")


class FacebookLayout(TimmLayout):
    """The authors' DINOv2 files (``dinov2_vitb14_pretrain.pth``)."""

    belongs_to = "a DINOv2 of its authors"
    class_position = True
    unused = ("mask_token",)
    parts: ClassVar[Names] = {**TimmLayout.parts, "registers": "register_tokens"}

    def _public(self, part: str, kind: str) -> tuple[str, ...]:
        """The giant's gated networks have names of their own."""
        if self.choice.shape.gated and part.startswith("feed_forward."):
            return ({"feed_forward.rise": "mlp.w12", "feed_forward.fall": "mlp.w3"}[part],)
        return super()._public(part, kind)


class MoCoLayout(TimmLayout):
    """The authors' MoCo v3 checkpoints (``vit-b-300ep.pth.tar``): the base encoder, which they evaluate."""

    belongs_to = "a MoCo v3 checkpoint of its authors"
    prefix = "base_encoder."
    unused = ("momentum_encoder.", "predictor.", "base_encoder.head.")

    def load(
        self, state: Mapping[str, Tensor], expected: Mapping[str, Shape], passed: Mapping[str, Shape] = {}
    ) -> dict[str, Tensor]:
        """See :meth:`NamedLayout.load`; all names begin with what DistributedDataParallel adds, or none."""
        return super().load({n.removeprefix("module."): v for n, v in state.items()}, expected, passed)


class TransformersDINOv2Layout(TimmLayout):
    """``Dinov2Model`` and ``Dinov2WithRegistersModel`` of transformers, as their files name it."""

    belongs_to = "a DINOv2 as transformers stores it"
    block = "encoder.layer."
    class_position = True
    unused = ("embeddings.mask_token",)
    parts: ClassVar[Names] = {
        "patches": "embeddings.patch_embeddings.projection",
        "class_token": "embeddings.cls_token",
        "registers": "embeddings.register_tokens",
        "position": "embeddings.position_embeddings",
        "norm_1": "norm1",
        "attention.qkv": tuple(f"attention.attention.{which}" for which in ("query", "key", "value")),
        "attention.projection": "attention.output.dense",
        "scale_1": "layer_scale1.lambda1",
        "norm_2": "norm2",
        "feed_forward.rise": "mlp.fc1",
        "feed_forward.fall": "mlp.fc2",
        "scale_2": "layer_scale2.lambda1",
        "norm": "layernorm",
    }

    def _public(self, part: str, kind: str) -> tuple[str, ...]:
        """The giant's gated networks have names of their own."""
        if self.choice.shape.gated and part.startswith("feed_forward."):
            return ({"feed_forward.rise": "mlp.weights_in", "feed_forward.fall": "mlp.weights_out"}[part],)
        return super()._public(part, kind)


class _WithoutKeyBias(TimmLayout):
    """DINOv3: queries and values have biases, keys have none."""

    def split(self, name: str, value: Tensor) -> Sequence[Tensor]:
        """Without the keys' share."""
        if name.endswith("qkv.bias"):
            query, _, values = value.chunk(3)
            return [query, values]
        return super().split(name, value)

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """The keys' share is zero."""
        if name.endswith("qkv.bias"):
            return torch.cat([parts[0], torch.zeros_like(parts[0]), parts[1]])
        return super().join(name, parts)


class TimmDINOv3Layout(_WithoutKeyBias):
    """timm's ``Eva`` with DINOv3's options, with (``qkvb``) or without biases of queries and values."""

    belongs_to = "a DINOv3 as timm stores it"
    parts: ClassVar[Names] = {**TimmLayout.parts, "scale_1": "gamma_1", "scale_2": "gamma_2"}

    def names(self, name: str) -> tuple[str, ...]:
        """The biases of queries and values have names without a last part."""
        if name.endswith("qkv.bias"):
            block, _, _ = _parts_of(name)
            return f"blocks.{block}.attn.q_bias", f"blocks.{block}.attn.v_bias"
        return super().names(name)

    def _public(self, part: str, kind: str) -> tuple[str, ...]:
        """Gated networks keep gate and value apart."""
        if self.choice.shape.gated and part == "feed_forward.rise":
            return "mlp.fc1_g", "mlp.fc1_x"
        return super()._public(part, kind)

    def load(
        self, state: Mapping[str, Tensor], expected: Mapping[str, Shape], passed: Mapping[str, Shape] = {}
    ) -> dict[str, Tensor]:
        """See :meth:`NamedLayout.load`; where a file has no biases of queries and values they are zero."""
        if "blocks.0.attn.q_bias" not in state:
            missing = [name for ours in expected if ours.endswith("qkv.bias") for name in self.names(ours)]
            state = {**state, **{name: torch.zeros(self.choice.shape.width) for name in missing}}
        return super().load(state, expected, passed)


class TransformersDINOv3Layout(_WithoutKeyBias):
    """``DINOv3ViTModel`` of transformers, as its files name it."""

    belongs_to = "a DINOv3 as transformers stores it"
    block = "layer."
    unused = ("embeddings.mask_token",)
    parts: ClassVar[Names] = {
        "patches": "embeddings.patch_embeddings",
        "class_token": "embeddings.cls_token",
        "registers": "embeddings.register_tokens",
        "norm_1": "norm1",
        "attention.qkv": tuple(f"attention.{which}_proj" for which in "qkv"),
        "attention.projection": "attention.o_proj",
        "scale_1": "layer_scale1.lambda1",
        "norm_2": "norm2",
        "feed_forward.rise": "mlp.up_proj",
        "feed_forward.fall": "mlp.down_proj",
        "scale_2": "layer_scale2.lambda1",
        "norm": "norm",
    }

    def _public(self, part: str, kind: str) -> tuple[str, ...]:
        """Keys have no bias; gated networks keep gate and value apart."""
        if part == "attention.qkv" and kind == ".bias":
            return "attention.q_proj", "attention.v_proj"
        if self.choice.shape.gated and part == "feed_forward.rise":
            return "mlp.gate_proj", "mlp.up_proj"
        return super()._public(part, kind)


def _parts_of(name: str) -> tuple[str | None, str, str]:
    """Block number, part, and ``.weight``, ``.bias`` or nothing of one of our names."""
    match = _NAME.fullmatch(name)
    assert match is not None, name
    return match["block"], match["part"], match["kind"] or ""
