"""The folder that GenEval's scorer reads. Source: djghosh13/geneval ``evaluation/evaluate_images.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megavar.errors import DataError
from megavar.evaluation.images import ImageSet
from megavar.evaluation.official.base import OfficialFolder, Progress, image_problems, size_problems, write_png
from megavar.storage import write_text_atomic


class GenEvalFolder(OfficialFolder):
    """``<root>/<prompt>/metadata.jsonl`` and ``<root>/<prompt>/samples/<sample>.png``."""

    name = "geneval"
    usual = 553
    prompts: list[dict[str, Any]]

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """Read GenEval's ``evaluation_metadata.jsonl``.

        Raises:
            DataError: the file is absent, a line is no prompt, or two prompts have equal metadata (the official summary
                tells prompts apart by it).
        """
        try:
            lines = [line for line in path.read_text().splitlines() if line.strip()]
            prompts = [json.loads(line) for line in lines]
        except (OSError, json.JSONDecodeError) as error:
            raise DataError(
                f"{path} cannot be read as GenEval prompts ({error}): pass the official repository's "
                f"prompts/evaluation_metadata.jsonl"
            ) from error
        if not prompts:
            raise DataError(
                f"{path} holds no prompts: pass the official repository's prompts/evaluation_metadata.jsonl"
            )
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

    def texts(self) -> tuple[str, ...]:
        """The captions."""
        return tuple(prompt["prompt"] for prompt in self.prompts)

    def write(self, root: Path, images: ImageSet, on_progress: Progress = lambda images: None) -> None:
        """A folder per prompt."""
        self.require_count(images)
        for number, prompt in enumerate(self.prompts):
            folder = root / f"{number:05d}"
            write_text_atomic(folder / "metadata.jsonl", json.dumps(prompt) + "\n")
            files = [folder / "samples" / f"{sample:05d}.png" for sample in range(self.per_prompt)]
            if not all(file.exists() for file in files):
                for file, image in zip(files, self.images_of(number, images)):
                    write_png(file, image)
            on_progress(self.per_prompt)

    def problems(self, root: Path) -> list[str]:
        """Folders, metadata and samples that are missing, too many, misnamed or unreadable."""
        if not root.is_dir():
            return [f"{root} does not exist"]
        expected = {f"{number:05d}": prompt for number, prompt in enumerate(self.prompts)}
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
            if len(files) != self.per_prompt:
                problems.append(f"{folder / 'samples'} holds {len(files)} samples instead of {self.per_prompt}")
            problems += image_problems(files, sizes)
        return problems + size_problems(sizes)


def _metadata_problems(path: Path, prompt: dict[str, Any]) -> list[str]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return [f"{path} is missing"]
    except json.JSONDecodeError as error:
        return [f"{path} is not one JSON object ({error})"]
    return [] if content == prompt else [f"{path} is the metadata of another prompt"]
