"""Verify a folder of shards against its manifest, and repair what can be repaired.

    python -m tools.verify_shards shards/train               presence and sizes: seconds
    python -m tools.verify_shards shards/train --full        every byte, every image
    python -m tools.verify_shards shards/train --repair [--source imagenet/train]

--repair rebuilds indexes from whole shards and, with --source (what --images, --list or --pairs of shard_images was),
makes shards again; then it verifies every byte. Exit code 0: everything is as written. Otherwise each problem is one
line on standard output.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from tqdm import tqdm

from megavar.data.shards.manifest import read_manifest
from megavar.data.shards.verification import list_sharded, repair_shards, verify_shards
from megavar.errors import ExitCode
from megavar.paths import as_path
from tools.outcome import outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="verify_shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=as_path, help="the folder of the shards")
    parser.add_argument("--full", action="store_true", help="read everything: hashes, members, images, classes, keys")
    parser.add_argument("--repair", action="store_true", help="rebuild indexes, and with --source also shards")
    parser.add_argument("--source", type=as_path, metavar="PATH", help="the originals that the shards were made from")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--processes", type=int, default=cores, metavar="N", help=f"default: the {cores} cores")
    parsed = parser.parse_args(arguments)
    if parsed.processes < 1:
        parser.error("--processes must be at least 1")
    if parsed.source is not None and not parsed.repair:
        parser.error("--source is used by --repair only")
    return outcome("verify_shards", lambda: _run(parsed))


def _run(arguments: argparse.Namespace) -> int:
    folder, processes = arguments.folder, arguments.processes
    manifest = read_manifest(folder)
    if arguments.repair:
        source = None if arguments.source is None else list_sharded(manifest, arguments.source)
        with tqdm(total=manifest.samples, unit=" images", desc="repairing", smoothing=0.05) as bar:
            done = repair_shards(folder, source=source, processes=processes, progress=bar.update)
        for line in done:
            print(line)
    full = arguments.full or arguments.repair
    with tqdm(total=manifest.samples, unit=" images", desc="verifying", smoothing=0.05) as bar:
        problems = verify_shards(folder, full=full, processes=processes, progress=bar.update)
    for problem in problems:
        print(problem)
    depth = "every byte" if full else "presence and sizes"
    print(f"{manifest.summary()}, checked ({depth}): {len(problems)} problems")
    return ExitCode.CONFIGURATION if problems else ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
