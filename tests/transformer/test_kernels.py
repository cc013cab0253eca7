"""Attention has one meaning for each rule; the kernels agree with a loop over queries and with each other."""

import math
from types import SimpleNamespace

import pytest
import torch

from megavar.errors import ConfigError
from megavar.transformer import kernels
from megavar.transformer.kernels import KERNELS, Visibility, choose_kernel
from megavar.transformer.sequence import SequenceLayout
from tests.distributed.harness import run_ranks

LAYOUTS = [
    SequenceLayout.of_scales((1,)),
    SequenceLayout.of_scales((2, 3)),
    SequenceLayout.of_scales((1, 2, 3, 4)),
    SequenceLayout((1, 4, 16), padding=3),
    SequenceLayout.of_scales((1, 2, 3, 4, 5, 6, 8, 10)),
    *[SequenceLayout((3, 1, 5), rule=rule, padding=padding) for rule in kernels._ALL[1:] for padding in (0, 2)],
    SequenceLayout((37,), rule="causal"),
    SequenceLayout((37,), rule="full"),
]
CASES = [
    (kernel, number, groups, padded)
    for number, layout in enumerate(LAYOUTS)
    for padded in (False, True)
    for groups in (4, 2)
    for kernel in KERNELS
    if KERNELS[kernel].serves(Visibility(layout, torch.ones(1) if padded else None))
]


def name_of(case):
    kernel, number, groups, padded = case
    layout = LAYOUTS[number]
    return f"{kernel}-{layout.rule}-{layout.tokens}+{layout.padding}-{groups}groups{'-padded' * padded}"


def visibility(layout, padded):
    """Samples whose first, middle and last tokens are invalid, one that is whole, one with a single valid token."""
    if not padded:
        return Visibility(layout)
    valid = torch.ones(3, layout.length, dtype=torch.bool)
    valid[0, : layout.tokens // 3] = False
    valid[0, layout.tokens // 2] = False
    valid[2, 1:] = False
    return Visibility(layout, valid)


def heads(layout, groups, device="cpu", requires_grad=False, size=8):
    generator = torch.Generator().manual_seed(layout.length)
    shapes = [(3, count, layout.length, size) for count in (4, groups, groups)]
    return [torch.randn(shape, generator=generator).to(device).requires_grad_(requires_grad) for shape in shapes]


def seen_by(layout, valid, sample, query):
    """Keys that a row sees: itself where it would see none."""
    return [key for key in range(layout.length) if sees(layout, valid, sample, query, key)] or [query]


def sees(layout, valid, sample, query, key):
    """The definition, in Python."""
    segment = [number for number, size in enumerate(layout.sizes) for _ in range(size)]
    if key >= layout.tokens or (valid is not None and not valid[sample, key]):
        return False
    return query >= layout.tokens or {
        "block_causal": lambda: segment[key] <= segment[query],
        "block_diagonal": lambda: segment[key] == segment[query],
        "causal": lambda: key <= query,
        "full": lambda: True,
    }[layout.rule]()


def by_hand(q, k, v, seen, scale):
    """One query at a time over the keys that it sees; the rows of tokens."""
    out = torch.empty_like(q)[:, :, : seen.layout.tokens]
    shared = q.shape[1] // k.shape[1]
    for sample in range(q.shape[0]):
        for row in range(seen.layout.tokens):
            keys = seen_by(seen.layout, seen.valid, sample, row)
            for head in range(q.shape[1]):
                weights = (k[sample, head // shared, keys] @ q[sample, head, row] * scale).softmax(0)
                out[sample, head, row] = weights @ v[sample, head // shared, keys]
    return out


def compute(case):
    """Output of the tokens, and again with other values in the rows that nobody may see."""
    kernel, number, groups, padded = case
    layout = LAYOUTS[number]
    seen = visibility(layout, padded)
    q, k, v = heads(layout, groups)
    hidden = torch.arange(layout.length) >= layout.tokens
    hidden = hidden.expand(3, -1) if seen.valid is None else hidden | ~seen.valid
    other_k, other_v = (torch.where(hidden[:, None, :, None], part + 5, part) for part in (k, v))
    with torch.no_grad():
        function = KERNELS[kernel].function
        out, other = function(q, k, v, seen, 0.7), function(q, other_k, other_v, seen, 0.7)
    assert out.isfinite().all(), "rows of padding must not poison anything"
    rows = ~hidden[:, None, : layout.tokens, None]
    return out[:, :, : layout.tokens], (rows * (out - other)[:, :, : layout.tokens]).abs().max()


@pytest.fixture(scope="module")
def outputs():
    """:func:`compute` of all cases.

    FlexAttention runs in a process of its own: once it is loaded, autograd starts threads that later forks of the
    test process would not survive.
    """
    flex = [case for case in CASES if case[0] == "flex"]
    plain = [case for case in CASES if case[0] != "flex"]
    return dict(zip(flex, run_ranks(1, lambda: [compute(case) for case in flex])[0])) | {
        case: compute(case) for case in plain
    }


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_kernel_equals_a_loop_over_queries(case, outputs):
    _, number, groups, padded = case
    out, changed = outputs[case]
    expected = by_hand(*heads(LAYOUTS[number], groups), visibility(LAYOUTS[number], padded), 0.7)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert changed == 0, "somebody saw padding"


def gradients(kernel, layout, groups, padded, device="cpu", size=8):
    q, k, v = heads(layout, groups, device, True, size)
    seen = visibility(layout, padded)
    if seen.valid is not None:
        seen.valid = seen.valid.to(device)
    out = KERNELS[kernel].function(q, k, v, seen, 1 / math.sqrt(size))[:, :, : layout.tokens]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
    return torch.autograd.grad((out * weights).sum(), (q, k, v))


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in ("prefix", "causal")], ids=name_of)
def test_kernel_and_dense_have_the_same_gradients(case):
    kernel, number, groups, padded = case
    layout = LAYOUTS[number]
    for own, dense in zip(gradients(kernel, layout, groups, padded), gradients("dense", layout, groups, padded)):
        torch.testing.assert_close(own, dense, rtol=1e-5, atol=4e-6)  # one key may collect all rows' gradients


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward on CUDA only")
@pytest.mark.parametrize("case", [case for case in CASES if case[0] == "flex"], ids=name_of)
def test_flex_and_dense_have_the_same_gradients(case):
    _, number, groups, padded = case
    layout = LAYOUTS[number]
    given = (layout, groups, padded, "cuda", 64)  # where FlexAttention's FLASH backend is wrong
    for flex, dense in zip(gradients("flex", *given), gradients("dense", *given)):
        torch.testing.assert_close(flex, dense, rtol=1e-4, atol=1e-4)


def count_graphs():
    """Replace FlexAttention by a compilation of it whose graphs are kept and run as they are; returns their list."""
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.config.fail_on_recompile_limit_hit = True  # instead of going on without compiling
    compiled = torch.compile(flex_attention, backend=backend)
    kernels._flex_function = lambda: compiled
    return graphs


def check(q, seen):
    with torch.no_grad():
        out, dense = (function(q, q, q, seen, 1.0) for function in (kernels.flex_attention, kernels.dense_attention))
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


def compilations(steps):
    """How often Dynamo compiles FlexAttention over ``steps`` different lists of scales, by rule."""
    generator, graphs, found = torch.Generator().manual_seed(0), count_graphs(), {}
    for number, rule in enumerate(kernels._ALL):
        for step in range(steps if number == 0 else 20):
            sides = torch.randint(1, 10, (int(torch.randint(2, 9, (), generator=generator)),), generator=generator)
            layout = SequenceLayout.of_scales(tuple(sorted(sides.tolist())), 1 + step % 3, rule=rule)
            q = torch.randn(1, 1, layout.length, 8, generator=generator)
            check(q, Visibility(layout))
        found[rule] = len(graphs)
    return found


def compilations_of_text(steps):
    """The same for batches of prompts of other numbers and lengths in every step."""
    generator, graphs = torch.Generator().manual_seed(0), count_graphs()
    for step in range(steps):
        layout = SequenceLayout((int(torch.randint(3, 400, (), generator=generator)),), rule="causal")
        q = torch.randn(2 + step % 3, 1, layout.length, 8, generator=generator)
        check(q, Visibility(layout, torch.rand(q.shape[0], layout.length, generator=generator) > 0.3))
    return len(graphs)


def test_a_new_list_of_scales_in_every_step_compiles_a_bounded_number_of_times():
    found = run_ranks(1, compilations, 60, timeout=300)[0]
    assert 1 <= found["block_causal"] <= 4
    assert found["full"] == found["block_causal"], "another rule must not compile anew"


def test_prompts_of_other_lengths_in_every_step_compile_a_bounded_number_of_times():
    assert 1 <= run_ranks(1, compilations_of_text, 40, timeout=300)[0] <= 4


def test_choice():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    scales, raster, text = (SequenceLayout((1, 4), rule=rule) for rule in ("block_causal", "causal", "full"))
    valid = torch.ones(1, 5, dtype=torch.bool)
    chosen = [
        (scales, None, cpu, "prefix"), (scales, None, cuda, "flex"), (scales, valid, cpu, "prefix"),
        (raster, None, cpu, "causal"), (raster, None, cuda, "causal"), (raster, valid, cpu, "dense"),
        (raster, valid, cuda, "flex"), (text, None, cuda, "prefix"), (text, valid, cuda, "prefix"),
    ]  # fmt: skip
    for layout, given, device, expected in chosen:
        assert choose_kernel("auto", Visibility(layout, given), device) == expected
    assert choose_kernel("flex", Visibility(raster), cpu) == "flex"
    compiled = [choose_kernel("auto", Visibility(scales), device, compiled=True) for device in (cpu, cuda)]
    assert compiled == ["dense", "flex"], "a graph that serves all lists of scales"
    with pytest.raises(ConfigError, match=r"attention_kernel=prefix.*\(visibility causal\).*dense, causal, flex"):
        choose_kernel("prefix", Visibility(raster), cpu)
    with pytest.raises(ConfigError, match=r"attention_kernel=causal.*causal, with samples of different lengths"):
        choose_kernel("causal", Visibility(raster, valid), cpu)


def test_flex_on_cuda_is_triton_whatever_becomes_the_default(monkeypatch):
    """The FLASH backend's gradients are wrong at head size 64."""
    asked = []
    monkeypatch.setattr(kernels, "_flex_function", lambda: lambda q, k, v, **options: asked.append(options) or q)
    seen = Visibility(SequenceLayout((1, 4)))
    seen._made["block mask"] = None
    for device in ("cuda", "cpu"):
        heads = SimpleNamespace(device=torch.device(device), shape=(1, 2, 5, 64))  # no GPU is needed to ask
        kernels.flex_attention(heads, heads, heads, seen, 1.0)
    assert [options["kernel_options"] for options in asked] == [{"BACKEND": "TRITON"}, {}]


def test_masks_of_a_mode_do_not_outlive_it():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    layout = SequenceLayout((2, 3, 7))
    with FakeTensorMode():
        assert isinstance(Visibility(layout).mask(torch.device("cpu")), FakeTensor)
    assert not isinstance(Visibility(layout).mask(torch.device("cpu")), FakeTensor)
    other = SequenceLayout((2, 3, 8))
    with torch.inference_mode():
        mask = Visibility(other).mask(torch.device("cpu"))
    assert not mask.is_inference()


def test_padded_samples_are_masked_once_for_all_blocks():
    seen = visibility(LAYOUTS[2], padded=True)
    assert seen.mask(torch.device("cpu")) is seen.mask(torch.device("cpu"))
