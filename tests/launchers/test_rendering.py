"""Rendered batch scripts: their exact text and their syntax."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from launchers.rendering import (
    Job,
    check_job,
    excluded_nodes,
    job_name,
    render_evaluation,
    render_sharding,
    render_training,
)
from launchers.templates import directives
from megavar.config.cluster import ClusterConfig, seconds_of_slurm_time
from megavar.config.loading import decode
from megavar.errors import ConfigError

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
    assert job_name(Path("/a/run")) != job_name(Path("/b/run"))
    assert job_name(Path("/a/r;u'n")).startswith("megavar-r_u_n-")


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
