"""Scale-causal attention has one meaning; the kernels agree with it and with each other."""

import math

import pytest
import torch

from megavar.transformer.attention import KERNELS
from megavar.transformer.sequence import SequenceLayout
from tests.distributed.harness import run_ranks

LAYOUTS = [
    SequenceLayout.of_scales((1,)),
    SequenceLayout.of_scales((2, 3)),
    SequenceLayout.of_scales((1, 2, 3, 4)),
    SequenceLayout((1, 4, 16), padding=3),
    SequenceLayout.of_scales((1, 2, 3, 4, 5, 6, 8, 10)),
]


def heads(layout, device="cpu", requires_grad=False):
    generator = torch.Generator().manual_seed(layout.length)
    shape = (2, 3, layout.length, 8)
    return [torch.randn(shape, generator=generator).to(device).requires_grad_(requires_grad) for _ in range(3)]


def by_hand(q, k, v, layout, softmax_scale):
    """One query at a time over the keys it may see."""
    scale_of = [segment for segment, size in enumerate(layout.sizes) for _ in range(size)] + [99] * layout.padding
    out = torch.empty_like(q)
    for row in range(layout.length):
        seen = [column for column in range(layout.tokens) if scale_of[column] <= scale_of[row]]
        scores = (q[:, :, row, None] * k[:, :, seen]).sum(-1) * softmax_scale
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        out[:, :, row] = (weights[..., None] * v[:, :, seen]).sum(2)
    return out


def moved_padding(q, k, v, layout):
    """Other values in the rows of padding."""
    return [torch.cat([x[:, :, : layout.tokens], x[:, :, layout.tokens :] + 5], dim=2) for x in (q, k, v)]


def forward(kernel):
    """Output for each layout, and for the same inputs with other values in the padding."""
    with torch.no_grad():
        pairs = [(heads(layout), moved_padding(*heads(layout), layout)) for layout in LAYOUTS]
        return [[KERNELS[kernel](*qkv, layout, 0.7) for qkv in pair] for layout, pair in zip(LAYOUTS, pairs)]


@pytest.fixture(scope="module")
def outputs():
    """:func:`forward` of all kernels.

    FlexAttention runs in a process of its own: once it is loaded, autograd starts threads that later forks of the
    test process would not survive.
    """
    return {"dense": forward("dense"), "prefix": forward("prefix"), "flex": run_ranks(1, forward, "flex")[0]}


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=lambda number: str(LAYOUTS[number]))
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_equals_a_loop_over_queries(kernel, number, outputs):
    out, _ = outputs[kernel][number]
    torch.testing.assert_close(out, by_hand(*heads(LAYOUTS[number]), LAYOUTS[number], 0.7), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_is_seen_by_nobody(kernel, outputs):
    (number,) = (number for number, layout in enumerate(LAYOUTS) if layout.padding)
    out, moved = (value[:, :, : LAYOUTS[number].tokens] for value in outputs[kernel][number])
    assert torch.equal(out, moved)


def gradients(kernel, layout, device="cpu"):
    q, k, v = heads(layout, device, requires_grad=True)
    out = KERNELS[kernel](q, k, v, layout, 1 / math.sqrt(8))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
    return torch.autograd.grad((out * weights).sum(), (q, k, v))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_prefix_and_dense_have_the_same_gradients(layout):
    for prefix, dense in zip(gradients("prefix", layout), gradients("dense", layout)):
        torch.testing.assert_close(prefix, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward on CUDA only")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_flex_and_dense_have_the_same_gradients(layout):
    for flex, dense in zip(gradients("flex", layout, "cuda"), gradients("dense", layout, "cuda")):
        torch.testing.assert_close(flex, dense, rtol=1e-4, atol=1e-4)


def test_padding_completes_the_length():
    layout = SequenceLayout.of_scales((1, 2, 3), 4)
    assert (layout.tokens, layout.length, layout.padding) == (14, 16, 2)
    assert SequenceLayout.of_scales((1, 2, 3), 7).padding == 0
