"""What wrong tokens with nearer code vectors are worth (reAR Fig. 3b, 6, 7e to 7g)."""

from typing import ClassVar, Literal

from megavar.config.analyses.sequences import SequencesChoice


class EmbeddingReplacementAnalysis(SequencesChoice):
    """Wrong predictions are replaced by the wrong code whose vector is closest to the true one's."""

    implementation: ClassVar[str] = "megavar.analysis.kinds.embedding_replacement:EmbeddingReplacement"

    kind: Literal["embedding_replacement"] = "embedding_replacement"
    ratios: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """Shares r' of the wrong tokens that are replaced."""
    predicted: Literal["likeliest", "drawn"] = "likeliest"
    """How teacher-forced predictions are made. ``likeliest``: Eq. 8. ``drawn``: from the predicted distribution."""
