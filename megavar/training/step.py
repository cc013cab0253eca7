"""The engines of a recipe, and one optimizer step of them: what the trainer, the benchmark and the tests all run."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from megavar.config.deepspeed import complete_deepspeed
from megavar.config.optimizer import OptimizerConfig
from megavar.data.batch import Batch
from megavar.parallel.topology import Topology
from megavar.recipes.base import Count, Losses, Recipe, frozen
from megavar.training.engine import Divisors, Engine
from megavar.training.experts import expert_parameters
from megavar.training.metrics import MetricAccumulator
from megavar.training.micro_batches import MicroBatches

_log = logging.getLogger(__name__)

Rates = Callable[[str, int], tuple[float, float]]
"""(module, step) -> learning rate and weight decay."""


def build_engines(
    recipe: Recipe,
    *,
    optimizer: OptimizerConfig,
    deepspeed: Mapping[str, Any],
    deepspeed_origin: str,
    global_batch_size: int,
    micro_batch_size: int,
    precision: str,
    topology: Topology,
) -> dict[str, Engine]:
    """An engine around every module of ``recipe``, by name. Collective.

    Args:
        deepspeed: content of the DeepSpeed JSON, validated.
        deepspeed_origin: its path, for errors.

    Raises:
        ConfigError: JSON and configuration contradict each other, or the layout does not work.
    """
    engines = {}
    for name, module in recipe.modules().items():
        override = optimizer.modules.get(name)
        clipping = override.gradient_clipping if override is not None else None
        plan = complete_deepspeed(
            dict(deepspeed),
            where=deepspeed_origin,
            parallel=topology.config,
            data_parallel_size=topology.data,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            precision=precision,
            gradient_clipping=clipping if clipping is not None else optimizer.gradient_clipping,
            has_experts=bool(expert_parameters(module)),
            device_type=next(module.parameters()).device.type,
        )
        _warn_of_global_randomness(name, module)
        rule = functools.partial(recipe.rule, name)
        engines[name] = Engine(name, module, rule=rule, optimizer=optimizer, plan=plan, topology=topology)
    return engines


def _warn_of_global_randomness(name: str, module: nn.Module) -> None:
    found = [path for path, child in module.named_modules() if isinstance(child, _DropoutNd) and child.p > 0]
    if found:
        _log.warning(
            "%s: %s draw from torch's global generator, so what they drop depends on the number of ranks and on the "
            "micro-batch size. Use megavar's dropout, whose masks belong to samples.", name, ", ".join(found),
        )  # fmt: skip


def train_step(
    recipe: Recipe,
    engines: Mapping[str, Engine],
    batches: Sequence[Batch],
    step: int,
    *,
    rates: Rates,
    metrics: MetricAccumulator,
    topology: Topology,
) -> bool:
    """Train every active module on one global batch. Collective.

    Args:
        batches: this rank's micro-batches.
        metrics: takes in the losses and gradient norms.

    Returns:
        Whether all updates were applied; equal on all ranks. ``recipe.after_step`` is the caller's.
    """
    inputs = MicroBatches(len(batches), lambda index: recipe.prepare(batches[index], step))
    counts = [recipe.valid(batch, step) for batch in batches]
    images = sum(len(batch) for batch in batches) * topology.data
    divisors = Divisors(valid_of_step(counts, topology), images)

    def observe(index: int, losses: Losses) -> None:
        metrics.add(losses, counts[index])

    active = [name for name in engines if recipe.active(name, step)]
    applied = True
    for name in active:
        with others_frozen(engines, name):
            passes = recipe.passes(name, step)
            engines[name].run(passes, inputs, divisors, observe, keep_inputs=name != active[-1])
        result = engines[name].step(*rates(name, step), step)
        metrics.add_step(name, result)
        applied = applied and result.applied
    return applied


def valid_of_step(counts: Sequence[Count], topology: Topology) -> float | torch.Tensor:
    """Valid items of a step over all micro-batches and data-parallel ranks, at least 1. Collective unless all are ints.

    Args:
        counts: of this rank's micro-batches.
    """
    if all(isinstance(count, int) for count in counts):
        assert len(set(counts)) == 1, f"an int says the same for every micro-batch, but they have {counts} valid items"
        return max(1, sum(counts)) * topology.data
    from megatron.core import parallel_state

    total = torch.stack([torch.as_tensor(count) for count in counts]).sum().to(torch.float64)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total.clamp_min(1)


@contextlib.contextmanager
def others_frozen(engines: Mapping[str, Engine], name: str) -> Iterator[None]:
    """Keep the gradients of module ``name``'s losses out of the parameters of the other modules."""
    with contextlib.ExitStack() as stack:
        for other, engine in engines.items():
            if other != name:
                stack.enter_context(frozen(engine.module))
        yield
