"""Which places of images have alike latents (VGT Fig. 3): objects, or textures?

    clusters = k-means over the places of all images, of vectors of length 1

Beside the picture: ``silhouette`` of the clusters, ``nmi`` with the image's class, and ``colours``, the share of the
variance of patches' mean colours that clusters explain. Clusters of textures know colours, clusters of objects classes.
"""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from megavar.analysis.base import Analysis, Report, Subject
from megavar.analysis.latents import PIXELS, Shown, show
from megavar.config.analyses.latent_clusters import LatentClustersAnalysis

_MEASURED = 4000
"""Places for the silhouette, which compares all pairs."""


class LatentClusters(Analysis[LatentClustersAnalysis]):
    """Latents, encoders and pixels side by side."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Cluster, paint, measure."""
        shown = show(runs, self.choice)
        maps = {name: self.clustered(vectors) for name, vectors in shown.vectors.items()}
        values = {name: self.measured(shown.vectors[name], found, shown) for name, found in maps.items()}
        lines = [f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items())
                 for name, found in values.items()]  # fmt: skip
        lines.append(f"{self.choice.clusters} clusters of the places of {len(shown.labels)} images")
        figure = _draw(shown, maps, self.choice.shown, self.choice.clusters)
        return Report(next(iter(values.values())), values, maps, {"": figure}, "\n".join(lines))

    def clustered(self, vectors: np.ndarray) -> np.ndarray:
        """[N, L, C] to numbers of clusters [N, L], the most frequent one first."""
        from sklearn.cluster import KMeans

        rows = unit(vectors)
        found = KMeans(self.choice.clusters, n_init=4, random_state=self.choice.seed).fit_predict(rows)
        order = np.argsort(-np.bincount(found, minlength=self.choice.clusters), kind="stable")
        return np.argsort(order)[found].reshape(vectors.shape[:2])

    def measured(self, vectors: np.ndarray, clusters: np.ndarray, shown: Shown) -> dict[str, float]:
        """See the module."""
        from sklearn.metrics import normalized_mutual_info_score, silhouette_score

        flat, rows = clusters.ravel(), unit(vectors)
        sample = {"sample_size": min(_MEASURED, len(rows)), "random_state": self.choice.seed}
        found = {"silhouette": float(silhouette_score(rows, flat, **sample))}
        if clusters.shape == shown.vectors[PIXELS].shape[:2]:
            pixels = shown.vectors[PIXELS].reshape(len(flat), 3, -1).mean(2)
            found["colours"] = explained(pixels, flat)
        if shown.classes > 1:
            labels = np.repeat(shown.labels, clusters.shape[1])
            found["nmi"] = float(normalized_mutual_info_score(labels, flat))
        return found


def unit(vectors: np.ndarray) -> np.ndarray:
    """[N, L, C] as rows [N L, C] of length 1."""
    rows = vectors.reshape(-1, vectors.shape[2])
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def explained(points: np.ndarray, groups: np.ndarray) -> float:
    """Share of the variance of points [n, C] that their groups [n] explain."""
    mean, total = points.mean(0), ((points - points.mean(0)) ** 2).sum()
    parts = [points[groups == group] for group in np.unique(groups)]
    return float(sum(len(part) * ((part.mean(0) - mean) ** 2).sum() for part in parts) / total)


def _draw(shown: Shown, maps: dict[str, np.ndarray], count: int, clusters: int) -> Figure:
    count = min(count, len(shown.images))
    maps = {name: found for name, found in maps.items() if round(found.shape[1] ** 0.5) ** 2 == found.shape[1]}
    figure = Figure(figsize=(1.5 * count + 1.5, 1.6 * (len(maps) + 1)), layout="constrained")
    figure.suptitle("Places of one colour are of one cluster")
    colours = matplotlib.colormaps["tab20" if clusters > 10 else "tab10"]
    grid = figure.subplots(len(maps) + 1, count, squeeze=False)
    for number in range(count):
        grid[0, number].imshow(shown.images[number].permute(1, 2, 0).numpy())
        for row, found in enumerate(maps.values(), 1):
            side = round(found.shape[1] ** 0.5)
            painted = found[number].reshape(side, side) % colours.N
            grid[row, number].imshow(painted, cmap=colours, vmin=0, vmax=colours.N - 1)
    for axes, name in zip(grid[:, 0], ("images", *maps)):
        axes.set_ylabel(name.replace(", ", "\n"), fontsize=8)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    return figure
