"""What there is to look at while a run goes on: samples of a generator, or a tokenizer's reconstructions."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from megavar.assembly import Assembly, build_sampler
from megavar.config.recipes.base import GENERATOR_MODULE, TOKENIZER_MODULE
from megavar.config.root import Config
from megavar.data.build import build_source, build_transform, of_images
from megavar.data.pixels import to_float, to_uint8
from megavar.data.reading import stored_images
from megavar.data.source import Source
from megavar.errors import ConfigError
from megavar.pictures import labelled_grid, overview
from megavar.recipes.base import Recipe
from megavar.run_samples import default_conditions, settings_in_words, shown

ROWS, COLUMNS = 4, 10
CAPTIONED_COLUMNS = 5
"""Words below need room."""
Preview = Callable[[int], Image.Image | None]
"""The picture of a step on the first rank, None on the others."""


def preview(assembly: Assembly, recipe: Recipe, names: Sequence[str]) -> Preview | None:
    """Samples, always of the same conditions and seeds; or originals above their reconstructions; or nothing.

    Args:
        names: of the classes.
    """
    config = assembly.config
    if config.recipe.trains == "tokenizer":
        tokenizer: Any = recipe.modules()[TOKENIZER_MODULE]
        return functools.partial(_reconstructions, config, tokenizer, _images(config), assembly.device)
    if config.recipe.trains == "teacher":
        return None  # features are nothing to look at
    if assembly.topology.config.pipeline > 1:
        return None  # a pipeline stage cannot decode alone: sample from a checkpoint instead
    generator = recipe.modules()[GENERATOR_MODULE]
    # No graphs: in training, weights move (ZeRO-3), and memory is pinned while one would be recorded.
    sampling = config.sampling.model_copy(update={"cuda_graph": False})
    config = config.model_copy(update={"sampling": sampling})
    sampler = build_sampler(config, generator, assembly.tokenizer(), default_conditions(config), assembly.device)
    assert config.generator is not None
    indices, columns = _chosen(config.generator.condition == "text", config.generator.class_count)
    settings = settings_in_words(config.sampling.model_dump())

    def draw(step: int) -> Image.Image:
        drawn = sampler.draw(indices)
        images = [image.permute(1, 2, 0).numpy() for image in drawn.images]
        return overview(images, shown(drawn.arrays, names), columns, f"{config.run.name}, step {step}, {settings}")

    return draw


def _chosen(by_text: bool, classes: int | None) -> tuple[Tensor, int]:
    """Indices of samples, and how many of them are in a row: a class has a column, of many the first ten."""
    if by_text or classes is None:
        columns = CAPTIONED_COLUMNS if by_text else COLUMNS
        return torch.arange(ROWS * columns), columns
    columns = COLUMNS // classes * classes or COLUMNS
    if classes <= COLUMNS:
        return torch.arange(ROWS * columns), columns
    return (classes * torch.arange(ROWS)[:, None] + torch.arange(columns)).flatten(), columns


def _images(config: Config) -> Source:
    """Test images, or training images where there are none."""
    try:
        return build_source(config.data, "test")
    except ConfigError:  # no place of test images is configured
        return build_source(of_images(config.data))


@torch.no_grad()
def _reconstructions(config: Config, tokenizer: Any, source: Source, device: torch.device, step: int) -> Image.Image:
    """Rows of ten images, each above a row of their reconstructions."""
    count = min(ROWS * COLUMNS // 2, len(source))
    transform = build_transform(config.data, "test")
    spread = [index * len(source) // count for index in range(count)]  # over all classes, which mostly come in turn
    originals, _ = stored_images(source, transform, spread, config.data.damaged_samples)
    tokens = tokenizer.tokens(tokenizer.encode(to_float(originals).to(device)))
    reconstructed = to_uint8(tokenizer.decode(tokens)).cpu()
    rows = [
        [image.permute(1, 2, 0).numpy() for image in half]
        for pair in zip(originals.split(COLUMNS), reconstructed.split(COLUMNS)) for half in pair
    ]  # fmt: skip
    words = ["image", "decoded"] * (len(rows) // 2)
    return labelled_grid(rows, names=words, caption=f"{config.run.name}, step {step}")
