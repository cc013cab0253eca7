"""A two-minute read of the contract between the launchers and a trainer, for tests of the launchers alone.

Trains one weight over gloo. Like the real trainer it logs lines with time, rank and step, saves
``checkpoints/step-*/manifest.json``, agrees with all ranks on the step at which to stop, ignores further signals once
that is decided, writes ``DONE`` and leaves with an exit code of ``megavar.errors.ExitCode``.

Its own settings stand beside the run's configuration in ``small.json``: steps, seconds_per_step, save_every, and
optionally ``fail``: the exit code with which the last rank leaves at once.
"""

import json
import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

stop_requested = False


def request_stop(*_: object) -> None:
    global stop_requested
    stop_requested = True


for number in (signal.SIGTERM, signal.SIGUSR2):  # before the imports, which take a while on a busy machine
    signal.signal(number, request_stop)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from launchers.progress import newest_checkpoint_step  # noqa: E402
from megavar.errors import ExitCode  # noqa: E402
from megavar.storage import write_json_atomic  # noqa: E402


def log(step: int | str, text: str) -> None:
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    print(f"{now} rank={os.environ['SLURM_PROCID']} step={step} INFO {text}", flush=True)


def save(run: Path, step: int, weight: torch.Tensor) -> None:
    if dist.get_rank() == 0:
        write_json_atomic(run / f"checkpoints/step-{step:08d}/manifest.json", {"step": step, "weight": weight.item()})
    dist.barrier()
    log(step, "saved a checkpoint")


def leave(code: ExitCode) -> int:
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    dist.barrier()
    return code


def main(config_path: Path) -> int:
    run = config_path.parent
    config = json.loads((run / "small.json").read_text())
    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    if rank == world - 1 and "fail" in config:
        return config["fail"]
    dist.init_process_group("gloo", rank=rank, world_size=world)
    weight, step = torch.zeros(1, dtype=torch.float64), max(newest_checkpoint_step(run), 0)
    if step:
        weight.fill_(json.loads((run / f"checkpoints/step-{step:08d}/manifest.json").read_text())["weight"])
        log(step, f"continues from step {step}")
    while step < config["steps"]:
        gradient = torch.tensor([(rank + 1.0) / (step + 1)], dtype=torch.float64)
        dist.all_reduce(gradient)
        weight -= 0.1 * gradient * (1 + weight)
        step += 1
        time.sleep(config["seconds_per_step"])
        log(step, f"loss {weight.item():.6f}")
        agreed = torch.tensor([int(stop_requested)])
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        if agreed.item():
            save(run, step, weight)
            return leave(ExitCode.PREEMPTED)
        if step % config["save_every"] == 0:
            save(run, step, weight)
    save(run, step, weight)
    if rank == 0:
        (run / "DONE").touch()
    return leave(ExitCode.FINISHED)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
