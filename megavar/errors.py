"""Errors meant for people, and the exit codes of every megavar process.

A ``MegavarError`` says in one paragraph what is wrong, where, and what to do. The command line prints it without a
traceback and leaves with its exit code; our own invariants use ``assert`` and keep their traceback.
"""

from collections.abc import Callable
from enum import IntEnum


class ExitCode(IntEnum):
    """What the end of a process means to a launcher, a batch script and an operator."""

    FINISHED = 0  # the run reached its last step (or had reached it before)
    FAILED = 1  # an unexpected exception, or a file system that fails: start it again, and read the log if that fails
    CONFIGURATION = 2  # configuration, data or checkpoint is wrong: restarting cannot help
    PREEMPTED = 85  # asked to stop, saved, stopped: start it again and it continues
    NON_FINITE = 86  # loss or gradient stayed non-finite after the allowed rollbacks, or the loss has diverged
    HANG = 87  # a step exceeded the watchdog's limit: stacks are in the logs, start it again
    PREFLIGHT = 90  # a node or the file system is not fit for the run
    NO_PROGRESS = 93  # several restarts without a new checkpoint: cancel the chain


class MegavarError(ValueError):
    """An error with a place and a remedy in its message."""

    exit_code: ExitCode = ExitCode.CONFIGURATION


class ConfigError(MegavarError):
    """A key or value of the configuration is wrong."""


def missing_package(package: str, what: str) -> ConfigError:
    """The error that says that ``what`` needs an optional package of the ``vlm`` extra, and how to get it."""
    return ConfigError(f"{what} needs the package {package}, which is not installed: pip install 'megavar[vlm]'.")


class DataError(MegavarError):
    """A data source is missing, empty or damaged."""


class CheckpointError(MegavarError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class DataAccessError(DataError):
    """Data could not be read just now, though they may be whole: a file system that fails."""

    exit_code = ExitCode.FAILED


class CheckpointAccessError(CheckpointError):
    """A checkpoint could not be written or read just now: the disk is full, or a file system fails."""

    exit_code = ExitCode.FAILED


class ClusterError(MegavarError):
    """The machine, process group or scheduler does not offer what the run needs."""

    exit_code = ExitCode.PREFLIGHT


class RunInUseError(ClusterError):
    """Another process trains this run."""


class NonFiniteError(MegavarError):
    """Loss or gradient norm is not finite and the configured recovery is used up, or the loss has diverged."""

    exit_code = ExitCode.NON_FINITE


def check_all(*checks: Callable[[], object]) -> None:
    """Run all checks and raise what they find as one error, so that a person mends everything at once.

    Raises:
        MegavarError: of the first failure's kind, with all messages.
    """
    found: list[MegavarError] = []
    for check in checks:
        try:
            check()
        except MegavarError as error:
            found.append(error)
    if found:
        raise type(found[0])(" ".join(dict.fromkeys(map(str, found)))) from found[0]
