"""A few real digits for recipe tests."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from megavar.config.tokenizers.multiscale_vq import MultiScaleVQConfig
from megavar.data.batch import Batch

TOKENIZER = MultiScaleVQConfig(scales=(1, 2, 4), vocabulary_size=32, code_dimension=8, base_channels=8, norm_groups=4,
                               channel_multipliers=(1, 2, 2), residual_blocks=1, refinement_count=3)  # fmt: skip


def digit_images(start: int, count: int) -> Tensor:
    """float32 [count, 3, 16, 16] in [-1, 1]."""
    digits = torch.from_numpy(load_digits().images[start : start + count]).float() / 8 - 1
    return digits[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3).repeat(1, 3, 1, 1)


def digit_batch(start: int, count: int) -> Batch:
    """The same as a batch whose sample ids are the positions in the data set."""
    ids = torch.arange(start, start + count)
    return Batch(digit_images(start, count), torch.zeros_like(ids), ids, torch.zeros_like(ids))
