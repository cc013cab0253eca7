"""The kind of all decoding procedures, with what every drawing of samples has."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from megavar.config.choice import Choice
from megavar.config.tokenizers.base import TokenizerChoice


class SamplingChoice(Choice):
    """How images are drawn; :class:`megavar.sampling.base.Procedure` is what it configures."""

    discriminator: ClassVar[str] = "procedure"
    default: ClassVar[str | None] = "next_scale"
    package: ClassVar[str] = "megavar.config.procedures"

    procedure: str
    """How tokens are drawn one after the other."""
    number: int = Field(50_000, ge=1)
    """Samples that ``sample`` draws and ``evaluate`` scores; suites with prompts of their own say themselves how many.
    Sample i has class i modulo the number of classes, or the caption of test sample i."""
    chunk_size: int = Field(64, ge=1)
    """Samples decoded together: the unit of work and of resuming, the same for any number of ranks."""
    keep_images: int | None = Field(None, ge=0)
    """Images stored beside the tokens, from the first on (whole chunks); the others are decoded again from their tokens
    where they are needed. Tokens are always stored: 50,000 samples of 680 tokens are 68 MB, their images at 256 pixels
    9.8 GB. Default: all for ``sample`` and for suites that look at all images together; the overview's 100 for the
    ``adm`` suite, which takes its features while the images are drawn."""
    rounding: Literal["round", "truncate", "half_up"] = "round"
    """How decoded images become bytes: to the nearest level; ``truncate`` as ADM, REPA and RAR (half a level darker);
    ``half_up`` as LlamaGen."""
    seed: int = 0
    """Of the noise; sample i draws from (seed, i) only."""
    cuda_graph: bool = False
    """On a GPU, replay one CUDA graph per batch from the second batch of a size on: small batches, whose kernels are
    over before the host has launched the next, draw faster. Without a GPU nothing changes."""
    weights: Literal["model", "ema"] = "model"
    """Which weights to sample from."""

    changes_no_sample: ClassVar[frozenset[str]] = frozenset({"keep_images", "cuda_graph"})
    """Keys that samples and their scores do not depend on."""

    def drew(self, stored: Mapping[str, Any]) -> bool:
        """Whether a result file's ``sampler`` describes samples of this section, however many, in whatever portions."""
        aside = {"number", "chunk_size", "conditions"} | self.changes_no_sample
        wanted = self.model_dump(mode="json")
        return all(stored.get(key, value) == value for key, value in wanted.items() if key not in aside)

    def tokenizer_of(self, trained: TokenizerChoice) -> TokenizerChoice:
        """The section of the tokenizer whose tokens are drawn, with the weights of the one that the generator learned
        from. A procedure may draw at other scales.

        Raises:
            ConfigError: this tokenizer has no others.
        """
        return trained

    @property
    def guided(self) -> bool:
        """Whether every token costs a second pass of the generator, without the condition."""
        return False
