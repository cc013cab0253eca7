"""DINOv3 (Siméoni et al. 2025, arXiv:2508.10104)."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from megavar.config.teachers.vit import ViTShape, ViTTeacherChoice

SIZES = {
    "small": (384, 12, 6, 1536, False),
    "small_plus": (384, 12, 6, 1536, True),
    "base": (768, 12, 12, 3072, False),
    "large": (1024, 24, 16, 4096, False),
    "huge_plus": (1280, 32, 20, 5120, True),
}
"""Width, blocks, heads, hidden size of the feed-forward networks, whether they are gated."""


class DINOv3Config(ViTTeacherChoice):
    """DINOv3's ViT at patch 16, four registers, rotary positions: MEPA's teacher (section 5.3)."""

    implementation: ClassVar[str] = "megavar.teachers.vit:ViTTeacher"
    weight_layouts: ClassVar[Mapping[str, str]] = {
        "timm": "megavar.teachers.published:TimmDINOv3Layout",
        "transformers": "megavar.teachers.published:TransformersDINOv3Layout",
    }

    name: Literal["dinov3"] = "dinov3"
    size: Literal["small", "small_plus", "base", "large", "huge_plus"] = "large"
    """MEPA does not say which. ``large`` (width 1024) is the one with which the paper's 252 M and 585 M activated
    parameters come out; VGT and REPA take ``base`` (width 768)."""

    @property
    def shape(self) -> ViTShape:
        """Keys have no bias."""
        width, depth, heads, feed_forward, gated = SIZES[self.size]
        return ViTShape(
            width, depth, heads, 16, feed_forward, None, registers=4, gated=gated, key_bias=False, epsilon=1e-5
        )
