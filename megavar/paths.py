"""Paths as people write them: with ``~`` and ``$VAR``, relative to the file that names them, or of files of ours."""

import argparse
import os
import re
from pathlib import Path

_LIBRARY = Path(__file__).resolve().parent
_SHIPPED = ("configs", "slurm")


def expanded(text: str) -> str:
    """``text`` with ``~``, ``~name``, ``$VAR`` and ``${VAR}`` replaced as a shell would.

    Raises:
        ValueError: there is no such variable or user; else a folder of that name would be created.
    """
    result = os.path.expandvars(text)
    if match := re.search(r"\$(?:\{[^}]*\}|\w+)", result):
        raise ValueError(f"{match[0]} in the path {text!r} is not set: export it, or write the path out")
    result = os.path.expanduser(result)  # noqa: PTH111  Path would drop "./" and "//"
    if result.startswith("~"):
        raise ValueError(f"there is no home directory of {result.split('/')[0]} for the path {text!r}: write it out")
    return result


def as_path(text: str) -> Path:
    """A path on a command line; shells leave ``--out=~/x`` and quoted ones as they are."""
    try:
        return Path(expanded(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def shipped(name: str) -> Path | None:
    """A file or folder that comes with megavar (``configs/...``, ``slurm/...``); None: this installation has none.

    It lies in the package where that was installed, beside it in a checkout and in a run's copy of the code.
    """
    folder, *inside = Path(name).parts or ("",)
    if folder not in _SHIPPED or ".." in inside:
        return None
    candidates = [root / name for root in (_LIBRARY, _LIBRARY.parent)]
    return next((path for path in candidates if path.exists()), None)


def found(path: Path | str) -> Path:
    """The file that ``path`` means: as it is, or of those that come with megavar where nothing lies there."""
    path = Path(path)
    return path if path.is_absolute() or path.exists() else shipped(str(path)) or path
