"""Images of text-to-image benchmarks: write them as the official scorers read them, check them, score shapes.

    python -m tools.prompt_suites emit geneval --prompts evaluation_metadata.jsonl --images SAMPLES --out DIR
    python -m tools.prompt_suites verify geneval --prompts evaluation_metadata.jsonl --out DIR
    python -m tools.prompt_suites emit dpg --prompts dpg_bench/prompts --images SAMPLES --out DIR
    python -m tools.prompt_suites verify dpg --prompts dpg_bench/prompts --out DIR
    python -m tools.prompt_suites prompts shapes --image-size 32 --out evaluation_metadata.jsonl
    python -m tools.prompt_suites score shapes --images SAMPLES --out results.jsonl

Sample j of prompt p is image ``p * per_prompt + j`` of ``--images`` (a directory of ``megavar sample``, an npz or a
folder of PNG files). The official prompt files are not part of megavar: take them from djghosh13/geneval and
TencentQQGYLab/ELLA. Their scorers run in environments of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from megavar.data.shapes_grammar import evaluation_prompts
from megavar.evaluation import shape_eval
from megavar.evaluation.images import ImageSet, open_images
from megavar.evaluation.official.base import PER_PROMPT, OfficialFolder
from megavar.evaluation.official.dpg import DPGFolder
from megavar.evaluation.official.geneval import GenEvalFolder
from megavar.evaluation.table import format_table
from megavar.parallel.environment import environment
from megavar.paths import as_path
from megavar.storage import write_text_atomic
from tools.outcome import outcome

FOLDERS: dict[str, type[OfficialFolder]] = {folder.name: folder for folder in (GenEvalFolder, DPGFolder)}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = _parser().parse_args(arguments)
    return outcome("prompt_suites", lambda: options.run(options))


def emit(options: argparse.Namespace) -> None:
    """Write images in the layout of the official scorer."""
    images = _images(options)
    with tqdm(total=len(images), unit="image", disable=None) as bar:
        notes = _folder(options).emit(options.out, images, on_progress=bar.update)
    print("\n".join(notes))


def verify(options: argparse.Namespace) -> None:
    """Check that the official scorer finds exactly what it should."""
    print("\n".join(_folder(options).check(options.out)))


def prompts(options: argparse.Namespace) -> None:
    """Write the prompts of ShapeEval, one JSON object a line."""
    chosen = _shape_prompts(options, options.image_size)
    write_text_atomic(options.out, "".join(json.dumps(prompt.metadata()) + "\n" for prompt in chosen))
    print(f"wrote {options.out}: {len(chosen)} prompts")


def score(options: argparse.Namespace) -> None:
    """Score images of ShapeEval; the result file is read by GenEval's summary_scores.py as well."""
    images = _images(options)
    pixels = images.read(0, len(images))
    chosen = [prompt for prompt in _shape_prompts(options, pixels.shape[-1]) for _ in range(options.per_prompt)]
    records = shape_eval.score_scenes(pixels, chosen)
    shape_eval.write_records(options.out, records)
    print(format_table({"score": shape_eval.summarize(records)}, shape_eval.METRICS))
    print(f"wrote {options.out}")


def _folder(options: argparse.Namespace) -> OfficialFolder:
    return FOLDERS[options.suite](options.prompts, options.per_prompt)


def _images(options: argparse.Namespace) -> ImageSet:
    return open_images(options.images, _samples)


def _samples(directory: Path) -> ImageSet:
    from megavar.run_samples import stored_samples  # imports Megatron-core: not for npz files and folders

    return stored_samples(directory, environment().device)


def _shape_prompts(options: argparse.Namespace, image_size: int) -> list[shape_eval.Prompt]:
    return evaluation_prompts(image_size, per_tag=options.per_tag, held_out=not options.seen, seed=options.seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.prompt_suites",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run in (emit, verify, prompts, score):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.set_defaults(run=run)
        official = run in (emit, verify)
        command.add_argument("suite", choices=sorted(FOLDERS) if official else ["shapes"])
        command.add_argument("--out", type=as_path, required=True, help="folder of the layout, or file to write")
        if run in (emit, score):
            command.add_argument("--images", type=as_path, required=True, help="samples, npz, or folder of PNG files")
        if run is not prompts:
            command.add_argument("--per-prompt", type=int, default=PER_PROMPT, help="images per prompt")
        if official:
            command.add_argument("--prompts", type=as_path, required=True, help="the official prompt file or folder")
        else:
            command.add_argument("--per-tag", type=int, default=100, help="prompts of each of the six kinds")
            command.add_argument("--seen", action="store_true", help="combinations that training shows")
            command.add_argument("--seed", type=int, default=0, help="chooses the prompts")
        if run is prompts:
            command.add_argument("--image-size", type=int, choices=[32, 64], required=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
