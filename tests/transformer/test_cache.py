"""Decoding with a cache gives what one pass over the whole sequence gives, whatever comes in one step."""

import pytest
import torch

from megavar.config.parallel import ParallelConfig
from megavar.transformer.attention import AttentionCore
from megavar.transformer.cache import KeyValueCache
from megavar.transformer.context import ForwardContext
from megavar.transformer.megatron_config import transformer_config
from megavar.transformer.rotary import line_table
from megavar.transformer.sequence import SequenceLayout

BATCH, HEADS, GROUPS, HEAD, TOKENS = 2, 4, 2, 8, 11


def core(kernel="auto"):
    config = transformer_config(
        ParallelConfig(), torch.float32, depth=1, width=32, heads=HEADS, feed_forward=8, num_query_groups=GROUPS
    )
    return AttentionCore(config, 1, kernel=kernel)


def rows():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(TOKENS, BATCH, count, HEAD, generator=generator) for count in (HEADS, GROUPS, GROUPS)]


def valid_tokens():
    """Prompts padded on the left."""
    valid = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    valid[1, :2] = False
    return valid


def whole(rule, sizes, valid):
    table = line_table(torch.arange(TOKENS), HEAD)
    return core()(*rows(), ForwardContext(SequenceLayout(sizes, rule=rule), rotary=table, valid=valid))


def in_steps(rule, steps, valid, cache, padding=0):
    """Each step is a tuple of segment sizes."""
    made, outputs, start = core(), [], cache.length(0)
    cos, sin = line_table(torch.arange(TOKENS), HEAD)
    for sizes in steps:
        end = start + sum(sizes)
        new = [torch.cat([part[start:end], torch.full_like(part[:padding], 7.0)]) for part in rows()]
        table = [torch.cat([part[start:end], torch.ones(padding, HEAD // 2)]) for part in (cos, sin)]
        known = None if valid is None else torch.nn.functional.pad(valid[:, :end], (0, padding))
        layout = SequenceLayout(sizes, rule=rule, padding=padding)
        context = ForwardContext(layout, rotary=tuple(table), valid=known, cache=cache)
        outputs.append(made(*new, context)[: sum(sizes)])
        start = end
    return torch.cat(outputs)


CASES = [
    ("causal", (TOKENS,), [(4,), (1,), (1,), (5,)]),
    ("causal", (TOKENS,), [(1,)] * TOKENS),
    ("block_causal", (1, 4, 6), [(1,), (4,), (6,)]),
    ("block_causal", (1, 4, 2, 4), [(1, 4), (2, 4)]),
]


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("valid", [None, valid_tokens()], ids=["whole", "padded_on_the_left"])
@pytest.mark.parametrize(("rule", "sizes", "steps"), CASES)
def test_steps_equal_one_pass(rule, sizes, steps, valid, padding):
    expected = whole(rule, sizes, valid)
    found = in_steps(rule, steps, valid, KeyValueCache(TOKENS), padding)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_cropped_cache_goes_on_from_there():
    cache = KeyValueCache(TOKENS)
    first = in_steps("causal", [(5,), (3,)], None, cache)
    cache.crop(5)
    assert cache.length(0) == 5
    again = in_steps("causal", [(3,)], None, cache)
    assert torch.equal(again, first[5:])


def test_appending_copies_new_rows_only():
    cache = KeyValueCache(10)
    key = torch.ones(3, BATCH, GROUPS, HEAD)
    keys, _ = cache.extend(0, key, key)
    place = keys.data_ptr()
    more, _ = cache.extend(0, key[:2] * 2, key[:2])
    assert more.data_ptr() == place and more.shape[2] == 5 and more[:, :, 3:].unique().tolist() == [2.0]
    assert cache.length(0) == 5 and cache.length(1) == 0
    with pytest.raises(AssertionError, match="11 rows in a cache of 10"):
        cache.extend(0, key.repeat(2, 1, 1, 1), key.repeat(2, 1, 1, 1))
