"""``routing/``: where the tokens of each block and kind went, at every preview, as numbers and as a picture."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from megavar import storage
from megavar.recipes.base import RecordsRouting, chunks_of
from megavar.training.observers import Observer, Watched

_log = logging.getLogger(__name__)


class RoutingObserver(Observer):
    """Adds up loads between previews. ``step-<step>.npz`` holds ``load`` float64 [blocks, kinds, targets] in tokens,
    ``targets`` (names of the experts) and ``kinds`` (of tokens: scales, sides), counted from 1."""

    _load: np.ndarray | None = None

    def begin(self, watched: Watched) -> None:
        """See :meth:`Observer.begin`."""
        super().begin(watched)
        chunks = (chunk for module in watched.recipe.modules().values() for chunk in chunks_of(module))
        names = (chunk.routing_targets for chunk in chunks if isinstance(chunk, RecordsRouting))
        self._targets = next(filter(None, names), ())

    def opened(self, step: int) -> None:
        """See :meth:`Observer.opened`."""
        self._load = None

    def logged(self, step: int, record: Mapping[str, float], statistics: Mapping[str, Tensor]) -> None:
        """See :meth:`Observer.logged`."""
        if self.watched.monitor.is_writer and "load" in statistics:
            load = statistics["load"].numpy()
            self._load = load.copy() if self._load is None else self._load + load

    def previewed(self, step: int) -> None:
        """See :meth:`Observer.previewed`."""
        load, self._load = self._load, None
        if load is None or not load.any():
            return
        folder = self.watched.directory.path / "routing"
        kinds = [str(number + 1) for number in range(load.shape[1])]
        try:
            with storage.atomic_file(folder / f"step-{step:08d}.npz") as file:
                np.savez(file, load=load, targets=np.array(self._targets), kinds=np.array(kinds))
            draw(load, self._targets, kinds, step, folder / "expert-map.png")
        except (OSError, ImportError) as error:  # no run ends for a picture
            _log.warning("The routing of step %d cannot be kept: %s", step, error)


def draw(load: np.ndarray, targets: tuple[str, ...], kinds: list[str], step: int, path: Path) -> None:
    """Write one panel per block: kinds of tokens by experts, coloured by share of the kind's tokens."""
    from matplotlib.figure import Figure

    blocks = [number for number in range(len(load)) if load[number].any()]
    columns = min(len(blocks), 6)
    rows = -(-len(blocks) // columns)
    figure = Figure(figsize=(2.2 * columns + 1.2, 2.0 * rows + 0.8), layout="constrained")
    figure.suptitle(f"Which experts the tokens of each scale are sent to (step {step})", fontsize=10)
    grid = figure.subplots(rows, columns, squeeze=False)
    shares = load / load.sum(2, keepdims=True).clip(min=1)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, block in zip(grid.flat, blocks):
        axes.set_axis_on()
        image = axes.imshow(shares[block], cmap="viridis", vmin=0, vmax=shares.max(), aspect="auto")
        axes.set_title(f"block {block + 1}", fontsize=8)
        axes.set_xticks(range(len(targets)), targets, fontsize=6)
        axes.set_yticks(range(len(kinds)), kinds, fontsize=6)
        axes.set_xlabel("expert", fontsize=7)
        axes.set_ylabel("scale" if len(kinds) > 1 else "tokens", fontsize=7)
    figure.colorbar(image, ax=grid, shrink=0.7, label="share of tokens")
    with storage.atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
