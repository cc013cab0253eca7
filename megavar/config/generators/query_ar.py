"""VGT's QueryAR: a language model that draws."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from megavar.config.denoising_mlp import DenoisingMLPConfig
from megavar.config.generators.base import GeneratorChoice, Limits
from megavar.config.language_model import LanguageModelConfig
from megavar.config.token_space import TokenSpace
from megavar.errors import ConfigError


class QueryARConfig(GeneratorChoice):
    """QueryAR (VGT section 3.3): position queries and latents after a text, in any order, and a flow-matching head.

    The defaults are InternVL3-1B's language model with the released head and queries, 652.6 M parameters.
    """

    implementation: ClassVar[str] = "megavar.generators.query_ar:QueryAR"
    weight_layouts: ClassVar[Mapping[str, str]] = {
        "vgt": "megavar.generators.query_ar.published:VGTLayout",
        "qwen2": "megavar.generators.language_model.published:Qwen2Layout",
    }
    folder_part: ClassVar[str] = "megavar.generators.language_model.published:language_model_of"

    name: Literal["query_ar"] = "query_ar"
    language_model: LanguageModelConfig = LanguageModelConfig()
    """Sizes of the pretrained model. Begin with its folder: ``train.initial_weights: {path: FOLDER, layout: qwen2,
    fresh: [image., condition., head.]}``."""
    query_sides: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)] = (64, 64)
    """Rows and columns of the tables of queries and of positions; a smaller map takes the places in the middle."""
    head: DenoisingMLPConfig = DenoisingMLPConfig()
    """The flow-matching head."""
    text_length: int = Field(256, ge=1)
    """Rows of text, padded: ``data.text.length``. The paper's longest sequence is 1024 rows; 256 of text, the
    beginning of the image, and 2 x 256 of an image of 16 x 16 are 769."""
    image_start: Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)] = (151665,)
    """Ids of the text tokens that begin an image, after the text and its padding: InternVL3's ``<img>``. Qwen2.5-VL
    has no such token; the released code then spells it, we take its ``<|vision_start|>``, 151652."""
    caption_drop: float = Field(0.1, ge=0, le=1)
    """Share of samples whose caption is left out of the request (classifier-free guidance; released)."""
    attention_kernel: Literal["auto", "dense", "flex"] = "auto"
    """Kernel of causal attention; text is padded, which ``causal`` cannot serve."""

    @property
    def text_rows(self) -> int | None:
        """T."""
        return self.text_length

    @property
    def condition_drop(self) -> float:
        """Share of samples without caption."""
        return self.caption_drop

    @property
    def condition(self) -> Literal["class", "text", "none"]:
        """Text."""
        return "text"

    @model_validator(mode="after")
    def _ids_exist(self) -> "QueryARConfig":
        if (largest := max(self.image_start)) >= self.language_model.vocabulary:
            raise ValueError(
                f"image_start holds {largest}, but language_model.vocabulary has ids below "
                f"{self.language_model.vocabulary}: give the tokenizer's id of what begins an image"
            )
        return self

    def limits(self, space: TokenSpace | None) -> Limits:
        """The language model's, and the head's.

        Raises:
            ConfigError: the tokenizer's tokens are no map of vectors, or a larger one than the tables.
        """
        if space is not None:
            side = space.sides[-1] if space.sides else 0
            if space.kind != "latent" or side > min(self.query_sides):
                raise ConfigError(
                    f"generator.name=query_ar with generator.query_sides={list(self.query_sides)} needs a map of "
                    f"vectors of at most this size, but the tokenizer makes {space.kind} of sides {list(space.sides)}. "
                    f"Choose tokenizer.name=vgt_ae or kl_vae, or enlarge query_sides."
                )
        own = self.language_model.limits
        return Limits(own.depth, own.shared | self.head.shared("generator.head"), own.experts)
