"""The process of one section of ``tools/gpu_check.py``: imports what sections need, waits for its turn, works.

    python -m tools.gpu_check_worker MODULE:FUNCTION RECORDS [ARGUMENT ...] [--dry] [--beside]

Its turn comes with a line on standard input: its time limit in seconds. Findings go to the file RECORDS, one JSON
object a line, each flushed as it is found.
"""

import argparse
import importlib
import json
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megavar.config.parallel import ParallelConfig
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.parallel.topology import Topology
from tools.benchmark_timing import machine


@dataclass
class Check:
    """What a section works with."""

    records_file: Path
    device: torch.device
    dry: bool
    """Tiny sizes."""
    ends: float
    """Of its time, on the monotonic clock."""

    def record(self, **values: Any) -> None:
        """Write down a finding."""
        with self.records_file.open("ab") as file:
            file.write(json.dumps(values).encode() + b"\n")

    def passed(self, check: str, outcome: bool, **detail: Any) -> None:
        """Write down whether a check holds."""
        self.record(check=check, passed=bool(outcome), **detail)

    def figure(self, subject: str, what: str, **values: Any) -> None:
        """Write down a measurement of ``subject`` (a model, a layer)."""
        self.record(subject=subject, what=what, **values)

    @property
    def seconds_left(self) -> float:
        """Until it is stopped."""
        return self.ends - time.monotonic()

    def mesh(self) -> Topology:
        """Process groups of this one rank."""
        return topology.initialize(ParallelConfig(), environment())


def _explained(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:600]}"


def main(arguments: list[str]) -> int:
    """Run the section; returns the exit code."""
    parser = argparse.ArgumentParser(prog="gpu_check_worker")
    parser.add_argument("work")
    parser.add_argument("records", type=Path)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--beside", action="store_true")
    options = parser.parse_args(arguments)
    module, _, function = options.work.partition(":")
    work = getattr(importlib.import_module(module), function)
    from megavar.parallel.deepspeed_backend import import_deepspeed

    import_deepspeed()
    turn = sys.stdin.readline()
    if not turn:
        return 0  # nobody wants it any more
    check = Check(options.records, environment().device, options.dry, time.monotonic() + float(turn))
    if check.device.type == "cuda" or check.dry or options.beside:
        check.record(machine=described_machine(check.device))
    else:
        check.record(error="there is no GPU here (torch.cuda.is_available() is false); try --dry")
        return 1
    try:
        work(check, *options.arguments)
    except BaseException as error:
        traceback.print_exc()
        check.record(error=_explained(error))
        return 1
    finally:
        topology.shutdown()
    return 0


def described_machine(device: torch.device) -> Mapping[str, Any]:
    """What the numbers belong to."""
    import deepspeed
    from megatron.core import __version__ as megatron

    versions = {"deepspeed": deepspeed.__version__, "megatron_core": megatron, "device": device.type}
    if device.type == "cuda":
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return machine() | versions


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
