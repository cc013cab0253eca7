"""Training loops for tests: the library's step under an engine, and what anyone would write in plain torch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megavar.config.optimizer import OptimizerConfig
from megavar.data.batch import Batch
from megavar.parallel.topology import Topology
from megavar.recipes.base import Losses, Pass, Recipe
from megavar.training.engine import Divisors, Engine
from megavar.training.metrics import MetricAccumulator
from megavar.training.micro_batches import MicroBatches
from megavar.training.optimizer import parameter_rules
from megavar.training.parameter_rows import write_rows
from megavar.training.step import build_engines, train_step

BatchesOf = Callable[[int], Sequence[Batch]]
"""step -> this rank's micro-batches."""


def run_pass(
    engine: Engine,
    items: Sequence[Any],
    forward: Callable[[Any, Any], Any],
    mean_loss: Callable[[Any, Any], Tensor],
) -> None:
    """One pass whose loss is a mean over every micro-batch; all micro-batches are equally large."""
    divisors = Divisors(len(items) * engine.topology.data, 1)
    passes = [Pass(forward, lambda output, item: Losses(mean_loss(output, item)))]
    engine.run(passes, MicroBatches.of(list(items)), divisors)


class EngineLoop:
    """Trains a recipe at constant rates, step by step."""

    def __init__(
        self,
        recipe: Recipe,
        mesh: Topology,
        batches: BatchesOf,
        *,
        optimizer: OptimizerConfig,
        zero: dict[str, Any],
        global_batch_size: int,
        micro_batch_size: int,
        precision: str = "fp32",
    ) -> None:
        self.recipe, self.mesh, self.batches = recipe, mesh, batches
        assert optimizer.lr is not None
        self.rates = optimizer.lr, optimizer.weight_decay
        self.engines = build_engines(
            recipe, optimizer=optimizer, deepspeed={"zero_optimization": zero}, deepspeed_origin="test.json",
            global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, precision=precision, topology=mesh,
        )  # fmt: skip

    def step(self, number: int) -> dict[str, Any]:
        """Metrics and statistics of step ``number``, equal on all ranks."""
        metrics = MetricAccumulator(several_modules=len(self.engines) > 1)
        assert train_step(
            self.recipe, self.engines, self.batches(number), number, rates=lambda name, step: self.rates,
            metrics=metrics, topology=self.mesh,
        )  # fmt: skip
        self.recipe.after_step(number, lambda *rows: write_rows(self.engines.values(), *rows))
        means, statistics = metrics.reduce(self.recipe.collect())
        return statistics | means


def bare_loop(
    recipe: Recipe, module: str, batches: BatchesOf, steps: int, *, optimizer: OptimizerConfig
) -> list[dict[str, Any]]:
    """The reference for one module of ``recipe``: one process, no engine, the whole batch at once, plain AdamW."""
    model = recipe.modules()[module]
    adam = torch.optim.AdamW(_groups(recipe, module, model, optimizer), betas=optimizer.betas, eps=optimizer.epsilon)
    values = []
    for step in range(steps):
        (batch,) = batches(step)
        named: dict[str, Tensor] = {}
        means: dict[str, tuple[Any, Any]] = {}
        inputs, valid = recipe.prepare(batch, step), recipe.valid(batch, step)
        adam.zero_grad()
        for one in recipe.passes(module, step):
            if hasattr(model, "balance"):
                model.balance = one.balance
            with torch.set_grad_enabled(one.loss is not None):
                output = one.forward(model, inputs)
            if one.loss is not None:
                losses = one.loss(output, inputs)
                _backward(losses, valid, len(batch))
                named |= {name: value / valid for name, value in losses.named.items()}
                for name, (value, count) in losses.means.items():
                    total, counted = means.get(name, (0.0, 0))
                    means[name] = total + float(value), counted + int(count)
            if one.carry is not None and one.following is not None:
                with torch.no_grad():
                    inputs = one.following(inputs, one.carry(output, inputs))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, optimizer.gradient_clipping)
        adam.step()
        metrics = {name: float(value) for name, value in named.items()}
        metrics |= {name: total / counted for name, (total, counted) in means.items() if counted}
        values.append(recipe.collect() | metrics | {"gradient_norm": float(norm)})
    return values


def _groups(recipe: Recipe, module: str, model: nn.Module, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """One group per parameter."""
    groups = []
    assert optimizer.lr is not None
    rules = parameter_rules(model, lambda name: recipe.rule(module, name))
    for name, parameter in model.named_parameters():
        rule = rules[name]
        if rule.frozen:
            parameter.requires_grad_(False)
            continue
        decay = optimizer.weight_decay if rule.decays else 0.0
        groups.append({"params": [parameter], "lr": optimizer.lr * rule.lr_factor, "weight_decay": decay})
    return groups


def _backward(losses: Losses, valid: Any, images: int) -> None:
    total = losses.total / valid
    if losses.per_image is not None:
        total = total + losses.per_image / images
    total.backward()
