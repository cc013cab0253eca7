"""What all generators share: a stack of blocks under every parallel layout.

A :class:`Backbone` is one pipeline stage of a model, the whole of it where there is one stage. It knows how hidden
states travel between stages, how tensor-parallel ranks share them, which outputs a loss on the last stage wants to see,
what routers recorded, how blocks are recomputed, and how every parameter gets the same initial value in every layout.
It does not know what a token is: a generator (``generators/base.py``) says that in a few methods.

Shapes: B samples of a micro-batch, L tokens, C width. At the door tensors are batch first, [B, L, C]. Inside, hidden
states are *rows* [L + padding, B, C] as Megatron-core wants them, and a share of the rows under sequence parallelism.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.choice import resolve
from megavar.config.experts.base import ExpertsChoice
from megavar.config.parallel import ParallelConfig
from megavar.errors import ConfigError
from megavar.parallel.logical import initialize_parameters
from megavar.parallel.parameter_rule import ParameterRule
from megavar.parallel.payload import Payload, Slot
from megavar.parallel.pipeline_stage import Stage
from megavar.transformer.cache import KeyValueCache
from megavar.transformer.context import ForwardContext, RoutingRecord
from megavar.transformer.defaults import usual_initial_value, usual_rule
from megavar.transformer.interface import Embedded, GeneratorOutput, Head, TokenSequence
from megavar.transformer.megatron_config import without_sequence_parallel
from megavar.transformer.moe.carried import Carried
from megavar.transformer.moe.router import Router
from megavar.transformer.sequence import SequenceLayout

EMBEDDING = "embedding"
"""Name of the tap before the first block; the output of block i is ``block.i``."""


class Backbone(nn.Module, ABC):
    """One pipeline stage of a model. See the module, and :class:`megavar.generators.base.Generator` to write one."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        kinds: int,
        experts: ExpertsChoice | None,
        parallel: ParallelConfig,
        stage: Stage | None,
        seed: int,
        taps: tuple[str, ...],
        heads: Mapping[str, Head],
        shard: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """Build this stage's modules and give them their initial values.

        Args:
            config: of Megatron-core's layers.
            kinds: number of kinds of segments that routing statistics tell apart.
            experts: mixture of experts of the blocks, for the statistics' size.
            parallel: layout; its process groups must exist.
            stage: part of the model to hold; None means all of it.
            seed: of initial values, dropout and drop path.
            taps: names of the outputs that are returned beside the prediction.
            heads: networks on the last stage by name; their taps need not be among ``taps``.
            shard: called with every block when it has its initial values, before the next one is built (ZeRO-3).
        """
        super().__init__()
        self.config, self.kinds, self.experts, self.seed = config, kinds, experts, seed
        self.unsharded = without_sequence_parallel(config)
        """For modules outside the blocks: each tensor-parallel rank calls them with all tokens."""
        self.stage = stage or Stage(0, config.num_layers, True, True)
        self.recompute = parallel.recompute
        self.taps = taps
        self._heads = dict(heads)
        readers = {"taps": taps, **{f"head {name!r}": head.taps for name, head in heads.items()}}
        for reader, wanted in readers.items():
            _check_taps(reader, wanted, config.num_layers, self.last_taps)
        self.wanted: tuple[str, ...] = tuple(dict.fromkeys(tap for wanted in readers.values() for tap in wanted))
        """Taps of all readers."""
        self.tapped = tuple(tap for tap in self.wanted if tap not in self.last_taps)
        """Those that travel from stage to stage."""
        # Experts and sequence parallelism share rows evenly between the tensor-parallel ranks.
        shared = config.sequence_parallel or config.num_moe_experts is not None
        self.row_multiple = config.tensor_model_parallel_size if shared else 1
        self.balance = 1.0
        """Weight of the routers' balance loss of a micro-batch in the pass that runs now; set by the engine."""
        self.routing: list[RoutingRecord] = []
        self._carried = Carried(experts, config)
        self.input_tensor: Tensor | None = None
        if self.stage.is_first:
            self.build_first()
        first, after = self.stage.first_block, self.stage.first_block + self.stage.blocks
        self.blocks = nn.ModuleDict()
        for number in range(first, after):
            block = self.blocks[str(number)] = self.block(number)
            if shard is not None:
                initialize_parameters(block, self._initial_value, seed, prefix=f"blocks.{number}.")
                shard(block)
        if self.stage.is_last:
            self.build_last()
            built = {name: head.build_in(config.params_dtype, config.hidden_size) for name, head in heads.items()}
            self.heads = nn.ModuleDict(built)
        initialize_parameters(self, self._initial_value, seed)

    # -- what a generator says ------------------------------------------------------------------------------------

    @abstractmethod
    def build_first(self) -> None:
        """Assign the modules of the first stage to ``self``."""

    @abstractmethod
    def block(self, number: int) -> nn.Module:
        """Block ``number`` of the model, from 0: called with (rows [L, B, C], condition, :class:`ForwardContext`)."""

    @abstractmethod
    def build_last(self) -> None:
        """Assign the modules of the last stage to ``self``."""

    @abstractmethod
    def sequence(self, inputs: Any) -> TokenSequence:
        """The tokens of these inputs. Every stage calls it: it must not need parameters."""

    @abstractmethod
    def embed(self, inputs: Any) -> Embedded:
        """Hidden states and conditions; the first stage calls it."""

    @abstractmethod
    def predict(self, hidden: Tensor, conditions: Mapping[str, Tensor], inputs: Any) -> Any:
        """From the last block's hidden states [L, B, C] to the prediction; the last stage calls it.

        Args:
            conditions: [rows, B, C] by name, as they travelled.
        """

    def condition_rows(self) -> Mapping[str, int | None]:
        """Rows of each condition, by name; None: one per token, in the tokens' order. Default: no conditions.

        Those with a row per token are shared like hidden states under sequence parallelism.
        """
        return {}

    def modulating(self, conditions: Mapping[str, Tensor]) -> Tensor | None:
        """What blocks get as their condition, from [rows, B, C] by name.

        Default: the first condition, [B, C] (its first row), or this rank's rows [L, B, C] where it has one per token.
        """
        for name, rows in self.condition_rows().items():
            return conditions[name] if rows is None else conditions[name][0]
        return None

    @property
    def last_taps(self) -> tuple[str, ...]:
        """Taps beside :data:`EMBEDDING` and blocks: of the last stage's own modules. Default: none."""
        return ()

    def tapped_last(self) -> dict[str, Tensor]:
        """Those of :attr:`last_taps` that are in :attr:`wanted`, [B, rows, channels], after :meth:`predict`."""
        return {}

    def initial_value(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Fill the full float32 tensor ``value`` of the logical tensor ``name``, drawing from ``generator``."""
        usual_initial_value(name, value, generator)

    def own_rule(self, name: str) -> ParameterRule:
        """How the logical tensor ``name`` is trained; names of heads never come here."""
        return usual_rule(name)

    # -- one pass ---------------------------------------------------------------------------------------------------

    def forward(self, inputs: Any) -> GeneratorOutput | Tensor:
        """Run this stage.

        Returns:
            The last stage returns a :class:`GeneratorOutput`; earlier ones return what the next one receives, one
            packed tensor [rows, B, C] (see :meth:`payload_length`).
        """
        sequence = self.sequence(inputs)
        context = self._context(sequence)
        context.sample_keys = sequence.sample_keys if self.training else None
        context.routing = self.routing if self.training else None
        payload = self._payload(context.sequence)
        if self.stage.is_first:
            hidden, conditions = self._embed(inputs, context.sequence)
            tapped = {EMBEDDING: hidden} if EMBEDDING in self.tapped else {}
        else:
            hidden, conditions, tapped, context.carried = self._receive(payload)
        hidden = self._run_blocks(hidden, conditions, context, tapped)
        if not self.stage.is_last:
            sent = {"hidden": hidden, **_prefixed("condition", conditions), **_prefixed("tap", tapped)}
            return payload.pack(sent | self._carried.pack(context.carried))
        tokens = context.sequence.tokens
        taps = {name: self._to_tokens(rows, tokens).transpose(0, 1) for name, rows in tapped.items()}
        prediction = self.predict(self._to_tokens(hidden, tokens), self._complete(conditions, tokens), inputs)
        taps |= self.tapped_last()
        heads = {name: head(*(taps[tap] for tap in self._heads[name].taps)) for name, head in self.heads.items()}
        return GeneratorOutput(prediction, {name: taps[name] for name in self.taps}, heads)

    @torch.no_grad()
    def step(self, inputs: Any, cache: KeyValueCache | None, counted: Tensor | None = None) -> Any:
        """One step of decoding: the prediction for the tokens of ``inputs``, which follow those in ``cache``.

        Args:
            inputs: describe the new tokens only, and where they stand.
            cache: receives their keys and values; None: the inputs are the whole sequence.
            counted: bool [B], samples that routing statistics count; None records nothing.

        Returns:
            The prediction, complete on every tensor-parallel rank.
        """
        assert self.stage.is_first and self.stage.is_last, "decoding needs all blocks on one rank"
        context = self._context(self.sequence(inputs))
        context.cache, context.counted = cache, counted
        context.routing = self.routing if counted is not None else None
        hidden, conditions = self._embed(inputs, context.sequence)
        hidden = self._run_blocks(hidden, conditions, context, {})
        tokens = context.sequence.tokens
        prediction = self.predict(self._to_tokens(hidden, tokens), self._complete(conditions, tokens), inputs)
        return self.gather(prediction)

    def gather(self, prediction: Any) -> Any:
        """The complete prediction from a tensor-parallel rank's part. Default: the last dimension is shared."""
        return tensor_parallel.gather_from_tensor_model_parallel_region(prediction)

    def _context(self, sequence: TokenSequence) -> ForwardContext:
        """The context with rows of padding, in the layout and in all that has a row per token."""
        padding = -sequence.layout.tokens % self.row_multiple
        rotary, valid = sequence.rotary, sequence.valid
        if padding and rotary is not None:
            cos, sin = (nn.functional.pad(table, (0, 0, 0, padding)) for table in rotary)
            rotary = cos, sin
        if padding and valid is not None:
            valid = nn.functional.pad(valid, (0, padding))
        layout = replace(sequence.layout, padding=padding)
        return ForwardContext(layout, rotary=rotary, valid=valid, seed=self.seed, balance=self.balance)

    def _embed(self, inputs: Any, layout: SequenceLayout) -> tuple[Tensor, dict[str, Tensor]]:
        """Rows of hidden states and of conditions."""
        embedded = self.embed(inputs)
        assert embedded.hidden.shape[1] == layout.tokens, f"{embedded.hidden.shape} for {layout}"
        conditions = {}
        for name, rows in self.condition_rows().items():
            given = embedded.conditions[name]
            assert given.shape[1] == (layout.tokens if rows is None else rows), f"condition {name!r}: {given.shape}"
            conditions[name] = self._to_rows(given) if rows is None else given.transpose(0, 1)
        return self._to_rows(embedded.hidden), conditions

    def _run_blocks(
        self, hidden: Tensor, conditions: Mapping[str, Tensor], context: ForwardContext, tapped: dict[str, Tensor]
    ) -> Tensor:
        """All blocks of this stage; what is tapped goes into ``tapped``."""
        condition = self.modulating(conditions)
        for number, block in self.blocks.items():
            hidden = self.run_block(block, hidden, condition, context)
            if f"block.{number}" in self.tapped:
                tapped[f"block.{number}"] = hidden
        return hidden

    def run_block(self, block: nn.Module, hidden: Tensor, condition: Tensor | None, context: ForwardContext) -> Tensor:
        """One block, which the backward pass computes again where the layout says so."""
        if self.recompute != "full" or not hidden.requires_grad:
            return block(hidden, condition, context)
        passes = itertools.count()

        def compute(hidden: Tensor, condition: Tensor | None, carried: Tensor | None) -> tuple[Tensor, Tensor | None]:
            recorded = context if next(passes) == 0 else context.silent()
            recorded.carried = carried
            return block(hidden, condition, recorded), recorded.carried

        hidden, context.carried = tensor_parallel.checkpoint(compute, False, hidden, condition, context.carried)
        return hidden

    def _complete(self, conditions: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Conditions as the last stage's modules want them: without padding, all rows on every rank."""
        per_token = {name for name, rows in self.condition_rows().items() if rows is None}
        return {n: self._to_tokens(rows, tokens) if n in per_token else rows for n, rows in conditions.items()}

    def _to_rows(self, values: Tensor) -> Tensor:
        """[B, L, C] -> [L + padding, B, C], this rank's share of it under sequence parallelism."""
        values = values.transpose(0, 1)
        padding = -values.shape[0] % self.row_multiple
        values = nn.functional.pad(values, (0, 0, 0, 0, 0, padding)).contiguous()
        if self.config.sequence_parallel:
            values = tensor_parallel.scatter_to_sequence_parallel_region(values)
        return values

    def _to_tokens(self, rows: Tensor, tokens: int) -> Tensor:
        """Undo :meth:`_to_rows` except for the order of dimensions: [L, B, C] on every rank."""
        if self.config.sequence_parallel:
            # Every rank goes on with all tokens and computes the same gradient: keep this rank's rows of it.
            rows = tensor_parallel.gather_from_sequence_parallel_region(rows, tensor_parallel_output_grad=False)
        return rows[:tokens]

    # -- pipeline ---------------------------------------------------------------------------------------------------

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Called by Megatron-core's schedules with what the previous stage returned."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def payload_length(self, inputs: Any) -> int:
        """Sequence length to announce to Megatron-core's schedules for these inputs."""
        return self._payload(self._context(self.sequence(inputs)).sequence).length

    def _payload(self, layout: SequenceLayout) -> Payload:
        """What travels: hidden states, conditions, and a slot per tap, which is empty until its block has run."""
        slots = [Slot("hidden", layout.length, sharded=True)]
        for name, rows in self.condition_rows().items():
            slots.append(Slot(f"condition.{name}", layout.length if rows is None else rows, sharded=rows is None))
        slots += [Slot(f"tap.{name}", layout.length, sharded=True) for name in self.tapped]
        slots += self._carried.slots(layout)
        return Payload(slots, self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1)

    def _receive(self, payload: Payload) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Tensor | None]:
        """Hidden states, conditions, taps and what routers carry from the previous stage."""
        assert self.input_tensor is not None, "a later stage runs only inside Megatron-core's schedules"
        received, self.input_tensor = payload.unpack(self.input_tensor), None
        conditions = {name: received[f"condition.{name}"] for name in self.condition_rows()}
        taps = {name: received[f"tap.{name}"] for name in self.tapped}
        return received["hidden"], conditions, taps, self._carried.unpack(received)

    # -- statistics, parameters -------------------------------------------------------------------------------------

    @property
    def routing_targets(self) -> tuple[str, ...]:
        """Names of what tokens are sent to (``ExpertsChoice.targets``); none in a dense model."""
        return () if self.experts is None else self.experts.targets

    def collect_routing(self) -> dict[str, Tensor]:
        """Routing since the last call, and forget it.

        Returns:
            ``load`` [blocks of the whole model, kinds, targets] tokens per target (``ExpertsChoice.targets``) seen by
            this rank; ``balance`` [blocks] sum of the balance losses and ``passes`` [blocks] number of terms; where
            tokens meet different numbers of experts ``met`` [blocks, kinds, experts + 1], tokens by that number. Empty
            for a dense model.
        """
        if self.experts is None:
            return {}
        depth, device = self.config.num_layers, next(self.parameters()).device
        sizes: dict[str, tuple[int, ...]] = {"balance": (), "passes": ()}
        sizes["load"] = (self.kinds, len(self.experts.targets))
        if self.experts.variable_number:
            sizes["met"] = (self.kinds, self.experts.number + 1)
        sums = {name: torch.zeros(depth, *size, device=device) for name, size in sizes.items()}
        for record in self.routing:
            sums["load"][record.block] += record.load
            sums["balance"][record.block] += record.balance
            sums["passes"][record.block] += 1
            if record.met is not None:
                sums["met"][record.block] += record.met
        self.routing.clear()
        return sums

    def rule(self, name: str) -> ParameterRule:
        """How the logical tensor ``name`` is trained, on whatever stage it lies."""
        head, inner = self._head_of(name)
        if head is not None:
            return head.rule(inner)
        router, inner = self._router_of(name)
        return (router and router.rule(inner)) or self.own_rule(name)

    def _initial_value(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        head, inner = self._head_of(name)
        if head is not None:
            head.initial_value(inner, value, generator)
            return
        router, inner = self._router_of(name)
        if router is None or not router.initial_value(inner, value, generator):
            self.initial_value(name, value, generator)

    def _router_of(self, name: str) -> tuple[type[Router] | None, str]:
        """The class of the router that a logical tensor belongs to, and the tensor's name in it."""
        _, within, inner = name.partition(".moe.router.")
        return (resolve(self.experts) if within and self.experts else None), inner

    def _head_of(self, name: str) -> tuple[Head | None, str]:
        """The head that a logical tensor belongs to, and the tensor's name in it."""
        if not name.startswith("heads."):
            return None, name
        _, head, inner = name.split(".", 2)
        return self._heads[head], inner


def _check_taps(reader: str, taps: tuple[str, ...], depth: int, own: tuple[str, ...]) -> None:
    for tap in taps:
        if tap not in (EMBEDDING, *own, *(f"block.{number}" for number in range(depth))):
            raise ConfigError(
                f"The {reader} of a loss term asks for the hidden states {tap!r}, but a generator of {depth} blocks "
                f"has {EMBEDDING!r} and 'block.0' to 'block.{depth - 1}'. Choose one of them in the term, or raise "
                f"generator.depth."
            )


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in tensors.items()}
