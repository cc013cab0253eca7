"""The launcher for one machine: exit codes, restarts, stops, logs and environment of its ranks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launchers import doctor, local
from launchers.diagnosis import diagnose
from megavar.errors import ClusterError, ExitCode

CONFIG = Path(__file__).parents[2] / "configs/quickstart/tokenizer.yaml"


def ranks(tmp_path: Path, body: str, world_size: int = 2) -> local.Ranks:
    """Ranks that run ``body`` instead of the trainer; it knows ``rank``."""
    logs = tmp_path / "logs"
    logs.mkdir(exist_ok=True)
    code = f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{body}"
    return local.Ranks([sys.executable, "-c", code], world_size, logs, {"MEGAVAR_ATTEMPT": "1"})


def test_ranks_have_torchruns_environment_and_a_log_each(tmp_path, capsys):
    names = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT MEGAVAR_ATTEMPT MEGAVAR_LOG_DIRECTORY"
    with ranks(
        tmp_path, f"import json; print(json.dumps({{name: os.environ[name] for name in '{names}'.split()}}))"
    ) as two:
        assert two.wait() == 0
    seen = [json.loads((tmp_path / f"logs/rank-{rank:04d}.log").read_text()) for rank in (0, 1)]
    assert [(one["RANK"], one["LOCAL_RANK"], one["WORLD_SIZE"]) for one in seen] == [("0", "0", "2"), ("1", "1", "2")]
    assert seen[0]["MASTER_PORT"] == seen[1]["MASTER_PORT"]
    assert 20000 <= int(seen[0]["MASTER_PORT"]) < 30000
    assert seen[1]["MEGAVAR_LOG_DIRECTORY"] == str(tmp_path / "logs")
    assert json.loads(capsys.readouterr().out)["RANK"] == "0", "rank 0 also speaks to the terminal"


def test_files_of_the_launcher_end_no_run(tmp_path, capsys):
    """As on a full disk: the ranks run to their ends, and how they ended is known."""
    (tmp_path / "logs").mkdir()
    for name in ("rank-0000.log", "rank-0001.log", "tasks.txt"):
        (tmp_path / "logs" / name).mkdir()
    body = f"""while rank and not os.path.exists(r'{tmp_path}/done-0'):
    time.sleep(0.01)
open(r'{tmp_path}/done-' + str(rank), 'w')
sys.exit(3 * rank)"""
    with ranks(tmp_path, body) as two:
        assert two.wait() == 3
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-0", "done-1"]
    assert "task 1: Exited with exit code 3" in two.messages
    assert "Rank 0 keeps no log" in capsys.readouterr().err


def test_a_closed_terminal_ends_no_run(tmp_path, monkeypatch):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with ranks(tmp_path, f"print('x' * 10000); open(r'{tmp_path}/done-' + str(rank), 'w')") as two:
            assert two.wait() == 0
        monkeypatch.undo()
    assert len(list(tmp_path.glob("done-*"))) == 2


def test_one_failing_rank_ends_all_and_keeps_its_code(tmp_path):
    with ranks(tmp_path, "sys.exit(7) if rank == 1 else time.sleep(600)") as two:
        assert two.wait() == 7
    ends = (tmp_path / "logs/tasks.txt").read_text().splitlines()
    assert ends[0].endswith("task 1: Exited with exit code 7")
    assert ends[1].endswith("task 0: Terminated")


def test_a_killed_rank_is_reported(tmp_path):
    with ranks(tmp_path, "os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else time.sleep(600)") as two:
        assert two.wait() == 137
    assert "task 0: Killed" in (tmp_path / "logs/tasks.txt").read_text()


@pytest.mark.parametrize("number", local.STOP_SIGNALS)
def test_a_request_to_stop_reaches_every_rank(tmp_path, number):
    body = """seen = []
signal.signal(signal.SIGUSR2, lambda *_: seen.append(1))
open(f"{os.environ['MEGAVAR_LOG_DIRECTORY']}/ready-{rank}", "w").close()
while not seen:
    time.sleep(0.01)
sys.exit(85)"""

    def stop_when_ready() -> None:
        while len(list((tmp_path / "logs").glob("ready-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.signal(number, signal.SIG_DFL)  # under nohup, hang-ups are ignored here and by the launcher
    try:
        with ranks(tmp_path, body) as two:
            threading.Thread(target=stop_when_ready).start()
            assert two.wait() == ExitCode.PREEMPTED
            assert two.stop_requested
    finally:
        signal.signal(number, before)
    assert (tmp_path / "logs/tasks.txt").read_text().count("exit code 85") == 2


STUBBORN = """signal.signal(signal.SIGUSR2, signal.SIG_IGN)
open(f"{os.environ['MEGAVAR_LOG_DIRECTORY']}/ready-{rank}", "w").write(str(os.getpid()))
time.sleep(600)"""


def pids_of_ready(tmp_path: Path, number: int = 2) -> list[int]:
    while len(texts := [text for file in (tmp_path / "logs").glob("ready-*") if (text := file.read_text())]) < number:
        time.sleep(0.01)
    return [int(text) for text in texts]


def test_ctrl_c_twice_does_not_wait(tmp_path):
    def press() -> None:
        pids_of_ready(tmp_path)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    with ranks(tmp_path, STUBBORN) as two:
        threading.Thread(target=press).start()
        assert two.wait() == 137


def test_the_death_of_the_launcher_takes_the_ranks_along(tmp_path):
    """kill -9: it cannot say anything any more."""
    (tmp_path / "logs").mkdir()
    code = f"import os, signal, time\nrank = int(os.environ['RANK'])\n{STUBBORN}"
    launcher = (
        "import sys; from pathlib import Path; from launchers import local\n"
        f"local.Ranks([sys.executable, '-c', {code!r}], 2, Path({str(tmp_path / 'logs')!r}), {{}}).wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", launcher], cwd=CONFIG.parents[2])
    pids = pids_of_ready(tmp_path)
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while (alive := [pid for pid in pids if _runs(pid)]) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_leaving_the_block_leaves_no_process(tmp_path):
    with ranks(tmp_path, "time.sleep(600)") as two:
        processes = two._processes
    assert [process.poll() for process in processes] == [-9, -9]


def run_local(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command = [sys.executable, "-m", "launchers.local", str(CONFIG), f"run.directory={tmp_path / 'run'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=CONFIG.parents[2], env=environment)


def test_a_wrong_configuration_ends_with_its_code_at_once(tmp_path):
    result = run_local(tmp_path, "train.stepz=3")
    assert result.returncode == ExitCode.CONFIGURATION
    assert "train.stepz" in result.stderr


def test_a_real_run_dies_in_a_save_is_restarted_and_finishes(tmp_path, monkeypatch):
    """The first attempt dies when its checkpoint is in place but not announced; the second finds that it is enough."""
    monkeypatch.setenv("MEGAVAR_FAULT", "before_latest")
    arguments = ("train.steps=2", "optimizer.schedule.warmup_steps=1", "train.global_batch_size=8", "--processes", "1")
    result = run_local(tmp_path, *arguments)
    assert result.returncode == ExitCode.FINISHED, result.stdout + result.stderr
    found = doctor.find_attempts(tmp_path / "run")
    assert [attempt.entry["outcome"] for attempt in found] == ["FAILED", "FINISHED"]
    assert diagnose(found[0]).rank == 0 and "SIGKILL" in diagnose(found[0]).cause
    assert (tmp_path / "run/DONE").exists()
    again = run_local(tmp_path, *arguments)
    assert again.returncode == ExitCode.FINISHED
    assert "finished already" in again.stdout


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert local._world_size(None) == 2
    with pytest.raises(ClusterError, match="2 GPUs"):
        local._world_size(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local._world_size(None) == 1
    assert local._world_size(3) == 3
