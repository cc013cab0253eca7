"""Denoising diffusion with a learned variance (Nichol and Dhariwal 2021; ``diffusion/gaussian_diffusion.py`` of MAR).

    x_i  = sqrt(a_i) data + sqrt(1 - a_i) noise          a: cosine schedule of 1000 times
    a network predicts the noise and, between the two bounds of the posterior, its log variance
    loss = (noise - predicted)^2 + bound in bits on the variance, whose gradient does not reach the prediction

Tables are float64; per-element arithmetic is float32.
"""

import math

import torch
from torch import Tensor

TIMES = 1000


def _share_left(position: float) -> float:
    return math.cos((position + 0.008) / 1.008 * math.pi / 2) ** 2


def cosine_schedule(times: int = TIMES) -> Tensor:
    """a_i, products of 1 - beta, float64 [times]."""
    betas = [min(1 - _share_left((i + 1) / times) / _share_left(i / times), 0.999) for i in range(times)]
    return (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)


def evenly(steps: int, times: int = TIMES) -> list[int]:
    """``steps`` of the times, the first and the last among them."""
    stride = (times - 1) / (steps - 1) if steps > 1 else 1.0
    return [round(stride * step) for step in range(steps)]


def strided(steps: int, times: int = TIMES) -> list[int]:
    """``steps`` of the times at a whole distance from 0 on (DDIM's).

    Raises:
        ValueError: no whole distance gives so many.
    """
    for stride in range(1, times):
        if len(range(0, times, stride)) == steps:
            return list(range(0, times, stride))
    raise ValueError(f"no whole distance gives {steps} of {times} times")


class Diffusion:
    """A chain over some of the times, with what training and drawing read of it."""

    def __init__(self, kept: list[int] | None = None) -> None:
        """``kept``: times of the chain, rising; None: all."""
        whole = cosine_schedule()
        self.kept = torch.tensor(kept if kept is not None else range(len(whole)))
        """int64 [n]: the times that the network is told."""
        left = whole[self.kept]
        before = torch.cat([left.new_ones(1), left[:-1]])
        self.betas = 1 - left / before
        variance = self.betas * (1 - before) / (1 - left)
        self._tables = {
            "data": left.sqrt(),
            "noise": (1 - left).sqrt(),
            "whole": (1 / left).sqrt(),
            "removed": (1 / left - 1).sqrt(),
            "from data": self.betas * before.sqrt() / (1 - left),
            "from state": (1 - before) * (1 - self.betas).sqrt() / (1 - left),
            "largest": self.betas.log(),
            "smallest": torch.cat([variance[1:2], variance[1:]]).log() if len(left) > 1 else variance.log(),
        }

    def __len__(self) -> int:
        return len(self.kept)

    def _at(self, name: str, steps: Tensor) -> Tensor:
        """float32 [..., 1]."""
        return self._tables[name].to(steps.device)[steps].float()[..., None]

    def noisy(self, data: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """x at ``steps`` (int64 [...]) of ``data`` and ``noise``, float32 [..., C]."""
        return self._at("data", steps) * data + self._at("noise", steps) * noise

    def posterior(self, output: Tensor, state: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log variance of the state before, and the data, as the network sees them, float32 [..., C] each.

        Args:
            output: of the network, [..., 2 C]: noise, and where between its bounds the log variance is (-1 to 1).
            state: x, [..., C].
        """
        noise, between = output.chunk(2, -1)
        share = (between + 1) / 2
        variance = share * self._at("largest", steps) + (1 - share) * self._at("smallest", steps)
        data = self._at("whole", steps) * state - self._at("removed", steps) * noise
        return self._mean(data, state, steps), variance, data

    def _mean(self, data: Tensor, state: Tensor, steps: Tensor) -> Tensor:
        return self._at("from data", steps) * data + self._at("from state", steps) * state

    def errors(self, output: Tensor, data: Tensor, noise: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of the noise, and bound on the variance in bits, means over channels: float32 [...] each."""
        state = self.noisy(data, noise, steps)
        predicted, between = output.chunk(2, -1)
        squared = (predicted - noise).square().mean(-1)
        mean, variance, _ = self.posterior(torch.cat([predicted.detach(), between], -1), state, steps)
        true_mean, true_variance = self._mean(data, state, steps), self._at("smallest", steps).expand_as(mean)
        divergence = _normal_divergence(true_mean, true_variance, mean, variance)
        first = -_log_probability_of_byte(data, mean, variance / 2)
        bound = torch.where(steps == 0, first.mean(-1), divergence.mean(-1)) / math.log(2)
        return squared, bound

    def step_back(self, output: Tensor, state: Tensor, step: int, normal: Tensor, temperature: float) -> Tensor:
        """The state before ``step``, drawn with standard normal numbers; the first one has no noise."""
        steps = torch.full(state.shape[:-1], step, device=state.device)
        mean, variance, _ = self.posterior(output, state, steps)
        return mean if step == 0 else mean + (variance / 2).exp() * normal * temperature


def _normal_divergence(mean: Tensor, log_variance: Tensor, other: Tensor, other_log_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence of normal distributions, in nats."""
    scaled = (log_variance - other_log_variance).exp() + (mean - other).square() * (-other_log_variance).exp()
    return 0.5 * (other_log_variance - log_variance - 1 + scaled)


def _log_probability_of_byte(data: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Logarithm of the probability of the interval of width 2/255 around ``data``, open at -1 and 1 (as for images)."""

    def below(value: Tensor) -> Tensor:  # an approximation of the normal distribution, as released
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    centred, inverse = data - mean, (-log_deviation).exp()
    upper, lower = below(inverse * (centred + 1 / 255)), below(inverse * (centred - 1 / 255))
    smallest = 1e-12
    inside = (upper - lower).clamp(min=smallest).log()
    above = (1 - lower).clamp(min=smallest).log()
    ends = torch.where(data > 0.999, above, inside)
    return torch.where(data < -0.999, upper.clamp(min=smallest).log(), ends)


def truncated_normal(uniform: Tensor, mean: float, deviation: float, low: float, high: float) -> Tensor:
    """Numbers in [low, high] of a truncated normal distribution from uniform ones, float64."""
    bounds = torch.tensor([(low - mean) / deviation, (high - mean) / deviation], dtype=torch.float64)
    first, last = torch.special.ndtr(bounds).tolist()
    return (mean + deviation * torch.special.ndtri(first + uniform * (last - first))).clamp(low, high)


__all__ = ["TIMES", "Diffusion", "cosine_schedule", "evenly", "strided", "truncated_normal"]
