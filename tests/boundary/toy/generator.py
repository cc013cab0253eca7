"""A causal generator: RMSNorm, gated feed-forward, grouped queries, rotary positions, dropout; experts if asked."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from megavar.config.parallel import ParallelConfig
from megavar.generators.base import Embedded, Generator, TokenSequence
from megavar.transformer.megatron_config import transformer_config
from megavar.transformer.norms import RMSNorm
from megavar.transformer.rotary import line_table
from megavar.transformer.sequence import SequenceLayout
from megavar.transformer.spec import BlockSpec, llama_block
from megavar.weight_layout import NamedLayout
from tests.boundary.toy.choices import CausalConfig


@dataclass
class CausalInputs:
    """The class stands first; every other row is the token before the one that it predicts."""

    labels: Tensor
    """int64 [B]; the number of classes stands for "no class"."""
    ids: Tensor
    """int64 [B, n]: all tokens but the last; while decoding the newest one, or none for the first step."""
    sample_keys: Tensor | None = None
    """int64 [B], for dropout."""
    start: int = 0
    """Place of the first row; the class's is 0."""


class Causal(Generator):
    """p(token i | class, tokens before i)."""

    choice: CausalConfig

    @classmethod
    def layers(cls, choice: CausalConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
        """Llama's."""
        return transformer_config(
            parallel, dtype, depth=choice.depth, width=choice.width, heads=choice.heads,
            feed_forward=choice.feed_forward, experts=choice.experts, num_query_groups=choice.groups,
            gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
        )  # fmt: skip

    def build_first(self) -> None:
        """Embeddings."""
        width, dtype = self.choice.width, self.config.params_dtype
        self.classes = nn.Embedding(self.choice.classes + 1, width, dtype=dtype)
        self.tokens = nn.Embedding(self.space.vocabulary or 0, width, dtype=dtype)

    def spec(self, number: int) -> BlockSpec:
        """All alike."""
        return llama_block(dropout=self.choice.dropout, experts=self.choice.experts)

    def build_last(self) -> None:
        """Norm and head."""
        self.norm = RMSNorm(self.choice.width, self.unsharded, 1e-6)
        self.head = ColumnParallelLinear(
            self.choice.width, self.space.vocabulary or 0, config=self.unsharded, init_method=lambda weight: weight,
            bias=False,
        )  # fmt: skip

    def sequence(self, inputs: CausalInputs) -> TokenSequence:
        """One causal segment."""
        rows = inputs.ids.shape[1] + (inputs.start == 0)
        places = torch.arange(inputs.start, inputs.start + rows, device=inputs.labels.device)
        rotary = line_table(places, self.choice.width // self.choice.heads)
        return TokenSequence(SequenceLayout((rows,), rule="causal"), rotary, sample_keys=inputs.sample_keys)

    def embed(self, inputs: CausalInputs) -> Embedded:
        """The class's row, then the tokens'."""
        rows = [self.classes(inputs.labels)[:, None]] if inputs.start == 0 else []
        return Embedded(torch.cat([*rows, self.tokens(inputs.ids)], 1))

    def predict(self, hidden: Tensor, conditions: object, inputs: CausalInputs) -> Tensor:
        """Logits, float32 [B, rows, V]."""
        return self.head(self.norm(hidden))[0].float().transpose(0, 1)

    def example(self, images: int) -> CausalInputs:
        """Zeros."""
        ids = torch.zeros(images, self.space.length - 1, dtype=torch.int64)
        return CausalInputs(torch.zeros(images, dtype=torch.int64), ids, torch.arange(images))


class CausalLayout(NamedLayout):
    """A "public" file of a dense one: Llama's names, the gated layer as its two parts, queries, keys, values apart."""

    belongs_to = "a causal generator"
    remedy = "Check generator.depth, width, heads and groups."

    def names(self, name: str) -> tuple[str, ...]:
        """Under ``model.``, attention's first layer in three parts."""
        match = re.fullmatch(r"(blocks\.\d+)\.attention\.linear_qkv\.weight", name)
        if match:
            return tuple(f"model.{match.group(1)}.{part}_proj" for part in "qkv")
        return (f"model.{name}",)

    def split(self, name: str, value: Tensor) -> Sequence[Tensor]:
        """Megatron-core's rows are, for each group, its queries, its key and its value."""
        if not name.endswith("linear_qkv.weight"):
            return [value]
        per_group, size = self.choice.heads // self.choice.groups, self.choice.width // self.choice.heads
        rows = value.unflatten(0, (self.choice.groups, per_group + 2, size))
        return [rows[:, :per_group].flatten(0, 2), rows[:, per_group].flatten(0, 1), rows[:, -1].flatten(0, 1)]

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`split`."""
        if not name.endswith("linear_qkv.weight"):
            return parts[0]
        groups, size = self.choice.groups, self.choice.width // self.choice.heads
        return torch.cat([part.unflatten(0, (groups, -1, size)) for part in parts], 1).flatten(0, 2)
