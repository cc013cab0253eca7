"""FlowAR's transformer with its flow-matching head."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.base import GeneratorChoice, Limits
from megavar.config.token_space import TokenSpace
from megavar.errors import ConfigError

HEAD_SIZE = 64
"""Channels of an attention head of the flow head (``flowmodel.py``)."""


class FlowARConfig(GeneratorChoice):
    """FlowAR (Ren et al. 2024, arXiv:2412.15205): latents scale by scale, each by flow matching.

    The defaults are S (171,718,072 parameters with 16 channels and 1000 classes). L (586,862,912): width 1024, 8 + 8
    blocks, 16 heads, a head of 12 blocks of width 1024 with cross attention. H (1,913,316,880): width 1536, 15 + 15
    blocks, 16 heads, a head of 12 blocks of width 1536 with cross attention. B, which SAR's Table 1 trains, is in no
    code, text or file of the authors; ours is S with 12 + 12 blocks.
    """

    implementation: ClassVar[str] = "megavar.generators.flowar:FlowAR"
    weight_layouts: ClassVar[Mapping[str, str]] = {"flowar": "megavar.generators.flowar.published:FlowARLayout"}

    name: Literal["flowar"] = "flowar"
    scales: Annotated[tuple[PositiveInt, ...], Field(min_length=1, strict=False)] = (1, 2, 4, 8, 16)
    """Side lengths in tokens, coarse to fine; the last one is the tokenizer's."""
    width: int = Field(768, ge=1)
    """Hidden size C of the transformer."""
    encoder_depth: int = Field(6, ge=1)
    """Blocks before the normalization, projection and second table of positions in the middle of the transformer."""
    decoder_depth: int = Field(6, ge=1)
    """Blocks after it."""
    heads: int = Field(12, ge=1)
    """Attention heads of the transformer."""
    head_depth: int = Field(2, ge=1)
    """Blocks of the flow head."""
    head_width: int = Field(1024, ge=HEAD_SIZE)
    """Hidden size of the flow head, a multiple of 64: its attention heads have 64 channels."""
    head_cross_attention: bool = False
    """Of the flow head's blocks: attention that knows the time alone, then cross attention to the transformer's output
    (L, H). Off: both are modulated by time and output, token by token (S)."""
    rope_side: int = Field(16, ge=1)
    """Rotary positions of a map of side s are i x rope_side / s, so that maps of all sides cover the same square."""
    scale_inputs: Literal["latent", "image"] = "latent"
    """Of what a scale reads the one before it, in training and drawing alike: ``latent``: its map, resized (released);
    ``image``: its decoded image, enlarged and encoded again, the other reading of SAR's "up-sample image supervision",
    which needs the tokenizer between scales."""
    classes: int = Field(1000, ge=1)
    """Number of classes; one more embedding row stands for "no class"."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout of the transformer: after attention, and in and after the feed-forward network. The authors also drop
    attention's probabilities at the same rate, which fused kernels cannot do for masks of samples: left out."""
    label_drop: float = Field(0.1, ge=0, le=1)
    """Share of samples whose label is replaced by "no class" (classifier-free guidance)."""
    experts: ExpertsChoice | None = None
    """Mixture of experts in the transformer; none means dense. The flow head is always dense."""
    attention_kernel: Literal["auto", "dense", "prefix", "flex"] = "auto"
    """Kernel of scale-causal attention."""

    @model_validator(mode="after")
    def _check(self) -> "FlowARConfig":
        if any(b <= a for a, b in zip(self.scales, self.scales[1:])):
            raise ValueError(f"scales {list(self.scales)} do not all grow: list side lengths from coarse to fine")
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(
                f"width={self.width} over heads={self.heads} is no multiple of 4, which positions on a plane need: "
                f"change one of them"
            )
        if self.head_width % HEAD_SIZE:
            raise ValueError(f"head_width={self.head_width} is not a multiple of {HEAD_SIZE}, the size of its heads")
        return self

    @property
    def depth(self) -> int:
        """Blocks of the transformer."""
        return self.encoder_depth + self.decoder_depth

    @property
    def length(self) -> int:
        """Tokens of all scales."""
        return sum(side * side for side in self.scales)

    @property
    def feed_forward_size(self) -> int:
        """Inner channels of the transformer's gated networks: 8/3 C."""
        return int(8 / 3 * self.width)

    @property
    def head_feed_forward_size(self) -> int:
        """Inner channels of the flow head's."""
        return int(8 / 3 * self.head_width)

    @property
    def class_count(self) -> int | None:
        """Number of classes."""
        return self.classes

    @property
    def condition_drop(self) -> float:
        """Share of samples without class."""
        return self.label_drop

    def limits(self, space: TokenSpace | None) -> Limits:
        """Heads and rows of feed-forward networks are shared by tensor-parallel ranks, the flow head's, too.

        Raises:
            ConfigError: the tokenizer's tokens are no map of vectors of the last scale's side.
        """
        if space is not None and (space.kind != "latent" or space.sides[-1:] != self.scales[-1:]):
            raise ConfigError(
                f"generator.name=flowar with generator.scales={list(self.scales)} needs a map of {self.scales[-1]} x "
                f"{self.scales[-1]} vectors, but the tokenizer makes {space.kind} of sides {list(space.sides)}. Choose "
                f"tokenizer.name=kl_vae, and make the last scale the side of its map in tokens."
            )
        shared = {
            "attention heads (generator.heads)": self.heads,
            "attention heads of the flow head (generator.head_width / 64)": self.head_width // HEAD_SIZE,
            "rows of the flow head's feed-forward network (8/3 generator.head_width)": self.head_feed_forward_size,
        }
        if self.experts is None:
            shared["rows of the feed-forward network (8/3 generator.width)"] = self.feed_forward_size
        return Limits(self.depth, shared, self.experts)
