"""MEPA's two routers."""

from typing import ClassVar, Literal

from megavar.config.experts.base import ExpertsChoice


class ScaleAwareExperts(ExpertsChoice):
    """What both routers of MEPA take."""

    scale_embedding_in_router: bool = False
    """Add a learnable scale embedding SE of the router's own (K x width) to its input tokens. Off: "In practice, the
    VAR transformer adds positional and scale embeddings to input tokens, naturally meeting the need for scale
    awareness" (MEPA below Eq. 9). The ``scale`` router always has its SE."""


class ScaleTokenExperts(ScaleAwareExperts):
    """STMoE: the token, in whose embedding its scale is, chooses the experts (Eq. 9)."""

    implementation: ClassVar[str] = "megavar.transformer.moe.routers.scale_token:ScaleTokenRouter"

    router: Literal["scale_token"] = "scale_token"


class ScaleExperts(ScaleAwareExperts):
    """SMoE: the scale alone chooses the experts (Eq. 8)."""

    implementation: ClassVar[str] = "megavar.transformer.moe.routers.scale:ScaleRouter"

    router: Literal["scale"] = "scale"
