"""The decoder of Qwen2 and Qwen2.5: token embeddings, causal blocks with rotary positions, a last norm.

A generator on top of it says what its rows are beside text, and what it predicts from them; weights come from Hugging
Face folders (:mod:`.published`). Shapes: B samples, L rows, C width, D channels of a head.
"""

from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.language_model import LanguageModelConfig
from megavar.config.parallel import ParallelConfig
from megavar.generators.base import Generator
from megavar.transformer.megatron_config import transformer_config
from megavar.transformer.norms import RMSNorm
from megavar.transformer.rotary import Table, line_table, sectioned_table
from megavar.transformer.spec import BlockSpec, llama_block


class HasLanguageModel(Protocol):
    """The part of a generator's section that is read here."""

    @property
    def language_model(self) -> LanguageModelConfig:
        """Sizes."""
        ...

    @property
    def attention_kernel(self) -> str:
        """Name of a kernel, or ``auto``."""
        ...


def positions_of(valid: Tensor) -> Tensor:
    """Positions that do not count padding, int64 [B, L]; padding has the position of the last token before it.

    Args:
        valid: bool [B, L], False at padding.
    """
    return valid.long().cumsum(1) - 1


class LanguageModel(Generator):
    """Blocks, token embeddings (``text``) and last norm (``norm``)."""

    INITIAL_DEVIATION: ClassVar[float] = 0.02
    """Of weights that no folder gives: Qwen2's ``initializer_range``."""

    @classmethod
    def layers(cls, choice: HasLanguageModel, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
        """Grouped queries, biases of queries, keys and values only, a gated SiLU network."""
        sizes = choice.language_model
        return transformer_config(
            parallel,
            dtype,
            depth=sizes.depth,
            width=sizes.width,
            heads=sizes.heads,
            feed_forward=sizes.feed_forward,
            experts=sizes.experts,
            num_query_groups=sizes.groups,
            kv_channels=sizes.channels_of_head,
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            add_qkv_bias=True,
            layernorm_epsilon=sizes.norm_epsilon,
        )

    @property
    def sizes(self) -> LanguageModelConfig:
        """Of the language model."""
        choice: HasLanguageModel = self.choice  # type: ignore[assignment]
        return choice.language_model

    def build_first(self) -> None:
        """Embeddings of text tokens."""
        self.text = VocabParallelEmbedding(
            self.sizes.vocabulary, self.sizes.width, init_method=lambda weight: weight, config=self.unsharded
        )

    def spec(self, number: int) -> BlockSpec:
        """RMSNorm, causal attention with rotary positions, gated network."""
        kernel: str = self.choice.attention_kernel  # type: ignore[attr-defined]
        return llama_block(kernel=kernel, experts=self.sizes.experts, kinds=self.kinds)

    def build_last(self) -> None:
        """The last norm."""
        self.norm = RMSNorm(self.sizes.width, self.unsharded, self.sizes.norm_epsilon)

    def rotary(self, positions: Tensor) -> Table:
        """Cosines and sines of positions [B, L], or [3, B, L] (time, row, column) where the model has sections."""
        sizes = self.sizes
        if positions.dim() == 2:
            return line_table(positions, sizes.channels_of_head, sizes.rotary_base)
        assert sizes.rotary_sections is not None, "this language model knows one position per token"
        return sectioned_table(positions, sizes.rotary_sections, sizes.rotary_base)

    def initial_value(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Qwen2's: zero biases, unit norms, everything else normal with 0.02."""
        if name.endswith("bias"):
            value.zero_()
        elif value.ndim == 1:
            value.fill_(1.0)
        else:
            nn.init.normal_(value, std=self.INITIAL_DEVIATION, generator=generator)
