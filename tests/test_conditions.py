"""Conditions are functions of the sample's index, and say what they are."""

import numpy as np
import torch

from megavar.conditions import ClassConditions, PromptConditions, SourceCaptions, Unconditional
from megavar.data.shapes import Shapes

PROMPTS = PromptConditions("suite", ("a circle", "two bars"), per_prompt=3)


def test_classes_come_in_turn():
    condition = ClassConditions(10).at(torch.tensor([3, 10, 27]))
    assert condition.labels.tolist() == [3, 0, 7] and condition.dropped().labels.tolist() == [10] * 3
    assert condition.with_dropped().labels.tolist() == [3, 0, 7, 10, 10, 10]
    assert {name: array.tolist() for name, array in condition.arrays().items()} == {"labels": [3, 0, 7]}


def test_every_prompt_comes_as_often_as_asked():
    condition = PROMPTS.at(torch.arange(6))
    assert condition.captions == ("a circle",) * 3 + ("two bars",) * 3 and PROMPTS.count == 6
    assert condition.with_dropped().captions == (*condition.captions, *[""] * 6)
    stored = condition.arrays()
    assert list(stored) == ["captions"] and np.array_equal(stored["captions"], condition.captions)
    assert stored["captions"].dtype.kind == "U"  # readable without pickle


def test_captions_of_a_source_begin_again_after_the_last():
    source = Shapes("test", 32, length=5)
    conditions = SourceCaptions(source)
    captions = conditions.at(torch.arange(7)).captions
    assert captions[:5] == tuple(source.read(index).caption for index in range(5)) and captions[5:] == captions[:2]
    assert conditions.identity["sha256"] == source.fingerprint and conditions.count is None


def test_unconditional_samples_have_nothing_to_store():
    condition = Unconditional().at(torch.arange(2))
    assert condition.arrays() == {} and condition.with_dropped().labels.tolist() == [-1] * 4


def test_identities_tell_conditions_apart():
    others = [
        ClassConditions(10),
        ClassConditions(11),
        Unconditional(),
        PROMPTS,
        PromptConditions("other", PROMPTS.prompts, 3),
        PromptConditions("suite", PROMPTS.prompts, 2),
        PromptConditions("suite", ("a circle", "two rings"), 3),
        PromptConditions("suite", ("a circle\ntwo bars",), 3),
    ]
    identities = [str(conditions.identity) for conditions in others]
    assert len(set(identities)) == len(others)
    assert PromptConditions("suite", tuple(PROMPTS.prompts), 3).identity == PROMPTS.identity
