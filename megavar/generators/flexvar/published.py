"""The public FlexVAR checkpoints (``FlexVARd16-epo179.pth`` ..., SAR's too), to and from our logical tensors."""

from collections.abc import Mapping

from torch import Tensor

from megavar.generators.var.published import VARLayout


class FlexVARLayout(VARLayout):
    """VAR's dialect without an embedding of scales, and with a map of positions [1, C, side, side].

    The persistent buffers (the mask of the tokenizer's scale list, zero key biases) are computed for an export and
    ignored in a file.
    """

    belongs_to = "a FlexVAR checkpoint"
    remedy = (
        "Check generator.depth, generator.classes, generator.shared_adaptive_norm, generator.position_side, "
        "tokenizer.vocabulary_size (8912 in the published files) and generator.experts (public checkpoints are dense)."
    )

    def names(self, name: str) -> tuple[str, ...]:
        """The one public tensor that holds ours."""
        return () if name == "embedding.scale" else super().names(name)

    def computed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mask and the zero key biases."""
        return {name: value for name, value in super().computed(state).items() if name != "lvl_1L"}
