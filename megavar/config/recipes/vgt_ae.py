"""Training of VGT-AE, both stages."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.base import PathText, Section
from megavar.config.recipes.tokenizer import ReconstructionConfig


class LatentNoiseConfig(Section):
    """Noise on normalized latents (Eq. 5)."""

    kind: Literal["fixed", "uniform"] = "fixed"
    """``fixed``: normal with deviation ``strength`` (the paper). ``uniform``: the deviation is uniform between 0 and
    ``strength``, drawn for every sample (the released code)."""
    strength: float = Field(0.1, gt=0)
    """The paper's sigma, and the code's ``max_noise_strength`` (0.1 both; Figure 6 finds 0.4 to 0.6 best)."""


class VGTAETrainingConfig(ReconstructionConfig):
    """VGT section 3.2. The first stage trains everything, the second begins with it (``train.initial_weights``).

    ``configs/vgt`` has both stages as the paper describes them and as the released code has them, which differ: see
    ``configs/vgt/ae_stage2_release.yaml``.
    """

    implementation: ClassVar[str] = "megavar.recipes.vgt_ae:VGTAETraining"
    trains: ClassVar[Literal["generator", "tokenizer", "teacher"]] = "tokenizer"

    name: Literal["vgt_ae"] = "vgt_ae"
    encoder_weights: PathText | None = None
    """Local Hugging Face folder of the vision-language model: its vision encoder is what training begins with, and what
    self-distillation compares with. Default: random weights, for small demonstrations."""
    decoder_weights: PathText | None = None
    """Local diffusers folder of the decoder (``dc-ae-f32c32-sana-1.1-diffusers``; of Stable Diffusion's VAE, whose
    first convolution reads fewer channels and stays random), or its file. Default: random weights, as in the paper's
    Table 4 with a dagger."""
    distillation_weight: float = Field(1.0, ge=0)
    """Weight of the mean squared distance of the semantic vectors from those of the encoder before training, Eq. 3 and
    4 (first stage 1.0; second stage of the released code 0.1). Without effect where the encoder is frozen."""
    encoder: Literal["trained", "frozen"] = "trained"
    """``frozen``: projection and decoder alone are trained (the paper's second stage; the released code trains all)."""
    encoder_lr_factor: float = Field(0.5, gt=0)
    """Learning rate of the vision encoder without its projector, over that of all others (released: 0.5)."""
    noise: LatentNoiseConfig | None = None
    """Noise on latents; none in the first stage."""
    kl_weight: float = Field(1e-6, ge=0)
    """Weight of the divergence from a standard normal distribution, summed over the map, for tokenizers with a
    posterior (released: 1e-6)."""

    def frozen_weights(self) -> dict[str, str]:
        """Perceptual networks, and what training begins with."""
        own = {"encoder": self.encoder_weights, "decoder": self.decoder_weights}
        return super().frozen_weights() | {name: path for name, path in own.items() if path is not None}

    @property
    def uncounted(self) -> tuple[str, ...]:
        """The frozen encoder, too."""
        teacher = self.encoder == "trained" and self.distillation_weight > 0
        return (*super().uncounted, *(("the encoder that is distilled",) if teacher else ()))
