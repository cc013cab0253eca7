"""VAR: p(token maps | class) by next-scale prediction (VAR section 3.2, ``models/var.py``), dense or with experts.

What it adds to :class:`~megavar.generators.scale_transformer.ScaleTransformer`: an embedding of the scale's number and
a position of its own for every token of the tokenizer's scales.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.generators.var import VARConfig
from megavar.config.token_space import TokenSpace
from megavar.errors import ConfigError
from megavar.generators.inputs import ScaleInputs
from megavar.generators.scale_transformer import ScaleTransformer
from megavar.transformer.sequence import SequenceLayout


class Embedding(nn.Module):
    """Class and token features to hidden states, with positions and scales."""

    def __init__(self, choice: VARConfig, space: TokenSpace, dtype: torch.dtype) -> None:
        super().__init__()
        width, first = choice.hidden_size, space.sides[0] ** 2
        self.starts = [sum(side * side for side in space.sides[:number]) for number in range(len(space.sides))]
        self.classes = nn.Embedding(choice.classes + 1, width, dtype=dtype)
        self.features = nn.Linear(space.channels, width, dtype=dtype)
        self.start_position = nn.Parameter(torch.empty(first, width, dtype=dtype))
        self.position = nn.Parameter(torch.empty(space.length, width, dtype=dtype))
        self.scale = nn.Parameter(torch.empty(len(space.sides), width, dtype=dtype))

    def forward(self, inputs: ScaleInputs, maps: dict[int, int]) -> tuple[Tensor, Tensor]:
        """Embed the rows of the maps that are present.

        Returns:
            hidden [B, rows, C] and condition [B, C].
        """
        condition = self.classes(inputs.labels)
        parts = []
        if 0 in maps:
            start = condition[:, None].expand(-1, len(self.start_position), -1)
            parts.append(start + self.start_position if inputs.start_position else start)
        if inputs.features is not None:
            # The reference keeps this projection in float32 under mixed precision.
            projected = F.linear(inputs.features, self.features.weight.float(), self.features.bias.float())
            parts.append(projected.to(condition.dtype))
        return torch.cat(parts, 1) + self.places(maps), condition

    def places(self, maps: dict[int, int]) -> Tensor:
        """Positions and scales of these maps' tokens, [rows, C]."""
        numbers, sides = tuple(maps), tuple(maps.values())
        scales = SequenceLayout.of_scales(sides, kinds=numbers).kind_index(self.scale.device)
        ends = [(self.starts[number], self.starts[number] + side * side) for number, side in maps.items()]
        if all(stop == start for (_, stop), (start, _) in itertools.pairwise(ends)):  # neighbours: one view
            ends = [(ends[0][0], ends[-1][1])]
        rows = [self.position[start:stop] for start, stop in ends]
        return (rows[0] if len(rows) == 1 else torch.cat(rows)) + self.scale[scales]


class VAR(ScaleTransformer):
    """A stage of VAR."""

    choice: VARConfig

    @classmethod
    def kinds_of(cls, space: TokenSpace) -> int:
        """The scales."""
        return len(space.sides)

    def kind_of(self, number: int, side: int) -> int:
        """Its number.

        Raises:
            ConfigError: there are no positions for maps of this side.
        """
        if number >= len(self.space.sides) or side != self.space.sides[number]:
            raise ConfigError(
                f"A VAR has positions for its tokenizer's scales {list(self.space.sides)}, not for a map of side "
                f"{side}. Set recipe.scale_lists to fixed (and no sampling.scales), or choose generator.name=flexvar."
            )
        return number

    def build_embedding(self) -> nn.Module:
        """A position for every token of the tokenizer's scales."""
        return Embedding(self.choice, self.space, self.config.params_dtype)
