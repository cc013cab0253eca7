"""The plan of a run: what it costs on given GPUs as configured, and which layouts would serve it better."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavar.config.deepspeed import complete_deepspeed, load_deepspeed_json
from megavar.config.root import Config
from megavar.errors import ConfigError
from megavar.parallel.rules import check_layout
from megavar.parallel.topology import Topology, data_parallel_size
from megavar.planning.flops import model_flops, sampling_flops
from megavar.planning.hardware import EXPERTS_UTILIZATION, accelerator
from megavar.planning.layout import Layout, Zero
from megavar.planning.memory import Memory, rank_memory
from megavar.planning.parameters import ParameterCount, count_parameters
from megavar.planning.shape import GeneratorShape
from megavar.planning.timing import Machine, StepTime, step_time
from megavar.planning.tokenizer_cost import TokenizerCost, autoencoder_cost
from megavar.training.run import micro_batch_size
from megavar.training.schedules import total_steps

HEADROOM = 0.95
"""Share of the device's memory that a layout may fill."""


@dataclass(frozen=True)
class Prediction:
    """A layout with what it costs."""

    layout: Layout
    memory: Memory
    """Of the fullest rank."""
    stage: int
    """Pipeline stage of that rank."""
    time: StepTime

    def fits(self, capacity: float) -> bool:
        """Whether the fullest rank stays within a device of ``capacity`` bytes, with some headroom."""
        return self.memory.total <= capacity * HEADROOM


@dataclass(frozen=True)
class Workload:
    """What is trained, apart from how it is spread."""

    shape: GeneratorShape
    machine: Machine
    utilization: float
    element: int
    """Bytes of a weight."""
    kernel: str
    ema: bool
    tokenizer: TokenizerCost | None
    """None where tokens are cached."""
    image_bytes: float

    def predict(self, layout: Layout) -> Prediction:
        """Costs of a layout that the rules allow."""
        memories = {
            stage: rank_memory(
                self.shape,
                layout,
                pipeline_rank=stage,
                element=self.element,
                kernel=self.kernel,
                ema=self.ema,
                tokenizer=self.tokenizer,
                image_bytes=self.image_bytes,
            )
            for stage in {0, layout.parallel.pipeline - 1}
        }
        fullest = max(memories, key=lambda stage: memories[stage].total)
        time = step_time(
            self.shape,
            layout,
            self.machine,
            utilization=self.utilization,
            element=self.element,
            kernel=self.kernel,
            tokenizer=self.tokenizer,
        )
        return Prediction(layout, memories[fullest], fullest, time)


@dataclass(frozen=True)
class Plan:
    """What ``megavar plan`` says."""

    name: str
    gpus: int
    workload: Workload
    assumed_utilization: bool
    """Whether the utilization is our assumption and not the user's."""
    parameters: ParameterCount
    train_flops: float
    """Model FLOPs per image, forward and backward."""
    sample_flops: float
    """FLOPs per drawn image without the decoder."""
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

    @property
    def images_per_second(self) -> float:
        """Of all GPUs together."""
        return self.prediction.layout.global_batch / self.prediction.time.total

    @property
    def utilization(self) -> float:
        """Model FLOPs utilization as the run's log will show it: over whole steps."""
        gpu = self.workload.machine.gpu
        peak = gpu.bf16 if self.workload.element == 2 else gpu.fp32
        return self.images_per_second * self.train_flops / (peak * self.gpus)

    @property
    def seconds(self) -> float:
        """Wall time of the run without interruptions."""
        return self.steps * self.prediction.time.total

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
    gpu: str,
    mfu: float | None = None,
    *,
    gpus_per_node: int = 8,
    images: int | None = None,
    job_seconds: float | None = None,
    suggestions: int = 5,
) -> Plan:
    """Predict a training run.

    Args:
        gpus: number of ranks.
        gpu: a name in :data:`megavar.planning.hardware.ACCELERATORS`.
        mfu: utilization while blocks compute; None takes the assumption of the table.
        images: length of the training data; None asks the data source.
        job_seconds: time limit of one job; None leaves out the number of jobs.
        suggestions: number of other layouts to suggest.

    Raises:
        ConfigError: the configuration is not trainable on so many GPUs, or nothing is known of the GPU.
    """
    from megavar.planning.search import suggest

    shape = GeneratorShape.of(config)
    device = accelerator(gpu)
    utilization = mfu or device.utilization * (EXPERTS_UTILIZATION if shape.experts is not None else 1.0)
    workload = Workload(
        shape=shape,
        machine=Machine(device, min(gpus_per_node, gpus)),
        utilization=utilization,
        element=2 if config.train.precision == "bf16" else 4,
        kernel=shape.generator.attention_kernel,
        ema=config.train.ema is not None,
        tokenizer=None if reads_tokens(config) else autoencoder_cost(config.tokenizer),
        image_bytes=_image_bytes(config),
    )
    layout, notes = configured_layout(config, gpus)
    count = _length(config) if images is None else images
    if config.train.steps is None and count is None:
        raise ConfigError(
            "The length of the run is given in epochs, but the training data cannot be opened here to count its "
            "images. Give their number, for example --images 1281167."
        )
    return Plan(
        name=config.run.name,
        gpus=gpus,
        workload=workload,
        assumed_utilization=mfu is None,
        parameters=count_parameters(shape),
        train_flops=model_flops(shape),
        sample_flops=sampling_flops(shape, config.sampling.guidance > 0),
        prediction=workload.predict(layout),
        better=tuple(suggest(workload, layout, suggestions)),
        steps=total_steps(config.train.steps, config.train.epochs, count or 0, config.train.global_batch_size),
        images=count,
        limit_seconds=None if job_seconds is None else usable_seconds(job_seconds),
        notes=notes,
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
        has_experts=config.generator is not None and config.generator.experts is not None,
        device_type="cuda",
    )
    layout = Layout(parallel, Zero.of(content, completed.stage), world_size, config.train.global_batch_size, size)
    check_layout(
        parallel,
        config.generator,
        zero_stage=layout.zero.stage,
        world_size=world_size,
        micro_batches=layout.micro_batches,
        vocabulary_size=config.tokenizer.vocabulary_size,
    )
    return layout, completed.notes


def usable_seconds(limit: float) -> float:
    """What a job of ``limit`` seconds trains: start, load and the last save take their share."""
    return max(limit - 900.0, limit / 2)


def with_utilization(workload: Workload, utilization: float) -> Workload:
    """The same at another utilization."""
    return dataclasses.replace(workload, utilization=utilization)


def reads_tokens(config: Config) -> bool:
    """Whether the data source yields cached tokens, so that no image is encoded while training."""
    return "token" in config.data.source.name


def _image_bytes(config: Config) -> float:
    """Pixels, tokens and teacher-forcing features of one prepared image."""
    tokens = sum(side * side for side in config.tokenizer.scales)
    pixels = 0 if reads_tokens(config) else config.tokenizer.image_channels * config.data.image_size**2 * 4
    return pixels + tokens * (8 + 4 * config.tokenizer.code_dimension)


def _length(config: Config) -> int | None:
    """Number of training images, or None where the source cannot be opened on this machine."""
    from megavar.data.build import build_source
    from megavar.errors import DataError

    try:
        return len(build_source(config.data))
    except (DataError, OSError):
        return None
