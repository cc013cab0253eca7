"""SAR's hybrid of masked and next-scale prediction."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.generators.scale_transformer import ScaleTransformerConfig


class ScaleARConfig(ScaleTransformerConfig):
    """SAR's hybrid (Table 2; GengzeZhou/SAR ``models/scalear.py``): MaskGIT up to the first map, 4x4, then scales.

    The sequence is the class's row, the first map with some of its tokens masked, then the other maps, each made of the
    one before it. FlexVAR's blocks and map of positions.
    """

    implementation: ClassVar[str] = "megavar.generators.scalear:ScaleAR"
    weight_layouts: ClassVar[Mapping[str, str]] = {"scalear": "megavar.generators.scalear.published:ScaleARLayout"}

    name: Literal["scalear"] = "scalear"
    position_side: int = Field(32, ge=1)
    """Side of the learned map of positions (published: 32)."""
    shared_position: bool = False
    """Whether the first map's positions come from that map, too, instead of a table of their own (the public code's
    ``share_randar_var_pos_embed``: off in training, on in its evaluation script)."""
    history: Literal["none", "released", "causal"] = "none"
    """What a map after the first sees beside itself. ``none``: the class's row (public code). ``released``: also all
    maps between the first and itself, while the class's row still sees the first map (``enable_var_kv``, which the
    public code has and does not use). ``causal``: the same maps, and the class's row sees itself alone: decoding with
    a cache is what was trained: the corrected variant. No map sees the first one directly, whose tokens are masked
    in training and known in decoding; the second map's input brings them."""
