"""How images are drawn from a trained generator."""

from typing import Literal

from pydantic import Field

from megavar.config.base import Section


class SamplingConfig(Section):
    """Decoding settings and the amount of samples."""

    number: int = Field(50_000, ge=1)
    """Samples to draw. Sample i has label i modulo the number of classes."""
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
    guidance: float = Field(1.5, ge=0)
    """Classifier-free guidance at the last scale, t = guidance x k/(K-1) at scale k, logits (1+t) c - t u. VAR's README
    uses 1.5 (its paper 2.0)."""
    temperature: float = Field(1.0, gt=0)
    """Divides the guided logits."""
    top_k: int = Field(900, ge=0)
    """Keep the k most likely tokens (ties included); 0 keeps all."""
    top_p: float = Field(0.96, ge=0, le=1)
    """Then keep the smallest set of most likely tokens whose probability exceeds p; 0 keeps all."""
    seed: int = 0
    """Of the noise; sample i draws from (seed, i) only."""
    weights: Literal["model", "ema"] = "model"
    """Which weights to sample from."""
