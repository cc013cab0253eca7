"""AliTok's public transformers (``alitok_b.bin`` ...): the authors' state dict, to and from our logical tensors."""

from collections.abc import Mapping
from typing import ClassVar

from megavar.generators.raster_layout import ATTENTION, RasterLayout


class AliTokLayout(RasterLayout):
    """See :class:`RasterLayout`."""

    belongs_to = "an AliTok transformer's checkpoint"
    remedy = (
        "Check generator.depth, generator.width, generator.classes, the tokenizer's vocabulary_size and "
        "generator.experts (public checkpoints are dense)."
    )
    block = ATTENTION | {
        "feed_forward.mlp.linear_fc1_gate": "mlp.w1",
        "feed_forward.mlp.linear_fc1_up": "mlp.w3",
        "feed_forward.mlp.linear_fc2": "mlp.w2",
    }
    outside: ClassVar[Mapping[str, str]] = {
        "embedding.table.weight": "embeddings.weight",
        "norm.weight": "norm.weight",
        "head.projection.weight": "output.weight",
        "head.projection.bias": "output.bias",
    }
