"""A checkpoint of any layout continues under any other: every kind of parameter and buffer, and the readers.

What is loaded must be, bit for bit, what was saved: weights, both moments, average and buffers. Training on must then
follow the run of one process without ZeRO. The model's training is element-wise (tests/checkpoint/layered.py), so this
holds to the last bits, in which torch's fused AdamW depends on where in a flat partition an element lies.
"""

import pytest
import torch

from megavar.config.checkpoint import CheckpointConfig
from megavar.training.checkpoint import Checkpointer, load_weights, master, read_weights
from megavar.training.checkpoint.state import ModuleState
from tests.checkpoint.conftest import FINAL, SAVED, assert_same, read_everything
from tests.checkpoint.layered import Layout, Run
from tests.distributed.harness import run_ranks

Z0, Z1, Z2 = (Layout(1, stage) for stage in range(3))
DP2_Z0, DP2_Z1, DP2_Z2, DP2_Z3 = (Layout(2, stage) for stage in range(4))
DP4_Z1, TP2_Z1, TP2_PP2_Z1 = Layout(4, 1), Layout(2, 1, tensor=2), Layout(4, 1, tensor=2, pipeline=2)
EP4_Z2, TP2_EP2_Z1 = Layout(4, 2, expert=4), Layout(4, 1, tensor=2, expert=2)
PP2_EP2_Z1, OFFLOAD_Z3 = Layout(4, 1, pipeline=2, expert=2), Layout(2, 3, offload=True)

PAIRS = [
    (Z0, Z0), (DP4_Z1, Z0), (DP2_Z0, Z2), (DP4_Z1, DP2_Z3), (DP2_Z3, DP2_Z3), (DP2_Z3, DP2_Z2), (TP2_PP2_Z1, Z1),
    (EP4_Z2, TP2_EP2_Z1), (TP2_EP2_Z1, PP2_EP2_Z1), (OFFLOAD_Z3, EP4_Z2),
]  # fmt: skip


def continue_run(layout, source, target):
    """On every rank: load ``source`` into a model with other weights, save to ``target``, train on, save again."""
    run = Run(layout, seed=5)
    state = Checkpointer(source, CheckpointConfig()).load({"model": run.state})
    assert state == {"step": SAVED}
    assert set(master.get_steps(run.engine)) == {SAVED}
    with Checkpointer(target, CheckpointConfig()) as checkpointer:
        checkpointer.save(SAVED, {"model": run.state}, {"step": SAVED})
        for step in range(SAVED, FINAL):
            run.step(step)
        checkpointer.save(FINAL, {"model": run.state}, {"step": FINAL})
    assert set(master.get_steps(run.engine)) == {FINAL}


@pytest.mark.distributed
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda layout: str(layout))
def test_any_layout_continues_under_any_other(source, target, saved, reference, tmp_path):
    run_ranks(target.world, continue_run, target, saved(source), tmp_path)
    assert_same(read_everything(tmp_path, SAVED), read_everything(saved(source), SAVED))
    actual = read_everything(tmp_path, FINAL)
    assert actual.keys() == reference.keys()
    for key, expected in reference.items():
        torch.testing.assert_close(
            actual[key], expected, rtol=2e-6, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}"
        )
    if source == target:
        assert_same(actual, read_everything(saved(source, FINAL), FINAL))


def loss_of_loaded(layout, source):
    """Of the module itself: what it computes with, not what the optimizer holds."""
    run = Run(layout, seed=0 if source is None else 5)
    if source is not None:
        run.engine(9)  # ZeRO-3 keeps what it gathers here
        Checkpointer(source, CheckpointConfig()).load({"model": run.state})
    else:
        for step in range(SAVED):
            run.step(step)
    return run.engine(9).item()


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [Z0, DP2_Z1, DP2_Z3, OFFLOAD_Z3], ids=str)
def test_the_module_computes_with_what_was_loaded(layout, saved):
    (expected,) = run_ranks(1, loss_of_loaded, Z0, None)
    for loss in run_ranks(layout.world, loss_of_loaded, layout, saved(Z0)):
        assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.distributed
def test_bfloat16_with_float32_accumulation_continues_bitwise(saved, tmp_path):
    """DeepSpeed's BF16_Optimizer, which keeps its master weights under other names."""
    layout = Layout(2, 1, bfloat16=True, fp32_accumulation=True)
    run_ranks(2, continue_run, layout, saved(layout), tmp_path)
    assert_same(read_everything(tmp_path, FINAL), read_everything(saved(layout, FINAL), FINAL))


def _load_weights(layout, source, ema):
    run = Run(layout, seed=5)
    if layout.stage != 3:
        load_weights(run.engine.module, source, "model", ema)
        return {name: parameter.detach().clone() for name, parameter in run.engine.module.named_parameters()}
    return {}


@pytest.mark.distributed
@pytest.mark.parametrize("ema", [False, True])
def test_weights_are_read_whole_and_into_a_shard(ema, saved):
    root = saved(TP2_PP2_Z1)
    whole = read_weights(root, "model", ema)
    stored = read_everything(root, SAVED)
    kind = "average" if ema else "weight"
    assert len(whole) == len([key for key in stored if key.startswith(("model/weight", "model/buffer"))])
    assert torch.equal(whole["blocks.1.row.weight"], stored[f"model/{kind}/blocks.1.row.weight"])
    assert whole["blocks.1.seen"].tolist() == [SAVED] * 3
    first, second = run_ranks(2, _load_weights, TP2_Z1, root, ema)
    for half, columns in ((first, slice(0, 8)), (second, slice(8, 16))):
        assert torch.equal(half["blocks.1.row.weight"], whole["blocks.1.row.weight"][:, columns])
        stacked = half["blocks.0.stacked.experts.linear_fc2_weight"]
        for expert in range(4):
            assert torch.equal(stacked[expert], whole[f"blocks.0.stacked.experts.{expert}.linear_fc2.weight"])


def _exchange(layout):
    run = Run(layout)
    run.step(0)
    before = [tensor.detach().clone() for tensor in master.master_tensors(run.engine)]
    average = [tensor.clone() for tensor in run.average]
    outputs = [run.engine(3).item()]
    with master.exchanged(run.engine, run.average):
        outputs.append(run.engine(3).item())
        assert all(map(torch.equal, master.master_tensors(run.engine), average))
    outputs.append(run.engine(3).item())
    assert all(map(torch.equal, master.master_tensors(run.engine), before))
    assert all(map(torch.equal, run.average, average))
    return outputs


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [Z0, DP2_Z1, DP2_Z3, Layout(2, 3, bfloat16=True)], ids=str)
def test_the_average_can_be_exchanged_with_the_weights_and_back(layout):
    for plain, averaged, again in run_ranks(layout.world, _exchange, layout):
        assert plain == again
        assert plain != averaged


def _average_of_a_run_without(source):
    run = Run(DP2_Z1, seed=5)
    Checkpointer(source, CheckpointConfig()).load({"model": run.state})
    return all(map(torch.equal, run.average, master.master_tensors(run.engine)))


def _save_without_average(root):
    run = Run(Z1)
    Checkpointer(root, CheckpointConfig()).save(1, {"model": ModuleState(run.engine)}, {})


@pytest.mark.distributed
def test_averaging_that_is_switched_on_later_starts_from_the_weights(tmp_path):
    run_ranks(1, _save_without_average, tmp_path)
    assert run_ranks(2, _average_of_a_run_without, tmp_path) == [True, True]
