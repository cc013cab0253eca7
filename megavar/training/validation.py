"""Loss on held-out samples while a run goes on: the same samples, scales and noise each time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megavar.data.batch import Batch
from megavar.recipes.base import Pass, Recipe
from megavar.training.engine import Engine
from megavar.training.metrics import MetricAccumulator
from megavar.training.micro_batches import MicroBatches
from megavar.training.observers import Observer
from megavar.training.step import divisors_of

HeldOut = Callable[[int], Iterable[list[Batch]]]
"""micro-batch size -> this rank's micro-batches of a few global batches, the same at every call."""


def due(step: int, *, interval: int, lines: int, total: int) -> bool:
    """Whether the line of ``step`` is the first after a multiple of ``interval``, or the last one."""
    return step == total or step // interval > max(0, step - lines) // interval


class ValidationObserver(Observer):
    """Runs the recipe's passes over its first module without gradients, every ``interval`` steps and at the end."""

    def __init__(self, interval: int, lines: int, held_out: HeldOut) -> None:
        """Measure at the first line of metrics, of which there is one every ``lines`` steps, after each interval."""
        self.interval, self.lines, self.held_out = interval, lines, held_out

    def logged(self, step: int, record: Mapping[str, float], statistics: Mapping[str, Tensor]) -> None:
        """See :meth:`Observer.logged`."""
        if not due(step, interval=self.interval, lines=self.lines, total=self.watched.total_steps):
            return
        watched = self.watched
        with watched.watchdog.pause(), watched.stopwatch.part("validation"):
            values, samples = self.measure()
        watched.tell(step, "validation", **values, samples=samples)
        watched.monitor.log_to_wandb(step, {f"validation/{name}": value for name, value in values.items()})

    def measure(self) -> tuple[dict[str, float], int]:
        """Means over the held-out samples by name, and how many there are. Collective."""
        watched, metrics, samples = self.watched, MetricAccumulator(), 0
        name, engine = next(iter(watched.engines.items()))
        recipe, last = watched.recipe, watched.total_steps - 1
        for number, batches in enumerate(self.held_out(watched.micro_batch_size)):
            step = max(0, last - number)  # a recipe's schedules are at their ends; its random choices differ by batch
            with torch.no_grad(), engine.evaluating():
                self._run(recipe, engine, recipe.passes(name, step), batches, step, metrics)
            samples += sum(len(batch) for batch in batches) * watched.topology.data
        values, _ = metrics.reduce({})
        return values, samples

    def _run(
        self, recipe: Recipe, engine: Engine, passes: Sequence[Pass], batches: list[Batch], step: int,
        metrics: MetricAccumulator,
    ) -> None:  # fmt: skip
        """One global batch."""
        counts = [recipe.valid(batch, step) for batch in batches]
        engine.run(
            passes,
            MicroBatches(len(batches), lambda index: recipe.prepare(batches[index], step)),
            divisors_of(batches, counts, self.watched.topology),
            lambda index, losses: metrics.add(replace(losses, statistics={}), counts[index]),
            learn=False,
        )
