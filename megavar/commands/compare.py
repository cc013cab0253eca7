"""``megavar compare RUN RUN ...``: what differs between runs, and what came of it."""

import argparse
import json

from megavar.errors import ConfigError, ExitCode
from megavar.paths import as_path

SUBJECT = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs, and where pictures go."""
    parser.add_argument("runs", nargs="+", type=as_path, metavar="RUN", help="run directories, two or more")
    parser.add_argument("--out", type=as_path, help="folder of the pictures (default: compare/ of the first run)")
    parser.add_argument("--json", action="store_true", help="print values for programs")


def run(options: argparse.Namespace) -> ExitCode:
    """Entry point of the command.

    Raises:
        ConfigError: there is nothing to compare with.
        DataError: a directory is no run.
    """
    from megavar.reporting.compare import compared, in_words, write
    from megavar.reporting.facts import RunFacts

    if len(options.runs) < 2:
        raise ConfigError(f"Name at least one more run to compare {options.runs[0]} with.")
    runs = RunFacts.read(options.runs)
    paths = write(runs, options.out or runs[0].path / "compare")
    if options.json:
        print(json.dumps(compared(runs), indent=2))
        return ExitCode.FINISHED
    print(in_words(runs))
    print("\n" + "\n".join(map(str, paths)))
    return ExitCode.FINISHED
