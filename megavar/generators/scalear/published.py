"""Checkpoints of the public hybrid (``models/scalear.py``), to and from our logical tensors."""

from collections.abc import Sequence

from torch import Tensor

from megavar.generators.flexvar.published import FlexVARLayout

_OWN = {"embedding.mask": ("mask_token", 2), "embedding.first_position": ("randar_pos_embed", 1)}


class ScaleARLayout(FlexVARLayout):
    """FlexVAR's dialect without start positions, with a mask token [1, 1, C] and positions of the first map."""

    belongs_to = "a checkpoint of SAR's hybrid"
    remedy = (
        "Check generator.depth, generator.classes, generator.shared_adaptive_norm, generator.position_side, "
        "generator.shared_position, the tokenizer's scales and vocabulary_size, and generator.experts."
    )

    def names(self, name: str) -> tuple[str, ...]:
        """The one public tensor that holds ours."""
        return (_OWN[name][0],) if name in _OWN else super().names(name)

    def split(self, name: str, value: Tensor) -> Sequence[Tensor]:
        """Leading dimensions of one."""
        return [value[(None,) * _OWN[name][1]]] if name in _OWN else super().split(name, value)

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`split`."""
        return parts[0][(0,) * _OWN[name][1]] if name in _OWN else super().join(name, parts)

    def ignores(self, published: str) -> bool:
        """The buffers, and the first map's own positions where they are not used."""
        unused = self.choice.shared_position and published == "randar_pos_embed"
        return unused or super().ignores(published)
