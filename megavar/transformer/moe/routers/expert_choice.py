"""Expert choice (Zhou et al., arXiv:2202.09368, Eq. 1 to 4): experts take tokens, instead of tokens experts.

    S    = softmax over experts (W x)
    I_j  = the k tokens of a group with the largest S_ij          for every expert j
    y_i  = sum over the experts j with i in I_j of S_ij E_j(x_i)  raw scores; nothing for a token that nobody takes
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavar.config.experts.expert_choice import ExpertChoiceExperts
from megavar.errors import ConfigError
from megavar.transformer.context import ForwardContext
from megavar.transformer.moe.router import Router, Rows
from megavar.transformer.moe.routing import Bounds


class ExpertChoiceRouter(Router):
    """Groups are the segments of each sample, or something larger (``ExpertChoiceExperts.group``)."""

    experts: ExpertChoiceExperts

    def __init__(self, config: TransformerConfig, experts: ExpertChoiceExperts, *, block: int, kinds: int) -> None:
        super().__init__(config, experts, block=block, kinds=kinds)
        self.weight = self.parameter(experts.number, config.hidden_size)

    def scores(self, hidden: Tensor, kinds: Tensor) -> Tensor:
        """[L, B, C] -> float32 [L, B, M]."""
        return F.linear(hidden.float(), self.weight.float()).softmax(-1)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Raw scores of the pairs that an expert took, and which those are."""
        complete, own = scores.detach(), self._own_rows(scores.shape[0])
        if self.tokens_sharded:
            complete = gather_from_sequence_parallel_region(complete)
        assignment = self._taken(complete)[own.start : own.stop]
        return scores * assignment, assignment

    def _taken(self, scores: Tensor) -> Tensor:
        """From the scores of all rows [L, B, M] to what each expert takes, bool [L, B, M]. Ties go to earlier rows."""
        context, group = self._context(), self._group()
        counted, segment = context.counted_rows(scores.device), context.sequence.segment_index(scores.device)
        counted = counted.expand(scores.shape[:2])
        if group == "image_scale":
            return _best(scores, segment, counted, len(context.sequence.sizes) + 1, self.experts)  # padding is one more
        if group == "image":
            return _best(scores, torch.zeros_like(segment), counted, 1, self.experts)
        one = torch.zeros(counted.numel(), dtype=torch.int64, device=scores.device)
        best = _best(scores.reshape(len(one), 1, -1), one, counted.reshape(-1, 1), 1, self.experts)
        return best.view(scores.shape)

    def bounds(self, rows: Rows, samples: int) -> Bounds:
        """Experts x k of every group, exactly, where a rank has all rows and all of them count."""
        context, group, number = self._context(), self._group(), self.experts.number
        if group == "batch":
            taken = min(self.experts.tokens_per_expert(context.sequence.tokens * samples), rows.count * samples)
            return Bounds(number, number * taken, every_row=False)
        segments = context.sequence.bounds if group == "image_scale" else ((0, context.sequence.tokens),)
        total = 0
        for first, after in segments:
            here = max(0, min(after, rows.stop) - max(first, rows.start))
            total += min(self.experts.tokens_per_expert(after - first), here)
        exact = context.valid is None and not self.tokens_sharded
        return Bounds(number, number * total * samples, every_row=exact)

    def _context(self) -> ForwardContext:
        context = self.context
        assert context is not None
        if context.sequence.rule == "causal":
            raise ConfigError(
                "generator.experts.router=expert_choice chooses among the tokens of a segment, but this generator "
                "draws them one after the other: what an expert takes would depend on tokens to come. Choose another "
                "router."
            )
        return context

    def _group(self) -> str:
        """Which tokens an expert chooses among, now."""
        if self.experts.group == "image_scale" or self.context is None or self.context.cache is None:
            return self.experts.group
        self.experts.check_decoding()
        assert self.experts.decoding_group is not None
        return self.experts.decoding_group


def _best(scores: Tensor, group: Tensor, counted: Tensor, groups: int, experts: ExpertChoiceExperts) -> Tensor:
    """The k best of every group for every expert, bool [L, B, M].

    One stable sort of the rows by group, then by falling score; a row's place within its group says if it is taken.

    Args:
        scores: float32 [L, B, M] in [0, 1].
        group: int64 [L], rising.
        counted: bool [L, B]; rows that do not count are taken by nobody.
    """
    length, samples = counted.shape
    score = scores.masked_fill(~counted[..., None], -1.0).double()
    key = 3.0 * group[:, None, None] - score  # groups do not touch
    order = key.sort(dim=0, stable=True).indices
    rows = torch.arange(length, device=scores.device)
    place = torch.empty_like(order).scatter_(0, order, rows[:, None, None].expand_as(order))
    first = torch.searchsorted(group, torch.arange(groups, device=scores.device))
    tokens = torch.zeros(groups, samples, dtype=torch.int64, device=scores.device)
    taken = experts.tokens_per_expert(tokens.index_add_(0, group, counted.long()))
    return (place - first[group][:, None, None] < taken[group][..., None]) & counted[..., None]
