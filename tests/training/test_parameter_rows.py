import pytest
import torch

from megavar.training.checkpoint.master import holdings, master_tensors
from megavar.training.parameter_rows import write_rows
from tests.distributed.harness import run_ranks
from tests.loops import run_pass
from tests.training import tiny

ROWS, VALUE = [1, 6], 50.0


def train(stage: int, precision: str):
    """One step, then two rows are replaced, then a step without learning: the rows on this rank before and after it."""
    engine, topology, micro_batch = tiny.build_engine(stage, precision=precision)

    def step(rate):
        run_pass(
            engine,
            tiny.local_micro_batches(0, topology, micro_batch),
            lambda model, item: model(item[0].to(next(engine.module.parameters()).dtype)),
            lambda output, item: tiny.loss_of(output, item[1]),
        )
        engine.step(rate, 0.0)

    def weight():
        if stage < 3:
            return engine.module.first.weight.detach().float()
        held = holdings(engine.deepspeed)[0]
        return held.piece.of(master_tensors(engine.deepspeed)).clone(), held.piece.start

    step(tiny.LEARNING_RATE)
    before = weight()
    rows, far = torch.tensor(ROWS), torch.full((2, 5), 2 * VALUE)
    write_rows([engine], engine.module.first.weight, rows, far)
    write_rows([engine], engine.module.first.weight, rows, torch.zeros(2, 5), torch.tensor([0.5, 0.5]))
    at_once = weight()
    step(0.0)
    return before, at_once, weight()


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16")])
def test_rows_are_replaced_for_good_and_the_others_untouched(stage, precision, ranks):
    for before, at_once, after in run_ranks(ranks, train, stage, precision):
        expected = before.clone()
        expected[ROWS] = VALUE
        assert torch.equal(at_once, expected)
        assert torch.equal(after, expected)


@pytest.mark.distributed
def test_rows_are_replaced_in_partitions_of_stage_3():
    places = torch.tensor([row * 5 + column for row in ROWS for column in range(5)])
    seen = 0
    for (before, start), _, (after, _) in run_ranks(2, train, 3, "fp32"):
        mine = places[(places >= start) & (places < start + len(before))] - start
        expected = before.clone()
        expected[mine] = VALUE
        assert torch.equal(after, expected)
        seen += len(mine)
    assert seen == len(places)
