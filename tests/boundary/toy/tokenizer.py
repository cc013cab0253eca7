"""A tokenizer without scales or convolutions: principal components, vector-quantized."""

from collections.abc import Sequence

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

from megavar.config.token_space import TokenSpace
from megavar.weight_layout import NamedLayout
from tests.boundary.toy.choices import LineTokenizerConfig


class LineTokenizer(nn.Module):
    """Grey images to ``length`` groups of ``channels`` components each, and every group to its nearest code."""

    def __init__(self, config: LineTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        pixels, components = config.image_side**2, config.length * config.channels
        self.centre = nn.Parameter(torch.zeros(pixels))
        self.components = nn.Parameter(torch.zeros(components, pixels))
        self.codes = nn.Parameter(torch.zeros(config.vocabulary_size, config.channels))

    @property
    def space(self) -> TokenSpace:
        """See ``megavar.tokenizers.base``."""
        return self.config.space

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, L, C]."""
        grey = images.mean(1).flatten(1)
        return ((grey - self.centre) @ self.components.t()).unflatten(1, (self.space.length, -1))

    @torch.no_grad()
    def tokens(self, latents: Tensor) -> Tensor:
        """[B, L, C] to int64 [B, L]."""
        return torch.cdist(latents.float(), self.codes).argmin(-1)

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [...] to [..., C]."""
        return self.codes[ids]

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """int64 [B, L] to [B, 3, H, W]."""
        grey = self.embed(tokens).flatten(1) @ self.components + self.centre
        side = self.config.image_side
        return grey.view(-1, 1, side, side).expand(-1, 3, -1, -1).clamp(-1, 1)

    @torch.no_grad()
    def fit(self, images: Tensor) -> "LineTokenizer":
        """Principal components of images [N, 3, H, W] and k-means of their groups (no recipe needed)."""
        grey = images.mean(1).flatten(1)
        self.centre.copy_(grey.mean(0))
        _, _, directions = torch.linalg.svd(grey - self.centre, full_matrices=False)
        self.components.copy_(directions[: len(self.components)])
        groups = self.encode(images).flatten(0, 1)
        found = KMeans(len(self.codes), n_init=1, random_state=0).fit(groups.numpy())
        self.codes.copy_(torch.from_numpy(found.cluster_centers_))
        return self


class LineLayout(NamedLayout):
    """A "public" file of it: other names, components as columns."""

    belongs_to = "a line tokenizer"
    remedy = "Check tokenizer.length, channels and vocabulary_size."

    def names(self, name: str) -> tuple[str, ...]:
        """One each."""
        return ({"centre": "mean", "components": "pca", "codes": "codebook"}[name],)

    def split(self, name: str, value: Tensor) -> Sequence[Tensor]:
        """Components are columns there."""
        return [value.t() if name == "components" else value]

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`split`."""
        return parts[0].t() if name == "components" else parts[0]
