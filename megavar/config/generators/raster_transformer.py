"""What transformers that draw one token after the other have in common: RAR's and AliTok's."""

from typing import Literal

from pydantic import Field

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.base import GeneratorChoice, Limits
from megavar.config.token_space import TokenSpace


class RasterTransformerConfig(GeneratorChoice):
    """Sizes, classes and experts. A family says what else it has, and what its feed-forward network is."""

    depth: int = Field(24, ge=1)
    """Number of blocks."""
    width: int = Field(768, ge=1)
    """Hidden size C."""
    heads: int = Field(16, ge=1)
    """Attention heads."""
    classes: int = Field(1000, ge=1)
    """Number of classes; one more embedding row stands for "no class"."""
    label_drop: float = Field(0.1, ge=0, le=1)
    """Share of samples whose label is replaced by "no class" (classifier-free guidance)."""
    experts: ExpertsChoice | None = None
    """Mixture of experts; none means dense."""
    tied_codebook: Literal["embedding", "head", "both"] | None = None
    """Where the tokenizer's own code vectors, frozen, and one linear layer stand in for learned tables: for the tokens
    that are read, for the head's classes, or both (reAR Table 3, "tied codebook embedding": "in the embedding layer or
    prediction head"; one layer each is ours). None: nowhere."""
    attention_kernel: Literal["auto", "dense", "causal", "flex"] = "auto"
    """Kernel of causal attention."""

    @property
    def reads_codebook(self) -> bool:
        """Where it is tied to one."""
        return self.tied_codebook is not None

    @property
    def feed_forward_size(self) -> int:
        """Rows of the feed-forward network's first layer (of each half where it is gated)."""
        raise NotImplementedError(f"{type(self).__name__} must say the size of its feed-forward network")

    @property
    def class_count(self) -> int | None:
        """Number of classes."""
        return self.classes

    @property
    def condition_drop(self) -> float:
        """Share of samples without class."""
        return self.label_drop

    def limits(self, space: TokenSpace | None) -> Limits:
        """Heads, rows of dense feed-forward networks and the head's codes are shared by tensor-parallel ranks."""
        shared = {"attention heads (generator.heads)": self.heads}
        if self.experts is None:
            shared["rows of the feed-forward network (generator.feed_forward)"] = self.feed_forward_size
        if space is not None and space.vocabulary is not None:
            shared["codes (tokenizer.vocabulary_size)"] = space.vocabulary
        return Limits(self.depth, shared, self.experts)
