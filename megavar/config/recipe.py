"""Recipes: which paper's algorithm a run trains, with its hyper-parameters."""

from typing import Annotated, Literal

from pydantic import Field

from megavar.config.base import Section
from megavar.config.tokenizer_training import TokenizerTrainingConfig


class MEPAConfig(Section):
    """MEPA: next-scale cross entropy on a VAR, with experts balanced by Eq. 10 where the generator has experts."""

    name: Literal["mepa"] = "mepa"
    tokenizer_weights: str
    """Trained tokenizer: the directory of a megavar tokenizer run, or a file in VAR's published layout
    (``vae_ch160v4096z32.pth``)."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing of the cross entropy (VAR: 0)."""


RecipeConfig = Annotated[MEPAConfig | TokenizerTrainingConfig, Field(discriminator="name")]
