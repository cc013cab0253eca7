"""What a teacher is to all others: images to features.

To add one, write a module (``nn.Module``) with this method and a ``TeacherChoice`` that names it and its published
weight layouts.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Teacher(Protocol):
    """A frozen network. It sees the images that the tokenizer sees: one augmentation serves both."""

    def features(self, images: Tensor) -> Tensor:
        """Images, float32 [B, 3, H, W] in [-1, 1] of any size, to features, float32 [B, N, D], row by row.

        It resizes and normalizes them itself. N is ``grid`` squared and D ``width`` of its choice.
        """
        ...
