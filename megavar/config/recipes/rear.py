"""RAR's and reAR's next-token prediction."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from megavar.config.base import Section
from megavar.config.generators.base import GeneratorChoice
from megavar.config.noise import NoiseConfig
from megavar.config.recipes.base import GeneratorRecipeChoice


class RandomOrderConfig(Section):
    """RAR's annealed permutations: a sample is read in random order with a probability that falls from 1 to 0."""

    from_progress: float = Field(0.5, ge=0, le=1)
    """Until this share of the run every sample is permuted (RAR: step 125,000 of 250,000)."""
    until_progress: float = Field(0.75, ge=0, le=1)
    """From this share on none is (RAR: step 187,500)."""

    @model_validator(mode="after")
    def _falls(self) -> "RandomOrderConfig":
        if self.until_progress < self.from_progress:
            raise ValueError(f"until_progress={self.until_progress} is before from_progress={self.from_progress}")
        return self

    def share(self, progress: float) -> float:
        """Probability of a random order at progress t in [0, 1]."""
        if progress >= self.until_progress:
            return 0.0
        length = self.until_progress - self.from_progress
        return min(1.0, (self.until_progress - progress) / length)


class ReARConfig(GeneratorRecipeChoice):
    """Next-token prediction on grids and lines: plain, RAR (``random_order``), or reAR (``noise`` and its term).

    reAR: noisy contexts by the truncated schedule, raster order, and a codebook-embedding regularization.
    """

    implementation: ClassVar[str] = "megavar.recipes.rear:NextToken"

    name: Literal["rear"] = "rear"
    noise: NoiseConfig | None = None
    """Noisy contexts (reAR Eq. 4); none by default."""
    random_order: RandomOrderConfig | None = None
    """Annealed permutations (RAR); none by default."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing of the cross entropy (RAR: 0)."""

    def check(self, generator: GeneratorChoice | None) -> None:
        """Rows of a generator for random orders must know which token they predict."""
        if self.random_order is not None and generator is not None and not generator.any_order:
            raise ValueError(
                f"recipe.random_order reads images in random order, but rows of the generator {generator.name!r} do "
                f"not know which token they predict. Remove recipe.random_order, choose generator.name=rar, or set "
                f"generator.target_positions=true where the generator has that key"
            )
