"""Figures of runs over their steps, and of their scores and experts."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megavar.reporting.facts import RunFacts
from megavar.reporting.reference import Reference
from megavar.reporting.scores import metrics_of, suites

POINTS = 400
"""At most, of a curve: a long one is averaged over neighbouring lines."""
SIZE = (6.4, 3.1)
_MARKS = {"restart": ":", "spike": "--", "not finite": "--", "rollback": "-.", "diverged": "-"}
Points = tuple[np.ndarray, np.ndarray]


def figures(runs: Sequence[RunFacts], references: Sequence[Reference] = ()) -> dict[str, tuple[str, Figure]]:
    """All figures for which there are data: (heading, figure) by name."""
    found: dict[str, tuple[str, Figure]] = {}

    def add(name: str, heading: str, figure: Figure | None) -> None:
        if figure is not None:
            found[name] = heading, figure

    add("loss", "Training loss", curve(runs, "loss", references))
    add("validation", "Validation loss, on held-out data", validation(runs, references))
    add("accuracy", "Accuracy", curve(runs, "accuracy"))
    for run in runs:
        named = f" of {run.name}" if len(runs) > 1 else ""
        end = f"-{slug(run.name)}" if len(runs) > 1 else ""
        add(f"scales{end}", f"Loss by scale{named}", parts(run, r"loss/(.+)", "loss", "scale"))
        add(f"experts{end}", f"Share of tokens by expert{named}", parts(run, r"expert_share/(\d+)", "share", "expert"))
        add(f"routing{end}", f"Experts by scale and block{named}", routing(run))
    add("learning_rate", "Learning rate", curve(runs, "learning_rate"))
    add("gradient_norm", "Gradient norm", curve(runs, "gradient_norm"))
    add("speed", "Images per second", curve(runs, "images_per_second"))
    add("guidance", "Scores by guidance", guidance(runs))
    return found


def slug(name: str) -> str:
    """``name`` as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "run"


def points(lines: Sequence[dict[str, object]], key: str) -> Points | None:
    """Steps and values of ``key``, thinned to :data:`POINTS` by averaging; None: fewer than two."""
    pairs = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    if len(pairs) < 2:
        return None
    steps, values = np.array(pairs, dtype=float).T
    if len(steps) > POINTS:
        bounds = np.linspace(0, len(steps), POINTS + 1).astype(int)[:-1]
        width = np.diff([*bounds, len(steps)])
        steps, values = np.add.reduceat(steps, bounds) / width, np.add.reduceat(values, bounds) / width
    return steps, values


def curve(runs: Sequence[RunFacts], key: str, references: Sequence[Reference] = ()) -> Figure | None:
    """One quantity of all runs, with restarts, spikes and reference curves."""
    keys = {run.name: next((k for k in _keys(run, key) if points(run.record.lines, k)), None) for run in runs}
    if not any(keys.values()):
        return None
    figure, axes = _axes(key.replace("_", " "))
    for number, run in enumerate(runs):
        if (name := keys[run.name]) is not None and (found := points(run.record.lines, name)) is not None:
            axes.plot(*found, color=f"C{number}", linewidth=1.2, label=run.name)
            _mark(axes, run, f"C{number}" if len(runs) > 1 else "0.35")
    for reference in references:
        reference.draw(axes, key)
    return _finish(figure, axes)


def _keys(run: RunFacts, key: str) -> list[str]:
    """``key``, or where modules have one each, the first one's."""
    return [key, *sorted({k for line in run.record.lines[-1:] for k in line if k.startswith(f"{key}/")})]


def _mark(axes: Axes, run: RunFacts, color: str) -> None:
    for step, word in run.marks:
        axes.axvline(step, color=color, linewidth=0.8, linestyle=_MARKS[word], label=word)


def validation(runs: Sequence[RunFacts], references: Sequence[Reference] = ()) -> Figure | None:
    """Validation losses of all runs."""
    lines = {run.name: [e for e in run.record.events if e["event"] == "validation"] for run in runs}
    if not any(points(found, "loss") for found in lines.values()):
        return None
    figure, axes = _axes("validation loss")
    for number, run in enumerate(runs):
        if (found := points(lines[run.name], "loss")) is not None:
            axes.plot(*found, "o-", color=f"C{number}", markersize=2.5, linewidth=1.2, label=run.name)
    for reference in references:
        reference.draw(axes, "validation/loss")
    return _finish(figure, axes)


def parts(run: RunFacts, pattern: str, label: str, kind: str) -> Figure | None:
    """Quantities that belong together, one line each."""
    keys = {match[1]: key for line in run.record.lines for key in line if (match := re.fullmatch(pattern, key))}
    drawn = {name: found for name, key in keys.items() if (found := points(run.record.lines, key)) is not None}
    if len(drawn) < 2:
        return None
    names = sorted(drawn, key=lambda name: (len(name), name))
    figure, axes = _axes(label)
    colors = _colors(len(names))
    for color, name in zip(colors, names):
        text = name if kind in name else f"{kind} {name}"
        axes.plot(*drawn[name], color=color, linewidth=1.0, label=text.replace("_", " "))
    _mark(axes, run, "0.35")
    return _finish(figure, axes, columns=2 if len(names) > 6 else 1)


def _colors(count: int) -> np.ndarray:
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0, 0.92, count))


def routing(run: RunFacts) -> Figure | None:
    """Scale x expert, a panel per block (at most sixteen, evenly chosen), from the newest ``routing/step-*.npz``."""
    files = sorted((run.path / "routing").glob("step-*.npz"))
    if not files:
        return None
    try:
        with np.load(files[-1], allow_pickle=False) as stored:
            load, names = stored["load"], {key: list(map(str, stored[key])) for key in ("targets", "kinds")}
    except (OSError, ValueError, KeyError):
        return None
    chosen = np.unique(np.linspace(0, len(load) - 1, min(16, len(load))).astype(int))
    across = min(4, len(chosen))
    down = -(-len(chosen) // across)
    figure = Figure(figsize=(2.6 * across + 0.8, 2.1 * down + 0.4), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    share = load / np.maximum(load.sum(-1, keepdims=True), 1)
    for axes, block in zip(grid.flat, chosen):
        image = axes.imshow(share[block], aspect="auto", cmap="viridis", vmin=0, vmax=share.max())
        axes.set_title(f"block {block + 1}", fontsize=8)
        for axis, key in ((axes.xaxis, "targets"), (axes.yaxis, "kinds")):
            axis.set_ticks(range(len(names[key])), names[key], fontsize=6)
    for axes in list(grid.flat)[len(chosen) :]:
        axes.axis("off")
    figure.colorbar(image, ax=grid, label="share of the scale's tokens")
    return figure


def guidance(runs: Sequence[RunFacts]) -> Figure | None:
    """Scores against guidance, where a checkpoint was scored with several: one panel per metric."""
    for suite in suites({run.name: run.scores for run in runs}):
        series = {}
        for run in runs:
            scored = {s.guidance: s for s in run.scores if s.suite == suite and s.guidance is not None}
            newest = max((s.checkpoint for s in scored.values()), default="")
            kept = sorted((g, s) for g, s in scored.items() if g is not None and s.checkpoint == newest)
            if len(kept) > 1:
                series[run.name] = kept
        if not series:
            continue
        metrics = metrics_of([s for kept in series.values() for _, s in kept])[:6]
        figure = Figure(figsize=(SIZE[0], 2.2 * -(-len(metrics) // 2)), layout="constrained")
        for axes, metric in zip(figure.subplots(-(-len(metrics) // 2), 2, squeeze=False).flat, metrics):
            for name, kept in series.items():
                axes.plot([g for g, _ in kept], [s.metrics.get(metric.key, np.nan) for _, s in kept], "o-", label=name)
            axes.set_title(metric.heading, fontsize=8)
            axes.set_xlabel("guidance", fontsize=8)
            axes.tick_params(labelsize=7)
        return figure
    return None


def _axes(label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(figure: Figure, axes: Axes, columns: int = 1) -> Figure:
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles))
    axes.legend(once.values(), once.keys(), fontsize=7, ncols=columns, frameon=False)
    return figure


def save_all(drawn: dict[str, tuple[str, Figure]], directory: Path, write: Callable[[Path, bytes], None]) -> list[Path]:
    """Each figure as ``NAME.pdf``."""
    import io

    paths = []
    for name, (_, figure) in drawn.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="pdf", metadata={"CreationDate": None})
        paths.append(directory / f"{name}.pdf")
        write(paths[-1], buffer.getvalue())
    return paths
