"""MEPA's routers for Megatron-core's ``MoELayer``."""

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.experts.base import ExpertsChoice
from megavar.transformer.context import ForwardContext, RoutingRecord
from megavar.transformer.moe.routing import balance_loss, top_k_gates


class ScaleAwareRouter(nn.Module):
    """Scores experts from the token (STMoE, Eq. 9) or from its scale alone (SMoE, Eq. 8).

    Implements Megatron-core's ``RouterInterface``. The layer around it sets ``context`` before every call, because
    Megatron-core hands a router nothing but hidden states.
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None,
        experts: ExpertsChoice,
        block: int,
        scales: int,
    ) -> None:
        super().__init__()
        self.experts = experts
        self.block = block
        self.scales = scales
        self.tokens_sharded = config.sequence_parallel
        self.tensor_size = config.tensor_model_parallel_size
        width, dtype = config.hidden_size, config.params_dtype
        self.weight = nn.Parameter(torch.empty(experts.number, width, dtype=dtype))
        self._mark_partial_gradient(self.weight)
        self.scale_embedding: nn.Parameter | None = None
        if experts.router == "scale" or experts.scale_embedding_in_router:
            self.scale_embedding = nn.Parameter(torch.empty(scales, width, dtype=dtype))
            self._mark_partial_gradient(self.scale_embedding)
        self.context: ForwardContext | None = None

    def _mark_partial_gradient(self, parameter: nn.Parameter) -> None:
        """Each tensor-parallel rank routes its own tokens: gradients must be added up over them."""
        parameter.sequence_parallel = self.tokens_sharded  # type: ignore[attr-defined]

    def set_layer_number(self, layer_number: int) -> None:
        """Required by Megatron-core; the block number is known from the constructor."""

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route the tokens of this rank.

        Args:
            hidden: [L, B, C].

        Returns:
            gates [L * B, M] in the type of ``hidden`` and assignment bool [L * B, M].
        """
        assert self.context is not None
        length, _batch, _ = hidden.shape
        scale = self._local_kinds(length, hidden.device)
        scores = self._scores(hidden, scale)
        gates, assignment = top_k_gates(scores, self.experts.top_k)
        valid = (scale >= 0).to(scores.dtype)
        loss = self._balance(scores, assignment, valid)
        if self.context.routing is not None:
            self._record(assignment, scale, loss)
        coefficient = self.experts.balance_coefficient * self.context.balance
        if torch.is_grad_enabled() and coefficient > 0:
            gates = MoEAuxLossAutoScaler.apply(gates, coefficient * loss)
        return gates.flatten(0, 1).to(hidden.dtype), assignment.flatten(0, 1)

    def _local_kinds(self, length: int, device: torch.device) -> Tensor:
        """Kind of the segment of each of this rank's rows, int64 [L]; negative for padding."""
        assert self.context is not None
        index = self.context.sequence.kind_index(device)
        if self.tokens_sharded and self.tensor_size > 1:
            from megatron.core import parallel_state

            index = index.chunk(self.tensor_size)[parallel_state.get_tensor_model_parallel_rank()]
        assert index.shape[0] == length
        return index

    def _scores(self, hidden: Tensor, scale: Tensor) -> Tensor:
        """Eq. 8 or Eq. 9 in float32: [L, B, M]."""
        embedding = None
        if self.scale_embedding is not None:
            embedding = self.scale_embedding.float()[scale.clamp(min=0)].unsqueeze(1)
        if self.experts.router == "scale":
            assert embedding is not None
            tokens = embedding.expand(-1, hidden.shape[1], -1)
        else:
            tokens = hidden.float() if embedding is None else hidden.float() + embedding
        return F.linear(tokens, self.weight.float()).softmax(-1)

    def _balance(self, scores: Tensor, assignment: Tensor, valid: Tensor) -> Tensor:
        """Eq. 10 by image or by micro-batch, a float32 scalar; padding rows do not count."""
        assert self.context is not None
        weights = valid[:, None, None]
        assigned = (assignment * weights).sum(0)
        score_sum = (scores * weights).sum(0)
        tokens = valid.sum()
        if self.tokens_sharded and self.tensor_size > 1:
            assigned, score_sum, tokens = (
                tensor_parallel.reduce_from_tensor_model_parallel_region(part)
                for part in (assigned, score_sum, tokens.clone())
            )
        if self.experts.balance_scope == "micro_batch":
            tokens = tokens * assigned.shape[0]
            assigned, score_sum = assigned.sum(0, keepdim=True), score_sum.sum(0, keepdim=True)
        return balance_loss(assigned, score_sum, tokens).mean()

    @torch.no_grad()
    def _record(self, assignment: Tensor, scale: Tensor, loss: Tensor) -> None:
        assert self.context is not None and self.context.routing is not None
        counted = assignment if self.context.counted is None else assignment[:, self.context.counted]
        load = torch.zeros(self.scales + 1, self.experts.number, device=scale.device)
        load.index_add_(0, scale.remainder(self.scales + 1), counted.sum(1, dtype=torch.float32))  # padding: last
        self.context.routing.append(RoutingRecord(self.block, load[: self.scales], loss.detach()))
