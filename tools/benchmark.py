"""Measure how fast the parts of a run are on this machine, CPU or one GPU.

    python -m tools.benchmark configs/quickstart.yaml                   all parts
    python -m tools.benchmark CONFIG generator.depth=16 --parts attention experts --json out.json
    python -m tools.benchmark CONFIG --parts train --trace traces       with profiler traces, too

``attention`` compares kernels, ``experts`` backends, ``overhead`` the trainer with a bare loop of forward, backward and
AdamW; ``train`` and ``sampling`` give images per second, ``decoding`` times an early and a late step of drawing token
by token. Alternatives of a part are measured in turn: their ratios, taken round by round, hold on a busy machine.
Numbers are medians and quartiles. Weights and images are random.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megavar.config.loading import load_config
from megavar.errors import ConfigError, ExitCode, MegavarError
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.paths import as_path
from megavar.planning.hardware import peak_of_device
from megavar.storage import write_json_atomic
from tools.benchmark_bench import Bench, Part
from tools.benchmark_cases import PARTS
from tools.benchmark_timing import Timing, machine, measure, memory_snapshot, trace


def rows(part: Part, timings: dict[str, Timing], peak: float | None) -> list[dict[str, Any]]:
    """One row of figures per alternative.

    Args:
        peak: operations per second of the device, where known.
    """
    result: list[dict[str, Any]] = []
    base = None if part.baseline is None else timings[part.baseline]
    for name, timing in timings.items():
        flops = part.flops.get(name)
        result.append({
            "part": part.name,
            "alternative": name,
            "seconds": asdict(timing),
            "images_per_second": part.images / timing.median,
            "teraflops_per_second": None if flops is None else flops / timing.median / 1e12,
            "utilization": None if flops is None or peak is None else flops / timing.median / peak,
            "relative_to": part.baseline,
            "ratio": None if base is None else dict(zip(("lower", "median", "upper"), timing.ratio(base))),
        })  # fmt: skip
    return result


def table(part: Part, figures: list[dict[str, Any]]) -> str:
    """The rows of one part for people."""
    lines = [f"{part.name} ({part.images} images)"]
    for row in figures:
        seconds = row["seconds"]
        cells = [
            f"  {row['alternative']:<24}{seconds['median'] * 1e3:>10.2f} ms",
            f"[{seconds['lower'] * 1e3:.2f} .. {seconds['upper'] * 1e3:.2f}]",
            f"{row['images_per_second']:>10.1f} images/s",
        ]
        if row["teraflops_per_second"] is not None:
            cells.append(f"{row['teraflops_per_second']:>8.3f} TFLOP/s")
        if row["utilization"] is not None:
            cells.append(f"{row['utilization']:>5.1%} of peak")
        if row["ratio"] is not None and row["alternative"] != row["relative_to"]:
            ratio = row["ratio"]
            cells.append(f"{ratio['median']:.3f} [{ratio['lower']:.3f} .. {ratio['upper']:.3f}] x {row['relative_to']}")
        if seconds["peak_bytes"] is not None:
            cells.append(f"{seconds['peak_bytes'] / 2**30:.2f} GiB")
        lines.append("  ".join(cells))
    lines += [f"  {name:<24}skipped: {reason}" for name, reason in part.skipped.items()]
    return "\n".join(lines)


def benchmark(bench: Bench, parts: Sequence[str], repeats: int, traces: Path | None, snapshots: Path | None) -> list:
    """Measure ``parts`` and print their tables; returns all rows."""
    import torch

    peak = None
    if bench.device.type == "cuda":
        peak = peak_of_device(torch.cuda.get_device_name(), bench.config.train.precision)
    figures: list[dict[str, Any]] = []
    for name in parts:
        part = PARTS[name](bench)
        measured = rows(part, measure(part.alternatives, repeats), peak)
        print(table(part, measured), flush=True)
        figures += measured
        figures += [{"part": part.name, "alternative": key, "skipped": why} for key, why in part.skipped.items()]
        for alternative, work in part.alternatives.items():
            file = f"{name}-{re.sub(r'[^a-z0-9]+', '-', alternative.lower())}"
            if traces is not None:
                trace(work, traces / f"{file}.json")
            if snapshots is not None:
                memory_snapshot(work, snapshots / f"{file}.pickle")
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of a run with a generator")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--batch", type=int, help="images of a micro-batch; default: train.micro_batch_size or 8")
    parser.add_argument("--repeats", type=int, default=7, help="measurements per alternative (default: 7)")
    parser.add_argument("--json", type=as_path, metavar="FILE", help="write all figures to this file")
    parser.add_argument("--trace", type=as_path, metavar="DIRECTORY", help="write a profiler trace of each alternative")
    parser.add_argument("--snapshot", type=as_path, metavar="DIRECTORY", help="write memory snapshots (GPU only)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    options = _parser().parse_intermixed_args(arguments)
    place = environment()
    try:
        config = load_config(options.config, options.overrides)
        if config.generator is None:
            raise ConfigError(f"{options.config} has no generator to measure. Give the configuration of a generator.")
        if place.world_size > 1:
            raise ConfigError("The benchmark measures one process. Start it without torchrun or srun.")
        if options.snapshot is not None and place.device.type != "cuda":
            raise ConfigError("--snapshot records GPU memory, and there is no GPU here. Leave it out.")
        mesh = topology.initialize(config.parallel, place)
        batch = options.batch or config.train.micro_batch_size or 8
        bench = Bench(config, mesh, place.device, batch)
        described = machine()
        print(", ".join(f"{key} {value}" for key, value in described.items()), flush=True)
        figures = benchmark(bench, options.parts, options.repeats, options.trace, options.snapshot)
    except MegavarError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        topology.shutdown()
    if options.json is not None:
        settings = {"config": options.config, "overrides": options.overrides, "batch": batch}
        write_json_atomic(options.json, {"machine": described, "run": settings, "figures": figures})
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
