"""Cross entropy, accuracy and best tokens of logits whose vocabulary is sharded over the tensor-parallel ranks.

Everything works on *rows* [tokens, V] in the order in which the logits lie in memory: a head computes [L, B, V], its
batch-first view is not contiguous, and any operation that asks for the other order would copy gigabytes of logits.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor


def _rows(logits: Tensor) -> tuple[Tensor, bool]:
    """Logits [B, L, V] as rows [tokens, V] without copying, and whether the rows are ordered [L, B]."""
    swapped = logits.transpose(0, 1).is_contiguous() and not logits.is_contiguous()
    return (logits.transpose(0, 1) if swapped else logits).reshape(-1, logits.shape[-1]), swapped


def _flat(values: Tensor, swapped: bool) -> Tensor:
    """Values [B, L] in the order of the rows."""
    return (values.t() if swapped else values).reshape(-1)


def _batch_first(values: Tensor, shape: torch.Size, swapped: bool) -> Tensor:
    """The inverse of :func:`_flat`."""
    return values.view(shape[1], shape[0]).t() if swapped else values.view(shape[0], shape[1])


def vocabulary_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy per token in nats.

    Beyond ``logits`` one tensor of its size is made in the forward pass (the softmax, or its logarithm) and one in the
    backward pass (the gradient).

    Args:
        logits: float32 [B, L, V / tensor-parallel size], this rank's part of the vocabulary; a view of [L, B, V].
        targets: int64 [B, L].
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.

    Returns:
        float32 [B, L], the same on every tensor-parallel rank.
    """
    rows, swapped = _rows(logits)
    losses = row_losses(rows, _flat(targets, swapped), label_smoothing)
    return _batch_first(losses, targets.shape, swapped)


def row_losses(rows: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of logits [tokens, V / tensor-parallel size] with targets [tokens]: float32 [tokens]."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return F.cross_entropy(rows, targets, reduction="none", label_smoothing=label_smoothing)
    return _ShardedCrossEntropy.apply(rows, targets, label_smoothing)  # type: ignore[no-any-return]


class _ShardedCrossEntropy(torch.autograd.Function):
    """Of rows whose columns are spread over the tensor-parallel ranks.

    Megatron-core's works in place on the logits, which then have to be copied for whoever else reads them, and spreads
    label smoothing over this rank's part of the vocabulary only.
    """

    @staticmethod
    def forward(context: Any, rows: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """[tokens, V / size], [tokens] -> [tokens]."""
        group = parallel_state.get_tensor_model_parallel_group()
        columns = rows.shape[1]
        vocabulary = columns * parallel_state.get_tensor_model_parallel_world_size()
        local = targets - parallel_state.get_tensor_model_parallel_rank() * columns
        own = (local >= 0) & (local < columns)
        local = local.clamp(0, columns - 1)
        largest = rows.amax(1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        exponentials = (rows - largest[:, None]).exp_()
        parts = [exponentials.sum(1), torch.where(own, rows.gather(1, local[:, None])[:, 0] - largest, 0.0)]
        if smoothing:
            parts.append(rows.sum(1) - columns * largest)
        sums = torch.stack(parts)
        dist.all_reduce(sums, group=group)
        normalizer, wanted = sums[0], sums[1]
        losses = normalizer.log() - wanted
        if smoothing:
            losses = (1 - smoothing) * losses + smoothing * (normalizer.log() - sums[2] / vocabulary)
        context.save_for_backward(exponentials.div_(normalizer[:, None]), own, local)
        context.smoothing, context.vocabulary = smoothing, vocabulary
        return losses

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Softmax minus the (smoothed) target, times the gradient of each row's loss."""
        softmax, own, local = context.saved_tensors
        (gradient,) = gradients
        result = softmax * gradient[:, None]
        if context.smoothing:
            result -= (context.smoothing / context.vocabulary * gradient)[:, None]
        result.scatter_add_(1, local[:, None], (own * gradient * (context.smoothing - 1.0))[:, None])
        return result, None, None


def all_logits(logits: Tensor) -> Tensor:
    """Logits of the whole vocabulary, [B, L, V], on every tensor-parallel rank; differentiable.

    For what needs all of them at once (a draw, a distribution as target) on a few rows. Arguments as in
    :func:`vocabulary_cross_entropy`.
    """
    return tensor_parallel.gather_from_tensor_model_parallel_region(logits)


@torch.no_grad()
def vocabulary_best(logits: Tensor) -> Tensor:
    """The most likely tokens, int64 [B, L], the same on every tensor-parallel rank; the lowest of equally likely ones.

    Args:
        logits: as in :func:`vocabulary_cross_entropy`.
    """
    rows, swapped = _rows(logits)
    return _batch_first(row_best(rows), logits.shape, swapped)


@torch.no_grad()
def row_best(rows: Tensor) -> Tensor:
    """The most likely tokens of logits [tokens, V / tensor-parallel size]: int64 [tokens]."""
    best, index = rows.max(-1)
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        group = parallel_state.get_tensor_model_parallel_group()
        index = index + parallel_state.get_tensor_model_parallel_rank() * rows.shape[-1]
        overall = best.clone()
        dist.all_reduce(overall, dist.ReduceOp.MAX, group=group)
        index = torch.where(best == overall, index, torch.iinfo(torch.int64).max)
        dist.all_reduce(index, dist.ReduceOp.MIN, group=group)
    return index


def vocabulary_hits(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether the most likely token is the target: bool [B, L]; arguments as in :func:`vocabulary_cross_entropy`."""
    return vocabulary_best(logits) == targets


Scores = tuple[Tensor, Tensor]
"""Cross entropy of each token, float32 [B, L], and whether its most likely value is the target, bool [B, L]: what a
generator predicts in the place of logits when it is told the targets."""


def scores(prediction: Tensor | Scores, targets: Tensor, label_smoothing: float = 0.0) -> Scores:
    """Scores of logits [B, L, V / tensor-parallel size]; those that a generator has computed are as they are."""
    if isinstance(prediction, tuple):
        return prediction
    losses = vocabulary_cross_entropy(prediction, targets, label_smoothing)
    return losses, vocabulary_hits(prediction, targets)


class ChunkedScores(torch.autograd.Function):
    """Projection to the vocabulary and cross entropy, some rows at a time; the backward pass computes logits again.

    Logits, their softmax and its gradient exist for one chunk only. The weights are used once in the graph, however
    many chunks there are, so that ZeRO reduces their gradients once.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, smoothing: float, chunks: int
    ) -> Scores:
        """[tokens, C], [V / size, C], [V / size], all float32, and int64 [tokens] -> both [tokens]."""
        losses, hits = [], []
        for part, wanted in zip(rows.chunk(chunks), targets.chunk(chunks)):
            logits = F.linear(part, weight, bias)
            losses.append(row_losses(logits, wanted, smoothing))
            hits.append(row_best(logits) == wanted)
        ctx.save_for_backward(rows, weight, bias, targets)
        ctx.smoothing, ctx.chunks = smoothing, chunks
        hit = torch.cat(hits)
        ctx.mark_non_differentiable(hit)
        return torch.cat(losses), hit

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        """Of rows (this rank's share of the vocabulary in it), weight and bias."""
        rows, weight, bias, targets = ctx.saved_tensors
        of_rows, of_weight, of_bias = torch.empty_like(rows), torch.zeros_like(weight), torch.zeros_like(bias)
        parts = [tensor.chunk(ctx.chunks) for tensor in (rows, targets, gradients[0], of_rows)]
        for part, wanted, gradient, of_part in zip(*parts):
            logits = F.linear(part, weight, bias).requires_grad_()
            with torch.enable_grad():
                losses = row_losses(logits, wanted, ctx.smoothing)
            (of_logits,) = torch.autograd.grad(losses, logits, gradient)
            torch.mm(of_logits, weight, out=of_part)
            of_weight.addmm_(of_logits.t(), part)
            of_bias += of_logits.sum(0)
        return of_rows, of_weight, of_bias, None, None, None
