"""The control flow of the batch scripts on a real Slurm, with a trainer that starts in two seconds."""

import json
import re

import pytest

from launchers import doctor
from launchers.diagnosis import diagnose
from megavar.errors import ExitCode
from tests.slurm.conftest import WatchedRun, small_run


def weight(run: WatchedRun) -> float:
    """The final weight."""
    path = run.path / f"checkpoints/step-{run.newest_step:08d}/manifest.json"
    return json.loads(path.read_text())["weight"]


@pytest.fixture(scope="module")
def early(cluster, tmp_path_factory) -> dict[str, WatchedRun]:
    """Runs that mostly wait, submitted before the first test: what they did is looked at when they have ended."""
    folder = tmp_path_factory.mktemp("early")
    runs = {
        "loop": small_run(cluster, folder / "loop", {"steps": 5, "fail": 1}, maximum_attempts_without_progress=2),
        "wrong": small_run(cluster, folder / "wrong", {"steps": 5, "fail": int(ExitCode.CONFIGURATION)}),
    }  # fmt: skip
    for run in runs.values():
        run.submit()
    runs["loop"].submit("--behind")
    return runs


def test_two_jobs_at_once_meet_at_different_ports(new_small_run):
    runs = [new_small_run(name, {"steps": 15}) for name in ("first", "second")]
    for run in runs:
        run.submit()
    runs[0].wait(lambda: all(run.cluster.state(run.job) == "RUNNING" for run in runs))
    for run in runs:
        run.wait_for_end()
        assert run.outcomes == ["FINISHED"], run.story()
    assert weight(runs[0]) == weight(runs[1])


def test_a_crash_loop_ends_and_cancels_its_chain(early):
    run = early["loop"]
    run.wait_for_end()
    assert run.outcomes == ["FAILED", "NO_PROGRESS"], run.story()
    assert [run.cluster.state(job) for job in run.jobs] == ["FAILED", "CANCELLED"]
    assert f"ExitCode={int(ExitCode.NO_PROGRESS)}:0" in run.cluster.run("scontrol", "show", "job", run.job)


def test_a_wrong_configuration_is_not_tried_again(early):
    """Rank 1 leaves with the code; srun terminates rank 0 and returns 143."""
    early["wrong"].wait_for_end()
    assert early["wrong"].outcomes == ["CONFIGURATION"], early["wrong"].story()


def test_a_bad_node_is_replaced(new_small_run):
    """Preflight of node n1 fails; the run goes on as a new job on n2."""
    before = ('if [ "$2" = launchers.preflight ]; then\n'
              '    [ "$SLURMD_NODENAME" = n2 ] && exit 0\n'
              '    echo "$SLURMD_NODENAME" >"$MEGAVAR_LOG_DIRECTORY/bad_nodes.txt"; exit 90\nfi')  # fmt: skip
    run = new_small_run("replace", {"steps": 3}, before=before, preflight=True)
    run.submit(nodes=1)
    run.wait(lambda: (run.path / "DONE").exists())
    assert run.outcomes[0] == "PREFLIGHT", run.story()
    assert [attempt["nodes"] for attempt in run.attempts] == [["n1"], ["n2"]]
    run.wait(lambda: run.cluster.state(run.attempts[1]["job"]) == "COMPLETED")


def test_preflight_on_both_nodes(new_small_run):
    run = new_small_run("preflight", {"steps": 3}, preflight=True)
    run.submit()
    run.wait_for_end()
    log = (run.path / f"logs/slurm-{run.job}.out").read_text()
    assert run.outcomes == ["FINISHED"], run.story()
    assert "preflight: passed" in log
    assert re.search(r"run directory +pass +2/2", log)
    assert re.search(r"all-reduce between nodes +pass +2/2", log)


def test_test_only_asks_the_real_controller(new_small_run, capsys):
    run = new_small_run("question", {"steps": 3})
    with pytest.raises(FileNotFoundError):  # nothing was submitted
        run.submit("--test-only")
    assert "to start at" in capsys.readouterr().out


def test_a_node_fails(new_small_run):
    """With the node the batch script is gone: Slurm itself requeues the job, which waits until the node is back."""
    run = new_small_run("node", {"steps": 40, "save_every": 5})
    run.submit()
    run.wait_for_progress(1)
    run.cluster.fail_node("n1")
    run.wait(lambda: run.cluster.state(run.job) == "PENDING")
    run.cluster.start_node("n1")
    run.wait_for_end()
    first, second = run.attempts
    assert "outcome" not in first and second["outcome"] == "FINISHED", run.story()
    assert 5 <= second["steps_before"][-1] < 40
    assert "vanished" in diagnose(doctor.find_attempts(run.path)[0]).cause
