"""Generators: architectures and their sizes."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megavar.config.base import Section

SCALES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""VAR's scale lists by image resolution (side lengths of the token maps, tokenizer with 16x downsampling)."""


class ExpertsConfig(Section):
    """Mixture of experts in place of the feed-forward network of every block (MEPA section 4.2)."""

    number: int = Field(8, ge=1)
    """Experts per layer, M (MEPA Table 1)."""
    top_k: int = Field(3, ge=1)
    """Experts per token, m. Not in the paper: 3 is the only value that gives its activated parameter counts with
    experts of the feed-forward network's size in every block (252 M for d12, 585 M for d16)."""
    router: Literal["scale_token", "scale"] = "scale_token"
    """``scale_token``: STMoE, Eq. 9. ``scale``: SMoE, Eq. 8."""
    scale_embedding_in_router: bool = False
    """Add a learnable scale embedding SE of the router's own (K x width) to its input tokens. Off: "In practice, the
    VAR transformer adds positional and scale embeddings to input tokens, naturally meeting the need for scale
    awareness" (MEPA below Eq. 9). The ``scale`` router always has its SE."""
    balance_coefficient: float = Field(0.01, ge=0)
    """Weight of the balance loss (Eq. 10) of each layer. Not in the paper: 0.01 is Switch Transformer's. Megatron-core
    and DeepSpeed divide this loss by top_k; Eq. 10 does not."""
    balance_scope: Literal["image", "micro_batch"] = "image"
    """Over which tokens Eq. 10 takes its means. ``image``: N is "token length of one sample", then the mean over
    images, which does not depend on how a batch is split over ranks or micro-batches. ``micro_batch``: all tokens of
    a micro-batch on one rank (the convention of Switch and Megatron-core)."""
    backend: Literal["auto", "megatron", "grouped", "tutel", "deepspeed"] = "auto"
    """Implementation of the experts; all compute the same and share checkpoints. ``megatron``: Megatron-core's
    SequentialMLP, one expert after the other. ``grouped``: stacked weights and grouped matrix products. ``tutel``:
    Tutel's dispatch and all-to-all (a package of its own). ``deepspeed``: DeepSpeed-MoE's layer, without tensor
    parallelism. ``auto``: ``grouped`` on CUDA, ``megatron`` on CPU."""

    @model_validator(mode="after")
    def _check(self) -> "ExpertsConfig":
        if self.top_k > self.number:
            raise ValueError(f"top_k={self.top_k} exceeds number={self.number}: lower top_k or add experts")
        return self


class VARConfig(Section):
    """VAR's next-scale transformer, dense or with experts."""

    name: Literal["var"] = "var"
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
    experts: ExpertsConfig | None = None
    """Mixture of experts; none means dense."""
    attention_kernel: Literal["auto", "dense", "prefix", "flex"] = "auto"
    """Kernel of scale-causal attention. ``auto``: ``flex`` on CUDA, ``prefix`` on CPU."""
    initial_gamma: float = 1e-3
    """Initial scale of the residual gates' weights (VAR's ``alng``: 1e-3 for d16, d20; 1e-4 for d24; 1e-5 for d30)."""
    initial_adaptive: float = 0.5
    """Initial scale of the other modulation weights (VAR's ``init_adaln``)."""
    initial_head: float = 0.02
    """Initial scale of the output head's weights (VAR's ``init_head``)."""

    @model_validator(mode="after")
    def _check(self) -> "VARConfig":
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


GeneratorConfig = Annotated[VARConfig, Field()]
