"""RAR (Yu et al. 2024), dense or with experts; reAR's generator."""

from megavar.generators.rar.model import RAR

__all__ = ["RAR"]
