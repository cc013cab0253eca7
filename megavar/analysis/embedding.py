"""Vectors in two dimensions."""

from typing import Literal

import numpy as np

COMPONENTS, PERPLEXITY = 50, 30


def in_two_dimensions(points: np.ndarray, embedding: Literal["tsne", "pca"], seed: int) -> np.ndarray:
    """[N, C] -> [N, 2]: t-SNE of :func:`principal` coordinates, or the first two of them."""
    reduced = principal(points)
    if embedding == "pca":
        return reduced[:, :2]
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(points) - 1) // 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)


def principal(points: np.ndarray) -> np.ndarray:
    """Coordinates along the first :data:`COMPONENTS` principal axes."""
    centred = points - points.mean(0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :COMPONENTS] * sizes[:COMPONENTS]
