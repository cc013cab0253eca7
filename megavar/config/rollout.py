"""How tokens are drawn from a generator's own predictions while it is trained."""

from pydantic import Field

from megavar.config.base import Section


class RolloutConfig(Section):
    """How tokens are drawn from teacher-forced predictions (SAR Table 5, Alg. 1 line 18).

    The defaults are the best row of Table 5. The released training code does not pass its own options on and always
    draws with guidance 1.2 and top_p 0.96.
    """

    sampled: bool = True
    """Draw tokens; off takes the most likely ones, without guidance."""
    guidance: float = Field(2.5, ge=0)
    """Classifier-free guidance s: t = s (1 + k/(K-1)) / 2 at scale k, logits (1 + t) c - t u; up to 1 there is none.
    It doubles the batch of the first pass."""
    top_k: int = Field(900, ge=0)
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = Field(0.95, ge=0, le=1)
    """Then keep the smallest set of most likely tokens whose probability exceeds p; 0 keeps all."""

    @property
    def guided(self) -> bool:
        """Whether the first pass runs without classes, too."""
        return self.sampled and self.guidance > 1
