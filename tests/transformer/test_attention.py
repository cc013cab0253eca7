"""Scale-causal attention has one meaning; the kernels agree with it and with each other."""

import math

import pytest
import torch

from megavar.transformer.attention import KERNELS
from megavar.transformer.layout import ScaleLayout

LAYOUTS = [
    ScaleLayout((1,)),
    ScaleLayout((2, 3)),
    ScaleLayout((1, 2, 3, 4)),
    ScaleLayout((1, 2, 4), padding=3),
    ScaleLayout((1, 2, 3, 4, 5, 6, 8, 10)),
]


def heads(layout, device="cpu", requires_grad=False):
    generator = torch.Generator().manual_seed(layout.length)
    shape = (2, 3, layout.length, 8)
    return [torch.randn(shape, generator=generator).to(device).requires_grad_(requires_grad) for _ in range(3)]


def by_hand(q, k, v, layout, softmax_scale):
    """One query at a time over the keys it may see."""
    sizes = [side * side for side in layout.scales] + [layout.padding]
    scale_of = [segment for segment, size in enumerate(sizes) for _ in range(size)]
    out = torch.empty_like(q)
    for row in range(layout.length):
        seen = [column for column in range(layout.length) if scale_of[column] <= scale_of[row]]
        scores = (q[:, :, row, None] * k[:, :, seen]).sum(-1) * softmax_scale
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        out[:, :, row] = (weights[..., None] * v[:, :, seen]).sum(2)
    return out


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_equals_a_loop_over_queries(kernel, layout):
    q, k, v = heads(layout)
    with torch.no_grad():
        out = KERNELS[kernel](q, k, v, layout, 0.7)
    torch.testing.assert_close(out, by_hand(q, k, v, layout, 0.7), rtol=1e-5, atol=1e-6)


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


def test_padding_completes_the_length_and_is_seen_by_nobody():
    layout = ScaleLayout.padded((1, 2, 3), 4)
    assert (layout.tokens, layout.length, layout.padding) == (14, 16, 2)
    assert ScaleLayout.padded((1, 2, 3), 7).padding == 0
    q, k, v = heads(layout)
    changed = [torch.cat([x[:, :, :14], x[:, :, 14:] + 5], dim=2) for x in (q, k, v)]
    for kernel in KERNELS.values():
        with torch.no_grad():
            assert torch.equal(kernel(q, k, v, layout, 1.0)[:, :, :14], kernel(*changed, layout, 1.0)[:, :, :14])
