"""Conversion to and from the authors' layout: errors say what is wrong, and any tensor-parallel split can load."""

import pytest
import torch

from megavar.errors import CheckpointError
from megavar.generators.var.published import VARLayout
from megavar.parallel.logical import logical_tensors
from tests.transformer import tiny

pytestmark = pytest.mark.usefixtures("one_process")


def model_and_file(**changes):
    model = tiny.model(tiny.config(None, **changes))
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return model, layout(model).export(tensors)


def layout(model):
    return VARLayout(model.choice, model.space)


def shapes(model):
    return {tensor.name: tensor.shape for tensor in logical_tensors(model)}


@pytest.mark.parametrize("shared", [False, True], ids=["own_norm", "shared_norm"])
@pytest.mark.parametrize("qk_l2_norm", [False, True])
def test_there_and_back(shared, qk_l2_norm):
    model, state = model_and_file(shared_adaptive_norm=shared, qk_l2_norm=qk_l2_norm)
    back = layout(model).load({name: value.double() for name, value in state.items()}, shapes(model))
    for name, parameter in model.named_parameters():
        assert back[name].dtype == torch.float32
        assert torch.equal(back.pop(name), parameter), name
    assert not back


def test_experts_cannot_be_published():
    model = tiny.model(tiny.config({}))
    with pytest.raises(CheckpointError, match=r"VAR with experts has no counterpart.*safetensors"):
        layout(model).export({})


def test_missing_and_unexpected_keys_are_named():
    model, state = model_and_file()
    del state["blocks.1.attn.proj.weight"]
    state["ema.decay"] = torch.zeros(())
    with pytest.raises(CheckpointError) as error:
        layout(model).load(state, shapes(model))
    assert "keys missing from the file: blocks.1.attn.proj.weight; keys unknown to the model: ema.decay" in str(
        error.value
    )
    assert "generator.depth" in str(error.value)


@pytest.mark.parametrize(
    ("given", "configured"),
    [({"depth": 2}, {"depth": 3}), ({"depth": 3}, {"depth": 2}), ({}, {"shared_adaptive_norm": True}),
     ({}, {"qk_l2_norm": False})],
)  # fmt: skip
def test_a_file_of_another_architecture_is_refused(given, configured):
    _, state = model_and_file(**given)
    model, _ = model_and_file(**configured)
    with pytest.raises(CheckpointError, match="not a VAR checkpoint of this configuration"):
        layout(model).load(state, shapes(model))


def test_a_dense_file_does_not_fit_a_model_with_experts():
    _, state = model_and_file()
    model = tiny.model(tiny.config({}))
    with pytest.raises(CheckpointError, match=r"generator\.experts \(public VAR checkpoints are dense\)"):
        layout(model).load(state, shapes(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"classes": 9}, r"class_emb\.weight is 10x16 in the file and 5x16 in the model.*generator\.classes"),
     ({"feed_forward_ratio": 2.0}, r"ffn\.fc1\.weight is 32x16 in the file and 64x16 in the model")],
)  # fmt: skip
def test_tensors_of_another_size_are_named_with_both_shapes(changes, message):
    model, _ = model_and_file()
    _, state = model_and_file(**changes)
    with pytest.raises(CheckpointError, match=message):
        layout(model).load(state, shapes(model))
