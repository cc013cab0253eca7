"""AliTok's autoregressive transformer (Wu et al. 2025), dense or with experts."""

from megavar.generators.alitok.model import AliTok

__all__ = ["AliTok"]
