"""VAR's next-scale transformer."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from megavar.config.generators.scale_transformer import ScaleTransformerConfig

SCALES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""VAR's scale lists by image resolution (side lengths of the token maps, tokenizer with 16x downsampling)."""


class VARConfig(ScaleTransformerConfig):
    """VAR's next-scale transformer, dense or with experts."""

    implementation: ClassVar[str] = "megavar.generators.var:VAR"
    weight_layouts: ClassVar[Mapping[str, str]] = {"var": "megavar.generators.var.published:VARLayout"}

    name: Literal["var"] = "var"
