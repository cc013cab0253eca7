"""Compare train steps of several recipes on one model: time and memory of SAR over teacher forcing, for example.

    python -m tools.benchmark_recipes configs/sar/flexvar_d16.yaml configs/sar/sar_d16_release.yaml \\
        configs/sar/sar_d16.yaml generator.depth=4 'recipe.scale_lists={name: fixed}'

The first configuration is the one that the others are related to. Steps are measured in turn, on the latents of one
micro-batch of random images: the tokenizer's encoder is not part of them. On a CPU seconds are those of the processor,
whatever else it does, and memory is the most that is kept for a backward pass at a time; on a GPU the allocator's.
"""

import argparse
import contextlib
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.errors import ExitCode, MegavarError
from megavar.parallel import topology
from megavar.parallel.environment import environment
from tools.benchmark_bench import Bench
from tools.benchmark_cases import prepared_step
from tools.benchmark_timing import Timing, machine, measure


class _Kept:
    """A tensor that waits for a backward pass."""

    def __init__(self, tensor: Tensor, memory: "KeptMemory") -> None:
        self.tensor, self.memory = tensor, memory
        memory.change(tensor, 1)

    def __del__(self) -> None:
        self.memory.change(self.tensor, -1)


class KeptMemory:
    """Bytes of all storages that are kept for backward passes, each counted once."""

    def __init__(self, ignored: Iterator[Tensor]) -> None:
        """``ignored``: parameters, which are there anyway."""
        self.ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self.users: Counter[int] = Counter()
        self.now = self.most = 0

    def change(self, tensor: Tensor, by: int) -> None:
        """A graph begins (1) or ceases (-1) to hold ``tensor``."""
        storage = tensor.untyped_storage()
        place, before = storage.data_ptr(), self.users[storage.data_ptr()]
        if place in self.ignored:
            return
        self.users[place] += by
        if 0 in (before, self.users[place]):
            self.now += by * storage.nbytes()
            self.most = max(self.most, self.now)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Count what is kept inside the block."""
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Kept(tensor, self), lambda kept: kept.tensor):
            yield


@dataclass
class Candidate:
    """A recipe that is ready to step."""

    name: str
    work: Callable[[], Any]
    passes: int
    module: torch.nn.Module

    @classmethod
    def of(cls, bench: Bench) -> "Candidate":
        """With fresh weights, on latents of random images."""
        recipe: Any = bench.assembly().recipe()
        engines, batch = bench.engines(recipe), bench.images()
        with torch.no_grad():
            batch = replace(batch, images=None, latents=recipe.tokenizer.encode(batch.images))
        name, module = next(iter(recipe.modules().items()))
        work = functools.partial(prepared_step, recipe, engines, batch)
        return cls(bench.config.run.name, work, len(recipe.passes(name, 0)), module)

    def kept_bytes(self) -> int:
        """The most that one step keeps for a backward pass at a time."""
        memory = KeptMemory(self.module.parameters())
        with memory.watch():
            self.work()
        return memory.most


def row(candidate: Candidate, timing: Timing, base: Timing, memory: int, base_memory: int) -> str:
    """A line of the table."""
    lower, median, upper = timing.ratio(base)
    return (
        f"  {candidate.name:<28}{candidate.passes:>3} passes  {timing.median * 1e3:>9.1f} ms  "
        f"{median:.2f} [{lower:.2f} .. {upper:.2f}] x  {memory / 2**20:>9.1f} MiB  {memory / base_memory:.2f} x"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="benchmark_recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="+", metavar="CONFIG|key=value", help="files, and overrides of them all")
    parser.add_argument("--batch", type=int, default=4, help="images of the micro-batch (default: 4)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each (default: 5)")
    options = parser.parse_intermixed_args(arguments)
    overrides = [word for word in options.words if "=" in word]
    try:
        configs = [load_config(word, overrides) for word in options.words if "=" not in word]
        place = environment()
        mesh = topology.initialize(ParallelConfig(), place)
        found = [Candidate.of(Bench(config, mesh, place.device, options.batch)) for config in configs]
        clock = time.perf_counter if place.device.type == "cuda" else time.process_time
        timings = measure({one.name: one.work for one in found}, options.repeats, clock)
        peaks = [timings[one.name].peak_bytes or one.kept_bytes() for one in found]
    except MegavarError as error:
        print(f"benchmark_recipes: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        topology.shutdown()
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"train step of one micro-batch of {options.batch} images, time and memory over {found[0].name}")
    for one, peak in zip(found, peaks, strict=True):
        print(row(one, timings[one.name], timings[found[0].name], peak, peaks[0]), flush=True)
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
