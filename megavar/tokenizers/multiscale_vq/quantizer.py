"""The multi-scale residual quantizer of VAR.

A feature map f [B, C, H, W] becomes K token maps, coarse to fine. Each scale quantizes what the coarser ones left over:
the residual is area-resized to the scale, every position takes its nearest code, the codes are bicubically resized back
and refined by a convolution phi, and the result is added to the accumulated map f_hat.

Sources: VAR (arXiv:2404.02905) algorithms 1 and 2; FoundationVision/VAR models/quant.py for what the paper leaves open
(resizing modes, the choice of phi, the loss). Everything here is float32: autocast is switched off and parameters held
in a shorter type are widened, because a rounded distance picks another code.
Attribute names are the published checkpoints' key names.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.tokenizers.multiscale_vq import MultiScaleVQConfig
from megavar.tokenizers.nearest import nearest, nearest_by_angle
from megavar.tokenizers.trainable import Codes, QuantizerOutput, by_side

Scale = int | tuple[int, int]
"""A token map's side length, or its (height, width)."""

PUBLISHED_PHI_INDICES = {
    8: (0, 0, 1, 1, 2, 2, 3, 3),
    9: (0, 0, 1, 1, 2, 2, 2, 3, 3),
    10: (0, 0, 1, 1, 1, 2, 2, 3, 3, 3),
    14: (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3),
}
"""Which of the 4 refinement convolutions each scale uses, by number of scales, in the published models. For 10 scales
two choices are mathematical ties that the reference decides by float64 rounding, so the result is written down here."""


def phi_indices(convolutions: int, scales: int) -> tuple[int, ...]:
    """The refinement convolution of every scale: the nearest of evenly spaced ticks to its relative depth k / (K - 1).

    Computed in float64 with the reference's own operations, because exact ties are decided by rounding; the first of
    two equals wins. Ticks start a third of a step from the ends for 4 convolutions, half a step otherwise.
    """
    if scales == 1:
        return (0,)
    if convolutions == 4 and scales in PUBLISHED_PHI_INDICES:
        return PUBLISHED_PHI_INDICES[scales]
    margin = (1 / 3 if convolutions == 4 else 1 / 2) / convolutions
    ticks = np.linspace(margin, 1 - margin, convolutions)
    return tuple(int(np.argmin(np.abs(ticks - k / (scales - 1)))) for k in range(scales))


class Refinement(nn.Conv2d):
    """phi(x) = (1 - r) x + r conv3x3(x): [B, C, H, W] -> [B, C, H, W], float32."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = abs(ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Apply phi."""
        assert self.bias is not None
        return x * (1 - self.ratio) + F.conv2d(x, self.weight.float(), self.bias.float(), padding=1) * self.ratio


class SharedRefinement(nn.Module):
    """One phi for all scales (key ``quant_resi.qresi``)."""

    def __init__(self, phi: nn.Module) -> None:
        super().__init__()
        self.qresi = phi

    def __getitem__(self, index: int) -> nn.Module:
        return self.qresi


class PartiallySharedRefinement(nn.Module):
    """A few phi, each for several neighbouring scales (keys ``quant_resi.qresi_ls.<i>``)."""

    def __init__(self, phis: list[nn.Module]) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(phis)

    def __getitem__(self, index: int) -> nn.Module:
        return self.qresi_ls[index]


def refinements(config: MultiScaleVQConfig) -> nn.Module:
    """The refinement convolutions in the container whose key names the published layout uses."""
    phis: list[nn.Module] = [
        Refinement(config.code_dimension, config.refinement_ratio)
        if abs(config.refinement_ratio) > 1e-6
        else nn.Identity()
        for _ in range(config.refinement_convolutions)
    ]
    if config.refinement == "shared":
        return SharedRefinement(phis[0])
    return PartiallySharedRefinement(phis) if config.refinement == "partially_shared" else nn.ModuleList(phis)


class ScaleStep(NamedTuple):
    """What happens at one scale. H, W is the full map, h, w the scale."""

    ids: Tensor
    """Tokens, int64 [B, h*w], row-major."""
    target: Tensor
    """The residual resized to the scale, which is what was quantized, [B, C, h, w]."""
    upsampled: Tensor
    """The chosen codes resized to the full map, [B, C, H, W]."""
    increment: Tensor
    """phi(upsampled), what the scale adds to f_hat, [B, C, H, W]."""
    accumulated: Tensor
    """f_hat after this scale, [B, C, H, W]."""


class MultiScaleQuantizer(nn.Module):
    """Features to token maps and back. ``scales`` arguments override the configured ones, also with (height, width)."""

    ema_vocab_hit_SV: Tensor

    def __init__(self, config: MultiScaleVQConfig) -> None:
        super().__init__()
        self.scales: tuple[int, ...] = config.scales
        self.parts = by_side(config.scales)
        self.vocabulary_size = config.vocabulary_size
        self.code_dimension = config.code_dimension
        self.normalized_search = config.normalized_search
        self.commitment_weight = config.commitment_weight
        self.quant_resi = refinements(config)
        self.refinement_convolutions = config.refinement_convolutions
        self.embedding = Codes(config.vocabulary_size, config.code_dimension)
        # Running mean of the usage per scale. Part of the published checkpoints, unused in encoding and decoding; the
        # training recipe keeps it up to date and finds dead codes with it.
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(config.scales), config.vocabulary_size))
        self._phi_of_scale: dict[int, tuple[int, ...]] = {}

    @property
    def usage_average(self) -> Tensor:
        """Running mean of the usage of each code per scale, float32 [K, V]."""
        return self.ema_vocab_hit_SV

    def phi(self, k: int, scales: int | None = None) -> nn.Module:
        """The refinement of scale ``k`` of ``scales`` (default: the configured number)."""
        count = scales or len(self.scales)
        if count not in self._phi_of_scale:
            self._phi_of_scale[count] = phi_indices(self.refinement_convolutions, count)
        return self.quant_resi[self._phi_of_scale[count][k]]  # type: ignore[index]

    def embed(self, ids: Tensor) -> Tensor:
        """Code vectors of tokens: int64 [...] -> float32 [..., C]."""
        return self.embedding(ids)

    def nearest(self, vectors: Tensor) -> Tensor:
        """The nearest code of every vector: float32 [N, C] -> int64 [N]. Ties go to the lower index."""
        return (nearest_by_angle if self.normalized_search else nearest)(vectors, self.embedding())

    def steps(self, features: Tensor, scales: Sequence[Scale] | None = None) -> Iterator[ScaleStep]:
        """Quantize scale by scale. Gradients reach the codes and phi, not ``features`` (float32 [B, C, H, W])."""
        shapes = [height_width(scale) for scale in scales or self.scales]
        if tuple(features.shape[-2:]) != shapes[-1]:
            raise ValueError(
                f"the feature map is {features.shape[-2]}x{features.shape[-1]} but the last scale is "
                f"{shapes[-1][0]}x{shapes[-1][1]}: images of another size need another list of scales"
            )
        rest = features.detach()
        accumulated = torch.zeros_like(rest)
        for k, shape in enumerate(shapes):
            last = k == len(shapes) - 1
            target = rest if last else F.interpolate(rest, size=shape, mode="area")
            ids = self.nearest(target.permute(0, 2, 3, 1).reshape(-1, self.code_dimension)).view(len(features), -1)
            upsampled = self.upsample(self._as_map(self.embed(ids), shape), shapes[-1])
            increment = self.phi(k, len(shapes))(upsampled)
            accumulated = accumulated + increment
            rest = rest - increment.detach()
            yield ScaleStep(ids, target, upsampled, increment, accumulated)

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantize for training: [B, C, H, W] of any float type -> f_hat (straight through), loss, ids, usage.

        loss = mean over scales k of [beta * mse(sg(f_hat_k), f) + mse(f_hat_k, sg(f))].
        """
        with torch.autocast(features.device.type, enabled=False):
            f = features.float()
            loss = f.new_zeros(())
            ids, targets, usage = [], [], []
            for step in self.steps(f):
                loss = (
                    loss
                    + self.commitment_weight * F.mse_loss(step.accumulated.detach(), f)
                    + F.mse_loss(step.accumulated, f.detach())
                )
                ids.append(step.ids)
                targets.append(step.target.flatten(2).transpose(1, 2))
                usage.append(torch.bincount(step.ids.flatten(), minlength=self.vocabulary_size).float())
            features = (step.accumulated.detach() - f.detach()) + f
            return QuantizerOutput(features, loss / len(ids), ids, torch.cat(targets, dim=1), torch.stack(usage))

    def split(self, ids: Tensor, scales: Sequence[Scale] | None = None) -> list[Tensor]:
        """Tokens [B, L] of all scales, or of the first few, as one map [B, h_k * w_k] per scale.

        Raises:
            ValueError: L is the length of no number of scales.
        """
        maps, start = [], 0
        for height, width in map(height_width, scales or self.scales):
            if start == ids.shape[1]:
                break
            maps.append(ids[:, start : start + height * width])
            start += height * width
        if start != ids.shape[1]:
            raise ValueError(f"{ids.shape[1]} tokens are not those of the first of the scales {scales or self.scales}")
        return maps

    @torch.no_grad()
    def quantize(self, features: Tensor, scales: Sequence[Scale] | None = None) -> list[Tensor]:
        """Token maps of a feature map [B, C, H, W]: int64 [B, h_k * w_k] per scale, row-major."""
        with torch.autocast(features.device.type, enabled=False):
            return [step.ids for step in self.steps(features.float(), scales)]

    def accumulate(self, ids: Sequence[Tensor], scales: Sequence[Scale] | None = None) -> list[Tensor]:
        """The accumulated map f_hat after every given scale, float32 [B, C, H, W] each.

        Fewer token maps than scales give as many results: what the first scales alone reconstruct.
        """
        shapes = [height_width(scale) for scale in scales or self.scales]
        f_hat = self.embedding.weight.new_zeros(len(ids[0]), self.code_dimension, *shapes[-1], dtype=torch.float32)
        maps = []
        for k, (tokens, shape) in enumerate(zip(ids, shapes)):
            f_hat = self._add(k, f_hat, self._as_map(self.embed(tokens), shape), len(shapes))
            maps.append(f_hat)
        return maps

    def teacher_forcing_input(self, ids: Sequence[Tensor], scales: Sequence[Scale] | None = None) -> Tensor:
        """What an autoregressive model reads when it predicts scales 1..K-1: float32 [B, L - L_0, C].

        For every scale but the first, the map accumulated so far, area-resized to that scale; row-major, in order. The
        first scale is predicted from the condition alone. (The reference's ``idxBl_to_var_input``.)
        """
        shapes = [height_width(scale) for scale in scales or self.scales]
        maps = self.accumulate(ids[: len(shapes) - 1], scales) if len(shapes) > 1 else []
        inputs = [
            F.interpolate(f_hat, size=shape, mode="area").flatten(2).transpose(1, 2)
            for f_hat, shape in zip(maps, shapes[1:])
        ]
        return torch.cat(inputs, dim=1) if inputs else self.embed(ids[0][:, :0])

    def next_input(
        self,
        k: int,
        f_hat: Tensor,
        codes: Tensor,
        scales: Sequence[Scale] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One decoding step: add the codes of scale ``k`` and prepare the input of the next scale.

        Args:
            k: the scale that was just predicted.
            f_hat: the map accumulated before it, float32 [B, C, H, W] (zeros before the first scale).
            codes: its code vectors, [B, C, h_k, w_k].
            scales: overrides the configured scales.

        Returns:
            the new f_hat [B, C, H, W], and f_hat area-resized to scale k + 1 (f_hat itself after the last scale).
        """
        shapes = [height_width(scale) for scale in scales or self.scales]
        f_hat = self._add(k, f_hat, codes, len(shapes))
        return f_hat, f_hat if k == len(shapes) - 1 else F.interpolate(f_hat, size=shapes[k + 1], mode="area")

    def upsample(self, codes: Tensor, shape: tuple[int, int]) -> Tensor:
        """Bicubic resize to the full map; a map that already has its size is left alone."""
        same = tuple(codes.shape[-2:]) == shape
        return codes if same else F.interpolate(codes, size=shape, mode="bicubic", align_corners=False)

    def _add(self, k: int, f_hat: Tensor, codes: Tensor, scales: int) -> Tensor:
        with torch.autocast(f_hat.device.type, enabled=False):
            full = (f_hat.shape[-2], f_hat.shape[-1])
            return f_hat.float() + self.phi(k, scales)(self.upsample(codes.float(), full))

    @staticmethod
    def _as_map(vectors: Tensor, shape: tuple[int, int]) -> Tensor:
        return vectors.transpose(1, 2).reshape(len(vectors), -1, *shape)


def height_width(scale: Scale) -> tuple[int, int]:
    """Height and width of a token map."""
    return (scale, scale) if isinstance(scale, int) else (int(scale[0]), int(scale[1]))
