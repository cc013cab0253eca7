"""The suite ``classifier``."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.base import PathText
from megavar.config.suites.base import SuiteChoice


class ClassifierSuite(SuiteChoice):
    """FID, Inception score, precision and recall on a small classifier of the data's own classes.

    For any source with classes: the classifier is trained on the spot (about half a minute on one core at 32 pixels)
    and named in the metrics, for example ``fid@photographs-cnn``.
    """

    implementation: ClassVar[str] = "megavar.evaluation.suites.classifier:Classifier"

    name: Literal["classifier"] = "classifier"
    reference_images: int = Field(4096, ge=64)
    """Training images, from the first on, that train the classifier and are compared with."""
    baselines: bool = True
    """Print the scores of held-out images, class means, training copies and noise beside the model,
    and those of the untrained model."""
    extractor_cache: PathText | None = None
    """Directory of the classifier (default: the user's cache directory)."""
