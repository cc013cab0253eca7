"""MoE++ beyond its equations, which ``tests/parity/test_moe.py`` holds: capacity, decoding, stages, initial values."""

import pytest
import torch

from megavar.config.experts.base import ExpertsChoice
from megavar.config.parallel import ParallelConfig
from megavar.generators.base import Stage
from megavar.generators.var import VAR
from megavar.parallel.logical import initialize_parameters, logical_tensors
from megavar.recipes.base import routing_metrics
from megavar.transformer.context import ForwardContext
from megavar.transformer.sequence import SequenceLayout
from tests.transformer import tiny
from tests.transformer.test_layouts import decoded

pytestmark = pytest.mark.usefixtures("one_process")
CONFIG = tiny.config({"router": "zero_computation"}, depth=3)  # two blocks cannot tell a sum of residuals from the last


def var(config=CONFIG, stage=None, dtype=torch.float32):
    model = VAR(config, tiny.SPACE, stage=stage, dtype=dtype)
    initialize_parameters(model, lambda name, value, generator: value.normal_(std=0.4, generator=generator), seed=1)
    return model


@pytest.mark.parametrize("release", [False, True], ids=["equations", "release"])
def test_decoding_with_a_cache_computes_what_training_did(release):
    keys = {"preset": "release", "number": 4, "top_k": 2} if release else {}
    model, (given, _) = var(tiny.config({"router": "zero_computation"} | keys, depth=3)).eval(), tiny.inputs(4)
    with torch.no_grad():
        torch.testing.assert_close(decoded(model, given), model(given).prediction, rtol=1e-5, atol=1e-5)


def test_bfloat16_stages_compute_every_bit_of_the_undivided_model():
    """The payload is narrower than the scores (width 16, 3 x 8 numbers) and of a shorter type."""
    def gradients(models):
        parameters = {name: value for model in models for name, value in model.named_parameters()}
        return {name: value.grad for name, value in parameters.items()}

    given, targets = tiny.inputs()
    whole = var(dtype=torch.bfloat16)
    output = whole(given)
    tiny.loss(output, targets).backward()
    first, last = (
        var(stage=stage, dtype=torch.bfloat16) for stage in (Stage(0, 2, True, False), Stage(2, 1, False, True))
    )
    sent = first(given)
    received = sent.detach().requires_grad_()
    last.set_input_tensor(received)
    prediction = last(given)
    tiny.loss(prediction, targets).backward()
    sent.backward(received.grad)
    assert torch.equal(prediction.prediction, output.prediction)
    expected = gradients([whole])
    assert expected["blocks.2.feed_forward.moe.router.residual"].abs().max() > 0
    for name, value in gradients([first, last]).items():
        if name.startswith(("blocks.1.feed_forward.moe.router", "blocks.2.")):
            assert torch.equal(value, expected[name]), name
        else:  # sums of gradients of the condition in another order
            torch.testing.assert_close(value, expected[name], rtol=0.1, atol=0.1 * float(expected[name].abs().max()))


def router(**keys):
    experts = ExpertsChoice.make(router="zero_computation", **({"number": 4, "top_k": 3} | keys))
    config = VAR.layers(tiny.config(experts), ParallelConfig(), torch.float32)
    from megavar.config.choice import resolve

    made = resolve(experts)(config, experts, block=1, kinds=len(tiny.SCALES))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    return made


def test_targets_take_the_first_tokens_of_each_image_up_to_their_capacity_in_training():
    made, samples = router(capacity_factor=0.8, tau=0.5), 3
    layout = SequenceLayout(SequenceLayout.of_scales(tiny.SCALES).sizes, padding=2)
    valid = torch.ones(samples, layout.length, dtype=torch.bool)
    valid[1, 5:8] = False
    made.context = ForwardContext(layout, valid=valid, routing=[])
    x = torch.randn(layout.length, samples, tiny.WIDTH, generator=torch.Generator().manual_seed(1))
    chosen = []
    choose = made.choose
    made.choose = lambda scores: chosen.append(choose(scores)[1]) or choose(scores)
    made(x)
    kept = torch.zeros_like(chosen[0])
    for sample in range(samples):
        tokens = [row for row in range(layout.tokens) if valid[sample, row]]
        for target in range(8):
            share = 0.8 * 3 * len(tokens) / (0.5 * 4 + 4) * (0.5 if target < 4 else 1.0)
            taking = [row for row in tokens if chosen[0][row, sample, target]]
            kept[taking[: -int(-share // 1)], sample, target] = True
    counted = (chosen[0] & made.context.counted_rows(x.device)[..., None]).sum((0, 1)).float()
    (record,) = made.context.routing
    assert torch.equal(record.load.sum(0), kept.sum((0, 1)).float())
    assert (record.load.sum(0) < counted).any()
    made.context.carried = None
    made.eval()(x)
    assert torch.equal(made.context.routing[1].load.sum(0), counted)


def test_presets_set_what_is_not_given():
    release = ExpertsChoice.make(router="zero_computation", preset="release", top_k=3)
    assert (release.number, release.gates, release.scale_input, release.top_k) == (4, "renormalized", True, 3)
    assert ExpertsChoice.make(**release.model_dump()) == release
    assert ExpertsChoice.make(router="zero_computation", preset="paper").capacities(12 * 2 * 10)[0] == pytest.approx(
        1.1 * 0.75 * 240 / 10
    )
    with pytest.raises(ValueError, match="all top_k=1 may be zero experts"):
        ExpertsChoice.make(router="zero_computation", preset="release", top_k=1)
    with pytest.raises(ValueError, match="top_k=9 exceeds number=8"):
        ExpertsChoice.make(router="zero_computation", number=4, top_k=9)


def test_first_values_and_rules_are_the_published_codes():
    config = tiny.config({"router": "zero_computation", "number": 56, "constant_experts": 6}, width=256, depth=2)
    model = VAR(config, tiny.SPACE, seed=3)
    values = dict(model.blocks["1"].feed_forward.moe.router.named_parameters())
    linear = (1 / 256 / 3) ** 0.5
    deviations = {"constant": 1.0, "residual": 0.02, "weight": linear, "constant_weight": linear}
    for name, deviation in deviations.items():
        assert float(values[name].std()) == pytest.approx(deviation, rel=0.1), name
    names = [tensor.name for tensor in logical_tensors(model) if ".moe.router." in tensor.name]
    assert "blocks.0.feed_forward.moe.router.residual" not in names  # it would never get a gradient
    decays = {name.rpartition(".")[2]: model.rule(name).decays for name in names}
    assert decays == {"weight": True, "residual": True, "constant_weight": True, "constant": False}


def test_statistics_name_every_target():
    model = var(tiny.config({"router": "zero_computation"}))
    model(tiny.inputs()[0])
    statistics = model.collect_routing()
    assert model.routing_targets == ("0", "1", "2", "3", "constant_0", "constant_1", "copy", "zero")
    metrics = routing_metrics(statistics, model.routing_targets)
    shares = {name: value for name, value in metrics.items() if name.partition("/")[2] in model.routing_targets}
    assert len(shares) == 8 and sum(shares.values()) == pytest.approx(1)
    computing = sum(metrics[f"expert_share/{number}"] for number in range(4))
    assert metrics["experts_per_token/mean"] == pytest.approx(2 * computing)
    assert statistics["met"].sum() == 2 * 3 * tiny.TOKENS and statistics["met"][..., 3:].sum() == 0
    assert metrics["experts_per_token/none"] == pytest.approx(float(statistics["met"][..., 0].sum()) / 6 / tiny.TOKENS)


def test_a_token_meets_fewer_experts_where_the_balance_loss_is_smallest():
    assert ExpertsChoice.make(router="zero_computation").copies((256,)) == pytest.approx(1.8)
    assert ExpertsChoice.make(router="zero_computation", tau=1.0).copies((256,)) == pytest.approx(2.0)
    assert ExpertsChoice.make(router="zero_computation", top_k=5).copies((256,)) == pytest.approx(3.0)
