"""What analyses of token sequences and of the images that they are decoded to have in common (reAR appendix B)."""

from typing import Literal

from pydantic import Field

from megavar.config.analyses.base import ObservedChoice
from megavar.config.evaluation import PerceptualWeights


class SequencesChoice(ObservedChoice):
    """Test images as tokens, changed in one way, and decoded."""

    images: int = Field(64, ge=1)
    """Test images, from the first on. The paper does not say how many."""
    reference: Literal["decoded", "image"] = "decoded"
    """What decoded images are compared with. ``decoded``: the image of the true tokens ("between the images decoded
    from two token sequences", section 3.1), so that the tokenizer's own error counts in neither. ``image``: the
    original (Eq. 10 to 12)."""
    lpips_vgg: PerceptualWeights | None = None
    """Weights for LPIPS on VGG-16; without any LPIPS is left out."""
    lpips_alex: PerceptualWeights | None = None
    """Weights for LPIPS on AlexNet. The paper does not say which network."""
    seed: int = 0
    """Of what is drawn."""
