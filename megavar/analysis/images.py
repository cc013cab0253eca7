"""Images that analyses show to networks."""

from torch import Tensor

from megavar.config.root import Config
from megavar.data.build import build_source, build_transform, of_images
from megavar.data.reading import stored_images
from megavar.data.source import Split


def first_images(config: Config, count: int, split: Split = "test") -> tuple[Tensor, Tensor]:
    """uint8 [N, 3, H, W] and their classes, int64 [N], from the first on, without augmentation; at most as many as
    there are.
    """
    source = build_source(of_images(config.data), split)
    transform = build_transform(config.data, "test")
    return stored_images(source, transform, range(min(count, len(source))), config.data.damaged_samples)
