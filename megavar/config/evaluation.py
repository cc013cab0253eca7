"""What ``megavar evaluate`` computes: which set of metrics, on which images, against what."""

from typing import Literal

from pydantic import Field

from megavar.config.base import PathText, Section
from megavar.config.suites.base import SuiteChoice
from megavar.config.suites.digits import DigitsSuite
from megavar.config.understanding import UnderstandingConfig


class PerceptualWeights(Section):
    """The two files of an LPIPS distance."""

    backbone: PathText
    """State dict of torchvision's ``vgg16`` or ``alexnet``."""
    linear: PathText
    """The LPIPS package's ``v0.1/vgg.pth`` or ``v0.1/alex.pth``."""


class ReconstructionConfig(Section):
    """How the reconstructions of a tokenizer are measured (``megavar.evaluation.reconstruction``)."""

    protocol: Literal["standard", "vgt", "llamagen", "titok"] = "standard"
    """Cropping, resizing and rounding; other than standard is named in the metrics."""
    images: int | None = Field(None, ge=2)
    """Number of test images, from the first on (default: all)."""
    model_size: int | None = None
    """Side of the images that the tokenizer sees (default: ``data.image_size``; VGT: 448)."""
    chunk_size: int = Field(64, ge=1)
    """Images measured together."""
    inception_weights: PathText | None = None
    """Inception weights for rFID. Without them rFID is on the classifier of the data's own classes, if it has any."""
    unofficial_weights: bool = False
    """Accept other Inception weights of the same layout."""
    reference: PathText | None = None
    """Reference statistics for ``rfid_adm``."""
    lpips_vgg: PerceptualWeights | None = None
    """Weights for LPIPS on VGG-16."""
    lpips_alex: PerceptualWeights | None = None
    """Weights for LPIPS on AlexNet."""
    extractor_cache: PathText | None = None
    """Directory of the classifier (default: the user's cache directory)."""


class EvaluationConfig(Section):
    """How the ``sampling.number`` images of a generator, or a tokenizer's reconstructions, are scored."""

    suite: SuiteChoice = DigitsSuite()
    """The set of metrics for a generator."""
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    """The metrics for a tokenizer."""
    understanding: UnderstandingConfig | None = None
    """Benchmarks for a vision-language model of which the run trained a part; ``megavar evaluate --understanding``."""
    after_training: bool = False
    """Sample and score the run when ``train`` reaches its last step."""
