"""QueryAR: p(latents | text), in any order of places (VGT section 3.3, Eq. 7 and 8; ``vgt_internvl3.py``).

    rows      = text, beginning of an image, Q_p(1), z_p(1), Q_p(2), z_p(2), ...         causal, text padded
    Q_i       = query_i + position_i        z_i = projection(latent_i) + position_i
    condition = linear(norm(hidden state of Q_p(k)))                                     knows z_p(1) ... z_p(k-1)
    velocity  = head(x_t, t, condition)                                                  each latent alone

Shapes: B samples, T rows of text, R of the image, C width, A queries that are asked.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.generators.query_ar import QueryARConfig
from megavar.config.token_space import TokenSpace
from megavar.generators import denoising_mlp
from megavar.generators.base import Embedded, TokenSequence
from megavar.generators.denoising_mlp import DenoisingMLP
from megavar.generators.inputs import QueryInputs
from megavar.generators.language_model import LanguageModel, positions_of
from megavar.transformer.sequence import SequenceLayout

TEXT, IMAGE = 0, 1
"""Kinds of rows that routers of experts tell apart."""


class ImageRows(nn.Module):
    """Queries and latents as hidden states."""

    def __init__(self, choice: QueryARConfig, space: TokenSpace, dtype: torch.dtype) -> None:
        super().__init__()
        width = choice.language_model.width
        self.side = space.sides[-1]
        self.queries = nn.Parameter(torch.empty(*choice.query_sides, width, dtype=dtype))
        self.position = nn.Parameter(torch.empty(*choice.query_sides, width, dtype=dtype))
        self.projection = nn.Linear(space.channels, width, dtype=dtype)

    def forward(self, inputs: QueryInputs) -> Tensor:
        """[B, R, C]."""
        queries, position = (F.embedding(inputs.places, self.middle(table)) for table in (self.queries, self.position))
        latents = self.projection(inputs.latents.to(queries.dtype))
        return torch.where(inputs.holds[:, None], latents, queries) + position

    def middle(self, table: Tensor) -> Tensor:
        """The map's part [side * side, C] of a table [rows, columns, C]."""
        row, column = ((size - self.side) // 2 for size in table.shape[:2])
        return table[row : row + self.side, column : column + self.side].flatten(0, 1)


class QueryAR(LanguageModel):
    """A stage. The prediction is the velocity of the noisy latents that are asked for, float32 [B, A, channels]; where
    the inputs hold none, the head's condition, [B, A, C], for :meth:`velocity`."""

    choice: QueryARConfig
    _hidden: dict[str, Tensor]
    """What was tapped of the flow head in the last pass."""

    @classmethod
    def kinds_of(cls, space: TokenSpace) -> int:
        """Text and image."""
        return 2

    def build_first(self) -> None:
        """Text and rows of the image."""
        super().build_first()
        self.image = ImageRows(self.choice, self.space, self.config.params_dtype)

    def build_last(self) -> None:
        """Norm, projection and flow head."""
        super().build_last()
        width, channels = self.sizes.width, self.space.channels
        self.condition = nn.Linear(width, width, dtype=self.config.params_dtype)
        self.head = DenoisingMLP(self.choice.head, self.unsharded, channels, channels)
        self._hidden = {}

    @property
    def last_taps(self) -> tuple[str, ...]:
        """Blocks of the flow head, [B, A, W] in the order of the queries: ``head.0`` ..."""
        return tuple(f"head.{number}" for number in range(self.choice.head.depth))

    def tapped_last(self) -> dict[str, Tensor]:
        """Those that are wanted; they are given once, so that nothing keeps a graph."""
        found, self._hidden = self._hidden, {}
        return found

    def sequence(self, inputs: QueryInputs) -> TokenSequence:
        """One causal sequence."""
        rows = {TEXT: inputs.text_rows, IMAGE: inputs.places.shape[1]}
        kinds = tuple(kind for kind, number in rows.items() if number)
        layout = SequenceLayout(tuple(rows[kind] for kind in kinds), kinds, rule="causal")
        positions = inputs.positions
        if positions is None:
            assert inputs.valid is not None, "positions are given, or counted"
            positions = positions_of(inputs.valid)
        return TokenSequence(layout, self.rotary(positions), inputs.valid, inputs.sample_keys)

    def embed(self, inputs: QueryInputs) -> Embedded:
        """Text, then the image."""
        rows = [] if inputs.text is None else [self.text(inputs.text)]
        return Embedded(torch.cat([*rows, self.image(inputs)], 1))

    def predict(self, hidden: Tensor, conditions: Mapping[str, Tensor], inputs: QueryInputs) -> Tensor:
        """[T + R, B, C] -> velocity float32 [B, A, channels], or the head's condition [B, A, C]."""
        asked = hidden[inputs.text_rows :][inputs.asks]
        condition: Tensor = self.condition(self.norm(asked)).transpose(0, 1)
        if inputs.noisy is None:
            return condition
        assert inputs.times is not None
        towards_data, of_blocks = self.head(inputs.noisy, 1 - inputs.times, condition, with_hidden=True)
        self._hidden = {name: one for name, one in zip(self.last_taps, of_blocks) if name in self.wanted}
        return -towards_data

    def velocity(self, noisy: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """Velocity of latents on their way, float32 [B, A, channels].

        Args:
            noisy: float32 [B, A, channels].
            times: float32 [B, A], 1 is noise. The head, as published, counts them from noise to data.
            condition: what :meth:`step` has predicted for the places, [B, A, C].
        """
        return -self.head(noisy, 1 - times, condition)

    def gather(self, prediction: Tensor) -> Tensor:
        """Complete on every rank."""
        return prediction

    # -- parameters -------------------------------------------------------------------------------------------------

    def initial_value(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """The released ones: queries normal with C^-1/2, positions with 0.02 (cut off), else the language model's and
        the head's."""
        if name.startswith("head."):
            denoising_mlp.initial_value(name.removeprefix("head."), value, generator)
        elif name == "image.queries":
            value.normal_(std=value.shape[-1] ** -0.5, generator=generator)
        elif name == "image.position":
            nn.init.trunc_normal_(value, std=0.02, generator=generator)
        else:
            super().initial_value(name, value, generator)

    def example(self, images: int) -> QueryInputs:
        """Zeros."""
        places, channels = torch.arange(self.space.length).repeat_interleave(2), self.space.channels
        text = torch.zeros(images, self.choice.text_length + len(self.choice.image_start), dtype=torch.int64)
        return QueryInputs(
            text,
            places.expand(images, -1),
            torch.zeros(images, len(places), channels),
            torch.arange(len(places)) % 2 == 1,
            slice(0, None, 2),
            valid=torch.ones(images, text.shape[1] + len(places), dtype=torch.bool),
            noisy=torch.zeros(images, self.space.length, channels),
            times=torch.zeros(images, self.space.length),
            sample_keys=torch.arange(images),
        )
