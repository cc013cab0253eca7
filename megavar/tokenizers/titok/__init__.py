"""TiTok: an image as an ordered set of few tokens."""

from megavar.tokenizers.titok.model import TiTok

__all__ = ["TiTok"]
