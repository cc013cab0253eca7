"""What a VQ tokenizer offers so that ``recipes/tokenizer`` can train it."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.token_space import TokenSpace
from megavar.parallel.parameter_rule import ParameterRule
from megavar.tokenizers.posterior import Posterior


class Codes(nn.Embedding):
    """The code vectors, float32 whatever type holds them: of tokens int64 [...] -> [..., C], or all of them [V, C].

    Nobody else reads ``weight``: under ZeRO-3 it is whole only while this module runs.
    """

    def forward(self, ids: Tensor | None = None) -> Tensor:
        """Look up ``ids``; None: a copy of all code vectors, without gradient."""
        return self.weight.detach().float().clone() if ids is None else F.embedding(ids, self.weight.float())


class MixedCodes(nn.Embedding):
    """Code vectors that are mixed: shares [..., V] -> float32 [..., C], with gradient to both."""

    def forward(self, shares: Tensor) -> Tensor:
        """Mix."""
        return shares.float() @ self.weight.float()


class QuantizerOutput(NamedTuple):
    """The result of a training forward pass."""

    features: Tensor
    """f_hat with the gradient passed straight through to f, [B, C, H, W], or [B, L, C] of a line."""
    loss: Tensor
    """Codebook loss plus ``commitment_weight`` times commitment loss, averaged over parts, scalar."""
    ids: list[Tensor]
    """Tokens per part, int64 [B, h*w]."""
    targets: Tensor
    """Every vector that was quantized, [B, L, C], parts in order, no gradient."""
    usage: Tensor
    """How often each code was chosen in each part in this batch, float32 [K, V]."""


def by_side(sides: tuple[int, ...]) -> dict[str, int]:
    """The parts of a row of tokens that are square maps."""
    return {f"scale_{side:02d}": side * side for side in sides}


class Reconstruction(NamedTuple):
    """The result of a training forward pass of the tokenizer."""

    images: Tensor
    """Reconstructions, not clamped, [B, 3, H, W]."""
    quantized: QuantizerOutput
    """Quantizer loss, tokens, usage and the vectors that were quantized."""
    last_features: Tensor | None
    """Input of the decoder's last convolution without gradient, [B, C, H, W]: enough to compute the gradient of a loss
    with respect to that convolution's weight (VQGAN's adaptive weight) outside the module. None where the images are
    not what a 3x3 convolution made."""


class Quantizer(Protocol):
    """A quantizer whose codebook is watched."""

    embedding: Codes

    @property
    def parts(self) -> dict[str, int]:
        """The K parts of a row of tokens whose usage is told apart, in order: their names, and how long they are."""
        ...

    @property
    def usage_average(self) -> Tensor:
        """A persistent buffer, float32 [K, V]: the recipe keeps each code's usage per part in it."""
        ...


@runtime_checkable
class Trainable(Protocol):
    """A tokenizer (an ``nn.Module``) that is trained by reconstruction."""

    @property
    def space(self) -> TokenSpace:
        """Its tokens."""
        ...

    @property
    def quantizer(self) -> Quantizer:
        """Its codebook."""
        ...

    ends_in_convolution: bool
    """Whether a 3x3 convolution makes the images, which the adaptive weight asks for."""
    decoding: tuple[str, ...]
    """Beginnings of the names of the parameters that come after the tokens; all others decide the tokens."""

    @property
    def separate_scales(self) -> tuple[int, ...]:
        """Sides below the last one at which an image may be reconstructed by itself, where scales do not depend on each
        other (FlexVAR); empty where they do (VAR)."""
        ...

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh parameters."""
        ...

    def __call__(self, images: Tensor, keys: Tensor | None = None, side: int | None = None) -> Reconstruction:
        """Training forward pass.

        Args:
            images: float [B, 3, H, W] in [-1, 1].
            keys: int64 [B], different for different samples and epochs: decide what dropout drops.
            side: reconstruct from the map of this side alone, one of :attr:`separate_scales`.
        """
        ...

    def parameters(self, recurse: bool = True) -> Any:
        """As ``nn.Module``'s."""
        ...


class PosteriorReconstruction(NamedTuple):
    """The result of a training forward pass of a variational autoencoder."""

    images: Tensor
    """Reconstructions of a sample of the posterior, not clamped, [B, 3, H, W]."""
    posterior: Posterior
    """Of a map [B, c, h, w] or of tokens [B, L, C]."""
    last_features: Tensor | None
    """See :class:`Reconstruction`."""


@runtime_checkable
class Variational(Protocol):
    """A tokenizer of vectors (an ``nn.Module``) that is trained by reconstruction of its posteriors' samples."""

    @property
    def space(self) -> TokenSpace:
        """Its tokens."""
        ...

    ends_in_convolution: bool
    """See :class:`Trainable`."""

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh parameters."""
        ...

    def posterior(self, latents: Tensor) -> Posterior:
        """What its latents mean."""
        ...

    def rule(self, name: str) -> ParameterRule:
        """How the tensor ``name`` is trained."""
        ...

    def __call__(self, images: Tensor, *, normal: Tensor) -> PosteriorReconstruction:
        """Training forward pass.

        Args:
            images: float [B, 3, H, W] in [-1, 1].
            normal: standard normal numbers, float32 [B, L, C].
        """
        ...
