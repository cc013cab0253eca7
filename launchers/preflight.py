"""Checks everything that can be known before step 1, on every node: ``python -m launchers.preflight CONFIG``.

The batch script runs one process per node under srun; by hand it checks this machine. The processes meet in a TCP store
at MASTER_ADDR:MASTER_PORT, which the ranks will use next. Every check has a time limit. The first process prints one
table and leaves, as all others do, with

* 0 if nothing failed (warnings do not count),
* ``ExitCode.CONFIGURATION`` if the run itself is wrong: starting again cannot help,
* ``ExitCode.PREFLIGHT`` if a node or the file system is: ``bad_nodes.txt`` in ``--report`` names nodes to replace.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from launchers import checks, rates
from launchers.checks import Finding, Status, guarded
from launchers.rendezvous import port_is_free
from megavar import logs
from megavar.config.loading import load_config
from megavar.config.root import Config
from megavar.errors import ConfigError, ExitCode
from megavar.storage import write_json_atomic, write_text_atomic

OF_THE_RUN = ("configuration", "data", "weights")
"""Failures of these are not the nodes' fault unless only some nodes see them."""

_CHECK_SECONDS = 60.0
_PATIENCE_SECONDS = 300.0
"""How long the processes wait for each other: nodes start and import at different times."""


@dataclass(frozen=True)
class Options:
    """What preflight is told."""

    config: str
    overrides: Sequence[str]
    world_size: int
    gpus: int
    """Per node."""
    lead_seconds: float | None
    report: Path | None
    bandwidth_bytes: int


@dataclass(frozen=True)
class Place:
    """This process among those of all nodes."""

    rank: int
    nodes: int
    name: str
    master: str
    port: int

    @classmethod
    def from_environment(cls) -> "Place":
        """One process per node under srun, or alone."""
        variables = os.environ
        name = variables.get("SLURMD_NODENAME") or socket.gethostname()
        if "SLURM_STEP_ID" not in variables:
            return cls(0, 1, name, "127.0.0.1", 0)
        return cls(int(variables["SLURM_PROCID"]), int(variables["SLURM_NTASKS"]), name, variables["MASTER_ADDR"],
                   int(variables["MASTER_PORT"]))  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m launchers.preflight", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("--gpus", type=int, help="GPUs per node; default: those of this machine")
    parser.add_argument("--world-size", type=int, help="ranks of the run; default: one per GPU, or one")
    parser.add_argument("--signal-lead-seconds", type=float, help="time between the signal and the end of the job")
    parser.add_argument("--report", type=Path, help="folder for preflight.json and bad_nodes.txt")
    parser.add_argument("--bandwidth-mib", type=int, default=64, help="data written to measure the file system")
    given, overrides = parser.parse_known_args(list(arguments))
    for word in overrides:
        if word.startswith("-") or "=" not in word:
            parser.error(f"{word!r} is neither an option nor an override such as train.steps=100")
    logs.silence_libraries()
    gpus = given.gpus if given.gpus is not None else torch.cuda.device_count()
    options = Options(
        config=given.config,
        overrides=overrides,
        world_size=given.world_size or max(gpus, 1),
        gpus=gpus,
        lead_seconds=given.signal_lead_seconds,
        report=given.report,
        bandwidth_bytes=given.bandwidth_mib * 2**20,
    )
    code = Preflight(options, Place.from_environment()).run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a check that hangs must not keep the process


class Preflight:
    """One process's part in the checks of all nodes."""

    def __init__(self, options: Options, place: Place) -> None:
        self.options, self.place = options, place
        self.findings: list[Finding] = []
        self.store: dist.Store | None = None

    def run(self) -> ExitCode:
        """Check, compare, and return the common exit code."""
        place = self.place
        config = self._configuration()
        if place.nodes > 1 and not self._meet():
            return ExitCode.PREFLIGHT
        self._node(config)
        readable = self._gather("configuration", str(int(config is not None)))
        if config is not None and set(readable.values()) == {"1"}:
            self._files(config)
        devices = next(item.status for item in self.findings if item.check == "gpus")
        if set(self._gather("devices", devices).values()) == {"pass"}:
            self._speed()
        return self._verdict()

    def _check(self, name: str, action: Callable[[], Finding | str], seconds: float = _CHECK_SECONDS) -> Finding:
        finding = guarded(name, seconds, action)
        self.findings.append(finding)
        return finding

    def _configuration(self) -> Config | None:
        try:
            config = load_config(self.options.config, self.options.overrides)
        except ConfigError as error:
            self.findings.append(Finding("configuration", "fail", str(error)))
            return None
        if self.place.rank == 0:
            self._check("configuration", lambda: checks.configuration(config, self.options.world_size))
        return config

    def _meet(self) -> bool:
        """Open the store on the first node; the port must be free there."""
        place = self.place
        if place.rank == 0 and not port_is_free(place.port):
            self.findings.append(Finding("port", "fail", f"port {place.port} is taken on {place.name}"))
            print(table({place.name: self.findings}))
            return False
        try:
            self.store = dist.TCPStore(place.master, place.port, place.nodes, place.rank == 0, wait_for_workers=False,
                                       timeout=timedelta(seconds=_PATIENCE_SECONDS))  # fmt: skip
        except (RuntimeError, dist.DistError) as error:
            print(f"{place.name} does not reach {place.master}:{place.port}: {error}", file=sys.stderr)
            return False
        if place.rank == 0:
            self.findings.append(Finding("port", "pass", f"{place.master}:{place.port}"))
        return True

    def _node(self, config: Config | None) -> None:
        self._check("host names", lambda: checks.host_names(self.place.master))
        self._check("limits", lambda: checks.limits(self.options.gpus))
        workers = config.data.workers * max(self.options.world_size // self.place.nodes, 1) if config else 0
        self._check("shared memory", lambda: checks.shared_memory(workers))
        self._check("gpus", lambda: checks.gpus(self.options.gpus))

    def _files(self, config: Config) -> None:
        self._check("data", lambda: checks.data(config), 4 * _CHECK_SECONDS)
        self._check("weights", lambda: checks.weights(config))
        directory = Path(config.run.path).absolute()
        folder = directory / ".preflight"
        self._check("run directory", lambda: self._visible(folder))
        size = checks.checkpoint_bytes(config, directory)
        self._wait("bandwidth")  # all nodes write at the same time, as in a save
        rate = guarded("write", 4 * _CHECK_SECONDS, lambda: Finding("write", "pass", "", checks.write_rate(
            folder, self.place.name, self.options.bandwidth_bytes)))  # fmt: skip
        if rate.value is None:
            self.findings.append(Finding("save bandwidth", "fail", rate.detail))
        total = sum(float(text) for text in self._gather("rate", str(rate.value or 0.0)).values())
        if self.place.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            self._check("space", lambda: checks.free_space(directory, size))
            if total > 0:
                lead = self.options.lead_seconds
                self._check("save bandwidth", lambda: checks.save_time(directory, size, total, lead))

    def _visible(self, folder: Path) -> str:
        """Every node writes a file, and every node reads those of all others."""
        folder.mkdir(parents=True, exist_ok=True)
        checks.write_mark(folder, self.place.name)
        names = list(self._gather("mark", self.place.name).values())
        missing = checks.read_marks(folder, names, 30.0)
        if missing:
            raise OSError(
                f"files that {', '.join(missing)} wrote into {folder.parent} are not seen here: is it shared?"
            )
        return f"{folder.parent} is shared" if len(names) > 1 else f"{folder.parent} is writable"

    def _speed(self) -> None:
        gpus = self.options.gpus
        self._check("matmul", lambda: Finding("matmul", "pass", "", rates.slowest_matmul_rate(gpus) / 1e12))
        if gpus > 1:
            self._check("all-reduce within nodes", lambda: Finding(
                "all-reduce within nodes", "pass", "", rates.all_reduce_rate_within(gpus) / 2**30))  # fmt: skip
        if self.store is not None:
            self._check("all-reduce between nodes", lambda: Finding(
                "all-reduce between nodes", "pass", "", self._between() / 2**30), 4 * _CHECK_SECONDS)  # fmt: skip

    def _between(self) -> float:
        place, device = self.place, torch.device("cuda", 0) if self.options.gpus else torch.device("cpu")
        assert self.store is not None
        dist.init_process_group(
            "nccl" if self.options.gpus else "gloo",
            rank=place.rank,
            world_size=place.nodes,
            store=dist.PrefixStore("group", self.store),
            timeout=timedelta(seconds=120),
        )
        return rates.all_reduce_rate(place.rank, place.nodes, device)

    # -- exchange -----------------------------------------------------------------------------------------------------

    def _gather(self, what: str, text: str, seconds: float = _PATIENCE_SECONDS) -> dict[int, str]:
        """What every node says about ``what``; a node that does not answer in time is left out."""
        if self.store is None:
            return {0: text}
        self.store.set(f"{what}/{self.place.rank}", text)
        answers, end = {}, time.monotonic() + seconds
        for rank in range(self.place.nodes):
            try:
                self.store.wait([f"{what}/{rank}"], timedelta(seconds=max(0.1, end - time.monotonic())))
                answers[rank] = self.store.get(f"{what}/{rank}").decode()
            except (RuntimeError, dist.DistError):
                continue
        return answers

    def _wait(self, what: str) -> None:
        self._gather(f"wait-{what}", "")

    def _clock_offsets(self, answers: dict[int, str]) -> dict[str, float]:
        """Ask each node for its time; half of the round trip is the uncertainty."""
        offsets: dict[str, float] = {}
        if self.store is None:
            return offsets
        if self.place.rank != 0:
            with contextlib.suppress(RuntimeError, dist.DistError):
                self.store.wait([f"ask/{self.place.rank}"], timedelta(seconds=_PATIENCE_SECONDS))
                self.store.set(f"time/{self.place.rank}", str(time.time()))
            return offsets
        for rank in answers:
            if rank == 0:
                continue
            began = time.time()
            self.store.set(f"ask/{rank}", "")
            self.store.wait([f"time/{rank}"], timedelta(seconds=_CHECK_SECONDS))
            there, ended = float(self.store.get(f"time/{rank}")), time.time()
            offsets[json.loads(answers[rank])["node"]] = there - (began + ended) / 2
        return offsets

    def _verdict(self) -> ExitCode:
        """The first process collects all findings, compares, prints, and tells the others the exit code."""
        mine = json.dumps({"node": self.place.name, "findings": checks.as_dict(self.findings)})
        answers = self._gather("findings", mine)
        offsets = self._clock_offsets(answers)
        if self.place.rank != 0:
            assert self.store is not None
            try:
                self.store.wait(["verdict"], timedelta(seconds=_PATIENCE_SECONDS))
                code = ExitCode(int(self.store.get("verdict")))
                self.store.set(f"bye/{self.place.rank}", "")
            except (RuntimeError, dist.DistError):
                return ExitCode.PREFLIGHT
            return code
        report = {entry["node"]: [Finding(**finding) for finding in entry["findings"]]
                  for entry in map(json.loads, answers.values())}  # fmt: skip
        report = compared(report, offsets, gpus=self.options.gpus > 0)
        code = exit_code(report, silent=self.place.nodes - len(answers))
        self._publish(report, code)
        if self.store is not None:
            self.store.set("verdict", str(int(code)))
            present = [f"bye/{rank}" for rank in answers if rank != 0]
            with contextlib.suppress(RuntimeError, dist.DistError):
                self.store.wait(present, timedelta(seconds=10))  # the store ends with this process
        return code

    def _publish(self, report: dict[str, list[Finding]], code: ExitCode) -> None:
        silent = self.place.nodes - len(report)
        print(table(report))
        if silent:
            print(f"{silent} nodes gave no answer within {_PATIENCE_SECONDS:.0f} s.")
        print(f"preflight: {'passed' if code == ExitCode.FINISHED else f'failed, exit code {int(code)} ({code.name})'}")
        if self.options.report is not None:
            content = {node: checks.as_dict(findings) for node, findings in report.items()}
            write_json_atomic(self.options.report / "preflight.json", content)
            bad = bad_nodes(report)
            if bad:
                write_text_atomic(self.options.report / "bad_nodes.txt", "".join(f"{node}\n" for node in bad))


# -- judgement --------------------------------------------------------------------------------------------------------


def compared(report: dict[str, list[Finding]], offsets: dict[str, float], *, gpus: bool) -> dict[str, list[Finding]]:
    """Add the comparisons between nodes: clocks, and rates of which one node's is far below the others'.

    CPUs are shared with whatever else a node does: there a slow one is only worth a warning.
    """
    units = {"matmul": "TFLOP/s", "all-reduce within nodes": "GiB/s", "all-reduce between nodes": "GiB/s"}
    tolerances = {"matmul": 0.1, "all-reduce within nodes": 0.1, "all-reduce between nodes": 0.3}
    result = {node: [item for item in findings if item.value is None or item.check not in units]
              for node, findings in report.items()}  # fmt: skip
    for check, unit in units.items():
        values = {node: item.value for node, findings in report.items() for item in findings
                  if item.check == check and item.value is not None}  # fmt: skip
        rated = checks.compare(check, unit, values, tolerance=tolerances[check], verdict="fail" if gpus else "warn")
        for node, finding in rated.items():
            result[node].append(finding)
    for node, finding in checks.clock(offsets).items():
        result[node].append(finding)
    return result


def exit_code(report: dict[str, list[Finding]], silent: int = 0) -> ExitCode:
    """The meaning of all findings together. A run's own fault is seen by every node that looks."""
    failed = {item.check for findings in report.values() for item in findings if item.status == "fail"}
    of_the_run = {check for check in failed if check in OF_THE_RUN and not _only_some(report, check)}
    if of_the_run:
        return ExitCode.CONFIGURATION
    return ExitCode.PREFLIGHT if failed or silent else ExitCode.FINISHED


def bad_nodes(report: dict[str, list[Finding]]) -> list[str]:
    """Nodes that failed a check which other nodes passed, or, in a run on one node, a check of the node itself."""
    of_one_node = ("gpus", "limits", "shared memory")
    found = []
    for node, findings in report.items():
        for item in findings:
            alone = len(report) == 1 and item.check in of_one_node
            if item.status == "fail" and (alone or _only_some(report, item.check)):
                found.append(node)
                break
    return found


def _only_some(report: dict[str, list[Finding]], check: str) -> bool:
    states = [item.status == "fail" for findings in report.values() for item in findings if item.check == check]
    return any(states) and not all(states)


def table(report: dict[str, list[Finding]]) -> str:
    """One row per check: its worst status, how many nodes passed, and what the others say."""
    order: dict[str, list[tuple[str, Finding]]] = {}
    for node, findings in report.items():
        for item in findings:
            order.setdefault(item.check, []).append((node, item))
    severity: dict[Status, int] = {"pass": 0, "warn": 1, "fail": 2}
    lines = [f"{'check':<26} {'result':<6} {'nodes':>7}  detail"]
    for check, entries in order.items():
        worst = max((item.status for _, item in entries), key=severity.__getitem__)
        passed = sum(item.status == "pass" for _, item in entries)
        if worst == "pass":
            details = [_summary([item for _, item in entries])]
        else:
            details = [f"{node}: {item.detail}" for node, item in entries if item.status != "pass"]
        shown = worst if worst == "pass" else worst.upper()
        lines.append(f"{check:<26} {shown:<6} {passed:>3}/{len(entries):<3}  {details[0]}")
        lines += [f"{'':<43}{detail}" for detail in details[1:10]]
        if len(details) > 10:
            lines.append(f"{'':<43}... and {len(details) - 10} more nodes")
    return "\n".join(lines)


def _summary(items: list[Finding]) -> str:
    values = [item.value for item in items if item.value is not None]
    if len(values) > 1:
        unit = items[0].detail.split(" ", 1)[-1]
        return f"{min(values):.3g} to {max(values):.3g} {unit}"
    return items[0].detail


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
