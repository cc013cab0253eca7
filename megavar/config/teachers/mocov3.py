"""MoCo v3 (Chen et al. 2021, arXiv:2104.02057)."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from megavar.config.teachers.vit import ViTShape, ViTTeacherChoice


class MoCoV3Config(ViTTeacherChoice):
    """MoCo v3's ViT at patch 16: MEPA Table 5."""

    implementation: ClassVar[str] = "megavar.teachers.vit:ViTTeacher"
    weight_layouts: ClassVar[Mapping[str, str]] = {
        "timm": "megavar.teachers.published:TimmLayout",
        "moco": "megavar.teachers.published:MoCoLayout",
    }

    name: Literal["mocov3"] = "mocov3"
    size: Literal["small", "base", "large"] = "base"
    """MEPA does not say which; ``base`` is REPA's (width 768), ``large`` is REPA's authors' own."""

    @property
    def shape(self) -> ViTShape:
        """Positions are stored for images of 224 pixels; the small one has 12 heads, too (the authors' ``vits.py``)."""
        width, depth, heads = {"small": (384, 12, 12), "base": (768, 12, 12), "large": (1024, 24, 16)}[self.size]
        return ViTShape(width, depth, heads, 16, 4 * width, 14, layer_scale=False)
