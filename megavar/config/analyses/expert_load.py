"""How evenly experts are used (MEPA Table 1)."""

from typing import ClassVar, Literal

from megavar.config.analyses.base import ObservedChoice


class ExpertLoadAnalysis(ObservedChoice):
    """Tokens per expert, averaged over layers and normalized so that every expert's fair share is 8."""

    implementation: ClassVar[str] = "megavar.analysis.kinds.expert_load:ExpertLoad"

    kind: Literal["expert_load"] = "expert_load"
