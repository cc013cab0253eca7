"""VAR (Tian et al. 2024), dense or with MEPA's experts."""

from megavar.generators.var.model import VAR

__all__ = ["VAR"]
