"""Images of text-to-image benchmarks in the folders that the official scorers read, and checks that nothing is amiss.

GenEval and DPG-Bench score with large models in environments of their own; megavar writes their input. Both scorers
silently ignore what they do not expect, so a missing or misnamed file changes a score without a word: hence
:meth:`OfficialFolder.check`. Prompt p, sample j is image ``p * per_prompt + j`` of an image set. The prompt files are
the user's copies of the official ones.
"""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from torch import Tensor

from megavar.errors import DataError
from megavar.evaluation.images import ImageSet
from megavar.storage import write_bytes_atomic, write_json_atomic

PER_PROMPT = 4
"""Images per prompt in both benchmarks."""
Progress = Callable[[int], Any]


class OfficialFolder(ABC):
    """The input of one benchmark's scorer."""

    name: ClassVar[str]
    usual: ClassVar[int]
    """Number of the official prompts."""

    def __init__(self, prompts: Path, per_prompt: int = PER_PROMPT) -> None:
        """Read the official ``prompts``.

        Raises:
            DataError: they are not there or are no prompts of this benchmark.
        """
        self.per_prompt = per_prompt
        self.prompts = self.read(Path(prompts))

    @staticmethod
    @abstractmethod
    def read(path: Path) -> Any:
        """The prompts in the order of the official files: plain JSON values with a length."""

    @abstractmethod
    def texts(self) -> tuple[str, ...]:
        """What to ask a generator for, in order."""

    @abstractmethod
    def write(self, root: Path, images: ImageSet, on_progress: Progress = lambda images: None) -> None:
        """Write ``images`` into ``root``; files that are there are kept.

        Raises:
            DataError: the number of images does not fit.
        """

    @abstractmethod
    def problems(self, root: Path) -> list[str]:
        """What the official scorer would stumble over or silently leave out; nothing if the folder is right."""

    def advice(self, images: ImageSet) -> list[str]:
        """What to know about running the official scorer on ``images``."""
        return []

    def emit(self, root: Path, images: ImageSet, *, on_progress: Progress = lambda images: None) -> list[str]:
        """Write ``images`` into ``root``, check the folder, and say what to note.

        Raises:
            DataError: number of images, prompts or content of ``root`` do not fit, or something is amiss afterwards.
        """
        described = {
            "suite": self.name,
            "prompts": len(self.prompts),
            "prompts_sha256": hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest(),
            "prompt_rewrite": "none",
            "per_prompt": self.per_prompt,
            "images": images.identity,
        }
        run_file = _claim(root, described)
        self.write(root, images, on_progress)
        return [*self.check(root), f"{run_file} says what these images are", *self.advice(images)]

    def check(self, root: Path) -> list[str]:
        """Check that the official scorer finds in ``root`` exactly what it should, and say what to note.

        Raises:
            DataError: with the first problems.
        """
        problems = self.problems(root)
        if problems:
            listed = "\n".join(problems[:20])
            raise DataError(f"{root} has {len(problems)} problems; repair or emit again:\n{listed}")
        count = len(self.prompts)
        unusual = [f"{count} prompts instead of the official {self.usual}"] if count != self.usual else []
        return [*unusual, f"{root}: {count} prompts, nothing amiss"]

    def require_count(self, images: ImageSet) -> None:
        """Refuse another number of images than the prompts ask for.

        Raises:
            DataError: with both numbers.
        """
        wanted = len(self.prompts) * self.per_prompt
        if len(images) != wanted:
            raise DataError(
                f"{len(self.prompts)} prompts with {self.per_prompt} samples each need {wanted} images, but "
                f"there are {len(images)}: sample with the same prompt file"
            )

    def images_of(self, prompt: int, images: ImageSet) -> Tensor:
        """The samples of prompt number ``prompt``: uint8 [per_prompt, 3, H, W]."""
        return images.read(prompt * self.per_prompt, (prompt + 1) * self.per_prompt)


def write_png(path: Path, image: Tensor) -> None:
    """Write uint8 [3, H, W] as a PNG file, atomically."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(buffer, "PNG")
    write_bytes_atomic(path, buffer.getvalue())


def image_problems(files: Iterable[Path], sizes: dict[tuple[int, int], Path]) -> list[str]:
    """Files that cannot be decoded or are not RGB; their (width, height) go into ``sizes`` with an example."""
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


def size_problems(sizes: dict[tuple[int, int], Path]) -> list[str]:
    """Images of several sizes, if there are."""
    if len(sizes) < 2:
        return []
    listed = ", ".join(f"{width}x{height} ({file})" for (width, height), file in sizes.items())
    return [f"images have different sizes: {listed}"]


def _claim(root: Path, content: dict[str, Any]) -> Path:
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
