"""The public VGT checkpoints (``iter_5000.pth``): the authors' state dict, to and from our logical tensors."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from megavar.generators.denoising_mlp import published_name
from megavar.generators.language_model.published import Qwen2Layout, prefix_in
from megavar.weight_layout import NamedLayout, Shape

PREFIX = "lmm.language_model.model."
"""Of the language model (InternVL3's)."""
HEAD = "image_head.net."
_TABLES = {
    "image.queries": "adaptive_metaquery.max_metaquery",
    "image.position": "adaptive_metaquery.pos_encoding.grid_embed",
}
_LAYERS = {"image.projection": "image_in_projector", "condition": "image_out_projector"}


class VGTLayout(Qwen2Layout):
    """Other names; tables are [1, C, rows, columns].

    The head over text, which QueryAR never trains, the vision tower, the autoencoder and the projector of REPA lie in
    the same files: they are passed over, and not exported.
    """

    belongs_to = "a QueryAR checkpoint of VGT"
    remedy = "Check generator.language_model, query_sides and head, and the channels of the tokenizer's latents."

    def names(self, name: str) -> tuple[str, ...]:
        """The public tensors that hold ours."""
        if name in _TABLES:
            return (_TABLES[name],)
        layer, _, kind = name.rpartition(".")
        if layer in _LAYERS:
            return (f"{_LAYERS[layer]}.{kind}",)
        if name.startswith("head."):
            found = published_name(name.removeprefix("head."), self.choice.head)  # type: ignore[attr-defined]
            return () if found is None else (f"{HEAD}{found}",)
        return tuple(f"{PREFIX}{part}" for part in super().names(name))

    def split(self, name: str, value: Tensor) -> Sequence[Tensor]:
        """Tables with channels first and a leading dimension of one."""
        return [value.permute(2, 0, 1)[None]] if name in _TABLES else super().split(name, value)

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`split`."""
        return parts[0][0].permute(1, 2, 0) if name in _TABLES else super().join(name, parts)

    def export(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Everything that is trained; contiguous, as files need it."""
        exported = NamedLayout.export(self, tensors)
        return {name: value.contiguous() for name, value in exported.items()}

    def load(
        self, state: Mapping[str, Tensor], expected: Mapping[str, Shape], passed: Mapping[str, Shape] = {}
    ) -> dict[str, Tensor]:
        """See :meth:`WeightLayout.load`."""
        prefix = prefix_in(state)
        own = {f"{PREFIX}{name}": value for name, value in self.within(state).items()}
        parts = (*_TABLES.values(), *(f"{layer}." for layer in _LAYERS.values()), HEAD)
        own |= {
            name: value for name, value in state.items()
            if name.startswith(parts) and not name.startswith((prefix, f"{HEAD}repa_projector."))
        }  # fmt: skip
        return NamedLayout.load(self, own, expected, passed)
