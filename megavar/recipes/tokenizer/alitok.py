"""Training of AliTok's tokenizer (arXiv:2506.05289 section 3; ali-vilab/alitok ``train_tokenizer``), in one run.

    stage 1: tokens = encoder(image), image and strip = causal decoder(tokens)
             loss   = pixels + 10 P / (h w) pixels(strip) + q + perceptual losses + realism
             so that every token helps those after it; the strip is what the prefix alone stands for
    stage 2: the encoder and its codes stay; another decoder, which sees all tokens, learns to make the image
             loss   = pixels + perceptual losses + realism

Each stage has three phases: with LPIPS, without it at a falling learning rate, and with a discriminator. Which phase it
is follows from the step alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megavar.config.recipes.alitok import AliTokTrainingConfig, PhaseConfig
from megavar.config.tokenizers.alitok import AliTokConfig
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.errors import ConfigError
from megavar.parallel.parameter_rule import ParameterRule
from megavar.recipes.base import Parts, Pass, WriteRows
from megavar.recipes.tokenizer.recipe import TokenizerInputs, TokenizerTraining
from megavar.recipes.tokenizer.reconstruction import LossWeights, ReconstructionTraining
from megavar.tokenizers.alitok.stages import TwoDecoders


class Timetable:
    """The phases of a run of ``steps`` steps."""

    def __init__(self, phases: Sequence[PhaseConfig], steps: int) -> None:
        self.phases = tuple(phases)
        whole = sum(phase.length for phase in phases)
        self.ends = [round(steps * sum_ / whole) for sum_ in accumulate(phase.length for phase in phases)]
        """First step after each phase."""

    def at(self, step: int) -> tuple[PhaseConfig, float]:
        """The phase of a step, and how much of it lies before the step, in [0, 1)."""
        number = next((number for number, end in enumerate(self.ends) if step < end), len(self.ends) - 1)
        begin = self.ends[number - 1] if number else 0
        return self.phases[number], (step - begin) / max(1, self.ends[number] - begin)

    @property
    def second_stage(self) -> int:
        """First step of stage 2; after the last one if there is none."""
        before = [end for phase, end in zip(self.phases, self.ends) if phase.stage == 1]
        return before[-1] if before else 0


class AliTokTraining(TokenizerTraining):
    """Trains a :class:`TwoDecoders`."""

    config: AliTokTrainingConfig
    tokenizer: TwoDecoders

    def __init__(
        self,
        config: AliTokTrainingConfig,
        tokenizer: TokenizerChoice,
        seed: int,
        device: torch.device,
        fresh: bool = True,
        *,
        steps: int,
    ) -> None:
        """As :class:`TokenizerTraining`, for a run of ``steps`` steps.

        Raises:
            ConfigError: the tokenizer is not AliTok's, or its prefix is no strip of patches.
        """
        super().__init__(config, tokenizer, seed, device, fresh)
        self.timetable = Timetable(config.phases, steps)

    @classmethod
    def build(cls, parts: Parts) -> "AliTokTraining":
        """See :meth:`Recipe.build`."""
        config = parts.config
        assert isinstance(config.recipe, AliTokTrainingConfig)
        fresh = config.train.initial_weights is None
        return cls(config.recipe, config.tokenizer, config.train.seed, parts.device, fresh, steps=parts.steps)

    def trainable(self, choice: TokenizerChoice) -> Any:
        """AliTok with both decoders."""
        if not isinstance(choice, AliTokConfig) or choice.causal:
            raise ConfigError(
                f"recipe.name=alitok trains AliTok's tokenizer with both of its decoders, and tokenizer.name="
                f"{choice.name} is configured otherwise. Choose tokenizer.name=alitok, with causal=false."
            )
        if choice.prefix != choice.side + 1 and self.config.strip_weight > 0:
            raise ConfigError(
                f"tokenizer.prefix={choice.prefix}, but the second head makes the first patch and the first row of "
                f"{choice.side} patches. Set tokenizer.prefix={choice.side + 1}, or recipe.strip_weight=0."
            )
        return TwoDecoders(choice)

    def phase(self, step: int) -> PhaseConfig:
        """The phase of a step."""
        return self.timetable.at(step)[0]

    def rule(self, module: str, parameter: str) -> ParameterRule:
        """The decoder of stage 2 is trained in it, everything else before."""
        rule, second = super().rule(module, parameter), self.timetable.second_stage
        if module != "autoencoder" or second == self.timetable.ends[-1]:
            return replace(rule, frozen=module == "autoencoder" and parameter.startswith("decoder."))
        return replace(rule, first_step=second) if parameter.startswith("decoder.") else replace(rule, end_step=second)

    def rate_factor(self, step: int) -> float:
        """Geometric from the begin of a phase to its end."""
        phase, done = self.timetable.at(step)
        begin, end = phase.rate
        return begin * (end / begin) ** done

    def weights(self, step: int) -> LossWeights:
        """Those of the phase."""
        phase = self.phase(step)
        return super().weights(step)._replace(perceptual=phase.perceptual, convnext=phase.convnext)

    def active(self, module: str, step: int) -> bool:
        """The discriminator is trained, and its loss applied, in the phases that say so."""
        return module == "autoencoder" or (self.discriminator is not None and self.phase(step).adversarial)

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """Those of all tokenizers, by the decoder of the stage."""
        self.tokenizer.enter(self.phase(step).stage)
        return super().passes(module, step)

    def beside(self, output: Any, inputs: TokenizerInputs) -> tuple[Tensor | float, dict[str, Tensor]]:
        """The error of the strip."""
        if output.strip is None or self.config.strip_weight == 0:
            return 0.0, {}
        error = (output.strip.float() - self.tokenizer.strip(inputs.images)).square().mean()
        choice = self.tokenizer.config
        weight = self.config.l2_weight * self.config.strip_weight * choice.prefix / choice.side**2
        return weight * error, {"strip_squared_error": error}

    def after_step(self, step: int, write_rows: WriteRows) -> None:
        """Codes move in stage 1 only."""
        if self.phase(step).stage == 1:
            super().after_step(step, write_rows)
        else:
            ReconstructionTraining.after_step(self, step, write_rows)
