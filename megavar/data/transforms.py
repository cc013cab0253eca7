"""Resizing, cropping and mirroring, exactly as the reference implementations do it.

A transform turns one image into uint8 [image_size, image_size, 3]. Randomness comes in as ``draws``, uniform numbers in
[0, 1) that the loader derives from (seed, epoch, sample index).
"""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from megavar.data.source import DamagedSampleError
from megavar.errors import DataError

BICUBIC = Image.Resampling.BICUBIC
LANCZOS = Image.Resampling.LANCZOS
LONGEST = 100
"""Longer side of an image over the shorter one, at most."""


class Transform(Protocol):
    """Prepares one image."""

    @property
    def size(self) -> int:
        """Height and width of the result."""
        ...

    draws: ClassVar[int]
    """How many random numbers the transform uses."""

    def __call__(self, image: Image.Image, draws: Sequence[float]) -> Image.Image:
        """Prepare an RGB ``image``."""
        ...


def decode(image: np.ndarray | bytes) -> Image.Image:
    """Decode an encoded image, or wrap a uint8 [H, W, 3] array, as RGB.

    Raises:
        DamagedSampleError: the bytes are not a whole image.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    with _damage():
        decoded = Image.open(io.BytesIO(image))
        if max(decoded.size) > LONGEST * min(decoded.size):  # resized, a line of pixels would fill the memory
            raise DamagedSampleError(
                f"the image has {decoded.width}x{decoded.height} pixels: more than {LONGEST} times as long as wide"
            )
        decoded.load()
        if decoded.mode.startswith("I"):  # 16 bits of grey, of which Pillow would cut values above 255 off
            return Image.fromarray((np.asarray(decoded) >> 8).astype(np.uint8)).convert("RGB")
        return decoded if decoded.mode == "RGB" else decoded.convert("RGB")


def size_of(image: bytes) -> tuple[int, int]:
    """Width and height of an encoded image, from its header.

    Raises:
        DamagedSampleError: the bytes are not an image.
    """
    with _damage():
        return Image.open(io.BytesIO(image)).size


@contextmanager
def _damage() -> Iterator[None]:
    """Pillow's decoders raise whatever their libraries do: each means that the image is damaged."""
    try:
        yield
    except UnidentifiedImageError as error:  # its message names a place in memory, another one in every run
        raise DamagedSampleError("these bytes are not an image") from error
    except (MemoryError, DamagedSampleError):
        raise
    except Exception as error:
        raise DamagedSampleError(f"the image cannot be decoded ({error or type(error).__name__})") from error


def choose(draw: float, count: int) -> int:
    """One of ``range(count)``, uniformly, from a uniform number in [0, 1)."""
    return min(int(draw * count), count - 1)


def mirror(image: Image.Image) -> Image.Image:
    """Exchange left and right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def resize_shorter_side(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Resize as torchvision's ``Resize(size)``: the longer side is rounded down."""
    width, height = image.size
    if min(width, height) == size:
        return image
    if width <= height:
        return image.resize((size, int(size * height / width)), resample)
    return image.resize((int(size * width / height), size), resample)


def adm_resize(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side as ADM: halve with a box filter while it is at least twice ``size``, then bicubic.

    Source: openai/guided-diffusion, ``guided_diffusion/image_datasets.py``.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), BICUBIC)


def crop(image: Image.Image, top: int, left: int, size: int) -> Image.Image:
    """The square of side ``size`` whose corner is (top, left)."""
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, draw_top: float, draw_left: float) -> Image.Image:
    """A square at a uniformly random place."""
    return crop(image, choose(draw_top, image.height - size + 1), choose(draw_left, image.width - size + 1), size)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square as torchvision's ``CenterCrop``: odd margins are rounded half to even."""
    return crop(image, round((image.height - size) / 2), round((image.width - size) / 2), size)


def adm_center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of the image resized to ``size``, as ADM: odd margins are rounded down."""
    image = adm_resize(image, size)
    return crop(image, (image.height - size) // 2, (image.width - size) // 2, size)


@dataclass(frozen=True)
class Unchanged:
    """Check the size only."""

    size: int
    draws: ClassVar[int] = 0

    def __call__(self, image: Image.Image, draws: Sequence[float]) -> Image.Image:
        """Return ``image`` itself."""
        if image.size != (self.size, self.size):
            raise DataError(
                f"An image has {image.width}x{image.height} pixels but data.image_size is {self.size} and "
                f"data.transform is none. Choose a transform, for example data.transform.name=var."
            )
        return image


@dataclass(frozen=True)
class Var:
    """VAR's training transform. Source: FoundationVision/VAR ``utils/data.py``."""

    size: int
    resize: float = 1.125
    flip: bool = False
    draws: ClassVar[int] = 3

    def __call__(self, image: Image.Image, draws: Sequence[float]) -> Image.Image:
        """Draws: top, left, mirror."""
        if self.flip and draws[2] < 0.5:
            image = mirror(image)
        image = resize_shorter_side(image, round(self.resize * self.size), LANCZOS)
        return random_crop(image, self.size, draws[0], draws[1])


@dataclass(frozen=True)
class VarTest:
    """VAR's validation transform: the resize of training, then the centre."""

    size: int
    resize: float = 1.125
    draws: ClassVar[int] = 0

    def __call__(self, image: Image.Image, draws: Sequence[float]) -> Image.Image:
        """No draws."""
        return center_crop(resize_shorter_side(image, round(self.resize * self.size), LANCZOS), self.size)


@dataclass(frozen=True)
class AdmRandomCrop:
    """FlexVAR's and SAR's training transform. Source: jiaosiyu1999/FlexVAR ``dataset/{imagenet,augmentation}.py``."""

    size: int
    minimum_share: float = 0.88
    flip: bool = True
    draws: ClassVar[int] = 4

    def __call__(self, image: Image.Image, draws: Sequence[float]) -> Image.Image:
        """Draws: top, left, mirror, size of the shorter side (from ``size`` to ``ceil(size / minimum_share)``)."""
        if self.flip and draws[2] < 0.5:
            image = mirror(image)
        largest = math.ceil(self.size / self.minimum_share)
        image = adm_resize(image, self.size + choose(draws[3], largest - self.size + 1))
        return random_crop(image, self.size, draws[0], draws[1])


@dataclass(frozen=True)
class AdmCenterCrop:
    """ADM's centre crop, optionally mirrored."""

    size: int
    flip: bool = False
    draws: ClassVar[int] = 1

    def __call__(self, image: Image.Image, draws: Sequence[float]) -> Image.Image:
        """Draws: mirror."""
        image = adm_center_crop(image, self.size)
        return mirror(image) if self.flip and draws[0] < 0.5 else image


def ten_crop_view(image: Image.Image, size: int, view: int) -> Image.Image:
    """View 0..9 of a square image in torchvision's ``TenCrop`` order.

    Top left, top right, bottom left, bottom right, centre; then the same five of the mirror image.
    """
    if view >= 5:
        image = mirror(image)
    end = image.height - size
    middle = round(end / 2)
    top, left = ((0, 0), (0, end), (end, 0), (end, end), (middle, middle))[view % 5]
    return crop(image, top, left, size)


@dataclass(frozen=True)
class TenCrop:
    """One of RAR's ten views. Source: bytedance/1d-tokenizer's pretokenization, FoundationVision/LlamaGen."""

    size: int
    resize: float = 1.1
    draws: ClassVar[int] = 1

    def __call__(self, image: Image.Image, draws: Sequence[float]) -> Image.Image:
        """Draws: view."""
        return self.view(image, choose(draws[0], 10))

    def view(self, image: Image.Image, view: int) -> Image.Image:
        """View 0..9."""
        return ten_crop_view(self._square(image), self.size, view)

    def views(self, image: Image.Image) -> list[Image.Image]:
        """All ten views, resized once."""
        square = self._square(image)
        return [ten_crop_view(square, self.size, view) for view in range(10)]

    def _square(self, image: Image.Image) -> Image.Image:
        return adm_center_crop(image, int(self.resize * self.size))


@dataclass(frozen=True)
class Titok:
    """TiTok's and VGT-AE's training transform. Source: bytedance/1d-tokenizer ``data/webdataset_reader.py``."""

    size: int
    random_crop: bool = True
    flip: bool = True
    draws: ClassVar[int] = 3

    def __call__(self, image: Image.Image, draws: Sequence[float]) -> Image.Image:
        """Draws: top, left, mirror."""
        image = resize_shorter_side(image, self.size, BICUBIC)
        if self.random_crop:
            image = random_crop(image, self.size, draws[0], draws[1])
        else:
            image = center_crop(image, self.size)
        return mirror(image) if self.flip and draws[2] < 0.5 else image


@dataclass(frozen=True)
class SquareCrop:
    """VGT's text-to-image transform. Source: hustvl/VGT ``src/datasets/utils.py`` (``crop2square``)."""

    size: int
    random: bool = True
    draws: ClassVar[int] = 1

    def __call__(self, image: Image.Image, draws: Sequence[float]) -> Image.Image:
        """Draws: place of the square along the longer side."""
        side = min(image.size)
        if self.random:
            image = random_crop(image, side, draws[0], draws[0])
        else:
            image = center_crop(image, side)
        return image.resize((self.size, self.size), BICUBIC)
