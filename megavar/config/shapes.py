"""The ``shapes`` source: rendered scenes, with captions or with classes."""

from typing import Annotated, Literal

from pydantic import Field

from megavar.config.base import Section

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
"""GenEval's kinds of prompts."""
TAGS: tuple[Tag, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


class ShapesSource(Section):
    """Scenes of coloured shapes rendered on the fly: no download, unlimited, scored exactly (ShapeEval).

    ``image_size`` is 32 (six shapes) or 64 (eight).
    """

    name: Literal["shapes"] = "shapes"
    conditioning: Literal["caption", "class"] = "caption"
    """``caption``: GenEval-style captions of one to four objects, no classes; a tenth of the combinations is kept for
    the test split. ``class``: one object, class = colour and shape."""
    tags: Annotated[tuple[Tag, ...], Field(strict=False, min_length=1)] = TAGS
    """Kinds of captions, each as often as the others, of scenes and of what evaluation asks for. ``[single_object,
    colors]`` is the easiest: one object."""
    length: int = Field(50_000, ge=1)
    """Number of training scenes. The collection is fixed: scene i is the same in every epoch."""
    test_length: int = Field(2_000, ge=1)
    """Number of test scenes."""
    seed: int = 0
    """Chooses the scenes."""
