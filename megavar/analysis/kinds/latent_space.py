"""Spaces of latents (VGT Fig. 7): dispersed and by meaning, or dense and entangled?

Pictures of t-SNE show what one wants to see; so beside them stand, for the means of images,

    nmi, ami      k-means with as many clusters as classes: its mutual information with the classes, normalized, and
                  corrected for chance
    silhouette    of the classes
    neighbours    share of the ten nearest that are of the same class

and for tokens ``effective_rank``: exp of the entropy of the shares of variance along the principal axes, from 1 (a
line) to the number of channels (a ball).
"""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from megavar.analysis.base import Analysis, Report, Subject
from megavar.analysis.embedding import in_two_dimensions, principal
from megavar.analysis.latents import Shown, show
from megavar.config.analyses.latent_space import LatentSpaceAnalysis

NEIGHBOURS = 10


class LatentSpace(Analysis[LatentSpaceAnalysis]):
    """Latents, encoders and pixels side by side."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Collect, embed, measure."""
        shown = show(runs, self.choice)
        values = {name: self.measured(vectors, shown.labels) for name, vectors in shown.vectors.items()}
        places, chosen = self._places(shown)
        arrays = {f"{name}/places": found for name, found in places.items()} | {"labels": shown.labels[chosen]}
        lines = [f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items())
                 for name, found in values.items()]  # fmt: skip
        lines.append(f"{len(shown.labels)} images of {shown.classes} classes, {len(chosen)} tokens drawn; chance of a "
                     f"neighbour of the same class: {chance(shown.labels):.3f}")  # fmt: skip
        figure = _draw(places, shown.labels[chosen], values)
        return Report(next(iter(values.values())), values, arrays, {"": figure}, "\n".join(lines))

    def measured(self, vectors: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """See the module; of vectors [N, L, C] and classes [N]. What needs classes is left out where there is one."""
        found = {"effective_rank": effective_rank(vectors.reshape(-1, vectors.shape[2]))}
        return found if len(np.unique(labels)) < 2 else found | by_class(vectors.mean(1), labels, self.choice.seed)

    def _places(self, shown: Shown) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Tokens in two dimensions, [n, 2] by name, and the image of each; the same tokens of all representations."""
        random, found = np.random.default_rng(self.choice.seed), {}
        count, places = next(iter(shown.vectors.values())).shape[:2]
        picked = np.sort(random.permutation(count * places)[: self.choice.points])
        for name, vectors in shown.vectors.items():
            same = vectors.shape[1] == places
            points = vectors.reshape(-1, vectors.shape[2])[picked] if same else vectors[picked // places].mean(1)
            found[name] = in_two_dimensions(points, self.choice.embedding, self.choice.seed)
        return found, picked // places


def by_class(means: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, float]:
    """How well vectors [N, C] know the classes [N]."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score, silhouette_score
    from sklearn.neighbors import NearestNeighbors

    reduced = principal(means)
    clusters = KMeans(len(np.unique(labels)), n_init=10, random_state=seed).fit_predict(reduced)
    near = NearestNeighbors(n_neighbors=min(NEIGHBOURS + 1, len(labels))).fit(reduced).kneighbors(reduced)[1][:, 1:]
    return {
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ami": float(adjusted_mutual_info_score(labels, clusters)),
        "silhouette": float(silhouette_score(reduced, labels)),
        "neighbours": float((labels[near] == labels[:, None]).mean()),
    }


def effective_rank(points: np.ndarray) -> float:
    """Of vectors [n, C]: exp(entropy of their shares of variance) (Roy and Vetterli 2007, of variances)."""
    centred = points.astype(np.float64) - points.mean(0)
    variances = np.linalg.eigvalsh(centred.T @ centred)
    shares = variances[variances > 0] / variances[variances > 0].sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def chance(labels: np.ndarray) -> float:
    """That two different images are of the same class."""
    counts = np.unique(labels, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1)))


def _draw(places: dict[str, np.ndarray], labels: np.ndarray, values: dict[str, dict[str, float]]) -> Figure:
    columns = min(3, len(places))
    rows = -(-len(places) // columns)
    figure = Figure(figsize=(4.4 * columns, 4.6 * rows), layout="constrained")
    figure.suptitle("Tokens of test images, coloured by the image's class")
    classes, numbers = np.unique(labels, return_inverse=True)
    colours = matplotlib.colormaps["turbo"](numbers / max(len(classes) - 1, 1))
    for axes, (name, points) in zip(figure.subplots(rows, columns, squeeze=False).flat, places.items()):
        axes.scatter(*points.T, s=4, c=colours, linewidths=0)
        found = values[name]
        said = [f"{key} {found[key]:.2f}" for key in ("ami", "neighbours", "effective_rank") if key in found]
        axes.set_title(f"{name}\n{', '.join(said)}", fontsize=9)
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
        axes.set_visible(bool(axes.get_title()))
    return figure
