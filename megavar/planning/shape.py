"""The sizes of a generator that costs depend on, gathered from the configuration."""

from dataclasses import dataclass
from functools import cached_property

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import VARConfig
from megavar.config.root import Config
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.errors import ConfigError


@dataclass(frozen=True)
class GeneratorShape:
    """A next-scale generator on the token maps of a tokenizer."""

    generator: VARConfig
    scales: tuple[int, ...]
    code_dimension: int
    vocabulary: int

    @staticmethod
    def of(config: Config) -> "GeneratorShape":
        """The shape of the generator of a run.

        Raises:
            ConfigError: the run has no generator, or one whose costs are unknown here.
        """
        if not isinstance(config.generator, VARConfig):
            raise ConfigError(
                f"Run {config.run.name} has no generator whose costs can be predicted (generator: "
                f"{config.generator.name if config.generator else 'none'}). Known: var."
            )
        return GeneratorShape.build(config.generator, config.tokenizer)

    @staticmethod
    def build(generator: VARConfig, tokenizer: TokenizerChoice) -> "GeneratorShape":
        """The shape of ``generator`` on the tokens of ``tokenizer``."""
        return GeneratorShape(generator, tokenizer.scales, tokenizer.code_dimension, tokenizer.vocabulary_size)

    @property
    def width(self) -> int:
        """C."""
        return self.generator.hidden_size

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.generator.attention_heads

    @property
    def hidden(self) -> int:
        """F, hidden size of a feed-forward network or expert."""
        return int(self.width * self.generator.feed_forward_ratio)

    @property
    def depth(self) -> int:
        """Blocks."""
        return self.generator.depth

    @property
    def experts(self) -> ExpertsChoice | None:
        """Mixture of experts, if any."""
        return self.generator.experts

    @cached_property
    def tokens(self) -> int:
        """L, tokens of an image."""
        return sum(side * side for side in self.scales)

    @property
    def first(self) -> int:
        """Tokens of the first scale, which come from the class and not from features."""
        return self.scales[0] ** 2

    @cached_property
    def visible_pairs(self) -> int:
        """Pairs (query, key) of an image that the scale-causal mask lets through."""
        seen = pairs = 0
        for side in self.scales:
            seen += side * side
            pairs += side * side * seen
        return pairs

    @cached_property
    def modulation(self) -> int:
        """Weights of one block's modulation network, C -> 6 C; 0 where all blocks share one."""
        return 0 if self.generator.shared_adaptive_norm else 6 * self.width * self.width
