"""SAR's draws that its released code leaves out: which scale is student-forced, whose class the second pass drops."""

from collections import Counter

import pytest
import torch

from megavar.config.recipes.masked_scales import MaskedScalesConfig
from megavar.config.recipes.sar import SARConfig
from megavar.config.recipes.student_forcing import StudentForcingConfig
from megavar.recipes.masked_scales import MaskedScales
from megavar.recipes.sar import SAR
from tests.distributed.curves import CLASSES
from tests.recipes.test_next_scale import batch


def recipe(pyramid, **options):
    config = SARConfig(tokenizer_weights="unused", **options)
    return SAR(config, torch.nn.Identity(), pyramid, classes=CLASSES, label_drop=0.25, seed=3)


def test_a_random_scale_is_any_but_the_first(pyramid):
    made = recipe(pyramid, student_scales="random")
    drawn = [made.student_scales(5, step) for step in range(2000)]
    assert drawn == [recipe(pyramid, student_scales="random").student_scales(5, step) for step in range(2000)]
    assert Counter(drawn) == {(scale,): pytest.approx(500, abs=80) for scale in (1, 2, 3, 4)}


def test_the_second_pass_drops_classes_of_its_own_if_it_is_asked_to(pyramid):
    given = batch(torch.arange(4000))
    shared = recipe(pyramid, independent_label_drop=False).prepare(given, 0)
    assert torch.equal(shared.model.labels, shared.student_labels)
    inputs = recipe(pyramid, independent_label_drop=True).prepare(given, 0)
    assert torch.equal(inputs.model.labels, shared.model.labels)
    again, before = inputs.student_labels == CLASSES, inputs.model.labels == CLASSES
    assert torch.equal(inputs.student_labels[~again], given.labels[~again])
    assert again.float().mean() == pytest.approx(0.25, abs=0.03)
    assert (again & before).float().mean() == pytest.approx(0.0625, abs=0.02), "independent of the first pass"


@pytest.mark.parametrize(("kind", "keys"), [
    (SARConfig, {"student_scales": "all"}), (StudentForcingConfig, {}), (MaskedScalesConfig, {"schedule": "full"}),
])  # fmt: skip
def test_ranks_have_equally_many_passes(kind, keys):
    lists = {"name": "flexvar", "per": "rank"}
    with pytest.raises(ValueError, match=r"different numbers of them: set scale_lists\.per to step"):
        kind(tokenizer_weights="unused", scale_lists=lists, **keys)
    kind(tokenizer_weights="unused", scale_lists=lists | {"per": "step"}, **keys)


def test_ranks_with_lists_of_their_own_count_their_own_tokens(pyramid):
    lists = {"name": "flexvar", "per": "rank", "coarse": 0, "fine": 0, "fine_from": 3}
    config = MaskedScalesConfig(tokenizer_weights="unused", scale_lists=lists)
    made = MaskedScales(config, torch.nn.Identity(), pyramid, classes=CLASSES, label_drop=0.1, seed=3)
    valid = made.valid(batch(torch.arange(4)), 0)
    assert isinstance(valid, torch.Tensor), "an int would promise that all ranks have as many"
    sides = made.scale_lists.of_step(0)
    assert int(valid) == 4 * (made.hidden_tokens(0, sides[0] ** 2) + sum(side * side for side in sides[1:]))
