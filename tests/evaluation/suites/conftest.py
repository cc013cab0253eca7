"""Data and images that several suites are tested with."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from megavar.chunks import ChunkStore
from megavar.config.data import DataConfig, PhotographsSource
from megavar.config.shapes import ShapesSource
from megavar.data.build import build_source
from megavar.sampling.samples import Samples

PHOTOGRAPHS = DataConfig(source=PhotographsSource(length=400, test_length=60, short_side=64), image_size=16)
SHAPES = DataConfig(source=ShapesSource(length=100, test_length=40), image_size=32)
CLASS_SHAPES = DataConfig(source=ShapesSource(conditioning="class"), image_size=32)


def real_images(data, split="test"):
    source = build_source(data, split)
    samples = [source.read(index) for index in range(len(source))]
    images = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2)
    return images, torch.tensor([sample.label for sample in samples])


@pytest.fixture
def as_chunks(tmp_path) -> Callable[..., Samples]:
    """Images, and labels if there are any, as ``megavar sample`` leaves them."""

    def store(images, labels=None):
        chunks = ChunkStore.open(tmp_path / "chunks", count=len(images), size=32, identity={})
        for chunk in chunks.missing():
            rows = slice(*chunks.range(chunk))
            known = {} if labels is None else {"labels": labels[rows].numpy()}
            chunks.write(chunk, {"images": images[rows].numpy(), **known})
        return Samples.stored(chunks.directory)

    return store
