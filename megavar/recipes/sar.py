"""SAR: self-autoregressive refinement (``papers/sar.md`` section 4.2, Alg. 1; GengzeZhou/SAR ``trainer.py``).

    pass 1   teacher forcing: logits = generator(label, true inputs); loss L_TF                  Eq. 7, 9
             rollout: tokens drawn from these logits, shifted: the inputs of scale k are made of
             the tokens drawn at scale k - 1                                                     Eq. 5
    pass 2   student forcing: generator(label, those inputs) at one scale, or all; loss L_CSF    Eq. 8, 10
    loss     L_TF + gamma L_CSF                                                                  Eq. 11

Nothing is differentiated through drawn tokens. On a residual pyramid (VAR) the inputs of scale k are the true map up to
scale k - 2 and the residual drawn at k - 1; on FlexVAR's independent scales the latter alone.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megavar.config.recipes.sar import SARConfig
from megavar.data.batch import Batch
from megavar.generators.base import GeneratorOutput
from megavar.generators.inputs import ScaleInputs
from megavar.parallel import seeds
from megavar.parallel.vocabulary import all_logits, vocabulary_best, vocabulary_cross_entropy
from megavar.recipes.base import Losses, Pass
from megavar.recipes.next_scale import NextScale, NextScaleInputs
from megavar.recipes.rollouts import Rollout, bounds_of, uniform_of


@dataclass
class SARInputs(NextScaleInputs):
    """A prepared micro-batch."""

    uniform: Tensor = field(default_factory=lambda: torch.empty(0))
    """float64 [B, L]: decides what the rollout draws; a function of (seed, epoch, sample, position)."""
    student_labels: Tensor = field(default_factory=lambda: torch.empty(0))
    """int64 [B]: labels of the second pass."""
    student_keys: Tensor | None = None
    """int64 [B]: for drop path in the second pass."""
    drawn: Tensor = field(default_factory=lambda: torch.empty(0))
    """int64 [B, L]: what the rollout drew at the scales that the second pass needs; the true tokens elsewhere."""
    teacher: Tensor = field(default_factory=lambda: torch.empty(0))
    """Targets of the second pass where they are neither drawn nor true: the most likely tokens int64 [B, L], or the
    teacher-forced logits at the second pass's scales, float32 [B, rows, V]."""


class SAR(NextScale):
    """Two passes; everything else is next-scale prediction."""

    config: SARConfig

    @functools.cached_property
    def rollout(self) -> Rollout:
        """What draws tokens."""
        return Rollout(self.config.rollout, self.classes)

    def prepare(self, batch: Batch, step: int) -> SARInputs:
        """Teacher-forcing inputs, and what the second pass draws from."""
        given = super().prepare(batch, step)
        labels = given.model.labels
        if self.config.independent_label_drop:
            labels = self.labels(batch, "label_drop_student")
        return SARInputs(
            given.model,
            given.targets,
            given.terms,
            uniform=uniform_of(batch, given.targets.shape[1], self.seed),
            student_labels=labels,
            student_keys=seeds.random_bits(self.seed, "drop_path_student", batch.epochs, batch.sample_ids),
        )

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """Teacher forcing with a rollout, then student forcing: of all scales at once, or scale by scale."""
        sides = self.scale_lists.of_step(step)
        scales = self.student_scales(len(sides), step)
        if not scales:  # FlexVAR's lists have more, but a list of one scale has nothing to refine
            return super().passes(module, step)
        first = Pass(
            self.teacher_forward,
            self.teacher_loss,
            carry=functools.partial(self.roll_out, scales=scales),
            following=functools.partial(self.with_drawn, scales=scales),
            copies=self.rollout.copies,
        )
        weight = self.config.student_weight
        groups = [scales] if self.config.context == "prefix" else [(scale,) for scale in scales]
        students = [
            Pass(
                functools.partial(self.student_forward, scales=group),
                functools.partial(self.student_loss, scales=group, of=scales),
                balance=weight,
            )
            for group in groups
        ]
        return [first, *students]

    def student_scales(self, count: int, step: int) -> tuple[int, ...]:
        """Numbers of the scales that the second pass of a step predicts."""
        if self.config.student_scales == "all":
            return tuple(range(1, count))
        if self.config.student_scales == "last" or count < 3:
            return (count - 1,) if count > 1 else ()
        return (1 + int(seeds.random_bits(self.seed, "student_scale", step)) % (count - 1),)

    # -- first pass -------------------------------------------------------------------------------------------------

    def teacher_forward(self, model: Callable[[ScaleInputs], Any], inputs: SARInputs) -> Any:
        """Eq. 7; with guidance for the same images without class, too."""
        return model(self.rollout.doubled(inputs.model))

    def teacher_loss(self, output: GeneratorOutput, inputs: SARInputs) -> Losses:
        """Eq. 9, of the images with their classes."""
        return self.loss(self.rollout.conditional(output), inputs)

    @torch.no_grad()
    def roll_out(self, output: GeneratorOutput, inputs: SARInputs, scales: tuple[int, ...]) -> Tensor:
        """Tokens drawn from teacher-forced predictions [B, L]; with soft targets also their logits, as float32."""
        drawn = inputs.targets.clone()
        bounds = self.bounds(inputs)
        for scale in self._rolled(scales, len(bounds)):
            rows = slice(*bounds[scale])
            drawn[:, rows] = self.rollout.draw(output.prediction[:, rows], inputs.uniform[:, rows], scale, len(bounds))
        if self.config.target == "most_likely":
            best = vocabulary_best(self.rollout.conditional(output).prediction)
            return torch.cat([drawn, best], 1)
        if self.config.target != "soft":
            return drawn
        kept = [all_logits(output.prediction[: len(drawn), slice(*bounds[scale])]).flatten(1) for scale in scales]
        return torch.cat([drawn.float(), *kept], 1)  # ids are exact in float32 below 2^24

    def _rolled(self, scales: tuple[int, ...], count: int) -> list[int]:
        """Scales whose tokens are needed: inputs of the second pass, and its targets."""
        inputs = range(max(scales, default=0)) if self.config.context == "prefix" else (scale - 1 for scale in scales)
        targets = scales if self.config.target == "drawn" else ()
        return sorted({*inputs, *targets})

    def with_drawn(self, inputs: SARInputs, carried: Tensor, scales: tuple[int, ...]) -> SARInputs:
        """Inputs of the second pass, from what :meth:`roll_out` carried."""
        length = inputs.targets.shape[1]
        drawn, rest = carried[:, :length].long(), carried[:, length:]
        if self.config.target == "most_likely":
            return replace(inputs, drawn=drawn, teacher=rest)
        if self.config.target == "soft":
            assert self.tokenizer.space.vocabulary is not None
            return replace(inputs, drawn=drawn, teacher=rest.unflatten(1, (-1, self.tokenizer.space.vocabulary)))
        return replace(inputs, drawn=drawn)

    # -- second pass ------------------------------------------------------------------------------------------------

    def student_forward(self, model: Callable[[ScaleInputs], Any], inputs: SARInputs, scales: tuple[int, ...]) -> Any:
        """Eq. 8, with the whole prefix or without."""
        given = replace(inputs.model, labels=inputs.student_labels, sample_keys=inputs.student_keys)
        if self.config.context == "prefix":
            every = range(1, len(self.bounds(inputs)))
            return model(replace(given, features=torch.cat([self.student_features(inputs, k) for k in every], 1)))
        (scale,) = scales
        return model(
            replace(
                given,
                features=self.student_features(inputs, scale),
                only=(0, scale),
                start_position=self.config.start_position,
            )
        )

    def student_features(self, inputs: SARInputs, scale: int) -> Tensor:
        """What the generator reads to predict ``scale`` after the tokens drawn at the scale before: [B, L_k, D]."""
        bounds = self.bounds(inputs)
        before = slice(*bounds[scale - 1])
        mixed = inputs.targets.clone()
        mixed[:, before] = inputs.drawn[:, before]
        first = bounds[0][1]
        start, stop = (row - first for row in bounds[scale])
        return self.tokenizer.inputs(mixed, inputs.model.sides)[:, start:stop]

    def student_loss(
        self, output: GeneratorOutput, inputs: SARInputs, scales: tuple[int, ...], of: tuple[int, ...]
    ) -> Losses:
        """gamma times Eq. 10: the mean over the tokens of all scales ``of``, of which ``scales`` are predicted here."""
        bounds = self.bounds(inputs)
        sizes = {scale: bounds[scale][1] - bounds[scale][0] for scale in of}
        losses = []
        for scale in scales:
            stop = bounds[scale][1] if self.config.context == "prefix" else bounds[0][1] + sizes[scale]
            losses.append(self._compare(output.prediction[:, stop - sizes[scale] : stop], inputs, scale, of))
        total = torch.cat(losses, 1).sum(1) / sum(sizes.values())
        zero = total.new_zeros(())
        share = sum(sizes[scale] for scale in scales)
        student = (torch.cat(losses, 1).detach().sum(), share * len(total))
        weighted = self.config.student_weight * total.sum()
        return Losses(zero, {}, means={"loss/student": student}, per_image=weighted)

    def _compare(self, logits: Tensor, inputs: SARInputs, scale: int, of: tuple[int, ...]) -> Tensor:
        """Cross entropy per token of one scale, [B, L_k]."""
        rows = slice(*self.bounds(inputs)[scale])
        target, smoothing = self.config.target, self.config.label_smoothing
        if target == "soft":
            bounds = self.bounds(inputs)
            start = sum(bounds[k][1] - bounds[k][0] for k in of if k < scale)
            teacher = inputs.teacher[:, start : start + rows.stop - rows.start].softmax(-1)
            return -(teacher * F.log_softmax(all_logits(logits), -1)).sum(-1)
        wanted = {"drawn": inputs.drawn, "most_likely": inputs.teacher, "true": inputs.targets}[target]
        return vocabulary_cross_entropy(logits, wanted[:, rows].contiguous(), smoothing)

    def bounds(self, inputs: SARInputs) -> list[tuple[int, int]]:
        """(first row, row after the last) of each scale."""
        return bounds_of(self.sides(inputs))
