"""The loop: losses, resuming, averages, rates, previews, on one and two real ranks."""

import itertools
import json
import logging
import math
import os
import signal

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from megavar.config.optimizer import CosineSchedule
from megavar.errors import ConfigError, ExitCode
from megavar.training.expectation import Expectation, ExpectationObserver
from megavar.training.trainer import Trainer
from tests.distributed.harness import run_ranks
from tests.training import tiny


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.recipe.model.parameters()])


def train(directory, **options):
    trainer = Trainer(tiny.build_run(directory, **options))
    code = trainer.run()
    return code, weights(trainer)


@pytest.mark.parametrize("ranks, stage", [(1, 0), (2, 0), (1, 1), (2, 1), (2, 2)])
def test_the_loss_curve_is_that_of_plain_torch(tmp_path, ranks, stage):
    codes = [code for code, _ in run_ranks(ranks, _train_stage, tmp_path, stage)]
    assert codes == [ExitCode.FINISHED] * ranks
    metrics = tiny.read_metrics(tmp_path)
    expected = tiny.reference(6)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    for line, (loss, norm) in zip(metrics, expected, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        assert line["gradient_norm"] == pytest.approx(norm, rel=1e-5)
        assert sum(line[f"labels/{i}"] for i in range(3)) == tiny.GLOBAL_BATCH
    assert (tmp_path / "DONE").exists()


def _train_stage(directory, stage):
    return train(directory, stage=stage)


def _expecting(directory):
    return train(directory, observers=[ExpectationObserver(Expectation(0.5, 2**30, "assumed"), 1)])


def test_what_was_expected_is_compared_once(tmp_path):
    run_ranks(1, _expecting, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (event,) = [line for line in lines if line.get("event") == "expectation"]
    (measured,) = [line for line in lines if "loss" in line and line["step"] == 2]  # the first one warms up
    assert event["step"] == 2 and event["step_seconds"] == measured["step_seconds"]
    assert event["step_seconds_ratio"] == pytest.approx(measured["step_seconds"] / 0.5)
    assert event["expected_memory_gib"] == 1.0 and event["source"] == "assumed"


def _accumulated(directory):
    return train(directory, train={"micro_batch_size": 2}, flops_per_image=3e9, peak_flops=1e12)


def test_accumulation_gives_the_same_curve(tmp_path):
    run_ranks(2, _accumulated, tmp_path)
    for line, (loss, norm) in zip(tiny.read_metrics(tmp_path), tiny.reference(6), strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        assert line["gradient_norm"] == pytest.approx(norm, rel=1e-5)
        if "images_per_second" in line:  # of a device, and there are two
            utilization = line["images_per_second"] / 2 * 3e9 / 1e12
            assert line["model_flops_utilization"] == pytest.approx(utilization, rel=1e-3)
    assert "model_flops_utilization" in line


EMA = {"ema": {"decay": 0.9}, "checkpoint": {"interval": 2}}


def _dies_after(directory, step):
    run = tiny.build_run(directory, train=EMA)

    class Dies(tiny.TinyRecipe):
        def after_step(self, taken, write_rows):
            if taken + 1 == step:
                os.kill(os.getpid(), signal.SIGKILL)

    object.__setattr__(run, "recipe", Dies())
    Trainer(run).run()


def _with_average(directory):
    trainer = Trainer(tiny.build_run(directory, train=EMA))
    code = trainer.run()
    average = trainer.averages["model"].tensors
    return code, weights(trainer), [tensor.clone() for tensor in average]


def test_a_killed_run_continues_bitwise(tmp_path):
    from tests.distributed.harness import RankFailure

    straight = run_ranks(2, _with_average, tmp_path / "straight")
    with pytest.raises(RankFailure, match="exit code -9"):
        run_ranks(2, _dies_after, tmp_path / "killed", 5)
    assert [line["step"] for line in tiny.read_metrics(tmp_path / "killed")] == [1, 2, 3, 4]
    resumed = run_ranks(2, _with_average, tmp_path / "killed")
    for (_, expected, expected_average), (code, got, got_average) in zip(straight, resumed, strict=True):
        assert code == ExitCode.FINISHED
        assert torch.equal(got, expected)
        assert all(torch.equal(a, b) for a, b in zip(got_average, expected_average, strict=True))
    lines, expected_lines = tiny.read_metrics(tmp_path / "killed"), tiny.read_metrics(tmp_path / "straight")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected_lines]


def test_a_finished_run_returns_at_once_and_other_settings_are_refused(tmp_path):
    run_ranks(1, train, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert run_ranks(1, train, tmp_path)[0][0] == ExitCode.FINISHED
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    message = run_ranks(2, _refused, tmp_path)
    assert message[0] == message[1]
    assert "train.steps is 6 there and 7 here" in message[0]


def _refused(directory):
    with pytest.raises(ConfigError) as caught:
        train(directory, steps=7)
    return str(caught.value)


BAD = [2 * tiny.GLOBAL_BATCH + 7]  # one sample of step 2, on the last rank


def _uneven(directory, train):
    with pytest.raises(ConfigError) as caught:
        Trainer(tiny.build_run(directory, train=train))
    return str(caught.value)


def test_batches_that_do_not_divide_are_refused_with_the_remedy(tmp_path):
    assert "a multiple of 2, for example 8" in run_ranks(2, _uneven, tmp_path, {"global_batch_size": 7})[0]
    assert not (tmp_path / "metrics.jsonl").exists()


def _draws_previews(directory):
    seen = []

    def preview(step):
        seen.append((step, weights(trainer).clone()))
        return Image.new("RGB", (8, 8)) if dist.get_rank() == 0 else None

    run = tiny.build_run(directory, train=EMA, preview=preview)
    object.__setattr__(run, "logging", run.logging.model_copy(update={"samples_interval": 4}))
    trainer = Trainer(run)
    trainer.run()
    return [step for step, _ in seen], seen[-1][1], weights(trainer)


def test_previews_use_the_average_and_leave_the_weights_alone(tmp_path):
    for steps, during, after in run_ranks(2, _draws_previews, tmp_path):
        assert steps == [4, 6]
        assert not torch.equal(during, after)
    names = [path.name for path in sorted((tmp_path / "samples").iterdir())]
    assert names == ["step-00000004.png", "step-00000006.png"]
    assert torch.equal(after, run_ranks(2, _with_average, tmp_path / "undisturbed")[0][1])


_RATES = {"schedule": CosineSchedule(warmup_steps=2, final_lr=1e-3), "final_weight_decay": 0.2}


def _warms_up(directory):
    """Weights before every step and at the end, and the rates that the optimizer had in each."""
    run = tiny.build_run(directory, steps=4)
    object.__setattr__(run, "optimizer", run.optimizer.model_copy(update=_RATES))
    trainer, history, rates = Trainer(run), [], []
    after_step = trainer.recipe.after_step

    def note(*arguments):
        history.append(weights(trainer))
        groups = trainer.engines["model"].deepspeed.optimizer.param_groups
        rates.append([(group["lr"], group["weight_decay"]) for group in groups])
        after_step(*arguments)

    trainer.recipe.after_step = note
    before = weights(trainer)
    trainer.run()
    return [before, *history], rates


def test_the_rates_that_are_logged_are_those_of_the_step_taken(tmp_path):
    """The first step of a warm-up from 0 changes nothing and says so; biases do not decay."""
    history, rates = run_ranks(2, _warms_up, tmp_path)[0]
    learning = pytest.approx([0, 5e-3, 1e-2, 5.5e-3])
    decay = pytest.approx([0.2 - 0.15 * (0.5 + 0.5 * math.cos(math.pi * step / 3)) for step in range(4)])
    lines = tiny.read_metrics(tmp_path)
    assert [line["learning_rate"] for line in lines] == learning
    assert [line["weight_decay"] for line in lines] == decay
    for group, expected in enumerate((decay, [0.0] * 4)):
        assert [step[group][0] for step in rates] == learning
        assert [step[group][1] for step in rates] == expected
    moved = [float((after - before).abs().max()) for before, after in itertools.pairwise(history)]
    assert moved[0] == 0
    assert moved[1] == pytest.approx(5e-3, rel=0.5) and moved[2] > moved[1] > 0


def _averages(directory):
    """Weights after every step that is applied, and the average at the end."""
    ema, recipe = {"decay": 0.15, "warmup": True, "start_step": 1}, tiny.TinyRecipe(BAD)
    trainer, history = Trainer(tiny.build_run(directory, steps=5, train={"ema": ema}, recipe=recipe)), []
    trainer.recipe.after_step = lambda *arguments: history.append(weights(trainer))
    trainer.run()
    with trainer.averages["model"].as_weights():
        return history, weights(trainer)


def test_the_average_takes_in_every_step_at_its_decay(tmp_path):
    """Before step 1 it is the weights; then step 1 keeps 1 / 10 of it, steps 3 and 4 0.15, and 2 is not applied."""
    for history, average in run_ranks(2, _averages, tmp_path):
        expected = history[0]
        for after, decay in zip(history[1:], (0.1, 0.15, 0.15), strict=True):
            expected = decay * expected + (1 - decay) * after
        torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7)
        assert not torch.allclose(average, history[-1], rtol=1e-4)


def _drops(directory):
    class Dropping(tiny.TinyRecipe):
        def __init__(self):
            super().__init__()
            self.model.add_module("noise", torch.nn.Dropout(0.1))

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("megavar.training.step").addHandler(handler)
    Trainer(tiny.build_run(directory, recipe=Dropping()))
    return messages


def test_dropout_that_depends_on_ranks_is_pointed_out(tmp_path):
    (message,) = run_ranks(1, _drops, tmp_path)[0]
    assert message.startswith("model: noise draw from torch's global generator")
