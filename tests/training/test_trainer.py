"""The loop: losses, resuming, stopping, recovering, on one and two real ranks."""

import dataclasses
import itertools
import json
import logging
import math
import os
import random
import shutil
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
import yaml
from PIL import Image

from megavar.config.optimizer import CosineSchedule
from megavar.errors import ClusterError, ConfigError, ExitCode, NonFiniteError
from megavar.training.expectation import Expectation, ExpectationObserver
from megavar.training.trainer import Trainer
from tests.distributed.harness import run_ranks
from tests.loops import run_pass
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


def _starts_of_a_launcher(directory):
    """Three jobs, one behind the other, that start the configuration that the run directory keeps."""
    os.environ["MEGAVAR_ATTEMPT"] = "7"
    steps = []
    for _ in range(3):
        options = yaml.safe_load((directory / "config.yaml").read_text())["train"]
        trainer = Trainer(tiny.build_run(directory, train=options))
        trainer.stop.seen = signal.SIGUSR2  # asked to stop after its first step
        assert trainer.run() == ExitCode.PREEMPTED
        steps.append(trainer.step)
    return steps


def test_a_fresh_start_happens_once(tmp_path):
    """Otherwise every job of a chain would move away what the one before it has saved."""
    run_ranks(1, train, tmp_path)
    kept = yaml.safe_load((tmp_path / "config.yaml").read_text())
    kept["train"]["fresh"] = True  # as the launcher writes it for a new submission
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(kept))
    assert run_ranks(2, _starts_of_a_launcher, tmp_path) == [[1, 2, 3]] * 2
    (moved,) = tmp_path.glob("checkpoints.before-*")
    assert (moved / "step-00000006/manifest.json").exists()


def _refused(directory):
    with pytest.raises(ConfigError) as caught:
        train(directory, steps=7)
    return str(caught.value)


def _second_start(directory):
    run = tiny.build_run(directory)
    run.directory.acquire()
    with pytest.raises(ClusterError) as caught:
        Trainer(tiny.build_run(directory)).run()
    return str(caught.value)


def test_a_live_run_is_not_started_twice(tmp_path):
    assert "is in use by process" in run_ranks(1, _second_start, tmp_path)[0]


def _stops_at_skewed_signals(directory, delays, steps):
    """Each rank signals itself at another time while the steps go on."""
    delay = delays[dist.get_rank()]

    class Slow(tiny.TinyRecipe):
        def after_step(self, step, write_rows):
            time.sleep(0.02)

    trainer = Trainer(tiny.build_run(directory, steps=steps, recipe=Slow()))
    if delay is not None:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGUSR2)).start()
    return trainer.run(), trainer.step


@pytest.mark.parametrize("delays", [(0.0, 0.5), (0.5, 0.0), (0.0, None), (0.1, 0.15)])
def test_skewed_signals_stop_all_ranks_after_one_agreed_step(tmp_path, delays):
    results = run_ranks(2, _stops_at_skewed_signals, tmp_path, delays, 1000)
    assert results[0] == results[1]
    code, step = results[0]
    assert code == ExitCode.PREEMPTED
    assert (tmp_path / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()
    assert not (tmp_path / "DONE").exists()


def _interrupted(directory, presses):
    """Ctrl-C at a terminal, once or twice, in the middle of step 3."""
    trainer = Trainer(tiny.build_run(directory, steps=1000))
    beat = trainer.watchdog.beat

    def press(step):
        beat(step)
        for _ in range(presses if step == 3 else 0):
            os.kill(os.getpid(), signal.SIGINT)

    trainer.watchdog.beat = press
    try:
        return trainer.run(), trainer.step
    except KeyboardInterrupt:
        return "interrupted", trainer.step


def test_ctrl_c_saves_and_stops_and_twice_stops_at_once(tmp_path):
    assert run_ranks(1, _interrupted, tmp_path / "once", 1) == [(ExitCode.PREEMPTED, 3)]
    assert (tmp_path / "once/checkpoints/step-00000003/manifest.json").exists()
    assert run_ranks(1, _interrupted, tmp_path / "twice", 2) == [("interrupted", 3)]
    assert not (tmp_path / "twice/checkpoints").exists()


def _stops_again_and_again(directory, rounds):
    """The signals of a round come 0 to 500 ms apart; those that come late find the run ended."""
    generator, results = random.Random(0), []
    for number in range(rounds):
        delays = [generator.uniform(0, 0.5) for _ in range(dist.get_world_size())]
        options = {"agreement_interval": 1 + number}
        trainer = Trainer(tiny.build_run(directory / str(number), steps=10**6, train=options))
        late = threading.Timer(delays[dist.get_rank()], os.kill, (os.getpid(), signal.SIGUSR2))
        late.start()
        results.append((trainer.run(), trainer.step))
        late.join()
    return results


def test_skewed_signals_never_make_ranks_disagree(tmp_path):
    results = run_ranks(4, _stops_again_and_again, tmp_path, 4)
    assert all(result == results[0] for result in results)
    assert {code for code, _ in results[0]} == {ExitCode.PREEMPTED}
    for number, (_, step) in enumerate(results[0]):
        assert step % (1 + number) == 0
        assert (tmp_path / f"{number}/checkpoints/step-{step:08d}/manifest.json").exists()


BAD = [2 * tiny.GLOBAL_BATCH + 7]  # one sample of step 2, on the last rank


def _with_bad_sample(directory, stage):
    return train(directory, stage=stage, recipe=tiny.TinyRecipe(BAD))[1]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
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


def _vanishes(directory, at, what):
    trainer = Trainer(tiny.build_run(directory, steps=6, train={"checkpoint": {"interval": 2}}))
    beat = trainer.watchdog.beat

    def remove(step):
        beat(step)
        if step == at and dist.get_rank() == 0:
            if what == "directory":
                shutil.rmtree(directory)
            else:
                (directory / "run.lock").unlink()

    trainer.watchdog.beat = remove
    try:
        return trainer.run()
    except ClusterError as error:
        return str(error)


@pytest.mark.parametrize("at, what", [(3, "directory"), (6, "directory"), (5, "lock")])
def test_a_run_whose_directory_vanishes_does_not_finish(tmp_path, at, what):
    """It was made anew by the next save, with DONE in it."""
    directory = tmp_path / "run"
    for message in run_ranks(2, _vanishes, directory, at, what):
        assert f"{directory} was removed under a run" in message
    assert not (directory / "DONE").exists()
    assert directory.exists() == (what == "lock")


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
