"""MEPA's semantic guidance; REPA's alignment is a case of it."""

from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from megavar.config.base import Section
from megavar.config.teachers.base import TeacherChoice
from megavar.config.terms.base import TermChoice

HIDDEN = {"wide": (3072,), "deep": (1536, 1536), "repa": (2048, 2048)}
"""Hidden widths of each preset."""


class ProjectionConfig(Section):
    """The MLP m_phi from the generator's width to the teacher's.

    MEPA does not describe it. Its activated parameters (252 M at d12, 585 M at d16) leave 5.4 and 6.0 M for it, so its
    hidden widths do not depend on the depth. ``wide`` with a teacher of width 1024 (252.1 M, 585.3 M) and ``deep`` with
    one of 1280 (252.1 M, 584.9 M) or 1024 (251.7 M, 584.5 M) fit; REPA's own does not (254.5 M, 587.4 M at 1024).
    """

    preset: Literal["wide", "deep", "repa"] = "wide"
    """Hidden widths: 3072; 1536 twice; 2048 twice (REPA's code)."""
    hidden: Annotated[tuple[PositiveInt, ...], Field(strict=False)] | None = None
    """Hidden widths of your own instead of the preset's; none is a linear projection."""
    activation: Literal["silu", "gelu"] = "silu"
    """Between the layers (REPA: SiLU; MEPA does not say)."""

    @property
    def hidden_widths(self) -> tuple[int, ...]:
        """After defaults."""
        return HIDDEN[self.preset] if self.hidden is None else self.hidden

    def parameters(self, width: int, features: int) -> int:
        """Scalars of the MLP from ``width`` to ``features`` channels, biases included."""
        widths = (width, *self.hidden_widths, features)
        return sum((before + 1) * after for before, after in pairwise(widths))


class SemanticGuidanceConfig(TermChoice):
    """Aggregated hidden states of small and intermediate scales resemble a teacher's features (MEPA Eq. 11 and 12).

    Eq. 13 weighs the cross entropy, not this loss: set the recipe's ``cross_entropy_weight`` (paper: 0.5).
    """

    implementation: ClassVar[str] = "megavar.recipes.terms.semantic_guidance:SemanticGuidance"

    name: Literal["semantic_guidance"] = "semantic_guidance"
    teacher: TeacherChoice
    """Whose features g are the target."""
    scales: Literal["last", "L", "M", "S"] | Annotated[tuple[PositiveInt, ...], Field(min_length=1, strict=False)] = "M"
    """F: the aggregated features that are guided, each the sum over scales 1 to j. ``M``: the three intermediate ones
    (of ten scales: 5, 6, 7); ``S``: the three smallest (1, 2, 3); ``L``: the three largest (8, 9, 10); ``last``: all
    scales together (10), which is REPA on a pyramid; or a list of numbers from 1. Of fewer than nine scales a group is
    a third; where every step has other scales (FlexVAR) a group is one of the step's, and numbers are refused. The
    paper names the groups' numbers for M only."""
    block: int | None = Field(None, ge=0)
    """Number, from 0, of the block whose output is read. Default: depth / 2 - 1, the 6th of 12 and the 8th of 16
    ("the outputs of the middle block", Fig. 2)."""
    upsampling: Literal["bicubic", "bilinear"] = "bicubic"
    """Up in Eq. 11 (VAR's tokenizer: bicubic; MEPA does not say)."""
    projection: ProjectionConfig = ProjectionConfig()
    """m_phi."""

    def frozen_weights(self) -> dict[str, str]:
        """The teacher's."""
        return {"teacher": self.teacher.weights}

    @property
    def counted(self) -> bool:
        """Yes."""
        return True

    @property
    def teachers(self) -> tuple[TeacherChoice, ...]:
        """The one."""
        return (self.teacher,)

    def block_of(self, depth: int) -> int:
        """The block that is read of ``depth`` ones."""
        return max(depth // 2 - 1, 0) if self.block is None else self.block

    def group(self, number: int) -> tuple[int, ...]:
        """F, from 1, among ``number`` scales.

        Raises:
            ValueError: a scale is asked for that does not exist.
        """
        if not isinstance(self.scales, str):
            if max(self.scales) > number:
                raise ValueError(f"scales {list(self.scales)} were asked for, but there are only {number}")
            return self.scales
        size = 1 if self.scales == "last" else min(3, max(1, number // 3))
        middle = number // 2 + 1 - size // 2
        first = {"last": number, "L": number - size + 1, "M": middle, "S": 1}[self.scales]
        return tuple(range(first, first + size))

    @model_validator(mode="after")
    def _check(self) -> "SemanticGuidanceConfig":
        if not isinstance(self.scales, str) and len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales {list(self.scales)} name one twice")
        return self
