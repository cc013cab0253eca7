"""The suite ``digits``."""

from typing import ClassVar, Literal

from megavar.config.base import PathText
from megavar.config.suites.base import SuiteChoice


class DigitsSuite(SuiteChoice):
    """Scores of digits with baselines beside them (``megavar.evaluation.digits``)."""

    implementation: ClassVar[str] = "megavar.evaluation.suites.digits:Digits"

    name: Literal["digits"] = "digits"
    baselines: bool = True
    """Print the scores of held-out digits, class Gaussians, class means, training copies and noise beside the model,
    and those of the untrained model."""
    extractor_cache: PathText | None = None
    """Directory of the extractor that is trained on the spot (default: the user's cache directory)."""
