"""FlexVAR: p(token maps | class) for any list of scales (arXiv:2502.20313; jiaosiyu1999/FlexVAR ``models/flexvar.py``).

What it changes in VAR's transformer: no embedding of the scale's number, and one learned map of positions, area-resized
to each scale. The head computes in float32 as VAR's does; the authors commented that out and follow autocast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.generators.flexvar import FlexVARConfig
from megavar.config.token_space import TokenSpace
from megavar.generators.inputs import ScaleInputs
from megavar.generators.scale_transformer import ScaleTransformer


class Embedding(nn.Module):
    """Class and token features to hidden states, with positions that fit any scale."""

    def __init__(self, choice: FlexVARConfig, space: TokenSpace, dtype: torch.dtype) -> None:
        super().__init__()
        width, side = choice.hidden_size, choice.position_side
        self.classes = nn.Embedding(choice.classes + 1, width, dtype=dtype)
        self.features = nn.Linear(space.channels, width, dtype=dtype)
        self.start_position = nn.Parameter(torch.empty(space.sides[0] ** 2, width, dtype=dtype))
        self.position = nn.Parameter(torch.empty(width, side, side, dtype=dtype))

    def forward(self, inputs: ScaleInputs, maps: dict[int, int]) -> tuple[Tensor, Tensor]:
        """Embed the rows of the maps that are present.

        Returns:
            hidden [B, rows, C] and condition [B, C].
        """
        condition = self.classes(inputs.labels)
        parts = []
        if 0 in maps:
            start = condition[:, None].expand(-1, maps[0] ** 2, -1)
            parts.append(start + self.start_position if inputs.start_position else start)
        if inputs.features is not None:
            parts.append(self.features(inputs.features.to(condition.dtype)))
        return torch.cat(parts, 1) + torch.cat([self.places(side) for side in maps.values()]), condition

    def places(self, side: int) -> Tensor:
        """Positions of a map of this side: [side^2, C]."""
        resized = F.interpolate(self.position.float()[None], size=(side, side), mode="area")
        return resized[0].flatten(1).T.to(self.position.dtype)


class FlexVAR(ScaleTransformer):
    """A stage of FlexVAR. Routers and their statistics call a scale by its side."""

    choice: FlexVARConfig

    @classmethod
    def kinds_of(cls, space: TokenSpace) -> int:
        """Sides up to the tokenizer's last one, and one kind for all larger ones."""
        return max(space.sides) + 1

    def kind_of(self, number: int, side: int) -> int:
        """Its side, from 0."""
        return min(side, self.kinds) - 1

    def build_embedding(self) -> nn.Module:
        """Positions by area resizing."""
        return Embedding(self.choice, self.space, self.config.params_dtype)

    def initial_value(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """VAR's, but for the map of positions."""
        if name == "embedding.position":
            value.copy_(sines(*value.shape[:2]))
        else:
            super().initial_value(name, value, generator)


def sines(channels: int, side: int) -> Tensor:
    """The initial map of positions, [C, side, side]: channel 2i holds sin(y w_i), channel 2i + 1 cos(x w_i).

    w_i = 10000^(-2i / C), with row y and column x.
    """
    rate = 10000 ** (-torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    angle = torch.arange(side, dtype=torch.float32) * rate[:, None]
    table = torch.empty(channels, side, side)
    table[0::2] = angle.sin()[:, :, None]
    table[1::2] = angle.cos()[: channels // 2, None, :]
    return table
