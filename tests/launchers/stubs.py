"""Small real programs in place of Slurm's commands: each appends its arguments, one JSON list a line, to a file."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_STUB = """\
#!{python}
import json, os, sys
name = os.path.basename(sys.argv[0])
with open({calls!r}, "a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
answer = {answers!r}.get(name, "")
if name == "srun":
    arguments = sys.argv[1:]
    command = arguments[next(i for i, word in enumerate(arguments) if not word.startswith("-")):]
    os.environ.update(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_STEP_ID="0")
    os.execvp(command[0], command)
if isinstance(answer, list):  # one answer for each call; the last one stays
    with open({calls!r}) as file:
        number = sum(json.loads(line)[0] == name for line in file) - 1
    answer = answer[min(number, len(answer) - 1)]
print(answer)
"""


OF_A_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
"""What torchrun leaves in a shell that is a rank: a submission from there passes it on."""


class Stubs:
    """A folder to put in front of PATH, and the calls that were made to the programs in it."""

    def __init__(self, folder: Path, **answers: str | list[str]) -> None:
        self.folder = folder
        self.calls_file = folder / "calls.jsonl"
        folder.mkdir()
        for name in ("srun", "scontrol", "scancel", "sbatch", "squeue"):
            program = folder / name
            program.write_text(_STUB.format(python=sys.executable, calls=str(self.calls_file), answers=answers))
            program.chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        """Argument lists of the calls of program ``name``."""
        if not self.calls_file.exists():
            return []
        calls = [json.loads(line) for line in self.calls_file.read_text().splitlines()]
        return [call[1:] for call in calls if call[0] == name]

    def run(self, script: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a rendered batch script as slurmd would, in a clean environment."""
        return subprocess.run(
            ["bash", str(script)], capture_output=True, text=True, timeout=60, env=self.environment(variables)
        )

    def environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        """The environment of a batch script of job 4711 on one node."""
        return {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NAME": "megavar-test",
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_JOB_NUM_NODES": "1",
            **variables,
        }
