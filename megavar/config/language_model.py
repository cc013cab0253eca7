"""Sizes of a pretrained language model whose blocks a generator takes over."""

from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from megavar.config.base import Section
from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.base import Limits


class LanguageModelConfig(Section):
    """Qwen2 and Qwen2.5, which InternVL3 and Qwen2.5-VL are built on; the defaults are InternVL3-1B's.

    Its trained weights come from a local Hugging Face folder (``train.initial_weights``), of which ``depth`` takes the
    first blocks: VGT keeps 21 and 8 of Qwen2.5-VL-3B's 36.
    """

    vocabulary: int = Field(151674, ge=2)
    """Entries of the table of text tokens. The head over them is not part of a generator of images."""
    width: int = Field(896, ge=1)
    """Hidden size C."""
    depth: int = Field(24, ge=1)
    """Number of blocks; the first ones of the pretrained model where it has more."""
    heads: int = Field(14, ge=1)
    """Query heads."""
    groups: int = Field(2, ge=1)
    """Key and value heads; each serves heads / groups query heads."""
    head_size: int | None = Field(None, ge=2)
    """Channels of a head. Default: width / heads."""
    feed_forward: int = Field(4864, ge=1)
    """Hidden size of the gated feed-forward network."""
    rotary_base: float = Field(1e6, gt=1)
    """Base of the rotary positions' frequencies (``rope_theta``)."""
    rotary_sections: Annotated[tuple[PositiveInt, ...], Field(strict=False)] | None = None
    """Pairs of a head's channels that turn with time, row and column (Qwen2.5-VL's ``mrope_section``: 16, 24, 24).
    Without them all turn with one position, which is the same where the three are equal: text and VGT's images."""
    norm_epsilon: float = Field(1e-6, gt=0)
    """Epsilon of RMSNorm."""
    experts: ExpertsChoice | None = None
    """Mixture of experts in the place of the feed-forward networks, which then begin with random weights."""

    @property
    def channels_of_head(self) -> int:
        """D."""
        return self.head_size or self.width // self.heads

    @property
    def limits(self) -> Limits:
        """Heads, vocabulary and rows of dense feed-forward networks are shared by tensor-parallel ranks.

        Groups are not: ranks that outnumber them hold copies.
        """
        key = "generator.language_model"
        shared = {f"query heads ({key}.heads)": self.heads, f"text tokens ({key}.vocabulary)": self.vocabulary}
        if self.experts is None:
            shared[f"rows of the feed-forward network ({key}.feed_forward)"] = self.feed_forward
        return Limits(self.depth, shared, self.experts)

    @model_validator(mode="after")
    def _check(self) -> "LanguageModelConfig":
        if self.heads % self.groups:
            raise ValueError(f"heads={self.heads} is not a multiple of groups={self.groups}: change one of them")
        if self.head_size is None and self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}: give head_size")
        if self.channels_of_head % 2:
            raise ValueError(f"heads of {self.channels_of_head} channels have no pairs to turn: give an even head_size")
        if self.rotary_sections is not None and (
            len(self.rotary_sections) != 3 or 2 * sum(self.rotary_sections) != self.channels_of_head
        ):
            raise ValueError(
                f"rotary_sections={list(self.rotary_sections)} must be three numbers whose sum is "
                f"{self.channels_of_head // 2}, half of a head's channels"
            )
        return self
