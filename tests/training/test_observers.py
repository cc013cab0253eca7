"""What watches a run: it changes nothing, and what it writes down is true."""

import dataclasses
import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megavar import notify
from megavar.config.alerts import AlertsConfig
from megavar.errors import ExitCode
from megavar.records.history import attempts_of, read_metrics, summarize
from megavar.records.reading import json_lines
from megavar.training.alerts import AlertsObserver
from megavar.training.banner import BannerObserver
from megavar.training.ledger import LedgerObserver
from megavar.training.observers import Observer
from megavar.training.routing import RoutingObserver
from megavar.training.trainer import Trainer
from megavar.training.validation import ValidationObserver
from tests.distributed.harness import RankFailure, run_ranks
from tests.training import tiny

CHECKPOINTS = {"checkpoint": {"interval": 2}}


class Dies(Observer):
    def __init__(self, step):
        self.at = step

    def stepped(self, step):
        if step == self.at:
            raise RuntimeError("planted")


def _train(directory, stage=1, validates=True, dies_at=None):
    run = tiny.build_run(directory, stage=stage, train=CHECKPOINTS | {"micro_batch_size": 2})
    observers = [LedgerObserver(), BannerObserver("tiny: trains", [("data", "none")]), AlertsObserver(AlertsConfig())]
    if validates:
        observers.append(ValidationObserver(3, 1, lambda size: list(_first(run, size, 2))))
    if dies_at is not None:
        observers.append(Dies(dies_at))
    trainer = Trainer(dataclasses.replace(run, observers=observers))
    code = trainer.run()
    return code, torch.cat([p.detach().flatten() for p in trainer.recipe.model.parameters()])


def _first(run, size, count):
    batches = iter(run.loader(0, size))
    return [next(batches) for _ in range(count)]


def of_event(directory, event):
    return [line for line in json_lines(directory / "metrics.jsonl") if line.get("event") == event]


@pytest.mark.parametrize("ranks, stage", [(1, 0), (2, 2)])
def test_validation_changes_nothing_and_a_run_that_died_continues_bitwise_with_it(tmp_path, ranks, stage):
    without = run_ranks(ranks, _train, tmp_path / "without", stage, False)
    straight = run_ranks(ranks, _train, tmp_path / "straight", stage)
    with pytest.raises(RankFailure, match="planted"):
        run_ranks(ranks, _train, tmp_path / "killed", stage, True, 5)
    resumed = run_ranks(ranks, _train, tmp_path / "killed", stage)
    for (_, expected), (_, validated), (code, continued) in zip(without, straight, resumed, strict=True):
        assert torch.equal(validated, expected) and torch.equal(continued, expected) and code == ExitCode.FINISHED
    points = of_event(tmp_path / "straight", "validation")
    assert [point["step"] for point in points] == [3, 6] and points[0]["samples"] == 2 * tiny.GLOBAL_BATCH
    assert [point["loss"] for point in of_event(tmp_path / "killed", "validation")] == [p["loss"] for p in points]
    counted = [[(line["step"], line["labels/0"]) for line in tiny.read_metrics(tmp_path / name) if "event" not in line]
               for name in ("straight", "without")]  # fmt: skip
    assert counted[0] == counted[1] and len(counted[0]) == 6, "statistics are of training alone"
    _the_ledger_is_true(tmp_path / "killed", ranks)


def _the_ledger_is_true(directory: Path, ranks: int) -> None:
    lines = json_lines(directory / "ledger.jsonl")
    assert [(line["attempt"], line["outcome"]) for line in lines] == [
        (1, "RUNNING"), (1, "FAILED"), (2, "RUNNING"), (2, "FINISHED"),
    ]  # fmt: skip
    failed, finished = lines[1], lines[3]
    assert (failed["first_step"], failed["last_step"], failed["kept_step"]) == (0, 5, 4)
    assert (finished["first_step"], finished["kept_step"], finished["devices"]) == (4, 6, ranks)
    spent = finished["ended"] - finished["started"]
    assert sum(finished["seconds"].values()) == pytest.approx(spent, abs=0.01)
    assert finished["device_hours"] == pytest.approx(ranks * spent / 3600, rel=0.01)
    assert finished["seconds"]["validation"] > 0
    rows = summarize(attempts_of(directory), read_metrics(directory), time.time())
    assert [(row.outcome, row.first_step, row.kept_step, row.lost_steps, row.devices) for row in rows] == [
        ("FAILED", 0, 4, 0, ranks), ("FINISHED", 4, 6, 0, ranks),
    ]  # fmt: skip
    starts = json_lines(directory / "attempts.jsonl")
    assert [device["count"] for device in starts[0]["devices"]] == [ranks] and starts[0]["total_steps"] == 6
    console = (directory / "console.log").read_text()
    assert console.count("tiny: trains") == 2 and "after step 4 of 6" in console


class Watched:
    """A trainer as observers see it."""

    def __init__(self, path: Path) -> None:
        self.events: list[tuple[int, str, dict]] = []
        self.directory = SimpleNamespace(
            path=path, checkpoints=path / "checkpoints", metrics=path / "metrics.jsonl"
        )
        self.monitor = SimpleNamespace(is_writer=True, name="run", seconds_left=lambda: 1e6)
        self.stopwatch, self.step, self.total_steps = SimpleNamespace(inside=None), 0, 100

    def tell(self, step, event, **facts):
        self.events.append((step, event, facts))

    @property
    def told(self) -> list[tuple[int, str, str]]:
        return [(step, event, facts["kind"]) for step, event, facts in self.events]


def alerts(tmp_path, **options):
    watched = Watched(tmp_path)
    observer = AlertsObserver(AlertsConfig(**options), 4.0)
    observer.begin(watched)
    observer.opened(0)
    return watched, observer


QUIET = {"loss": 3.0, "gradient_norm": 1.0, "images_per_second": 100.0, "data_wait_share": 0.1,
         "expert_share/a": 0.5, "expert_share/b": 0.5, "expert_share/largest_in_a_layer": 0.6,
         "expert_share/smallest_in_a_layer": 0.4}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "odd"),
    [
        ("loss_above_uniform", {"loss": 5.1}),
        ("gradient_norm", {"gradient_norm": 11.0}),
        ("expert_collapse", {"expert_share/smallest_in_a_layer": 0.02}),
        ("throughput_drop", {"images_per_second": 40.0}),
        ("stalled_data", {"data_wait_share": 0.6}),
    ],
)
def test_what_is_odd_is_told_once_and_when_it_is_over(tmp_path, kind, odd):
    watched, observer = alerts(tmp_path)
    for step, record in enumerate([QUIET] * 6 + [QUIET | odd] * 3 + [QUIET], 1):
        observer.logged(step, record, {})
    begins = 8 if kind == "throughput_drop" else 7  # one slow line is nothing
    assert watched.told == [(begins, "alert", kind), (10, "alert_over", kind)]
    assert len(watched.events[0][2]["message"].split()) > 4


def test_a_spike_lasts_until_the_next_line(tmp_path):
    watched, observer = alerts(tmp_path)
    observer.happened(3, "loss_spike", {"loss": 9.0, "median": 3.0})
    observer.logged(3, QUIET, {})
    observer.logged(4, QUIET, {})
    assert watched.told == [(3, "alert", "loss_spike"), (4, "alert_over", "loss_spike")]


def test_steps_that_do_not_end_are_seen_from_outside(tmp_path):
    watched, observer = alerts(tmp_path, stall_seconds=0.2)
    observer.stepped(1)
    watched.step, watched.stopwatch.inside = 1, "checkpoint"
    time.sleep(0.6)
    assert watched.told == [], "a save takes its time"
    watched.stopwatch.inside = "data"
    deadline = time.monotonic() + 30
    while not watched.events and time.monotonic() < deadline:
        time.sleep(0.05)
    assert watched.told == [(1, "alert", "stalled_data")] and "waits for samples" in watched.events[0][2]["message"]
    observer.ended(1, "FAILED")


def test_the_disk_is_looked_at_before_it_is_full(tmp_path, monkeypatch):
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000001/part").write_bytes(bytes(1000))
    _, observer = alerts(tmp_path)
    free, now = iter([10_000, 9_000, 900, 5_000]), iter([0.0, 700.0, 800.0, 900.0])
    monkeypatch.setattr("megavar.training.alerts.shutil.disk_usage", lambda path: SimpleNamespace(free=next(free)))
    observer.ended(0, "")  # the watching thread, too, asks for the time
    monkeypatch.setattr("megavar.training.alerts.time.monotonic", lambda: next(now))
    messages = []
    for _ in range(3):
        messages += [message for _, message, _ in observer._of_disk()]
    assert len(messages) == 2
    assert "full in 105 min" in messages[0] or "full in 1.8 h" in messages[0]
    assert "needs 1.0 kB, and 900 B are free" in messages[1]


def test_the_operator_is_told_as_json(tmp_path, monkeypatch, capsys):
    command = ["/bin/sh", "-c", f"cat >>{tmp_path}/told"]
    monkeypatch.setenv(notify.VARIABLE, json.dumps({"command": command, "on": ["disk"]}))
    _, observer = alerts(tmp_path)
    observer._raise(7, "disk", "little is left", {"free_bytes": 5.0})
    observer._raise(8, "stalled_step", "nobody asked for it", {})
    observer.ended(8, "FAILED")
    (line,) = (tmp_path / "told").read_text().splitlines()
    told = json.loads(line)
    assert (told["run"], told["kind"], told["message"], told["step"]) == ("run", "disk", "little is left", 7)
    assert told["directory"] == str(tmp_path) and told["free_bytes"] == 5.0 and {"time", "host", "job"} <= told.keys()
    monkeypatch.setenv(notify.VARIABLE, json.dumps({"command": ["/no/such"], "on": ["disk"]}))
    assert not notify.notify("run", "/", "disk", "x")
    assert "/no/such does not run" in capsys.readouterr().err


def test_routing_between_previews_is_kept_with_a_picture(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    watched = Watched(tmp_path)
    observer = RoutingObserver()
    observer.watched, observer._targets = watched, ("first", "second")
    load = torch.tensor([[[3.0, 1.0]], [[2.0, 2.0]]], dtype=torch.float64)  # [blocks, kinds, targets]
    observer.logged(1, {}, {"load": load})
    observer.logged(2, {}, {"load": load})
    observer.previewed(2)
    observer.logged(3, {}, {"load": load})
    observer.previewed(3)
    observer.previewed(4)  # nothing new
    assert not caplog.text
    kept = {path.name: np.load(path) for path in (tmp_path / "routing").glob("*.npz")}
    assert sorted(kept) == ["step-00000002.npz", "step-00000003.npz"]
    assert np.array_equal(kept["step-00000002.npz"]["load"], 2 * load.numpy())
    assert np.array_equal(kept["step-00000003.npz"]["load"], load.numpy())
    assert list(kept["step-00000002.npz"]["targets"]) == ["first", "second"]
    assert (tmp_path / "routing/expert-map.png").read_bytes().startswith(b"\x89PNG")
