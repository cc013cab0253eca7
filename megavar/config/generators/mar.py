"""MAR: masked autoregression of vectors."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from megavar.config.denoising_mlp import DenoisingMLPConfig
from megavar.config.generators.base import GeneratorChoice, Limits
from megavar.config.token_space import TokenSpace
from megavar.errors import ConfigError


class MARConfig(GeneratorChoice):
    """MAR (Li et al. 2024, arXiv:2406.11838): an encoder of what is known, a decoder of everything, a diffusion head.

    The defaults are B with a head of 6 blocks (207.92 M parameters with 16 channels). L: width 1024, 16 + 16 blocks, 16
    heads, head 8 x 1280; H: width 1280, 20 + 20, 16 heads, head 12 x 1536.

    VGT's Table 8 compares with MAR asked for by text and does not say how it reads it: ours has embeddings of the
    text's tokens in the place of the class's (``text_vocabulary``).
    """

    implementation: ClassVar[str] = "megavar.generators.mar:MAR"
    weight_layouts: ClassVar[Mapping[str, str]] = {"mar": "megavar.generators.mar.published:MARLayout"}

    name: Literal["mar"] = "mar"
    width: int = Field(768, ge=1)
    """Hidden size of encoder and decoder."""
    encoder_depth: int = Field(12, ge=1)
    """Blocks that see the condition and the tokens that are known."""
    decoder_depth: int = Field(12, ge=1)
    """Blocks that see all places."""
    heads: int = Field(12, ge=1)
    """Attention heads."""
    expansion: float = Field(4.0, gt=0)
    """Hidden size of the feed-forward networks divided by ``width``."""
    buffer: int = Field(64, ge=1)
    """Rows before the image: so many copies of the class, or the text's tokens."""
    head: DenoisingMLPConfig = DenoisingMLPConfig(width=1024, depth=6)
    """The diffusion head."""
    classes: int | None = Field(1000, ge=1)
    """Number of classes; None: images are asked for by text."""
    text_vocabulary: int | None = Field(None, ge=2)
    """Text tokens, where there are no classes; ``buffer`` is then ``data.text.length``. Padding is a token like
    others."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """After attention and in and after the feed-forward network. Released: of attention's probabilities, too, which
    fused kernels cannot do for masks of samples."""
    label_drop: float = Field(0.1, ge=0, le=1)
    """Share of samples without class or caption (classifier-free guidance)."""
    attention_kernel: Literal["auto", "dense", "prefix", "flex"] = "auto"
    """Kernel of attention."""

    @property
    def depth(self) -> int:
        """All blocks."""
        return self.encoder_depth + self.decoder_depth

    @property
    def feed_forward_size(self) -> int:
        """Inner channels."""
        return int(self.width * self.expansion)

    @property
    def class_count(self) -> int | None:
        """Number of classes."""
        return self.classes

    @property
    def text_rows(self) -> int | None:
        """The buffer, where it holds text."""
        return self.buffer if self.classes is None else None

    @property
    def condition_drop(self) -> float:
        """Share of samples without condition."""
        return self.label_drop

    @property
    def condition(self) -> Literal["class", "text", "none"]:
        """Class or text."""
        return "text" if self.classes is None else "class"

    @model_validator(mode="after")
    def _one_condition(self) -> "MARConfig":
        if (self.classes is None) == (self.text_vocabulary is None):
            raise ValueError("give either classes or text_vocabulary")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}: change one of them")
        return self

    def limits(self, space: TokenSpace | None) -> Limits:
        """Heads, rows of networks and the head's channels are shared by tensor-parallel ranks.

        Raises:
            ConfigError: tokens are no vectors.
        """
        if space is not None and space.kind != "latent":
            raise ConfigError(
                f"generator.name=mar needs tokens that are vectors, but the tokenizer makes {space.kind}. Choose "
                f"tokenizer.name=kl_vae or vgt_ae."
            )
        shared = {
            "attention heads (generator.heads)": self.heads,
            "rows of the feed-forward network (generator.width, expansion)": self.feed_forward_size,
        }
        return Limits(self.depth, shared | self.head.shared("generator.head"))
