"""Hidden states and code vectors (reAR Fig. 8b, 8c; appendix C.2): linear CKA (Eq. 13), layer by layer.

Layers are counted as in the paper's tables: 0 is what the first block reads, n the output of block n. The row of token
i is compared with the vectors of token i (encoded) and of token i + 1 (decoded).
"""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from megavar.analysis.base import Analysis, Report, Subject
from megavar.analysis.similarity import linear_cka
from megavar.config.analyses.codebook_alignment import CodebookAlignmentAnalysis
from megavar.errors import ConfigError
from megavar.tokenizers.base import Codebook


class CodebookAlignment(Analysis[CodebookAlignmentAnalysis]):
    """One run, or several beside each other."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Compare every layer."""
        curves = {run.name: self._curves(run) for run in runs}
        values = {name: {f"{kind}_{layer}": float(value) for kind, curve in found.items()
                         for layer, value in enumerate(curve)} for name, found in curves.items()}  # fmt: skip
        for name, found in curves.items():
            values[name] |= {f"{kind}_peak": float(curve.argmax()) for kind, curve in found.items()}
        arrays = {f"{name}/{kind}": curve for name, found in curves.items() for kind, curve in found.items()}
        lines = [f"{name}: {kind} embedding, layer by layer: " + " ".join(f"{value:.3f}" for value in curve)
                 for name, found in curves.items() for kind, curve in found.items()]  # fmt: skip
        return Report(values[runs[0].name], values, arrays, {"": _draw(curves)}, "\n".join(lines))

    def _curves(self, run: Subject) -> dict[str, np.ndarray]:
        """CKA with the current and the next token's vector: float64 [depth + 1] each."""
        observer = run.observer()
        tokenizer = observer.tokenizer
        if tokenizer.space.kind not in ("grid", "line") or not isinstance(tokenizer, Codebook):
            raise ConfigError(
                f"The tokens of {run.name} ({tokenizer.space.kind}) are not read one by one: this analysis is of "
                f"generators that have a row for every token."
            )
        layers = (-1, *observer.blocks)
        states: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
        vectors: dict[str, list[np.ndarray]] = {"encoded": [], "decoded": []}
        for batch in observer.batches(self.choice.images, self.choice.batch):
            ids = tokenizer.tokens(tokenizer.encode(batch.require_images()))
            code = tokenizer.embed(ids).cpu()
            seen, rows = observer.observe(batch, layers, noise=self.choice.noise), ids.shape[1] - 1
            for layer in layers:
                states[layer].append(_rows(seen.hidden[layer][:, -rows:]))
            vectors["encoded"].append(_rows(code[:, :-1]))
            vectors["decoded"].append(_rows(code[:, 1:]))
        return {
            kind: np.array([linear_cka(np.concatenate(states[layer]), np.concatenate(wanted)) for layer in layers])
            for kind, wanted in vectors.items()
        }


def _rows(values: torch.Tensor) -> np.ndarray:
    """[B, n, C] -> [B n, C]."""
    return values.flatten(0, 1).numpy()


def _draw(curves: dict[str, dict[str, np.ndarray]]) -> Figure:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    titles = {"encoded": "current token's code vector", "decoded": "next token's code vector"}
    for axes, (kind, title) in zip(figure.subplots(1, 2), titles.items()):
        for name, found in curves.items():
            axes.plot(found[kind], "o-", label=name)
        axes.set(title=title, xlabel="layer (0: input)", ylabel="linear CKA")
        axes.locator_params(axis="x", integer=True)
        axes.legend(fontsize=8)
    return figure
