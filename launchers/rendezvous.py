"""Where the ranks of a job meet: an address every node can reach, and a port no other job uses.

Prints ``ADDRESS PORT`` for the batch script, which runs on the first node of the job. Runs on the host outside any
container: standard library only, Python 3.9 or newer.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping

from megavar.errors import ExitCode

FIRST_PORT, PORTS = 20000, 10000
"""Ports are taken from 20000 to 29999: below Linux's ephemeral range, which begins at 32768."""

OVERRIDE = "MEGAVAR_MASTER_ADDR"
"""Environment variable that names the address where neither name resolution nor Slurm knows it."""

Run = Callable[[list[str]], str]
"""Runs a command and returns its standard output, or an empty string where it fails or is absent."""


class RendezvousError(ValueError):
    """No address or port can be found."""


def run(command: list[str]) -> str:
    """Standard output of ``command``, or an empty string where it fails, is absent or takes more than 20 s."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def master_address(variables: Mapping[str, str], run_command: Run = run) -> str:
    """An IPv4 address of the job's first node: the override, else name resolution, else Slurm's NodeAddr.

    A loopback address of a job on several nodes is passed over (Debian lists the own host name as 127.0.1.1), unless
    Slurm itself knows the node under it.

    Raises:
        RendezvousError: all three failed.
    """
    override = variables.get(OVERRIDE, "").strip()
    if override:
        return override
    node_list = variables.get("SLURM_JOB_NODELIST", "")
    first = run_command(["scontrol", "show", "hostnames", node_list]).split()
    node = first[0] if first else node_list
    several = int(variables.get("SLURM_JOB_NUM_NODES", "").strip() or 1) > 1
    resolved = _resolve(node, run_command)
    if resolved and not (several and ipaddress.ip_address(resolved).is_loopback):
        return resolved
    match = re.search(r"NodeAddr=(\S+)", run_command(["scontrol", "show", "node", node]))
    node_address = match[1] if match else ""
    if _is_address(node_address):
        return node_address
    if node_address and node_address != node:
        resolved_address = _resolve(node_address, run_command)
        if resolved_address:
            return resolved_address
    raise RendezvousError(
        f"No address of the first node {node!r} is known. Tried: {OVERRIDE} is not set; `getent ahostsv4 {node}` gives "
        f"{resolved or 'nothing'}; `scontrol show node {node}` gives NodeAddr={node_address or 'nothing'}. Set "
        f"{OVERRIDE} under `environment` of the cluster file, or mend the name service."
    )


def _resolve(name: str, run_command: Run) -> str:
    words = run_command(["getent", "ahostsv4", name]).split()
    return words[0] if words and _is_address(words[0]) else ""


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def master_port(job: int) -> int:
    """The first free port of this machine from the one that belongs to ``job`` on.

    Jobs on the same node have different numbers, hence different ports; ``SLURM_JOB_ID`` is unique for array tasks too.

    Raises:
        RendezvousError: no port between 20000 and 29999 is free.
    """
    for offset in range(PORTS):
        port = FIRST_PORT + (job + offset) % PORTS
        if port_is_free(port):
            return port
    raise RendezvousError(f"No TCP port between {FIRST_PORT} and {FIRST_PORT + PORTS - 1} is free on this node.")


def port_is_free(port: int) -> bool:
    """Whether a server may listen on ``port`` of every interface of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError:
            return False
    return True


def main() -> int:
    """Print the address and port for the environment of a Slurm job."""
    try:
        job = os.environ.get("SLURM_JOB_ID", "").strip()
        if not job.isdecimal():
            raise RendezvousError(f"SLURM_JOB_ID={job!r}: this is no job of Slurm. Without one, use launchers.local.")
        print(master_address(os.environ), master_port(int(job)))
    except RendezvousError as error:
        print(error, file=sys.stderr)
        return ExitCode.PREFLIGHT
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
