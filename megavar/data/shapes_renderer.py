"""Scenes of flat shapes on a flat background: laid out from a prompt, drawn without antialiasing."""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass

import numpy as np

from megavar.data.shapes_grammar import Prompt, Vocabulary, Wanted

BACKGROUND = (128, 140, 140)
PALETTE = {
    "red": (220, 30, 30),
    "orange": (250, 130, 0),
    "yellow": (250, 230, 30),
    "green": (20, 160, 40),
    "blue": (30, 60, 220),
    "purple": (140, 30, 170),
    "pink": (255, 150, 200),
    "brown": (120, 60, 10),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
"""RGB of GenEval's ten colours: any two at least 103 apart, each at least 110 from the background."""
GAP = 2
"""Least distance in pixels between the bounding boxes of two objects of a 32-pixel scene."""
SIZES = (9, 10, 11, 12, 13)
"""Sides in pixels of an object in a 32-pixel scene; scenes of three or four objects use the first three."""
POSITION_MARGIN = 0.1
"""GenEval's rule: offsets of centres are shortened by this share of the two objects' dimensions."""
_ATTEMPTS = 200


@dataclass(frozen=True)
class Item:
    """One object: its bounding box starts at (top, left) and is as large as its mask."""

    shape: str
    color: str
    size: int
    """Side before scaling, one of SIZES."""
    top: int
    left: int
    scale: int = 1
    """2 in a 64-pixel scene."""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x1, y1, x2, y2 with exclusive ends."""
        height, width = shape_mask(self.shape, self.size, self.scale).shape
        return self.left, self.top, self.left + width, self.top + height


Scene = tuple[Item, ...]
Box = tuple[float, float, float, float]


class Draws:
    """An endless supply of random numbers that are a function of (seed, stream, index).

    A scene needs a few dozen, one by one: Python's generator, whose ``random()`` is the same in every version, is
    twenty times faster at that than counter-based tensors.
    """

    def __init__(self, seed: int, stream: str, index: int) -> None:
        self._generator = random.Random(f"{seed}/{stream}/{index}")

    def below(self, count: int) -> int:
        """A number of ``range(count)``."""
        return min(int(self._generator.random() * count), count - 1)


@functools.cache
def shape_mask(shape: str, size: int, scale: int = 1) -> np.ndarray:
    """The pixels of a shape: bool [h, size * scale], every border row and column touched.

    Shapes are drawn ``size`` pixels wide, then every pixel becomes ``scale`` x ``scale``: the 64-pixel scenes show the
    32-pixel shapes enlarged, whose tips outlive a blur that those of a finer drawing do not.
    """
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    radius = np.hypot(x, y)
    match shape:
        case "circle":
            mask = radius <= 1
        case "square":
            mask = np.ones((size, size), dtype=bool)
        case "triangle":
            mask = np.abs(x) <= (y + 1) / 2 + 0.5 / size
        case "cross":
            mask = (np.abs(x) <= 0.34) | (np.abs(y) <= 0.34)
        case "ring":
            mask = (radius <= 1) & (radius >= 0.5)
        case "bar":
            mask = np.abs(y) <= 0.34
        case "diamond":
            mask = np.abs(x) + np.abs(y) <= 1
        case "heart":
            lobes = np.hypot(np.abs(x) - 0.5, y + 0.45) <= 0.52
            mask = lobes | ((np.abs(x) <= 1 - (y + 0.35) / 1.33) & (y >= -0.35))
        case _:
            raise ValueError(f"no shape is called {shape!r}")
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return mask.repeat(scale, axis=0).repeat(scale, axis=1)


def render(scene: Scene, image_size: int) -> np.ndarray:
    """Draw a scene: uint8 [image_size, image_size, 3]."""
    canvas = np.empty((image_size, image_size, 3), dtype=np.uint8)
    canvas[:] = BACKGROUND
    for item in scene:
        left, top, right, bottom = item.box
        canvas[top:bottom, left:right][shape_mask(item.shape, item.size, item.scale)] = PALETTE[item.color]
    return canvas


def relations(box: Box, other: Box) -> set[str]:
    """Where ``box`` is as seen from ``other``, by GenEval's rule (two relations hold near a diagonal)."""
    shortened, squared_distance = [], 0.0
    for low, high in ((0, 2), (1, 3)):
        offset = (box[low] + box[high] - other[low] - other[high]) / 2
        slack = POSITION_MARGIN * (abs(box[high] - box[low]) + abs(other[high] - other[low]))
        shortened.append(math.copysign(max(abs(offset) - slack, 0.0), offset))
        squared_distance += offset**2
    if max(map(abs, shortened)) < 1e-3:
        return set()
    right, down = (value / math.sqrt(squared_distance) for value in shortened)
    names = {"left of": right < -0.5, "right of": right > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in names.items() if holds}


def lay_out(prompt: Prompt, words: Vocabulary, image_size: int, draws: Draws, *, held_out: bool) -> Scene:
    """Draw a scene that shows exactly what ``prompt`` asks for.

    Colours that the prompt leaves open are random; without ``held_out`` never one reserved for that shape.
    """
    scale = image_size // 32
    sizes = SIZES if prompt.count <= 2 else SIZES[:3]
    while True:  # a crowded beginning may leave no room: start again with the next numbers
        scene: list[Item] = []
        for wanted in prompt.include:
            for _ in range(wanted.count):
                placed = _place(wanted, scene, words, sizes, scale, image_size, draws, held_out)
                if placed is not None:
                    scene.append(placed)
        if len(scene) == prompt.count:
            return tuple(scene)


def _place(
    wanted: Wanted,
    scene: list[Item],
    words: Vocabulary,
    sizes: tuple[int, ...],
    scale: int,
    image_size: int,
    draws: Draws,
    held_out: bool,
) -> Item | None:
    """One more object that keeps its distance from the others and the relation it was asked for."""
    free = words.colors_for(wanted.shape, reserved=False)
    if held_out:
        free += words.colors_for(wanted.shape, reserved=True)
    color = wanted.color or free[draws.below(len(free))]
    size = sizes[draws.below(len(sizes))]
    height, width = shape_mask(wanted.shape, size, scale).shape
    for _ in range(_ATTEMPTS):
        top, left = draws.below(image_size - height + 1), draws.below(image_size - width + 1)
        item = Item(wanted.shape, color, size, top, left, scale)
        related = wanted.position is None or wanted.position in relations(item.box, scene[0].box)
        if related and not any(_touch(item.box, other.box, GAP * scale) for other in scene):
            return item
    return None


def _touch(box: tuple[int, ...], other: tuple[int, ...], gap: int) -> bool:
    return box[0] < other[2] + gap and other[0] < box[2] + gap and box[1] < other[3] + gap and other[1] < box[3] + gap
