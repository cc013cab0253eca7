"""Tells a command of the operator what happens to a run: the ``notify`` section of the cluster file.

The section travels in the variable ``MEGAVAR_NOTIFY`` as JSON, ``{"command": ["mail-it"], "on": ["failed", "disk"]}``,
so that the trainer and the batch script find it alike. The command gets one JSON object on standard input: ``run``,
``directory``, ``kind``, ``message``, ``time`` (unix seconds), ``host``, ``job`` and, from a trainer, ``step``.

Batch scripts use it on the host: standard library only, Python 3.9 or newer.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

VARIABLE = "MEGAVAR_NOTIFY"
PATIENCE = 30.0
"""Seconds that a command may take."""
HURRY = 5.0
"""The same where the next attempt waits for it: Slurm kills batch scripts that linger after a signal."""

ALERTS = (
    "loss_above_uniform", "loss_spike", "gradient_norm", "expert_collapse", "throughput_drop", "stalled_data",
    "stalled_step", "disk", "not_finite", "rolled_back", "diverged",
)  # fmt: skip
"""What a trainer tells of."""
ENDS = ("finished", "preempted", "failed", "stopped")
"""How an attempt ended: done; saved, and goes on; failed, and starts again; and will not go on by itself."""


def notify(run: str, directory: str, kind: str, message: str, *, patience: float = PATIENCE, **facts: Any) -> bool:
    """Run the operator's command, if there is one for this ``kind``, for at most ``patience`` seconds. Never raises.

    Returns:
        Whether a command ran and succeeded.
    """
    try:
        section = json.loads(os.environ.get(VARIABLE) or "{}")
        command, wanted = section.get("command"), section.get("on", ())
    except (ValueError, AttributeError) as error:
        print(f"{VARIABLE} cannot be read: {error}", file=sys.stderr)
        return False
    if not command or kind not in wanted:
        return False
    told = {
        "run": run, "directory": directory, "kind": kind, "message": message, "time": round(time.time(), 3),
        "host": socket.gethostname(), "job": os.environ.get("SLURM_JOB_ID", ""), **facts,
    }  # fmt: skip
    try:
        result = subprocess.run(
            command, input=json.dumps(told) + "\n", text=True, capture_output=True, timeout=patience
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"notify: {command[0]} does not run: {error}", file=sys.stderr)
        return False
    if result.returncode:
        print(f"notify: {command[0]} left with {result.returncode}: {result.stderr.strip()[-300:]}", file=sys.stderr)
    return result.returncode == 0
