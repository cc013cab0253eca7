"""How much early mistakes cost (reAR Fig. 3a, 7a to 7d)."""

from typing import ClassVar, Literal

from megavar.config.analyses.sequences import SequencesChoice


class ExposureBiasAnalysis(SequencesChoice):
    """The same number of true tokens at the front (perfect context) or anywhere (imperfect context).

    The rest is drawn as the run's ``sampling`` says; ``sampling.guidance=1`` on the command line leaves guidance out.
    """

    implementation: ClassVar[str] = "megavar.analysis.kinds.exposure_bias:ExposureBias"

    kind: Literal["exposure_bias"] = "exposure_bias"
    ratios: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8)
    """Shares r of true tokens."""
