"""Verify a folder of shards against its manifest, and repair what can be repaired.

    python -m tools.verify_shards shards/train               presence and sizes: seconds
    python -m tools.verify_shards shards/train --full        every byte, every image
    python -m tools.verify_shards shards/train --repair [--source imagenet/train]

Exit code 0: everything is as written. Otherwise each problem is one line on standard output.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megavar.data.shards.listing import list_originals
from megavar.data.shards.manifest import read_manifest
from megavar.data.shards.verification import repair_shards, verify_shards
from megavar.errors import ExitCode, MegavarError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(prog="verify_shards", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full", action="store_true", help="read everything: hashes, members, images, classes, keys")
    parser.add_argument("--repair", action="store_true", help="rebuild indexes, and with --source also shards")
    parser.add_argument("--source", type=Path, help="the originals that the shards were made from")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parsed = parser.parse_args(arguments)
    try:
        manifest = read_manifest(parsed.folder)
        if parsed.repair:
            source = None if parsed.source is None else list_originals(manifest.arguments["kind"], parsed.source)
            for line in repair_shards(parsed.folder, source=source):
                print(line)
        with tqdm(total=manifest.samples, unit=" images", desc="verifying", smoothing=0.05) as bar:
            problems = verify_shards(
                parsed.folder,
                full=parsed.full or parsed.repair,
                processes=parsed.processes,
                progress=bar.update,
            )
    except MegavarError as error:
        print(f"verify_shards: {error}", file=sys.stderr)
        return error.exit_code
    for problem in problems:
        print(problem)
    depth = "every byte" if parsed.full or parsed.repair else "presence and sizes"
    print(f"{manifest.samples} images in {len(manifest.shards)} shards checked ({depth}): {len(problems)} problems")
    return ExitCode.CONFIGURATION if problems else ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
