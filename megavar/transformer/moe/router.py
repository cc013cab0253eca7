"""What all routers share. A new one says how experts are scored, in a few lines:

    class MyRouter(Router):
        def __init__(self, config, experts, **place):
            super().__init__(config, experts, **place)
            self.weight = self.parameter(experts.number, config.hidden_size)

        def scores(self, hidden, kinds):
            return F.linear(hidden.float(), self.weight.float()).softmax(-1)

and its choice (a subclass of ``ExpertsChoice`` with a tag of its own) names the class. Gates, balance loss, statistics,
padding and sequence parallelism are here; and what follows :meth:`Router.scores` may be replaced.

Shapes: L rows of this rank, B samples, M targets (``ExpertsChoice.targets``: the experts, and after them what else a
router knows), m experts per token.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.experts.base import ExpertsChoice
from megavar.parallel.parameter_rule import ParameterRule
from megavar.transformer.context import ForwardContext, RoutingRecord
from megavar.transformer.moe.routing import Bounds, WithLoss, balance_loss, top_k_gates


class Routing(NamedTuple):
    """Which experts compute which tokens. T tokens of this rank (its rows times its samples), E experts."""

    gates: Tensor
    """[T, E] in the type of the hidden states, with gradient."""
    assignment: Tensor
    """bool [T, E]."""
    bounds: Bounds
    """What ``assignment`` keeps to."""
    input_scale: float = 1.0
    """What the experts' input is multiplied with."""
    beside: Tensor | None = None
    """What targets that are no experts add to the output, [L, B, C]."""


@dataclass(frozen=True)
class Rows:
    """Rows of the sequence, ``start`` to ``stop``. (A ``range`` would tie a compiled graph to their number.)"""

    start: int
    stop: int

    @property
    def count(self) -> int:
        """How many."""
        return self.stop - self.start


class Router(nn.Module, ABC):
    """Scores tokens, chooses their experts, keeps the experts balanced, records what happened.

    The layer around it sets ``context`` before every call.
    """

    input_scale = 1.0
    """See :attr:`Routing.input_scale`."""

    def __init__(self, config: TransformerConfig, experts: ExpertsChoice, *, block: int, kinds: int) -> None:
        """Build the router of block ``block``.

        Args:
            experts: the choice that named this class, with its keys.
            kinds: number of kinds of segments (``SequenceLayout.kinds``).
        """
        super().__init__()
        self.experts, self.block, self.kinds = experts, block, kinds
        self.tokens_sharded = config.sequence_parallel and config.tensor_model_parallel_size > 1
        self._dtype = config.params_dtype
        self.context: ForwardContext | None = None

    def parameter(self, *shape: int) -> nn.Parameter:
        """A new parameter. Each tensor-parallel rank routes its own tokens: gradients are added up over them."""
        parameter = nn.Parameter(torch.empty(shape, dtype=self._dtype))
        parameter.sequence_parallel = self.tokens_sharded  # type: ignore[attr-defined]
        return parameter

    @classmethod
    def initial_value(cls, name: str, value: Tensor, generator: torch.Generator) -> bool:
        """Fill the parameter ``name``, float32, and say so; default: the generator's rule for linear layers does."""
        return False

    @classmethod
    def rule(cls, name: str) -> ParameterRule | None:
        """How the parameter ``name`` is trained; default: as the generator says."""
        return None

    @abstractmethod
    def scores(self, hidden: Tensor, kinds: Tensor) -> Tensor:
        """How much each expert suits each token.

        Args:
            hidden: [L, B, C].
            kinds: int64 [L], the kind of each row's segment (0 for rows of padding, which do not count).

        Returns:
            float32 [L, B, M], with gradient; each token's sum is 1.
        """

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Gates [L, B, M] with gradient and bool assignment [L, B, M]. Default: the m best, raw scores (MEPA Eq. 7).

        Tokens may get different numbers of experts, or none, if the choice says so (``ExpertsChoice.variable_number``);
        gates of pairs that are not assigned are not read.
        """
        return top_k_gates(scores, self.experts.top_k)

    def bounds(self, rows: Rows, samples: int) -> Bounds:
        """What :meth:`choose` keeps to for this rank's ``rows``, so that buffers need no count from the device.

        Default: exactly m copies of each token, or up to E where the choice says that the number varies.
        """
        tokens = rows.count * samples
        if self.experts.variable_number:
            return Bounds(self.experts.number, tokens * self.experts.number)
        return Bounds(self.experts.top_k, tokens * self.experts.top_k, every_token=True, every_row=True)

    def kept(self, chosen: Tensor, counted: Tensor) -> Tensor:
        """Which of the chosen pairs are computed, bool [L, B, M]. Default: all; nothing is dropped."""
        return chosen

    def beside(self, hidden: Tensor, gates: Tensor) -> Tensor | None:
        """What targets that are no experts add to the output, from the experts' input [L, B, C] and [L, B, M]."""
        return None

    def balance(self, scores: Tensor, assignment: Tensor, counted: Tensor) -> Tensor:
        """The loss that keeps experts in use, a float32 scalar. Default: MEPA Eq. 10 by image or by micro-batch.

        Args:
            counted: float32 [L, 1 or B], 1 for tokens and 0 for padding.
        """
        weights = counted[..., None]
        assigned, score_sum, tokens = (assignment * weights).sum(0), (scores * weights).sum(0), weights.sum(0)
        if self.tokens_sharded:
            assigned, score_sum, tokens = (
                tensor_parallel.reduce_from_tensor_model_parallel_region(part)
                for part in (assigned, score_sum, tokens.clone())
            )
        if self.experts.balance_scope == "micro_batch":
            tokens = tokens.expand(assigned.shape[0], 1).sum(0, keepdim=True)
            assigned, score_sum = assigned.sum(0, keepdim=True), score_sum.sum(0, keepdim=True)
        return balance_loss(assigned, score_sum, tokens.clamp(min=1)).mean()

    def prepare(self, context: ForwardContext, device: torch.device) -> None:
        """Make what the router asks of a pass, before the block is computed: a compiled graph does not depend on it."""
        context.kind_index(device), context.counted_rows(device)

    def set_layer_number(self, layer_number: int) -> None:
        """Required by Megatron-core; the block number is known from the constructor."""

    def forward(self, hidden: Tensor) -> Routing:
        """Route the tokens of this rank, [L, B, C]."""
        assert self.context is not None
        kinds, counted = self._rows(hidden)
        scores = self.scores(hidden, kinds.clamp(min=0))
        gates, chosen = self.choose(scores)
        loss = self.balance(scores, chosen, counted)
        assignment = self.kept(chosen, counted)
        if assignment is not chosen:
            gates = gates * assignment
        if self.context.routing is not None:
            self._record(assignment, kinds, counted, loss)
        coefficient = self.experts.balance_coefficient * self.context.balance
        if torch.is_grad_enabled() and coefficient > 0:
            gates = WithLoss.apply(gates, coefficient * loss)
        experts = slice(self.experts.number)
        given = hidden if self.input_scale == 1.0 else hidden * self.input_scale
        return Routing(
            gates[..., experts].flatten(0, 1).to(hidden.dtype),
            assignment[..., experts].flatten(0, 1),
            self.bounds(self._own_rows(hidden.shape[0]), hidden.shape[1]),
            self.input_scale,
            self.beside(given, gates),
        )

    def _own_rows(self, length: int) -> Rows:
        """Numbers of this rank's ``length`` rows in the sequence."""
        assert self.context is not None
        first = self.context.first_row(length)
        return Rows(first, first + length)

    def _rows(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Kind of each of this rank's rows, int64 [L] (padding: negative), and what counts, float32 [L, 1 or B]."""
        assert self.context is not None
        own = self._own_rows(hidden.shape[0])
        rows = slice(own.start, own.stop)
        kinds = self.context.kind_index(hidden.device)
        return kinds[rows], self.context.counted_rows(hidden.device)[rows].float()

    @torch.no_grad()
    def _record(self, assignment: Tensor, kinds: Tensor, counted: Tensor, loss: Tensor) -> None:
        assert self.context is not None and self.context.routing is not None
        if self.context.counted is not None:
            counted = counted * self.context.counted
        counted, kinds = counted.expand(assignment.shape[:2]), kinds.clamp(min=0)
        load = _by_kind((assignment * counted[..., None]).sum(1), kinds, self.kinds)
        met = None
        if self.experts.variable_number:
            numbers = torch.arange(self.experts.number + 1, device=kinds.device)  # none to all
            found = assignment[..., : self.experts.number].sum(-1)[..., None] == numbers
            met = _by_kind((found * counted[..., None]).sum(1), kinds, self.kinds)
        self.context.routing.append(RoutingRecord(load, loss.detach(), met))


def _by_kind(values: Tensor, kinds: Tensor, number: int) -> Tensor:
    """Sums [K, N] of the rows [L, N] of each of ``number`` kinds; not by ``index_add``, which is atomic on CUDA."""
    own = torch.arange(number, device=kinds.device)[:, None] == kinds
    return (own[..., None] * values).sum(1)
