"""The arithmetic of the scores: Gaussian statistics, Fréchet distance, Inception score, precision and recall.

Plain functions from feature matrices to numbers, on whatever device the features are; which network made the features
is not decided here. Legend: N images, D feature dimensions, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megavar.errors import DataError

_BLOCK_ELEMENTS = 2**26  # entries of one block of a distance matrix: 256 MiB in float32


@dataclass(frozen=True)
class Gaussian:
    """Mean ``[D]`` and unbiased covariance ``[D, D]`` (both float64) of ``count`` feature vectors."""

    mean: Tensor
    covariance: Tensor
    count: int


class GaussianAccumulator:
    """Mean and covariance of features that arrive in chunks, in float64.

    Chunks are merged by Chan's formula, so nothing cancels when the mean is large against the spread; the result
    depends on the chunks and their order only, therefore ranks store chunks and one of them reduces in chunk order.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """Take in ``features`` ``[N, D]`` of any float dtype, N >= 1."""
        chunk = features.to(torch.float64)
        mean = chunk.mean(dim=0)
        centred = chunk - mean
        scatter = centred.T @ centred
        if self._mean is None or self._scatter is None:
            self._count, self._mean, self._scatter = len(chunk), mean, scatter
            return
        total = self._count + len(chunk)
        shift = mean - self._mean
        self._scatter = self._scatter + scatter + torch.outer(shift, shift) * (self._count * len(chunk) / total)
        self._mean = self._mean + shift * (len(chunk) / total)
        self._count = total

    def result(self) -> Gaussian:
        """Return the statistics of everything added so far (at least two vectors)."""
        if self._mean is None or self._scatter is None or self._count < 2:
            raise DataError(f"a covariance needs at least 2 feature vectors, got {self._count}: add more images")
        scatter = (self._scatter + self._scatter.T) / 2
        return Gaussian(self._mean, scatter / (self._count - 1), self._count)


def gaussian(features: Tensor | Iterable[Tensor]) -> Gaussian:
    """Statistics of ``features``: one ``[N, D]`` tensor, or chunks of it in order."""
    accumulator = GaussianAccumulator()
    for chunk in [features] if isinstance(features, Tensor) else features:
        accumulator.add(chunk)
    return accumulator.result()


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Fréchet distance ``|m1-m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` of two Gaussians.

    The trace of the root is taken from the eigenvalues of the symmetric ``S1^(1/2) S2 S1^(1/2)``, which equal those of
    ``S1 S2``; nothing becomes complex and singular covariances need no offset.
    """
    values, vectors = torch.linalg.eigh(first.covariance.to(torch.float64))
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ second.covariance.to(root) @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    shift = first.mean.to(root) - second.mean.to(root)
    trace = first.covariance.to(root).trace() + second.covariance.to(root).trace()
    return float(shift @ shift + trace - 2 * cross)


def inception_score(logits: Tensor, *, splits: int = 10, order: Tensor | None = None) -> tuple[float, float]:
    """Mean and standard deviation over ``splits`` of exp(mean KL(p(y|x) || p(y))), in float64.

    ``logits`` is ``[N, C]``; ``order`` (int64 ``[N]``) is the order in which images fall into consecutive splits. The
    score depends on it: 50,000 images sorted by class and cut into ten score 56 instead of 277.
    """
    count = len(logits)
    if count < splits:
        raise DataError(f"an Inception score over {splits} splits needs at least {splits} images, got {count}")
    ordered = logits if order is None else logits[order.to(logits.device)]
    log_p = ordered.to(torch.float64).log_softmax(dim=1)
    scores = []
    for split in range(splits):
        part = log_p[split * count // splits : (split + 1) * count // splits]
        log_marginal = part.logsumexp(dim=0) - torch.tensor(float(len(part)), dtype=torch.float64).log()
        scores.append((part.exp() * (part - log_marginal)).sum(dim=1).mean().exp())
    stacked = torch.stack(scores)
    return float(stacked.mean()), float(stacked.std(correction=0))


def precision_recall(
    generated: Tensor, real: Tensor, *, neighbours: int = 3, half: bool = False
) -> tuple[float, float]:
    """Share of ``generated`` inside the manifold of ``real``, and of ``real`` inside that of ``generated``.

    Improved precision and recall (Kynkäänniemi et al. 2019): the manifold of a set is the union of the balls around its
    members that reach to their ``neighbours``-th nearest other member. Both inputs are ``[N, D]`` (N may differ).
    ``half=True`` rounds features and squared distances to float16 as ADM's evaluator does (which raises both numbers by
    about 0.002); like there, a block with an infinite distance is computed in float32 instead.
    """
    for name, features in (("generated", generated), ("real", real)):
        if len(features) <= neighbours:
            raise DataError(
                f"precision and recall with k={neighbours} need more than {neighbours} {name} images, "
                f"got {len(features)}: evaluate more images"
            )
    real_radii, generated_radii = _radii(real, neighbours, half), _radii(generated, neighbours, half)
    inside = torch.zeros(len(generated), dtype=torch.bool, device=generated.device)
    covered: list[Tensor] = []
    for block in _blocks(real, generated, half):  # in this order, as in ADM: float16 sums depend on it
        first = sum(map(len, covered))
        inside |= (block <= real_radii[first : first + len(block), None]).any(dim=0)
        covered.append((block <= generated_radii).any(dim=1))
    return float(inside.double().mean()), float(torch.cat(covered).double().mean())


def _radii(features: Tensor, neighbours: int, half: bool) -> Tensor:
    """Squared distance of every row to its k-th nearest other row (the row itself takes the first place)."""
    blocks = _blocks(features, features, half)
    return torch.cat([block.kthvalue(neighbours + 1, dim=1).values for block in blocks])


def _blocks(rows: Tensor, columns: Tensor, half: bool) -> Iterator[Tensor]:
    """Squared distances of all rows to all columns, as consecutive blocks of rows, float32."""
    size = max(1, _BLOCK_ELEMENTS // len(columns))
    single = _SingleDistances(columns)
    rounded = _HalfDistances(columns) if half else None
    for block in rows.split(size):
        if rounded is not None:
            distances = rounded.of(block)
            if bool(torch.isfinite(distances).all()):
                yield distances
                continue
        yield single.of(block)


class _SingleDistances:
    """Squared distances to fixed columns in float32."""

    def __init__(self, columns: Tensor) -> None:
        # Coordinates relative to a common origin: the squares stay small, so that the expansion does not cancel.
        self._origin = columns.float().mean(dim=0)
        self._columns = columns.float() - self._origin
        self._squares = self._columns.square().sum(dim=1)

    def of(self, rows: Tensor) -> Tensor:
        rows = rows.float() - self._origin
        squares = rows.square().sum(dim=1)[:, None] + self._squares[None, :]
        return squares.addmm_(rows, self._columns.T, alpha=-2).clamp_(min=0)


class _HalfDistances:
    """Squared distances in float16: products summed in float32, every result rounded, as tensor cores do."""

    def __init__(self, columns: Tensor) -> None:
        self._columns = columns.half().float()
        self._squares = self._rounded_squares(self._columns)

    def of(self, rows: Tensor) -> Tensor:
        rows = rows.half().float()
        products = (rows @ self._columns.T).half()
        return (self._rounded_squares(rows)[:, None] - 2 * products + self._squares[None, :]).clamp(min=0).float()

    @staticmethod
    def _rounded_squares(values: Tensor) -> Tensor:
        return values.square().half().float().sum(dim=1).half()
