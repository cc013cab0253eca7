"""How runs begin and end: signals, Ctrl-C, fresh starts, locks, directories that vanish."""

import os
import random
import shutil
import signal
import threading
import time

import pytest
import torch.distributed as dist
import yaml

from megavar.errors import ClusterError, ExitCode
from megavar.training.trainer import Trainer
from tests.distributed.harness import run_ranks
from tests.training import tiny
from tests.training.test_trainer import train


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


@pytest.mark.parametrize("delays", [(0.0, 0.5), (0.0, None)])
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
