"""``python -m launchers.slurm``: what it prints, refuses and writes. Slurm's own commands are small recorders here;
tests/slurm runs the real ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launchers import provenance, slurm
from megavar.config.loading import load_config
from megavar.errors import ExitCode
from megavar.records.jobs import job_name
from tests.launchers.stubs import Stubs

CONFIG = Path(__file__).parents[2] / "configs/quickstart/tokenizer.yaml"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder with a cluster file, and Slurm's commands as recorders on the PATH."""
    (tmp_path / "cluster.yaml").write_text("partition: main\ngpus_per_node: 2\nnode_local_directory: /local\n")
    stubs = Stubs(tmp_path / "bin", sbatch="4711", squeue="")
    monkeypatch.setenv("PATH", stubs.environment({})["PATH"])
    monkeypatch.setenv("MEGAVAR_CLUSTER", str(tmp_path / "cluster.yaml"))
    monkeypatch.chdir(tmp_path)
    return stubs


def submit(*arguments: str) -> int:
    return slurm.main(["submit", str(CONFIG), "--nodes", "2", *arguments])


def test_dry_run_prints_the_script_and_writes_nothing(site, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert submit("--dry-run", "--time", "3:00:00", "--partition", "debug", "run.directory=here") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --time=3:00:00" in script and "#SBATCH --partition=debug" in script
    assert "#SBATCH --nodes=2" in script and "#SBATCH --gpus-per-node=2" in script
    assert f"run_directory={tmp_path}/here" in script
    assert sorted(tmp_path.rglob("*")) == before
    assert not site.calls_file.exists()


def test_test_only_asks_the_controller(site, tmp_path):
    assert submit("--test-only", "run.directory=here") == 0
    (call,) = site.calls("sbatch")
    assert call[0] == "--test-only"
    assert not (tmp_path / "here").exists()


def test_the_run_directory_is_self_contained(site, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NCCL_DEBUG", "it's 'WARN'")
    monkeypatch.setenv("NCCL_API_KEY", "a8c13f-not-for-others")
    monkeypatch.setenv("WANDB_API_KEY", "a8c13f-not-for-others")
    assert submit("run.directory=here", "train.steps=70") == 0
    run = tmp_path / "here"
    assert load_config(run / "config.yaml").train.steps == 70
    assert load_config(run / "config.yaml").run.directory == str(run)
    assert site.calls("sbatch") == [["--parsable", str(run / "submit.sbatch")]]
    recorded = json.loads((run / "environment.json").read_text())
    assert recorded["NCCL_DEBUG"] == "it's 'WARN'"
    assert not [name for name in recorded if "KEY" in name]
    texts = [file.read_text() for file in run.glob("*") if file.is_file() and file.name != "code.patch"]
    assert "a8c13f-not-for-others" not in "".join(texts)
    assert "torch==" in (run / "packages.txt").read_text()
    code = json.loads((run / "code.json").read_text())
    assert len(code["commit"]) == 40
    assert (run / "code.patch").exists()
    (copy,) = (run / "code").iterdir()
    assert (copy / "megavar/__main__.py").read_bytes() == (provenance.CODE_ROOT / "megavar/__main__.py").read_bytes()
    assert not list(copy.rglob("__pycache__"))
    script = (run / "submit.sbatch").read_text()
    assert f"code_directory={copy}" in script
    assert "export NCCL_DEBUG='it'\"'\"'s '\"'\"'WARN'\"'\"''" in script
    (submission,) = (run / "submissions.jsonl").read_text().splitlines()
    assert json.loads(submission)["jobs"] == ["4711"]
    assert "4711" in capsys.readouterr().out


def test_files_that_the_configuration_names_are_those_of_the_copy(site, tmp_path, monkeypatch):
    """Otherwise editing the checkout would change queued jobs after all."""
    monkeypatch.chdir(CONFIG.parents[2])
    run = tmp_path / "here"
    quickstart = str(CONFIG.parents[1] / "quickstart.yaml")
    assert slurm.main(["submit", quickstart, "--nodes", "1", f"run.directory={run}"]) == 0
    config, (copy,) = load_config(run / "config.yaml"), (run / "code").iterdir()
    assert config.deepspeed == f"{copy}/{load_config(quickstart).deepspeed}"
    assert config.run.requires == (f"{copy}/configs/quickstart/tokenizer.yaml",)
    assert load_config(config.run.requires[0]).run.path == "runs/quickstart-tokenizer"


def test_the_copied_code_runs(site, tmp_path):
    assert submit("run.directory=here") == 0
    (copy,) = (tmp_path / "here/code").iterdir()
    command = "import launchers.progress, megavar.errors; print(launchers.progress.__file__, megavar.errors.__file__)"
    result = subprocess.run([sys.executable, "-P", "-c", command], env={"PYTHONPATH": str(copy)}, cwd=CONFIG.parents[2],
                            capture_output=True, text=True, check=True)  # fmt: skip
    assert result.stdout.split() == [f"{copy}/launchers/progress.py", f"{copy}/megavar/errors.py"]


def test_a_chain_queues_jobs_that_do_not_requeue(site, tmp_path):
    assert submit("--chain", "3", "run.directory=here") == 0
    assert len(site.calls("sbatch")) == 3
    script = (tmp_path / "here/submit.sbatch").read_text()
    assert "#SBATCH --no-requeue" in script and "#SBATCH --dependency=singleton" in script
    assert "continue_by=chain" in script


def test_ways_to_continue(site, tmp_path, capsys):
    assert submit("--no-requeue", "run.directory=here") == 0
    assert "continue_by=hand" in (tmp_path / "here/submit.sbatch").read_text()
    assert submit("--chain", "2", "--requeue", "run.directory=there") == ExitCode.CONFIGURATION
    assert "give one of them" in capsys.readouterr().err


def test_a_second_submission_is_refused(site, tmp_path, monkeypatch, capsys):
    assert submit("run.directory=here") == 0
    busy = Stubs(tmp_path / "busy", sbatch="4712", squeue="4711 RUNNING")
    monkeypatch.setenv("PATH", busy.environment({})["PATH"])
    assert submit("run.directory=here") == ExitCode.PREFLIGHT
    error = capsys.readouterr().err
    assert "4711 RUNNING" in error and "--behind" in error
    assert not busy.calls("sbatch")
    assert f"--name={job_name('quickstart-tokenizer', tmp_path / 'here')}" in busy.calls("squeue")[0]
    assert submit("--behind", "run.directory=here") == 0
    assert len(busy.calls("sbatch")) == 1


def test_another_configuration_in_the_same_directory_is_refused(site, capsys):
    assert submit("run.directory=here") == 0
    assert submit("run.directory=here", "logging.interval=3") == 0, "does not change what is trained"
    assert submit("run.directory=here", "train.seed=5") == ExitCode.CONFIGURATION
    assert "train.seed is 0 there and 5 here" in capsys.readouterr().err


def test_a_finished_run_is_not_submitted(site, tmp_path, capsys):
    assert submit("run.directory=here") == 0
    (tmp_path / "here/DONE").touch()
    assert submit("run.directory=here") == ExitCode.FINISHED
    assert "finished already" in capsys.readouterr().out
    assert len(site.calls("sbatch")) == 1
    assert submit("run.directory=here", "train.fresh=true") == ExitCode.FINISHED
    assert len(site.calls("sbatch")) == 2
    assert not (tmp_path / "here/DONE").exists(), "or the job would end at once"


def test_required_runs_count_as_progress(site, monkeypatch, capsys):
    monkeypatch.chdir(CONFIG.parents[2])
    assert slurm.main(["submit", str(CONFIG.parents[1] / "quickstart.yaml"), "--nodes", "1", "--dry-run"]) == 0
    assert f"required=({Path.cwd()}/runs/quickstart-tokenizer)" in capsys.readouterr().out


def test_errors_of_slurm_are_passed_on(site, tmp_path, monkeypatch, capsys):
    failing = tmp_path / "failing"
    failing.mkdir()
    (failing / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n")
    (failing / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{failing}:{site.environment({})['PATH']}")
    assert submit("run.directory=here") == ExitCode.PREFLIGHT
    assert "invalid partition specified" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "reached"),
    [
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", False),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", False),
        ("sbatch: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
         "sbatch: fatal: Could not establish a configuration source", False),
        ("sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received", False),
        ("sbatch: error: Batch job submission failed: Protocol authentication error", False),
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination", True),
        ("sbatch: error: QOSMaxSubmitJobPerUserLimit", True),
    ],
)  # fmt: skip
def test_who_is_to_blame_where_slurm_fails(site, tmp_path, monkeypatch, capsys, said, reached):
    failing = tmp_path / "failing"
    failing.mkdir()
    (failing / "sbatch").write_text(f"#!/bin/sh\ncat >&2 <<'E'\n{said}\nE\nexit 1\n")
    (failing / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{failing}:{site.environment({})['PATH']}")
    assert submit("run.directory=here") == ExitCode.PREFLIGHT
    error = capsys.readouterr().err
    assert ("Check the partition" in error, "controller does not answer" in error) == (reached, not reached)
    assert " ".join(said.split()) in error


def test_a_chain_that_is_queued_in_part_says_how_to_go_on(site, tmp_path, monkeypatch, capsys):
    failing = tmp_path / "failing"
    failing.mkdir()
    (failing / "sbatch").write_text(f"#!/bin/sh\nmkdir {tmp_path}/once 2>/dev/null && echo 4711\n")
    (failing / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{failing}:{site.environment({})['PATH']}")
    assert submit("--chain", "3", "run.directory=here") == ExitCode.PREFLIGHT
    error = capsys.readouterr().err
    assert "Only 1 of 3 jobs are queued (4711)" in error and "--behind --chain 2" in error
    assert json.loads((tmp_path / "here/submissions.jsonl").read_text())["jobs"] == ["4711"]


def test_without_slurm_the_error_says_where_to_go(site, monkeypatch, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert submit("run.directory=here") == ExitCode.PREFLIGHT
    assert "login node" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--node", "3"], ["trian"], ["--chain", "0"], ["run.nam=x"]])
def test_misspelled_arguments_are_refused(site, words):
    try:
        code = submit(*words)
    except SystemExit as error:
        code = error.code
    assert code == ExitCode.CONFIGURATION
    assert not site.calls("sbatch")


def test_cluster_file_errors(site, tmp_path, monkeypatch, capsys):
    (tmp_path / "cluster.yaml").write_text("partiton: main\n")
    assert submit() == ExitCode.CONFIGURATION
    assert "Did you mean 'partition'?" in capsys.readouterr().err
    monkeypatch.delenv("MEGAVAR_CLUSTER")
    assert submit() == ExitCode.CONFIGURATION
    assert "cluster.example.yaml" in capsys.readouterr().err


def test_evaluation_job(site, tmp_path):
    assert slurm.main(["evaluate", str(CONFIG), "--nodes", "1", "run.directory=here", "sampling.number=100"]) == 0
    assert yaml.safe_load((tmp_path / "here/evaluate.yaml").read_text())["sampling"]["number"] == 100
    assert site.calls("sbatch") == [["--parsable", str(tmp_path / "here/evaluate.sbatch")]]
    assert f"arguments=({tmp_path}/here/evaluate.yaml)" in (tmp_path / "here/evaluate.sbatch").read_text()


def test_sharding_job(site, tmp_path):
    assert slurm.main(["shard", "--nodes", "3", "--logs", "here", "--", "--source", "a folder; x"]) == 0
    script = (tmp_path / "here/shard.sbatch").read_text()
    assert "arguments=(--source 'a folder; x')" in script
    assert "gpus-per-node" not in script
