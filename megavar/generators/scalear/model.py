"""SAR's hybrid (``papers/sar.md`` Table 2; GengzeZhou/SAR ``models/scalear.py``): masked tokens, then scales.

    rows          class | first map, partly masked | second map | ... | last map
    input         class embedding | code vectors or mask token | the map before, resized to this one
    sees          class, first: each other; later ones: class, themselves and what ``generator.history`` says

Without a masked map (student forcing, and decoding of later scales) every map is like the later ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megavar.config.generators.scalear import ScaleARConfig
from megavar.config.token_space import TokenSpace
from megavar.generators.base import TokenSequence
from megavar.generators.flexvar.model import Embedding as FlexVAREmbedding
from megavar.generators.flexvar.model import sines
from megavar.generators.inputs import ScaleInputs
from megavar.generators.scale_transformer import ScaleTransformer
from megavar.parallel.vocabulary import Scores
from megavar.transformer.sequence import SequenceLayout


@dataclass
class ScaleARInputs(ScaleInputs):
    """Maps of the sides ``sides``, with ``features`` [B, L, D] of all of them."""

    masked: Tensor | None = None
    """bool [B, first map's tokens]: True is hidden behind the mask token. None: no map is a masked one."""
    class_row: bool = True
    """Whether the class's row begins the sequence; while decoding with a cache it is there already."""


class Embedding(FlexVAREmbedding):
    """FlexVAR's without start tokens, with a mask token and positions of the masked map."""

    def __init__(self, choice: ScaleARConfig, space: TokenSpace, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        width, side = choice.hidden_size, choice.position_side
        self.classes = nn.Embedding(choice.classes + 1, width, dtype=dtype)
        self.features = nn.Linear(space.channels, width, dtype=dtype)
        self.mask = nn.Parameter(torch.empty(width, dtype=dtype))
        self.position = nn.Parameter(torch.empty(width, side, side, dtype=dtype))
        if choice.shared_position:
            self.register_parameter("first_position", None)
        else:
            self.first_position = nn.Parameter(torch.empty(space.sides[0] ** 2, width, dtype=dtype))

    def forward(self, inputs: ScaleARInputs, maps: dict[int, int]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Hidden states [B, rows, C] and condition [B, C]."""
        condition = self.classes(inputs.labels)
        assert inputs.features is not None
        hidden = self.features(inputs.features.to(condition.dtype))
        positions = [self.places(side) for side in maps.values()]
        if inputs.masked is not None:
            first = inputs.masked.shape[1]
            shown = torch.where(inputs.masked[..., None], self.mask, hidden[:, :first])
            hidden = torch.cat([shown, hidden[:, first:]], 1)
            if self.first_position is not None:
                positions[0] = self.first_position
        hidden = hidden + torch.cat(positions)
        return (torch.cat([condition[:, None], hidden], 1) if inputs.class_row else hidden), condition


class ScaleAR(ScaleTransformer):
    """A stage. Its prediction has no row for the class. Routers call the class's row 0 and a map by its side."""

    choice: ScaleARConfig

    @classmethod
    def kinds_of(cls, space: TokenSpace) -> int:
        """The class's row, sides up to the tokenizer's last one, and one kind for all larger ones."""
        return max(space.sides) + 2

    def kind_of(self, number: int, side: int) -> int:
        """Its side."""
        return min(side, self.kinds - 1)

    def build_embedding(self) -> nn.Module:
        """With a mask token."""
        return Embedding(self.choice, self.space, self.config.params_dtype)

    def sequence(self, inputs: ScaleARInputs) -> TokenSequence:  # type: ignore[override]
        """The class's row and the maps, with who sees whom."""
        sides = inputs.sides or self.space.sides
        sizes = tuple(side * side for side in sides)
        kinds = tuple(self.kind_of(number, side) for number, side in enumerate(sides))
        if inputs.class_row:
            sizes, kinds = (1, *sizes), (0, *kinds)
        seen = self.visible(len(sides), masked=inputs.masked is not None, class_row=inputs.class_row)
        return TokenSequence(SequenceLayout(sizes, kinds, "table", sees=seen), sample_keys=inputs.sample_keys)

    def visible(self, maps: int, *, masked: bool, class_row: bool) -> tuple[tuple[int, ...], ...]:
        """Numbers of the segments that each segment sees."""
        own_class = (0,) if class_row else ()
        numbers = range(len(own_class), len(own_class) + maps)
        later = numbers[1:] if masked else numbers
        history = self.choice.history == "causal" or (masked and self.choice.history == "released")
        if self.choice.history == "causal":
            of_class: tuple[int, ...] = (0,)
        else:  # the public code leaves the class's row without a mask where no map is masked
            of_class = (0, 1) if masked else (0, *numbers)
        seen = [of_class] if class_row else []
        if masked:
            seen.append((*own_class, numbers[0]))
        for number in later:
            seen.append((*own_class, *(later[: later.index(number) + 1] if history else (number,))))
        return tuple(seen)

    def predict(  # type: ignore[override]
        self, hidden: Tensor, conditions: Mapping[str, Tensor], inputs: ScaleARInputs
    ) -> Tensor | Scores:
        """Of the maps' rows."""
        return super().predict(hidden[1:] if inputs.class_row else hidden, conditions, inputs)

    def initial_value(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """VAR's, but for the map of positions."""
        if name == "embedding.position":
            value.copy_(sines(*value.shape[:2]))
        else:
            super().initial_value(name, value, generator)

    def example(self, images: int) -> ScaleARInputs:
        """Class 0, 1, ..., features of zeros, and a first map that is hidden."""
        labels = torch.arange(images) % self.choice.classes
        features = torch.zeros(images, self.space.length, self.space.channels)
        masked = torch.ones(images, self.space.sides[0] ** 2, dtype=torch.bool)
        return ScaleARInputs(labels, features, torch.arange(images), masked=masked)
