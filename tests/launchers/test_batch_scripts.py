"""Rendered batch scripts at work, with small programs in place of Slurm's: no value becomes shell, and every end of the
ranks leads to what should follow it.
"""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launchers.rendering import Job, render_evaluation, render_sharding, render_training
from megavar.errors import ExitCode
from megavar.parallel.environment import Environment, read_environment
from tests.launchers.stubs import OF_A_RANK, Stubs
from tests.launchers.test_rendering import HOSTILE, job


def local_job(tmp_path: Path, cluster: dict, **changes) -> Job:
    return job(
        {"gpus_per_node": 0, "preflight": False, "node_local_directory": str(tmp_path / "local"), **cluster},
        run_directory=tmp_path / "run",
        code_directory=Path(__file__).parents[2],
        submit_directory=tmp_path,
        nodes=1,
        recorded_environment={},
        **changes,
    )


def fake_python(path: Path, body: str) -> str:
    """An interpreter of the ranks that runs ``body`` instead of the trainer: ``sys.argv`` is what it was given."""
    path.write_text(f"#!{sys.executable}\nimport json, os, sys\n{body}\n")
    path.chmod(0o755)
    return str(path)


def write_script(job: Job) -> Path:
    (job.run_directory / "logs").mkdir(parents=True)
    script = job.run_directory / "submit.sbatch"
    script.write_text(render_training(job))
    return script


def test_hostile_values_stay_inert(tmp_path):
    """Quotes, substitutions and line ends reach the ranks as they are, and nothing else happens."""
    place = tmp_path / f"a folder {HOSTILE.replace('/', '')}"
    place.mkdir()
    seen = place / "seen.json"
    body = f"json.dump([sys.argv, os.environ['HOSTILE'], os.getcwd()], open({str(seen)!r}, 'w'))"
    python = fake_python(place / "python", body)
    container = {"name": "pyxis", "image": HOSTILE, "mounts": [HOSTILE]}
    hostile = local_job(
        tmp_path,
        {
            "environment": {"HOSTILE": HOSTILE},
            "python": python,
            "container": container,
            "host_python": sys.executable,
            "node_local_directory": f"/tmp/{HOSTILE}",
        },
    )
    hostile = replace(hostile, submit_directory=place, required_runs=[Path(HOSTILE)])
    stubs = Stubs(tmp_path / "bin")
    result = stubs.run(write_script(hostile))
    arguments, value, folder = json.loads(seen.read_text())
    assert value == HOSTILE
    assert folder == str(place)
    assert arguments[1:4] == ["-m", "megavar", "train"]
    assert f"--container-image={HOSTILE}" in stubs.calls("srun")[0]
    assert not list(tmp_path.rglob("pwned")), result.stderr


def run_with_exit(tmp_path: Path, code: int, continue_by: str = "requeue", before: str = "") -> tuple[Stubs, int, str]:
    python = fake_python(tmp_path / "python", f"{before}\nsys.exit({code})")
    stubs = Stubs(tmp_path / "bin")
    cluster = {"python": python, "host_python": sys.executable}
    script = write_script(local_job(tmp_path, cluster, continue_by=continue_by))
    result = stubs.run(script)
    return stubs, result.returncode, result.stdout + result.stderr


def touch(path: Path) -> str:
    return f"os.makedirs({str(path.parent)!r}, exist_ok=True); open({str(path)!r}, 'w').close()"


def test_a_preempted_run_is_requeued(tmp_path):
    stubs, code, output = run_with_exit(tmp_path, ExitCode.PREEMPTED)
    assert code == ExitCode.PREEMPTED
    assert ["requeue", "4711"] in stubs.calls("scontrol"), output
    assert not stubs.calls("scancel")


def test_a_crashed_run_is_requeued(tmp_path):
    stubs, code, output = run_with_exit(tmp_path, 139)
    assert code == ExitCode.FAILED
    assert ["requeue", "4711"] in stubs.calls("scontrol"), output


def test_the_operator_is_told_when_the_requeue_is_under_way(tmp_path):
    """A command that is slow, or hangs, keeps no run from going on; and Slurm's SIGTERM does not silence it."""
    stubs = Stubs(tmp_path / "bin")
    told = tmp_path / "told.json"
    command = ["/bin/sh", "-c", f"kill -TERM $PPID; cat {stubs.calls_file} - >{told}"]
    settings = {
        "python": fake_python(tmp_path / "python", f"sys.exit({ExitCode.PREEMPTED:d})"), "host_python": sys.executable,
        "notify": {"command": command},
    }  # fmt: skip
    assert stubs.run(write_script(local_job(tmp_path, settings))).returncode == ExitCode.PREEMPTED
    *calls, message = map(json.loads, told.read_text().splitlines())
    assert ["scontrol", "requeue", "4711"] in calls
    assert (message["kind"], message["outcome"], message["attempt"]) == ("preempted", "PREEMPTED", 1)


def test_a_link_of_a_chain_is_not_requeued(tmp_path):
    stubs, code, _ = run_with_exit(tmp_path, ExitCode.PREEMPTED, continue_by="chain")
    assert code == ExitCode.PREEMPTED
    assert not [call for call in stubs.calls("scontrol") if call[0] == "requeue"]
    assert not stubs.calls("scancel")


@pytest.mark.parametrize("code", [ExitCode.CONFIGURATION, ExitCode.NON_FINITE, ExitCode.NO_PROGRESS])
def test_a_hopeless_run_cancels_its_own_queued_jobs_only(tmp_path, code):
    stubs, returned, output = run_with_exit(tmp_path, code)
    assert returned == code
    assert not [call for call in stubs.calls("scontrol") if call[0] == "requeue"], output
    assert len(stubs.calls("srun")) == 2, "the ranks, and the removal of their caches"
    (cancel,) = stubs.calls("scancel")
    user = subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()
    assert cancel == [f"--user={user}", "--name=megavar-test", "--state=PENDING"]


def test_a_finished_run_ends_with_success_and_leaves_no_queue(tmp_path):
    stubs, code, output = run_with_exit(tmp_path, 0, before=touch(tmp_path / "run/DONE"))
    assert code == ExitCode.FINISHED, output
    assert len(stubs.calls("scancel")) == 1
    again = Stubs(tmp_path / "bin2")
    result = again.run(tmp_path / "run/submit.sbatch")
    assert result.returncode == 0
    assert "finished already" in result.stdout
    assert not again.calls("srun")


def test_set_up_lines_may_read_unset_variables(tmp_path):
    """As conda's activation scripts do."""
    python = fake_python(tmp_path / "python", "sys.exit(85)")
    cluster = {"python": python, "host_python": sys.executable, "setup": ['export FOUND="$NOT_SET" && cd "$NOT_SET"']}
    stubs = Stubs(tmp_path / "bin")
    assert stubs.run(write_script(local_job(tmp_path, cluster))).returncode == ExitCode.PREEMPTED


def test_a_submission_from_a_rank_of_another_run_starts_one_run(tmp_path):
    """torchrun's names in the submitting shell do not hide Slurm's."""
    seen = tmp_path / "seen.json"
    python = fake_python(tmp_path / "python", f"json.dump(dict(os.environ), open({str(seen)!r}, 'w'))")
    script = write_script(local_job(tmp_path, {"python": python, "host_python": sys.executable}))
    environment = Stubs(tmp_path / "bin").environment(OF_A_RANK)
    subprocess.run(["bash", str(script)], capture_output=True, timeout=60, env=environment)
    inherited = json.loads(seen.read_text())
    assert not OF_A_RANK.keys() & inherited.keys()
    in_step = {**inherited, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    assert read_environment(in_step) == Environment(1, 2, 0, "srun")


def test_the_caches_of_a_node_are_removed_before_the_job_leaves_it(tmp_path):
    body = "folder = os.environ['TRITON_CACHE_DIR']; os.makedirs(folder); open(folder + '/kernel', 'w').close()"
    stubs, _, output = run_with_exit(tmp_path, ExitCode.PREEMPTED, before=body)
    assert not list((tmp_path / "local").iterdir()), output
    _, removal = stubs.calls("srun")
    assert removal[-4:-1] == ["rm", "-rf", "--"]
    calls = [json.loads(line) for line in stubs.calls_file.read_text().splitlines()]
    assert calls.index(["srun", *removal]) < calls.index(["scontrol", "requeue", "4711"])


def test_a_run_whose_attempts_cannot_be_counted_is_held(tmp_path):
    """Neither lost nor requeued for ever; ``scontrol release`` lets it go on."""
    stubs = Stubs(tmp_path / "bin")
    made = local_job(tmp_path, {"python": sys.executable, "host_python": sys.executable})
    script = write_script(made)
    (made.run_directory / "restarts.json").mkdir()  # reading or writing it raises OSError
    result = stubs.run(script)
    assert result.returncode == ExitCode.PREFLIGHT
    assert ["requeuehold", "4711"] in stubs.calls("scontrol"), result.stdout + result.stderr
    assert "scontrol release 4711" in result.stdout
    assert not stubs.calls("srun")


def test_bad_nodes_are_replaced_by_a_new_job(tmp_path):
    body = "open(os.environ['MEGAVAR_LOG_DIRECTORY'] + '/bad_nodes.txt', 'w').write('n7\\nn9\\n')"
    python = fake_python(tmp_path / "python", f"{body}\nsys.exit({int(ExitCode.PREFLIGHT)})")
    shown = "JobId=4711 JobName=x\n   ReqNodeList=(null) ExcNodeList=old[1-2],n3\n   NodeList=n[7-9]"
    stubs = Stubs(tmp_path / "bin", squeue="4712", scontrol=shown)
    cluster = {"python": python, "host_python": sys.executable}
    script = write_script(local_job(tmp_path, cluster))
    result = stubs.run(script, MEGAVAR_MASTER_ADDR="127.0.0.1")
    assert result.returncode == ExitCode.PREFLIGHT
    excluded = "n7,n9,old[1-2],n3"  # with those that this job excluded already: they are not better now
    assert stubs.calls("sbatch") == [[f"--exclude={excluded}", str(script)]], result.stdout
    assert ["update", "JobId=4712", f"ExcNodeList={excluded}"] in stubs.calls("scontrol")


def test_ranks_see_attempt_rendezvous_and_recorder(tmp_path):
    seen = tmp_path / "seen.json"
    python = fake_python(tmp_path / "python", f"json.dump(dict(os.environ), open({str(seen)!r}, 'w')); sys.exit(85)")
    stubs = Stubs(tmp_path / "bin")
    script = write_script(local_job(tmp_path, {"python": python, "host_python": sys.executable}))
    stubs.run(script, TORCH_FR_BUFFER_SIZE="0")
    variables = json.loads(seen.read_text())
    logs = tmp_path / "run/logs/attempt-0001"
    assert variables["MASTER_ADDR"] == "127.0.0.1"
    assert 20000 <= int(variables["MASTER_PORT"]) < 30000
    assert variables["MEGAVAR_ATTEMPT"] == "1"
    assert variables["MEGAVAR_LOG_DIRECTORY"] == str(logs)
    assert variables["TORCH_FR_BUFFER_SIZE"] == "0", "an operator can turn the recorder off"
    assert variables["TORCH_FR_DUMP_TEMP_FILE"] == f"{logs}/flight_recorder/rank_"
    assert variables["TRITON_CACHE_DIR"].startswith(f"{tmp_path}/local/")
    train, _ = stubs.calls("srun")
    assert f"--output={logs}/rank-%4t.log" in train
    assert "--kill-on-bad-exit=1" in train


STEPS = "StepId=4711.batch UserId=0 StartTime=x\n\nStepId=4711.1 UserId=0 StartTime=x\n   State=RUNNING"
WAIT_FOR_FILE = """import time
open({ready!r}, "w").close()
while not os.path.exists({go!r}): time.sleep(0.02)
sys.exit({code})"""


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_the_announcement_of_the_end_is_forwarded_to_the_running_step(tmp_path, kind):
    """Slurm signals the batch shell alone; the shell asks the ranks and waits for them."""
    ready, go = tmp_path / "ready", tmp_path / "go"
    python = fake_python(tmp_path / "python", WAIT_FOR_FILE.format(ready=str(ready), go=str(go), code=85))
    stubs = Stubs(tmp_path / "bin", scontrol=STEPS)
    made = local_job(tmp_path, {"python": python, "host_python": sys.executable})
    script = write_script(made)
    if kind == "evaluate":
        script.write_text(render_evaluation(made, ["a b.yaml"]))
    environment = stubs.environment({"MEGAVAR_MASTER_ADDR": "127.0.0.1"})  # scontrol only knows steps here
    process = subprocess.Popen(["bash", str(script)], env=environment, stdout=subprocess.DEVNULL)
    try:
        while not ready.exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
        while ["--signal=USR2", "4711.1"] not in stubs.calls("scancel"):
            time.sleep(0.02)
        go.touch()
        assert process.wait(60) == 85
    finally:
        process.kill()
    assert ["requeue", "4711"] in stubs.calls("scontrol")


def send_when_ready(process: subprocess.Popen, ready: Path, number: signal.Signals) -> None:
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)


def test_a_step_that_cannot_be_signalled_yet_is_asked_again(tmp_path):
    """Slurm may create a step long after srun was called."""
    ready, go = tmp_path / "ready", tmp_path / "go"
    python = fake_python(tmp_path / "python", WAIT_FOR_FILE.format(ready=str(ready), go=str(go), code=85))
    stubs = Stubs(tmp_path / "bin", scontrol=["", "", "StepId=4711.batch x", "", STEPS])
    script = write_script(local_job(tmp_path, {"python": python, "host_python": sys.executable}))
    environment = stubs.environment({"MEGAVAR_MASTER_ADDR": "127.0.0.1"})
    process = subprocess.Popen(["bash", str(script)], env=environment, stdout=subprocess.DEVNULL)
    try:
        send_when_ready(process, ready, signal.SIGUSR1)
        while ["--signal=USR2", "4711.1"] not in stubs.calls("scancel"):
            time.sleep(0.02)
        go.touch()
        assert process.wait(60) == ExitCode.PREEMPTED
    finally:
        go.touch()
        process.kill()
    assert len(stubs.calls("scancel")) == 1, "once it is asked, it is left alone"


@pytest.mark.parametrize("announced", [True, False])
def test_ranks_that_do_not_end_in_time_do_not_keep_the_job_from_continuing(tmp_path, announced):
    """At the time limit Slurm sends SIGTERM, and soon SIGKILL, to ranks that still save and to the batch shell alike.

    A job that a person cancelled gets the same, without the announcement; it stays cancelled.
    """
    ready, go = tmp_path / "ready", tmp_path / "go"
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    python = fake_python(tmp_path / "python", ignore + WAIT_FOR_FILE.format(ready=str(ready), go=str(go), code=85))
    stubs = Stubs(tmp_path / "bin", scontrol=STEPS)
    made = local_job(tmp_path, {"python": python, "host_python": sys.executable})
    environment = stubs.environment({"MEGAVAR_MASTER_ADDR": "127.0.0.1"})
    process = subprocess.Popen(["bash", str(write_script(made))], env=environment, stdout=subprocess.DEVNULL)
    try:
        if announced:
            send_when_ready(process, ready, signal.SIGUSR1)
            while not stubs.calls("scancel"):
                time.sleep(0.02)
        send_when_ready(process, ready, signal.SIGTERM)
        action = "restart" if announced else "stop"
        while f'"action": "{action}"' not in (made.run_directory / "restarts.json").read_text():
            assert process.poll() is None
            time.sleep(0.02)  # the ranks still run
        if announced:
            assert process.wait(60) == ExitCode.FAILED
            assert ["requeue", "4711"] in stubs.calls("scontrol")
        go.touch()
        assert process.wait(60) == ExitCode.FAILED
        assert announced or not [call for call in stubs.calls("scontrol") if call[0] == "requeue"]
    finally:
        go.touch()
        process.kill()


def test_evaluation_gets_its_arguments_and_keeps_the_exit_code(tmp_path):
    seen = tmp_path / "seen.json"
    python = fake_python(tmp_path / "python", f"json.dump(sys.argv[1:], open({str(seen)!r}, 'w')); sys.exit(2)")
    stubs = Stubs(tmp_path / "bin")
    made = local_job(tmp_path, {"python": python, "host_python": sys.executable})
    script = write_script(made)
    script.write_text(render_evaluation(made, [f"{HOSTILE}.yaml"]))
    result = stubs.run(script)
    assert result.returncode == 2, result.stderr
    assert json.loads(seen.read_text()) == ["-m", "megavar", "evaluate", f"{HOSTILE}.yaml"]
    assert not [call for call in stubs.calls("scontrol") if call[0] == "requeue"]


def test_every_sharding_task_makes_its_part(tmp_path):
    seen = tmp_path / "seen.json"
    python = fake_python(tmp_path / "python", f"json.dump(sys.argv[1:], open({str(seen)!r}, 'w'))")
    stubs = Stubs(tmp_path / "bin")
    script = tmp_path / "script"
    script.write_text(render_sharding(local_job(tmp_path, {"python": python}), ["--images", HOSTILE]))
    result = stubs.run(script, SLURM_NTASKS="3")
    assert result.returncode == 0, result.stderr
    assert json.loads(seen.read_text()) == ["-m", "tools.shard_images", "--images", HOSTILE, "--part", "0/3"]
