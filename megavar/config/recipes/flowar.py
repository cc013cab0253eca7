"""FlowAR's training, with the two kinds of supervision of SAR's Table 1."""

from typing import ClassVar, Literal

from megavar.config.recipes.base import GeneratorRecipeChoice


class FlowARRecipeConfig(GeneratorRecipeChoice):
    """Next-scale prediction of continuous latents by flow matching."""

    implementation: ClassVar[str] = "megavar.recipes.flowar:NextScaleFlow"

    name: Literal["flowar"] = "flowar"
    supervision: Literal["latent", "image"] = "latent"
    """What a coarse scale is to be: ``latent``: the image's latent, reduced (FlowAR); ``image``: the latent of the
    reduced image (antialiased area resampling to tokens x stride pixels), as SAR's Table 1 reads; no code of that is
    public. What the next scale reads of it is ``generator.scale_inputs``."""
    posterior: Literal["sample", "mean"] = "sample"
    """Of a KL-VAE's latent: drawn anew in every epoch, one draw for all scales with latent supervision and one for each
    with image supervision (released: ``sample``), or its mean."""
