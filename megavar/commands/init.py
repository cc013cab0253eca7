"""``megavar init --images DIR``: look at a folder of images and write the configuration of a run on them."""

import argparse
import re
from pathlib import Path

from megavar.data.survey import Survey, survey
from megavar.errors import ConfigError, ExitCode
from megavar.paths import as_path
from megavar.starting import GENERATOR_FILE, SIZES, TOKENIZER_FILE, Start
from megavar.storage import write_text_atomic

SUBJECT = None
NAMED = 6
"""Classes that are named on the screen."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to look at and where to write."""
    parser.add_argument("--images", type=as_path, required=True, metavar="DIR", help="folder with one folder per class")
    parser.add_argument("--name", help="of the run and its files (default: the folder's)")
    parser.add_argument("--size", type=int, choices=SIZES, help="side in pixels of the images that are learned")
    parser.add_argument("--held-out", type=float, default=0.1, metavar="SHARE", help="never trained on (default: 0.1)")
    parser.add_argument("--out", type=as_path, default=Path(), metavar="DIR", help="where to write (default: here)")
    parser.add_argument("--overwrite", action="store_true", help="replace files of an earlier init")


def run(options: argparse.Namespace) -> ExitCode:
    """Entry point of the command."""
    if not 0 < options.held_out < 1:
        raise ConfigError(f"--held-out {options.held_out} is no share: give a number between 0 and 1, such as 0.1.")
    found = survey(options.images, options.held_out)
    name = options.name or re.sub(r"[^A-Za-z0-9._-]+", "-", found.root.name).strip("-._") or "images"
    start = Start.fitting(found, name=name, size=options.size, held_out=options.held_out)
    texts = {TOKENIZER_FILE.format(name=name): start.tokenizer(), GENERATOR_FILE.format(name=name): start.generator()}
    paths = {options.out / file: text for file, text in texts.items()}
    existing = [path for path in paths if path.exists()]
    if existing and not options.overwrite:
        raise ConfigError(f"{existing[0]} exists. Give another --name or --out, or --overwrite it.")
    options.out.mkdir(parents=True, exist_ok=True)
    for path, text in paths.items():
        write_text_atomic(path, text)
    print(describe(found, start, list(paths)), flush=True)
    return ExitCode.FINISHED


def describe(found: Survey, start: Start, paths: list[Path]) -> str:
    """What was found, what was chosen, and what to do next."""
    named = [f"{name} {count}" for name, count in found.classes.items()]
    classes = ", ".join(named[:NAMED]) + (f" and {len(named) - NAMED} more" if len(named) > NAMED else "")
    count = f"{len(named)} classes" if len(named) > 1 else "1 class"
    rows = [
        ("images", f"{found.count:,} in {count}: {classes}"),
        ("sizes", f"{found.smallest[0]} x {found.smallest[1]} to {found.largest[0]} x {found.largest[1]} pixels"),
        ("held out", f"{found.held_out:,} images, never trained on: for {start.held_out_for}"),
        ("learned as", f"{start.size} x {start.size} pixels, cropped and mirrored by chance, {start.tokens} tokens"),
        ("scored by", start.scored_by),
    ]
    rows += [("note", note) for note in (*found.notes, *start.notes)]
    tokenizer, generator = paths
    rows += [
        ("wrote", f"{tokenizer}   images to tokens and back"),
        ("", f"{generator}   draws images; trains the other one first"),
        ("next", f"python -m megavar train {generator}"),
    ]
    return "\n".join([str(found.root), *(f"  {key:<11} {text}" for key, text in rows)])
