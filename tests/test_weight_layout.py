"""Weight layouts by tables of names: several public tensors for one of ours, strict both ways."""

import importlib

import pytest
import torch

from megavar.config.generators.base import GeneratorChoice
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.errors import CheckpointError
from megavar.weight_layout import NamedLayout

EXPECTED = {"fused.weight": (4, 3), "norm.weight": (3,)}


class Halves(NamedLayout):
    """A foreign dialect: the fused weight is stored in two parts, and a buffer that we compute is kept."""

    belongs_to = "a file of halves"
    remedy = "Check the width."

    def names(self, name):
        return {"fused.weight": ("q", "k"), "norm.weight": ("n",)}.get(name, ())

    def split(self, name, value):
        return value.chunk(2) if name == "fused.weight" else [value]

    def join(self, name, parts):
        return torch.cat(list(parts)) if name == "fused.weight" else parts[0]

    def ignores(self, published):
        return published == "count"

    def computed(self, state):
        return {"count": torch.tensor(len(state))}


def tensors():
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in EXPECTED.items()}


def test_there_and_back():
    given = tensors()
    state = Halves(None, None).export(given)
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "q": (2, 3), "k": (2, 3), "n": (3,), "count": ()
    }  # fmt: skip
    assert state["count"] == 3
    back = Halves(None, None).load({name: value.bfloat16() for name, value in state.items()}, EXPECTED)
    assert back.keys() == given.keys()
    for name, value in given.items():
        assert back[name].dtype == torch.float32 and back[name].is_contiguous()
        assert torch.equal(back[name], value.bfloat16().float())


def test_what_does_not_fit_is_listed_under_the_public_names():
    state = Halves(None, None).export(tensors())
    del state["k"]
    state |= {"n": torch.zeros(5), "other": torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        Halves(None, None).load(state, EXPECTED)
    assert str(error.value) == (
        "The file is not a file of halves of this configuration: keys missing from the file: k; keys unknown to the "
        "model: other; other shapes: n is 5 in the file and 3 in the model. Check the width."
    )


def test_a_tensor_that_the_dialect_does_not_know_is_refused_both_ways():
    with pytest.raises(CheckpointError, match=r"router\.weight has no counterpart in a file of halves.*safetensors"):
        Halves(None, None).export(tensors() | {"router.weight": torch.zeros(1)})
    state = Halves(None, None).export(tensors())
    with pytest.raises(CheckpointError, match=r"keys missing from the file: router\.weight"):
        Halves(None, None).load(state, EXPECTED | {"router.weight": (1,)})


@pytest.mark.parametrize("kind", [GeneratorChoice, TokenizerChoice], ids=lambda kind: kind.__name__)
def test_the_layouts_that_choices_name_exist(kind):
    named = [place for choice in kind.alternatives().values() for place in choice.weight_layouts.values()]
    assert named
    for place in named:
        module, name = place.split(":")
        layout = getattr(importlib.import_module(module), name)(None, None)
        assert callable(layout.export) and callable(layout.load)
