"""Local dispatch computes what Megatron-core's dispatchers compute, in every bit, and only by gathers."""

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.utils._python_dispatch import TorchDispatchMode

from megavar.config.choice import resolve
from megavar.config.experts.base import ExpertsChoice
from megavar.config.parallel import ParallelConfig
from megavar.generators.var import VAR
from megavar.transformer.context import ForwardContext
from megavar.transformer.moe import experts as experts_module
from megavar.transformer.moe.experts import GroupedExperts
from megavar.transformer.moe.layer import MegatronMixture
from megavar.transformer.moe.local import LocalMixture, arrange
from megavar.transformer.moe.routing import Bounds
from megavar.transformer.sequence import SequenceLayout
from tests.transformer import foreign_router, tiny

pytestmark = pytest.mark.usefixtures("one_process")
ATOMIC = ("index_add", "scatter_add", "scatter_reduce", "index_put", "index_reduce", "put_", "embedding_dense_backward")
ROUTERS = {
    "one": {"number": 4, "top_k": 1},
    "two": {"number": 4, "top_k": 2},
    "three of eight": {"number": 8, "top_k": 3},
    "all": {"number": 3, "top_k": 3},
    "of the scale": {"number": 4, "top_k": 2, "router": "scale"},  # some experts get no tokens
    "some": {"number": 4, "top_k": 2, "router": "above_mean", "factor": 1.0},
    "hardly any": {"number": 4, "top_k": 2, "router": "above_mean", "factor": 3.0},
}
assert foreign_router.AboveMeanExperts.variable_number


def Megatron(config, router):
    """The same router and experts behind Megatron-core's dispatcher."""
    submodules = MoESubmodules(experts=ModuleSpec(module=GroupedExperts), router=lambda **unused: router)
    return MegatronMixture(config, submodules)


def mixture(kind, name, dtype):
    experts = ExpertsChoice.make(**ROUTERS[name], balance_coefficient=0.05)
    config = VAR.layers(tiny.config(experts), ParallelConfig(), dtype)
    made = kind(config, resolve(experts)(config, experts, block=0, kinds=3))
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    made.router.context = ForwardContext(SequenceLayout.of_scales(tiny.SCALES), routing=[])
    return made


def computed(made, dtype):
    """Output, gradient of the input and of every parameter."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(tiny.TOKENS, 5, tiny.WIDTH, generator=generator).to(dtype).requires_grad_()
    weights = torch.randn(hidden.shape, generator=generator).to(dtype)
    output, _ = made(hidden, made.router(hidden))
    (output * weights).sum().backward()
    return {"output": output.detach(), "input": hidden.grad} | {n: p.grad for n, p in made.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ROUTERS)
def test_the_same_bits_as_megatron_core(name, dtype):
    own, other = (computed(mixture(kind, name, dtype), dtype) for kind in (LocalMixture, Megatron))
    assert own.keys() == other.keys() and len(own) == 7 + (name == "of the scale")
    for key, value in own.items():
        assert value.isfinite().all() and torch.equal(value, other[key]), key
    assert own["experts.linear_fc1_bias"].abs().max() > 0


class Operators(TorchDispatchMode):
    """Names of what runs."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(function.__name__)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", ["two", "some"])
def test_nothing_adds_up_in_an_order_that_chance_decides(name):
    def atomic(kind):
        made = mixture(kind, name, torch.float32)
        with Operators() as seen:
            computed(made, torch.float32)
        return {operator for operator in seen.names if operator.startswith(ATOMIC)}

    assert atomic(LocalMixture) == set()
    assert atomic(Megatron) != set(), "the search must find what it looks for"


class Poisoned(torch.autograd.Function):
    """A grouped product that leaves NaN where it computes nothing, forward and backward."""

    @staticmethod
    def forward(ctx, rows, weight, ends):
        ctx.save_for_backward(rows, weight, ends)
        return poison(torch._grouped_mm(rows, weight, offs=ends), ends)

    @staticmethod
    def backward(ctx, gradient):
        rows, weight, ends = ctx.saved_tensors
        with torch.enable_grad():
            given = [rows.detach().requires_grad_(), weight.detach().requires_grad_()]
            of_rows, of_weight = torch.autograd.grad(torch._grouped_mm(*given, offs=ends), given, gradient)
        return poison(of_rows, ends), of_weight, None


def poison(rows, ends):
    return rows.masked_fill(torch.arange(len(rows))[:, None] >= ends[-1], torch.nan)


def test_rows_of_no_expert_reach_nobody(monkeypatch):
    expected = computed(mixture(LocalMixture, "some", torch.float32), torch.float32)
    monkeypatch.setattr(experts_module, "_grouped_mm", lambda rows, weight, offs: Poisoned.apply(rows, weight, offs))
    found = computed(mixture(LocalMixture, "some", torch.float32), torch.float32)
    for name, value in expected.items():
        assert value.isfinite().all() and torch.equal(value, found[name]), name


def test_every_copy_has_a_row_and_knows_where_it_is_from():
    assignment = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)
    at = arrange(assignment, Bounds(copies=3, rows=8))
    assert at.segments.ends.tolist() == [2, 4, 6] and at.segments.own.tolist()[:6] == [0, 0, 1, 1, 2, 2]
    assert at.segments.kept.flatten().tolist() == [True] * 6 + [False] * 2
    assert at.token.tolist()[:6] == [0, 2, 2, 3, 0, 2]
    assert [[row for row in of_token if row < 8] for of_token in at.copies.tolist()] == [[0, 4], [], [1, 2, 5], [3]]
    fewer = arrange(assignment[[0, 0]], Bounds(2, 4, every_token=True, every_row=True))
    assert fewer.segments.kept is None and fewer.copies.tolist() == [[0, 2], [1, 3]]


def test_a_capacity_needs_no_more_rows_than_it_has():
    """Expert choice: experts take the tokens that suit them best, as many each; a token may get any number of them."""

    class Capacity(foreign_router.AboveMeanRouter):
        def choose(self, scores):
            flat = scores.detach().flatten(0, 1)
            best = flat.topk(7, dim=0).indices
            assignment = torch.zeros_like(flat, dtype=torch.bool).scatter_(0, best, True).view_as(scores)
            return scores * assignment, assignment

        def bounds(self, rows, samples):
            return Bounds(4, 4 * 7, every_row=True)

    results = []
    for kind in (LocalMixture, Megatron):
        made = mixture(kind, "some", torch.float32)
        made.router.__class__ = Capacity
        results.append(computed(made, torch.float32))
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key
