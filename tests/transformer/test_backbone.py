"""What a backbone adds to blocks in one process: taps, heads with rules and initial values of their own, examples."""

import math

import pytest
import torch
from torch import nn

from megavar.config.parallel import ParallelConfig
from megavar.errors import ConfigError
from megavar.generators.base import Head, Stage
from megavar.parallel.parameter_rule import ParameterRule
from megavar.transformer.cache import KeyValueCache
from tests.transformer import tiny

pytestmark = pytest.mark.usefixtures("one_process")


class Pair(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, 3)

    def forward(self, early, late):
        return self.linear(self.norm(early) - late)


def test_taps_are_what_the_blocks_were_given_and_gave():
    model = tiny.model(tiny.config({}), taps=("block.1", "embedding")).eval()
    given, _ = tiny.inputs()
    output = model(given)
    assert list(output.taps) == ["block.1", "embedding"]
    embedded = model.embed(given)
    torch.testing.assert_close(output.taps["embedding"], embedded.hidden)
    conditions = {name: rows.transpose(0, 1) for name, rows in embedded.conditions.items()}
    predicted = model.predict(output.taps["block.1"].transpose(0, 1), conditions, given)
    torch.testing.assert_close(output.prediction, predicted)


def test_logits_lie_as_rows():
    given, _ = tiny.inputs()
    prediction = tiny.model(tiny.config(None))(given).prediction
    assert prediction.shape == (3, tiny.TOKENS, tiny.VOCABULARY) and not prediction.is_contiguous()
    assert prediction.transpose(0, 1).is_contiguous()


def test_heads_read_their_taps_in_order_and_only_what_was_asked_for_is_returned():
    heads = {"pair": Head(("embedding", "block.0"), Pair), "one": Head(("block.1",), lambda width: nn.Identity())}
    model = tiny.model(tiny.config(None), heads=heads, taps=("block.0",)).eval()
    given, _ = tiny.inputs()
    output = model(given)
    assert list(output.taps) == ["block.0"] and output.heads.keys() == {"pair", "one"}
    expected = model.heads["pair"](model.embed(given).hidden, output.taps["block.0"])
    torch.testing.assert_close(output.heads["pair"], expected)
    assert output.heads["one"].shape == (3, tiny.TOKENS, tiny.WIDTH)


@pytest.mark.parametrize(
    ("options", "reader"),
    [({"taps": ("block.0", "block.2")}, "taps"), ({"heads": {"x": Head(("block.2",), Pair)}}, "head 'x'")],
)
def test_a_tap_that_does_not_exist_is_refused_with_the_ones_that_do(options, reader):
    with pytest.raises(ConfigError, match=rf"{reader} of a loss term .*'block.2'.*'block.0' to 'block.1'.*depth"):
        tiny.model(tiny.config(None), **options)


def test_heads_have_initial_values_and_rules_of_their_own():
    def constant(name, value, generator):
        value.fill_(0.5 if name == "linear.weight" else 0.25)

    own = Head(("embedding", "block.0"), Pair, constant, lambda name: ParameterRule(True, 2.0, name == "norm.weight"))
    heads = {"usual": Head(("embedding", "block.0"), Pair), "own": own}
    model = type(tiny.model(tiny.config(None)))(tiny.config(None), tiny.SPACE, heads=heads)
    usual = {name: value.detach() for name, value in model.heads["usual"].named_parameters()}
    assert torch.equal(usual["norm.weight"], torch.ones(tiny.WIDTH)) and not usual["linear.bias"].any()
    assert usual["linear.weight"].std() == pytest.approx(math.sqrt(1 / 3 / tiny.WIDTH), rel=0.3)
    assert set(model.heads["own"].linear.weight.unique().tolist()) == {0.5}
    assert set(model.heads["own"].norm.weight.unique().tolist()) == {0.25}
    assert [model.rule(f"heads.usual.{name}").decays for name in usual] == [False, False, True, False]
    assert model.rule("heads.own.norm.weight") == ParameterRule(True, 2.0, True)
    assert model.rule("heads.own.linear.bias") == ParameterRule(True, 2.0)
    assert not model.rule("embedding.position").decays and model.rule("embedding.classes.weight").decays
    first = tiny.model(tiny.config(None), stage=Stage(0, 1, True, False), heads=heads)
    assert first.rule("heads.own.linear.bias").lr_factor == 2.0, "a stage knows the rules of what lies on others"


@pytest.mark.parametrize("shared", [False, True])
def test_an_example_can_be_run_and_says_what_stages_exchange(shared):
    model = tiny.model(tiny.config(None, shared_adaptive_norm=shared), taps=("embedding",))
    example = model.example(5)
    assert model(example).prediction.shape == (5, tiny.TOKENS, tiny.VOCABULARY)
    assert model.payload_length(example) == 2 * tiny.TOKENS + (7 if shared else 1)


def test_only_a_whole_model_decodes():
    stage = Stage.split(2, ParallelConfig(pipeline=2), 0)
    with pytest.raises(AssertionError, match="decoding needs all blocks"):
        tiny.model(tiny.config(None), stage=stage).step(tiny.inputs()[0], KeyValueCache(tiny.TOKENS))
