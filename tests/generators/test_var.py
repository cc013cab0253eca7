"""VAR as a whole: sizes, decoding, stages, initialization."""

import math

import pytest
import torch

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import SCALES, VARConfig
from megavar.config.parallel import ParallelConfig
from megavar.generators.var import VAR, Stage, VAROutput
from megavar.parallel.logical import logical_tensors, parameter_count
from megavar.transformer.cache import KeyValueCache
from tests.transformer import tiny

pytestmark = pytest.mark.usefixtures("one_process")
GENERATORS = {"dense": None, "scale_token": {}, "scale": {"router": "scale"}}


def on_meta(config, resolution=256):
    with torch.device("meta"):
        assert torch.empty(1).is_meta, "would allocate the whole model"
        return VAR(config, scales=SCALES[resolution], code_dimension=32, vocabulary_size=4096)


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
    expected = model(given).logits
    cache, start = KeyValueCache(tiny.TOKENS), 0
    for scale, side in enumerate(tiny.SCALES):
        end = start + side * side
        features = None if scale == 0 else given.features[:, start - 1 : end - 1]
        logits = model.decode(given.labels, scale, features, cache)
        torch.testing.assert_close(logits, expected[:, start:end], rtol=1e-5, atol=1e-5)
        start = end


def test_a_scale_depends_on_no_later_scale_and_within_itself_on_every_token():
    model = tiny.model(tiny.config({"balance_coefficient": 0.0})).eval()  # its gradient would reach all tokens
    given, _ = tiny.inputs(1)
    given.features.requires_grad_()
    first, end = 1, 5  # the second scale
    gradient = torch.autograd.grad(model(given).logits[:, first].square().sum(), given.features)[0]
    used = gradient[0].abs().amax(-1) > 1e-6
    assert used.tolist() == [True] * (end - 1) + [False] * (tiny.TOKENS - end)


@pytest.mark.parametrize("experts", GENERATORS.values(), ids=GENERATORS.keys())
@pytest.mark.parametrize("shared", [False, True], ids=["own_norm", "shared_norm"])
@pytest.mark.parametrize("taps", [(), (1,), (0, 2)], ids=str)
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
    assert packed.shape == (first.packed_length(), 3, tiny.WIDTH)  # what the schedules reserve
    second.set_input_tensor([packed])
    output = second(given)
    assert isinstance(output, VAROutput)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert output.taps.keys() == expected.taps.keys() == set(taps)
    for block, tapped in expected.taps.items():
        torch.testing.assert_close(output.taps[block], tapped, rtol=1e-5, atol=1e-5)


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
