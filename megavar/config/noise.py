"""Noisy contexts: wrong tokens among those that a generator reads while it is trained."""

from typing import Literal

from pydantic import Field

from megavar.config.base import Section


class NoiseConfig(Section):
    """reAR Eq. 4 and 5, Table 4: each sequence has a share e of its input tokens replaced by random codes.

    The tokens to predict stay true, and so do classes.
    """

    schedule: Literal["fixed", "uniform", "linear", "truncated"] = "truncated"
    """How e is chosen at progress t of the run, with c = ``share``. ``fixed``: c. ``uniform``: U(0, c). ``linear``:
    U(0, c (1 - t)). ``truncated``: U(0, c max(0, 1 - 4t/3)), the paper's choice; its appendix prints min, but the
    example beside it (up to 1/2 at t = 3/8) needs max."""
    share: float = Field(1.0, ge=0, le=1)
    """c."""

    def most(self, progress: float) -> float:
        """Largest share of wrong tokens at progress t in [0, 1]."""
        factor = {"linear": 1 - progress, "truncated": max(0.0, 1 - 4 * progress / 3)}.get(self.schedule, 1.0)
        return self.share * factor
