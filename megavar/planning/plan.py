"""The plan of a run: what it costs on given GPUs as configured, and which layouts would serve it better."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavar.config.data import CacheSource, TokenFileSource
from megavar.config.deepspeed import complete_deepspeed, load_deepspeed_json
from megavar.config.root import Config
from megavar.errors import ConfigError
from megavar.parallel.rules import check_layout
from megavar.parallel.topology import Topology, data_parallel_size
from megavar.planning.calibration import Calibration
from megavar.planning.cost import TokenizerCost
from megavar.planning.hardware import EXPERTS_UTILIZATION, LINK_EFFICIENCY, TOKENIZER_UTILIZATION, accelerator
from megavar.planning.layout import Layout, Zero
from megavar.planning.measure import DrawRequest, drawing_flops, tokenizer_cost
from megavar.planning.memory import FLOAT32
from megavar.planning.passes import work_of
from megavar.planning.search import allowed_candidates, suggest
from megavar.planning.timing import Machine
from megavar.planning.workload import GeneratorWorkload, Prediction, Progress, TokenizerWorkload, Workload
from megavar.training.run import micro_batch_size

DEFAULT_GPU = "h200"
IMAGENET = 1_281_167
"""Training images of ImageNet-1k."""


@dataclass(frozen=True)
class Plan:
    """What ``megavar plan`` says."""

    name: str
    gpus: int
    workload: Workload
    assumed_utilization: bool
    """Whether the utilization is our assumption and neither the user's nor measured."""
    sample_flops: float | None
    """FLOPs per drawn image without the tokenizer; None for a tokenizer, and where they cannot be measured."""
    prediction: Prediction
    """The configuration as it is."""
    better: tuple[Prediction, ...]
    """Layouts that fit, fastest first."""
    steps: int
    images: int | None
    """Length of the training data, if known."""
    limit_seconds: float | None
    """Usable time of one job."""
    notes: tuple[str, ...]
    calibrated: str | None = None
    """Where and when the utilization was measured; None where it was not."""

    @property
    def images_per_second(self) -> float:
        """Of all GPUs together."""
        return self.prediction.layout.global_batch / self.prediction.time.total

    @property
    def utilization(self) -> float:
        """Model FLOPs utilization as the run's log will show it: over whole steps."""
        return self.images_per_second * self.workload.train_flops / (self.workload.peak * self.gpus)

    @property
    def seconds(self) -> float:
        """Wall time of the run without interruptions."""
        return self.steps * self.prediction.time.total

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs for the whole run."""
        return self.seconds / 3600 * self.gpus

    @property
    def links(self) -> int | None:
        """Jobs in a chain under the time limit."""
        return None if self.limit_seconds is None else math.ceil(self.seconds / self.limit_seconds)

    @property
    def fits(self) -> bool:
        """Whether the configuration as it is fits the device."""
        return self.prediction.fits(self.workload.machine.gpu.memory)


def plan(
    config: Config,
    gpus: int,
    gpu: str | None,
    mfu: float | None = None,
    *,
    calibration: Calibration | None = None,
    gpus_per_node: int = 8,
    images: int | None = None,
    job_seconds: float | None = None,
    suggestions: int = 5,
    progress: Progress = lambda done, total: None,
) -> Plan:
    """Predict a training run.

    Args:
        gpus: number of ranks.
        gpu: a name in :data:`megavar.planning.hardware.ACCELERATORS`; None where a calibration says what it is.
        mfu: utilization while blocks compute; None takes the calibration's, or the assumption of the table.
        calibration: measurements of the device, in the place of assumptions.
        images: length of the training data; None asks the data source.
        job_seconds: time limit of one job; None leaves out the number of jobs.
        suggestions: number of other layouts to suggest.
        progress: told how many of the ranks that must be measured are.

    Raises:
        ConfigError: the configuration is not trainable on so many GPUs, or nothing is known of the GPU.
    """
    if gpus < 1 or gpus_per_node < 1 or (mfu is not None and not 0 < mfu <= 1):
        raise ConfigError(
            f"A plan needs at least one GPU and a utilization between 0 and 1, not --gpus {gpus}, --gpus-per-node "
            f"{gpus_per_node}, --mfu {mfu}."
        )
    if config.recipe.trains == "teacher":
        raise ConfigError(
            f"The recipe {config.recipe.name!r} trains a teacher, which takes minutes: plans know generators and "
            f"tokenizers."
        )
    workload, measured = _measured_workload(config, gpu, min(gpus_per_node, gpus), calibration, mfu)
    layout, notes = configured_layout(config, gpus)
    notes += () if measured is None else measured.notes
    notes += tuple(f"not counted: {what}" for what in config.recipe.uncounted)
    count = _length(config) if images is None else images
    if count is None and _is_of_imagenet(config):
        count = IMAGENET
        notes += (f"counted {IMAGENET:,} images, ImageNet's: {_place(config)} is not here",)
    if config.train.steps is None and count is None:
        raise ConfigError(
            "The length of the run is given in epochs, but the training data cannot be opened here to count its "
            "images. Give their number, for example --images 1281167."
        )
    workload.prepare([layout, *(allowed_candidates(workload, layout) if suggestions else ())], progress)
    return Plan(
        name=config.run.name,
        gpus=gpus,
        workload=workload,
        assumed_utilization=mfu is None and measured is None,
        calibrated=None if measured is None or mfu is not None else measured.origin,
        sample_flops=None
        if config.generator is None
        else drawing_flops(DrawRequest(config.generator, config.tokenizer, config.sampling)),
        prediction=workload.predict(layout),
        better=tuple(suggest(workload, layout, suggestions)) if suggestions else (),
        steps=config.train.total_steps(count or 0),
        images=count,
        limit_seconds=None if job_seconds is None else usable_seconds(job_seconds),
        notes=notes,
    )


def predict(
    config: Config, ranks: int, gpu: str | None, *, calibration: Calibration | None = None, ranks_per_node: int = 8
) -> tuple[Prediction, str]:
    """What a run costs as configured, and where its speed comes from; arguments as in :func:`plan`."""
    workload, measured = _measured_workload(config, gpu, min(ranks_per_node, ranks), calibration)
    layout, _ = configured_layout(config, ranks)
    return workload.predict(layout), "assumed" if measured is None else measured.origin


def _measured_workload(
    config: Config, gpu: str | None, gpus_per_node: int, calibration: Calibration | None, mfu: float | None = None
) -> "tuple[Workload, _Measured | None]":
    machine, measured = _machine(config, gpu, gpus_per_node, calibration)
    return _workload(config, machine, mfu or (None if measured is None else measured.utilization)), measured


@dataclass(frozen=True)
class _Measured:
    """What a calibration says of a configuration."""

    utilization: float
    origin: str
    notes: tuple[str, ...]


def _machine(
    config: Config, gpu: str | None, gpus_per_node: int, calibration: Calibration | None
) -> tuple[Machine, _Measured | None]:
    """The device by its table, or by its calibration.

    Raises:
        ConfigError: both are given and speak of different devices, or the calibration has nothing like this generator.
    """
    if calibration is None or config.generator is None:
        return Machine(accelerator(gpu or DEFAULT_GPU), gpus_per_node), None
    device = calibration.accelerator
    if gpu is not None and gpu != device.name:
        raise ConfigError(f"--gpu {gpu} contradicts the calibration, which is of {calibration.device}. Leave it out.")
    precision = config.train.precision
    pace, exact = calibration.pace(config.generator, precision)
    peak = device.bf16 if precision == "bf16" else device.fp32
    tokenizer = pace.tokenizer_flops_per_second
    machine = Machine(
        device,
        gpus_per_node,
        block_floor=pace.floor,
        tokenizer_utilization=TOKENIZER_UTILIZATION if tokenizer is None else tokenizer / device.tf32,
        link_efficiency=LINK_EFFICIENCY if calibration.link_rate is None else 1.0,
    )
    notes = () if exact else (f"the calibration is of another generator, that of {pace.run}: times are less certain",)
    origin = f"measured on {calibration.device}, {calibration.date}"
    return machine, _Measured(pace.flops_per_second / peak, origin, notes)


def _workload(config: Config, machine: Machine, mfu: float | None) -> Workload:
    element = 2 if config.train.precision == "bf16" else FLOAT32
    ema, image_bytes, space = config.train.ema is not None, _image_bytes(config), config.tokenizer.space
    if config.generator is None:
        cost = tokenizer_cost(config.tokenizer)
        return TokenizerWorkload(machine, mfu or TOKENIZER_UTILIZATION, element, ema, image_bytes, cost)
    has_experts = config.generator.limits(space).experts is not None
    assumed = machine.gpu.utilization * (EXPERTS_UTILIZATION if has_experts else 1.0)
    tokenizer = None if reads_tokens(config) else tokenizer_cost(config.tokenizer)
    return GeneratorWorkload(
        machine,
        mfu or assumed,
        element,
        ema,
        image_bytes,
        config.generator,
        space,
        tokenizer,
        terms=config.recipe.counted_terms,
        teachers=teacher_costs(config),
        work=work_of(config.recipe, config.generator, space),
    )


def configured_layout(config: Config, world_size: int) -> tuple[Layout, tuple[str, ...]]:
    """The layout that the configuration asks for, checked, and what DeepSpeed's completion has to say about it.

    Raises:
        ConfigError: a rule is broken.
    """
    parallel = config.parallel
    data, expert_data = data_parallel_size(parallel, world_size)
    size = micro_batch_size(config.train, Topology(parallel, world_size, 0, data, expert_data))
    content: dict[str, Any] = load_deepspeed_json(Path(config.deepspeed))
    completed = complete_deepspeed(
        content,
        where=config.deepspeed,
        parallel=parallel,
        data_parallel_size=data,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=size,
        precision=config.train.precision,
        gradient_clipping=config.optimizer.gradient_clipping,
        has_experts=config.limits is not None and config.limits.experts is not None,
        device_type="cuda",
    )
    layout = Layout(parallel, Zero.of(content, completed.stage), world_size, config.train.global_batch_size, size)
    check_layout(
        parallel,
        config.limits,
        zero_stage=layout.zero.stage,
        world_size=world_size,
        micro_batches=layout.micro_batches,
    )
    return layout, completed.notes


def usable_seconds(limit: float) -> float:
    """What a job of ``limit`` seconds trains: start, load and the last save take their share."""
    return max(limit - 900.0, limit / 2)


def reads_tokens(config: Config) -> bool:
    """Whether the data source yields cached tokens, so that no image is encoded while training."""
    source = config.data.source
    return isinstance(source, TokenFileSource) or (isinstance(source, CacheSource) and source.content == "tokens")


def teacher_costs(config: Config) -> tuple[TokenizerCost, ...]:
    """Of the teachers that look at images while the run trains."""
    source = config.data.source
    if isinstance(source, CacheSource) and source.features is not None:
        return ()
    return tuple(tokenizer_cost(teacher) for term in config.recipe.counted_terms for teacher in term.teachers)


def _image_bytes(config: Config) -> float:
    """Pixels, tokens and their vectors of one prepared image."""
    space = config.tokenizer.space
    pixels = 0 if reads_tokens(config) else space.image_channels * config.data.image_size**2 * 4
    return pixels + space.length * (8 + 4 * space.channels)


def _is_of_imagenet(config: Config) -> bool:
    """Whether a run of a thousand classes, or a tokenizer's on a folder of that name, names data that are not here."""
    place = _place(config)
    if place is None:
        return False
    return "imagenet" in place.lower() if config.generator is None else config.generator.class_count == 1000


def _place(config: Config) -> str | None:
    return getattr(config.data.source, "path", None)


def _length(config: Config) -> int | None:
    """Number of training images, or None where the source cannot be opened on this machine."""
    from megavar.data.build import build_source
    from megavar.errors import DataError

    try:
        return len(build_source(config.data))
    except (DataError, OSError):
        return None
