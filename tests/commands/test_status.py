"""``megavar status`` on run directories in every state."""

import json
from pathlib import Path

import pytest

from megavar.__main__ import main
from megavar.errors import ExitCode


def write_run(path: Path, *, steps: int, outcome: str | None = None, done: bool = False, lives: bool = False) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(
        f"run: {{name: {path.name}}}\ntrain: {{steps: null, epochs: 2, global_batch_size: 10}}\n"
    )
    (path / "data.json").write_text('{"samples": 100}')
    lines = [{"time": 100.0 + 3 * step, "step": step, "loss": 9 - 0.1 * step, "images_per_second": 3.5}
             for step in range(1, steps + 1)]  # fmt: skip
    events = [{"time": 101.0, "step": 1, "event": "loss_spike", "loss": 1.0, "median": 0.1}]
    text = "\n".join(map(json.dumps, [*lines, *(events if lines else [])]))
    (path / "metrics.jsonl").write_text(text + '\n{"time": 1, "st')  # cut off by a crash
    (path / "attempts.jsonl").write_text("{}\n{}\n")
    if outcome:
        (path / "restarts.json").write_text(json.dumps({"counted_from": 0, "attempts": [{"outcome": outcome}]}))
    if done:
        (path / "DONE").write_text("{}")
    if lives:
        (path / "run.lock").write_text("{}")
    return path


def test_five_runs_in_five_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    write_run(runs / "a-done", steps=20, done=True)
    write_run(runs / "b-lives", steps=10, lives=True)
    write_run(runs / "c-failed", steps=5, outcome="FAILED")
    write_run(runs / "d-preempted", steps=5, outcome="PREEMPTED")
    write_run(runs / "e-new", steps=0)
    monkeypatch.chdir(tmp_path)
    assert main(["status", "--json"]) == ExitCode.FINISHED
    rows = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in rows] == ["finished", "running", "failed", "preempted", "new"]
    lives = rows[1]
    assert (lives["step"], lives["total_steps"], lives["events"], lives["starts"]) == (10, 20, 1, 2)
    assert lives["loss"] == pytest.approx(8.0) and lives["trend"] == "↓"
    assert lives["seconds_left"] == pytest.approx(30.0)  # ten steps of three seconds
    assert all(row["seconds_left"] is None for row in rows if row is not lives)
    assert main(["status", "runs/b-lives", "runs/e-new"]) == ExitCode.FINISHED
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["run", "state", "step"] and "10/20" in first and second.startswith("e-new")
    assert {line.index(word) + len(word) for line, word in ((head, "step"), (first, "10/20"), (second, "0/20"))} == {
        head.index("step") + 4
    }


def test_what_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == ExitCode.CONFIGURATION
    assert str(tmp_path) in capsys.readouterr().err
