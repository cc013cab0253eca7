"""What operators see on a real Slurm: five runs in five states, alerts on planted troubles, a command that is told."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launchers import doctor
from megavar.errors import ExitCode
from megavar.records.reading import json_lines
from tests.slurm.conftest import REPOSITORY, WatchedRun, slow_steps

# The trainer with a trouble planted into it: samples that do not come after step 12.
STALL = """\
if [ "$3" = train ]; then
    exec "$python" -c '
import sys, time
from megavar.__main__ import main
from megavar.data.loader import Loader
steps = Loader.__iter__
def stalls(self):
    for number, batches in enumerate(steps(self)):
        if number == 12 and self.stop_step is None:
            time.sleep(8)
        yield batches
Loader.__iter__ = stalls
sys.exit(main(sys.argv[1:]))
' "${@:3}"
fi"""
SLOW = slow_steps(0.3)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's tokenizer alone would do, but losses in nats are a generator's: a very small one."""
    folder = tmp_path_factory.mktemp("watching")
    logging = {"interval": 2, "samples_interval": None, "lines_seconds": 0, "wandb": {"mode": "disabled"},
               "alerts": {"stall_seconds": 2.0}}  # fmt: skip
    (folder / "tokenizer.yaml").write_text(yaml.safe_dump({
        "base": str(REPOSITORY / "configs/quickstart/tokenizer.yaml"),
        "run": {"name": "tokenizer", "directory": str(folder / "tokenizer")},
        "train": {"steps": 20}, "logging": logging,
    }))  # fmt: skip
    (folder / "watched.yaml").write_text(yaml.safe_dump({
        "base": str(REPOSITORY / "configs/quickstart.yaml"),
        "run": {"name": "watched", "requires": [str(folder / "tokenizer.yaml")]},
        "recipe": {"tokenizer_weights": str(folder / "tokenizer")},
        "generator": {"depth": 1, "width": 16, "heads": 1},
        "train": {"steps": 20, "global_batch_size": 16, "checkpoint": {"interval": 10}},
        "validation": {"interval": 10, "samples": 16},
        "evaluation": {"after_training": False}, "logging": logging,
    }))  # fmt: skip
    command = [sys.executable, "-m", "megavar", "train", str(folder / "tokenizer.yaml")]
    subprocess.run(command, check=True, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder / "watched.yaml"


def told(run: WatchedRun) -> list[dict]:
    """What the operator's command got."""
    return json_lines(run.cluster_file.parent / "told.jsonl")


def watched(new_run, name: str, config: Path, before: str = "") -> WatchedRun:
    run = new_run(name, config, before=before)
    settings = yaml.safe_load(run.cluster_file.read_text())
    place = shlex.quote(str(run.cluster_file.parent / "told.jsonl"))
    settings["notify"] = {"command": ["/bin/sh", "-c", f"cat >>{place}"]}
    run.cluster_file.write_text(yaml.safe_dump(settings))
    return run


def status(*runs: WatchedRun) -> list[dict]:
    command = [sys.executable, "-m", "megavar", "status", "--json", *(str(run.path) for run in runs)]
    shown = subprocess.run(command, cwd=REPOSITORY, env=os.environ | runs[0].cluster.environment, capture_output=True,
                           text=True, check=True)  # fmt: skip
    return json.loads(shown.stdout)


def kinds(run: WatchedRun) -> set[str]:
    return {line["kind"] for line in json_lines(run.path / "metrics.jsonl") if line.get("event") == "alert"}


def test_five_runs_in_five_states_and_alerts_on_planted_troubles(new_run, config, tmp_path, capsys):
    disk = tmp_path / "full"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    runs = {
        "diverges": watched(new_run, "diverges", config),
        "stalls": watched(new_run, "stalls", config, STALL),
        "lives": watched(new_run, "lives", config, SLOW),
        "waits": watched(new_run, "waits", config),
        "fills": watched(new_run, "fills", config),
    }
    full = runs["fills"]
    full.path.rmdir()
    full.path = disk / "run"
    try:
        runs["diverges"].submit("optimizer.lr=30.0", "optimizer.gradient_clipping=0.0", nodes=1)
        runs["stalls"].submit(nodes=1)
        full.submit("--no-requeue", "logging.samples_interval=null", nodes=1)
        runs["lives"].submit("train.steps=2000", nodes=1)
        runs["waits"].submit(nodes=2)
        lives = runs["lives"]
        lives.cluster.run("scontrol", "hold", runs["waits"].job, check=False)
        for name in ("diverges", "stalls", "fills"):
            runs[name].wait_for_end()
        lives.wait(lambda: len(json_lines(lives.path / "metrics.jsonl")) > 5)
        rows = {name: row for (name, run), row in zip(runs.items(), status(*runs.values()))}
        print(json.dumps({name: row["state"] for name, row in rows.items()}))
        assert rows["stalls"]["state"] == "finished" and rows["lives"]["state"] == "running"
        assert rows["waits"]["state"] == "held" and rows["diverges"]["state"] in ("finished", "non_finite")
        assert rows["fills"]["state"] == "failed"
        assert rows["lives"]["job"] == lives.job and rows["lives"]["seconds_left"] > 0
        assert {"loss_above_uniform"} <= kinds(runs["diverges"])
        assert "stalled_data" in kinds(runs["stalls"])
        assert "disk" in {line["kind"] for line in told(full)}
        assert "disk" in [alert["kind"] for alert in rows["fills"]["alerts"]]
        assert {"stalled_data", "finished"} <= {line["kind"] for line in told(runs["stalls"])}
        _doctor_sees_life(lives, capsys)
    finally:
        for run in runs.values():
            run.cluster.run("scancel", *run.jobs, check=False)
        runs["lives"].wait_for_end()
        subprocess.run(["umount", "-l", str(disk)], check=False)


def _doctor_sees_life(run: WatchedRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Its job carries the run's name, its logs are under `current`, and the doctor says how fast it goes."""
    listing = run.cluster.run("squeue", "--noheader", "--format=%j", "--jobs", run.job)
    assert listing.startswith("watched-")
    assert "step" in (run.path / "logs/current/rank-0000.log").read_text()
    capsys.readouterr()
    assert doctor.main([str(run.path)]) == ExitCode.FINISHED
    said = capsys.readouterr().out
    assert "It lives: step " in said and "images/s" in said and "left" in said
