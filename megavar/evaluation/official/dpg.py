"""The folder that DPG-Bench's scorer reads. Source: TencentQQGYLab/ELLA ``dpg_bench/compute_dpg_bench.py``."""

from __future__ import annotations

from pathlib import Path

import torch

from megavar.errors import DataError
from megavar.evaluation.images import ImageSet
from megavar.evaluation.official.base import (
    PER_PROMPT,
    OfficialFolder,
    Progress,
    image_problems,
    size_problems,
    write_png,
)


class DPGFolder(OfficialFolder):
    """One 2x2 grid ``<root>/<item id>.png`` per prompt and nothing else."""

    name = "dpg"
    usual = 1065
    prompts: dict[str, str]

    @staticmethod
    def read(path: Path) -> dict[str, str]:
        """Read DPG-Bench's ``prompts/*.txt``: {item id: text}, ordered by id.

        Raises:
            DataError: there are none.
        """
        files = sorted(path.glob("*.txt"))
        if not files:
            raise DataError(f"{path} holds no .txt files: pass the official repository's dpg_bench/prompts")
        return {file.stem: file.read_text().strip() for file in files}

    def texts(self) -> tuple[str, ...]:
        """The texts."""
        return tuple(self.prompts.values())

    def write(self, root: Path, images: ImageSet, on_progress: Progress = lambda images: None) -> None:
        """A grid per prompt."""
        if self.per_prompt != PER_PROMPT:
            raise DataError(
                f"DPG-Bench scores the four quarters of one image per prompt, but {self.per_prompt} samples per "
                f"prompt were drawn: draw {PER_PROMPT}"
            )
        self.require_count(images)
        for number, item in enumerate(self.prompts):
            if not (root / f"{item}.png").exists():
                a, b, c, d = self.images_of(number, images)
                grid = torch.cat([torch.cat([a, b], dim=2), torch.cat([c, d], dim=2)], dim=1)
                write_png(root / f"{item}.png", grid)
            on_progress(self.per_prompt)

    def problems(self, root: Path) -> list[str]:
        """Grids that are missing, too many, of an odd size or unreadable."""
        if not root.is_dir():
            return [f"{root} does not exist"]
        present = {entry.name for entry in root.iterdir()}
        expected = {f"{item}.png" for item in self.prompts}
        problems = [f"{root / name} is missing" for name in sorted(expected - present)]
        problems += [
            f"{root / name} does not belong there: the scorer reads every file" for name in sorted(present - expected)
        ]
        sizes: dict[tuple[int, int], Path] = {}
        problems += image_problems([root / name for name in sorted(expected & present)], sizes)
        for (width, height), file in sizes.items():
            if width % 2 or height != width:
                problems.append(f"{file} is {width}x{height} instead of an even square (a grid of four)")
        return problems + size_problems(sizes)

    def advice(self, images: ImageSet) -> list[str]:
        """The official script takes one quarter unless told otherwise, and writes its results among the images."""
        side = images.read(0, 1).shape[-1]
        return [f"score with compute_dpg_bench.py --pic-num 4 --resolution {side} --res-path FILE_ELSEWHERE.txt"]
