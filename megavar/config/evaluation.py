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


class ClassifierSuite(Section):
    """FID, Inception score, precision and recall on a small classifier of the data's own classes.

    For any source with classes: the classifier is trained on the spot (about half a minute on one core at 32 pixels)
    and named in the metrics, for example ``fid@photographs-cnn``.
    """

    name: Literal["classifier"] = "classifier"
    reference_images: int = Field(4096, ge=64)
    """Training images, from the first on, that train the classifier and are compared with."""
    baselines: bool = True
    """Print the scores of held-out images, class means, training copies and noise beside the model."""
    extractor_cache: str | None = None
    """Directory of the classifier (default: the user's cache directory)."""


class ADMSuite(Section):
    """FID, sFID, Inception score, precision and recall as ADM's evaluator computes them."""

    name: Literal["adm"]
    inception_weights: str
    """Path of ``weights-inception-2015-12-05-6726825d.pth`` (torch-fidelity's release v0.2.0)."""
    unofficial_weights: bool = False
    """Accept other weights of the same layout; the metrics then carry the start of their sha256."""
    reference: str
    """ADM's npz, statistics (``mu``, ``sigma``), or a file of ``tools/evaluate_fid.py reference``."""
    backend: Literal["megavar", "torch-fidelity"] = "megavar"
    """Whose formulas: ours, or torch-fidelity's for FID, IS, precision and recall on the same features."""


class ShapesSuite(Section):
    """ShapeEval: GenEval's six tasks on rendered shapes, for text-to-image models of the ``shapes`` source."""

    name: Literal["shapes"]
    per_tag: int = Field(100, ge=1)
    """Prompts of each of the six kinds (kinds with fewer different prompts use all)."""
    per_prompt: int = Field(4, ge=1)
    """Images per prompt."""
    held_out: bool = True
    """Ask for combinations that training never shows; off: for those it shows."""
    seed: int = 0
    """Chooses the prompts."""


class GenEvalSuite(Section):
    """Images of GenEval's prompts in the folders that its scorer reads, which runs in an environment of its own."""

    name: Literal["geneval"]
    prompts: str
    """The official repository's ``prompts/evaluation_metadata.jsonl``."""
    per_prompt: int = Field(4, ge=1)
    """Images per prompt."""


class DPGSuite(Section):
    """Four images of every prompt of DPG-Bench as the 2x2 grids that its scorer reads."""

    name: Literal["dpg"]
    prompts: str
    """The official repository's folder ``dpg_bench/prompts``."""


SuiteConfig = Annotated[
    DigitsSuite | ClassifierSuite | ADMSuite | ShapesSuite | GenEvalSuite | DPGSuite, Field(discriminator="name")
]


class PerceptualWeights(Section):
    """The two files of an LPIPS distance."""

    backbone: str
    """State dict of torchvision's ``vgg16`` or ``alexnet``."""
    linear: str
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
    inception_weights: str | None = None
    """Inception weights for rFID. Without them rFID is on the classifier of the data's own classes, if it has any."""
    unofficial_weights: bool = False
    """Accept other Inception weights of the same layout."""
    reference: str | None = None
    """Reference statistics for ``rfid_adm``."""
    lpips_vgg: PerceptualWeights | None = None
    """Weights for LPIPS on VGG-16."""
    lpips_alex: PerceptualWeights | None = None
    """Weights for LPIPS on AlexNet."""
    extractor_cache: str | None = None
    """Directory of the classifier (default: the user's cache directory)."""


class EvaluationConfig(Section):
    """How the images of ``sampling`` are scored."""

    samples: int = Field(1000, ge=16)
    """Number of images; class of image i is i modulo the number of classes. Takes the place of ``sampling.number``."""
    suite: SuiteConfig = DigitsSuite()
    """The set of metrics for a generator."""
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    """The metrics for a tokenizer."""
    after_training: bool = False
    """Sample and score the run when ``train`` reaches its last step."""
