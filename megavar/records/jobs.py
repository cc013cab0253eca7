"""Jobs of runs in Slurm's queue: their names, and what one call of squeue says."""

import hashlib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path


def job_name(run: str, run_directory: Path) -> str:
    """``<name of the run>-<hash of the absolute path>``: readable first, because listings cut names off; unique to the
    directory, because singleton dependencies and the cancelling of a chain go by it. Only characters that Slurm does
    not interpret.
    """
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", run)[:60]
    return f"{readable}-{hashlib.sha256(str(run_directory).encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class QueuedJob:
    """One job of this user."""

    number: str
    state: str
    """Slurm's: ``RUNNING``, ``PENDING``, ..."""
    nodes: str
    """Slurm's shorthand; empty while it waits."""
    reason: str
    """Why it waits, in Slurm's words."""

    @property
    def is_held(self) -> bool:
        """Whether a person must release it."""
        return self.state == "PENDING" and "Held" in self.reason


def queue() -> dict[str, list[QueuedJob]] | None:
    """This user's jobs by name, those that run first; None where there is no Slurm, or it does not answer."""
    command = ["squeue", "--noheader", f"--user={os.getuid()}", "--format=%i|%T|%N|%r|%j"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    jobs: dict[str, list[QueuedJob]] = {}
    for line in result.stdout.splitlines():
        fields = line.strip().split("|", 4)
        if len(fields) == 5:
            jobs.setdefault(fields[4], []).append(QueuedJob(*fields[:4]))
    for found in jobs.values():
        found.sort(key=lambda job: job.state != "RUNNING")
    return jobs
