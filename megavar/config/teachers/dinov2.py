"""DINOv2 (Oquab et al. 2023, arXiv:2304.07193)."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from megavar.config.teachers.vit import ViTShape, ViTTeacherChoice

SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "giant": (1536, 40, 24)}
"""Width, blocks, heads."""


class DINOv2Config(ViTTeacherChoice):
    """DINOv2's ViT at patch 14, with or without registers: MEPA Table 5, REPA's default."""

    implementation: ClassVar[str] = "megavar.teachers.vit:ViTTeacher"
    weight_layouts: ClassVar[Mapping[str, str]] = {
        "timm": "megavar.teachers.published:TimmLayout",
        "facebook": "megavar.teachers.published:FacebookLayout",
        "transformers": "megavar.teachers.published:TransformersDINOv2Layout",
    }

    name: Literal["dinov2"] = "dinov2"
    size: Literal["small", "base", "large", "giant"] = "base"
    """MEPA does not say which; ``base`` is REPA's (width 768), ``large`` has width 1024."""
    registers: bool = False
    """The weights with four registers (``_reg4_``, ``-with-registers-``)."""
    antialias: bool = True
    """How stored positions (37 x 37) are resampled: with antialiasing, as timm and REPA do, or without, as transformers
    does."""

    @property
    def shape(self) -> ViTShape:
        """Positions are stored for images of 518 pixels; the giant's networks are gated, of 2/3 of the usual size."""
        width, depth, heads = SIZES[self.size]
        gated = self.size == "giant"
        feed_forward = (width * 4 * 2 // 3 + 7) // 8 * 8 if gated else 4 * width
        registers = 4 if self.registers else 0
        return ViTShape(width, depth, heads, 14, feed_forward, 37, registers, gated=gated, antialias=self.antialias)
