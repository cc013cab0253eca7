"""VAR as a whole: sizes, names and initial values, decoding, stages."""

import json
import math
from pathlib import Path

import pytest
import torch

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import SCALES, VARConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.token_space import TokenSpace
from megavar.generators.base import GeneratorOutput, Stage
from megavar.generators.inputs import ScaleInputs
from megavar.generators.var import VAR
from megavar.parallel.logical import logical_tensors
from megavar.transformer.cache import KeyValueCache
from tests.transformer import tiny

pytestmark = pytest.mark.usefixtures("one_process")
GENERATORS = {"dense": None, "scale_token": {}, "scale": {"router": "scale"}}


def on_meta(config, resolution=256):
    with torch.device("meta"):
        assert torch.empty(1).is_meta, "would allocate the whole model"
        return VAR(config, TokenSpace.of_scales(SCALES[resolution], 4096, 32, resolution))


def parameter_count(model):
    return sum(math.prod(tensor.shape) for tensor in logical_tensors(model))


# Written by commit 9f0263a from these configurations: shape, first values and norm of every logical tensor.
GOLDEN = json.loads((Path(__file__).parent / "golden" / "var.json").read_text())
OTHER_RANDOM_NUMBERS = torch.__version__ < "2.15"
"""PyTorch 2.11 fills small tensors with other numbers of the same seed: names and shapes are compared there."""
MODELS = {
    "dense": {},
    "shared_norm": {"shared_adaptive_norm": True},
    "no_qk_norm": {"qk_l2_norm": False},
    "scale_token": {"experts": {"number": 3, "top_k": 2, "scale_embedding_in_router": True, "backend": "megatron"}},
    "scale": {"experts": {"number": 3, "top_k": 2, "router": "scale", "backend": "grouped"}},
}


@pytest.mark.parametrize("name", GOLDEN)
def test_names_and_initial_values_of_logical_tensors_do_not_change(name):
    options = dict(MODELS[name])
    if "experts" in options:
        options["experts"] = ExpertsChoice.make(**options["experts"])
    config = VARConfig(depth=2, width=16, heads=2, classes=4, **options)
    model = VAR(config, TokenSpace.of_scales((1, 2, 3), 12, 5, image_side=48), seed=7)
    parameters = dict(model.named_parameters())
    found = {tensor.name: tensor for tensor in logical_tensors(model)}
    assert found.keys() == GOLDEN[name].keys()
    for key, golden in GOLDEN[name].items():
        value = found[key].local(parameters[found[key].parameter]).detach().double()
        assert list(found[key].shape) == golden["shape"], key
        if OTHER_RANDOM_NUMBERS:
            continue
        assert value.flatten()[:3].tolist() == pytest.approx(golden["start"], rel=1e-6, abs=1e-9), key
        assert value.norm().item() == pytest.approx(golden["norm"], rel=1e-6), key


DECAYED = {
    "classes.weight", "features.weight", "linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight",
    "linear_fc2.weight", "router.weight", "modulation.linear.weight", "shared_modulation.linear.weight",
    "projection.weight",
}  # fmt: skip
"""Matrices, by the ends of their names (VAR ``utils/lr_control.py`` leaves out vectors, biases and its ``nowd_keys``:
positions, scale embeddings, the blocks' offsets of a shared modulation, temperatures)."""


@pytest.mark.parametrize("name", MODELS)
def test_matrices_decay_and_nothing_else(name):
    options = dict(MODELS[name])
    if "experts" in options:
        options["experts"] = ExpertsChoice.make(**options["experts"])
    model = VAR(VARConfig(depth=1, width=16, heads=2, classes=4, **options), tiny.SPACE)
    rules = {tensor.name: model.rule(tensor.name) for tensor in logical_tensors(model)}
    expected = {tensor for tensor in rules if tensor.endswith(tuple(DECAYED))}
    assert {tensor for tensor, rule in rules.items() if rule.decays} == expected
    assert not any(rule.frozen or rule.lr_factor != 1 for rule in rules.values())
    left = {tensor.rsplit(".", 1)[-1] for tensor in rules.keys() - expected}
    known = {"bias", "q_bias", "v_bias", "start_position", "position", "scale", "scale_embedding", "offset"}
    assert left <= known | {"log_temperature"} and {"bias", "q_bias", "position", "scale"} <= left


# notes/peers.md 1a: counted on the reference's class.
@pytest.mark.parametrize(
    ("depth", "parameters"),
    [(12, "133186960"), (16, "310283520"), (20, "600.917"), (24, "1033.399"), (30, "2010.020")],
)
def test_dense_sizes_are_the_references(depth, parameters):
    count = parameter_count(on_meta(VARConfig(depth=depth)))
    assert parameters in (str(count), f"{count / 1e6:.3f}")


def test_d36_with_shared_adaptive_norm_has_the_references_size():
    count = parameter_count(on_meta(VARConfig(depth=36, shared_adaptive_norm=True), 512))
    assert f"{count / 1e6:.3f}" == "2353.894"


# notes/peers.md G1: activated (three experts of eight, without the semantic guidance head) and total, in millions.
@pytest.mark.parametrize("backend", ["megatron", "grouped"])
@pytest.mark.parametrize(("depth", "activated", "total"), [(12, "246.60", "529.9"), (16, "579.01", "1250.5")])
def test_mepa_sizes(depth, activated, total, backend):
    model = on_meta(VARConfig(depth=depth, experts=ExpertsChoice.make(backend=backend)))
    experts = sum(math.prod(tensor.shape) for tensor in logical_tensors(model) if tensor.is_expert)
    count = parameter_count(model)
    assert f"{count / 1e6:.1f}" == total
    assert f"{(count - experts * 5 / 8) / 1e6:.2f}" == activated


@pytest.mark.parametrize("shared", [False, True], ids=["own_norm", "shared_norm"])
@pytest.mark.parametrize("experts", GENERATORS.values(), ids=GENERATORS.keys())
def test_decoding_with_cache_gives_the_logits_of_teacher_forcing(experts, shared):
    model = tiny.model(tiny.config(experts, shared_adaptive_norm=shared)).eval()
    given, _ = tiny.inputs()
    expected = model(given).prediction
    cache, start = KeyValueCache(tiny.TOKENS), 0
    for scale, side in enumerate(tiny.SCALES):
        end = start + side * side
        features = None if scale == 0 else given.features[:, start - 1 : end - 1]
        logits = model.step(ScaleInputs(given.labels, features, scale=scale), cache)
        torch.testing.assert_close(logits, expected[:, start:end], rtol=1e-5, atol=1e-5)
        start = end


def test_a_scale_depends_on_no_later_scale_and_within_itself_on_every_token():
    model = tiny.model(tiny.config({"balance_coefficient": 0.0})).eval()  # its gradient would reach all tokens
    given, _ = tiny.inputs(1)
    given.features.requires_grad_()
    first, end = 1, 5  # the second scale
    gradient = torch.autograd.grad(model(given).prediction[:, first].square().sum(), given.features)[0]
    used = gradient[0].abs().amax(-1) > 1e-6
    assert used.tolist() == [True] * (end - 1) + [False] * (tiny.TOKENS - end)


@pytest.mark.parametrize("experts", GENERATORS.values(), ids=GENERATORS.keys())
@pytest.mark.parametrize("shared", [False, True], ids=["own_norm", "shared_norm"])
@pytest.mark.parametrize("taps", [(), ("block.1",), ("embedding", "block.0", "block.2")], ids=str)
def test_stages_one_after_the_other_are_the_whole_model(experts, shared, taps):
    config = tiny.config(experts, depth=4, shared_adaptive_norm=shared)
    whole = tiny.model(config, taps=taps)
    given, _ = tiny.inputs()
    expected = whole(given)
    first, second = (
        tiny.model(config, stage=Stage.split(4, ParallelConfig(pipeline=2), rank), taps=taps) for rank in range(2)
    )
    names = [tensor.name for stage in (first, second) for tensor in logical_tensors(stage)]
    assert sorted(names) == sorted(tensor.name for tensor in logical_tensors(whole))
    packed = first(given)
    assert packed.shape == (first.payload_length(given), 3, tiny.WIDTH)  # what the schedules reserve
    second.set_input_tensor([packed])
    output = second(given)
    assert isinstance(output, GeneratorOutput)
    torch.testing.assert_close(output.prediction, expected.prediction, rtol=1e-5, atol=1e-5)
    assert output.taps.keys() == expected.taps.keys() == set(taps)
    for name, tapped in expected.taps.items():
        torch.testing.assert_close(output.taps[name], tapped, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("chunk", "rank", "expected"),
    [
        (0, 0, (0, 2, True, False)),
        (0, 1, (2, 2, False, False)),
        (1, 0, (4, 2, False, False)),
        (1, 1, (6, 2, False, True)),
    ],
)
def test_interleaved_stages(chunk, rank, expected):
    stage = Stage.split(8, ParallelConfig(pipeline=2, virtual_pipeline=2), rank, chunk)
    assert (stage.first_block, stage.blocks, stage.is_first, stage.is_last) == expected
