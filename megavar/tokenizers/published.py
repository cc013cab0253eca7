"""Public files whose key names our modules carry."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from megavar.weight_layout import NamedLayout, Shape


class SameNamesLayout(NamedLayout):
    """Our names and shapes are the authors', but for what only our training or another mode of the model keeps.

    An export leaves out what begins with :attr:`ours`, and :meth:`load` does, so that the model keeps its own.
    """

    ours: ClassVar[tuple[str, ...]] = ("quantize.usage_average",)
    """Beginnings of the names that public files do not have."""

    def names(self, name: str) -> tuple[str, ...]:
        """The same name."""
        return (name,)

    def export(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`megavar.weight_layout.WeightLayout.export`."""
        return super().export({name: value for name, value in tensors.items() if not name.startswith(self.ours)})

    def load(
        self, state: Mapping[str, Tensor], expected: Mapping[str, Shape], passed: Mapping[str, Shape] = {}
    ) -> dict[str, Tensor]:
        """See :meth:`megavar.weight_layout.WeightLayout.load`."""
        public = {name: shape for name, shape in expected.items() if not name.startswith(self.ours)}
        return super().load(state, public, passed)
