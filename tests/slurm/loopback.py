"""A real Slurm on one machine: one slurmctld and two slurmd on loopback, in a directory of its own.

Needs root (slurmd starts processes as the submitting user) and nothing else: no system service, no munge. Several
clusters may run side by side, because each has its own ports, files and configuration.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

NODES = ("n1", "n2")
KILL_WAIT_SECONDS = 5

_CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
FirstJobId={ports[0]}
KillWait={kill_wait}
SlurmdTimeout=20
InactiveLimit=0
MinJobAge=86400
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmdSpoolDir={directory}/spool-%n
StateSaveLocation={directory}/state
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=8000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
# cred_expire also is the time that a requeued job waits before it may start again; its default is two minutes.
# config_overrides lets the nodes promise more CPUs than the machine has.
# Job numbers differ between clusters on one machine: the port at which a job's ranks meet follows from its number.
# The names n1 and n2 do not resolve, which is what the master address must cope with.


def reason_to_skip() -> str | None:
    """Why no cluster can be started here, or None."""
    for program in ("slurmctld", "slurmd", "sbatch"):
        if shutil.which(program) is None:
            return f"{program} is not installed (apt-get install slurm-wlm)"
    return None if os.geteuid() == 0 else "slurmd must be started by root"


def _end_with_parent() -> None:
    set_signal_of_parents_death = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_signal_of_parents_death, signal.SIGTERM)


class LoopbackCluster:
    """Started on entering, stopped on leaving, together with everything that ran on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.configuration = directory / "slurm.conf"
        self._daemons: list[subprocess.Popen] = []

    @property
    def environment(self) -> dict[str, str]:
        """Environment in which Slurm's commands speak to this cluster, free of any surrounding job's variables."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return clean | {"SLURM_CONF": str(self.configuration)}

    def __enter__(self) -> "LoopbackCluster":
        for folder in ("state", *(f"spool-{node}" for node in NODES)):
            (self.directory / folder).mkdir(parents=True)
        for _ in range(3):  # another process may take a port between looking and listening
            self._write_configuration()
            self._start("slurmctld", "-D", "-c")
            for node in NODES:
                self.start_node(node)
            if self._wait_until_idle(20):
                return self
            self._stop_daemons()
        raise RuntimeError(f"Slurm did not start; see the logs in {self.directory}")

    def __exit__(self, *_: object) -> None:
        subprocess.run(["scancel", "--user=root", "--full"], env=self.environment, capture_output=True)
        self.wait(lambda: self.run("squeue", "--noheader") == "", KILL_WAIT_SECONDS + 5)
        self._stop_daemons()
        self._kill(f"SLURM_CONF={self.configuration}")

    def start_node(self, node: str) -> None:
        """Start the slurmd of ``node``."""
        self._start("slurmd", "-D", "-N", node, LOOPBACK_NODE=node)

    def fail_node(self, node: str) -> None:
        """Kill slurmd and everything that it has started, as a power cut would."""
        self._kill(f"LOOPBACK_NODE={node}", f"SLURMD_NODENAME={node}")  # slurmd and slurmstepd; batch scripts and tasks

    def run(self, *command: str, check: bool = True) -> str:
        """Standard output of one of Slurm's commands."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert not check or result.returncode == 0, f"{command}: {result.stderr}"
        return result.stdout.strip()

    def state(self, job: str) -> str:
        """Job state such as RUNNING, PENDING or COMPLETED."""
        text = self.run("scontrol", "show", "job", job)
        return text.split("JobState=")[1].split()[0]

    def wait(self, condition: "object", seconds: float) -> bool:
        """Poll ``condition`` until it holds; False if it did not within ``seconds``."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.1)
        return False

    def _write_configuration(self) -> None:
        probes = [socket.socket() for _ in range(3)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in probes]
        for probe in probes:
            probe.close()
        self.configuration.write_text(
            _CONFIGURATION.format(
                host=socket.gethostname().split(".")[0],
                ports=ports,
                directory=self.directory,
                kill_wait=KILL_WAIT_SECONDS,
            )
        )

    def _start(self, *command: str, **variables: str) -> None:
        with (self.directory / f"{command[0]}.out").open("a") as output:
            # should pytest be killed, the kernel ends them
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment | variables,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
            )

    def _wait_until_idle(self, seconds: float) -> bool:
        def idle() -> bool:
            states = self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()
            return states == ["idle"] * len(NODES)

        return self.wait(idle, seconds)

    def _stop_daemons(self) -> None:
        for daemon in self._daemons:
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def _kill(self, *marks: str) -> None:
        """Kill this cluster's processes that have one of the variables ``NAME=value``, those of the first mark first.

        At once, and not stopped before: nobody may live to tell the controller of another's death, and the kernel wakes
        stopped orphans with SIGHUP, at which srun cancels its step.
        """
        while processes := [pid for mark in marks for pid in self._processes(mark)]:
            for pid in processes:
                with contextlib.suppress(OSError):  # it has ended in between
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)  # look again: some may just have been started

    def _processes(self, mark: str) -> list[int]:
        wanted, found = {f"SLURM_CONF={self.configuration}".encode(), mark.encode()}, []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            pid = int(environment.parent.name)
            with contextlib.suppress(OSError):
                if pid != os.getpid() and wanted <= set(environment.read_bytes().split(b"\0")):
                    found.append(pid)
        return found
