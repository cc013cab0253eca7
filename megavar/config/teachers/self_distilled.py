"""A small vision transformer that a run of ours trained by self-distillation."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from megavar.config.base import Section
from megavar.config.teachers.vit import ViTShape, ViTTeacherChoice


class ViTConfig(Section):
    """Sizes of the network; the defaults suit images of 16 pixels."""

    width: int = Field(64, ge=4)
    """Hidden size C."""
    depth: int = Field(4, ge=1)
    """Blocks."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    patch: int = Field(4, ge=1)
    """Side of a patch in pixels."""
    grid: int = Field(4, ge=1)
    """Patches along a side of the images that it is trained with."""

    @model_validator(mode="after")
    def _check(self) -> "ViTConfig":
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}: change one of them")
        return self

    @property
    def shape(self) -> ViTShape:
        """Plain: learned positions, neither registers nor layer scales, images to [-1, 1]."""
        half = (0.5, 0.5, 0.5)
        return ViTShape(
            self.width, self.depth, self.heads, self.patch, 4 * self.width, self.grid, layer_scale=False, mean=half,
            std=half,
        )  # fmt: skip


class SelfDistilledConfig(ViTTeacherChoice):
    """The result of ``recipe: self_distillation``: real guidance where no published weights are at hand."""

    implementation: ClassVar[str] = "megavar.teachers.vit:ViTTeacher"
    weight_layouts: ClassVar[Mapping[str, str]] = {}

    name: Literal["self_distilled"] = "self_distilled"
    grid: int = Field(4, ge=1)
    """Features along a side of the image."""
    network: ViTConfig = ViTConfig()
    """Sizes, as in the run that trained it (``recipe.network``)."""

    @property
    def shape(self) -> ViTShape:
        """Of the network."""
        return self.network.shape
