"""What ``plan --calibrate`` found out about a device, as a file; and what the planner takes from it. Free of torch."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megavar.config.generators.base import GeneratorChoice
from megavar.errors import ConfigError
from megavar.planning.hardware import ACCELERATORS, Accelerator, name_of_device
from megavar.storage import write_json_atomic

FORMAT = 1
NETWORK_OF_UNKNOWN = 1e9
"""Bytes per second between machines whose kind is in no table and that were measured alone."""


@dataclass(frozen=True)
class ModelPace:
    """Forward and backward pass of one generator, timed with its own blocks on one device."""

    run: str
    """Name of the run whose configuration it was."""
    generator: dict[str, Any]
    """The section ``generator``."""
    precision: str
    images: list[int]
    """Micro-batches that were timed, ascending."""
    block_seconds: list[float]
    """Of one block, forward and backward, for each of them."""
    ends_seconds: list[float]
    """Of embedding, head and loss."""
    flops_per_second: float
    """Model FLOPs of the whole generator at the largest micro-batch, over the time of its blocks and ends."""
    tokenizer_flops_per_second: float | None
    """Of the tokenizer's encoder, in float32."""

    @property
    def floor(self) -> float:
        """Seconds that a block takes however few images it has: the time to launch its kernels."""
        return self.block_seconds[0]

    def describes(self, choice: GeneratorChoice) -> bool:
        """Whether this is the generator that ``choice`` configures."""
        return self.generator == choice.model_dump(mode="json")


@dataclass(frozen=True)
class Calibration:
    """Measurements of one device, in seconds, bytes and operations."""

    device: str
    """What its driver calls it."""
    date: str
    torch: str
    memory: float
    bf16: float
    """Operations per second of a large matrix product."""
    tf32: float
    fp32: float
    bandwidth: float
    """Bytes per second, read and written, of a copy in its memory."""
    launch_seconds: float
    products: list[dict[str, Any]] = field(default_factory=list)
    """Matrix products at the shapes of the models' layers."""
    attention: list[dict[str, Any]] = field(default_factory=list)
    models: list[ModelPace] = field(default_factory=list)
    all_reduce: list[dict[str, float]] = field(default_factory=list)
    """By number of bytes: seconds over ``ranks`` ranks; empty where one rank measured alone."""
    ranks: int = 1
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Write the file."""
        write_json_atomic(path, self.to_json())

    @staticmethod
    def load(path: Path) -> "Calibration":
        """Read a file of ``plan --calibrate``.

        Raises:
            ConfigError: there is none, or it is another kind of file.
        """
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise KeyError(f"format {content['format']}")
            models = [ModelPace(**entry) for entry in content.pop("models")]
            return Calibration(models=models, **content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} is no calibration of this version ({type(error).__name__}: {error}). Make one on the device "
                f"with `python -m megavar plan CONFIG --gpus N --calibrate {path}`."
            ) from None

    @property
    def accelerator(self) -> Accelerator:
        """The device: its data sheet where its name is known, what was measured in the place of the rest."""
        name = name_of_device(self.device)
        if name is None:
            gpu = Accelerator(self.device, self.memory, self.bf16, self.tf32, self.fp32, NETWORK_OF_UNKNOWN,
                              NETWORK_OF_UNKNOWN, self.bandwidth, 1.0)  # fmt: skip
        else:
            gpu = replace(ACCELERATORS[name], memory=self.memory, bandwidth=self.bandwidth)
        return gpu if (rate := self.link_rate) is None else replace(gpu, link=rate)

    @property
    def link_rate(self) -> float | None:
        """Bytes per second of the largest all-reduce, over what a ring sends: 2 (n - 1) / n of its size."""
        if not self.all_reduce:
            return None
        largest = max(self.all_reduce, key=lambda entry: entry["bytes"])
        return 2 * (self.ranks - 1) / self.ranks * largest["bytes"] / largest["seconds"]

    def pace(self, choice: GeneratorChoice, precision: str) -> tuple[ModelPace, bool]:
        """The timing that fits best, and whether it is of this very generator.

        Raises:
            ConfigError: none has the same precision and, like it, experts or none.
        """

        def has_experts(generator: dict[str, Any]) -> bool:
            return bool(generator.get("experts"))

        own = choice.model_dump(mode="json")
        alike = [
            pace for pace in self.models
            if pace.precision == precision and has_experts(pace.generator) == has_experts(own)
        ]  # fmt: skip
        if not alike:
            kind = f"{precision} generator {'with' if has_experts(own) else 'without'} experts"
            raise ConfigError(
                f"The calibration of {self.device} has no {kind}, but {', '.join(pace.run for pace in self.models)}. "
                f"Calibrate with this configuration."
            )
        exact = [pace for pace in alike if pace.describes(choice)]
        return (exact or alike)[-1], bool(exact)
