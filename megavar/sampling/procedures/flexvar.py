"""Decoding of FlexVAR (jiaosiyu1999/FlexVAR ``models/flexvar.py``, ``autoregressive_infer_cfg``): any list of scales.

What it changes in VAR's decoding: how guidance rises, and that sides which training has hardly seen are not sampled.
The list of scales is that of the tokenizer which is handed in.
"""

from torch import Tensor

from megavar.config.procedures.flexvar import FlexVARSampling
from megavar.sampling.guidance import guide
from megavar.sampling.procedures.next_scale import NextScale


class FlexVARDecoding(NextScale):
    """Next-scale decoding with FlexVAR's rules."""

    settings: FlexVARSampling

    def guide(self, conditional: Tensor, free: Tensor, k: int, sides: tuple[int, ...]) -> Tensor:
        """By VAR's form with a rise of its own, or by LlamaGen's."""
        settings = self.settings
        if settings.guidance_form == "llamagen":
            return guide(conditional, free, settings.guidance - 1)
        rise = k / max(min(len(sides) - 1, settings.guidance_rise), 1)
        return guide(conditional, free, settings.guidance * (rise if sides[k] <= settings.largest else 1.0))

    def top_k(self, side: int) -> int:
        """One token at sides that training has hardly seen."""
        seen = side <= self.settings.largest and side in self.settings.sampled_sides
        return self.settings.top_k if seen else 1
