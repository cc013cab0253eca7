"""FlexVAR (Jiao et al. 2025), dense or with experts."""

from megavar.generators.flexvar.model import FlexVAR

__all__ = ["FlexVAR"]
