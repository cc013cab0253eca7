"""What vision transformers differ in, and the kind of teachers that are one."""

from dataclasses import dataclass

from megavar.config.teachers.base import TeacherChoice

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of the channels of images in [0, 1]."""


@dataclass(frozen=True)
class ViTShape:
    """Sizes and variants of a pre-norm vision transformer with a class token (Dosovitskiy et al. 2021)."""

    width: int
    """C."""
    depth: int
    """Blocks."""
    heads: int
    """Attention heads."""
    patch: int
    """Side of a patch in pixels."""
    feed_forward: int
    """Hidden size of the feed-forward networks."""
    stored_grid: int | None
    """Patches along a side for which learned positions are stored, resampled where others are asked for; None: rotary
    positions (DINOv3)."""
    registers: int = 0
    """Register tokens (Darcet et al. 2024) after the class token."""
    layer_scale: bool = True
    """Learned scales of the residual branches."""
    gated: bool = False
    """Feed-forward networks are SwiGLU."""
    key_bias: bool = True
    """Keys have a bias, as queries and values have."""
    epsilon: float = 1e-6
    """Of all LayerNorms."""
    antialias: bool = True
    """Resample positions with antialiasing."""
    mean: tuple[float, float, float] = IMAGENET[0]
    """Of each channel of images in [0, 1]; subtracted."""
    std: tuple[float, float, float] = IMAGENET[1]
    """Of each channel; divided by."""


class ViTTeacherChoice(TeacherChoice):
    """A teacher that is a vision transformer: its features are the patch tokens after the last norm."""

    @property
    def shape(self) -> ViTShape:
        """Sizes and variants."""
        raise NotImplementedError(f"{type(self).__name__} must say its shape")

    @property
    def width(self) -> int:
        """C."""
        return self.shape.width

    @property
    def image_side(self) -> int:
        """A patch per feature."""
        return self.grid * self.shape.patch
