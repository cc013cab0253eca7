"""Sequences are segments, kinds, a rule and padding."""

import pytest
import torch

from megavar.transformer.sequence import PADDING, SequenceLayout


def test_padding_completes_the_length():
    layout = SequenceLayout.of_scales((1, 2, 3), 4)
    assert (layout.tokens, layout.length, layout.padding) == (14, 16, 2)
    assert SequenceLayout.of_scales((1, 2, 3), 7).padding == 0
    assert layout.bounds == ((0, 1), (1, 5), (5, 14))


def test_rows_know_their_segment_and_its_kind():
    layout = SequenceLayout((2, 1, 3), kinds=(4, 9, 4), padding=2)
    assert layout.segment_index().tolist() == [0, 0, 1, 2, 2, 2, 3, 3]
    assert layout.kind_index().tolist() == [4, 4, 9, 4, 4, 4, PADDING, PADDING]
    assert SequenceLayout((2, 1)).kind_index().tolist() == [0, 0, 1]


def test_equal_layouts_are_one_key_and_every_part_counts():
    layouts = [
        SequenceLayout((1, 4)), SequenceLayout((4, 1)), SequenceLayout((1, 4), kinds=(1, 0)),
        SequenceLayout((1, 4), rule="full"), SequenceLayout((1, 4), padding=1),
    ]  # fmt: skip
    assert len(set(layouts)) == 5
    assert SequenceLayout((1, 4)) == SequenceLayout.of_scales((1, 2)) and len({*layouts, SequenceLayout((1, 4))}) == 5


@pytest.mark.parametrize(("kinds", "sizes"), [((0,), (1, 2)), ((-1, 0), (1, 2)), (None, (0, 2))])
def test_what_makes_no_sense_is_refused(kinds, sizes):
    with pytest.raises(AssertionError):
        SequenceLayout(sizes, kinds)


def test_which_layouts_need_no_mask():
    assert SequenceLayout((5,)).unmasked and SequenceLayout((5, 2), rule="full").unmasked
    assert SequenceLayout((1,), rule="causal").unmasked
    assert not SequenceLayout((5,), rule="causal").unmasked and not SequenceLayout((1, 4)).unmasked


def test_indices_are_kept_and_survive_inference_mode():
    layout = SequenceLayout((3, 4, 5))
    with torch.inference_mode():
        index = layout.segment_index()
    assert index is layout.segment_index() and not index.is_inference()
