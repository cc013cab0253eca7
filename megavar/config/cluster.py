"""What a cluster looks like to the launchers: one small YAML per cluster, apart from the configs of the runs."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from megavar.config.base import Section

_SLURM_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d{1,2}))?(?::(?P<third>\d{1,2}))?")
_DIRECTIVE_VALUE = re.compile(r"[A-Za-z0-9._/+=@:,&|*\[\]-]+")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

DirectiveValue = Annotated[str, Field(pattern=f"^{_DIRECTIVE_VALUE.pattern}$")]
"""A string that may stand on an ``#SBATCH`` line: no blanks, quotes, percent signs or line ends."""


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
    image: str
    """Image reference or path of a .sqsh file, as ``srun --container-image`` takes it."""
    mounts: tuple[str, ...] = ()
    """``host:container`` pairs. The run directory, the code and the data must be among them, under the same paths."""


class ApptainerContainer(Section):
    """A container started by ``apptainer exec`` in front of the rank's Python."""

    name: Literal["apptainer"]
    image: str
    """Path of a .sif file."""
    mounts: tuple[str, ...] = ()
    """``host:container`` pairs passed as ``--bind``."""


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
    gpus_per_node: int = Field(8, ge=0)
    """GPUs of a node; 0 trains on CPUs."""
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
    exclude_file: str | None = None
    """A file with one bad node a line (``#`` starts a comment), for clusters that keep a cordon list."""
    extra_directives: tuple[DirectiveValue, ...] = ()
    """Further sbatch options, for example ``--comment=megavar``."""

    signal_lead_seconds: int = Field(300, ge=10, le=65535)
    """How long before the time limit the run is asked to stop and save. Slurm may signal up to 60 s earlier. Preflight
    compares it with the measured time of a save."""
    maximum_attempts_without_progress: int = Field(3, ge=1)
    """Attempts in a row that may end without a newer checkpoint. After that the run stops and cancels its chain."""
    preflight: bool = True
    """Check every node before each attempt."""

    python: str | None = None
    """Interpreter of the ranks (inside the container, where there is one). None: the one that runs the launcher."""
    host_python: str | None = None
    """Interpreter, 3.9 or newer, for the batch script's own bookkeeping outside the container. None: ``python``
    without a container, ``python3`` with one."""
    container: Container | None = None
    """Container of the ranks."""
    environment: dict[str, str] = Field({})
    """Variables exported to the ranks. Values are passed as they are: nothing in them is expanded."""
    setup: tuple[str, ...] = ()
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
    node_local_directory: str = "/tmp"
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
        return value

    @field_validator("setup")
    @classmethod
    def _setup_lines_are_lines(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for line in value:
            if "\n" in line:
                raise ValueError(f"{line!r} holds a line end; write one list entry a line")
        return value

    @model_validator(mode="after")
    def _lead_fits_the_time_limit(self) -> "ClusterConfig":
        if self.signal_lead_seconds >= seconds_of_slurm_time(self.time):
            raise ValueError(
                f"signal_lead_seconds={self.signal_lead_seconds} is not shorter than the time limit {self.time}: the "
                f"run would be asked to stop as soon as it starts; lower the one or raise the other"
            )
        return self

    @property
    def ranks_per_node(self) -> int:
        """Processes that run on a node."""
        return self.tasks_per_node or max(self.gpus_per_node, 1)
