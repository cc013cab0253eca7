"""Images of text-to-image benchmarks in the folders that the official scorers read, and checks that nothing is amiss.

GenEval and DPG-Bench score with large models in environments of their own; megavar writes their input. Both scorers
silently ignore what they do not expect, so a missing or misnamed file changes a score without a word: hence ``verify``.
Prompt p, sample j is image ``p * per_prompt + j`` of an image set. The prompt files are the user's copies of the
official ones.

Sources: djghosh13/geneval ``evaluation/evaluate_images.py``; TencentQQGYLab/ELLA ``dpg_bench/compute_dpg_bench.py``.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megavar.errors import DataError
from megavar.evaluation.images import ImageSet
from megavar.storage import write_bytes_atomic, write_json_atomic, write_text_atomic

GENEVAL_PROMPTS = 553
DPG_PROMPTS = 1065
PER_PROMPT = 4
Suite = Literal["geneval", "dpg"]
Progress = Callable[[int], Any]


def read_geneval_prompts(path: Path) -> list[dict[str, Any]]:
    """Read GenEval's ``evaluation_metadata.jsonl``.

    Raises:
        DataError: the file is absent, a line is no prompt, or two prompts have equal metadata (the official summary
            tells prompts apart by it).
    """
    try:
        lines = [line for line in Path(path).read_text().splitlines() if line.strip()]
        prompts = [json.loads(line) for line in lines]
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as GenEval prompts ({error}): pass the official repository's "
            f"prompts/evaluation_metadata.jsonl"
        ) from error
    if not prompts:
        raise DataError(f"{path} holds no prompts: pass the official repository's prompts/evaluation_metadata.jsonl")
    seen: dict[str, int] = {}
    for number, (prompt, line) in enumerate(zip(prompts, lines)):
        if not isinstance(prompt, dict) or not {"tag", "prompt", "include"} <= prompt.keys():
            raise DataError(
                f"line {number + 1} of {path} is no GenEval prompt (it needs tag, prompt and include): {line[:80]}"
            )
        key = json.dumps(prompt)
        if key in seen:
            raise DataError(f"lines {seen[key] + 1} and {number + 1} of {path} are the same prompt: remove one")
        seen[key] = number
    return prompts


def read_dpg_prompts(folder: Path) -> dict[str, str]:
    """Read DPG-Bench's ``prompts/*.txt``: {item id: text}, ordered by id."""
    files = sorted(Path(folder).glob("*.txt"))
    if not files:
        raise DataError(f"{folder} holds no .txt files: pass the official repository's dpg_bench/prompts")
    return {file.stem: file.read_text().strip() for file in files}


def read_prompts(suite: Suite, prompts: Path) -> list[dict[str, Any]] | dict[str, str]:
    """The official prompts in index order; see :func:`read_geneval_prompts` and :func:`read_dpg_prompts`."""
    return read_geneval_prompts(prompts) if suite == "geneval" else read_dpg_prompts(prompts)


def emit(
    suite: Suite,
    root: Path,
    prompts: Path,
    images: ImageSet,
    *,
    per_prompt: int = PER_PROMPT,
    on_progress: Progress = lambda images: None,
) -> list[str]:
    """Write ``images`` into ``root`` as the official scorer of ``suite`` reads them, check them, and say what to note.

    Raises:
        DataError: number of images, prompts or content of ``root`` do not fit, or something is amiss afterwards.
    """
    found = read_prompts(suite, prompts)
    described = {
        "suite": suite,
        "prompts": len(found),
        "prompts_sha256": hashlib.sha256(json.dumps(found).encode()).hexdigest(),
        "prompt_rewrite": "none",
        "per_prompt": per_prompt,
        "images": images.identity,
    }
    run_file = claim(root, described)
    if isinstance(found, list):
        emit_geneval(root, found, images, per_prompt=per_prompt, on_progress=on_progress)
    else:
        emit_dpg(root, found, images, per_prompt=per_prompt, on_progress=on_progress)
    notes = [*check(suite, root, prompts, per_prompt=per_prompt), f"{run_file} says what these images are"]
    if suite == "dpg":
        # The official script takes one quarter unless told otherwise, and writes its results among the images.
        side = images.read(0, 1).shape[-1]
        notes.append(f"score with compute_dpg_bench.py --pic-num 4 --resolution {side} --res-path FILE_ELSEWHERE.txt")
    return notes


def check(suite: Suite, root: Path, prompts: Path, *, per_prompt: int = PER_PROMPT) -> list[str]:
    """Check that the official scorer of ``suite`` finds in ``root`` exactly what it should, and say what to note.

    Raises:
        DataError: with the first problems.
    """
    found = read_prompts(suite, prompts)
    if isinstance(found, list):
        usual, problems = GENEVAL_PROMPTS, verify_geneval(root, found, per_prompt=per_prompt)
    else:
        usual, problems = DPG_PROMPTS, verify_dpg(root, found)
    if problems:
        listed = "\n".join(problems[:20])
        raise DataError(f"{root} has {len(problems)} problems; repair or emit again:\n{listed}")
    unusual = [f"{len(found)} prompts instead of the official {usual}"] if len(found) != usual else []
    return [*unusual, f"{root}: {len(found)} prompts, nothing amiss"]


def claim(root: Path, content: dict[str, Any]) -> Path:
    """Write ``content``, which says what the images in ``root`` are, to ``<root>.run.json``: beside what is scored.

    Emission keeps files that are there, so those of other images must not be.

    Raises:
        DataError: ``root`` holds images of something else, or of something unknown.
    """
    path = root.with_name(root.name + ".run.json")
    remedy = "Emit into another folder, or delete both to start again."
    if not root.is_dir() or not any(root.iterdir()):
        write_json_atomic(path, content)
        return path
    try:
        there = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{root} is not empty, and no {path} says what it holds. {remedy}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not readable ({error}). {remedy}") from error
    if there != json.loads(json.dumps(content)):
        raise DataError(f"{root} holds other images, as {path} says. {remedy}")
    return path


def emit_geneval(
    root: Path,
    prompts: list[dict[str, Any]],
    images: ImageSet,
    *,
    per_prompt: int = PER_PROMPT,
    on_progress: Progress = lambda images: None,
) -> None:
    """Write ``<root>/<prompt>/metadata.jsonl`` and ``<root>/<prompt>/samples/<sample>.png``; present files are kept."""
    _check_count(images, len(prompts), per_prompt)
    for number, prompt in enumerate(prompts):
        folder = root / f"{number:05d}"
        write_text_atomic(folder / "metadata.jsonl", json.dumps(prompt) + "\n")
        files = [folder / "samples" / f"{sample:05d}.png" for sample in range(per_prompt)]
        if not all(file.exists() for file in files):
            for file, image in zip(files, images.read(number * per_prompt, (number + 1) * per_prompt)):
                write_png(file, image)
        on_progress(per_prompt)


def emit_dpg(
    root: Path,
    prompts: dict[str, str],
    images: ImageSet,
    *,
    per_prompt: int = PER_PROMPT,
    on_progress: Progress = lambda images: None,
) -> None:
    """Write one 2x2 grid ``<root>/<item id>.png`` per prompt and nothing else; present files are kept."""
    if per_prompt != PER_PROMPT:
        raise DataError(
            f"DPG-Bench scores the four quarters of one image per prompt, but {per_prompt} samples per "
            f"prompt were drawn: draw {PER_PROMPT}"
        )
    _check_count(images, len(prompts), per_prompt)
    for number, item in enumerate(prompts):
        if not (root / f"{item}.png").exists():
            a, b, c, d = images.read(number * per_prompt, (number + 1) * per_prompt)
            grid = torch.cat([torch.cat([a, b], dim=2), torch.cat([c, d], dim=2)], dim=1)
            write_png(root / f"{item}.png", grid)
        on_progress(per_prompt)


def verify_geneval(root: Path, prompts: list[dict[str, Any]], *, per_prompt: int = PER_PROMPT) -> list[str]:
    """What the official scorer would stumble over or silently leave out; nothing if the folder is right."""
    if not root.is_dir():
        return [f"{root} does not exist"]
    expected = {f"{number:05d}": prompt for number, prompt in enumerate(prompts)}
    present = {entry.name for entry in root.iterdir() if entry.is_dir() and entry.name.isdigit()}
    problems = [f"{root / name} is missing" for name in sorted(expected.keys() - present)]
    problems += [
        f"{root / name} belongs to no prompt but would be scored" for name in sorted(present - expected.keys())
    ]
    sizes: dict[tuple[int, int], Path] = {}
    for name in sorted(expected.keys() & present):
        folder = root / name
        problems += _metadata_problems(folder / "metadata.jsonl", expected[name])
        samples = sorted((folder / "samples").glob("*")) if (folder / "samples").is_dir() else []
        files = [file for file in samples if file.suffix == ".png" and file.stem.isdigit()]
        problems += [f"{file} would be ignored: name samples <number>.png" for file in samples if file not in files]
        if len(files) != per_prompt:
            problems.append(f"{folder / 'samples'} holds {len(files)} samples instead of {per_prompt}")
        problems += _image_problems(files, sizes)
    return problems + _size_problems(sizes)


def verify_dpg(root: Path, prompts: dict[str, str], *, side: int | None = None) -> list[str]:
    """What the official scorer would stumble over or silently leave out; ``side`` is that of one of the four images."""
    if not root.is_dir():
        return [f"{root} does not exist"]
    present = {entry.name for entry in root.iterdir()}
    expected = {f"{item}.png" for item in prompts}
    problems = [f"{root / name} is missing" for name in sorted(expected - present)]
    problems += [
        f"{root / name} does not belong there: the scorer reads every file" for name in sorted(present - expected)
    ]
    sizes: dict[tuple[int, int], Path] = {}
    problems += _image_problems([root / name for name in sorted(expected & present)], sizes)
    for (width, height), file in sizes.items():
        if width % 2 or height != width or (side is not None and width != 2 * side):
            wanted = f"{2 * side}x{2 * side}" if side is not None else "an even square"
            problems.append(f"{file} is {width}x{height} instead of {wanted} (a grid of four)")
    return problems + _size_problems(sizes)


def write_png(path: Path, image: Tensor) -> None:
    """Write uint8 [3, H, W] as a PNG file, atomically."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(buffer, "PNG")
    write_bytes_atomic(path, buffer.getvalue())


def _check_count(images: ImageSet, prompts: int, per_prompt: int) -> None:
    if len(images) != prompts * per_prompt:
        raise DataError(
            f"{prompts} prompts with {per_prompt} samples each need {prompts * per_prompt} images, but "
            f"there are {len(images)}: sample with the same prompt file"
        )


def _metadata_problems(path: Path, prompt: dict[str, Any]) -> list[str]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return [f"{path} is missing"]
    except json.JSONDecodeError as error:
        return [f"{path} is not one JSON object ({error})"]
    return [] if content == prompt else [f"{path} is the metadata of another prompt"]


def _image_problems(files: Iterable[Path], sizes: dict[tuple[int, int], Path]) -> list[str]:
    problems = []
    for file in files:
        try:
            with Image.open(file) as image:
                image.load()
                if image.mode != "RGB":
                    problems.append(f"{file} is {image.mode} instead of RGB")
                sizes.setdefault(image.size, file)
        except (OSError, SyntaxError, ValueError) as error:
            problems.append(f"{file} cannot be decoded ({error})")
    return problems


def _size_problems(sizes: dict[tuple[int, int], Path]) -> list[str]:
    if len(sizes) < 2:
        return []
    listed = ", ".join(f"{width}x{height} ({file})" for (width, height), file in sizes.items())
    return [f"images have different sizes: {listed}"]
