"""Every implementation of the experts computes the same function and holds the same logical tensors."""

import dataclasses
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megavar.config.experts.base import ExpertsChoice
from megavar.config.parallel import ParallelConfig
from megavar.errors import ConfigError
from megavar.generators.var import VAR
from megavar.parallel.logical import initialize_parameters, logical_tensors
from megavar.transformer.context import ForwardContext
from megavar.transformer.moe.backends import check_installed, choose_backend
from megavar.transformer.moe.experts import GroupedExperts
from megavar.transformer.moe.layer import ExpertFeedForward
from megavar.transformer.sequence import SequenceLayout
from tests.transformer import tiny

pytestmark = pytest.mark.usefixtures("one_process")
TUTEL = pytest.param(
    "tutel", marks=pytest.mark.skipif(importlib.util.find_spec("tutel") is None, reason="tutel is not installed")
)
BACKENDS = ["megatron", "grouped", TUTEL, "deepspeed"]


def megatron_config(backend, number=4, top_k=2, dtype=torch.float32, **fields) -> TransformerConfig:
    experts = {"number": number, "top_k": top_k, "backend": backend, "balance_coefficient": 0.0}
    config = VAR.layers(tiny.config(experts), ParallelConfig(), dtype)
    return dataclasses.replace(config, **fields)


def layer(backend, number=4, top_k=2, router="scale_token", dtype=torch.float32, **fields):
    experts = ExpertsChoice.make(number=number, top_k=top_k, backend=backend, router=router, balance_coefficient=0.0)
    config = megatron_config(backend, number, top_k, dtype, **fields)
    made = ExpertFeedForward(config, 0, experts=experts, kinds=len(tiny.SCALES))
    initialize_parameters(made, lambda name, value, generator: value.normal_(std=0.3, generator=generator), seed=2)
    return made


def context():
    return ForwardContext(SequenceLayout.of_scales(tiny.SCALES))


def hidden(dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(tiny.TOKENS, 3, tiny.WIDTH, generator=generator).to(dtype).requires_grad_()


def expert_by_formula(values, of, token):
    """One expert of one token, plain or gated, with the biases that exist."""

    def linear(name, x):
        return values[f"{of}{name}.weight"] @ x + values.get(f"{of}{name}.bias", 0)

    if f"{of}linear_fc1.weight" in values:
        return linear("linear_fc2", F.gelu(linear("linear_fc1", token), approximate="tanh"))
    return linear(
        "linear_fc2", F.gelu(linear("linear_fc1_gate", token), approximate="tanh") * linear("linear_fc1_up", token)
    )


def by_loop(values, x, number, top_k, router):
    """Eq. 6 to 9: every token through each of its experts, one after the other."""
    scale = SequenceLayout.of_scales(tiny.SCALES).kind_index()
    outputs = []
    for row in range(x.shape[0]):
        for sample in range(x.shape[1]):
            token = x[row, sample]
            routed = values["moe.router.scale_embedding"][scale[row]] if router == "scale" else token
            scores = (values["moe.router.weight"] @ routed).softmax(-1)
            output = torch.zeros_like(token)
            for expert in scores.topk(top_k).indices.tolist():
                of = f"moe.experts.{expert}."
                output = output + scores[expert] * expert_by_formula(values, of, token)
            outputs.append(output)
    return torch.stack(outputs).view_as(x)


def logical_leaves(module):
    """Copies of the logical tensors that gradients can be taken of."""
    parameters = dict(module.named_parameters())
    values = {t.name: t.local(parameters[t.parameter]) for t in logical_tensors(module)}
    return {name: value.detach().clone().requires_grad_() for name, value in values.items()}


KINDS_OF_EXPERTS = {
    "plain": {},
    "gated": {"gated_linear_unit": True},
    "gated_without_bias": {"gated_linear_unit": True, "add_bias_linear": False},
}
VARIANTS = [
    *((number, top_k, router, "plain") for number, top_k in [(4, 2), (8, 3), (3, 3), (2, 1)]
      for router in ("scale_token", "scale")),
    (4, 2, "scale_token", "gated"), (4, 2, "scale_token", "gated_without_bias"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "top_k", "router", "kind"), VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_equals_a_loop_over_tokens_and_experts(backend, number, top_k, router, kind):
    made, x = layer(backend, number, top_k, router, **KINDS_OF_EXPERTS[kind]), hidden()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    output = made(x, context())
    (output * weights).sum().backward()

    values, given = logical_leaves(made), hidden()
    expected = by_loop(values, given, number, top_k, router)
    (expected * weights).sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, given.grad, rtol=1e-4, atol=1e-5)
    found = tiny.gradients(made)
    assert found.keys() == values.keys()
    for name, value in values.items():
        expected_gradient = torch.zeros_like(value) if value.grad is None else value.grad  # an expert nobody chose
        torch.testing.assert_close(found[name], expected_gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_backends_initialize_alike(backend):
    def values(name):
        made = tiny.model(tiny.config({"backend": name}))
        return {name: value.detach() for name, value in logical_leaves(made).items()}

    tiny.assert_same(values(backend), values("megatron"), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_stays_close_to_float32(backend):
    with torch.no_grad():
        rounded = layer(backend, dtype=torch.bfloat16)
        exact = layer("megatron")
        tiny.copy_logical(rounded, exact)
        output = rounded(hidden(torch.bfloat16), context())
        expected = exact(hidden(torch.bfloat16).float(), context())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_model_trains_the_same_with_balance_loss_and_recomputation(backend):
    def run(name, recompute):
        model = tiny.model(tiny.config({"backend": name}), ParallelConfig(recompute=recompute))
        given, targets = tiny.inputs()
        loss = tiny.loss(model(given), targets)
        loss.backward()
        return loss.detach(), tiny.gradients(model), model.collect_routing()

    for found, expected in zip(run(backend, "full"), run("megatron", "none")):
        if isinstance(expected, dict):
            tiny.assert_same(found, expected, rtol=1e-4, atol=1e-6)
        else:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_expert_equals_the_dense_block(backend):
    """The gate, a softmax over one, is 1."""
    dense = tiny.model(tiny.config(None))
    mixture = tiny.model(tiny.config({"number": 1, "top_k": 1, "backend": backend}))
    tiny.copy_logical(dense, mixture, rename=lambda name: dense_name(name))
    given, targets = tiny.inputs()
    losses = []
    for model in (dense, mixture):
        losses.append(tiny.loss(model(given), targets))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    expected, found = tiny.gradients(dense), tiny.gradients(mixture)
    routers = [name for name in found if ".router." in name]
    assert len(routers) == 2
    for name in routers:
        assert found.pop(name).abs().max() < 1e-7
    tiny.assert_same({dense_name(name): value for name, value in found.items()}, expected, rtol=1e-4, atol=1e-6)


def dense_name(name):
    """The dense model's name of a tensor of the one-expert model; None for routers."""
    return None if ".router." in name else name.replace(".moe.experts.0.", ".mlp.")


def test_grouped_experts_without_tokens_still_have_gradients():
    experts = GroupedExperts(3, megatron_config("grouped", 3))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    output, bias = experts(torch.zeros(0, tiny.WIDTH), torch.zeros(3, dtype=torch.int64), torch.zeros(0))
    assert output.shape == (0, tiny.WIDTH) and bias is None
    output.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() == 0 for parameter in experts.parameters())


def test_auto_is_grouped_on_cuda_where_sizes_allow_and_megatron_elsewhere(monkeypatch):
    fits = megatron_config("auto")
    odd = VAR.layers(tiny.config({}, width=12), ParallelConfig(), torch.bfloat16)
    assert choose_backend("tutel", odd) == "tutel"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_backend("auto", fits) == "grouped"
    assert choose_backend("auto", odd) == "megatron"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_backend("auto", fits) == "megatron"
    assert choose_backend("grouped", fits) == "grouped"
    with pytest.raises(ConfigError, match=r"generator\.width=12 .* multiples of 8 .* megatron"):
        choose_backend("grouped", odd)


REFUSED = [
    ({"number": 6, "top_k": 2}, {"expert": 4}, r"generator\.experts\.number=6 is not a multiple of parallel\.expert=4"),
    ({"backend": "deepspeed"}, {"tensor": 2}, r"backend=deepspeed cannot run with parallel\.tensor=2.*megatron"),
    ({"backend": "deepspeed"}, {"dispatcher": "allgather"}, r"own all-to-all.*dispatcher=alltoall"),
    ({"backend": "tutel"}, {"dispatcher": "allgather"}, r"own all-to-all.*dispatcher=alltoall"),
]


@pytest.mark.parametrize(("experts", "parallel", "message"), REFUSED)
def test_what_a_backend_cannot_do_is_refused(experts, parallel, message):
    with pytest.raises(ConfigError, match=message):
        ExpertsChoice.make(**experts).check(ParallelConfig(**parallel))


def test_missing_tutel_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"backend=tutel needs the package tutel.*NO_CUDA=1"):
        check_installed("tutel")
    check_installed("grouped")


def test_tutel_that_does_not_load_is_reported(monkeypatch, tmp_path):
    (tmp_path / "tutel").mkdir()
    (tmp_path / "tutel" / "__init__.py").write_text("raise NameError('tutel_custom_kernel is not defined')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "tutel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"does not load \(tutel_custom_kernel is not defined\).*another backend"):
        layer("tutel")
