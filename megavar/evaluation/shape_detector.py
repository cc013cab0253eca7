"""Finds the shapes in an image, exactly: nearest palette colour, connected regions, overlap with the known outlines."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from megavar.data.shapes_grammar import COLORS, vocabulary
from megavar.data.shapes_renderer import PALETTE, SIZES, shape_mask

REJECTION_RADIUS = 70.0
"""A pixel further than this from every colour of the palette belongs to the background."""
LEAST_PIXELS, LEAST_SHARE = 12, 0.018
"""Regions below the larger of these are noise (the share is of all pixels)."""
LARGEST_SHARE = 0.7
"""Regions wider or higher than this share of the image are no objects."""
LEAST_OVERLAP = 0.55
"""Least intersection over union with the outline of a shape."""
_GRID = 16  # outlines are compared at this resolution


@dataclass(frozen=True)
class Detection:
    """An object found in an image."""

    shape: str
    color: str
    score: float
    """Intersection over union with the best outline."""
    box: tuple[int, int, int, int]
    """x1, y1, x2, y2 with exclusive ends."""


def detect(images: np.ndarray) -> list[list[Detection]]:
    """Objects in uint8 images [N, H, W, 3] (H = W = 32 or 64), best first."""
    return [_detect_one(image) for image in images]


def _detect_one(image: np.ndarray) -> list[Detection]:
    side = image.shape[0]
    nearest = _nearest_colors()[(image >> 2) @ np.array([4096, 64, 1])]
    least = max(LEAST_PIXELS, LEAST_SHARE * nearest.size)
    found = []
    for color in np.flatnonzero(np.bincount(nearest.ravel(), minlength=len(COLORS) + 1)[:-1] >= least):
        regions, count = ndimage.label(nearest == color)  # neighbours share an edge
        sizes = np.bincount(regions.ravel(), minlength=count + 1)
        windows = ndimage.find_objects(regions)
        for region in np.flatnonzero(sizes[1:] >= least) + 1:
            rows, columns = windows[region - 1]
            mask = regions[rows, columns] == region
            if max(mask.shape) > LARGEST_SHARE * side:
                continue
            shape, score = _best_outline(mask, side)
            if score >= LEAST_OVERLAP:
                box = (columns.start, rows.start, columns.stop, rows.stop)
                found.append(Detection(shape, COLORS[color], score, box))
    return sorted(found, key=lambda detection: -detection.score)


def _best_outline(mask: np.ndarray, side: int) -> tuple[str, float]:
    outlines, areas, names = _outlines(side)
    pixels = _square_grid(mask)
    inside = outlines @ pixels
    overlap = inside / (areas + pixels.sum() - inside)
    best = int(overlap.argmax())
    return names[best], float(overlap[best])


@functools.cache
def _outlines(side: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Outlines of every shape at every size [T, 256], their areas [T] and the shapes' names."""
    names, rows = [], []
    for shape in vocabulary(side).shapes:
        for size in SIZES:
            names.append(shape)
            rows.append(_square_grid(shape_mask(shape, size, side // 32)))
    outlines = np.stack(rows)
    return outlines, outlines.sum(axis=1), names


def _square_grid(mask: np.ndarray) -> np.ndarray:
    """Centre ``mask`` in a square and resample it (nearest) to 16x16: float32 [256]."""
    height, width = mask.shape
    side = max(height, width)
    square = np.zeros((side, side), dtype=np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = mask
    places = ((np.arange(_GRID) + 0.5) * side / _GRID).astype(int)
    return square[places[:, None], places].ravel()


@functools.cache
def _nearest_colors() -> np.ndarray:
    """For every colour of 6 bits per channel the index of the nearest in the palette, or 10 for the background."""
    levels = np.arange(64) * 4 + 1.5
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    palette = np.array([PALETTE[color] for color in COLORS], dtype=np.float64)
    squared = (grid**2).sum(1)[:, None] - 2 * grid @ palette.T + (palette**2).sum(1)
    nearest = squared.argmin(axis=1)
    nearest[squared.min(axis=1) > REJECTION_RADIUS**2] = len(COLORS)
    return nearest.astype(np.int8)
