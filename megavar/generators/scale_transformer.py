"""What VAR's and FlexVAR's transformers share: p(token maps | class), scale by scale, dense or with experts.

Shapes: B samples, L tokens of all scales, C width, V codebook size, D code size. Inside, hidden states are
[L, B, C]; at the door, tensors are batch first. Source: FoundationVision/VAR ``models/var.py``.
"""

import functools
import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.generators.scale_transformer import ScaleTransformerConfig
from megavar.config.parallel import ParallelConfig
from megavar.generators.base import Embedded, Generator, TokenSequence
from megavar.generators.inputs import ScaleInputs
from megavar.parallel.parameter_rule import ParameterRule
from megavar.parallel.vocabulary import Scores
from megavar.transformer.linear import VocabularyLinear
from megavar.transformer.megatron_config import transformer_config
from megavar.transformer.modulation import ModulationNetwork
from megavar.transformer.norms import normalize
from megavar.transformer.sequence import SequenceLayout
from megavar.transformer.spec import BlockSpec, var_block

_NOT_DECAYED = ("start_position", "first_position", "position", "mask", "scale", "offset", "log_temperature")


class Head(nn.Module):
    """Adaptive norm and projection to the codebook, in float32 as the reference computes it."""

    def __init__(self, config: TransformerConfig, vocabulary: int) -> None:
        super().__init__()
        self.modulation = ModulationNetwork(config, 2, float32=True)
        self.projection = VocabularyLinear(
            config.hidden_size,
            vocabulary,
            config=self.modulation.linear.config,
            init_method=lambda weight: weight,
            bias=True,
            skip_bias_add=True,
        )

    def forward(self, hidden: Tensor, condition: Tensor, *scoring: Any) -> Any:
        """[L, B, C], [B, C] -> float32 logits [L, B, V / tensor-parallel size], or scores: see
        :class:`VocabularyLinear` for these and for ``scoring``."""
        scale, shift = self.modulation(condition.float()).unbind(1)
        predicted, _ = self.projection(torch.addcmul(shift, normalize(hidden.float()), 1 + scale), *scoring)
        return predicted


class ScaleTransformer(Generator):
    """A stage. The prediction is its logits: float32 [B, L, V / tensor-parallel size] (or scores, see :meth:`predict`).

    They are a view of a contiguous [L, B, V] tensor: ``parallel.vocabulary`` reduces rows in the order in which they
    lie, and copies none of them. A subclass says how maps are embedded and what routers call them.
    """

    choice: ScaleTransformerConfig

    @classmethod
    def layers(cls, choice: ScaleTransformerConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
        """GELU (tanh); with unit-length queries and keys the learned temperature is the softmax's only scale."""
        head_size = choice.hidden_size // choice.attention_heads
        return transformer_config(
            parallel,
            dtype,
            depth=choice.depth,
            width=choice.hidden_size,
            heads=choice.attention_heads,
            feed_forward=choice.feed_forward_size,
            experts=choice.experts,
            softmax_scale=1.0 if choice.qk_l2_norm else 0.25 / head_size**0.5,
            activation_func=functools.partial(F.gelu, approximate="tanh"),
        )

    @abstractmethod
    def build_embedding(self) -> nn.Module:
        """Inputs to hidden states: (inputs, side of each map by its number) -> hidden [B, L, C] and condition [B, C].
        Its parameters are ``embedding.*``."""

    @abstractmethod
    def kind_of(self, number: int, side: int) -> int:
        """What routers and their statistics call the map of this number and side."""

    def build_first(self) -> None:
        """Embedding, and the modulation that all blocks share if they do."""
        self.embedding = self.build_embedding()
        self.shared_modulation = ModulationNetwork(self.config, 6) if self.choice.shared_adaptive_norm else None

    def spec(self, number: int) -> BlockSpec:
        """Adaptive norm, scale-causal attention, feed-forward network or experts."""
        return var_block(
            kernel=self.choice.attention_kernel,
            unit_length=self.choice.qk_l2_norm,
            shared_modulation=self.choice.shared_adaptive_norm,
            drop_path=self.choice.drop_path_rate,
            experts=self.choice.experts,
            kinds=self.kinds,
        )

    def build_last(self) -> None:
        """The head."""
        assert self.space.vocabulary is not None
        self.head = Head(self.config, self.space.vocabulary)

    # -- one pass ---------------------------------------------------------------------------------------------------

    def sequence(self, inputs: ScaleInputs) -> TokenSequence:
        """The maps that are present, coarse to fine."""
        maps = inputs.maps(self.space.sides)
        kinds = tuple(self.kind_of(number, side) for number, side in maps.items())
        return TokenSequence(
            SequenceLayout.of_scales(tuple(maps.values()), kinds=kinds), sample_keys=inputs.sample_keys
        )

    def embed(self, inputs: ScaleInputs) -> Embedded:
        """Start tokens and projected features, with positions; the class conditions everything."""
        hidden, condition = self.embedding(inputs, inputs.maps(self.space.sides))
        conditions = {"image": condition[:, None]}
        if self.shared_modulation is not None:
            conditions["shared"] = self.shared_modulation(condition)
        return Embedded(hidden, conditions)

    def condition_rows(self) -> Mapping[str, int]:
        """The class's row; with shared adaptive norm also the six modulation vectors."""
        return {"image": 1, "shared": 6} if self.choice.shared_adaptive_norm else {"image": 1}

    def modulating(self, conditions: Mapping[str, Tensor]) -> Tensor:
        """[B, C], or the six vectors [B, 6, C] that each block adds its own offset to."""
        if self.choice.shared_adaptive_norm:
            return conditions["shared"].transpose(0, 1)
        return conditions["image"][0]

    def predict(self, hidden: Tensor, conditions: Mapping[str, Tensor], inputs: ScaleInputs) -> Tensor | Scores:
        """[L, B, C] -> float32 logits [B, L, V / tensor-parallel size]; with ``head_chunks`` scores of targets."""
        condition, chunks = conditions["image"][0], self.choice.head_chunks
        if chunks > 1 and inputs.targets is not None:
            return self.head(hidden, condition, inputs.targets, inputs.label_smoothing, chunks)
        return self.head(hidden, condition).transpose(0, 1)

    # -- parameters -------------------------------------------------------------------------------------------------

    def initial_value(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """The reference's initialization (``var.py:236-286``)."""
        width, depth = self.choice.hidden_size, self.choice.depth
        if name.endswith("bias"):
            value.zero_()
            return
        if name.endswith("log_temperature"):
            value.fill_(math.log(4))
            return
        if name.endswith("modulation.offset"):
            value.normal_(generator=generator).div_(math.sqrt(width))
            rows = value
        else:
            nn.init.trunc_normal_(value, std=math.sqrt(1 / width / 3), generator=generator)
            rows = value.unflatten(0, (-1, width)) if name.endswith("modulation.linear.weight") else value
        if name.startswith("head.projection"):
            value.mul_(self.choice.initial_head)
        elif name.startswith("head.modulation"):
            value.mul_(self.choice.initial_adaptive)
        elif name.startswith("blocks.") and ".modulation." in name:
            rows[:2].mul_(self.choice.initial_gamma)
            rows[2:].mul_(self.choice.initial_adaptive)
        elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            value.div_(math.sqrt(2 * depth))

    def own_rule(self, name: str) -> ParameterRule:
        """No weight decay on vectors, positions, scale embeddings, modulation offsets, temperatures."""
        last = name.rsplit(".", 1)[-1]
        # By name, not by number of dimensions: stacked experts hold their biases as matrices [experts, width].
        return ParameterRule(decays=not (last.endswith("bias") or last in _NOT_DECAYED))

    def example(self, images: int) -> ScaleInputs:
        """Class 0, 1, ... and features of zeros."""
        labels = torch.arange(images) % self.choice.classes
        rows = self.space.length - self.space.sides[0] ** 2
        targets = torch.zeros(images, self.space.length, dtype=torch.long)
        features = torch.zeros(images, rows, self.space.channels)
        return ScaleInputs(labels, features, torch.arange(images), targets=targets)
