"""``megavar fork RUN NEW [--step N] [key=value ...]``: go on from a checkpoint with other settings or classes."""

import argparse

from megavar.errors import ConfigError, ExitCode
from megavar.paths import as_path

SUBJECT = None
MANY = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From where, to where, with what."""
    parser.add_argument("parent", type=as_path, metavar="RUN", help="directory of the run to go on from")
    parser.add_argument("directory", type=as_path, metavar="NEW", help="directory of the new run")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=20000 optimizer.lr=1e-4")


def run(options: argparse.Namespace) -> ExitCode:
    """Entry point of the command."""
    from megavar.forking import fork

    if not (options.parent / "config.yaml").is_file():
        raise ConfigError(f"{options.parent} is no run: it has no config.yaml. Give a run directory (runs/NAME).")
    made = fork(options.parent, options.directory, options.overrides, options.step)
    print(f"{made.directory} goes on from step {made.step} of {made.parent}")
    if made.continues:
        print("  kept     weights, optimizer, averages, step, place in the data")
    else:
        print("  kept     weights of everything but the classes" + _listed(", and of classes", made.kept))
        for word, names, what in (("new", made.new, 'begin as "no class"'), ("dropped", made.dropped, "")):
            if names:
                print(f"  {word:<8} {_listed('classes', names)}{f' ({what})' if what else ''}")
    for key, (before, now) in made.differences.items():
        print(f"  changed  {key}: {before} -> {now}")
    for sentence in made.also:
        print(f"  note     {sentence}")
    print(f"  next     python -m megavar train {made.directory}", flush=True)
    return ExitCode.FINISHED


def _listed(what: str, names: tuple[str, ...]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    return f"{what} {', '.join(names[:MANY])}{more}"
