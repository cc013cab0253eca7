"""What a generator, a cache, a chunk of samples or the planner may know of a tokenizer."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TokenSpace:
    """The tokens of one image. Free of torch: login nodes and preflight use it."""

    kind: Literal["scales", "grid", "line", "latent"]
    """``scales``: square maps, coarse to fine, one after the other. ``grid``: one square map, row by row. ``line``: an
    ordered set without places in the image (TiTok). ``latent``: vectors instead of ids, row by row."""
    sides: tuple[int, ...]
    """Side lengths of the maps: several for ``scales``, one for ``grid`` and ``latent``, none for ``line``."""
    length: int
    """Tokens of an image, L."""
    vocabulary: int | None
    """Number of ids, V; None for vectors."""
    channels: int
    """Size of a code vector or of a latent token, C."""
    image_side: int
    """Side of the images in pixels."""
    image_channels: int = 3
    """Channels of the images."""

    @staticmethod
    def of_scales(
        sides: tuple[int, ...], vocabulary: int, channels: int, image_side: int, image_channels: int = 3
    ) -> "TokenSpace":
        """Square maps of ids."""
        length = sum(side * side for side in sides)
        return TokenSpace("scales", sides, length, vocabulary, channels, image_side, image_channels)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each map; of the whole set where there are none."""
        return tuple(side * side for side in self.sides) or (self.length,)

    @property
    def stored_type(self) -> Literal["uint16", "int32", "float32"]:
        """NumPy's name of the type that holds these tokens exactly: that of chunks of samples."""
        if self.vocabulary is None:
            return "float32"
        return "uint16" if self.vocabulary <= 2**16 else "int32"
