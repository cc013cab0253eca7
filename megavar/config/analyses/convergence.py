"""How fast runs get better (MEPA Fig. 5, SAR Fig. 1a)."""

from typing import ClassVar, Literal

from megavar.config.analyses.base import ObservedChoice


class ConvergenceAnalysis(ObservedChoice):
    """Curves of several runs over epochs: the logged loss, that of every kept checkpoint on test images, scores."""

    implementation: ClassVar[str] = "megavar.analysis.kinds.convergence:Convergence"

    kind: Literal["convergence"] = "convergence"
    metric: str = "fid"
    """Score that is drawn, where runs were scored at several checkpoints (``megavar evaluate --checkpoint all``): its
    name, or what stands before ``@``."""
    better: Literal["lower", "higher"] = "lower"
    """Direction of the score; speed-ups by scores are computed where lower is better."""
    continued: bool = False
    """Whether a run that began with a checkpoint of another (``train.initial_weights``) is drawn from where that stood
    on; else from 0."""
    logged: str = "loss"
    """Logged value that is drawn, and whose speed-up is computed; lower is better."""
