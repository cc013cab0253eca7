"""VAR: p(token maps | class) by next-scale prediction (VAR section 3.2, ``models/var.py``), dense or with experts.

Shapes: B samples, L tokens of all scales, C width, V codebook size, D code size. Inside, hidden states are
[L, B, C]; at the door, tensors are batch first.
"""

import math
from dataclasses import dataclass, field

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.generators.var import VARConfig
from megavar.config.parallel import ParallelConfig
from megavar.parallel.logical import initialize_parameters
from megavar.transformer.adaptive_norm import LinearFloat32, Modulation, normalize
from megavar.transformer.block import Block
from megavar.transformer.cache import KeyValueCache
from megavar.transformer.context import ForwardContext, RoutingRecord
from megavar.transformer.megatron_config import transformer_config
from megavar.transformer.sequence import SequenceLayout


@dataclass
class VARInputs:
    """What a VAR needs to predict every token from the earlier scales."""

    labels: Tensor
    """int64 [B]; the number of classes stands for "no class"."""
    features: Tensor
    """float32 [B, L - first, D]: the accumulated feature map before each scale after the first, resized to it."""
    sample_keys: Tensor | None = None
    """int64 [B], for drop path; None disables it."""


@dataclass
class VAROutput:
    """Logits and what was tapped on the way."""

    logits: Tensor
    """float32 [B, L, V] (V / tensor-parallel size of them on each rank)."""
    taps: dict[int, Tensor] = field(default_factory=dict)
    """Output of the blocks named in ``taps``: [B, L, C]."""


@dataclass(frozen=True)
class Stage:
    """The part of the model that a rank holds: a range of blocks, perhaps with embedding or head."""

    first_block: int
    blocks: int
    is_first: bool
    is_last: bool

    @staticmethod
    def split(depth: int, parallel: ParallelConfig, pipeline_rank: int, chunk: int = 0) -> "Stage":
        """Stage of a pipeline rank; with virtual pipelining ``chunk`` counts its model chunks."""
        chunks = parallel.pipeline * parallel.virtual_pipeline
        position = chunk * parallel.pipeline + pipeline_rank
        blocks = depth // chunks
        return Stage(position * blocks, blocks, position == 0, position == chunks - 1)


class Embedding(nn.Module):
    """Class and token features to hidden states, with positions and scales."""

    def __init__(self, config: VARConfig, scales: tuple[int, ...], code_dimension: int, dtype: torch.dtype) -> None:
        super().__init__()
        width, tokens = config.hidden_size, sum(side * side for side in scales)
        self.first = scales[0] ** 2
        self.classes = nn.Embedding(config.classes + 1, width, dtype=dtype)
        self.features = nn.Linear(code_dimension, width, dtype=dtype)
        self.start_position = nn.Parameter(torch.empty(self.first, width, dtype=dtype))
        self.position = nn.Parameter(torch.empty(tokens, width, dtype=dtype))
        self.scale = nn.Parameter(torch.empty(len(scales), width, dtype=dtype))

    def forward(
        self, labels: Tensor, features: Tensor | None, scale_index: Tensor, start: int
    ) -> tuple[Tensor, Tensor]:
        """Embed the rows from ``start`` on.

        Args:
            labels: [B].
            features: [B, rows, D], None while decoding the first scale.
            scale_index: [rows] scale of each row of this pass.
            start: position of the first row in the sequence; 0 prepends the start tokens.

        Returns:
            hidden [B, rows, C] and condition [B, C].
        """
        condition = self.classes(labels)
        parts = []
        if start == 0:
            parts.append(condition[:, None] + self.start_position)
        if features is not None:
            # The reference keeps this projection in float32 under mixed precision.
            projected = nn.functional.linear(features, self.features.weight.float(), self.features.bias.float())
            parts.append(projected.to(condition.dtype))
        rows = scale_index.shape[0]
        positions = self.position[start : start + rows] + self.scale[scale_index]
        return torch.cat(parts, 1) + positions, condition


class Head(nn.Module):
    """Adaptive norm and projection to the codebook, in float32 as the reference computes it."""

    def __init__(self, config: VARConfig, megatron: TransformerConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.modulation = Modulation(megatron, 2, float32=True)
        self.projection = LinearFloat32(
            config.hidden_size,
            vocabulary_size,
            config=self.modulation.linear.config,
            init_method=lambda weight: weight,
            bias=True,
            skip_bias_add=True,
        )

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """[L, B, C], [B, C] -> float32 [B, L, V / tensor-parallel size]."""
        scale, shift = self.modulation(condition.float()).unbind(1)
        logits, _ = self.projection(normalize(hidden.float()) * (1 + scale) + shift)
        return logits.transpose(0, 1)


class VAR(nn.Module):
    """One pipeline stage of a VAR; the whole model where there is one stage."""

    def __init__(
        self,
        config: VARConfig,
        *,
        scales: tuple[int, ...],
        code_dimension: int,
        vocabulary_size: int,
        parallel: ParallelConfig | None = None,
        stage: Stage | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        taps: tuple[int, ...] = (),
    ) -> None:
        """Build the blocks of ``stage`` and initialize them as the reference does, whatever the layout.

        Args:
            scales: side lengths of the token maps, coarse to fine.
            code_dimension: D, the tokenizer's code size.
            vocabulary_size: V.
            parallel: layout; the process groups must exist. None means a single process.
            stage: part of the model to hold; None means all of it.
            dtype: type of parameters and hidden states.
            seed: of the initialization and of drop path.
            taps: numbers of the blocks whose outputs are returned beside the logits.
        """
        super().__init__()
        parallel = parallel or ParallelConfig()
        self.generator = config
        self.scales = scales
        self.vocabulary_size = vocabulary_size
        self.seed = seed
        self.taps = taps
        self.stage = stage or Stage(0, config.depth, True, True)
        self.config = transformer_config(config, parallel, dtype)
        rows = parallel.tensor if self.config.sequence_parallel or config.experts is not None else 1
        self.layout = SequenceLayout.of_scales(scales, rows)
        self.row_multiple = rows
        if self.stage.is_first:
            self.embedding = Embedding(config, scales, code_dimension, dtype)
            self.shared_modulation = Modulation(self.config, 6) if config.shared_adaptive_norm else None
        self.blocks = nn.ModuleDict(
            {
                str(number): Block(self.config, config, number, len(scales), recompute=parallel.recompute)
                for number in range(self.stage.first_block, self.stage.first_block + self.stage.blocks)
            }
        )
        if self.stage.is_last:
            self.head = Head(config, self.config, vocabulary_size)
        self.routing: list[RoutingRecord] = []
        self.input_tensor: Tensor | None = None
        initialize_parameters(self, self._initial_value, seed)

    # -- training ---------------------------------------------------------------------------------------------------

    def forward(self, inputs: VARInputs) -> VAROutput | Tensor:
        """Teacher forcing: logits of all tokens given the true earlier scales.

        Returns:
            :class:`VAROutput` on the last stage. Earlier stages return what the next one receives, one packed tensor
            [rows, B, C] (see :meth:`packed_length`).
        """
        context = ForwardContext(self.layout, seed=self.seed)
        context.sample_keys = inputs.sample_keys if self.training else None
        context.routing = self.routing if self.training else None
        if self.stage.is_first:
            scale_index = self._true_scales(self.layout, inputs.labels.device)
            hidden, condition = self.embedding(inputs.labels, inputs.features, scale_index, 0)
            hidden = self._to_rows(hidden)
            conditions = self._conditions(condition)
            tapped: dict[int, Tensor] = {}
        else:
            conditions, hidden, tapped = self._unpack()
        hidden = self._run_blocks(hidden, conditions, context, tapped)
        if not self.stage.is_last:
            slots = [tapped.get(number, torch.zeros_like(hidden)) for number in self.taps]  # zeros: tapped later
            return torch.cat([conditions, hidden, *slots])
        taps = {number: self._to_tokens(value).transpose(0, 1) for number, value in tapped.items()}
        return VAROutput(self.head(self._to_tokens(hidden), conditions[0]), taps)

    def _run_blocks(
        self, hidden: Tensor, conditions: Tensor, context: ForwardContext, tapped: dict[int, Tensor]
    ) -> Tensor:
        modulation = conditions[1:].transpose(0, 1) if self.generator.shared_adaptive_norm else conditions[0]
        for number, block in self.blocks.items():
            hidden = block(hidden, modulation, context)
            if int(number) in self.taps:
                tapped[int(number)] = hidden
        return hidden

    def _conditions(self, condition: Tensor) -> Tensor:
        """Rows that every stage needs: the condition and, if shared, the six modulation vectors: [1 or 7, B, C]."""
        rows = condition[None]
        if self.shared_modulation is not None:
            rows = torch.cat([rows, self.shared_modulation(condition).transpose(0, 1)])
        return rows

    def _true_scales(self, layout: SequenceLayout, device: torch.device) -> Tensor:
        return layout.kind_index(device)[: layout.tokens]

    def _to_rows(self, hidden: Tensor) -> Tensor:
        """[B, L, C] -> [L + padding, B, C], this rank's part of it under sequence parallelism."""
        hidden = hidden.transpose(0, 1)
        padding = -hidden.shape[0] % self.row_multiple
        hidden = nn.functional.pad(hidden, (0, 0, 0, 0, 0, padding)).contiguous()
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        return hidden

    def _to_tokens(self, rows: Tensor, tokens: int | None = None) -> Tensor:
        """Undo :meth:`_to_rows` except for the order of dimensions: [L, B, C] on every rank."""
        if self.config.sequence_parallel:
            rows = tensor_parallel.gather_from_sequence_parallel_region(rows, tensor_parallel_output_grad=False)
        return rows[: self.layout.tokens if tokens is None else tokens]

    # -- pipeline -----------------------------------------------------------------------------------------------------

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Called by Megatron-core's schedules with what the previous stage returned."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def packed_length(self) -> int:
        """Sequence length to announce to Megatron-core's schedules, which divide it under sequence parallelism.

        Every stage sends the same number of rows: the condition rows, the hidden states, and one slot per tap.
        """
        divisor = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return (self._condition_rows + self._hidden_rows * (1 + len(self.taps))) * divisor

    @property
    def _condition_rows(self) -> int:
        return 7 if self.generator.shared_adaptive_norm else 1

    @property
    def _hidden_rows(self) -> int:
        divisor = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return self.layout.length // divisor

    def _unpack(self) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        assert self.input_tensor is not None, "a later stage runs only inside Megatron-core's schedules"
        conditions, hidden, *tapped = self.input_tensor.split(
            [self._condition_rows] + [self._hidden_rows] * (1 + len(self.taps))
        )
        return conditions, hidden, dict(zip(self.taps, tapped))

    # -- decoding ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self, labels: Tensor, scale: int, features: Tensor | None, cache: KeyValueCache, counted: Tensor | None = None
    ) -> Tensor:
        """Logits of all tokens of one scale, given the cache of the earlier ones.

        Args:
            labels: [B].
            scale: index k of the scale.
            features: float32 [B, s_k^2, D] accumulated map resized to the scale; None for the first.
            cache: receives the tokens of this scale; its capacity is L.
            counted: bool [B], samples that routing statistics count.

        Returns:
            float32 [B, s_k^2, V], complete on every tensor-parallel rank.
        """
        assert self.stage.is_first and self.stage.is_last, "decoding needs all blocks on one rank"
        layout = SequenceLayout.of_scales((self.scales[scale],), self.row_multiple, kinds=(scale,))
        routing = self.routing if counted is not None else None
        context = ForwardContext(layout, cache=cache, seed=self.seed, counted=counted, routing=routing)
        start = sum(previous**2 for previous in self.scales[:scale])
        hidden, condition = self.embedding(labels, features, self._true_scales(layout, labels.device), start)
        conditions = self._conditions(condition)
        hidden = self._run_blocks(self._to_rows(hidden), conditions, context, {})
        logits = self.head(self._to_tokens(hidden, layout.tokens), conditions[0])
        return tensor_parallel.gather_from_tensor_model_parallel_region(logits)

    # -- statistics ---------------------------------------------------------------------------------------------------

    def collect_routing(self) -> dict[str, Tensor]:
        """Routing since the last call, and forget it.

        Returns:
            ``load`` [blocks of the whole model, K, M] tokens per expert seen by this rank; ``balance`` [blocks]
            sum of Eq. 10 and ``passes`` [blocks] number of terms. Empty for a dense model.
        """
        experts = self.generator.experts
        if experts is None:
            return {}
        depth, device = self.generator.depth, next(self.parameters()).device
        load = torch.zeros(depth, len(self.scales), experts.number, device=device)
        balance, passes = torch.zeros(depth, device=device), torch.zeros(depth, device=device)
        for record in self.routing:
            load[record.block] += record.load
            balance[record.block] += record.balance
            passes[record.block] += 1
        self.routing.clear()
        return {"load": load, "balance": balance, "passes": passes}

    # -- initialization ------------------------------------------------------------------------------------------

    def _initial_value(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """The reference's initialization (``var.py:236-286``) of the logical tensor ``name``."""
        width, depth = self.generator.hidden_size, self.generator.depth
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
            value.mul_(self.generator.initial_head)
        elif name.startswith("head.modulation"):
            value.mul_(self.generator.initial_adaptive)
        elif name.startswith("blocks.") and ".modulation." in name:
            rows[:2].mul_(self.generator.initial_gamma)
            rows[2:].mul_(self.generator.initial_adaptive)
        elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            value.div_(math.sqrt(2 * depth))
