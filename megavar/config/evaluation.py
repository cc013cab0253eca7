"""What ``megavar evaluate`` computes: which set of metrics, on which images, against what."""

from typing import Annotated, Literal

from pydantic import Field

from megavar.config.base import Section


class DigitsSuite(Section):
    """Scores of digits with baselines beside them (``megavar.evaluation.digits``)."""

    name: Literal["digits"] = "digits"
    baselines: bool = True
    """Print the scores of held-out digits, class Gaussians, class means, training copies and noise beside the model."""
    extractor_cache: str | None = None
    """Directory of the extractor that is trained on the spot (default: the user's cache directory)."""


SuiteConfig = Annotated[DigitsSuite, Field(discriminator="name")]


class EvaluationConfig(Section):
    """How the images of ``sampling`` are scored."""

    samples: int = Field(1000, ge=16)
    """Number of images; class of image i is i modulo the number of classes. Takes the place of ``sampling.number``."""
    suite: SuiteConfig = DigitsSuite()
    """The set of metrics."""
    after_training: bool = False
    """Score the run when ``train`` reaches its last step."""
