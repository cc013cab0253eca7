"""What ``tools/benchmark.py`` measures: each part gives alternatives that do the same work in different ways."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megavar.assembly import PARAMETER_TYPES, build_generator, build_sampler
from megavar.config.deepspeed import load_deepspeed_json
from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import VARConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.recipes.mepa import MEPAConfig
from megavar.config.root import Config
from megavar.data.batch import Batch
from megavar.errors import ConfigError
from megavar.generators.var import VAR
from megavar.parallel import seeds
from megavar.parallel.topology import Topology
from megavar.planning.flops import forward_flops, model_flops, sampling_flops
from megavar.planning.shape import GeneratorShape
from megavar.planning.tokenizer_cost import autoencoder_cost
from megavar.recipes.next_scale import NextScale, NextScaleInputs
from megavar.run_samples import default_conditions
from megavar.tokenizers.multiscale_vq import MultiScaleVQ
from megavar.training.engine import Divisors, Engine
from megavar.training.metrics import MetricAccumulator
from megavar.training.micro_batches import MicroBatches
from megavar.training.optimizer import build_optimizer, parameter_groups, parameter_rules, set_rates
from megavar.training.step import build_engines, train_step
from megavar.transformer.context import ForwardContext
from megavar.transformer.feed_forward import FeedForward
from megavar.transformer.kernels import KERNELS, Visibility
from megavar.transformer.moe.layer import ExpertFeedForward
from megavar.transformer.sequence import SequenceLayout

EXPERT_BACKENDS = ("megatron", "grouped", "tutel", "deepspeed")
LEARNING_RATE, WEIGHT_DECAY = 1e-6, 0.0


@dataclass
class Part:
    """Alternatives to compare."""

    name: str
    alternatives: dict[str, Callable[[], Any]] = field(default_factory=dict)
    images: int = 1
    """Images of one call."""
    flops: dict[str, float] = field(default_factory=dict)
    """Model FLOPs of one call, by alternative."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Alternatives that cannot run here, with the reason."""
    baseline: str | None = None
    """Alternative to which the others' times are related."""


@dataclass
class Bench:
    """The run that is measured, on one device."""

    config: Config
    topology: Topology
    device: torch.device
    batch: int
    """Images of a micro-batch."""

    @property
    def generator(self) -> VARConfig:
        """Its generator."""
        assert self.config.generator is not None
        return self.config.generator

    @property
    def shape(self) -> GeneratorShape:
        """Its sizes."""
        return GeneratorShape.of(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return PARAMETER_TYPES[self.config.train.precision]

    def random(self, *shape: int, gradient: bool = True) -> Tensor:
        """Normal values in the run's type."""
        values = torch.randn(*shape, device=self.device, dtype=self.dtype)
        return values.requires_grad_(gradient)

    def tokenizer(self) -> MultiScaleVQ:
        """A tokenizer with fresh weights, frozen: speed does not depend on them."""
        return MultiScaleVQ(self.config.tokenizer).eval().requires_grad_(False).to(self.device)

    def images(self) -> Batch:
        """A random micro-batch."""
        side, count = self.config.tokenizer.image_side, torch.arange(self.batch, device=self.device)
        pixels = torch.rand(self.batch, self.config.tokenizer.image_channels, side, side, device=self.device) * 2 - 1
        return Batch(pixels, count % self.generator.classes, count, torch.zeros_like(count))

    def tokens(self) -> Batch:
        """The same from a token cache."""
        batch = self.images()
        ids = torch.randint(self.config.tokenizer.vocabulary_size, (self.batch, self.shape.tokens), device=self.device)
        return Batch(None, batch.labels, batch.sample_ids, batch.epochs, tokens=ids)

    def recipe(self) -> NextScale:
        """The recipe with fresh weights."""
        model = build_generator(self.config, self.topology, device=self.device).train()
        recipe = self.config.recipe
        settings = recipe if isinstance(recipe, MEPAConfig) else MEPAConfig(tokenizer_weights="")
        choice = self.generator
        return NextScale(
            settings, model, self.tokenizer(), classes=choice.classes, label_drop=choice.label_drop,
            seed=self.config.train.seed,
        )  # fmt: skip

    def engines(self, recipe: NextScale) -> dict[str, Engine]:
        """The engine around a recipe's generator."""
        return build_engines(
            recipe,
            optimizer=self.config.optimizer,
            deepspeed=load_deepspeed_json(Path(self.config.deepspeed)),
            deepspeed_origin=self.config.deepspeed,
            global_batch_size=self.batch * self.topology.data,
            micro_batch_size=self.batch,
            precision=self.config.train.precision,
            topology=self.topology,
        )


def attention(bench: Bench) -> Part:
    """Each kernel of scale-causal attention, forward and backward, of one block."""
    shape = bench.shape
    seen = Visibility(SequenceLayout.of_scales(shape.scales))
    sizes = (bench.batch, shape.heads, shape.tokens, shape.width // shape.heads)
    q, k, v = (bench.random(*sizes) for _ in range(3))
    upstream = torch.randn_like(q)
    needed = 4.0 * shape.visible_pairs * shape.width * bench.batch
    part = Part("attention of one block, forward and backward", images=bench.batch, baseline="dense")

    def both(kernel: str) -> None:
        KERNELS[kernel].function(q, k, v, seen, 0.125).backward(upstream)

    def forward(kernel: str) -> None:
        with torch.no_grad():
            KERNELS[kernel].function(q, k, v, seen, 0.125)

    for kernel in (name for name, kernel in KERNELS.items() if kernel.serves(seen)):
        if kernel == "flex" and bench.device.type == "cpu":
            part.skipped[kernel] = "PyTorch has no CPU backward for FlexAttention"
            continue
        part.alternatives[kernel] = functools.partial(both, kernel)
        part.alternatives[f"{kernel}, forward only"] = functools.partial(forward, kernel)
        part.flops[kernel], part.flops[f"{kernel}, forward only"] = 3 * needed, needed
    return part


def experts(bench: Bench) -> Part:
    """Each expert backend, forward and backward, beside a dense network of the same activated FLOPs."""
    shape = bench.shape
    settings = bench.generator.experts or ExpertsChoice.make()
    wide = bench.generator.model_copy(
        update={"experts": None, "feed_forward_ratio": bench.generator.feed_forward_ratio * settings.top_k}
    )
    layout = SequenceLayout.of_scales(shape.scales)
    context = ForwardContext(layout)
    hidden = bench.random(shape.tokens, bench.batch, shape.width)
    upstream = torch.randn_like(hidden)
    dense_name = f"dense, {settings.top_k} x as wide"
    part = Part("experts of one block, forward and backward", images=bench.batch, baseline=dense_name)

    def layer_of(backend: str | None) -> nn.Module:
        with bench.device:
            if backend is None:
                return FeedForward(VAR.layers(wide, ParallelConfig(), bench.dtype))
            chosen = settings.model_copy(update={"backend": backend})
            config = bench.generator.model_copy(update={"experts": chosen})
            return ExpertFeedForward(
                VAR.layers(config, ParallelConfig(), bench.dtype), 0, experts=chosen, kinds=len(shape.scales)
            )

    for name, backend in {dense_name: None, **{backend: backend for backend in EXPERT_BACKENDS}}.items():
        try:
            layer = layer_of(backend)
        except ConfigError as error:
            part.skipped[name] = str(error).split(". ")[0]
            continue
        _fill(layer)

        def both(layer: nn.Module = layer) -> None:
            layer(hidden, context).backward(upstream)

        part.alternatives[name] = both
        part.flops[name] = 3 * forward_flops(_with_experts(shape, settings)).feed_forward / shape.depth * bench.batch
    return part


def _with_experts(shape: GeneratorShape, settings: ExpertsChoice) -> GeneratorShape:
    generator = shape.generator.model_copy(update={"experts": settings})
    return GeneratorShape(generator, shape.scales, shape.code_dimension, shape.vocabulary)


@torch.no_grad()
def _fill(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        parameter.normal_(std=0.02, generator=seeds.generator(0, name) if parameter.device.type == "cpu" else None)


def train(bench: Bench) -> Part:
    """The train step of this configuration, from images and from cached tokens."""
    recipe = bench.recipe()
    engine = bench.engines(recipe)["generator"]
    images, tokens = bench.images(), bench.tokens()
    flops = model_flops(bench.shape) * bench.batch
    part = Part("train step of one micro-batch", images=bench.batch)
    part.alternatives["from images"] = lambda: _step(recipe, engine, recipe.prepare(images, 0))
    part.alternatives["from cached tokens"] = lambda: _step(recipe, engine, recipe.prepare(tokens, 0))
    part.alternatives["encoding alone"] = lambda: recipe.prepare(images, 0)
    part.flops = {"from images": flops, "from cached tokens": flops}
    part.flops["encoding alone"] = autoencoder_cost(bench.config.tokenizer).encode_flops * bench.batch
    return part


def _step(recipe: NextScale, engine: Engine, inputs: NextScaleInputs) -> None:
    images = len(inputs.targets) * engine.topology.data
    engine.run(recipe.passes("generator", 0), MicroBatches.of([inputs]), Divisors(inputs.targets.numel(), images))
    engine.step(LEARNING_RATE, WEIGHT_DECAY)


def overhead(bench: Bench) -> Part:
    """What the trainer adds to a bare loop of forward, backward, clipping and AdamW over the same model."""
    bare, driven = bench.recipe(), bench.recipe()
    engines, metrics = bench.engines(driven), MetricAccumulator()
    rules = parameter_rules(bare.generator, functools.partial(bare.rule, "generator"))
    optimizer = build_optimizer(bench.config.optimizer, "generator", parameter_groups(bare.generator, rules))
    set_rates(optimizer, LEARNING_RATE, WEIGHT_DECAY)
    batch = bench.tokens()
    inputs = bare.prepare(batch, 0)
    clipping = bench.config.optimizer.gradient_clipping or float("inf")
    assert isinstance(bare.generator, VAR)
    model = bare.generator

    def bare_step() -> None:
        logits = model(inputs.model).prediction
        nn.functional.cross_entropy(logits.flatten(0, 1), inputs.targets.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clipping)
        optimizer.step()
        optimizer.zero_grad()
        model.collect_routing()

    def trainer_step() -> None:
        train_step(
            driven, engines, [batch], 0, rates=lambda name, step: (LEARNING_RATE, WEIGHT_DECAY), metrics=metrics,
            topology=bench.topology,
        )  # fmt: skip
        metrics.add_statistics(driven.collect())

    def engine_step() -> None:
        _step(driven, engines["generator"], inputs)

    flops = model_flops(bench.shape) * bench.batch
    return Part(
        "trainer over a bare loop",
        {"bare loop": bare_step, "engine": engine_step, "engine, metrics": trainer_step},
        images=bench.batch,
        flops={"bare loop": flops, "engine": flops, "engine, metrics": flops},
        baseline="bare loop",
    )


def sampling(bench: Bench) -> Part:
    """Drawing images scale by scale with the configured guidance, decoder included."""
    model = build_generator(bench.config, None, device=bench.device)
    conditions = default_conditions(bench.config)
    sampler = build_sampler(bench.config, model, bench.tokenizer(), conditions, bench.device)
    settings = bench.config.sampling
    indices = torch.arange(bench.batch)
    decoder = autoencoder_cost(bench.config.tokenizer).decode_flops
    flops = (sampling_flops(bench.shape, settings.guided) + decoder) * bench.batch
    return Part(
        "sampling", {"drawing": lambda: sampler.draw(indices)}, images=bench.batch, flops={"drawing": flops}
    )


PARTS: dict[str, Callable[[Bench], Part]] = {
    "attention": attention, "experts": experts, "train": train, "overhead": overhead, "sampling": sampling,
}  # fmt: skip
