"""The kind of all teachers: frozen networks whose features a term compares hidden states with."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.base import PathText
from megavar.config.choice import Choice


class TeacherChoice(Choice):
    """A network and where its weights are; :class:`megavar.teachers.base.Teacher` is what it configures."""

    package: ClassVar[str] = "megavar.config.teachers"

    name: str
    """Which network."""
    weights: PathText
    """A local file in one of its published layouts, an export of ours, or the directory of a run. Part of a run's
    identity, by hash; nothing is downloaded."""
    grid: int = Field(16, ge=1)
    """Features along a side of the image, which is resized accordingly: 16 x 16 is VAR's last scale at 256 pixels, and
    takes 224 pixels at patch 14, 256 pixels at patch 16. At 512 pixels: 32."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """In what it computes. Features are float32 in any case. On a GPU ``bf16`` is several times as fast."""

    @property
    def width(self) -> int:
        """Channels of a feature, D."""
        raise NotImplementedError(f"{type(self).__name__} must say its width")

    @property
    def image_side(self) -> int:
        """Side in pixels of the images that it sees."""
        raise NotImplementedError(f"{type(self).__name__} must say the side of its images")
