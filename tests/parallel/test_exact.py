"""float32 numbers survive a journey in bfloat16, and so do their gradients."""

import pytest
import torch

from megavar.parallel.exact import from_rows, rows_per_token, to_rows


@pytest.mark.parametrize(("numbers", "channels", "dtype", "rows"), [
    (8, 16, torch.bfloat16, 2), (12, 64, torch.bfloat16, 1), (11, 32, torch.bfloat16, 2), (8, 16, torch.float32, 1),
])  # fmt: skip
def test_every_bit_arrives_in_both_directions(numbers, channels, dtype, rows):
    generator = torch.Generator().manual_seed(3)
    scale = 10 ** torch.empty(5, 3, numbers).uniform_(-8, 8, generator=generator)
    values = (torch.randn(5, 3, numbers, generator=generator) * scale).requires_grad_()
    assert rows_per_token(numbers, channels, dtype) == rows
    sent = to_rows(values, channels, dtype)
    assert sent.shape == (5 * rows, 3, channels) and sent.dtype == dtype
    received = sent.detach().requires_grad_()
    found = from_rows(received, numbers)
    assert torch.equal(found, values)
    weights = torch.randn(5, 3, numbers, generator=generator) * scale
    (found * weights).sum().backward()
    assert received.grad is not None and received.grad.dtype == dtype
    sent.backward(received.grad)
    assert torch.equal(values.grad, weights)


def test_a_share_of_the_tokens_is_a_share_of_the_rows():
    values = torch.randn(4, 2, 8)
    whole = to_rows(values, 16, torch.bfloat16)
    assert torch.equal(torch.cat([to_rows(part, 16, torch.bfloat16) for part in values.chunk(2)]), whole)
