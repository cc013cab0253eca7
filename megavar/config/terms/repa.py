"""REPA on a flow head, as in VGT's released code."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.teachers.base import TeacherChoice
from megavar.config.terms.base import TermChoice
from megavar.config.terms.semantic_guidance import ProjectionConfig


class FlowAlignmentConfig(TermChoice):
    """Hidden states of the flow head resemble a teacher's features of the same places (Yu et al. 2025).

    VGT's code adds it with weight 0.5 and DINOv3 ViT-B/16; its paper does not name it.
    """

    implementation: ClassVar[str] = "megavar.recipes.terms.repa:FlowAlignment"

    name: Literal["flow_alignment"] = "flow_alignment"
    weight: float = Field(0.5, ge=0)
    """Its share in the total loss (released: 0.5)."""
    teacher: TeacherChoice
    """Whose features are the target (released: ``{name: dinov3, size: base, ...}``)."""
    block: int | None = Field(None, ge=0)
    """Number, from 0, of the flow head's block whose output is read. Default: the last of its first half (released: the
    sixth of 12)."""
    projection: ProjectionConfig = ProjectionConfig(preset="repa")
    """The MLP to the teacher's width: 2048 twice with SiLU."""

    def frozen_weights(self) -> dict[str, str]:
        """The teacher's."""
        return {"teacher": self.teacher.weights}

    @property
    def teachers(self) -> tuple[TeacherChoice, ...]:
        """The one."""
        return (self.teacher,)
