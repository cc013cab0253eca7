"""Visual generation tuning of a language model."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.recipes.base import GeneratorRecipeChoice


class VGTConfig(GeneratorRecipeChoice):
    """VGT section 3.3 on latents of a frozen autoencoder, by flow matching; pretraining and fine-tuning alike.

    The defaults are the released code's where it is more precise than the paper.
    """

    implementation: ClassVar[str] = "megavar.recipes.vgt:QueryFlow"

    name: Literal["vgt"] = "vgt"
    permutation: Literal["batch", "sample"] = "batch"
    """The order of places: one for all samples of a step (released: of a rank's micro-batch, which would depend on the
    layout here), or one for each sample."""
    times: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of flow times before they are shifted (released: ``sample_t`` "logit-normal", "auto")."""
    time_shift: float = Field(2**0.5, ge=1)
    """alpha = sqrt(m / n) with m = 16 x 16 x 32 latent values and n = 4096: 1.414; released for InternVL3 1.4, for
    Qwen2.5-VL none, which is 1."""
    time_shift_towards: Literal["noise", "data"] = "noise"
    """Where times are shifted to. ``noise``: released, and SD3's. ``data``: what the paper's formula does as printed,
    with data at t = 1."""
    posterior: Literal["sample", "mean"] = "mean"
    """Of an autoencoder with a posterior (a KL-VAE as in Table 7): its mean, or a sample in every epoch. VGT-AE has
    none."""
