"""VAR (Tian et al. 2024), dense or with MEPA's experts."""

from megavar.generators.var.model import VAR, VARInputs

__all__ = ["VAR", "VARInputs"]
