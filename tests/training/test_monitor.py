import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from megavar.config.logging import LoggingConfig
from megavar.config.train import RecoveryConfig
from megavar.training.monitor import MetricsFile, Monitor, Stopwatch
from megavar.training.recovery import Recovery, Verdict
from megavar.training.run_directory import RunDirectory


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_of_a_crashed_attempt_are_not_repeated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in (10, 20, 30, 40):
        file.write({"step": step, "loss": float(step)})
    file.close()
    with path.open("ab") as raw:
        raw.write(b'{"step": 50, "lo')  # cut off by a crash
    file = MetricsFile(path, 20)  # the last checkpoint was of step 20
    file.write({"step": 30, "loss": 31.0})
    file.close()
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(10, 10.0), (20, 20.0), (30, 31.0)]
    kept = (tmp_path / "metrics.discarded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept[:2]] == [30, 40] and kept[2] == '{"step": 50, "lo'


def test_a_file_without_later_lines_is_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, 0).write({"step": 1})
    before = path.stat().st_ino
    MetricsFile(path, 1).close()
    assert path.stat().st_ino == before and not (tmp_path / "metrics.discarded.jsonl").exists()


def test_speed_and_shares():
    watch = Stopwatch()
    watch._steps = [1.0] * 18 + [2.0, 5.0]
    watch._parts = {"data": 5.0, "checkpoint": 3.0}
    read = watch.read(images_per_step=10)
    assert read["images_per_second"] == pytest.approx(200 / 25)
    assert read["step_seconds"] == 1.0 and read["step_seconds_p95"] == 2.0 and read["step_seconds_max"] == 5.0
    assert read["data_wait_share"] == pytest.approx(0.2)
    assert read["checkpoint_seconds"] == 3.0
    assert watch.read(10) == {}


def monitor(tmp_path, rank=0, **options):
    settings = {"progress": "lines", "lines_seconds": 0, "wandb": {"mode": "disabled"}} | options
    return Monitor(LoggingConfig.model_validate(settings), RunDirectory(tmp_path), "name", rank, 10)


def test_progress_lines_and_pictures(tmp_path, capsys):
    shown = monitor(tmp_path)
    shown.open(0, {})
    shown.log({"step": 5, "loss": 1.25, "images_per_second": 12.5})
    shown.advance(5)
    shown.save_picture(5, Image.new("RGB", (128, 64), (200, 200, 200)))
    shown.close()
    printed = capsys.readouterr().err
    assert "name  step 5/10  loss 1.250  12.5 images/s  0 s left" in printed
    assert lines(tmp_path / "metrics.jsonl")[0]["loss"] == 1.25
    with Image.open(tmp_path / "samples" / "step-00000005.png") as image:
        assert image.getpixel((10, 10)) == (200, 200, 200)


def test_other_ranks_write_nothing(tmp_path):
    silent = monitor(tmp_path, rank=1)
    silent.open(0, {})
    silent.log({"step": 5, "loss": 1.25})
    silent.event(5, "something")
    silent.advance(5)
    silent.close()
    silent.console.say("something")
    assert list(tmp_path.iterdir()) == []


def test_wandb_offline_keeps_its_run_id(tmp_path):
    for step in (0, 5):
        shown = monitor(tmp_path, wandb={"mode": "offline"}, progress="none")
        shown.open(step, {"some": {"key": 1}})
        shown.log({"step": step + 1, "loss": 1.0})
        shown.close()
    identity = (tmp_path / "wandb_id").read_text().strip()
    runs = [path.name for path in (tmp_path / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert runs and all(identity in name for name in runs)  # W&B numbers two runs of one second


def test_a_full_disk_loses_neither_the_run_nor_its_metrics(tmp_path, monkeypatch, caplog):
    shown = monitor(tmp_path, progress="none")
    shown.open(0, {})
    shown.log({"step": 1, "loss": 1.0})
    file = shown._metrics._file
    with Path("/dev/full").open("ab", buffering=0) as full:
        shown._metrics._file = full
        shown.log({"step": 2, "loss": 2.0})
        shown.event(2, "something")
    assert "No space left on device" in caplog.text
    shown._metrics._file = file
    shown.log({"step": 3, "loss": 3.0})
    (tmp_path / "samples").write_text("in the way")
    shown.save_picture(3, Image.new("RGB", (8, 8)))
    assert "preview" in caplog.text
    shown.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 2, 3]


def test_a_picture_that_wandb_cannot_take_ends_no_run(tmp_path, monkeypatch, caplog):
    class Service:
        def log(self, *_, **__):
            raise AssertionError("not reached")

        def finish(self):
            pass

    def fails(*_):
        raise OSError(28, "No space left on device")

    shown = monitor(tmp_path, progress="none")
    shown.open(0, {})
    shown._wandb = Service()
    monkeypatch.setattr("wandb.Image", fails)
    shown.save_picture(3, Image.new("RGB", (8, 8)))
    assert "W&B is lost" in caplog.text and (tmp_path / "samples" / "step-00000003.png").exists()


def test_recovery_counts():
    recovery = Recovery(RecoveryConfig(skips=2, rollbacks=1))
    assert [recovery.judge(ok) for ok in (True, False, False, True, False, False)] == [Verdict.CONTINUE] * 6
    assert recovery.judge(False) is Verdict.ROLL_BACK
    recovery.rolled_back()
    assert [recovery.judge(False) for _ in range(3)] == [Verdict.CONTINUE, Verdict.CONTINUE, Verdict.STOP]
    recovery.judge(True)
    recovery.saved()
    assert [recovery.judge(False) for _ in range(3)][-1] is Verdict.ROLL_BACK
    assert recovery.skipped == 11
    recovery.judge(True)
    assert recovery.judge(False, last=True) is Verdict.ROLL_BACK, "a run does not end with a skipped step"


@pytest.mark.parametrize(
    ("skips", "rollbacks", "verdicts"),
    [
        (2, 1, ["continue", "continue", "roll_back", "continue", "continue", "stop"]),
        (0, 2, ["roll_back", "roll_back", "stop"]),
        (1, 0, ["continue", "stop"]),
        (0, 0, ["stop"]),
    ],
)
def test_skipping_rolling_back_and_stopping_are_each_configurable(skips, rollbacks, verdicts):
    recovery = Recovery(RecoveryConfig(skips=skips, rollbacks=rollbacks))
    found = []
    while "stop" not in found:
        found.append(recovery.judge(applied=False).value)
        if found[-1] == "roll_back":
            recovery.rolled_back()
    assert found == verdicts


def test_loss_spikes():
    recovery = Recovery(RecoveryConfig(spike_factor=2.0))
    assert [recovery.spike(1.0 + 0.01 * i) for i in range(20)] == [None] * 20
    assert [recovery.spike(float("nan")), recovery.spike(float("inf"))] == [None, None]
    assert recovery.spike(2.5) == pytest.approx(1.095)
    assert recovery.spike(1.2) is None and recovery.spike(None) is None
    young = Recovery(RecoveryConfig(spike_factor=2.0))
    assert [young.spike(loss) for loss in (*[1.0] * 9, 50.0)] == [None] * 10, "nine losses are too short a past"
    assert young.spike(50.0) == 1.0


def test_divergence_is_seen_once_losses_stay_far_above_the_first():
    def found(losses, state=None, **settings):
        recovery = Recovery(RecoveryConfig(**settings))
        if state is not None:
            recovery.load_state(state)
        return [recovery.diverged(loss) for loss in losses]

    assert found([4.0, 1203.0, 3.9, 3.8, 900.0, 3.7, 3.6]) == [None] * 7, "spikes"
    assert found([4.0] * 3 + [39.0] * 9) == [None] * 12, "less than ten times"
    assert found([4.0, 50.0, 300.0, 900.0, 1203.0, 1300.0]) == [None] * 4 + [(4.0, 300.0), (4.0, 900.0)]
    assert found([None, float("nan"), 4.0, 50.0, 50.0, 50.0, 50.0])[-1] == (4.0, 50.0)
    assert found([4.0] + [1e9] * 9, divergence_factor=None) == [None] * 10
    assert found([-1.0] + [1e9] * 9) == [None] * 10, "a loss without a scale"
    resumed = found([50.0] * 5, {"skipped": 0, "first_loss": 4.0})
    assert resumed == [None] * 4 + [(4.0, 50.0)], "the first loss of the run, not of the attempt"
    assert found([50.0] * 5, {"skipped": 0}) == [None] * 5, "of a version that did not keep it"


def test_a_trace_of_the_named_steps(tmp_path):
    import gzip

    from megavar.config.logging import ProfileConfig
    from megavar.training.profiler import Profiler

    for rank in (0, 1):
        profiler = Profiler(ProfileConfig(after=2, steps=2), tmp_path, rank)
        for step in range(6):
            profiler.step_begins()
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(3).sum()
    (place,) = tmp_path.iterdir()
    with gzip.open(place, "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert names & {f"step {step}" for step in range(6)} == {"step 2", "step 3"}
