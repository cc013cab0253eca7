"""How alike two representations of the same things are (Kornblith et al. 2019, arXiv:1905.00414)."""

from collections.abc import Sequence

import numpy as np


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear centred kernel alignment of [n, C] and [n, D] (Kornblith et al. 2019, Eq. 3)."""
    x, y = (part.astype(np.float64) - part.mean(0) for part in (x, y))
    norms = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(x.T @ y) ** 2 / norms) if norms > 0 else 0.0


def linear_cka_matrix(features: Sequence[np.ndarray]) -> np.ndarray:
    """[K, K] of K feature matrices of the same images."""
    return np.array([[linear_cka(a, b) for b in features] for a in features])
