"""What the rows of a table cost, from plans of the real models."""

import dataclasses
import re
from dataclasses import dataclass

from megavar.config.root import Config
from megavar.errors import ConfigError
from megavar.planning.hardware import accelerator
from megavar.planning.plan import Plan, plan


@dataclass(frozen=True)
class Machine:
    """GPUs to predict for."""

    gpus: int
    gpu: str

    @staticmethod
    def parse(text: str) -> "Machine":
        """From ``8xh200``.

        Raises:
            ConfigError: it is not of that form, or nothing is known of the GPU.
        """
        match = re.fullmatch(r"([1-9]\d*)x(\S+)", text)
        if match is None:
            raise ConfigError(f"--on {text} is not of the form NUMBERxGPU, for example 8xh200 or 32xa100.")
        return Machine(int(match[1]), accelerator(match[2]).name)

    def __str__(self) -> str:
        return f"{self.gpus} x {self.gpu}"


MACHINES = (Machine(8, "h200"), Machine(32, "a100"))
"""A node of today, and what the papers of 2024 and 2025 trained on."""


def cost(config: Config, machine: Machine, images: int | None, job_seconds: float) -> Plan:
    """The plan of a run in the layout that its configuration asks for.

    Where that does not fit the GPU, with the largest micro-batch that does (accumulated to the same global batch);
    where none fits, as configured.

    Args:
        images: length of the training data; None asks the data source.
        job_seconds: time limit of one job.

    Raises:
        ConfigError: the configuration is not trainable on so many GPUs.
    """
    found = plan(config, machine.gpus, machine.gpu, images=images, job_seconds=job_seconds, suggestions=0)
    layout = found.prediction.layout
    sizes = [size for size in range(layout.micro_batch, 0, -1) if layout.micro_batch % size == 0]
    for size in sizes:
        prediction = found.workload.predict(dataclasses.replace(layout, micro_batch=size))
        if prediction.fits(found.workload.machine.gpu.memory):
            return dataclasses.replace(found, prediction=prediction)
    return found
