"""What VAR's and FlexVAR's transformers have in common: blocks, sizes, initial values."""

from typing import Literal

from pydantic import Field, model_validator

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.base import GeneratorChoice, Limits
from megavar.config.token_space import TokenSpace


class ScaleTransformerConfig(GeneratorChoice):
    """A class-conditional transformer over token maps of growing side, dense or with experts."""

    depth: int = Field(16, ge=1)
    """Number of blocks; VAR-d16 has 16."""
    width: int | None = Field(None, ge=1)
    """Hidden size C. Default: 64 x depth, VAR's rule."""
    heads: int | None = Field(None, ge=1)
    """Attention heads. Default: depth, VAR's rule (head size 64)."""
    feed_forward_ratio: float = Field(4.0, gt=0)
    """Hidden size of the feed-forward network over C."""
    classes: int = Field(1000, ge=1)
    """Number of classes; one more embedding row stands for "no class"."""
    shared_adaptive_norm: bool = False
    """One modulation network for all blocks plus a learned offset per block (VAR-d36-s at 512 px)."""
    qk_l2_norm: bool = True
    """Unit-length queries and keys, a learned temperature per head clamped at 100. Off: scale 0.25/sqrt(head size)."""
    drop_path: float | None = Field(None, ge=0, lt=1)
    """Drop-path rate of the last block, rising linearly from 0. Default: 0.1 x depth / 24, VAR's rule."""
    label_drop: float = Field(0.1, ge=0, le=1)
    """Share of samples whose label is replaced by "no class" (classifier-free guidance)."""
    experts: ExpertsChoice | None = None
    """Mixture of experts; none means dense."""
    attention_kernel: Literal["auto", "dense", "prefix", "flex"] = "auto"
    """Kernel of scale-causal attention. ``auto``: ``flex`` on CUDA, ``prefix`` on CPU."""
    head_chunks: int = Field(1, ge=1)
    """Parts of a micro-batch's tokens for which logits exist at a time, where a recipe needs nothing of them but cross
    entropy and accuracy. 1 keeps all until the backward pass: 2 x 4 bytes per token and code, 2.1 GB for 96 images of
    VAR's 680 tokens and 4096 codes. More chunks compute the head's product a second time in the backward pass."""
    initial_gamma: float = 1e-3
    """Initial scale of the residual gates' weights (VAR's ``alng``: 1e-3 for d16, d20; 1e-4 for d24; 1e-5 for d30)."""
    initial_adaptive: float = 0.5
    """Initial scale of the other modulation weights (VAR's ``init_adaln``)."""
    initial_head: float = 0.02
    """Initial scale of the output head's weights (VAR's ``init_head``)."""

    @model_validator(mode="after")
    def _check(self) -> "ScaleTransformerConfig":
        if self.hidden_size % self.attention_heads:
            raise ValueError(
                f"width={self.hidden_size} is not a multiple of heads={self.attention_heads}: change one of them"
            )
        return self

    @property
    def hidden_size(self) -> int:
        """C."""
        return self.width if self.width is not None else 64 * self.depth

    @property
    def attention_heads(self) -> int:
        """Number of heads."""
        return self.heads if self.heads is not None else self.depth

    @property
    def drop_path_rate(self) -> float:
        """Rate of the last block."""
        return self.drop_path if self.drop_path is not None else 0.1 * self.depth / 24

    @property
    def feed_forward_size(self) -> int:
        """Rows of the feed-forward network's first layer."""
        return int(self.hidden_size * self.feed_forward_ratio)

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
        shared = {"attention heads (generator.heads)": self.attention_heads}
        if self.experts is None:  # experts lie whole on a rank
            rows = "rows of the feed-forward network (generator.width x feed_forward_ratio)"
            shared[rows] = self.feed_forward_size
        if space is not None and space.vocabulary is not None:
            shared["codes (tokenizer.vocabulary_size)"] = space.vocabulary
        return Limits(self.depth, shared, self.experts)
