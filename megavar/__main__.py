"""``python -m megavar COMMAND ... [key=value ...]`` with the commands below; the same under torchrun and srun."""

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence

from megavar import __version__, logs
from megavar.errors import MegavarError

COMMANDS = {
    "init": "look at a folder of images and write the configuration of a run on them",
    "train": "train the run that CONFIG describes, or continue it",
    "sample": "draw images from a trained generator",
    "evaluate": "draw images if needed, and score them",
    "status": "one line per run: state, step, loss, speed, time left",
    "report": "one page with figures and tables of finished or running runs",
    "compare": "runs side by side: settings, losses at equal steps, scores, curves, samples",
    "fork": "begin a new run from a checkpoint of another, with other settings or classes",
    "plan": "predict memory, time and layouts before submitting",
    "analyze": "look at trained runs: expert loads, routing maps, features, convergence, times",
    "reproduce": "show a paper's table with costs and our values; submit, demonstrate or collect its rows",
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; only the chosen command's module is imported, for its options."""
    parser = argparse.ArgumentParser(prog="megavar", description="Trainer for visual autoregressive image generators.")
    parser.add_argument("--version", action="version", version=f"megavar {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, description in COMMANDS.items():
        command = commands.add_parser(name, help=description, description=description)
        subject: tuple[str, str] | None = ("CONFIG", "YAML file of the run, or the directory of one")
        if name in arguments[:1]:
            module = importlib.import_module(f"megavar.commands.{name}")
            module.add_arguments(command)
            subject = getattr(module, "SUBJECT", subject)
        if subject is not None:
            command.add_argument("config", metavar=subject[0], help=subject[1])
            command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optimizer.lr=3e-4")
    options, rest = parser.parse_known_args(arguments)
    if rest and not hasattr(options, "overrides"):
        parser.error(f"{rest[0]!r} is no option of megavar {options.command}")
    for word in rest:  # argparse does not let overrides follow options
        if word.startswith("-") or "=" not in word:
            parser.error(f"{word!r} is neither an option nor an override such as train.steps=100")
        options.overrides.append(word)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code (:class:`megavar.errors.ExitCode`)."""
    logs.silence_libraries()
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        return int(importlib.import_module(f"megavar.commands.{options.command}").run(options))
    except MegavarError as error:
        message = f"megavar {options.command}: error: {error}"
        print(message, file=sys.stderr, flush=True)
        logs.keep(message)
        return int(error.exit_code)
    except Exception:
        logs.keep(traceback.format_exc())
        raise


if __name__ == "__main__":
    sys.exit(main())
