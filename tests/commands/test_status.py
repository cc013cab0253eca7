"""``megavar status`` on run directories in every state."""

import json
from pathlib import Path

import pytest

from megavar.__main__ import main
from megavar.errors import ExitCode
from megavar.records.curves import Curve
from megavar.records.jobs import job_name
from megavar.records.run import RunRecord
from tests.launchers.stubs import Stubs


def write_run(
    path: Path, *, steps: int, outcome: str | None = None, done: bool = False, lives: bool = False, kept: int = 0
) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(
        f"run: {{name: {path.name}}}\ntrain: {{steps: null, epochs: 2, global_batch_size: 10}}\n"
    )
    (path / "data.json").write_text('{"samples": 100}')
    lines = [{"time": 100.0 + 3 * step, "step": step, "loss": 9 - 0.1 * step, "images_per_second": 3.5}
             for step in range(1, steps + 1)]  # fmt: skip
    events = [
        {"time": 101.0, "step": 1, "event": "alert", "kind": "gradient_norm", "message": "large"},
        {"time": 102.0, "step": 1, "event": "alert", "kind": "disk", "message": "the next checkpoint needs 2 GB"},
        {"time": 103.0, "step": 1, "event": "alert_over", "kind": "gradient_norm"},
        {"time": 104.0, "step": 1, "event": "expectation", "expected_step_seconds": 36.0},
        {"time": 105.0, "step": 2, "event": "validation", "loss": 8.5},
    ]
    text = "\n".join(map(json.dumps, [*lines, *(events if lines else [])]))
    (path / "metrics.jsonl").write_text(text + '\n{"time": 1, "st')  # cut off by a crash
    starts = [{"time": 90.0 + 10 * number, "devices": [{"host": "n1", "name": "x", "count": 4}]} for number in (0, 1)]
    (path / "attempts.jsonl").write_text("".join(f"{json.dumps(start)}\n" for start in starts if steps))
    if outcome:
        attempt = {"attempt": 1, "started": 100.0, "ended": 100.0 + 3 * steps, "nodes": ["n1", "n2"],
                   "tasks_per_node": 2, "steps_before": [0], "steps_after": [kept], "outcome": outcome}  # fmt: skip
        (path / "restarts.json").write_text(json.dumps({"counted_from": 0, "attempts": [attempt]}))
    if done:
        (path / "DONE").write_text("{}")
    if lives:
        (path / "run.lock").write_text("{}")
    return path


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs in every state, and a squeue that knows jobs of two of them."""
    runs = tmp_path / "runs"
    write_run(runs / "a-done", steps=20, done=True)
    write_run(runs / "b-lives", steps=10, lives=True)
    write_run(runs / "c-failed", steps=5, outcome="FAILED", kept=2)
    write_run(runs / "d-preempted", steps=5, outcome="PREEMPTED", kept=5)
    write_run(runs / "e-new", steps=0)
    write_run(runs / "f-queued", steps=0)
    queue = [f"71|RUNNING|n[1-2]|None|{job_name('b-lives', runs / 'b-lives')}",
             f"72|PENDING||Priority|{job_name('f-queued', runs / 'f-queued')}",
             "73|RUNNING|n3|None|another"]  # fmt: skip
    stubs = Stubs(tmp_path / "stubs", squeue="\n".join(queue))
    monkeypatch.setenv("PATH", stubs.environment({})["PATH"])
    monkeypatch.chdir(tmp_path)
    return runs


def test_runs_in_all_states(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json"]) == ExitCode.FINISHED
    rows = json.loads(capsys.readouterr().out)
    states = ["finished", "running", "failed", "preempted", "new", "queued"]
    assert [row["state"] for row in rows] == states
    lives, failed, queued = rows[1], rows[2], rows[5]
    assert (lives["step"], lives["total_steps"], lives["restarts"], lives["job"]) == (10, 20, 1, "71")
    assert lives["loss"] == pytest.approx(8.0) and lives["trend"] == "↓" and lives["nodes"] == ["n[1-2]"]
    assert lives["validation_loss"] == 8.5 and [alert["kind"] for alert in lives["alerts"]] == ["disk"]
    assert lives["seconds_left"] == pytest.approx(30.0)  # ten steps of three seconds
    assert all(row["seconds_left"] is None for row in rows if row is not lives)
    assert lives["planned_device_hours"] == pytest.approx(20 * 36 * 4 / 3600)
    assert failed["lost_steps"] == 3 and failed["device_hours"] == pytest.approx(4 * 15 / 3600)
    assert (queued["job"], queued["waits_for"]) == ("72", "Priority")
    assert rows[0]["alerts"] == [], "of a run that is done nothing is left to do"


def test_the_table_is_aligned_and_without_empty_columns(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "runs/b-lives", "runs/f-queued"]) == ExitCode.FINISHED
    head, first, second = capsys.readouterr().out.splitlines()
    words = "run state job step loss held out images/s left restarts disk device h alerts"
    assert head.split() == words.split()
    assert "71 n[1-2]" in first and "10/20" in first and first.endswith("disk") and "72 (Priority)" in second
    ends = {line.index(word) + len(word) for line, word in ((head, "step"), (first, "10/20"), (second, "0/20"))}
    assert len(ends) == 1
    assert max(map(len, (head, first, second))) <= 140


def test_prometheus_reads_it(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = runs / "textfile" / "megavar.prom"
    assert main(["status", "runs/b-lives", "runs/e-new", "--prometheus", str(file)]) == ExitCode.FINISHED
    lines = file.read_text().splitlines()
    lives, new = (f'run="{name}",directory="runs/{name}"' for name in ("b-lives", "e-new"))
    assert f"megavar_step{{{lives}}} 10" in lines and f"megavar_loss{{{lives}}} 8" in lines
    assert f'megavar_state{{{new},state="new"}} 1' in lines and not any("loss" in x and "e-new" in x for x in lines)
    assert f'megavar_alert{{{lives},kind="disk"}} 1' in lines
    assert all(line.startswith(("# HELP megavar_", "# TYPE megavar_", "megavar_")) for line in lines)


def test_a_reference_curve_has_a_band(tmp_path: Path) -> None:
    seeds = {0: {10: 2.0, 20: 1.0, 30: 9.0}, 1: {10: 2.2, 20: 1.2}, 2: {10: 2.1, 20: 1.1}}
    curve = Curve.of("tiny", "validation/loss", seeds, "by hand")
    (tmp_path / "curve.json").write_text(curve.text())
    assert Curve.load(tmp_path / "curve.json") == curve and curve.steps == (10, 20)
    assert curve.band(15) == pytest.approx((1.3, 1.9))  # three deviations of 0.1 around 1.6
    verdicts = [curve.verdict([(step, value)]) for step, value in ((15, 1.5), (15, 1.2), (20, 1.5), (40, 1.0))]
    assert verdicts == ["inside", "below", "above", None]
    run = write_run(tmp_path / "run", steps=15)
    with (run / "config.yaml").open("a") as file:
        file.write(f"validation: {{reference: {tmp_path / 'curve.json'}}}\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('\n{"time": 110.0, "step": 12, "event": "validation", "loss": 1.8}\n')
    assert RunRecord.read(run).verdict == "inside"


def test_what_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == ExitCode.CONFIGURATION
    assert str(tmp_path) in capsys.readouterr().err
