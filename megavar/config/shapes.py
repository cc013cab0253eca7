"""The ``shapes`` source: rendered scenes, with captions or with classes."""

from typing import Literal

from pydantic import Field

from megavar.config.base import Section


class ShapesSource(Section):
    """Scenes of coloured shapes rendered on the fly: no download, unlimited, scored exactly (ShapeEval).

    ``image_size`` is 32 (six shapes) or 64 (eight).
    """

    name: Literal["shapes"] = "shapes"
    conditioning: Literal["caption", "class"] = "caption"
    """``caption``: GenEval-style captions of one to four objects, no classes; a tenth of the combinations is kept for
    the test split. ``class``: one object, class = colour and shape."""
    length: int = Field(50_000, ge=1)
    """Number of training scenes. The collection is fixed: scene i is the same in every epoch."""
    test_length: int = Field(2_000, ge=1)
    """Number of test scenes."""
    seed: int = 0
    """Chooses the scenes."""
