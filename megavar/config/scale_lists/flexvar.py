"""FlexVAR's random lists of scales."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from megavar.config.scale_lists.base import ScaleListsChoice

Share = Annotated[float, Field(ge=0, le=1)]


class FlexVARScaleLists(ScaleListsChoice):
    """A new list in every step (FlexVAR's ``gen_curr_patch_nums``): the first two scales, some coarse, some fine ones.

    The defaults are the released code's for 256 pixels; the paper gives no numbers. Of its lists 67 % end with the
    tokenizer's last scale; they have 8.5 scales and 592 tokens on average.
    """

    implementation: ClassVar[str] = "megavar.recipes.scale_lists.flexvar:RandomLists"

    name: Literal["flexvar"] = "flexvar"
    usual_share: Share = 0.05
    """Share of the steps that begin with the tokenizer's own list."""
    coarse: int = Field(5, ge=0)
    """Number of sides drawn from 3 up to, without, ``fine_from``."""
    fine: int = Field(2, ge=0)
    """Number of sides drawn from ``fine_from`` up to, without, the last one."""
    fine_from: int = Field(11, ge=3)
    """First of the fine sides."""
    dropped: tuple[Share, ...] = Field((0.1, 0.05, 0.02, 0.01), strict=False)
    """Share of the steps that lose one inner scale, another one, and so on."""
    longest: int = Field(680, ge=1)
    """Most tokens of a list. While it has more, one of its last four scales is taken out, perhaps the very last."""
    per: Literal["step", "rank"] = "step"
    """Who shares a list: all ranks (default: every rank has the same work, and the step is the same on any number of
    ranks), or nobody (the released code)."""

    @model_validator(mode="after")
    def _enough_sides(self) -> "FlexVARScaleLists":
        if self.coarse > self.fine_from - 3:
            raise ValueError(f"coarse={self.coarse} sides cannot be drawn from 3 to {self.fine_from - 1}: lower it")
        return self
