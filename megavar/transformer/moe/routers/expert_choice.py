"""Expert choice (Zhou et al., arXiv:2202.09368, Eq. 1 to 4): experts take tokens, instead of tokens experts.

    S    = softmax over experts (W x)
    I_j  = the k tokens of a group with the largest S_ij          for every expert j
    y_i  = sum over the experts j with i in I_j of S_ij E_j(x_i)  raw scores; nothing for a token that nobody takes
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavar.config.experts.expert_choice import ExpertChoiceExperts
from megavar.errors import ConfigError
from megavar.transformer.context import ForwardContext
from megavar.transformer.moe.router import Router, Rows
from megavar.transformer.moe.routing import Bounds


@dataclass(frozen=True)
class Groups:
    """What the layout of a pass says of the groups within a sample, for all blocks; made outside of compiled graphs,
    which would otherwise depend on the number of segments and their sizes."""

    first: Tensor
    """int64 [L]: first row of the group of each row, which is a number of the group, too."""
    taken: Tensor
    """int64 [L, 1 or B]: tokens of the row's group that an expert takes."""
    copies: int
    """Rows of this rank that an expert takes at most of one sample."""


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
        context = self._context()
        counted = context.counted_rows(scores.device).expand(scores.shape[:2])
        if self._group() == "batch":
            one = torch.zeros(counted.numel(), dtype=torch.int64, device=scores.device)
            taken = self.experts.tokens_per_expert(counted.sum()).expand(len(one), 1)
            return _best(scores.reshape(len(one), 1, -1), one, taken, counted.reshape(-1, 1)).view(scores.shape)
        groups = self._groups(scores.device)
        return _best(scores, groups.first, groups.taken, counted)

    def prepare(self, context: ForwardContext, device: torch.device) -> None:
        """Groups, too."""
        super().prepare(context, device)
        self.context = context
        if self._group() != "batch":
            self._groups(device)

    def _groups(self, device: torch.device) -> Groups:
        context, group = self._context(), self._group()
        return context.once(f"groups/{group}", lambda: self._make_groups(context, group, device))

    def _make_groups(self, context: ForwardContext, group: str, device: torch.device) -> Groups:
        counted, sequence = context.counted_rows(device).long(), context.sequence
        segment = sequence.segment_index(device)  # padding is one more
        if group == "image":
            segment = torch.zeros_like(segment)
        tokens = torch.zeros(len(sequence.sizes) + 1, counted.shape[1], dtype=torch.int64, device=device)
        taken = self.experts.tokens_per_expert(tokens.index_add_(0, segment, counted))[segment]
        ranks = parallel_state.get_tensor_model_parallel_world_size() if self.tokens_sharded else 1
        rows, copies = self._own_rows(sequence.length // ranks), 0
        for first, after in sequence.bounds if group == "image_scale" else ((0, sequence.tokens),):
            here = max(0, min(after, rows.stop) - max(first, rows.start))
            copies += min(self.experts.tokens_per_expert(after - first), here)
        return Groups(torch.searchsorted(segment, segment), taken, copies)

    def bounds(self, rows: Rows, samples: int) -> Bounds:
        """Experts x k of every group, exactly, where a rank has all rows and all of them count."""
        context, number = self._context(), self.experts.number
        if self._group() == "batch":
            taken = min(self.experts.tokens_per_expert(context.sequence.tokens * samples), rows.count * samples)
            return Bounds(number, number * taken, every_row=False)
        copies = self._groups(self.weight.device).copies
        exact = context.valid is None and not self.tokens_sharded
        return Bounds(number, number * copies * samples, every_row=exact)

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


def _best(scores: Tensor, first: Tensor, taken: Tensor, counted: Tensor) -> Tensor:
    """The best of every group for every expert, bool [L, B, M].

    One stable sort of the rows by group, then by falling score; a row's place within its group says if it is taken.

    Args:
        scores: float32 [L, B, M] in [0, 1].
        first: int64 [L], rising: the first row of the group of each row.
        taken: int64 [L, 1 or B]: how many rows of its group an expert takes.
        counted: bool [L, B]; rows that do not count are taken by nobody.
    """
    score = scores.masked_fill(~counted[..., None], -1.0).double()
    key = 3.0 * first[:, None, None] - score  # groups do not touch
    order = key.sort(dim=0, stable=True).indices
    rows = torch.arange(len(first), device=scores.device)
    place = torch.empty_like(order).scatter_(0, order, rows[:, None, None].expand_as(order))
    return (place - first[:, None, None] < taken[..., None]) & counted[..., None]
