"""SAR's hybrid of masked and next-scale prediction."""

from megavar.generators.scalear.model import ScaleAR, ScaleARInputs

__all__ = ["ScaleAR", "ScaleARInputs"]
