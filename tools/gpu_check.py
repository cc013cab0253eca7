"""Verify and measure megavar on a GPU in one command, within minutes and without a network.

    python -m tools.gpu_check --out $OUT                       everything, most valuable first, in eight minutes
    python -m tools.gpu_check --out $OUT --sections steps flex
    python -m tools.gpu_check --out /tmp/check --dry           the same code on a CPU, at tiny sizes
    python -m tools.gpu_check --render gpu_check.json          tables of an earlier run, for docs/performance.md

Writes ``gpu_check.json``, ``gpu_check.md`` and ``gpu_check.log`` into the folder, again and again while it goes: a run
that is cut off keeps what it has. Each section has a process of its own and a time limit, so that a crash or a hang
loses that section only; the next section's process starts early and waits, its imports done. ``tools/gpu_wheels.sh``
collects the packages that a machine without network lacks.
"""

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from megavar.errors import ExitCode
from megavar.storage import write_json_atomic, write_text_atomic
from tools.gpu_check_report import markdown
from tools.gpu_check_sections import SECTIONS, Section

LOOK_SECONDS = 0.25
START_SECONDS = 90.0
"""A process that has not begun after so long never will."""
MARGIN_SECONDS = 8.0
"""Kept back to write the results."""


class Worker:
    """The process of a section; it has imported everything and waits for :meth:`go`."""

    def __init__(self, section: Section, scratch: Path, log: IO[bytes], dry: bool) -> None:
        self.section, self.records_file = section, scratch / f"{section.name}.jsonl"
        self.records_file.touch()
        environment = dict(os.environ)
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(scratch / "inductor"))
        environment.setdefault("TRITON_CACHE_DIR", str(scratch / "triton"))
        environment.setdefault("DS_BUILD_OPS", "0")
        if section.beside or dry:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1")}
        command = [sys.executable, "-m", "tools.gpu_check_worker", section.work, str(self.records_file)]
        command += [*section.arguments, *["--dry"] * dry, *["--beside"] * section.beside]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, process_group=0
        )
        self.limit = 0.0
        self._asked: float | None = None
        self._began: float | None = None

    def go(self, limit: float) -> None:
        """Let it begin, for ``limit`` seconds at most, which count from its first word on."""
        self._asked, self.limit = time.monotonic(), limit
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died while it was importing: its exit code says so
            self.process.stdin.write(f"{limit}\n".encode())
            self.process.stdin.close()

    @property
    def seconds(self) -> float:
        """Since it was asked to begin."""
        return 0.0 if self._asked is None else time.monotonic() - self._asked

    def _late(self) -> bool:
        """Whether it has had its time."""
        if self._began is None and self.records_file.stat().st_size:
            self._began = time.monotonic()
        if self._began is not None:
            return time.monotonic() - self._began > self.limit
        return self.seconds > START_SECONDS

    def records(self) -> list[dict[str, Any]]:
        """What it has found so far; a line that is being written does not count yet."""
        lines = self.records_file.read_bytes().split(b"\n")[:-1]
        return [json.loads(line) for line in lines]

    def kill(self) -> None:
        """End it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def state(self) -> tuple[str, str | None]:
        """Status and, for one that has not ended well, the reason."""
        code = self.process.poll()
        if code is None:
            return ("out of time", f"stopped after {self.seconds:.0f} s") if self._late() else ("running", None)
        errors = [record["error"] for record in self.records() if "error" in record]
        if errors:
            return "failed", errors[-1]
        return ("done", None) if code == 0 else ("crashed", f"its process ended with {code}")


class Session:
    """All sections, one after the other, and the files with their results."""

    def __init__(self, out: Path, sections: Sequence[Section], *, seconds: float, dry: bool) -> None:
        self.out, self.dry = out, dry
        self._ends = time.monotonic() + seconds - MARGIN_SECONDS
        self.result: dict[str, Any] = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "dry": dry,
            "machine": None,
            "sections": {
                section.name: {"title": section.title, "status": "not run", "seconds": 0.0, "records": []}
                for section in sections
            },
        }
        self._sections = sections
        out.mkdir(parents=True, exist_ok=True)

    def run(self) -> ExitCode:
        """Run the sections; returns success where all ran and no check failed."""
        workers: list[Worker] = []
        temporary = tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True)
        with temporary as scratch, (self.out / "gpu_check.log").open("ab") as log:
            try:
                for worker in self._workers(Path(scratch), log, workers):
                    self._follow(worker, [other for other in workers if other.section.beside])
                for worker in workers:
                    if worker.section.beside:
                        self._follow(worker, [])
            finally:
                for worker in workers:
                    worker.kill()
                self._write()
        return ExitCode.FINISHED if not self._problems() else ExitCode.FAILED

    def _workers(self, scratch: Path, log: IO[bytes], started: list[Worker]) -> Iterator[Worker]:
        """Each section's process in turn; the next one is started before this one begins."""

        def start(section: Section) -> Worker:
            started.append(Worker(section, scratch, log, self.dry))
            return started[-1]

        for section in self._sections:
            if section.beside:
                start(section).go(min(section.seconds, self._left()))
        waiting: Worker | None = None
        turn = [section for section in self._sections if not section.beside]
        for number, section in enumerate(turn):
            worker = waiting or start(section)
            if self._left() <= 0:
                return
            waiting = start(turn[number + 1]) if number + 1 < len(turn) else None
            worker.go(min(section.seconds, self._left()))
            yield worker

    def _left(self) -> float:
        return self._ends - time.monotonic()

    def _follow(self, worker: Worker, beside: Sequence[Worker]) -> None:
        """Write down what ``worker`` finds until it ends or must."""
        print(f"{worker.section.name:<18}", end="", flush=True)
        seen = None
        while True:
            status, reason = worker.state()
            if status == "running" and self._left() < 0:
                status, reason = "out of time", "the time of the whole check was used up"
            if status == "out of time":
                worker.kill()
            for other in beside:
                self._note(other, *other.state())
            self._note(worker, status, reason)
            if (state := (status, len(worker.records()))) != seen:
                self._write()
                seen = state
            if status != "running":
                break
            time.sleep(LOOK_SECONDS)
        print(f"{status} in {worker.seconds:.1f} s{'' if reason is None else f': {reason}'}", flush=True)

    def _note(self, worker: Worker, status: str, reason: str | None) -> None:
        entry = self.result["sections"][worker.section.name]
        if entry["status"] not in ("not run", "running"):
            return
        records = worker.records()
        for record in records:
            if "machine" in record and (self.result["machine"] is None or not worker.section.beside):
                self.result["machine"] = record["machine"]
        shown = [record for record in records if "machine" not in record and "error" not in record]
        entry |= {"status": status, "seconds": round(worker.seconds, 1), "records": shown}
        if reason is not None:
            entry["reason"] = reason

    def _write(self) -> None:
        write_json_atomic(self.out / "gpu_check.json", self.result)
        write_text_atomic(self.out / "gpu_check.md", markdown(self.result))

    def _problems(self) -> list[str]:
        sections = self.result["sections"]
        bad = [name for name, section in sections.items() if section["status"] != "done"]
        checks = [record for section in sections.values() for record in section["records"] if "passed" in record]
        return bad + [record["check"] for record in checks if not record["passed"]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [section.name for section in SECTIONS]
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the results go")
    parser.add_argument("--minutes", type=float, default=8.0, help="time of the whole check (default: 8)")
    parser.add_argument("--sections", nargs="+", choices=names, default=names, metavar="SECTION",
                        help=f"only these: {', '.join(names)}")  # fmt: skip
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU: does the script itself work?")
    parser.add_argument("--render", type=Path, metavar="JSON", help="print the tables of an earlier run and stop")
    options = parser.parse_args(arguments)
    if options.render is not None:
        print(markdown(json.loads(options.render.read_text())))
        return ExitCode.FINISHED
    if options.out is None:
        parser.error("--out is missing: name a folder for the results")
    sections = [section for section in SECTIONS if section.name in options.sections]
    session = Session(options.out, sections, seconds=options.minutes * 60, dry=options.dry)
    code = session.run()
    print((options.out / "gpu_check.md").read_text())
    return code


if __name__ == "__main__":
    sys.exit(main())
