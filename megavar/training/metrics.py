"""Losses and statistics between two log lines: kept on the device, reduced and read only when a line is due."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megavar.recipes.base import Count, Losses
from megavar.training.engine import StepResult


class MetricAccumulator:
    """Sums over micro-batches and steps on this rank.

    Args:
        several_modules: whether the recipe trains several modules; gradient norms are then named after them.
    """

    def __init__(self, several_modules: bool = False) -> None:
        self._several_modules = several_modules
        self.forget()

    def forget(self) -> None:
        """Start anew."""
        self._means: dict[str, tuple[Tensor, Count]] = {}
        self._statistics: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor | float] = {}

    def add(self, losses: Losses, valid: Count) -> None:
        """Take in one micro-batch with ``valid`` valid items."""
        for name, value in losses.named.items():
            self._add_mean(name, value, valid)
        for name, (value, count) in losses.means.items():
            self._add_mean(name, value, count)
        self.add_statistics(losses.statistics)

    def _add_mean(self, name: str, value: Tensor, count: Count) -> None:
        total, counted = self._means.get(name, (torch.zeros((), dtype=torch.float64, device=value.device), 0))
        self._means[name] = (total + value.detach(), counted + count)

    def add_statistics(self, statistics: dict[str, Tensor]) -> None:
        """Take in sums that a recipe has counted."""
        for name, value in statistics.items():
            exact = value.detach().to(torch.float64)  # counts stay exact
            self._statistics[name] = self._statistics[name] + exact if name in self._statistics else exact

    def add_step(self, name: str, result: StepResult) -> None:
        """Remember the newest gradient norm of module ``name``; norms of skipped steps are not kept."""
        if result.applied:
            self._norms[name] = result.gradient_norm

    def reduce(self, own_statistics: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Means of losses over all items of all data-parallel ranks, sums of statistics over the world; forget all.

        Args:
            own_statistics: what the recipe has collected on this rank (``Recipe.collect``): the same names and shapes
                on all ranks; summed over all of them.

        Returns:
            values by name (not of what had no items), equal on all ranks, and statistics (float64, CPU).
        """
        from megavar.parallel.topology import DeepSpeedTopology

        groups: Any = DeepSpeedTopology()
        names = sorted(self._means)
        totals = [self._means[name][0] for name in names]
        counts = [torch.as_tensor(self._means[name][1]).to(total) for name, total in zip(names, totals)]
        counted = sorted(self._statistics)
        parts = [*totals, *counts, *(self._statistics[name] for name in counted)]
        if parts:
            flat = torch.cat([part.flatten() for part in parts])
            dist.all_reduce(flat, group=groups.get_data_parallel_group())
            parts = [part.view(like.shape) for part, like in zip(flat.cpu().split([p.numel() for p in parts]), parts)]
        pairs = zip(names, parts, parts[len(names) :])
        values = {name: float(total / count) for name, total, count in pairs if count > 0}
        statistics = dict(zip(counted, parts[2 * len(names) :]))
        if groups.get_pipeline_model_parallel_world_size() > 1:  # only the last stage has losses
            shared = [(values, statistics)]
            dist.broadcast_object_list(
                shared,
                src=groups.get_pipeline_model_parallel_last_rank(),
                group=groups.get_pipeline_model_parallel_group(),
            )
            values, statistics = shared[0]
        for name, value in own_statistics.items():
            total = value.to(torch.float64)
            dist.all_reduce(total)
            statistics[name] = total.cpu()
        for name, norm in self._norms.items():
            values[f"gradient_norm/{name}" if self._several_modules else "gradient_norm"] = float(norm)
        self.forget()
        return values, statistics
