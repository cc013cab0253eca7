"""The parts of ``tools/benchmark.py``: each gives alternatives that do the same work in different ways."""

import functools
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from megavar.assembly import build_generator, build_sampler
from megavar.config.experts.base import ExpertsChoice
from megavar.data.batch import Batch
from megavar.errors import ConfigError
from megavar.generators.inputs import RasterInputs
from megavar.parallel import seeds
from megavar.planning.attention_cost import attention_pairs
from megavar.recipes.base import Recipe
from megavar.run_samples import default_conditions
from megavar.sampling.base import Completing
from megavar.training.engine import Divisors, Engine
from megavar.training.metrics import MetricAccumulator
from megavar.training.micro_batches import MicroBatches
from megavar.training.optimizer import build_optimizer, parameter_groups, parameter_rules, set_rates
from megavar.training.step import train_step, valid_of_step
from megavar.transformer.cache import KeyValueCache
from megavar.transformer.context import ForwardContext
from megavar.transformer.feed_forward import FeedForward
from megavar.transformer.kernels import KERNELS, Visibility
from megavar.transformer.moe.layer import ExpertFeedForward
from megavar.transformer.sequence import SequenceLayout
from tools.benchmark_bench import Bench, Part, trained_module

EXPERT_BACKENDS = ("megatron", "grouped", "tutel", "deepspeed")
LEARNING_RATE, WEIGHT_DECAY = 1e-6, 0.0


def _layout(bench: Bench) -> SequenceLayout:
    """Of the generator's sequences in training."""
    with bench.device:
        layout: SequenceLayout = bench.shell.sequence(bench.shell.example(bench.batch)).layout
    return layout


def attention(bench: Bench) -> Part:
    """Each kernel that serves the generator's sequences, forward and backward, of one block."""
    layout, config = _layout(bench), bench.shell.config
    seen, heads, size = Visibility(layout), config.num_attention_heads, config.kv_channels
    q = bench.random(bench.batch, heads, layout.length, size)
    k, v = (bench.random(bench.batch, config.num_query_groups, layout.length, size) for _ in range(2))
    upstream = torch.randn_like(q)
    needed = 4.0 * attention_pairs(layout, "visible") * heads * size * bench.batch
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
    part = Part("experts of one block, forward and backward", images=bench.batch)
    if "experts" not in type(bench.generator).model_fields:
        part.skipped["all backends"] = f"generator.name={bench.generator.name} takes no experts"
        return part
    settings = bench.generator.limits(bench.space).experts or ExpertsChoice.make()
    layout = _layout(bench)
    context, wide = ForwardContext(layout), copy(bench.layers(experts=None))
    wide.ffn_hidden_size *= settings.top_k
    hidden = bench.random(layout.length, bench.batch, wide.hidden_size)
    upstream = torch.randn_like(hidden)
    part.baseline = f"dense, {settings.top_k} x as wide"

    def layer_of(backend: str | None) -> nn.Module:
        with bench.device:
            if backend is None:
                return FeedForward(wide)
            chosen = settings.model_copy(update={"backend": backend})
            return ExpertFeedForward(bench.layers(experts=chosen), 0, experts=chosen, kinds=bench.shell.kinds)

    weights = 0
    for name, backend in {part.baseline: None, **{backend: backend for backend in EXPERT_BACKENDS}}.items():
        try:
            layer = layer_of(backend)
        except ConfigError as error:
            part.skipped[name] = str(error).split(". ")[0]
            continue
        _fill(layer)
        if backend is None:
            weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim > 1)

        def both(layer: nn.Module = layer) -> None:
            layer(hidden, context).backward(upstream)

        part.alternatives[name] = both
        part.flops[name] = 3 * 2.0 * layout.length * bench.batch * weights
    return part


@torch.no_grad()
def _fill(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        parameter.normal_(std=0.02, generator=seeds.generator(0, name) if parameter.device.type == "cpu" else None)


def train(bench: Bench) -> Part:
    """The train step of this configuration, from images and from cached tokens."""
    recipe = bench.assembly().recipe()
    engines = bench.engines(recipe)
    part = Part("train step of one micro-batch", images=bench.batch)
    images = bench.images()
    batches = {"from images": images, "from cached tokens": bench.tokens()}
    for name, batch in batches.items():
        if batch is None:
            part.skipped[name] = "tokens are vectors, which no token cache holds"
        else:
            part.alternatives[name] = functools.partial(prepared_step, recipe, engines, batch)
    part.alternatives["encoding alone"] = lambda: recipe.prepare(images, 0)
    known = bench.operations
    flops = dict.fromkeys(part.alternatives, known.step)
    part.flops = bench.known({**flops, "encoding alone": known.encoding})
    return part


def prepared_step(recipe: Recipe, engines: dict[str, Engine], batch: Batch) -> None:
    """A step of the recipe's first module, its inputs prepared anew."""
    _step(recipe, engines, batch, recipe.prepare(batch, 0))


def _step(recipe: Recipe, engines: dict[str, Engine], batch: Batch, inputs: Any) -> None:
    """A step of the recipe's first module on inputs that are prepared."""
    name, _ = trained_module(recipe)
    engine = engines[name]
    divisors = Divisors(valid_of_step([recipe.valid(batch, 0)], engine.topology), len(batch) * engine.topology.data)
    engine.run(recipe.passes(name, 0), MicroBatches.of([inputs]), divisors)
    engine.step(LEARNING_RATE, WEIGHT_DECAY)


def overhead(bench: Bench) -> Part:
    """What the trainer adds to a bare loop of the recipe's passes, clipping and AdamW over the same model."""
    bare, driven = bench.assembly().recipe(), bench.assembly().recipe()
    engines, metrics = bench.engines(driven), MetricAccumulator()
    name, model = trained_module(bare)
    rules = parameter_rules(model, functools.partial(bare.rule, name))
    optimizer = build_optimizer(bench.config.optimizer, name, parameter_groups(model, rules))
    set_rates(optimizer, LEARNING_RATE, WEIGHT_DECAY, 0)
    batch = bench.tokens() or bench.images()
    inputs, clipping = bare.prepare(batch, 0), bench.config.optimizer.gradient_clipping or float("inf")

    def bare_step() -> None:
        _bare_passes(bare, name, model, batch, inputs)
        nn.utils.clip_grad_norm_(model.parameters(), clipping)
        optimizer.step()
        optimizer.zero_grad()
        bare.collect()

    def trainer_step() -> None:
        train_step(
            driven, engines, [batch], 0, rates=lambda name, step: (LEARNING_RATE, WEIGHT_DECAY), metrics=metrics,
            topology=bench.topology,
        )  # fmt: skip
        metrics.add_statistics(driven.collect())

    part = Part("trainer over a bare loop", images=bench.batch, baseline="bare loop")
    part.alternatives = {
        "bare loop": bare_step,
        "engine": lambda: _step(driven, engines, batch, inputs),
        "engine, metrics": trainer_step,
    }
    part.flops = bench.known(dict.fromkeys(part.alternatives, bench.operations.step))
    return part


def _bare_passes(recipe: Recipe, name: str, model: nn.Module, batch: Batch, inputs: Any) -> None:
    """Forward and backward as anyone would write them for one process."""
    for one in recipe.passes(name, 0):
        with torch.set_grad_enabled(one.loss is not None):
            output = one.forward(model, inputs)
        if one.loss is not None:
            losses = one.loss(output, inputs)
            total: Tensor = losses.total / recipe.valid(batch, 0)
            if losses.per_image is not None:
                total = total + losses.per_image / len(batch)
            total.backward()
        if one.carry is not None and one.following is not None:
            with torch.no_grad():
                inputs = one.following(inputs, one.carry(output, inputs))


def sampling(bench: Bench) -> Part:
    """Drawing images with the configured procedure, decoder included, with and without its guidance."""
    model = build_generator(bench.config, None, device=bench.device)
    conditions, tokenizer = default_conditions(bench.config), bench.assembly().tokenizer()
    indices, settings = torch.arange(bench.batch), {"drawing": bench.config.sampling}
    if bench.config.sampling.guided:
        settings["drawing without guidance"] = bench.config.sampling.model_copy(update={"guidance": 0.0})
    part = Part("sampling", images=bench.batch, flops=bench.known({"drawing": bench.operations.drawing}))
    for name, one in settings.items():
        config = bench.config.model_copy(update={"sampling": one})
        sampler = build_sampler(config, model, tokenizer, conditions, bench.device)
        part.alternatives[name] = functools.partial(sampler.draw, indices)
    return part


def decoding(bench: Bench) -> Part:
    """One early and one late step of decoding token by token, on the keys and values of the steps before."""
    part, settings, length = Part("one step of decoding", images=bench.batch), bench.config.sampling, bench.space.length
    model = build_generator(bench.config, None, device=bench.device).eval()
    tokenizer, conditions = bench.assembly().tokenizer(), default_conditions(bench.config)
    procedure = build_sampler(bench.config, model, tokenizer, conditions, bench.device).procedure
    if not isinstance(procedure, Completing):
        part.skipped["steps"] = f"sampling.procedure={settings.procedure} does not draw token by token"
        return part
    for words, together in ((", guided", 2), ("", 1))[0 if settings.guided else 1 :]:
        for number in (length // 16, length - length // 16):
            name = f"step {number}{words}"
            part.baseline = part.baseline or name
            part.alternatives[name] = _step_of_decoding(model, together * bench.batch, number, bench.device)
    return part


@torch.no_grad()
def _step_of_decoding(model: Any, rows: int, number: int, device: torch.device) -> Callable[[], None]:
    """Step ``number``, from 3, again and again: it reads token ``number`` - 1."""
    cache, labels = KeyValueCache(model.space.length + 1), torch.zeros(rows, dtype=torch.int64, device=device)
    ids = labels[:, None].expand(rows, number - 2)
    model.step(RasterInputs(labels, ids), cache)
    before, newest = cache.length(0), RasterInputs(labels, ids[:, :1], start=number)

    @torch.no_grad()
    def step() -> None:
        model.step(newest, cache)
        cache.crop(before)

    return step


PARTS: dict[str, Callable[[Bench], Part]] = {
    "attention": attention, "experts": experts, "train": train, "overhead": overhead, "sampling": sampling,
    "decoding": decoding,
}  # fmt: skip
