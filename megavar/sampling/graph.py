"""Drawing of a whole batch as one CUDA graph: the host launches once what it launched kernel by kernel.

A drawing is thousands of small kernels, and at small batches a GPU waits for their launches. All that a drawing reads
from the host is known before it starts (no step asks the device for a number), so it is recorded once per batch size
and replayed with other conditions and other noise.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megavar.conditions import Condition
from megavar.errors import ConfigError
from megavar.sampling.noise import Noise, postponed_checks, require_finite

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs some work on fixed tensors; what it returns repeats the work on what they hold then, into the same results."""


def record_on_cuda(work: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of ``work``."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@dataclass
class _Recording:
    """A recorded drawing and the tensors that it reads and writes."""

    labels: Tensor
    indices: Tensor
    replay: Callable[[], None]
    tokens: Tensor
    checks: list[Tensor]
    routing: list[Any]


class RepeatedDrawing:
    """Draws batches of samples: the first of a size as usual (which fills caches), later ones from its recording."""

    def __init__(self, generator: Any, draw: Callable[[Condition, Noise], Tensor], record: Record) -> None:
        """``draw`` draws with ``generator``, whose routing records a replay adds to as drawing does.

        Raises:
            ConfigError: the generator's experts read on the host how many tokens they got.
        """
        if not all(getattr(module, "never_waits", True) for module in generator.modules()):
            raise ConfigError(
                "sampling.cuda_graph=true needs experts that read no number on the host: set "
                "generator.experts.backend=grouped (parallel.expert=1), or sampling.cuda_graph=false."
            )
        self.generator, self.draw, self.record = generator, draw, record
        self._met: set[int] = set()
        self._recordings: dict[int, _Recording] = {}

    def __call__(self, condition: Condition, noise: Noise) -> Tensor:
        """Tokens of B samples; see :meth:`megavar.sampling.base.Procedure.draw`."""
        size = len(condition)
        if condition.captions is not None or size not in self._met:  # texts are read on the host
            self._met.add(size)
            return self.draw(condition, noise)
        if size not in self._recordings:
            self._recordings[size] = self._recorded(condition, noise)
        recording = self._recordings[size]
        recording.labels.copy_(condition.labels)
        recording.indices.copy_(noise.indices)
        recording.replay()
        require_finite(recording.checks)
        routing = getattr(self.generator, "routing", [])
        routing.extend(_copied(record) for record in recording.routing)
        return recording.tokens.clone()

    def _recorded(self, condition: Condition, noise: Noise) -> _Recording:
        labels, indices = condition.labels.clone(), noise.indices.clone()
        routing = getattr(self.generator, "routing", [])
        before, results = len(routing), []
        with postponed_checks() as checks:
            replay = self.record(
                lambda: results.append(self.draw(replace(condition, labels=labels), replace(noise, indices=indices)))
            )
        recorded, routing[before:] = routing[before:], []
        return _Recording(labels, indices, replay, results[0], list(checks), recorded)


def _copied(record: Any) -> Any:
    """A routing record whose tensors the next replay does not overwrite."""
    tensors = {name: value.clone() for name, value in vars(record).items() if isinstance(value, Tensor)}
    return replace(record, **tensors)
