"""Turn a folder of images into WebDataset shards.

    python -m tools.shard_images --images imagenet/train --out shards/train       a sub-folder of images per class
    python -m tools.shard_images --list train.txt --out shards/train              'image label' lines
    python -m tools.shard_images --pairs captioned --out shards/captioned         name.jpg and name.txt, or a list
    python -m tools.shard_images --existing shards-of-another-tool                index and manifest for tars

The bytes of the images are copied, after each was decoded once to see that it is whole. Interrupt it whenever you like,
by whatever means: the same command continues, and the result is the same bytes. The format is described in
megavar/data/shards/__init__.py; tools/verify_shards.py verifies and repairs.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megavar.data.image_folder import describe_ignored
from megavar.data.shards.listing import Kind, list_originals
from megavar.data.shards.manifest import Manifest
from megavar.data.shards.verification import adopt_shards
from megavar.data.shards.writing import Plan, write_shards
from megavar.errors import ExitCode
from megavar.paths import as_path
from tools.outcome import outcome


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="shard_images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=as_path, metavar="DIR", help="a folder with a sub-folder of images per class")
    source.add_argument("--list", type=as_path, metavar="FILE", help="a text file of 'image label' lines")
    source.add_argument(
        "--pairs", type=as_path, metavar="PATH",
        help="a folder of name.jpg + name.txt (or .json), or a .jsonl or .json of image, caption",
    )  # fmt: skip
    source.add_argument(
        "--existing", type=as_path, metavar="DIR", help="WebDataset tars of another tool: add indexes and a manifest"
    )
    parser.add_argument(
        "--captions", choices=["txt", "json"], default="txt",
        help="with --existing: the member of a sample that holds its caption (default: txt)",
    )  # fmt: skip
    parser.add_argument("--out", type=as_path, metavar="DIR", help="folder for the shards")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shards", type=int, metavar="N", help="number of shards")
    size.add_argument("--samples-per-shard", type=int, default=1250, metavar="N", help="at most (default: 1250)")
    parser.add_argument("--seed", type=int, default=0, help="of the global permutation (default: 0)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--processes", type=int, default=cores, metavar="N", help=f"default: the {cores} cores")
    parser.add_argument(
        "--part", default="0/1", metavar="I/N", help="make only part I (from 0) of N; for several machines"
    )
    parser.add_argument(
        "--damaged", choices=["fail", "leave-out"], default="fail", help="what to do with images that do not decode"
    )
    parsed = parser.parse_args(arguments)
    part, _, parts = parsed.part.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        parser.error(f"--part {parsed.part}: give I/N with I from 0 to N-1, for example 0/4")
    parsed.part = int(part), int(parts)
    if (parsed.existing is None) == (parsed.out is None):
        parser.error("give --out, the folder for the shards; only --existing stays where it is")
    if parsed.existing is None and parsed.captions != "txt":
        parser.error("--captions says how tars of another tool hold captions: give --existing")
    if min(parsed.processes, parsed.samples_per_shard, 1 if parsed.shards is None else parsed.shards) < 1:
        parser.error("--processes, --samples-per-shard and --shards must be at least 1")
    return parsed


def make_shards(arguments: argparse.Namespace) -> Manifest | None:
    """List the originals and write their shards."""
    kinds: list[tuple[Kind, Path | None]] = [
        ("class_folders", arguments.images),
        ("list", arguments.list),
        ("pairs", arguments.pairs),
    ]
    kind, path = next((kind, path) for kind, path in kinds if path is not None)
    listing = list_originals(kind, path, arguments.damaged)
    count = len(listing.originals)
    shards = min(count, arguments.shards or math.ceil(count / arguments.samples_per_shard))
    plan = Plan(listing, shards, arguments.seed, arguments.damaged)
    if listing.ignored:
        print(f"Beside the {count} images there are, and are ignored: {describe_ignored(listing.ignored)}")
    own = sum(len(plan.places(shard)) for shard in range(arguments.part[0], shards, arguments.part[1]))
    with tqdm(total=own, unit=" images", desc="sharding", smoothing=0.05) as bar:
        return write_shards(
            plan, arguments.out, processes=arguments.processes, part=arguments.part, progress=bar.update
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parsed = parse_arguments(arguments)
    return outcome("shard_images", lambda: _run(parsed))


def _run(arguments: argparse.Namespace) -> int:
    if arguments.existing is not None:
        with tqdm(unit=" shards", desc="indexing") as bar:
            manifest: Manifest | None = adopt_shards(
                arguments.existing,
                captions=arguments.captions,
                processes=arguments.processes,
                progress=bar.update,
            )
    else:
        manifest = make_shards(arguments)
    if manifest is None:
        print("This part is finished; the manifest is written when the other parts are.")
        return ExitCode.FINISHED
    left_out = sum(len(shard.left_out) for shard in manifest.shards)
    print(manifest.summary() + (f"; {left_out} damaged originals left out (see the manifest)" if left_out else ""))
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
