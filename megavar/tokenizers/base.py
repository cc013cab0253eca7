"""What a tokenizer is to all others: images to tokens and back.

To add one, write a module (``nn.Module``) with these methods and a ``TokenizerChoice`` that names it; nothing else has
to change. Generators see its :class:`TokenSpace` only, recipes and decoding procedures these protocols:


* :class:`Codebook`: tokens are ids of code vectors.
* :class:`Pyramid`: tokens are square maps of growing side length. Whether a map holds what the coarser ones left over
  (VAR) or is independent of them (FlexVAR) is the tokenizer's affair.
* :class:`Continuous`: tokens are vectors, perhaps drawn from what the encoder is sure of. :class:`LatentMap`: these
  vectors are patches of one square map.

Tokens of an image are always one row: ids int64 [B, L] (the maps of a pyramid one after the other), or vectors
[B, L, C] of a continuous tokenizer. Images are float32 [B, 3, H, W] in [-1, 1].
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from megavar.config.token_space import TokenSpace


@runtime_checkable
class Tokenizer(Protocol):
    """Images to tokens and back. All methods but the constructor run without gradient and without randomness."""

    @property
    def space(self) -> TokenSpace:
        """What others may know of its tokens."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to latents, float32: what is left to quantize (a cache may hold them).

        Any shape that begins with B and that :meth:`tokens` takes.
        """
        ...

    def tokens(self, latents: Tensor) -> Tensor:
        """Latents to tokens: int64 [B, L], or float32 [B, L, C] where the space has no vocabulary."""
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens to images, float32 [B, 3, H, W] clamped to [-1, 1]."""
        ...


@runtime_checkable
class Codebook(Tokenizer, Protocol):
    """A tokenizer whose tokens are ids of vectors."""

    def embed(self, ids: Tensor) -> Tensor:
        """Code vectors: int64 [...] to float32 [..., C]."""
        ...


@runtime_checkable
class Pyramid(Codebook, Protocol):
    """A codebook tokenizer of maps with side lengths ``sides``, coarse to fine (default: those of its space).

    L_k = sides[k] ** 2 tokens belong to scale k.
    """

    def at(self, latents: Tensor, sides: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Tokens of latents at the given scales, and what a generator reads to predict them.

        Returns:
            ids int64 [B, L] and inputs float32 [B, L - L_0, C], see :meth:`inputs`.
        """
        ...

    def inputs(self, ids: Tensor, sides: Sequence[int] | None = None) -> Tensor:
        """What a generator reads when it predicts scales 1 to K-1 after the given ones: float32 [B, L - L_0, C].

        Row j of scale k is made of the ids of scales before k alone. The ids may be the true ones (teacher forcing), or
        drawn ones (student forcing).
        """
        ...

    def grow(self, state: Any, ids: Tensor, k: int, sides: Sequence[int] | None = None) -> tuple[Any, Tensor | None]:
        """One step of decoding: take in the ids [B, L_k] of scale k.

        Args:
            state: what the step before returned; None before the first.

        Returns:
            the new state, and the inputs of scale k + 1, float32 [B, L_{k+1}, C]; None after the last scale.
        """
        ...


@runtime_checkable
class Continuous(Tokenizer, Protocol):
    """A tokenizer of vectors: its space has no vocabulary, tokens are float32 [B, L, C], scaled to about unit variance.

    Latents may be a distribution (a KL-VAE's means and log variances); :meth:`tokens` is then its mean.
    """

    def sample(self, latents: Tensor, normal: Tensor) -> Tensor:
        """Tokens of a posterior's sample, float32 [B, L, C]; those of :meth:`tokens` where there is no posterior.

        Args:
            normal: standard normal numbers, float32 [B, L, C]: the caller's, for tokenizers draw nothing.
        """
        ...


@runtime_checkable
class Normalized(Continuous, Protocol):
    """Tokens that have zero mean and unit deviation over their channels, if the configuration says so (VGT-AE)."""

    def normalize(self, tokens: Tensor) -> Tensor:
        """Drawn vectors [..., C] as the encoder's are: VGT does it after every step of decoding."""
        ...


@runtime_checkable
class Semantic(Tokenizer, Protocol):
    """A tokenizer on an encoder that was pretrained for something else (VGT-AE: on a vision-language model's)."""

    def semantic(self, images: Tensor) -> Tensor:
        """What the encoder says before it is projected to latents, float32 [B, L, d]."""
        ...


@runtime_checkable
class LatentMap(Continuous, Protocol):
    """Tokens that are the p x p patches of a square map [B, c, h, w], row by row: C = c p p, L = h w / p / p.

    :meth:`encode` takes images of other sizes, too, and L is then the number of their patches.
    """

    @property
    def stride(self) -> int:
        """Pixels of the image per token, along a side."""
        ...

    def unpack(self, tokens: Tensor) -> Tensor:
        """[B, L, C] -> [B, c, h, w], any square number L."""
        ...

    def pack(self, maps: Tensor) -> Tensor:
        """[B, c, h, w] -> [B, L, C]."""
        ...
