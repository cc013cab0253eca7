"""What a run directory keeps so that the run can be understood and started again without the checkout.

``config.yaml``       the resolved configuration
``submit.sbatch``     the rendered batch script
``code/<hash>/``      a copy of the code, one for each version that was ever submitted
``code.json``         commit, branch, and whether the checkout differed from the commit
``code.patch``        that difference
``packages.txt``      versions of all installed packages
``environment.json``  allow-listed environment variables of the submitting shell
``submissions.jsonl`` one line for each submission
"""

import fnmatch
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megavar.config.loading import dump
from megavar.config.root import Config
from megavar.config.secret import looks_secret
from megavar.paths import found
from megavar.storage import append_line, write_json_atomic, write_text_atomic
from megavar.training.run_directory import RunDirectory

CODE_ROOT = Path(__file__).resolve().parents[1]
_CODE_FOLDERS = ("megavar", "launchers", "tools", "slurm", "configs")


def record(run_directory: Path, environment: Mapping[str, str]) -> None:
    """Write everything except the configuration, the script and the copy of the code."""
    write_json_atomic(run_directory / "code.json", git_state())
    write_text_atomic(run_directory / "code.patch", _git("diff", "HEAD", "--binary", strip=False))
    write_text_atomic(run_directory / "packages.txt", "".join(f"{line}\n" for line in installed_packages()))
    write_json_atomic(run_directory / "environment.json", dict(environment))


def git_state() -> dict[str, Any]:
    """Commit, branch and cleanliness of the checkout; ``commit`` is empty outside git."""
    return {
        "root": str(CODE_ROOT),
        "commit": _git("rev-parse", "HEAD"),
        "branch": _git("rev-parse", "--abbrev-ref", "HEAD"),
        "changed": _git("status", "--porcelain").splitlines(),
        "python": platform.python_version(),
        "host": platform.node(),
    }


def _git(*arguments: str, strip: bool = True) -> str:
    if "site-packages" in CODE_ROOT.parts:  # installed; a repository around it is another one
        return ""
    try:
        result = subprocess.run(["git", "-C", str(CODE_ROOT), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if result.returncode != 0:
        return ""
    return result.stdout.strip() if strip else result.stdout


def installed_packages() -> list[str]:
    """``name==version`` of every installed distribution, sorted."""
    distributions = importlib.metadata.distributions()
    return sorted({f"{item.metadata['Name']}=={item.version}" for item in distributions}, key=str.lower)


def allowed_environment(patterns: Iterable[str], variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables whose names match one of the shell ``patterns`` and do not look like secrets, sorted by name."""
    patterns = tuple(patterns)
    return {
        name: variables[name]
        for name in sorted(variables)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        and not looks_secret(name, variables[name])
    }


def copy_code(run_directory: Path) -> Path:
    """Copy the code to ``run_directory/code/<hash of its content>`` and return that folder; a copy is made once."""
    files = sorted(_code_files())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(CODE_ROOT)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    target = run_directory / "code" / digest.hexdigest()[:12]
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    for file in files:
        place = temporary / file.relative_to(CODE_ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    temporary.chmod(0o755)
    try:
        temporary.rename(target)
    except OSError:  # another submission of the same code was faster
        shutil.rmtree(temporary)
        assert target.is_dir(), target
    return target


def _code_files() -> Iterator[Path]:
    for folder in _CODE_FOLDERS:
        for file in (CODE_ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                yield file


def refer_to_copy(config: Config, code: Path) -> Config:
    """Let the files that ``config`` names and that were copied with the code be those of the copy."""

    def moved(path: str) -> str:
        absolute = found(path).absolute()
        inside = absolute.is_relative_to(CODE_ROOT) and code / absolute.relative_to(CODE_ROOT)
        return str(inside) if inside and inside.is_file() else path

    run = config.run.model_copy(update={"requires": tuple(moved(path) for path in config.run.requires)})
    return config.model_copy(update={"run": run, "deepspeed": moved(config.deepspeed)})


def write_config(run_directory: Path, config: Config) -> None:
    """Write ``config.yaml``.

    Raises:
        ConfigError: the directory belongs to a run with another configuration.
    """
    if (run_directory / "config.yaml").exists():
        RunDirectory.of(config, run_directory).check(config.model_dump(mode="json"))
    write_text_atomic(run_directory / "config.yaml", dump(config))


def note_submission(run_directory: Path, **facts: Any) -> None:
    """Append one line to ``submissions.jsonl``."""
    append_line(run_directory / "submissions.jsonl", json.dumps({"time": time.time(), **facts}))
