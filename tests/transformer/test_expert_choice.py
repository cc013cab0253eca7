"""Expert choice against loops over groups and experts; what is trained is what is decoded."""

import itertools
from pathlib import Path

import pytest
import torch

from megavar.assembly import build_sampler
from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import SCALES
from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.errors import ConfigError
from megavar.generators.inputs import ScaleInputs
from megavar.generators.var import VAR
from megavar.parallel.logical import initialize_parameters
from megavar.transformer.context import ForwardContext
from megavar.transformer.moe.layer import ExpertFeedForward
from megavar.transformer.sequence import SequenceLayout
from tests.transformer import tiny
from tests.transformer.test_expert_backends import expert_by_formula, logical_leaves
from tests.transformer.test_layouts import decoded

pytestmark = pytest.mark.usefixtures("one_process")
BATCH, PADDING = 3, 2
QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"


def layer(**keys):
    experts = ExpertsChoice.make(**({"router": "expert_choice", "number": 4, "top_k": 2, "backend": "grouped"} | keys))
    config = VAR.layers(tiny.config(experts), ParallelConfig(), torch.float32)
    made = ExpertFeedForward(config, 0, experts=experts, kinds=len(tiny.SCALES))
    initialize_parameters(made, lambda name, value, generator: value.normal_(std=0.4, generator=generator), seed=2)
    return made


def groups_by_loop(group, valid):
    """Lists of (row, sample)."""
    bounds = SequenceLayout.of_scales(tiny.SCALES).bounds
    whole = ((0, bounds[-1][1]),)
    rows = [range(*bound) for bound in (bounds if group == "image_scale" else whole)]
    found = [[(row, b) for row in own if valid[b, row]] for own in rows for b in range(BATCH)]
    return [[*itertools.chain(*found)]] if group == "batch" else found


def taken_by_loop(scores, groups, share):
    """Each expert sorts each group and takes the first."""
    taken = torch.zeros_like(scores, dtype=torch.bool)
    for group in groups:
        k = min(len(group), max(1, int(len(group) * share + 0.5)))
        for expert in range(scores.shape[-1]):
            for row, sample in sorted(group, key=lambda place: -float(scores[(*place, expert)]))[:k]:
                taken[row, sample, expert] = True
    return taken


@pytest.mark.parametrize("padded", [False, True], ids=["complete", "padded"])
@pytest.mark.parametrize("group", ["image_scale", "image", "batch"])
def test_experts_take_the_best_of_each_group(group, padded):
    made, padding = layer(group=group), PADDING if padded else 0
    layout = SequenceLayout(SequenceLayout.of_scales(tiny.SCALES).sizes, padding=padding)
    x = torch.randn(layout.length, BATCH, tiny.WIDTH, generator=torch.Generator().manual_seed(4)).requires_grad_()
    valid = torch.ones(BATCH, layout.length, dtype=torch.bool)
    context = ForwardContext(layout, routing=[])
    if padded:  # samples of different lengths, and rows that make the sequence longer
        valid[:, layout.tokens :], valid[1, 7:], valid[2, 2] = False, False, False
        context.valid = valid
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    seen = []
    made.moe.router.register_forward_hook(lambda module, given, routing: seen.append(routing))
    output = made(x, context)
    (output * weights).sum().backward()

    values, given = logical_leaves(made), x.detach().clone().requires_grad_()
    scores = (given @ values["moe.router.weight"].T).softmax(-1)
    taken = taken_by_loop(scores, groups_by_loop(group, valid), share=2 / 4)
    (routing,) = seen
    assert torch.equal(routing.assignment, taken.flatten(0, 1))
    assert taken.sum() <= routing.bounds.rows and (taken.sum() == routing.bounds.rows or not routing.bounds.every_row)
    assert routing.bounds.every_row == (group != "batch" and not padded)
    rows = []
    for row in range(layout.length):
        for sample in range(BATCH):
            parts = [
                scores[row, sample, expert] * expert_by_formula(values, f"moe.experts.{expert}.", given[row, sample])
                for expert in range(4)
                if taken[row, sample, expert]
            ]
            rows.append(sum(parts, torch.zeros(tiny.WIDTH)))
    expected = torch.stack(rows).view_as(output)
    (expected * weights).sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, given.grad, rtol=1e-4, atol=1e-5)
    tiny.assert_same(tiny.gradients(made), {n: v.grad for n, v in values.items()}, rtol=1e-4, atol=1e-5)
    (record,) = context.routing
    torch.testing.assert_close(record.met.sum(0), torch.bincount(taken.sum(-1)[valid.t()], minlength=5).float())
    assert torch.equal(record.load.sum(0), taken.sum((0, 1)).float())


def model(**keys):
    return tiny.model(tiny.config({"router": "expert_choice"} | keys)).eval()


def test_decoding_with_a_cache_computes_what_training_did():
    var, (given, _) = model(), tiny.inputs(4)
    with torch.no_grad():
        torch.testing.assert_close(decoded(var, given), var(given).prediction, rtol=1e-5, atol=1e-5)


def test_guidance_halves_and_other_images_change_nothing():
    var, (given, _) = model(), tiny.inputs(4)
    alone = decoded(var, given)
    free = torch.full_like(given.labels, tiny.CLASSES)
    doubled = ScaleInputs(torch.cat([given.labels, free]), given.features.repeat(2, 1, 1))
    torch.testing.assert_close(decoded(var, doubled)[:4], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decoded(var, tiny.rows(given, [2])), alone[2:3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("group", "later", "other"), [
    ("image_scale", False, False), ("image", True, False), ("batch", True, True),
])  # fmt: skip
def test_which_tokens_can_change_an_earlier_scale(group, later, other):
    """Only the group ``image_scale`` is causal: the others let scales to come, or other images, decide."""
    var, (given, _) = model(group=group), tiny.inputs(4)
    first = slice(0, sum(side * side for side in tiny.SCALES[:-1]))
    changed = given.features.clone()
    changed[:, first.stop - 1 :] *= -3
    others = given.features.clone()
    others[1:] *= -3
    with torch.no_grad():
        before = var(given).prediction[:, first]
        after = var(ScaleInputs(given.labels, changed)).prediction[:, first]
        beside = var(ScaleInputs(given.labels, others)).prediction[0]
        assert torch.allclose(before, after, atol=1e-5) != later
        assert torch.allclose(var(given).prediction[0], beside, atol=1e-5) != other


def test_groups_that_do_not_exist_while_decoding_are_refused_or_replaced():
    given, _ = tiny.inputs(2)
    refused = model(group="image")
    with pytest.raises(ConfigError, match=r"group=image: .* Train with group=image_scale, or set .*decoding_group"):
        decoded(refused, given)
    config = load_config(QUICKSTART, ["generator.experts={router: expert_choice, group: batch}"])
    with pytest.raises(ConfigError, match="later scales do not exist yet"):  # before a run's first step
        build_sampler(config, refused, None, None, None)
    replaced, own = model(group="image", decoding_group="image_scale"), model()
    torch.testing.assert_close(decoded(replaced, given), decoded(own, given))


def test_tokens_that_come_one_by_one_are_refused():
    made = layer()
    with pytest.raises(ConfigError, match=r"draws them one after the other.*Choose another router"):
        made(torch.zeros(5, 1, tiny.WIDTH), ForwardContext(SequenceLayout((5,), rule="causal")))


def test_a_token_of_var_meets_three_experts_on_average():
    """moe-variants: 1, 2, 3, 6, 9, 14, 24, 38, 63, 96 tokens per expert, 3.012 experts per token."""
    sizes, experts = [side * side for side in SCALES[256]], ExpertsChoice.make(router="expert_choice")
    assert [experts.tokens_per_expert(size) for size in sizes] == [1, 2, 3, 6, 9, 14, 24, 38, 63, 96]
    assert experts.copies(sizes) == pytest.approx(3.012, abs=5e-4)
