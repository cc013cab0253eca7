"""What a person at the screen sees of a run, and ``console.log``, which keeps it over all attempts."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megavar import storage

FILE = "console.log"


class Console:
    """Of the first rank; of the others it says and keeps nothing."""

    def __init__(self, directory: Path, is_writer: bool = True) -> None:
        self._file, self._is_writer = directory / FILE, is_writer

    def say(self, text: str) -> None:
        """Show on standard error, above a progress bar if there is one, and keep."""
        if self._is_writer:
            tqdm.write(text, file=sys.stderr)
            self.keep(text)

    def keep(self, text: str) -> None:
        """Keep without showing. A full disk ends no run."""
        if self._is_writer:
            with contextlib.suppress(OSError):
                storage.append_line(self._file, text)


def card(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A title and aligned rows; a row without a name continues the one above."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows)])

