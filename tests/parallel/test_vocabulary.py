"""Losses over a vocabulary: the same numbers sharded or not, however the logits lie, without copies of them."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch.utils._python_dispatch import TorchDispatchMode

from megavar.config.parallel import ParallelConfig
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.parallel.vocabulary import ChunkedScores, vocabulary_best, vocabulary_cross_entropy, vocabulary_hits
from tests.distributed.harness import run_ranks

B, L, V = 3, 5, 64


def case():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, L, V, generator=generator) * 3, torch.randint(V, (B, L), generator=generator)


def view_of(logits, order):
    """The same [B, L, V] logits, lying in memory as [B, L, V] or as [L, B, V]."""
    return logits if order == "batch first" else logits.transpose(0, 1).contiguous().transpose(0, 1)


class NewTensors(TorchDispatchMode):
    """Counts the tensors of at least a given size that operations make."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.names = elements, []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        known = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, torch.Tensor)}
        result = function(*arguments, **(options or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            large = isinstance(made, torch.Tensor) and made.numel() >= self.elements
            if large and made.untyped_storage().data_ptr() not in known:
                self.names.append(str(function))
        return result


def losses_on_this_rank(tensor, order, smoothing):
    mesh = topology.initialize(ParallelConfig(tensor=tensor), environment())
    logits, targets = case()
    part = view_of(logits.chunk(tensor, -1)[mesh.tensor_rank].contiguous(), order).requires_grad_()
    before = part.detach().clone()
    with NewTensors(part.numel()) as forward:
        losses = vocabulary_cross_entropy(part, targets, smoothing)
    weights = torch.arange(B * L).view(B, L) / 10
    with NewTensors(part.numel()) as backward:
        (losses * weights).sum().backward()
    assert torch.equal(part.detach(), before), "the logits are changed"
    return losses.detach(), part.grad, len(forward.names), len(backward.names), vocabulary_best(part.detach())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("order", ["batch first", "sequence first"])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_cross_entropy_is_torchs_and_copies_nothing(tensor, order, smoothing):
    logits, targets = case()
    logits.requires_grad_()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing)
    expected = expected.view(B, L)
    (expected * torch.arange(B * L).view(B, L) / 10).sum().backward()
    for rank, (losses, gradient, in_forward, in_backward, best) in enumerate(
        run_ranks(tensor, losses_on_this_rank, tensor, order, smoothing)
    ):
        torch.testing.assert_close(losses, expected.detach())
        torch.testing.assert_close(gradient, logits.grad.chunk(tensor, -1)[rank])
        assert in_forward == 1, "the softmax, and nothing else as large as the logits"
        if not smoothing:
            assert in_backward == (2 if tensor == 1 else 1), "torch has a gradient of the log-softmax, too"
        assert torch.equal(best, logits.argmax(-1))


def scores_on_this_rank(tensor, smoothing, chunks):
    mesh = topology.initialize(ParallelConfig(tensor=tensor), environment())
    hidden, weight, bias, targets = head_case()
    weight, bias = (part.chunk(tensor)[mesh.tensor_rank].clone().requires_grad_() for part in (weight, bias))
    hidden.requires_grad_()
    with NewTensors(B * L * V // tensor) as made:
        shared = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        losses, hits = ChunkedScores.apply(shared, weight, bias, targets, smoothing, chunks)
        (losses * torch.arange(B * L) / 10).sum().backward()
    return losses.detach(), hits, hidden.grad, weight.grad, bias.grad, len(made.names)


def head_case():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((B * L, 6), (V, 6), (V,)))
    return hidden, weight, bias, torch.randint(V, (B * L,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("tensor", [1, 2])
def test_scores_in_chunks_are_those_of_all_logits_which_never_exist_together(tensor, chunks, smoothing):
    hidden, weight, bias, targets = head_case()
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    logits = F.linear(*leaves)
    expected = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    (expected * torch.arange(B * L) / 10).sum().backward()
    for rank, found in enumerate(run_ranks(tensor, scores_on_this_rank, tensor, smoothing, chunks)):
        losses, hits, of_hidden, of_weight, of_bias, large = found
        torch.testing.assert_close(losses, expected.detach())
        assert torch.equal(hits, logits.argmax(-1) == targets)
        torch.testing.assert_close(of_hidden, hidden.grad)
        torch.testing.assert_close(of_weight, weight.grad.chunk(tensor)[rank])
        torch.testing.assert_close(of_bias, bias.grad.chunk(tensor)[rank])
        assert large == 0


def _ties(tensor):
    mesh = topology.initialize(ParallelConfig(tensor=tensor), environment())
    logits = torch.zeros(B, L, V)
    logits[..., [2, 6]] = 1.0  # equally likely, on different ranks
    part = logits.chunk(tensor, -1)[mesh.tensor_rank]
    hits = vocabulary_hits(part, torch.full((B, L), 2))
    return vocabulary_best(part).unique().tolist(), bool(hits.all())


@pytest.mark.parametrize("tensor", [1, 2])
def test_of_equally_likely_tokens_the_lowest_is_best_on_every_rank(tensor):
    assert run_ranks(tensor, _ties, tensor) == [([2], True)] * tensor
