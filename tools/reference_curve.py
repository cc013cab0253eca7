"""A reference curve of runs that differ in their seed: ``python -m tools.reference_curve RUN RUN --out FILE``.

The band says what a healthy run looks like: ``validation.reference: FILE`` lets ``megavar status`` compare with it.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megavar.errors import DataError, ExitCode, MegavarError
from megavar.paths import as_path
from megavar.records.curves import Curve
from megavar.records.reading import json_lines
from megavar.records.run import RunRecord
from megavar.reporting.facts import flatten
from megavar.storage import write_text_atomic
from megavar.training.run_directory import decides


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.reference_curve", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=as_path, metavar="RUN", help="finished runs of one configuration")
    parser.add_argument("--out", type=as_path, required=True, metavar="FILE", help="JSON file to write")
    given = parser.parse_args(arguments)
    try:
        curve = band(given.runs)
    except MegavarError as error:
        print(f"reference_curve: error: {error}", file=sys.stderr)
        return error.exit_code
    write_text_atomic(given.out, curve.text())
    seeds = ", ".join(map(str, curve.seeds))
    print(f"{given.out}: {curve.metric} of {curve.name}, {len(curve.steps)} steps, seeds {seeds}")
    return ExitCode.FINISHED


def band(runs: Sequence[Path]) -> Curve:
    """Of runs that are finished and differ in nothing but seed, name and place.

    Raises:
        DataError: a run is not finished, or they differ in more, or two have the same seed.
    """
    points: dict[int, dict[int, float]] = {}
    records = [RunRecord.read(path) for path in runs]
    for record in records:
        seed = int(record.config["train"]["seed"])
        if not record.done:
            raise DataError(f"{record.path} is not finished: let it train to its end first.")
        if seed in points:
            raise DataError(f"{record.path} has the seed {seed} of another one: give runs of different train.seed.")
        ours, theirs = _without_seed(record), _without_seed(records[0])
        if differing := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
            raise DataError(
                f"{record.path} and {records[0].path} differ in more than their seed: {', '.join(differing)}."
            )
        points[seed] = dict(record.validation_points)
    starts = json_lines(records[0].path / "attempts.jsonl")
    commit = str(starts[0].get("commit", ""))[:10] if starts else ""
    made = f"{len(records)} runs, {time.strftime('%d %B %Y')}" + (f", commit {commit}" if commit else "")
    return Curve.of(records[0].name, "validation/loss", points, made)


def _without_seed(record: RunRecord) -> dict[str, object]:
    """What decides the curve, wherever the run, its data and its weights lie."""
    return {
        key: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for key, value in flatten(record.config).items()
        if key != "train.seed" and (key == "validation.samples" or decides(key))
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
