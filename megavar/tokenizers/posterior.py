"""What the encoder of a variational autoencoder says of an image (Kingma and Welling 2014)."""

from typing import NamedTuple

from torch import Tensor

_LOWEST, _HIGHEST = -30.0, 20.0
"""Bounds of log variances (latent diffusion)."""


class Posterior(NamedTuple):
    """Independent normal distributions of all channels of a map or of a line of tokens."""

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def of(cls, latents: Tensor, dim: int) -> "Posterior":
        """Of means and then log variances along ``dim``, in float32; log variances are held in [-30, 20]."""
        mean, log_variance = latents.float().chunk(2, dim)
        return cls(mean, log_variance.clamp(_LOWEST, _HIGHEST))

    @property
    def deviation(self) -> Tensor:
        """Standard deviations."""
        return (0.5 * self.log_variance).exp()

    def sample(self, normal: Tensor) -> Tensor:
        """``mean + deviation * normal``, of standard normal numbers."""
        return self.mean + self.deviation * normal

    def divergence(self) -> Tensor:
        """Kullback-Leibler divergence from the standard normal distribution, in nats, of every channel."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance)
