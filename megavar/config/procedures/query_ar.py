"""Drawing by position queries."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.procedures.base import SamplingChoice


class QuerySampling(SamplingChoice):
    """VGT's decoding: groups of latents in any order, each group by flow matching (Eq. 9 and 10).

    The defaults are the released ones for GenEval, but for ``context``; DPG-Bench takes 100 steps.
    """

    implementation: ClassVar[str] = "megavar.sampling.procedures.query_ar:QueryDecoding"

    procedure: Literal["query_ar"] = "query_ar"
    tokens_per_step: int = Field(1, ge=1)
    """Latents that are drawn together (``acc_ratio``: 1; Table 8: 4; Figure 9: 4, 16). Where they do not divide the
    image's, the first groups are one larger."""
    order: Literal["random", "sequential", "sample"] = "random"
    """Of places: one random permutation for all samples (released), row by row, or a permutation for each sample."""
    order_seed: int | None = 42
    """Of the one permutation; None: ``seed``."""
    context: Literal["training", "release"] = "training"
    """What the rows before a group are. ``training``: text without its padding, and queries with their latents, as in
    training. ``release``: padding of the text is seen after the first group, and where several latents are drawn
    together their bare queries stay beside those that are fed again with their latents."""
    solver: Literal["euler_maruyama", "euler"] = "euler_maruyama"
    """Of the flow: with noise in all steps but the last (released), or without (the paper's "deterministic
    sampling")."""
    steps: int = Field(30, ge=2)
    """Evaluations of the flow head per latent."""
    last_step: float = Field(0.04, ge=0, lt=1)
    """Size of the last step, which has no noise; the others share the rest. 0: all steps are alike."""
    time_shift: float = Field(1.0, ge=1)
    """Moves the times of the steps towards noise (released: not used)."""
    guidance: float = Field(4.5, ge=1)
    """Classifier-free guidance g of the first group: u + g (c - u)."""
    guidance_schedule: Literal["linear", "constant"] = "linear"
    """``linear``: 1 + (g - 1) (G - k) / G at group k = 0, 1 ... of G."""

    @property
    def guided(self) -> bool:
        """With any guidance."""
        return self.guidance > 1
