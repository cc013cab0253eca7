"""Per-image similarity of pairs of images: PSNR and SSIM; LPIPS is in ``megavar.tokenizers.perceptual``."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

SSIM_WINDOW = 7


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair of float images [B, 3, H, W] in [0, 1]: float64 [B].

    ``10 log10(1 / MSE)`` with the error averaged over all 3HW values; infinite for identical images.
    """
    error = (first.double() - second.double()).square().mean(dim=(1, 2, 3))
    return -10 * error.log10()


def ssim(first: Tensor, second: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Structural similarity of each pair of float images [B, 3, H, W] in [0, 1]: float64 [B].

    scikit-image's definition and defaults: uniform 7x7 window, sample covariance, borders left out, mean over channels.
    ``data_range=2`` is what LlamaGen and VGT pass for images in [0, 1]; it inflates the score (0.47 becomes 0.59).
    """
    x, y = first.double(), second.double()

    def local_mean(values: Tensor) -> Tensor:
        return functional.avg_pool2d(values, SSIM_WINDOW, stride=1)

    sample = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x = sample * (local_mean(x * x) - mean_x * mean_x)
    variance_y = sample * (local_mean(y * y) - mean_y * mean_y)
    covariance = sample * (local_mean(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))
