"""From a cluster file and a run directory to the text of a batch script."""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from launchers.templates import Shell, Value, directives, render
from megavar import notify
from megavar.config.cluster import (
    ApptainerContainer,
    ClusterConfig,
    PyxisContainer,
)
from megavar.errors import ConfigError, ExitCode
from megavar.records.jobs import job_name

ContinueBy = Literal["requeue", "chain", "hand"]
"""How a run goes on after a stop: the job requeues itself, the next queued job starts, or a person submits again."""


@dataclass(frozen=True)
class Job:
    """Everything that decides the text of a batch script."""

    cluster: ClusterConfig
    run_directory: Path
    """Absolute."""
    code_directory: Path
    submit_directory: Path
    """The folder in which relative paths of the config are looked up."""
    nodes: int
    continue_by: ContinueBy = "requeue"
    recorded_environment: Mapping[str, str] = field(default_factory=dict)
    excluded_nodes: Sequence[str] = ()
    required_runs: Sequence[Path] = ()
    """Directories of the runs that are trained first where they are not finished yet."""
    python: str = sys.executable
    run_name: str = ""
    """Of the run; the folder's where there is none."""

    @property
    def name(self) -> str:
        """Job name, unique to the run directory: singleton dependencies and the cancelling of a chain go by it."""
        return job_name(self.run_name or self.run_directory.name, self.run_directory)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.cluster.ranks_per_node


def render_training(job: Job) -> str:
    """The script of a training job (``slurm/train.sbatch``)."""
    cluster = job.cluster
    return _render(
        "train.sbatch",
        job,
        _directives(job, job.name, job.nodes),
        run_directory=job.run_directory,
        host_python=_host_python(job),
        maximum_attempts=cluster.maximum_attempts_without_progress,
        required=[str(path) for path in job.required_runs],
        check_nodes=int(cluster.preflight),
        nodes=job.nodes,
        tasks=job.world_size,
        tasks_per_node=cluster.ranks_per_node,
        cpus_per_node=cluster.ranks_per_node * cluster.cpus_per_task,
        gpus_per_node=cluster.gpu_count,
        signal_lead_seconds=cluster.signal_lead_seconds,
        CONFIGURATION=int(ExitCode.CONFIGURATION),
        NO_PROGRESS=int(ExitCode.NO_PROGRESS),
    )


def render_evaluation(job: Job, arguments: Sequence[str]) -> str:
    """The script of a job that runs ``python -m megavar evaluate <arguments>``."""
    return _render(
        "evaluate.sbatch",
        job,
        _directives(job, f"{job.name}-evaluate", job.nodes),
        run_directory=job.run_directory,
        host_python=_host_python(job),
        tasks=job.world_size,
        tasks_per_node=job.cluster.ranks_per_node,
        arguments=arguments,
    )


def render_sharding(job: Job, arguments: Sequence[str]) -> str:
    """The script of a job that runs ``python -m tools.shard_images <arguments>``, one task per node, without GPUs."""
    job = replace(job, cluster=job.cluster.without_gpus())
    return _render(
        "shard.sbatch",
        job,
        _directives(job, f"{job.name}-shard", job.nodes),
        tasks=job.nodes,
        tasks_per_node=1,
        arguments=arguments,
    )


def _render(template: str, job: Job, header: Shell, **values: Value) -> str:
    cluster = job.cluster
    return render(
        template,
        {
            "directives": header,
            "code_directory": job.code_directory,
            "submit_directory": job.submit_directory,
            "python": [*_command_prefix(cluster), cluster.python or job.python],
            "container": _container_options(cluster),
            "node_local_directory": cluster.node_local_directory,
            "continue_by": job.continue_by,
            "environment": _exports({**job.recorded_environment, **cluster.environment, **_notification(cluster)}),
            "setup": Shell("\n".join(cluster.setup)),
            "cpus_per_task": cluster.cpus_per_task,
            **values,
        },
    )


def _directives(job: Job, name: str, nodes: int) -> Shell:
    cluster = job.cluster
    try:
        header = directives(
            {
                "job-name": name,
                "partition": cluster.partition,
                "account": cluster.account,
                "qos": cluster.qos,
                "reservation": cluster.reservation,
                "constraint": cluster.constraint,
                "nodes": nodes,
                "ntasks-per-node": cluster.ranks_per_node,
                "gpus-per-node": None if cluster.asks_for_gpus_itself else cluster.gpus_per_node or None,
                "cpus-per-task": cluster.cpus_per_task,
                "mem": cluster.memory,
                "exclusive": cluster.exclusive,
                "time": cluster.time,
                "exclude": ",".join(job.excluded_nodes) or None,
                "output": _output_pattern(job.run_directory),
                "open-mode": "append",
                "signal": f"B:USR1@{cluster.signal_lead_seconds}",
                "dependency": "singleton",
                "requeue": job.continue_by == "requeue",
                "no-requeue": job.continue_by != "requeue",
            }
        )
    except ValueError as error:
        raise ConfigError(f"The batch script cannot be written: {error}.") from error
    extra = "".join(f"\n#SBATCH {option}" for option in cluster.extra_directives)
    return Shell(header + extra)


def _output_pattern(run_directory: Path) -> str:
    if "%" in str(run_directory):
        raise ConfigError(f"The run directory {run_directory} has a percent sign, which Slurm replaces. Rename it.")
    return f"{run_directory}/logs/slurm-%j.out"


def _exports(variables: Mapping[str, str]) -> Shell:
    return Shell("\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()))


def _notification(cluster: ClusterConfig) -> dict[str, str]:
    return {} if cluster.notify is None else {notify.VARIABLE: cluster.notify.model_dump_json()}


def _host_python(job: Job) -> str:
    if job.cluster.host_python is not None:
        return job.cluster.host_python
    return (job.cluster.python or job.python) if job.cluster.container is None else "python3"


def _container_options(cluster: ClusterConfig) -> list[str]:
    container = cluster.container
    if not isinstance(container, PyxisContainer):
        return []
    mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    return [f"--container-image={container.image}", *mounts]


def _command_prefix(cluster: ClusterConfig) -> list[str]:
    container = cluster.container
    if not isinstance(container, ApptainerContainer):
        return []
    mounts = [argument for mount in container.mounts for argument in ("--bind", mount)]
    gpu = ["--nv"] if cluster.gpu_count else []
    return ["apptainer", "exec", *gpu, *mounts, container.image]


def check_job(job: Job) -> None:
    """Refuse what cannot work before the scheduler sees it.

    Raises:
        ConfigError: the run directory is not shared between nodes.
    """
    local = Path(job.cluster.node_local_directory).resolve()
    if job.nodes > 1 and job.run_directory.resolve().is_relative_to(local):
        raise ConfigError(
            f"The run directory {job.run_directory} lies in {local}, which every node has for itself. "
            f"Set run.directory to a path on the shared file system."
        )


def excluded_nodes(cluster: ClusterConfig) -> list[str]:
    """Nodes of ``exclude`` and of the cordon file, without repetition.

    Raises:
        ConfigError: the cordon file cannot be read or does not hold node names.
    """
    names = list(cluster.exclude)
    if cluster.exclude_file is not None:
        try:
            lines = Path(cluster.exclude_file).read_text().splitlines()
        except OSError as error:
            raise ConfigError(f"exclude_file of the cluster file cannot be read: {error}.") from error
        names += [line.split("#")[0].strip() for line in lines]
    for name in names:
        if name and not re.fullmatch(r"[A-Za-z0-9._,\[\]-]+", name):
            raise ConfigError(f"{name!r} in exclude or exclude_file of the cluster file is not the name of a node.")
    return list(dict.fromkeys(name for name in names if name))
