"""Gates and balance loss (MEPA Eq. 6 to 10) against loops that follow the paper's formulas."""

import pytest
import torch

from megavar.config.choice import resolve
from megavar.config.experts.base import ExpertsChoice
from megavar.config.parallel import ParallelConfig
from megavar.generators.var import VAR
from megavar.transformer.context import ForwardContext
from megavar.transformer.moe.routing import top_k_gates
from megavar.transformer.sequence import SequenceLayout
from tests.transformer import tiny

pytestmark = pytest.mark.usefixtures("one_process")
LAYOUT = SequenceLayout.of_scales(tiny.SCALES)
EXPERTS, TOP_K, COEFFICIENT = 4, 2, 0.05


def router(padding=0, **changes):
    experts = ExpertsChoice.make(number=EXPERTS, top_k=TOP_K, balance_coefficient=COEFFICIENT, **changes)
    config = VAR.layers(tiny.config(experts), ParallelConfig(), torch.float32)
    made = resolve(experts)(config, experts, block=1, kinds=len(tiny.SCALES))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5, generator=generator)
    layout = SequenceLayout(LAYOUT.sizes, padding=padding)
    made.context = ForwardContext(layout, routing=[])
    return made


def hidden(batch=3, rows=tiny.TOKENS):
    return torch.randn(rows, batch, tiny.WIDTH, generator=torch.Generator().manual_seed(8))


def scores_by_formula(made, x):
    """Eq. 8 and 9 with parameters of the router, differentiable: [L, B, M]."""
    index = made.context.sequence.kind_index().clamp(min=0)
    tokens = x
    if made.experts.router == "scale":
        tokens = made.scale_embedding[index][:, None].repeat(1, x.shape[1], 1)
    elif made.experts.scale_embedding_in_router:
        tokens = x + made.scale_embedding[index][:, None]
    return torch.softmax(tokens @ made.weight.T, dim=-1)


def balance_by_loop(scores, groups):
    """Eq. 10 of each group of tokens (lists of (row, sample)), averaged over the groups."""
    total = 0.0
    for group in groups:
        loss = 0.0
        for expert in range(EXPERTS):
            chosen, mean = 0, 0.0
            for row, sample in group:
                best = sorted(range(EXPERTS), key=lambda j: -float(scores[row, sample, j]))[:TOP_K]
                chosen += expert in best
                mean = mean + scores[row, sample, expert] / len(group)
            loss = loss + EXPERTS * (chosen / len(group)) * mean
        total = total + loss / len(groups)
    return total


def groups_of(scope, batch):
    if scope == "image":
        return [[(row, sample) for row in range(tiny.TOKENS)] for sample in range(batch)]
    return [[(row, sample) for row in range(tiny.TOKENS) for sample in range(batch)]]


VARIANTS = [
    {"router": "scale_token"},
    {"router": "scale_token", "scale_embedding_in_router": True},
    {"router": "scale"},
]


@pytest.mark.parametrize("scope", ["image", "micro_batch"])
@pytest.mark.parametrize("variant", VARIANTS, ids=["scale_token", "with_embedding", "scale"])
@pytest.mark.parametrize("padding", [0, 2])
def test_balance_value_and_injected_gradient_follow_eq_10(variant, scope, padding):
    made = router(padding, balance_scope=scope, **variant)
    x = hidden(rows=tiny.TOKENS + padding).requires_grad_()
    gates = made(x).gates
    (gates * 0).sum().backward()  # no gradient but the injected one
    trained = dict(made.named_parameters()) | ({} if made.experts.router == "scale" else {"x": x})
    injected = {name: value.grad.clone() for name, value in trained.items()}
    for value in trained.values():
        value.grad = None
    expected = balance_by_loop(scores_by_formula(made, x), groups_of(scope, 3))
    (record,) = made.context.routing
    torch.testing.assert_close(record.balance, expected.detach(), rtol=1e-5, atol=1e-6)
    (COEFFICIENT * expected).backward()
    assert max(value.abs().max() for value in injected.values()) > 1e-4
    for name, value in trained.items():
        torch.testing.assert_close(injected[name], value.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("scope", ["image", "micro_batch"])
def test_tokens_that_are_padding_of_a_sample_count_nowhere(scope):
    made = router(2, balance_scope=scope)
    rows = tiny.TOKENS + 2
    valid = torch.ones(3, rows, dtype=torch.bool)
    valid[0, 3:7], valid[2, :2] = False, False
    made.context.valid = valid
    x = hidden(rows=rows).requires_grad_()
    (made(x)[0] * 0).sum().backward()
    groups = [[(row, sample) for row in range(tiny.TOKENS) if valid[sample, row]] for sample in range(3)]
    if scope == "micro_batch":
        groups = [[token for group in groups for token in group]]
    expected = balance_by_loop(scores_by_formula(made, x), groups)
    (record,) = made.context.routing
    torch.testing.assert_close(record.balance, expected.detach(), rtol=1e-5, atol=1e-6)
    assert record.load.sum() == TOP_K * (3 * tiny.TOKENS - 6)
    injected, made.weight.grad = made.weight.grad, None
    (COEFFICIENT * expected).backward()
    torch.testing.assert_close(injected, made.weight.grad, rtol=1e-4, atol=1e-7)


def test_a_pass_weighs_the_balance_loss():
    gradients = []
    for weight in (1.0, 0.25, 0.0):
        made = router()
        made.context.balance = weight
        (made(hidden())[0] * 0).sum().backward()
        gradients.append(made.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0] / 4)
    assert gradients[0].abs().max() > 0 and gradients[2].abs().max() == 0


def accumulated_gradient(scope, parts):
    """Router gradient of the injected loss over micro-batches, weighted as the engine does it."""
    made, x = router(balance_scope=scope), hidden(4)
    made.context.balance = 1 / len(parts)
    for part in parts:
        (made(x[:, part])[0] * 0).sum().backward()
    return made.weight.grad


def test_only_the_image_scope_is_independent_of_the_micro_batch_split():
    whole, halves, uneven = [[0, 1, 2, 3]], [[0, 1], [2, 3]], [[3, 0], [1, 2]]
    expected = accumulated_gradient("image", whole)
    for parts in (halves, uneven):
        torch.testing.assert_close(accumulated_gradient("image", parts), expected, rtol=1e-4, atol=1e-8)
    difference = accumulated_gradient("micro_batch", halves) - accumulated_gradient("micro_batch", whole)
    assert difference.abs().max() > 1e-3 * expected.abs().max()


def test_perfect_balance_gives_top_k():
    made = router()
    with torch.no_grad():
        made.weight.zero_()  # equal scores for all experts
    made(hidden())
    assert made.context.routing[0].balance == pytest.approx(TOP_K)


def test_no_injection_without_coefficient_or_gradient():
    made = router()
    with torch.no_grad():
        gates = made(hidden()).gates
    assert gates.grad_fn is None
    experts = made.experts.model_copy(update={"balance_coefficient": 0.0})
    made.experts = experts
    (made(hidden())[0] * 0).sum().backward()
    assert made.weight.grad.abs().max() == 0


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_gates_are_raw_softmax_scores_of_the_best_experts(top_k):
    scores = torch.randn(50, 5, generator=torch.Generator().manual_seed(1)).softmax(-1)
    gates, assignment = top_k_gates(scores, top_k)
    for token in range(50):
        best = sorted(range(5), key=lambda j: -float(scores[token, j]))[:top_k]
        for expert in range(5):
            assert assignment[token, expert] == (expert in best)
            assert gates[token, expert] == (scores[token, expert] if expert in best else 0)
    if top_k < 5:
        assert gates.sum(-1).max() < 1


@pytest.mark.parametrize("batch", [1, 3])
def test_smoe_routes_all_tokens_of_a_scale_alike(batch):
    made = router(router="scale")
    gates, assignment = (value.unflatten(0, (-1, batch)) for value in made(hidden(batch))[:2])
    for start, end in LAYOUT.bounds:
        for value in (gates, assignment):
            assert (value[start:end] == value[start, 0]).all()
    assert len({tuple(assignment[start, 0].tolist()) for start, _ in LAYOUT.bounds}) > 1


def test_stmoe_routes_tokens_of_a_scale_differently():
    assignment = router()(hidden())[1].unflatten(0, (-1, 3))
    start, end = LAYOUT.bounds[-1]
    assert len({tuple(row.tolist()) for row in assignment[start:end, 0]}) > 1


@pytest.mark.parametrize("variant", VARIANTS, ids=["scale_token", "with_embedding", "scale"])
def test_a_sample_is_routed_the_same_alone_and_in_a_batch(variant):
    model = tiny.model(tiny.config(variant))
    seen = []
    for block in model.blocks.values():
        block.feed_forward.moe.router.register_forward_hook(lambda module, args, result: seen.append(result[1]))
    given, _ = tiny.inputs(4)
    together = model(given).prediction
    assignments = [assignment.unflatten(0, (-1, 4)) for assignment in seen]
    for sample in range(4):
        seen.clear()
        alone = model(tiny.rows(given, [sample])).prediction
        torch.testing.assert_close(alone[0], together[sample], rtol=1e-5, atol=1e-5)
        for own, batched in zip(seen, assignments):
            assert torch.equal(own, batched[:, sample])


def test_statistics_count_tokens_by_block_scale_and_expert():
    model = tiny.model(tiny.config({"number": 4, "top_k": 2}))
    seen = []
    for block in model.blocks.values():
        block.feed_forward.moe.router.register_forward_hook(lambda module, args, result: seen.append(result[1]))
    model(tiny.inputs(3)[0])
    statistics = model.collect_routing()
    for block, assignment in enumerate(seen):
        assignment = assignment.unflatten(0, (-1, 3))
        for scale, (start, end) in enumerate(LAYOUT.bounds):
            assert torch.equal(statistics["load"][block, scale], assignment[start:end].sum((0, 1)).float())
    assert model.collect_routing()["passes"].sum() == 0
    model.eval()
    model(tiny.inputs(3)[0])
    assert model.collect_routing()["passes"].sum() == 0
