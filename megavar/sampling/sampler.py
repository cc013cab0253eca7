"""Draws any number of images in fixed chunks: resumable, and the same images on any number of ranks.

Sample i has label i modulo the number of classes and noise of its own. Chunk c holds samples
[c * chunk_size, (c + 1) * chunk_size) and is decoded by rank c modulo the number of ranks; it is done when its file
exists. Chunks are never merged or split, because kernels may round differently in batches of another size.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megavar.config.sampling import SamplingConfig
from megavar.data.pixels import to_uint8
from megavar.evaluation.chunks import ChunkStore
from megavar.generators.var import VAR
from megavar.sampling.next_scale import decode, noise_of_samples
from megavar.tokenizers.multiscale_vq import MultiScaleVQ


class Sampler:
    """Decodes samples of a trained generator by their index."""

    def __init__(self, generator: VAR, tokenizer: MultiScaleVQ, settings: SamplingConfig, device: torch.device) -> None:
        self.generator = generator
        self.tokenizer = tokenizer
        self.settings = settings
        self.device = device

    @torch.no_grad()
    def draw(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Samples ``indices`` (int64 [B]).

        Returns:
            images uint8 [B, 3, H, W], labels int64 [B], tokens int64 [B, L], all on the CPU.
        """
        training = self.generator.training
        self.generator.eval()
        indices = indices.to(self.device)
        labels = indices % self.generator.generator.classes
        noise = noise_of_samples(self.settings.seed, indices)
        decoded = decode(self.generator, self.tokenizer.quantizer, labels, self.settings, noise)
        images = to_uint8(self.tokenizer.decode_features(decoded.feature_maps[-1]).clamp(-1, 1))
        self.generator.train(training)
        return images.cpu(), labels.cpu(), torch.cat(decoded.ids, 1).cpu()

    def fill(self, store: ChunkStore, rank: int, world_size: int) -> None:
        """Write this rank's missing chunks: images, labels and tokens."""
        missing = store.missing(rank, world_size)
        # disable=None: a bar on terminals only
        bar = tqdm(missing, desc="sampling", unit="chunk", disable=True if rank or not missing else None)
        for chunk in bar:
            first, end = store.range(chunk)
            images, labels, tokens = self.draw(torch.arange(first, end))
            arrays = {"images": images, "labels": labels, "tokens": tokens.to(torch.int32)}
            store.write(chunk, {name: value.numpy() for name, value in arrays.items()})


def open_store(directory: Path, settings: SamplingConfig, identity: dict[str, Any]) -> ChunkStore:
    """The chunk directory of one set of samples; ``identity`` names the weights they come from."""
    sampled = settings.model_dump(mode="json", exclude={"number", "chunk_size"})
    return ChunkStore.open(
        directory, count=settings.number, size=settings.chunk_size, identity={"sampling": sampled} | identity
    )
