"""Token sequences and the images that they are decoded to, compared with the true ones (reAR appendix B).

    CTR         share of tokens that are the true ones                                                    Eq. 8
    perplexity  exp of the mean of -log p(x_i | x_1 .. x_{i-1}), the sequence read by the generator        Eq. 9
    PSNR, LPIPS of the decoded image                                                                      Eq. 10 to 12
    cosine      of the code vectors of each token and the true one
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megavar.analysis.base import Subject
from megavar.analysis.observation import Observer
from megavar.config.analyses.sequences import SequencesChoice
from megavar.data.batch import Batch
from megavar.errors import ConfigError
from megavar.evaluation.image_quality import psnr
from megavar.tokenizers.base import Codebook
from megavar.tokenizers.perceptual import ALEXNET, VGG16, PerceptualDistance


@dataclass(frozen=True)
class Sequences:
    """B test images as a generator sees them."""

    batch: Batch
    ids: Tensor
    """int64 [B, L]: the true tokens."""
    reference: Tensor
    """float32 [B, 3, H, W] in [-1, 1]: what decoded images are compared with."""


class Judge:
    """A run's generator and tokenizer on test images, each with its class."""

    def __init__(self, run: Subject, choice: SequencesChoice) -> None:
        """Load what is needed.

        Raises:
            ConfigError: the run's tokens have no vocabulary.
            CheckpointError: a file of LPIPS weights is missing or holds something else.
        """
        self.choice = choice
        self.observer: Observer = run.observer(drop_labels=False)
        self.tokenizer = self.observer.tokenizer
        if self.tokenizer.space.vocabulary is None or not isinstance(self.tokenizer, Codebook):
            raise ConfigError(
                f"The tokens of {run.name} are vectors without a codebook: analysis.kind={choice.kind} is of "
                f"tokenizers with one."
            )
        self.perceptual = {
            f"lpips_{name}": PerceptualDistance(
                network, files.backbone, files.linear,
                keys=(f"analysis.lpips_{name}.backbone", f"analysis.lpips_{name}.linear"),
            ).to(run.device)
            for name, network, files in (("vgg", VGG16, choice.lpips_vgg), ("alex", ALEXNET, choice.lpips_alex))
            if files is not None
        }  # fmt: skip

    @torch.no_grad()
    def sequences(self) -> Iterator[Sequences]:
        """The test images, a batch at a time."""
        for batch in self.observer.batches(self.choice.images, self.choice.batch):
            images = batch.require_images()
            ids = self.tokenizer.tokens(self.tokenizer.encode(images))
            yield Sequences(batch, ids, images if self.choice.reference == "image" else self.tokenizer.decode(ids))

    @torch.no_grad()
    def measure(self, true: Sequences, ids: Tensor) -> dict[str, Tensor]:
        """Of other tokens [B, L] for the same images: sums over the batch, float64; see :func:`means`."""
        logits = self.observer.predict(true.batch, ids)
        surprise = F.cross_entropy(logits.transpose(1, 2).float(), ids, reduction="none")
        decoded = self.tokenizer.decode(ids)
        found = {
            "ctr": (ids == true.ids).double().mean(1),
            "surprise": surprise.double().mean(1),
            "cosine": F.cosine_similarity(self.tokenizer.embed(ids), self.tokenizer.embed(true.ids), dim=-1).mean(1),
            # An image without an error would have an infinite PSNR; 100 dB are less than half a level in every value.
            "psnr": psnr((decoded + 1) / 2, (true.reference + 1) / 2).clamp(max=100.0),
        }
        found |= {name: distance(decoded, true.reference) for name, distance in self.perceptual.items()}
        return {name: value.double().sum().cpu() for name, value in found.items()}


def means(parts: Sequence[tuple[int, Mapping[str, Tensor]]]) -> dict[str, float]:
    """Over all images, from (number, sums) of batches; perplexity from the mean surprise of all tokens."""
    count = sum(number for number, _ in parts)
    found = {name: float(sum(sums[name] for _, sums in parts)) / count for name in parts[0][1]}
    found["perplexity"] = float(torch.tensor(found.pop("surprise")).exp())
    return found
