"""What a cluster looks like to the launchers: one small YAML per cluster, apart from the configs of the runs."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from megavar import notify
from megavar.config.base import PathText, Section
from megavar.config.secret import looks_secret, secret_in

_SLURM_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d{1,2}))?(?::(?P<third>\d{1,2}))?")
_DIRECTIVE_VALUE = re.compile(r"[A-Za-z0-9._/+=@:,&|*\[\]-]+")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TYPED_GPUS = re.compile(r"[A-Za-z][A-Za-z0-9._-]*:[1-9][0-9]*")
_GPU_RESOURCE = re.compile(r"gpu(?::(?P<type>[A-Za-z][A-Za-z0-9._-]*))?(?::(?P<count>\d+))?")
_SET_BY = {
    "job-name": "the run directory", "J": "the run directory", "output": "the run directory", "o": "the run directory",
    "nodes": "--nodes of the command line", "N": "--nodes of the command line", "partition": "partition",
    "p": "partition", "account": "account", "A": "account", "qos": "qos", "q": "qos", "reservation": "reservation",
    "constraint": "constraint", "C": "constraint", "time": "time", "t": "time", "mem": "memory",
    "mem-per-cpu": "memory", "mem-per-gpu": "memory", "ntasks": "tasks_per_node", "n": "tasks_per_node",
    "ntasks-per-node": "tasks_per_node", "cpus-per-task": "cpus_per_task", "c": "cpus_per_task",
    "gpus": "gpus_per_node", "G": "gpus_per_node", "gpus-per-node": "gpus_per_node", "gpus-per-task": "gpus_per_node",
    "exclusive": "exclusive", "exclude": "exclude", "x": "exclude", "signal": "signal_lead_seconds",
    "requeue": "--requeue of the command line", "no-requeue": "--no-requeue of the command line",
    "dependency": "--chain of the command line", "d": "--chain of the command line", "open-mode": "the launcher",
}  # fmt: skip
"""Options of sbatch that the script sets already: a second one would contradict the first, or win silently."""
_SECRET_REMEDY = (
    "and all that the cluster file says stands in clear in submit.sbatch. Export it in the shell that submits, whose "
    "variables Slurm passes on to the job; or let a line of `setup` read it from a file that only you can read, for "
    "example `source ~/.megavar-secrets`"
)

DirectiveValue = Annotated[str, Field(pattern=f"^{_DIRECTIVE_VALUE.pattern}$")]
"""A string that may stand on an ``#SBATCH`` line: no blanks, quotes, percent signs or line ends."""


def _without_secrets(text: str) -> str:
    if (found := secret_in(text)) is not None:
        raise ValueError(f"{found} looks like a secret, {_SECRET_REMEDY}")
    return text


PlainText = Annotated[str, AfterValidator(_without_secrets)]
"""A string that is written into the batch script: no credentials."""


def seconds_of_slurm_time(text: str) -> int:
    """Seconds of a Slurm time such as ``30`` (minutes), ``90:00``, ``24:00:00``, ``2-12`` or ``1-00:30:00``.

    Raises:
        ValueError: ``text`` is not a Slurm time.
    """
    match = _SLURM_TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a Slurm time: write minutes, hours:minutes:seconds or days-hours:minutes")
    first, second, third = (int(match[name] or 0) for name in ("first", "second", "third"))
    if match["days"] is not None:
        return ((int(match["days"]) * 24 + first) * 60 + second) * 60 + third
    if match["third"] is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + second


class PyxisContainer(Section):
    """A container started by Slurm's pyxis plugin (enroot)."""

    name: Literal["pyxis"]
    image: PlainText
    """Image reference or path of a .sqsh file, as ``srun --container-image`` takes it."""
    mounts: tuple[PathText, ...] = ()
    """``host:container`` pairs. The run directory, the code and the data must be among them, under the same paths."""


class ApptainerContainer(Section):
    """A container started by ``apptainer exec`` in front of the rank's Python."""

    name: Literal["apptainer"]
    image: PathText
    """Path of a .sif file."""
    mounts: tuple[PathText, ...] = ()
    """``host:container`` pairs passed as ``--bind``."""


class NotifyConfig(Section):
    """A command that is told of what happens to runs: one JSON object on its standard input (``megavar/notify.py``).

    It runs where the news is: alerts come from the first rank (inside the container, where there is one), ends of
    attempts from the batch script. What it must keep secret it reads from a file that only you can read.
    """

    command: tuple[PlainText, ...] = Field(strict=False, min_length=1)
    """Program and arguments, not a line of shell: ``[/shared/bin/tell-slack]``."""
    on: tuple[Literal[(*notify.ALERTS, *notify.ENDS)], ...] = Field((*notify.ALERTS, *notify.ENDS), strict=False)  # type: ignore[valid-type]
    """Of what it is told; default: of everything. Alerts: see ``logging.alerts``; ``not_finite``, ``rolled_back`` and
    ``diverged`` are what ``train.recovery`` does. Ends of an attempt: ``finished``; ``preempted``, and goes on;
    ``failed``, and starts again; ``stopped``, and waits for a person."""


Container = Annotated[PyxisContainer | ApptainerContainer, Field(discriminator="name")]


class ClusterConfig(Section):
    """Partition, nodes and habits of one Slurm cluster."""

    partition: DirectiveValue | None = None
    """Partition (queue), or several separated by commas. None: the cluster's default."""
    account: DirectiveValue | None = None
    """Account that is charged."""
    qos: DirectiveValue | None = None
    """Quality of service."""
    reservation: DirectiveValue | None = None
    """Reservation to run in."""
    constraint: DirectiveValue | None = None
    """Node features, in Slurm's syntax."""
    time: str = "24:00:00"
    """Time limit of one job, in Slurm's syntax. A run may be longer: it continues in the next job."""
    gpus_per_node: Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=f"^{_TYPED_GPUS.pattern}$")] = 8
    """GPUs of a node; 0 trains on CPUs. Where nodes differ, with their type as Slurm calls it: ``h100:8``. They are
    asked for by ``--gpus-per-node``, or by a ``--gres=gpu:h100:8`` in ``extra_directives`` where a cluster wants it."""
    tasks_per_node: int | None = Field(None, ge=1)
    """Ranks per node. None: one per GPU, or one where there are no GPUs."""
    cpus_per_task: int = Field(8, ge=1)
    """CPU cores of each rank; data workers share them."""
    memory: DirectiveValue = "0"
    """Memory of a node, as ``--mem`` takes it; 0 is all of it."""
    exclusive: bool = True
    """Take whole nodes."""
    exclude: tuple[DirectiveValue, ...] = ()
    """Nodes never to use. More can stand in ``exclude_file``."""
    exclude_file: PathText | None = None
    """A file with one bad node a line (``#`` starts a comment), for clusters that keep a cordon list."""
    extra_directives: tuple[Annotated[DirectiveValue, AfterValidator(_without_secrets)], ...] = ()
    """Further sbatch options, for example ``--comment=megavar``; none that another key sets."""

    signal_lead_seconds: int = Field(300, ge=10, le=65535)
    """How long before the time limit the run is asked to stop and save. Slurm may signal up to 60 s earlier. Preflight
    compares it with the measured time of a save."""
    maximum_attempts_without_progress: int = Field(3, ge=1)
    """Attempts in a row that may end without a newer checkpoint. After that the run stops and cancels its chain."""
    preflight: bool = True
    """Check every node before each attempt."""

    notify: NotifyConfig | None = None
    """Tell a command of alerts and ends; none by default."""

    python: PathText | None = None
    """Interpreter of the ranks (inside the container, where there is one). None: the one that runs the launcher."""
    host_python: PathText | None = None
    """Interpreter, 3.9 or newer, for the batch script's own bookkeeping outside the container. None: ``python``
    without a container, ``python3`` with one."""
    container: Container | None = None
    """Container of the ranks."""
    environment: dict[str, str] = Field({})
    """Variables exported to the ranks. Values are passed as they are: nothing in them is expanded. Secrets are refused:
    export them in the shell that submits, or read them in ``setup`` from a file that only you can read."""
    setup: tuple[PlainText, ...] = ()
    """Shell lines run in the batch script before anything else, such as ``module load cuda/12.9``. This is the only key
    whose content is shell."""
    record_environment: tuple[str, ...] = (
        "NCCL_*",
        "TORCH*",
        "CUDA_*",
        "OMP_NUM_THREADS",
        "HF_HOME",
        "WANDB_MODE",
        "WANDB_PROJECT",
        "WANDB_ENTITY",
        "FI_*",
        "UCX_*",
    )
    """Allow-list (shell patterns) of variables of the submitting shell that are recorded in the run directory and set
    in the job, so that a later submission by hand gives the same job. Names that look like secrets are never taken."""
    node_local_directory: PathText = "/tmp"
    """Folder on every node's own disk for compiler caches."""
    snapshot_code: bool = True
    """Copy the code into the run directory and run the copy: editing the checkout then does not change queued jobs."""

    @field_validator("time")
    @classmethod
    def _time_is_valid(cls, value: str) -> str:
        seconds_of_slurm_time(value)
        return value

    @field_validator("environment")
    @classmethod
    def _names_are_variables(cls, value: dict[str, str]) -> dict[str, str]:
        for name, content in value.items():
            if not _VARIABLE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of an environment variable")
            if "\0" in content:
                raise ValueError(f"the value of {name} contains a NUL byte")
            if looks_secret(name, content):
                raise ValueError(f"{name} looks like a secret, {_SECRET_REMEDY}")
        return value

    @field_validator("setup")
    @classmethod
    def _setup_lines_are_lines(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for line in value:
            if "\n" in line:
                raise ValueError(f"{line!r} holds a line end; write one list entry a line")
        return value

    @field_validator("extra_directives")
    @classmethod
    def _directives_add_something(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for directive in value:
            option = re.fullmatch(r"--?([A-Za-z][A-Za-z-]*?)(?:=.*)?", directive)
            if option is None:
                raise ValueError(f"{directive!r} is not an option of sbatch: write --name=value")
            if option[1] in _SET_BY:
                raise ValueError(f"--{option[1]} is set by {_SET_BY[option[1]]} already: say it there")
        return value

    @model_validator(mode="after")
    def _one_request_for_gpus(self) -> "ClusterConfig":
        kind, _, _ = str(self.gpus_per_node).rpartition(":")
        for directive, asked in self._gpu_directives():
            count = int(asked["count"] or 1)
            if count != self.gpu_count or (kind and asked["type"] not in (None, kind)):
                wanted = f"{asked['type']}:{count}" if asked["type"] else count
                raise ValueError(
                    f"extra_directives: {directive} and gpus_per_node: {self.gpus_per_node} ask for different GPUs: "
                    f"write gpus_per_node: {wanted}"
                )
        return self

    def _gpu_directives(self) -> list[tuple[str, re.Match[str]]]:
        """Those of ``extra_directives`` that ask for GPUs, and how."""
        found = []
        for directive in self.extra_directives:
            for resource in directive.removeprefix("--gres=").split(",") if directive.startswith("--gres=") else ():
                if (match := _GPU_RESOURCE.fullmatch(resource)) is not None:
                    found.append((directive, match))
        return found

    @model_validator(mode="after")
    def _lead_fits_the_time_limit(self) -> "ClusterConfig":
        if self.signal_lead_seconds >= seconds_of_slurm_time(self.time):
            raise ValueError(
                f"signal_lead_seconds={self.signal_lead_seconds} is not shorter than the time limit {self.time}: the "
                f"run would be asked to stop as soon as it starts; lower the one or raise the other"
            )
        return self

    @property
    def gpu_count(self) -> int:
        """GPUs of a node, whatever their type."""
        return int(str(self.gpus_per_node).rpartition(":")[2])

    @property
    def asks_for_gpus_itself(self) -> bool:
        """Whether ``extra_directives`` ask for the GPUs."""
        return bool(self._gpu_directives())

    def without_gpus(self) -> "ClusterConfig":
        """The same cluster for jobs that compute on CPUs, with one task per node that has all cores."""
        asking = [directive for directive, _ in self._gpu_directives()]
        return self.model_copy(
            update={
                "gpus_per_node": 0,
                "tasks_per_node": 1,
                "cpus_per_task": self.ranks_per_node * self.cpus_per_task,
                "extra_directives": tuple(other for other in self.extra_directives if other not in asking),
            }
        )

    @property
    def ranks_per_node(self) -> int:
        """Processes that run on a node."""
        return self.tasks_per_node or max(self.gpu_count, 1)
