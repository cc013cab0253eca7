"""Training of image tokenizers. VAR's authors never released theirs: every default says where it comes from.

Sources: VAR (arXiv:2404.02905) Eq. 5, VQGAN (arXiv:2012.09841 and CompVis/taming-transformers), LlamaGen
(FoundationVision/LlamaGen tokenizer/tokenizer_image/vq_train.py), LPIPS (arXiv:1801.03924).
"""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from megavar.config.base import PathText, Section
from megavar.config.recipes.base import RecipeChoice


class PerceptualConfig(Section):
    """LPIPS distance on VGG-16 features. Both files are local; nothing is downloaded."""

    weight: float = Field(1.0, gt=0)
    """Weight lambda_P in VAR Eq. 5 (VQGAN and LlamaGen: 1)."""
    vgg16_weights: PathText
    """State dict of torchvision's ``vgg16`` (``vgg16-397923af.pth``, ImageNet weights). The classifier is ignored."""
    lpips_weights: PathText
    """LPIPS' linear weights for VGG-16, version 0.1: the file ``lpips/weights/v0.1/vgg.pth`` of the LPIPS package
    (keys ``lin0.model.1.weight`` to ``lin4.model.1.weight``)."""


class LogitDistanceConfig(Section):
    """TiTok's and AliTok's perceptual loss: squared distance of ConvNeXt-S' logits at 224 pixels."""

    weight: float = Field(0.1, ge=0)
    """Its weight (TiTok's second stage: 0.1; AliTok: 1). VGT-AE's ``lpips-convnext_s-1.0-0.1`` times 1.1 is 0.1 here
    beside LPIPS with weight 1."""
    weights: PathText
    """State dict of torchvision's ``convnext_small`` (``convnext_small-0c510722.pth``, ImageNet weights)."""


class AdversarialConfig(Section):
    """A discriminator of patches of the reconstruction."""

    network: Literal["patchgan", "blurred"] = "patchgan"
    """``patchgan``: pix2pix' (Isola et al. 2017), strided convolutions. ``blurred``: TiTok's, AliTok's and VGT-AE's,
    whose maps are blurred before they are halved and whose 16 x 16 logits are maxima."""
    weight: float = Field(0.5, gt=0)
    """Weight lambda_G in VAR Eq. 5, multiplied by the adaptive weight (LlamaGen: 0.5; VQGAN: 0.8)."""
    start_step: int = Field(20_000, ge=0)
    """First step with a discriminator (LlamaGen: 20000). Before it the reconstruction should already be good, else the
    discriminator wins at once."""
    loss: Literal["hinge", "non_saturating"] = "hinge"
    """``hinge`` (VQGAN, LlamaGen), or ``non_saturating``: logistic loss, -log D for the tokenizer."""
    adaptive: bool = True
    """Balance against the reconstruction (VQGAN Eq. 7): multiply by the ratio of the gradient norms of both losses at
    the decoder's last convolution."""
    adaptive_epsilon: float = Field(1e-4, gt=0)
    """Added to the denominator of that ratio (VQGAN's code)."""
    adaptive_maximum: float = Field(1e4, gt=0)
    """Upper bound of that ratio (VQGAN's code)."""
    base_channels: int = Field(64, ge=1)
    """Width of the discriminator's first convolution (pix2pix, VQGAN: 64; ``blurred``, TiTok: 128); it doubles per
    layer up to eightfold, in ``blurred`` from the second layer on."""
    layers: int = Field(3, ge=1)
    """Halvings of the resolution (pix2pix, VQGAN: 3, a receptive field of 70 pixels). Images of 16 pixels allow 2."""
    norm_groups: int = Field(32, ge=1)
    """Groups of the discriminator's GroupNorm. VQGAN uses BatchNorm, whose result depends on how a batch is split over
    ranks; 32 is the group count of the autoencoder."""
    lecam_weight: float = Field(0.0, ge=0)
    """Weight of the LeCam regularization of the discriminator (Tseng et al. 2021, arXiv:2104.03310); 0 is off."""
    lecam_decay: float = Field(0.999, gt=0, lt=1)
    """Decay of LeCam's running means of the logits (MaskGIT-VQGAN and MAGVIT: 0.999)."""

    @model_validator(mode="after")
    def _groups_divide_widths(self) -> "AdversarialConfig":
        if self.base_channels % self.norm_groups:
            raise ValueError(
                f"base_channels {self.base_channels} is not a multiple of norm_groups {self.norm_groups}: set "
                f"norm_groups to a divisor of {self.base_channels}"
            )
        return self


class CodebookConfig(Section):
    """Keeping the codebook alive: initialization from data and revival of dead codes.

    None of it is published for VAR; users who retrained its tokenizer report that the small scales collapse
    (FoundationVision/Infinity issue 80). Candidates for new codes are therefore drawn evenly from all scales, although
    the last scale has most of the tokens.
    """

    draw_from_data: bool = True
    """At step 0 replace the fresh random codebook by vectors of the first batch (k-means style seeding). A codebook
    that came with ``train.initial_weights`` is kept."""
    revive_every: int = Field(100, ge=0)
    """Every so many steps dead codes are replaced by vectors of the current batch; 0 never. 100 steps are the memory of
    the usage average below, so a revived code is judged by its own usage the next time."""
    revive_until: int | None = Field(None, ge=0)
    """No revival from this step on, so that the codebook settles (after some 75 % of the run); default: never stop."""
    dead_below: float = Field(0.05, gt=0, lt=1)
    """A code is dead if its usage is below this share of the mean usage over all codes. 0.08 of the mean is what the
    reference's own usage statistic counts as used (``VectorQuantizer2.forward``)."""
    usage_decay: float = Field(0.99, gt=0, lt=1)
    """Decay per step of the usage average (the reference's value after its first 100 steps)."""


class ReconstructionConfig(RecipeChoice):
    """What trainings of autoencoders share."""

    l2_weight: float = Field(1.0, ge=0)
    """Weight of the mean squared error in pixels (VAR Eq. 5: 1)."""
    l1_weight: float = Field(0.0, ge=0)
    """Weight of the mean absolute error in pixels (VAR has none; VQGAN: 1 in place of the squared error)."""
    perceptual: PerceptualConfig | None = None
    """Perceptual loss; needs weights on disk, so none by default. Recommended for photographs."""
    convnext: LogitDistanceConfig | None = None
    """TiTok's perceptual loss, beside or in place of LPIPS; needs weights on disk."""
    adversarial: AdversarialConfig | None = None
    """Adversarial loss; none by default. Recommended for photographs after some 20000 steps."""

    @model_validator(mode="after")
    def _something_to_reconstruct(self) -> "ReconstructionConfig":
        if self.l1_weight + self.l2_weight == 0:
            raise ValueError("l1_weight and l2_weight are both 0: at least one pixel loss has to be positive")
        return self

    @property
    def modules(self) -> tuple[str, ...]:
        """The autoencoder, and the discriminator if there is one."""
        return super().modules if self.adversarial is None else (*super().modules, "discriminator")

    def frozen_weights(self) -> dict[str, str]:
        """The perceptual networks."""
        weights = {} if self.convnext is None else {"convnext": self.convnext.weights}
        if self.perceptual is None:
            return weights
        return weights | {"vgg16": self.perceptual.vgg16_weights, "lpips": self.perceptual.lpips_weights}

    @property
    def uncounted(self) -> tuple[str, ...]:
        """The networks that judge reconstructions."""
        networks = {"the discriminator": self.adversarial, "the perceptual network": self.perceptual or self.convnext}
        return tuple(name for name, section in networks.items() if section is not None)


class TokenizerTrainingConfig(ReconstructionConfig):
    """Training of a VQ tokenizer by reconstruction: VAR Eq. 5."""

    implementation: ClassVar[str] = "megavar.recipes.tokenizer.recipe:TokenizerTraining"
    trains: ClassVar[Literal["generator", "tokenizer"]] = "tokenizer"

    name: Literal["tokenizer"] = "tokenizer"
    quantizer_weight: float = Field(1.0, ge=0)
    """Weight of the codebook and commitment loss (VAR Eq. 5: 1; the share of the commitment is the tokenizer's
    ``commitment_weight``)."""
    smaller_images: int = Field(0, ge=0)
    """Coarser scales, drawn anew in every step, whose own smaller images are reconstructed beside the full ones, for
    tokenizers whose scales do not depend on each other (FlexVAR's "multi-scale" training, of which nothing was
    published; one trains all scales in turn at one more encoding per step). Losses are the mean over all images."""
    codebook: CodebookConfig = CodebookConfig()
    """Dead codes."""
    clustering: bool = False
    """In place of ``codebook``: codes move towards the nearest vector of the batch the less they are used (online
    clustered codebook, Zheng and Vedaldi 2023, arXiv:2307.15139; AliTok's first stage and TiTok's single-stage training
    with ``clustering_vq``)."""
    clustering_decay: float = Field(0.99, gt=0, lt=1)
    """Decay per step of the usage that decides how far (both releases: 0.99)."""
    trained: Literal["all", "decoder"] = "all"
    """``decoder``: what comes after the tokens alone (TiTok's and AliTok's second stage); encoder and codes stay as
    ``train.initial_weights`` has them, and no code is replaced."""
