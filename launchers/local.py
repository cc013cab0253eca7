"""Train on one machine: ``python -m launchers.local CONFIG [--processes N] [key=value ...]``.

Starts the ranks with the variables of torchrun (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), so that
``torchrun -m megavar train CONFIG`` does the same training; but it starts them itself, because torchrun's agent dies
from SIGUSR1, kills ranks 30 s after SIGTERM even while they save, and returns 1 whatever their exit code was. As the
batch script does on a cluster, it keeps one log per rank and attempt, ends all ranks when one fails, forwards a request
to stop (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2) so that the run saves, starts again what can continue, and gives up
when there is no progress. Where it dies itself, the kernel asks its ranks to save and stop. The exit code is that of
``megavar.errors.ExitCode``.
"""

import argparse
import contextlib
import ctypes
import functools
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from launchers import progress
from launchers.provenance import write_config
from launchers.rendezvous import master_port
from launchers.slurm import required_runs, resolve
from megavar import storage
from megavar.errors import ClusterError, ConfigError, ExitCode, MegavarError
from megavar.storage import append_line, open_to_append

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1
GRACE_SECONDS = 30.0
"""Between SIGTERM and SIGKILL for the ranks that are left when one has failed, as with Slurm's KillWait."""


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m launchers.local",
        description="Train on this machine.",
        allow_abbrev=False,
        epilog="Further arguments key=value change the configuration.",
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("--processes", type=int, help="number of ranks; default: one per GPU, one without GPUs")
    parser.add_argument("--maximum-attempts", type=int, default=3, metavar="N",
                        help="attempts in a row that may end without a newer checkpoint (default 3)")  # fmt: skip
    given, overrides = parser.parse_known_args(list(arguments))
    for word in overrides:
        if word.startswith("-") or "=" not in word:
            parser.error(f"{word!r} is neither an option nor an override such as train.steps=100")
    try:
        return run(given.config, overrides, processes=given.processes, maximum=given.maximum_attempts)
    except MegavarError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except (OSError, progress.LedgerError) as error:  # before or between attempts: no rank is running
        print(f"The run directory cannot be used: {error}. Mend that, and start again.", file=sys.stderr)
        return ExitCode.PREFLIGHT


def run(config_path: str, overrides: Sequence[str], *, processes: int | None, maximum: int) -> ExitCode:
    """Train until the run is done, stopped or hopeless.

    Raises:
        ConfigError: the configuration is wrong, or the run directory belongs to another one.
        ClusterError: there are more processes than GPUs.
    """
    config, directory = resolve(config_path, overrides)
    required = required_runs(config)
    world_size = _world_size(processes)
    if maximum < 1:
        raise ConfigError(f"--maximum-attempts {maximum} allows no attempt: give 1 or more.")
    write_config(directory, config)
    if config.train.fresh:
        (directory / "DONE").unlink(missing_ok=True)
    command = [sys.executable, "-m", "megavar", "train", str(directory / "config.yaml")]
    while True:
        code, attempt = progress.begin(directory, required, maximum=maximum, tasks_per_node=world_size)
        if not attempt:
            print(f"{directory} " + ("is finished already." if code == ExitCode.FINISHED else "makes no progress."))
            return code
        logs = directory / f"logs/attempt-{attempt:04d}"
        try:
            logs.mkdir(parents=True, exist_ok=True)
            storage.link(logs.with_name("current"), logs.name)
            storage.link(logs.with_name("current.log"), f"{logs.name}/rank-0000.log")  # tail -F follows links to files
        except OSError as error:
            print(f"No logs are kept: {error}", file=sys.stderr)
        with Ranks(command, world_size, logs, {"MEGAVAR_ATTEMPT": str(attempt)}) as ranks:
            status = ranks.wait()
        code, action = progress.end(
            directory, required, maximum=maximum, attempt=attempt, status=status,
            task_messages=ranks.messages, stop_requested=ranks.stop_requested,
        )  # fmt: skip
        told = (directory, attempt, code, action)
        threading.Thread(target=progress.tell, args=told, kwargs={"hurry": ranks.stop_requested}).start()
        print(f"Attempt {attempt} of {directory}: {code.name} ({int(code)}); logs in {logs}", flush=True)
        if action != progress.RESTART or ranks.stop_requested:
            if code not in (ExitCode.FINISHED, ExitCode.PREEMPTED):
                print(f"Understand it with: python -m launchers.doctor {directory}", file=sys.stderr)
            return code


def _world_size(processes: int | None) -> int:
    gpus = _number_of_gpus()
    if processes is not None and (processes < 1 or (gpus and processes > gpus)):
        raise ClusterError(
            f"--processes {processes} does not fit this machine, which has {gpus} GPUs: give a number from 1 to {gpus}."
            if gpus
            else f"--processes {processes} starts nothing: give 1 or more."
        )
    return processes or max(gpus, 1)


def _number_of_gpus() -> int:
    """GPUs that the ranks will see, without importing torch into the launcher."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() and device.strip() != "-1"])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


class Ranks:
    """The processes of one attempt. Leaving the block ends those that are left."""

    def __init__(self, command: Sequence[str], world_size: int, logs: Path, variables: Mapping[str, str]) -> None:
        self.stop_requested = self._interrupted = False
        self.messages = ""
        """How ranks ended, in srun's words; also in ``tasks.txt``."""
        self._logs, self._world_size = logs, world_size
        self._processes: list[subprocess.Popen[bytes]] = []
        under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        heard = [number for number in STOP_SIGNALS if not (under_nohup and number == signal.SIGHUP)]
        self._previous = {number: signal.signal(number, self._forward_stop) for number in heard}
        port = master_port(os.getpid())
        for rank in range(world_size):
            environment = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "PYTHONUNBUFFERED": "1", "MEGAVAR_LOG_DIRECTORY": str(logs), **variables,
            }  # fmt: skip
            self._start(rank, command, environment)
        first = logs / "rank-0000.log"
        self._first_log = first.open(errors="replace") if first.is_file() else io.StringIO()

    def _start(self, rank: int, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start one rank in a session of its own, which keeps Ctrl-C for the launcher; it does not outlive it."""
        with self._open_log(rank) as log:
            self._processes.append(
                subprocess.Popen(
                    command, stdout=log, stderr=log, env=dict(environment), start_new_session=True,
                    preexec_fn=functools.partial(_end_with, os.getpid(), _libc()),
                )
            )  # fmt: skip

    def _open_log(self, rank: int) -> io.FileIO:
        """A file of the launcher's own ends no run: without a place for its log, a rank runs without one."""
        try:
            return open_to_append(self._logs / f"rank-{rank:04d}.log")
        except OSError as error:
            print(f"Rank {rank} keeps no log: {error}", file=sys.stderr)
            return io.FileIO(os.devnull, "w")

    def _show(self) -> None:
        """Pass on what rank 0 has written since the last call, as long as somebody listens."""
        try:
            sys.stdout.write(self._first_log.read())
            sys.stdout.flush()
        except OSError:  # a closed terminal or pipe, or a log that cannot be read
            self._first_log = io.StringIO()

    def _note(self, message: str) -> None:
        self.messages += f"{message}\n"
        with contextlib.suppress(OSError):
            append_line(self._logs / "tasks.txt", message)

    def _forward_stop(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            print("SIGINT again: ends all ranks at once", file=sys.stderr, flush=True)
            self._signal(signal.SIGKILL)
            return
        self._interrupted |= number == signal.SIGINT
        if not self.stop_requested:
            again = "; Ctrl-C again does not wait for it" if number == signal.SIGINT else ""
            with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal
                name = signal.Signals(number).name
                print(f"{name}: asks all ranks to save and stop{again}", file=sys.stderr, flush=True)
        self.stop_requested = True
        self._signal(signal.SIGUSR2)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """Wait for all ranks; when one fails, end the others. Returns 0, or the status of the first that failed."""
        failed, deadline = 0, float("inf")
        ended: set[int] = set()
        with contextlib.suppress(OSError):
            open_to_append(self._logs / "tasks.txt").close()
        while len(ended) < self._world_size:
            for rank, process in enumerate(self._processes):
                if rank in ended or process.poll() is None:
                    continue
                ended.add(rank)
                status = process.returncode
                if status != 0:
                    self._note(f"local: error: {socket.gethostname()}: task {rank}: {describe(status)}")
                if status != 0 and not failed:
                    failed = status if status > 0 else 128 - status
                    deadline = time.monotonic() + GRACE_SECONDS
                    if status != ExitCode.PREEMPTED:  # then all have saved and are about to leave
                        self._signal(signal.SIGTERM)
            if time.monotonic() > deadline:
                self._signal(signal.SIGKILL)
            self._show()
            time.sleep(0.05)
        return failed

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()
        self._show()
        self._first_log.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with(launcher: int, libc: ctypes.CDLL | None) -> None:
    """In a rank before it is one: let the kernel ask it to save and stop where the launcher dies without a word."""
    if libc is not None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # dead already
            os.kill(os.getpid(), signal.SIGTERM)


def describe(status: int) -> str:
    """A return code of subprocess in srun's words."""
    if status >= 0:
        return f"Exited with exit code {status}"
    words = {signal.SIGKILL: "Killed", signal.SIGTERM: "Terminated", signal.SIGSEGV: "Segmentation fault",
             signal.SIGABRT: "Aborted", signal.SIGBUS: "Bus error"}  # fmt: skip
    return words.get(signal.Signals(-status), signal.Signals(-status).name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
