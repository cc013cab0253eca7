"""Log lines of every process: UTC time, rank, step, level, message.

``2026-08-22T12:34:56.789Z rank=3 step=1200 INFO message``; launchers.doctor reads them.
"""

import contextlib
import logging
import sys
import time
import warnings
from pathlib import Path

from megavar import storage

_step: int | None = None


def set_step(step: int | None) -> None:
    """Name the training step in the lines that follow."""
    global _step
    _step = step


class _Formatter(logging.Formatter):
    converter = staticmethod(time.gmtime)  # type: ignore[assignment]

    def __init__(self, rank: int) -> None:
        super().__init__(datefmt="%Y-%m-%dT%H:%M:%S")
        self.rank = rank

    def formatMessage(self, record: logging.LogRecord) -> str:
        moment = f"{self.formatTime(record, self.datefmt)}.{int(record.msecs):03d}Z"
        step = "-" if _step is None else _step
        return f"{moment} rank={self.rank} step={step} {record.levelname} {record.getMessage()}"

    def format(self, record: logging.LogRecord) -> str:
        """One line, followed by the traceback if there is one."""
        line = self.formatMessage(record)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def silence_libraries() -> None:
    """Keep back what libraries say on import about things we do not use (Transformer Engine, CUDA on a CPU machine)."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", module=r"torch\.")
    for name in ("torch.utils.cpp_extension", "megatron", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def configure(rank: int, directory: Path | None = None) -> None:
    """Send megavar's log to standard error and, if a directory is given, to ``rank-<rank>.log`` in it.

    Rank 0 reports progress on standard error, the others only warnings; files hold everything. Other libraries speak
    from warnings on.
    """
    stream = logging.StreamHandler(sys.stderr)
    stream.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    handlers: list[logging.Handler] = [stream]
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"rank-{rank:04d}.log"
        storage.drop_link(path)
        handlers.append(logging.FileHandler(path))
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        handler.setFormatter(_Formatter(rank))
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("megavar").setLevel(logging.INFO)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)


def keep(text: str) -> None:
    """Add to this process's file, if it has one and it can be written, what standard error alone would get."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            with contextlib.suppress(OSError), Path(handler.baseFilename).open("a") as file:
                file.write(text.rstrip() + "\n")
