"""AliTok's training: two stages of three phases each, in one run."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from megavar.config.base import Section
from megavar.config.recipes.tokenizer import TokenizerTrainingConfig


class PhaseConfig(Section):
    """Consecutive steps with the same losses."""

    length: float = Field(gt=0)
    """Its length relative to the others': the phases share the run's steps in these proportions. The release gives
    numbers of steps."""
    stage: Literal[1, 2]
    """1: encoder, codes and a causal decoder with its second head. 2: another, bidirectional decoder alone, on the
    tokens of the former encoder and codes, which nothing changes any more."""
    rate: tuple[float, float] = Field((1.0, 1.0), strict=False)
    """Learning rate at its begin and end, relative to that of ``optimizer.schedule``; geometric in between."""
    perceptual: float = Field(0.0, ge=0)
    """Weight of LPIPS. It replaces ``recipe.perceptual.weight``."""
    convnext: float = Field(0.0, ge=0)
    """Weight of the distance of ConvNeXt's logits. It replaces ``recipe.convnext.weight``."""
    adversarial: bool = False
    """Whether the discriminator is trained, and heard. It replaces ``recipe.adversarial.start_step``."""

    @model_validator(mode="after")
    def _positive_rates(self) -> "PhaseConfig":
        if min(self.rate) <= 0:
            raise ValueError(f"rate {list(self.rate)} has to be positive: the learning rate is geometric in between")
        return self


RELEASED = (
    PhaseConfig(length=50_000, stage=1, perceptual=1.0, convnext=0.1),
    PhaseConfig(length=200_000, stage=1, rate=(1.0, 0.2), convnext=1.0),
    PhaseConfig(length=100_000, stage=1, rate=(0.2, 0.02), convnext=1.0, adversarial=True),
    PhaseConfig(length=50_000, stage=2, perceptual=1.0, convnext=0.1),
    PhaseConfig(length=150_000, stage=2, rate=(1.0, 0.2), convnext=1.0),
    PhaseConfig(length=100_000, stage=2, rate=(0.2, 0.02), convnext=1.0, adversarial=True),
)
"""``train_tokenizer/README_AliTok.md``, which restarts the training by hand between them."""


class AliTokTrainingConfig(TokenizerTrainingConfig):
    """AliTok's tokenizer from nothing (arXiv:2506.05289; ali-vilab/alitok ``train_tokenizer``). Which phase it is
    follows from the step, so a run may be interrupted anywhere. The learning rate, which the authors lowered by hand
    "based on the decrease in training loss", falls geometrically between the values that they name."""

    implementation: ClassVar[str] = "megavar.recipes.tokenizer.alitok:AliTokTraining"

    name: Literal["alitok"] = "alitok"  # type: ignore[assignment]
    phases: Annotated[tuple[PhaseConfig, ...], Field(min_length=1, strict=False)] = RELEASED
    """The phases in order. One whose perceptual network or discriminator has no section does without."""
    strip_weight: float = Field(10.0, ge=0)
    """Weight of the error of the second head, which makes the first patch and the first row of patches of the prefix,
    times the patches of that strip over those of the image (release: 10)."""
    clustering: bool = True
    """As the release's ``--clustering_vq``, in stage 1."""

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Beside the networks that judge, the decoder of the first stage."""
        return (*super().uncounted, "the causal decoder")

    @model_validator(mode="after")
    def _stages_in_order(self) -> "AliTokTrainingConfig":
        stages = [phase.stage for phase in self.phases]
        if stages != sorted(stages):
            raise ValueError(f"the phases have the stages {stages}: all phases of stage 1 come before those of stage 2")
        if self.trained != "all":
            raise ValueError("trained=decoder is what phases of stage 2 do: leave it out")
        return self
