"""What transformers that draw token by token have in common: tables and heads, learned or tied to a codebook.

    learned   token -> row of a table             hidden state -> logits by a learned matrix
    tied      token -> code vector -> one layer   hidden state -> one layer -> products with code vectors

Shapes: B samples, n tokens, C width, V codebook size, D channels of a code vector.
"""

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.generators.raster_transformer import RasterTransformerConfig
from megavar.config.token_space import TokenSpace
from megavar.generators.base import Generator
from megavar.generators.inputs import RasterInputs
from megavar.parallel.parameter_rule import ParameterRule


class TiedCodes(nn.Module):
    """Token ids to the tokenizer's code vectors, which are not trained, to hidden states."""

    def __init__(self, vocabulary: int, channels: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(vocabulary, channels, dtype=dtype))
        self.projection = nn.Linear(channels, width, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, n] -> [B, n, C]."""
        return self.projection(self.vectors[ids])


class TokenTable(nn.Module):
    """Tokens and classes to hidden states."""

    def __init__(self, choice: RasterTransformerConfig, space: TokenSpace, dtype: torch.dtype) -> None:
        super().__init__()
        assert space.vocabulary is not None
        tied = choice.tied_codebook in ("embedding", "both")
        self.codes = TiedCodes(space.vocabulary, space.channels, choice.width, dtype) if tied else None
        self.before_classes = 1 if tied else space.vocabulary + 1
        # Codes, a mask that only MaskGIT would use, classes, no class.
        self.table = nn.Embedding(self.before_classes + choice.classes + 1, choice.width, dtype=dtype)

    def classes(self, labels: Tensor) -> Tensor:
        """int64 [B], the number of classes for "no class" -> [B, C]."""
        return self.table(self.before_classes + labels)

    def tokens(self, ids: Tensor) -> Tensor:
        """int64 [B, n] -> [B, n, C]."""
        return self.table(ids) if self.codes is None else self.codes(ids)


class TokenHead(nn.Module):
    """Hidden states to logits of the codebook."""

    def __init__(self, config: TransformerConfig, choice: RasterTransformerConfig, space: TokenSpace) -> None:
        super().__init__()
        assert space.vocabulary is not None
        width, dtype = config.hidden_size, config.params_dtype
        tied = choice.tied_codebook in ("head", "both")
        self.to_codes = nn.Linear(width, space.channels, bias=False, dtype=dtype) if tied else None
        self.projection = ColumnParallelLinear(
            space.channels if tied else width, space.vocabulary, config=config, init_method=lambda weight: weight,
            bias=not tied,  # with a frozen weight, Megatron-core's bias would get no gradient
        )  # fmt: skip

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, B, C] -> float32 [B, rows, V / tensor-parallel size]."""
        hidden = hidden if self.to_codes is None else self.to_codes(hidden)
        return self.projection(hidden)[0].float().transpose(0, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """See :meth:`logits`."""
        return self.logits(hidden)


class RasterTransformer(Generator):
    """Its first stage has an ``embedding`` that is a :class:`TokenTable`, its last a ``head``, a :class:`TokenHead`."""

    class_table = "embedding.table.weight"

    choice: RasterTransformerConfig

    def starts_at_zero(self, name: str) -> bool:
        """Whether a parameter, besides biases, begins with zeros."""
        return False

    def initial_value(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Norms one, code vectors the tokenizer's, everything else normal with 0.02, cut off at two."""
        if self._is_code_vectors(name):
            value.zero_() if self.codebook is None else value.copy_(self.codebook)
        elif name.endswith("bias") or self.starts_at_zero(name):
            value.zero_()
        elif "norm" in name:
            value.fill_(1.0)
        else:
            nn.init.trunc_normal_(value, std=0.02, generator=generator)

    def own_rule(self, name: str) -> ParameterRule:
        """RAR's: weight decay on matrices that are no tables. Code vectors stay what they are."""
        if self._is_code_vectors(name):
            return ParameterRule(frozen=True)
        table = name.startswith("embedding.") and name != "embedding.codes.projection.weight"
        return ParameterRule(decays=not (table or "norm" in name or name.endswith("bias")))

    def _is_code_vectors(self, name: str) -> bool:
        tied = self.choice.tied_codebook
        return name == "embedding.codes.vectors" or (name == "head.projection.weight" and tied in ("head", "both"))

    def example(self, images: int) -> RasterInputs:
        """Class 0, 1, ... and zeros for all tokens but the last."""
        ids = torch.zeros(images, self.space.length - 1, dtype=torch.int64)
        return RasterInputs(torch.arange(images) % self.choice.classes, ids, sample_keys=torch.arange(images))
