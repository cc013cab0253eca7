"""The models that ``tools/gpu_check.py`` runs, and a training of one on tokens that are the same on every device."""

import contextlib
import gc
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor, nn

from megavar.config.loading import load_config
from megavar.config.root import Config
from megavar.data.batch import Batch
from megavar.parallel.topology import Topology
from megavar.training.metrics import MetricAccumulator
from megavar.training.step import train_step
from tools.benchmark_bench import Bench, trained_module
from tools.gpu_check_sections import MODELS

LEARNING_RATE = 1e-3
CACHED_TOKENS = "data.source={name: cache, path: tokens, content: tokens, images: {name: digits}}"
"""Nothing is read from there."""
TINY_TOKENS = (
    "tokenizer.scales=[1,2,3,4]", "tokenizer.base_channels=32", "tokenizer.vocabulary_size=64", "data.image_size=64",
)  # fmt: skip
TINY = (*TINY_TOKENS, "generator.depth=2", "generator.width=128", "generator.heads=2", "generator.classes=10")


def published(model: str, dry: bool, *overrides: str) -> Config:
    """A model at its published size, in bf16 and ZeRO-1, on cached tokens; dry: the same kind, tiny."""
    file, depth = MODELS[model]
    size = TINY if dry else (f"generator.depth={depth}",)
    return load_config(file, [*size, CACHED_TOKENS, *overrides])


def tiny(experts: bool, precision: str, *overrides: str) -> Config:
    """A model of three blocks that any device trains in a moment, with drop path."""
    file, _ = MODELS["stmoe-d16" if experts else "d16"]
    changed = ("generator.depth=3", "generator.drop_path=0.1", f"train.precision={precision}", CACHED_TOKENS)
    return load_config(file, [*TINY, *changed, *overrides])


def compilation(dry: bool) -> list[str]:
    """The overrides that compile blocks; dry: without writing kernels, which takes a CPU a minute."""
    return ["train.compile=blocks", *["train.compile_backend=aot_eager"] * dry]


@contextlib.contextmanager
def values_from_the_device() -> Iterator[None]:
    """Initial values are drawn where parameters lie: the CPU takes minutes for large models, and speed needs none."""

    @torch.no_grad()
    def fill(module: nn.Module, rule: object, seed: int) -> None:
        for parameter in module.parameters():
            if not parameter.is_meta:
                parameter.normal_(std=0.02)

    with mock.patch("megavar.transformer.backbone.initialize_parameters", fill):
        yield


class Training:
    """A recipe with its engines."""

    def __init__(self, config: Config, mesh: Topology, device: torch.device, *, own_values: bool = True) -> None:
        """``own_values``: the run's initial values, equal on all devices; otherwise any."""
        self.device, self.mesh = device, mesh
        self.bench = Bench(config, mesh, device, 1)
        with contextlib.nullcontext() if own_values else values_from_the_device():
            self.recipe = self.bench.assembly().recipe()
        self.engines = self.bench.engines(self.recipe)
        self.metrics = MetricAccumulator()
        self.steps = 0

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        return trained_module(self.recipe)[1]

    def batch(self, images: int, seed: int = 0) -> Batch:
        """Random tokens, drawn on the CPU so that every device gets the same."""
        space = self.bench.space
        random = torch.Generator().manual_seed(seed)
        tokens = torch.randint(space.vocabulary or 1, (images, space.length), generator=random)
        count = torch.arange(images)
        labels = count % (self.bench.generator.class_count or 1)
        return Batch(None, labels, count, torch.zeros_like(count), tokens=tokens).to(self.device)

    def step(self, batch: Batch) -> None:
        """One optimizer step on one micro-batch, as the trainer does it."""
        train_step(
            self.recipe, self.engines, [batch], self.steps, rates=lambda name, step: (LEARNING_RATE, 0.05),
            metrics=self.metrics, topology=self.mesh,
        )  # fmt: skip
        self.metrics.add_statistics(self.recipe.collect())
        self.steps += 1

    def loss(self) -> float:
        """Mean loss since the last call. Waits for the device."""
        return self.metrics.reduce({})[0]["loss"]

    def weights(self) -> dict[str, Tensor]:
        """Copies of the trained tensors, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.module.named_parameters()}

    def close(self) -> None:
        """Give the memory back."""
        for engine in self.engines.values():
            engine.destroy()
        self.engines, self.recipe, self.metrics = {}, None, MetricAccumulator()  # type: ignore[assignment]
        free()


def free() -> None:
    """Give the allocator's memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
