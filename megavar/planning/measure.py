"""What a generator costs, measured on the real model: one rank runs embedding, each kind of block and head.

The tensors have shapes but no memory, and the other ranks do not exist, so it takes seconds whatever the size. See
:mod:`megavar.planning.fake_run`, which does it in a process of its own.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from megavar.config.generators.base import GeneratorChoice
from megavar.config.token_space import TokenSpace
from megavar.errors import ConfigError
from megavar.planning.cost import Cost

Recompute = Literal["none", "selective", "full"]
Precision = Literal["fp32", "bf16"]

_MEASURED: dict[str, Cost] = {}


class UnmeasurableError(ConfigError):
    """The generator cannot be run without values."""


@dataclass(frozen=True)
class Request:
    """A rank to measure. Pipeline stages, expert-parallel and data-parallel sizes follow from it by arithmetic."""

    choice: GeneratorChoice
    space: TokenSpace
    tensor: int = 1
    sequence: bool = False
    recompute: Recompute = "none"
    precision: Precision = "bf16"

    @cached_property
    def key(self) -> str:
        """Equal for equal requests."""
        kind = type(self.choice)
        layout = (self.tensor, self.sequence, self.recompute, self.precision)
        return f"{kind.__module__}:{kind.__qualname__} {self.choice.model_dump_json()} {self.space} {layout}"

    def with_recompute(self, recompute: Recompute) -> "Request":
        """The same with another way of recomputation."""
        return replace(self, recompute=recompute)


def measure(requests: Iterable[Request], progress: Callable[[int, int], None] | None = None) -> list[Cost]:
    """Costs of all requests, in their order. Each is measured once per process.

    Args:
        progress: called with the number of those that are measured and of all that must be.

    Raises:
        UnmeasurableError: a generator's code needs values.
    """
    wanted = list(requests)
    missing = list({request.key: request for request in wanted if request.key not in _MEASURED}.values())
    if missing:
        _run(missing, progress or (lambda done, total: None))
    return [_MEASURED[request.key] for request in wanted]


def _run(requests: list[Request], progress: Callable[[int, int], None]) -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as complaints, subprocess.Popen(
        [sys.executable, "-m", "megavar.planning.fake_run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=complaints, env=os.environ | hidden,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        # Requests are pickled apart: their classes may come from where only sys.path leads (plugins).
        pickle.dump((sys.path, pickle.dumps(requests)), process.stdin)
        process.stdin.close()
        for number, request in enumerate(requests):
            progress(number, len(requests))
            try:
                kind, value = pickle.load(process.stdout)
            except EOFError:
                complaints.seek(0)
                raise RuntimeError(f"Measuring ended early: {complaints.read().decode(errors='replace')}") from None
            if kind == "error":
                process.kill()
                reason, where = value
                raise UnmeasurableError(
                    f"generator.name={request.choice.name}: its costs cannot be measured, because it cannot run with "
                    f"tensors that have no values ({reason})."
                ) from RuntimeError(where)
            _MEASURED[request.key] = value
        progress(len(requests), len(requests))
