"""Slurm's own commands, and what to do when they fail."""

import re
import shutil
import subprocess

from megavar.errors import ClusterError

PATIENCE_SECONDS = 300.0
"""The commands themselves try for some minutes to reach the controller."""
_NO_ANSWER = re.compile(
    r"unable to (?:contact|connect|establish)|(?:cannot|could not) (?:contact|connect|establish|resolve)"
    r"|connection (?:refused|timed out|failure|reset)|connect failure|no route to host|timed out|zero bytes were"
    r"|(?:protocol )?authentication error|munge|communication|controller (?:is )?(?:down|not responding)"
    r"|standby mode|temporarily unable|failed to contact|name or service not known",
    re.IGNORECASE,
)
"""What Slurm says where its controller does not answer (slurm_errno.c, and the socket layer below it)."""
_UNREACHABLE = (
    "Slurm's controller does not answer; the run and the cluster file are not to blame. `scontrol ping` says whether "
    "it is up, `squeue --me` then whether anything was queued: try again when it answers, or from a login node."
)
_REMEDIES = {"sbatch": "Check the partition, account and limits in the cluster file."}


def run_slurm(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands.

    Raises:
        ClusterError: it is not installed, fails, or gets no answer; with what it said and the remedy.
    """
    if shutil.which(command[0]) is None:
        raise ClusterError(
            f"{command[0]} is not on the PATH: submit from a login node of the cluster, or look at the "
            f"script with --dry-run."
        )
    shown = f"`{' '.join(command)}`"
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{shown} gave no answer in {PATIENCE_SECONDS:.0f} s. {_UNREACHABLE}") from None
    if result.returncode != 0:
        said = " ".join((result.stderr.strip() or result.stdout.strip()).split()).rstrip(".")
        remedy = _UNREACHABLE if _NO_ANSWER.search(said) else _REMEDIES.get(command[0], "")
        raise ClusterError(f"{shown} failed: {said or f'exit code {result.returncode}'}. {remedy}".rstrip())
    return result
