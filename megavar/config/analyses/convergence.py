"""How fast runs get better (MEPA Fig. 5)."""

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
    logged: str = "loss"
    """Logged value that is drawn, and whose speed-up is computed; lower is better."""
