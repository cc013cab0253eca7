"""Steps that are not finite, spikes and divergence: skipped, rolled back, given up, alike on all ranks."""

import dataclasses
import os
import signal

import pytest
import torch
import torch.distributed as dist

from megavar.errors import ExitCode, NonFiniteError
from megavar.training.trainer import Trainer
from tests.distributed.harness import run_ranks
from tests.loops import run_pass
from tests.training import tiny
from tests.training.test_trainer import train, weights

BAD = [2 * tiny.GLOBAL_BATCH + 7]  # one sample of step 2, on the last rank


def _with_bad_sample(directory, stage):
    return train(directory, stage=stage, recipe=tiny.TinyRecipe(BAD))[1]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_bad_step_is_skipped_on_all_ranks(tmp_path, stage):
    run_ranks(2, _with_bad_sample, tmp_path, stage)
    lines = tiny.read_metrics(tmp_path)
    assert [(line["event"], line["step"]) for line in lines if "event" in line] == [("not_finite", 3)]
    good = [line for line in lines if "event" not in line]
    assert [line["step"] for line in good] == [1, 2, 3, 4, 5, 6]
    assert ["gradient_norm" in line for line in good] == [True, True, False, True, True, True]
    assert all(line["loss"] < 2 for line in good if line["step"] != 3)
    assert good[-1]["skipped_steps"] == 1
    # Only the optimizer's counter differs from a run that had never seen the batch.
    expected = run_ranks(2, _without_step_2, tmp_path / "other", stage)
    assert [line["loss"] for line in good if line["step"] > 3] == pytest.approx(expected[0], rel=1e-5)


def _first_of_two_is_bad(directory):
    class Two(tiny.TinyRecipe):
        """Both learn the same; only the losses of the first have the bad sample."""

        def __init__(self):
            super().__init__()
            self.other = tiny.Model(1)

        def modules(self):
            return {"model": self.model, "other": self.other}

        def passes(self, module, step):
            self.poison = set(BAD) if module == "model" else set()
            return super().passes(module, step)

    return train(directory, recipe=Two())[0]


def test_a_step_counts_if_every_module_was_updated(tmp_path):
    assert run_ranks(2, _first_of_two_is_bad, tmp_path) == [ExitCode.FINISHED] * 2
    lines = tiny.read_metrics(tmp_path)
    assert [(line["event"], line["step"]) for line in lines if "event" in line] == [("not_finite", 3)]
    third = next(line for line in lines if "event" not in line and line["step"] == 3)
    assert "gradient_norm/other" in third and "gradient_norm/model" not in third


def _without_step_2(directory, stage):
    engine, topology, size = tiny.build_engine(stage)
    losses = []
    for step in (0, 1, 3, 4, 5):

        def loss(output, item, step=step):
            value = tiny.loss_of(output, item[1])
            if step > 2:
                losses.append(value.detach())
            return value

        run_pass(engine, tiny.local_micro_batches(step, topology, size), lambda model, x: model(x[0]), loss)
        engine.step(tiny.LEARNING_RATE, tiny.WEIGHT_DECAY)
    total = torch.stack(losses)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def _with_a_spike(directory):
    class Spikes(tiny.TinyRecipe):
        def loss(self, output, inputs, step):
            losses = super().loss(output, inputs, step)
            factor = 9.0 if step == 11 else 1.0
            return dataclasses.replace(losses, named={"loss": losses.named["loss"] * factor})

    return train(directory, steps=14, recipe=Spikes())[0]


def test_a_loss_spike_is_recorded(tmp_path):
    assert run_ranks(2, _with_a_spike, tmp_path) == [ExitCode.FINISHED] * 2
    (event,) = [line for line in tiny.read_metrics(tmp_path) if "event" in line]
    assert (event["event"], event["step"]) == ("loss_spike", 12)
    assert event["loss"] > 2 * event["median"]


RECOVERY = {"checkpoint": {"interval": 2}, "recovery": {"skips": 1, "rollbacks": 1}}


def _rolls_back(directory, bad_steps, steps):
    poison = [step * tiny.GLOBAL_BATCH + 7 for step in bad_steps]
    trainer = Trainer(tiny.build_run(directory, steps=steps, recipe=tiny.TinyRecipe(poison), train=RECOVERY))
    try:
        code = trainer.run()
    except NonFiniteError as error:
        return "stopped", trainer.step, trainer.data_step, str(error)
    return code, trainer.step, trainer.data_step, weights(trainer)


def test_repeated_bad_steps_roll_back_and_continue_with_later_data(tmp_path):
    results = run_ranks(2, _rolls_back, tmp_path, (5, 6), 8)
    for code, step, data_step, _ in results:
        # Steps 5 and 6 are bad. Nothing was saved after step 6, of which nothing was applied: back to step 4.
        assert (code, step, data_step) == (ExitCode.FINISHED, 8, 11)
    assert torch.equal(results[0][3], results[1][3])
    lines = tiny.read_metrics(tmp_path)
    rolled = [line for line in lines if line.get("event") == "rolled_back"]
    assert [(line["step"], line["from_step"], line["data_step"]) for line in rolled] == [(4, 7, 7)]
    good = [line for line in lines if "event" not in line]
    assert [line["step"] for line in good] == [1, 2, 3, 4, 5, 6, 7, 8]
    seen = [1, 2, 3, 4, 8, 9, 10, 11]  # batches of 8 of 100 samples, those that were skipped for good included
    assert [line["epoch"] for line in good] == pytest.approx([8 * batches / 100 for batches in seen])


def test_a_run_that_stays_bad_ends_alike_on_all_ranks(tmp_path):
    results = run_ranks(2, _rolls_back, tmp_path, range(3, 40), 20)
    assert results[0] == results[1]
    assert results[0][0] == "stopped"
    assert "train.recovery.rollbacks=1 are used up" in results[0][3]
    assert not (tmp_path / "DONE").exists()


LONG = {"checkpoint": {"interval": 2, "keep_last": 1}, "recovery": {"skips": 50, "rollbacks": 1}}


def _streak(directory, bad_steps, steps, stop_at=None):
    poison = [step * tiny.GLOBAL_BATCH + 7 for step in bad_steps]
    trainer = Trainer(tiny.build_run(directory, steps=steps, recipe=tiny.TinyRecipe(poison), train=LONG))
    saved = []
    save = trainer.checkpointer.save

    def note(step, *arguments):
        saved.append(step)
        save(step, *arguments)
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGUSR2)

    trainer.checkpointer.save = note
    try:
        code = trainer.run()
    except NonFiniteError as error:
        code = str(error)
    kept = sorted(path.name for path in (directory / "checkpoints").glob("step-*"))
    return code, saved, kept, trainer.step


def test_nothing_is_saved_while_steps_are_not_applied(tmp_path):
    """Four due saves fall into the streak: the first good step after it saves once, and the last good one survives."""
    for code, saved, kept, _ in run_ranks(2, _streak, tmp_path, range(5, 13), 18):
        assert (code, saved) == (ExitCode.FINISHED, [2, 4, 14, 16, 18])
        assert kept == ["step-00000018"]


def test_an_agreed_stop_within_a_streak_keeps_the_good_checkpoint(tmp_path):
    for code, saved, kept, step in run_ranks(2, _streak, tmp_path, range(4, 40), 40, 4):
        assert (code, saved, kept) == (ExitCode.PREEMPTED, [2, 4], ["step-00000004"])
        assert step == 5


def test_the_end_of_a_run_needs_an_applied_step(tmp_path):
    """Going back and past the bad batch; a run that cannot does not finish."""
    for code, saved, kept, step in run_ranks(2, _streak, tmp_path / "one", [9], 10):
        assert (code, saved, kept, step) == (ExitCode.FINISHED, [2, 4, 6, 8, 10], ["step-00000010"], 10)
    lines = tiny.read_metrics(tmp_path / "one")
    assert [(line["step"], line["data_step"]) for line in lines if line.get("event") == "rolled_back"] == [(8, 10)]
    for code, saved, kept, _ in run_ranks(2, _streak, tmp_path / "all", range(9, 99), 10):
        assert "train.recovery.rollbacks=1 are used up" in code
        assert (saved, kept) == ([2, 4, 6, 8], ["step-00000008"])
        assert not (tmp_path / "all" / "DONE").exists()


def test_without_a_checkpoint_a_bad_start_ends_the_run(tmp_path):
    assert "no checkpoint to go back to" in run_ranks(1, _rolls_back, tmp_path, range(0, 10), 20)[0][3]


def _diverges(directory):
    class Growing(tiny.TinyRecipe):
        def loss(self, output, inputs, step):
            losses = super().loss(output, inputs, step)
            losses.named["loss"] = losses.named["loss"] * (1 if step < 4 else 300)
            return losses

    trainer = Trainer(tiny.build_run(directory, steps=50, recipe=Growing(), train={"checkpoint": {"interval": 2}}))
    with pytest.raises(NonFiniteError) as caught:
        trainer.run()
    return str(caught.value), caught.value.exit_code, trainer.step


def test_a_run_that_diverges_does_not_finish(tmp_path):
    """Its losses are finite: it trained to the end, 300 times above guessing, and left with 0."""
    for message, code, step in run_ranks(2, _diverges, tmp_path):
        assert code == ExitCode.NON_FINITE and step == 7, "three of five logged losses are far above the first"
        assert "tiny has diverged" in message and "train.recovery.divergence_factor=10.0" in message
    assert not (tmp_path / "DONE").exists()
    assert [line["event"] for line in tiny.read_metrics(tmp_path) if "event" in line] == ["diverged"]
