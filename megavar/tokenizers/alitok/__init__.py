"""AliTok: prefix tokens, then a grid of tokens."""

from megavar.tokenizers.alitok.model import AliTok

__all__ = ["AliTok"]
