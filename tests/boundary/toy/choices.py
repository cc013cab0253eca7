"""What a run's YAML may ask for. This is the module that ``plugins`` names: the alternatives exist once it is imported.

It does not import torch: login nodes read configurations, too.
"""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.base import GeneratorChoice, Limits
from megavar.config.procedures.base import SamplingChoice
from megavar.config.recipes.base import GeneratorRecipeChoice, PlannedPass
from megavar.config.suites.base import SuiteChoice
from megavar.config.terms.base import TermChoice
from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.base import TokenizerChoice


class LineTokenizerConfig(TokenizerChoice):
    """Principal components of small images, quantized four at a time: tokens without a place in the image."""

    implementation: ClassVar[str] = "tests.boundary.toy.tokenizer:LineTokenizer"
    weight_layouts: ClassVar[dict[str, str]] = {"toy_line": "tests.boundary.toy.tokenizer:LineLayout"}

    name: Literal["toy_line"] = "toy_line"
    length: int = Field(12, ge=1)
    """Tokens of an image."""
    vocabulary_size: int = Field(32, ge=2)
    """Code vectors."""
    channels: int = Field(4, ge=1)
    """Components that a code vector stands for."""
    image_side: int = 16
    """Side of the images in pixels."""

    @property
    def space(self) -> TokenSpace:
        """A line of ids."""
        return TokenSpace("line", (), self.length, self.vocabulary_size, self.channels, self.image_side)


class CausalConfig(GeneratorChoice):
    """A causal transformer in the manner of Llama, asked by class."""

    implementation: ClassVar[str] = "tests.boundary.toy.generator:Causal"
    weight_layouts: ClassVar[dict[str, str]] = {"toy_causal": "tests.boundary.toy.generator:CausalLayout"}

    name: Literal["toy_causal"] = "toy_causal"
    depth: int = Field(4, ge=1)
    width: int = Field(32, ge=1)
    heads: int = Field(4, ge=1)
    groups: int = Field(2, ge=1)
    """Pairs of keys and values; each serves heads / groups heads."""
    feed_forward: int = Field(48, ge=1)
    classes: int = Field(10, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    label_drop: float = Field(0.1, ge=0, le=1)
    experts: ExpertsChoice | None = None

    @property
    def class_count(self) -> int:
        """Asked by class."""
        return self.classes

    @property
    def condition_drop(self) -> float:
        """Share of samples without class."""
        return self.label_drop

    def limits(self, space: TokenSpace | None) -> Limits:
        """Keys and values are shared by tensor-parallel ranks, and the head's rows, and a dense network's."""
        shared = {"groups of heads (generator.groups)": self.groups}
        if self.experts is None:
            shared["rows of the feed-forward network (generator.feed_forward)"] = self.feed_forward
        if space is not None and space.vocabulary is not None:
            shared["codes (tokenizer.vocabulary_size)"] = space.vocabulary
        return Limits(self.depth, shared, self.experts)


class SelfTaughtConfig(GeneratorRecipeChoice):
    """Teacher forcing, then the same again on the tokens that the generator itself found most likely."""

    implementation: ClassVar[str] = "tests.boundary.toy.recipe:SelfTaught"

    name: Literal["toy_self_taught"] = "toy_self_taught"
    student: float = Field(0.3, ge=0)
    """Weight of the second pass."""

    def passes_of_step(self, sides: tuple[int, ...]) -> tuple[PlannedPass, ...]:
        """Two with a loss."""
        return PlannedPass(), PlannedPass()


class BrightnessConfig(TermChoice):
    """Middle hidden states say how bright the image is."""

    implementation: ClassVar[str] = "tests.boundary.toy.term:Brightness"

    name: Literal["toy_brightness"] = "toy_brightness"
    block: int = Field(1, ge=0)
    """Whose output is read."""


class SharpExperts(ExpertsChoice):
    """A router with a temperature."""

    implementation: ClassVar[str] = "tests.boundary.toy.router:SharpRouter"

    router: Literal["toy_sharp"] = "toy_sharp"
    sharpness: float = Field(2.0, gt=0)
    """Multiplies the scores before the softmax."""


class LineSampling(SamplingChoice):
    """Token after token."""

    implementation: ClassVar[str] = "tests.boundary.toy.procedure:Line"

    procedure: Literal["toy_line"] = "toy_line"
    temperature: float = Field(1.0, gt=0)


class ClassMeansSuite(SuiteChoice):
    """How far the mean image of every class is from the data's."""

    implementation: ClassVar[str] = "tests.boundary.toy.suite:ClassMeans"

    name: Literal["toy_class_means"] = "toy_class_means"
