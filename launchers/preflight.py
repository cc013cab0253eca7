"""Checks everything that can be known before step 1, on every node: ``python -m launchers.preflight CONFIG``.

The batch script runs one process per node under srun; by hand it checks this machine. The processes meet in a TCP store
at MASTER_ADDR:MASTER_PORT, which the ranks will use next. Every check has a time limit. The first process prints one
table and leaves with

* 0 if nothing failed (warnings do not count),
* ``ExitCode.CONFIGURATION`` if the run itself is wrong: starting again cannot help,
* ``ExitCode.PREFLIGHT`` if a node or the file system is: ``bad_nodes.txt`` in ``--report`` names nodes to replace.

The others leave with the same code, or with 0 where they lose the first one: it notices that, and srun would end it
before it has spoken if another process left with an error.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from launchers import checks, rates
from launchers.checks import Finding, guarded
from launchers.judgement import add_silent_nodes, bad_nodes, compared, exit_code, matmul, table
from launchers.progress import newest_checkpoint_step
from launchers.rendezvous import port_is_free
from megavar import logs
from megavar.config.loading import load_config
from megavar.config.root import Config
from megavar.errors import ClusterError, ConfigError, ExitCode
from megavar.paths import as_path
from megavar.storage import write_json_atomic, write_text_atomic

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
    nodes: Sequence[str] = ()
    """Names of all nodes in the order of their processes, for those that give no answer."""


@dataclass(frozen=True)
class Place:
    """This process among those of all nodes."""

    rank: int
    nodes: int
    name: str
    master: str
    port: int

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> "Place":
        """One process per node under srun, or alone (also in ``srun -n1``).

        Raises:
            ClusterError: several processes do not know where they meet.
        """
        variables = {name: value for name, value in variables.items() if value.strip()}  # an empty one is an unset one
        name = variables.get("SLURMD_NODENAME") or socket.gethostname()
        step = "SLURM_STEP_ID" in variables
        numbers = {key: _number(variables, key, default) for key, default in (("SLURM_NTASKS", 1), ("SLURM_PROCID", 0))}
        if not step or numbers["SLURM_NTASKS"] == 1:
            return cls(0, 1, name, "127.0.0.1", 0)
        if missing := [key for key in ("MASTER_ADDR", "MASTER_PORT") if key not in variables]:
            raise ClusterError(
                f"{' and '.join(missing)} not set, so {numbers['SLURM_NTASKS']} processes do not know where to meet. "
                f"Set them on the first node, as the batch script does: read -r MASTER_ADDR MASTER_PORT < "
                f"<(python -m launchers.rendezvous); export MASTER_ADDR MASTER_PORT; or start one process."
            )
        port = _number(variables, "MASTER_PORT", 0)
        return cls(numbers["SLURM_PROCID"], numbers["SLURM_NTASKS"], name, variables["MASTER_ADDR"], port)


def _number(variables: Mapping[str, str], name: str, default: int) -> int:
    text = variables.get(name, str(default)).strip()
    if not text.isdecimal():
        raise ClusterError(f"{name}={text!r} is not a number. Start with srun, or from a clean shell.")
    return int(text)


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m launchers.preflight", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("--gpus", type=int, help="GPUs per node; default: those of this machine")
    parser.add_argument("--world-size", type=int, help="ranks of the run; default: one per GPU, or one")
    parser.add_argument("--signal-lead-seconds", type=float, help="time between the signal and the end of the job")
    parser.add_argument("--report", type=as_path, help="folder for preflight.json and bad_nodes.txt")
    parser.add_argument("--nodes", default="", help="names of all nodes, separated by commas")
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
        nodes=given.nodes.split(",") if given.nodes else (),
    )
    try:
        place = Place.from_environment()
    except ClusterError as error:
        print(f"preflight: {error}", file=sys.stderr)
        return error.exit_code
    code = Preflight(options, place).run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a check that hangs must not keep the process


class Preflight:
    """One process's part in the checks of all nodes."""

    def __init__(self, options: Options, place: Place) -> None:
        self.options, self.place = options, place
        self.findings: list[Finding] = []
        self.store: dist.Store | None = None
        self._silent: set[int] = set()
        """Processes that once gave no answer: nobody waits for them again."""

    def run(self) -> ExitCode:
        """Check, compare, and return the exit code."""
        try:
            return self._run()
        except (RuntimeError, dist.DistError) as error:  # of the store, which ends with the first process
            if self.place.nodes == 1:
                raise
            print(f"{self.place.name} has lost {self.place.master}:{self.place.port}: {error}", file=sys.stderr)
            return ExitCode.FINISHED if self.place.rank else ExitCode.PREFLIGHT

    def _run(self) -> ExitCode:
        place = self.place
        config = self._configuration()
        if place.nodes > 1 and not self._meet():
            return ExitCode.PREFLIGHT
        self._node(config)
        readable = self._gather("configuration", str(int(config is not None)))
        if config is not None and set(readable.values()) == {"1"}:
            self._files(config)
        devices = self._gather("devices", next(item.status for item in self.findings if item.check == "gpus"))
        if "fail" not in devices.values() and len(devices) == place.nodes:
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
            self.findings.append(Finding("configuration", "fail", str(error), of_the_run=True))
            return None
        if self.place.rank == 0:
            self._check(
                "configuration", lambda: checks.configuration(config, self.options.world_size), 4 * _CHECK_SECONDS
            )
        return config

    def _meet(self) -> bool:
        """Open the store on the first node; the port must be free there."""
        place = self.place
        if place.rank == 0 and not port_is_free(place.port):
            self.findings.append(Finding("port", "fail", f"port {place.port} is taken on {place.name}"))
            print(table({place.name: self.findings}))
            return False
        self.store = dist.TCPStore(place.master, place.port, place.nodes, place.rank == 0, wait_for_workers=False,
                                   timeout=timedelta(seconds=_PATIENCE_SECONDS))  # fmt: skip
        if place.rank == 0:
            self.findings.append(Finding("port", "pass", f"{place.master}:{place.port}"))
        return True

    def _node(self, config: Config | None) -> None:
        self._check("host names", lambda: checks.host_names(self.place.master))
        self._check("limits", lambda: checks.limits(self.options.gpus))
        workers = config.data.workers * max(self.options.world_size // self.place.nodes, 1) if config else 0
        self._check("shared memory", lambda: checks.shared_memory(workers))
        self._check("gpus", lambda: checks.gpus(self.options.gpus))
        if config is not None and self.place.rank == 0:
            self._check("settings", lambda: checks.settings(config, self.options.gpus))

    def _files(self, config: Config) -> None:
        directory = Path(config.run.path).absolute()
        self._check("data", lambda: checks.data(config, self.options.world_size), 4 * _CHECK_SECONDS)
        self._check("weights", lambda: checks.weights(config, directory))
        if self.place.rank == 0:
            self._check("evaluation", lambda: checks.evaluation(config), 4 * _CHECK_SECONDS)
        if newest_checkpoint_step(directory) >= 0:  # it had them when it began: now the file system lacks them
            files = ("data", "weights", "evaluation")
            self.findings = [replace(item, of_the_run=item.of_the_run and item.check not in files)
                             for item in self.findings]  # fmt: skip
        folder = directory / ".preflight"
        self._visibility(folder)
        self._wait("bandwidth")  # all nodes write at the same time, as in a save
        rate = guarded("write", 4 * _CHECK_SECONDS, lambda: Finding("write", "pass", "", checks.write_rate(
            folder, self.place.name, self.options.bandwidth_bytes)))  # fmt: skip
        if rate.value is None:
            self.findings.append(Finding("save bandwidth", "fail", rate.detail))
        total = sum(float(text) for text in self._gather("rate", str(rate.value or 0.0)).values())
        if self.place.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            size = functools.cache(lambda: checks.checkpoint_bytes(config, directory))
            self._check("space", lambda: checks.free_space(directory, size(), len(checks.manifests_in(directory))))
            if total > 0:
                lead = self.options.lead_seconds
                self._check("save bandwidth", lambda: checks.save_time(directory, size(), total, lead))

    def _visibility(self, folder: Path) -> None:
        """Every node writes a file, and every node looks for those of all others."""
        name = self.place.name
        mark = guarded("run directory", _CHECK_SECONDS, lambda: checks.write_mark(folder, name))
        written = [other for other in self._gather("mark", name if mark.status == "pass" else "").values() if other]
        missing = written
        if mark.status == "pass":
            look = guarded("run directory", _CHECK_SECONDS,
                           lambda: json.dumps(checks.read_marks(folder, written, 30.0)))  # fmt: skip
            missing = json.loads(look.detail) if look.status == "pass" else written
        unseen = dict(json.loads(text) for text in self._gather("unseen", json.dumps([name, missing])).values())
        self.findings.append(mark if mark.status == "fail" else checks.visibility(name, unseen, folder.parent))

    def _speed(self) -> None:
        gpus = self.options.gpus
        self._check("matmul", lambda: matmul([rate / 1e12 for rate in rates.matmul_rates(gpus)]))
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

    def _gather(self, what: str, text: str) -> dict[int, str]:
        """What every node says about ``what``; a node that does not answer in time is left out."""
        if self.store is None:
            return {0: text}
        self.store.set(f"{what}/{self.place.rank}", text)
        answers, end = {}, time.monotonic() + _PATIENCE_SECONDS
        for rank in range(self.place.nodes):
            patience = 0.1 if rank in self._silent else max(0.1, end - time.monotonic())
            try:
                self.store.wait([f"{what}/{rank}"], timedelta(seconds=patience))
                answers[rank] = self.store.get(f"{what}/{rank}").decode()
            except (RuntimeError, dist.DistError):
                self._silent.add(rank)
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
            try:
                self.store.wait([f"time/{rank}"], timedelta(seconds=_CHECK_SECONDS))
            except (RuntimeError, dist.DistError):
                continue
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
            self.store.wait(["verdict"], timedelta(seconds=_PATIENCE_SECONDS))
            code = ExitCode(int(self.store.get("verdict")))
            self.store.set(f"bye/{self.place.rank}", "")
            return code
        report = {entry["node"]: [Finding(**finding) for finding in entry["findings"]]
                  for entry in map(json.loads, answers.values())}  # fmt: skip
        report = compared(report, offsets, gpus=self.options.gpus > 0)
        add_silent_nodes(report, self._names(answers))
        code = exit_code(report)
        self._publish(report, code)
        if self.store is not None:
            self.store.set("verdict", str(int(code)))
            present = [f"bye/{rank}" for rank in answers if rank != 0]
            with contextlib.suppress(RuntimeError, dist.DistError):
                self.store.wait(present, timedelta(seconds=10))  # the store ends with this process
        return code

    def _names(self, answers: dict[int, str]) -> list[str]:
        """All nodes: as they call themselves, or as we were told, or else by number."""
        told = [*self.options.nodes, *(f"node {rank}" for rank in range(len(self.options.nodes), self.place.nodes))]
        return [json.loads(answers[rank])["node"] if rank in answers else told[rank]
                for rank in range(self.place.nodes)]  # fmt: skip

    def _publish(self, report: dict[str, list[Finding]], code: ExitCode) -> None:
        print(table(report))
        print(f"preflight: {'passed' if code == ExitCode.FINISHED else f'failed, exit code {int(code)} ({code.name})'}")
        if self.options.report is not None:
            content = {node: checks.as_dict(findings) for node, findings in report.items()}
            write_json_atomic(self.options.report / "preflight.json", content)
            bad = [node for node in bad_nodes(report) if " " not in node]  # those that have a name
            if bad:
                write_text_atomic(self.options.report / "bad_nodes.txt", "".join(f"{node}\n" for node in bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
