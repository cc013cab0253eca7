"""The public RAR checkpoints (``rar_b.bin`` ...): the authors' state dict, to and from our logical tensors."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from megavar.generators.raster_layout import ATTENTION, RasterLayout

_LEADING_DIMENSIONS = {
    "embedding.begin": 2, "embedding.position": 1, "embedding.target": 1, "embedding.step": 1
}  # fmt: skip


class RARLayout(RasterLayout):
    """Also leading dimensions of one."""

    belongs_to = "a RAR checkpoint"
    remedy = (
        "Check generator.depth, generator.width, generator.classes, generator.spare_positions, generator.spare_steps, "
        "the tokenizer's vocabulary_size and generator.experts (public RAR checkpoints are dense)."
    )
    block = ATTENTION | {
        "feed_forward.mlp.linear_fc1": "mlp.fc1",
        "feed_forward.mlp.linear_fc2": "mlp.fc2",
        "modulation.linear": "adaLN_modulation.1",
    }
    outside: ClassVar[Mapping[str, str]] = {
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

    def split(self, name: str, value: Tensor) -> Sequence[Tensor]:
        """With leading dimensions."""
        return [part[(None,) * _LEADING_DIMENSIONS.get(name, 0)] for part in super().split(name, value)]

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`split`."""
        return super().join(name, [part[(0,) * _LEADING_DIMENSIONS.get(name, 0)] for part in parts])
