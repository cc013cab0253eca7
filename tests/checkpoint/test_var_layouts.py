"""STMoE-VAR: a checkpoint of any layout continues the curve of one process under any other.

Clipping is active at every step, the balance loss is on, labels and paths are dropped, weights are averaged. Within one
layout the continued run is the uninterrupted one, bit for bit.
"""

import functools

import numpy as np
import pytest
import torch

from megavar.conditions import ClassConditions
from megavar.config.checkpoint import CheckpointConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.procedures.next_scale import NextScaleSampling
from megavar.config.train import EmaConfig
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.sampling.procedures.next_scale import NextScale
from megavar.sampling.sampler import Sampler
from megavar.training.checkpoint import Checkpointer, ModuleState, load_weights
from megavar.training.ema import MovingAverage
from tests.checkpoint.conftest import assert_same, read_everything
from tests.distributed.curves import Setup, bare_curve, build, engine_loop
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed
SAVED, FINAL = 3, 6
TOLERANCE = 1e-5


def setup(ranks, stage, micro_batch_size=None, precision="fp32", backend="megatron", offload=(), **parallel):
    if parallel.get("pipeline", 1) > 1:
        micro_batch_size = 2
    return Setup(ranks, stage, micro_batch_size, offload, precision, backend, parallel=parallel)


DP4_Z1, DP2_Z2, DP2_Z3, DP1_Z0, DP2_Z0 = setup(4, 1), setup(2, 2), setup(2, 3), setup(1, 0), setup(2, 0)
TP2_Z1, TP2_DP2_Z3 = setup(2, 1, tensor=2), setup(4, 3, tensor=2)
TP2_SEQUENCE_Z2 = setup(4, 2, tensor=2, sequence=True)
EP2_Z1, EP2_Z3, EP4_Z2 = setup(2, 1, expert=2), setup(2, 3, expert=2), setup(4, 2, expert=4)
TP2_EP2_Z1 = setup(4, 1, tensor=2, expert=2, sequence=True)
PP2_Z1, PP4_Z1, TP2_PP2_Z1 = setup(2, 1, pipeline=2), setup(4, 1, pipeline=4), setup(4, 1, tensor=2, pipeline=2)
PP2_EP2_Z1, INTERLEAVED = setup(4, 1, pipeline=2, expert=2), setup(2, 1, pipeline=2, virtual_pipeline=2)
GROUPED_EP2_Z2 = setup(2, 2, backend="grouped", expert=2)
OFFLOAD_Z2, OFFLOAD_Z3 = setup(2, 2, offload=("optimizer",)), setup(2, 3, offload=("optimizer", "param"))

PAIRS = [
    (DP4_Z1, DP2_Z2), (DP4_Z1, DP2_Z3), (DP4_Z1, TP2_Z1), (DP4_Z1, PP2_Z1), (DP4_Z1, EP2_Z1), (DP4_Z1, DP1_Z0),
    (TP2_PP2_Z1, DP2_Z3), (TP2_PP2_Z1, INTERLEAVED), (TP2_PP2_Z1, PP4_Z1), (DP2_Z3, TP2_Z1), (DP2_Z3, OFFLOAD_Z2),
    (DP2_Z3, DP2_Z0), (EP2_Z1, EP4_Z2), (EP2_Z1, EP2_Z3), (EP2_Z1, TP2_EP2_Z1), (EP2_Z1, PP2_EP2_Z1),
    (EP2_Z3, TP2_SEQUENCE_Z2), (TP2_EP2_Z1, GROUPED_EP2_Z2), (TP2_EP2_Z1, PP2_Z1), (PP2_EP2_Z1, DP2_Z3),
    (GROUPED_EP2_Z2, EP2_Z1), (INTERLEAVED, TP2_DP2_Z3), (OFFLOAD_Z3, TP2_Z1), (DP1_Z0, EP2_Z3),
]  # fmt: skip

SAME = [
    DP1_Z0, DP2_Z2, TP2_EP2_Z1, EP2_Z3, INTERLEAVED, OFFLOAD_Z3,
    *(setup(2, stage, precision="bf16") for stage in (1, 2, 3)), setup(4, 1, precision="bf16", tensor=2, expert=2),
]  # fmt: skip


def train(layout, save_to, load_from=None, first=0, last=SAVED, asynchronous=False):
    """On every rank: perhaps load, train, save at ``SAVED`` and ``last``; return losses and gradient norms."""
    mesh = topology.initialize(ParallelConfig(**layout.parallel), environment())
    recipe = build(layout, mesh)
    if load_from is not None:  # nothing of the initialization may be left
        for parameter in recipe.generator.parameters():
            parameter.data.fill_(7.0)
    loop = engine_loop(layout, recipe, mesh)
    engine = loop.engines["generator"]
    average = MovingAverage(engine, EmaConfig(decay=0.6, warmup=False))
    modules = {"generator": ModuleState(engine.deepspeed, average.tensors)}
    values = []
    with Checkpointer(save_to, CheckpointConfig(asynchronous=asynchronous)) as checkpointer:
        if load_from is not None:
            assert Checkpointer(load_from, CheckpointConfig()).load(modules) == {"step": first}
            checkpointer.save(first, modules, {"step": first})
        for step in range(first, last):
            result = loop.step(step)
            average.update(step)
            values.append((result["loss"], float(result["gradient_norm"])))
            if step + 1 in (SAVED, last):
                checkpointer.save(step + 1, modules, {"step": step + 1})
    return values


@functools.cache
def reference():
    curve = run_ranks(1, bare_curve, Setup())[0]
    return list(zip(curve.loss, curve.gradient_norm))


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """A function from a layout to the directory with its checkpoint of step ``SAVED``.

    Layouts of ``SAME`` are trained on to ``FINAL``; that checkpoint is in ``straight`` beside the directory.
    """
    roots = {}

    def save(layout):
        if str(layout) not in roots:
            root = roots[str(layout)] = tmp_path_factory.mktemp(str(layout)) / "saved"
            run_ranks(layout.world_size, train, layout, root, None, 0, FINAL if layout in SAME else SAVED)
            if layout in SAME:
                (root.parent / "straight").mkdir()
                (root / f"step-{FINAL:08d}").rename(root.parent / "straight" / f"step-{FINAL:08d}")
        return roots[str(layout)]

    return save


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_any_layout_continues_the_curve(source, target, sources, tmp_path):
    for values in run_ranks(target.world_size, train, target, tmp_path, sources(source), SAVED, FINAL):
        for (loss, norm), (expected_loss, expected_norm) in zip(values, reference()[SAVED:FINAL], strict=True):
            assert loss == pytest.approx(expected_loss, abs=TOLERANCE)
            assert norm == pytest.approx(expected_norm, abs=TOLERANCE)
    assert_same(read_everything(tmp_path, SAVED), read_everything(sources(source), SAVED))


@pytest.mark.parametrize("layout", SAME, ids=str)
def test_the_same_layout_continues_bitwise(layout, sources, tmp_path):
    source = sources(layout)
    run_ranks(layout.world_size, train, layout, tmp_path, source, SAVED, FINAL, True)
    expected = read_everything(source.parent / "straight", FINAL)
    assert_same(read_everything(tmp_path, FINAL), expected)
    moved = read_everything(source, SAVED)
    assert all(not torch.equal(expected[key], moved[key]) for key in expected if key.endswith("linear_qkv.weight"))


def sample(root, ema):
    """Tokens [24, L] of the first samples, drawn by one process from a checkpoint."""
    mesh = topology.initialize(ParallelConfig(), environment())
    recipe = build(Setup(), mesh)
    load_weights(recipe.generator, root, ema=ema)
    settings = NextScaleSampling(top_k=20, top_p=0.9)
    conditions = ClassConditions(recipe.classes)
    sampler = Sampler(
        recipe.generator, recipe.tokenizer, NextScale(settings), conditions, settings, torch.device("cpu")
    )
    return torch.from_numpy(sampler.draw(torch.arange(24)).arrays["tokens"].astype(np.int64))


@pytest.mark.parametrize("ema", [False, True], ids=["weights", "average"])
def test_samples_do_not_depend_on_the_layout_that_trained(ema, sources):
    """Each layout has trained on its own from the first step."""
    (expected,) = run_ranks(1, sample, sources(DP1_Z0), ema)
    assert expected.unique().numel() > 10
    for layout in (EP2_Z1, TP2_EP2_Z1, TP2_PP2_Z1, DP2_Z3, INTERLEAVED):
        assert torch.equal(run_ranks(1, sample, sources(layout), ema)[0], expected), layout
