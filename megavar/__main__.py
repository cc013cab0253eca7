"""``python -m megavar train | sample | evaluate | plan CONFIG [key=value ...]``; the same under torchrun and srun."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from megavar.errors import ExitCode, MegavarError

COMMANDS = {
    "train": "train the run that CONFIG describes, or continue it",
    "sample": "draw images from a trained generator",
    "evaluate": "draw images if needed, and score them",
    "plan": "predict memory, time and layouts before submitting",
}


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    result = argparse.ArgumentParser(prog="megavar", description="Trainer for visual autoregressive image generators.")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, description in COMMANDS.items():
        command = commands.add_parser(name, help=description, description=description)
        command.add_argument("config", help="YAML file of the run")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optimizer.lr=3e-4")
        importlib.import_module(f"megavar.commands.{name}").add_arguments(command)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code (:class:`megavar.errors.ExitCode`)."""
    options = parser().parse_intermixed_args(arguments) if arguments is not None else _parse(sys.argv[1:])
    command = importlib.import_module(f"megavar.commands.{options.command}")
    try:
        return int(command.run(options))
    except MegavarError as error:
        print(f"megavar {options.command}: error: {error}", file=sys.stderr, flush=True)
        return int(error.exit_code)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    return parser().parse_args(arguments)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.exit(code if code != ExitCode.FINISHED else 0)
