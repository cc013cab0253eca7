"""Rendered batch scripts: their exact text and their syntax."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from launchers.rendering import (
    Job,
    check_job,
    excluded_nodes,
    render_evaluation,
    render_sharding,
    render_training,
)
from launchers.templates import directives
from megavar.config.cluster import ClusterConfig, seconds_of_slurm_time
from megavar.config.loading import decode
from megavar.errors import ConfigError
from megavar.records.jobs import job_name

GOLDEN = Path(__file__).parent / "golden"
HOSTILE = 'it\'s "$(touch pwned)" `touch pwned`; touch pwned #\n#SBATCH --nodes=99\ntouch pwned & {{nodes}} \\'

CLUSTER = {
    "partition": "gpu",
    "account": "vision",
    "exclude": ["bad1", "bad2"],
    "setup": ["module load cuda"],
    "environment": {"NCCL_SOCKET_IFNAME": "ib0", "GREETING": "hello, world"},
    "container": {"name": "pyxis", "image": "/images/megavar.sqsh", "mounts": ["/shared:/shared"]},
    "python": "/opt/python",
}


def job(cluster: dict | None = None, **changes) -> Job:
    config = decode(CLUSTER if cluster is None else cluster, ClusterConfig, "test")
    fields = {
        "cluster": config,
        "run_directory": Path("/shared/runs/var-d16"),
        "code_directory": Path("/shared/runs/var-d16/code/0123456789ab"),
        "submit_directory": Path("/home/me/my project"),
        "nodes": 4,
        "recorded_environment": {"NCCL_DEBUG": "WARN"},
        "excluded_nodes": config.exclude,
        "run_name": "stmoe_d16",
    }
    return Job(**{**fields, **changes})


SCRIPTS = {
    "train_requeue": lambda: render_training(job()),
    "train_chain": lambda: render_training(job(continue_by="chain")),
    "evaluate": lambda: render_evaluation(job(), ["/shared/runs/var-d16/evaluate.yaml"]),
    "shard": lambda: render_sharding(job(), ["--source", "/data/image net", "--output", "/shared/shards"]),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_the_golden_ones(name):
    text, golden = SCRIPTS[name](), GOLDEN / f"{name}.sbatch"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text(), "set UPDATE_GOLDEN=1 to accept the new text, then read its diff"


@pytest.fixture
def script(name, tmp_path):
    """The rendered script of this name as a file."""
    path = tmp_path / "script"
    path.write_text(SCRIPTS[name]())
    return path


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed (apt-get install shellcheck)"
)
@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name, script):
    shared = [] if name.startswith("train") else ["--exclude=SC2317,SC2034,SC2154"]  # not all use all of job.bash
    command = ["shellcheck", "--severity=info", *shared, str(script)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("key", ["partition", "account", "qos", "reservation", "constraint", "memory"])
def test_directives_cannot_hold_hostile_values(key):
    with pytest.raises(ConfigError, match=key):
        decode({key: HOSTILE}, ClusterConfig, "test")


def test_directives_refuse_what_sbatch_may_interpret():
    for value in ("a b", 'a"b', "a\nb", "a'b", "$(x)", "a\\b"):
        with pytest.raises(ValueError, match="SBATCH"):
            directives({"output": value})
    with pytest.raises(ConfigError, match="percent"):
        render_training(job(run_directory=Path("/shared/runs/%j")))
    with pytest.raises(ConfigError, match="output"):
        render_training(job(run_directory=Path("/shared/my runs/x")))


@pytest.mark.parametrize(
    ("cluster", "request_line"),
    [
        ({"gpus_per_node": 4}, "#SBATCH --gpus-per-node=4"),
        ({"gpus_per_node": "h100:8"}, "#SBATCH --gpus-per-node=h100:8"),
        ({"gpus_per_node": "nvidia_a100_3g.20gb:2"}, "#SBATCH --gpus-per-node=nvidia_a100_3g.20gb:2"),
        ({"extra_directives": ["--gres=gpu:h100:8"]}, "#SBATCH --gres=gpu:h100:8"),
        ({"gpus_per_node": "h100:8", "extra_directives": ["--gres=nvme:1,gpu:8"]}, "#SBATCH --gres=nvme:1,gpu:8"),
        ({"gpus_per_node": 1, "extra_directives": ["--gres=gpu"]}, "#SBATCH --gres=gpu"),
    ],
)
def test_gpus_are_asked_for_once(cluster, request_line):
    script = render_training(job(cluster))
    asking = [line for line in script.splitlines() if line.startswith("#SBATCH") and "gpu" in line]
    assert asking == [request_line]
    assert re.search(r"--gpus \d \\\n", script), "a number, also where the type is known"
    assert not re.search(r"^#SBATCH.*gpu", render_sharding(job(cluster), []), re.MULTILINE)


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"gpus_per_node": 4, "extra_directives": ["--gres=gpu:h100:8"]}, "write gpus_per_node: h100:8"),
        ({"gpus_per_node": "a100:8", "extra_directives": ["--gres=gpu:h100:8"]}, "write gpus_per_node: h100:8"),
        ({"gpus_per_node": "8xh100"}, "gpus_per_node"),
        ({"gpus_per_node": "h100:0"}, "gpus_per_node"),
        ({"extra_directives": ["--gpus=16"]}, "--gpus is set by gpus_per_node already"),
        ({"extra_directives": ["--time=3:00:00"]}, "--time is set by time already"),
        ({"extra_directives": ["--mem-per-gpu=90G"]}, "--mem-per-gpu is set by memory already"),
        ({"extra_directives": ["-N4"]}, "not an option of sbatch"),
        ({"extra_directives": ["comment=x"]}, "not an option of sbatch"),
    ],
)
def test_directives_that_contradict_each_other_are_refused(cluster, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        decode(cluster, ClusterConfig, "cluster.yaml")


@pytest.mark.parametrize(
    "cluster",
    [
        {"environment": {"WANDB_API_KEY": "geheim42"}},
        {"environment": {"DOOR_PIN": "424242"}},
        {"environment": {"HTTPS_PROXY": "http://me:geheim42@proxy:3128"}},
        {"setup": ["module load cuda", "export HF_TOKEN=geheim42"]},
        {"setup": ["curl -H 'Authorization: Bearer' https://me:geheim42@host/x"]},
        {"setup": ["WANDB_API_KEY='geheim42' && true"]},
        {"extra_directives": ["--export=ALL,AWS_SECRET_ACCESS_KEY=geheim42"]},
        {"container": {"name": "pyxis", "image": "docker://me:geheim42@registry#x"}},
    ],
)
def test_secrets_of_the_cluster_file_are_refused_unspoken(cluster):
    """They would stand in clear in submit.sbatch, which may lie in a folder that others read."""
    with pytest.raises(ConfigError, match=r"looks like a secret, .*Export it in the shell that submits") as caught:
        decode(cluster, ClusterConfig, "cluster.yaml")
    assert "geheim42" not in str(caught.value) and "424242" not in str(caught.value)


def test_what_only_resembles_a_secret_is_passed_on():
    environment = {"TOKENIZERS_PARALLELISM": "false", "HF_TOKEN_PATH": "/home/me/.token", "GIT_TERMINAL_PROMPT": "0",
                   "MAX_TOKENS": "4096"}  # fmt: skip
    setup = ["export WANDB_API_KEY=$(cat ~/.wandb)", 'export HF_TOKEN="$TOKEN"', "set -a; source ~/.megavar-secrets"]
    script = render_training(job({"environment": environment, "setup": setup}))
    assert all(f"export {name}={value}" in script for name, value in environment.items())
    assert all(line in script for line in setup)


def test_run_directory_must_be_shared():
    local = job(run_directory=Path("/tmp/runs/x"))
    with pytest.raises(ConfigError, match="every node has for itself"):
        check_job(local)
    check_job(job(run_directory=Path("/tmp/runs/x"), nodes=1))


def test_cordon_file_adds_nodes(tmp_path):
    (tmp_path / "cordon").write_text("# since May\nn3\nn4 # ECC\n\nbad1\n")
    cluster = decode({**CLUSTER, "exclude_file": str(tmp_path / "cordon")}, ClusterConfig, "test")
    assert excluded_nodes(cluster) == ["bad1", "bad2", "n3", "n4"]
    (tmp_path / "cordon").write_text("n3; rm -rf /\n")
    with pytest.raises(ConfigError, match="not the name of a node"):
        excluded_nodes(cluster)


def test_job_names_are_safe_and_unique():
    assert job_name("run", Path("/a/run")) != job_name("run", Path("/b/run"))
    assert job_name("r;u'n", Path("/a/x")).startswith("r_u_n-"), "listings show the first letters"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("90:30", 5430), ("24:00:00", 86400), ("2-12", 216000), ("1-00:30", 88200), ("1-00:00:01", 86401)],
)
def test_slurm_times(text, seconds):
    assert seconds_of_slurm_time(text) == seconds


def test_time_limits_are_checked():
    with pytest.raises(ConfigError, match="Slurm time"):
        decode({"time": "a day"}, ClusterConfig, "test")
    with pytest.raises(ConfigError, match="not shorter"):
        decode({"time": "5", "signal_lead_seconds": 300}, ClusterConfig, "test")


def test_example_cluster_file_is_valid():
    from launchers.slurm import load_cluster

    cluster = load_cluster(str(Path(__file__).parents[2] / "slurm/cluster.example.yaml"))
    assert cluster.ranks_per_node == 8
