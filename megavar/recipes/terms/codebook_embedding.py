"""Codebook-embedding regularization (``papers/rear.md`` section 3.2): hidden states know how tokens are decoded.

    z     = tokenizer's frozen code vectors of the *true* tokens, whatever the generator read
    early = h(hidden state of layer EN)          recovers the current token's vector
    late  = h'(hidden state of layer DE)         predicts the next token's vector; h' = h or not
    L     = sum over i = 1 .. N-1 of (1 - cos(early_i, z_i)) + (1 - cos(late_i, z_{i+1}))                       Eq. 6

Rows that stand for the class or the start are left out: there is no current token. Where whole maps are predicted at
once (VAR, FlexVAR) the current vector of a row is what it reads, made of the true coarser maps, and the next one its
own token's; the paper stops at sequences (appendix D.3).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.generators.base import GeneratorChoice
from megavar.config.terms.codebook_embedding import CodebookEmbeddingConfig
from megavar.config.token_space import TokenSpace
from megavar.data.batch import Batch
from megavar.errors import ConfigError
from megavar.generators.base import Head
from megavar.generators.inputs import ScaleInputs
from megavar.recipes.base import Losses, Parts
from megavar.tokenizers.base import Codebook


class Projections(nn.Module):
    """h_phi: two layers with GELU, one network for all layers that are read or one for each."""

    def __init__(self, width: int, result: int, *, readers: int, hidden: int, shared: bool) -> None:
        super().__init__()
        number = 1 if shared else readers
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, result)) for _ in range(number)
        )

    def forward(self, *taps: Tensor) -> Tensor:
        """Each [B, L, C] -> [B, L, readers, D]."""
        return torch.stack([self.networks[i % len(self.networks)](tap) for i, tap in enumerate(taps)], 2)


Targets = Callable[[], dict[str, Tensor]]
"""Code vectors float32 [B, n, D] by "encoding", "decoding": what the last n rows are compared with. They are looked up
where (and if) the loss is: on the last pipeline stage."""


class CodebookEmbedding:
    """A :class:`~megavar.recipes.terms.base.Term`."""

    taps = ()

    def __init__(self, choice: CodebookEmbeddingConfig, tokenizer: Codebook, depth: int) -> None:
        """Regularize a generator of ``depth`` blocks.

        Raises:
            ConfigError: the tokenizer has no code vectors, or the generator not these layers.
        """
        self.choice, self.tokenizer = choice, tokenizer
        self.name, self.weight = choice.name, choice.weight
        self.layers = _layers(choice, depth)
        if tokenizer.space.vocabulary is None:
            raise ConfigError(
                f"The term {choice.name!r} compares hidden states with code vectors, but the tokens of this tokenizer "
                f"({tokenizer.space.kind}) are vectors without a codebook. Remove the term from recipe.terms, or "
                f"choose a tokenizer with a codebook."
            )

    @classmethod
    def build(cls, choice: CodebookEmbeddingConfig, parts: Parts) -> "CodebookEmbedding":
        """See :meth:`Term.build`."""
        config = parts.config
        assert config.generator is not None
        return cls(choice, parts.tokenizer(), config.generator.limits(config.tokenizer.space).depth)

    @classmethod
    def head_of(cls, choice: CodebookEmbeddingConfig, generator: GeneratorChoice, space: TokenSpace) -> Head:
        """The head on a generator, for plans."""
        return _head(choice, _layers(choice, generator.limits(space).depth), space)

    def head(self, space: TokenSpace) -> Head:
        """h_phi on both layers."""
        return _head(self.choice, self.layers, space)

    def prepare(self, batch: Batch, inputs: Any) -> Targets:
        """Code vectors of the true tokens.

        Args:
            inputs: of the recipe: ``targets`` are the true tokens in the order in which they are predicted, ``model``
                what the generator reads.
        """
        return lambda: self._vectors(inputs.targets, inputs.model)

    @torch.no_grad()
    def _vectors(self, ids: Tensor, read: Any) -> dict[str, Tensor]:
        """Of ids int64 [B, L]."""
        vectors = self.tokenizer.embed(ids).float()
        if isinstance(read, ScaleInputs):
            current, following = self.tokenizer.inputs(ids, read.sides).float(), vectors  # type: ignore[attr-defined]
        else:
            current, following = vectors[:, :-1], vectors[:, 1:]
        return {"encoding": current, "decoding": following}

    def loss(self, tapped: dict[str, Tensor], output: Tensor, targets: Targets) -> Losses:
        """Eq. 6 of projected hidden states [B, L, readers, D]; the mean cosine at each layer beside it."""
        wanted, cosines, total = targets(), {}, output.new_zeros((), dtype=torch.float32)
        for number, kind in enumerate(self.layers):
            vectors = self._in_space(wanted[kind], output.shape[-1])
            found = output[:, output.shape[1] - vectors.shape[1] :, number].float()
            cosine = F.cosine_similarity(found, vectors, dim=-1)
            distance = (1 - cosine).sum(1)
            total = total + (distance if self.choice.reduction == "sum" else distance / vectors.shape[1]).sum()
            cosines[f"cosine/{kind}"] = cosine.detach().mean(1).sum()
        return Losses(total, cosines)

    def _in_space(self, vectors: Tensor, width: int) -> Tensor:
        """Code vectors [B, n, D] where they are compared, [B, n, width]."""
        if self.choice.output == "codebook":
            return vectors
        return vectors @ isometry(vectors.shape[-1], width, vectors.device)


@functools.cache
def isometry(channels: int, width: int, device: torch.device) -> Tensor:
    """A fixed random map, float32 [channels, width]: keeps angles where ``width`` is the larger one."""
    drawn = torch.randn(max(channels, width), min(channels, width), generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(drawn)[0]
    return (basis.t() if width >= channels else basis).contiguous().to(device)


def _layers(choice: CodebookEmbeddingConfig, depth: int) -> dict[str, str]:
    try:
        return choice.layers(depth)
    except ValueError as error:
        raise ConfigError(
            f"recipe.terms, {choice.name}: {error}. Choose encoding and decoding among 0 to {depth}, or change "
            f"generator.depth."
        ) from error


def _head(choice: CodebookEmbeddingConfig, layers: dict[str, str], space: TokenSpace) -> Head:
    def build(width: int) -> nn.Module:
        result = space.channels if choice.output == "codebook" else width
        return Projections(width, result, readers=len(layers), hidden=choice.hidden, shared=choice.shared)

    return Head(tuple(layers.values()), build)
