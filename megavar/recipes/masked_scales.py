"""SAR's hybrid: masked prediction up to the first map, then scales (Table 2; GengzeZhou/SAR ``scalear_trainer.py``).

    first map     mask int(n r) of its n tokens, r from a cut-off normal distribution; predict these
    later maps    predict all tokens of a map from the map before it, resized
    loss          mean cross entropy over the tokens that are predicted

A step is a sequence of calls, each with a loss at some maps. Later ones are made of tokens that one call draws;
nothing is differentiated through them.

    teacher       all maps, after true tokens
    full          the first map; then for each later one, a call with all maps up to it, all of them drawn
    alternate     teacher in even steps, full in odd ones
    interleave    maps 0, 2, 4, ... after true tokens; then maps 1, 3, 5, ... after drawn ones
    hybrid        all maps up to a side after true tokens; then a call for each finer one, after drawn ones
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megavar.config.recipes.masked_scales import MaskedScalesConfig
from megavar.data.batch import Batch
from megavar.generators.base import GeneratorOutput
from megavar.generators.scalear import ScaleARInputs
from megavar.parallel import seeds
from megavar.parallel.vocabulary import scores
from megavar.recipes.base import Count, Losses, Pass
from megavar.recipes.next_scale import NextScale, NextScaleInputs
from megavar.recipes.rollouts import Rollout, bounds_of, uniform_of


@dataclass
class MaskedScalesInputs(NextScaleInputs):
    """A prepared micro-batch. ``model`` describes the teacher-forced call with all maps."""

    masked: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    """bool [copies B, L_0]: what is hidden of the first map; with guidance the copies without class have masks of their
    own."""
    uniform: Tensor = field(default_factory=lambda: torch.empty(0))
    """float64 [B, L]: decides what is drawn; a function of (seed, epoch, sample, position)."""
    drawn: Tensor | None = None
    """int64 [B, L]: tokens that were drawn so far, true ones elsewhere."""


@dataclass(frozen=True)
class Call:
    """One run of the generator."""

    maps: tuple[int, ...]
    """Numbers of the maps in the sequence."""
    learned: tuple[int, ...]
    """Of these, the maps with a loss."""
    student: bool
    """Whether maps are made of drawn tokens, and the first one is not masked."""
    raw: bool = False
    """Student forcing: whether maps before the last one stand there themselves (public code's ``full``) instead of what
    predicts them."""
    drawn: tuple[tuple[int, float], ...] = ()
    """Maps whose tokens are drawn for later calls, and how far along each is for guidance, from 0 to 1."""


class MaskedScales(NextScale):
    """Calls with a loss each, on one batch."""

    config: MaskedScalesConfig

    @functools.cached_property
    def rollout(self) -> Rollout:
        """What draws tokens."""
        return Rollout(self.config.rollout, self.classes)

    # -- the step's plan --------------------------------------------------------------------------------------------

    def calls(self, step: int) -> list[Call]:
        """The calls of a step, in order."""
        sides = self.scale_lists.of_step(step)
        every = tuple(range(len(sides)))
        along = tuple(number / max(len(sides) - 1, 1) for number in every)
        schedule = self.config.schedule
        if schedule == "alternate":
            schedule = "full" if step % 2 else "teacher"
        if schedule == "full":
            first = Call((0,), (0,), False, drawn=((0, 1.0),))
            return [first, *(Call(every[: k + 1], (k,), True, True, ((k, along[k]),)) for k in every[1:])]
        if schedule == "interleave":
            true, own = every[::2], every[1::2]
            drawn = tuple((k, place / max(len(true) - 1, 1)) for place, k in enumerate(true))
            first = Call(true, true, False, drawn=drawn)
            return [first, Call(own, own, True)] if own else [first]
        if schedule == "hybrid":
            true = tuple(k for k in every if k == 0 or sides[k] <= self.config.true_until)
            first = Call(true, true, False, drawn=((true[-1], along[true[-1]]),))
            return [first, *(Call((k,), (k,), True, drawn=((k, along[k]),)) for k in every[len(true) :])]
        return [Call(every, every, False)]

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """A pass for each call; all but the last draw tokens for those that follow."""
        calls = self.calls(step)
        passes = []
        for number, call in enumerate(calls):
            draws = number + 1 < len(calls)
            forward = functools.partial(self.call, call=call, doubled=draws)
            loss = functools.partial(self.loss_of, call=call, doubled=draws)
            carry = functools.partial(self.roll_out, call=call) if draws else None
            following = functools.partial(self.with_drawn, call=call) if draws else None
            copies = self.rollout.copies if draws else 1
            passes.append(Pass(forward, loss, carry, following, balance=1 / len(calls), copies=copies))
        return passes

    # -- inputs -----------------------------------------------------------------------------------------------------

    def hidden_tokens(self, step: int, size: int) -> int:
        """How many of the first map's ``size`` tokens a step masks."""
        config = self.config
        if config.mask_ratio is not None:
            return max(int(size * config.mask_ratio), 1)
        normal = torch.distributions.Normal(0.0, 1.0)
        lowest = (config.smallest_mask_ratio - config.mask_ratio_mean) / config.mask_ratio_deviation
        cut = normal.cdf(torch.tensor(lowest))
        place = float(seeds.uniform(self.seed, "mask_ratio", step))
        ratio = config.mask_ratio_mean + config.mask_ratio_deviation * float(normal.icdf(cut + (0.5 - cut) * place))
        return max(int(size * ratio), 1)

    @torch.no_grad()
    def prepare(self, batch: Batch, step: int) -> MaskedScalesInputs:
        """Tokens, what is masked, and what the rollouts draw from."""
        given = super().prepare(batch, step)
        sides, ids = given.model.sides, given.targets
        assert sides is not None
        size = sides[0] ** 2
        places = torch.arange(size, device=ids.device)
        who = batch.epochs[:, None], batch.sample_ids[:, None], places
        draws = torch.cat([seeds.uniform(self.seed, stream, *who) for stream in ("masked", "masked_free")])
        masked = draws.argsort(1).argsort(1) < self.hidden_tokens(step, size)
        model = given.model
        assert model.features is not None
        features = torch.cat([self.tokenizer.embed(ids[:, :size]), model.features], 1)
        inputs = ScaleARInputs(model.labels, features, model.sample_keys, sides, masked=masked[: len(ids)])
        return MaskedScalesInputs(
            inputs, ids, given.terms, masked=masked, uniform=uniform_of(batch, ids.shape[1], self.seed)
        )

    def valid(self, batch: Batch, step: int) -> Count:
        """Masked tokens of the first map, all of later ones."""
        sides = self.scale_lists.of_step(step)
        tokens = len(batch) * (self.hidden_tokens(step, sides[0] ** 2) + sum(side * side for side in sides[1:]))
        return tokens if self.scale_lists.shared else torch.tensor(tokens, device=batch.labels.device)

    def inputs_of(self, inputs: MaskedScalesInputs, call: Call) -> ScaleARInputs:
        """What the generator gets, [B]."""
        bounds, sides = self.bounds(inputs), inputs.model.sides
        assert sides is not None and inputs.model.features is not None
        features = inputs.model.features
        if call.student:
            assert inputs.drawn is not None
            first = inputs.drawn[:, : bounds[0][1]]
            features = torch.cat([self.tokenizer.embed(first), self.tokenizer.inputs(inputs.drawn, sides)], 1)
        parts = [features[:, slice(*bounds[k])] for k in call.maps]
        if call.raw:
            assert inputs.drawn is not None
            for place, k in enumerate(call.maps[:-1]):
                parts[place] = self.tokenizer.embed(inputs.drawn[:, slice(*bounds[k])])
        assert isinstance(inputs.model, ScaleARInputs)
        masked = None if call.student else inputs.model.masked
        chosen = tuple(sides[k] for k in call.maps)
        return replace(inputs.model, features=torch.cat(parts, 1), sides=chosen, masked=masked)

    def call(self, model: Callable[[ScaleARInputs], Any], inputs: MaskedScalesInputs, call: Call, doubled: bool) -> Any:
        """Run the generator; with guidance for the same images without class, too."""
        given = self.inputs_of(inputs, call)
        if doubled and self.rollout.config.guided:
            masked = None if given.masked is None else inputs.masked
            twice = self.rollout.doubled(given)
            assert isinstance(twice, ScaleARInputs)
            given = replace(twice, masked=masked)
        return model(given)

    # -- results ----------------------------------------------------------------------------------------------------

    def rows_of(self, inputs: MaskedScalesInputs, call: Call) -> dict[int, tuple[slice, slice]]:
        """For each learned map its rows in the call's prediction and in the tokens of all maps."""
        bounds = self.bounds(inputs)
        within = bounds_of([self.sides(inputs)[k] for k in call.maps])
        return {k: (slice(*within[call.maps.index(k)]), slice(*bounds[k])) for k in call.learned}

    def loss_of(self, output: GeneratorOutput, inputs: MaskedScalesInputs, call: Call, doubled: bool) -> Losses:
        """Cross entropy of what the call learns, with loss and accuracy of each scale beside it."""
        if doubled:
            output = self.rollout.conditional(output)
        rows = self.rows_of(inputs, call)
        prediction = torch.cat([output.prediction[:, there] for there, _ in rows.values()], 1)
        targets = torch.cat([inputs.targets[:, here] for _, here in rows.values()], 1)
        per_token, hit = scores(prediction, targets, self.config.label_smoothing)
        counted = torch.ones_like(per_token)
        if 0 in rows:
            assert isinstance(inputs.model, ScaleARInputs) and inputs.model.masked is not None
            counted[:, : inputs.model.masked.shape[1]] = inputs.model.masked
        per_token, hits = per_token * counted, hit * counted
        means = {"loss": (per_token.detach().sum(), counted.sum()), "accuracy": (hits.sum(), counted.sum())}
        sizes = [there.stop - there.start for there, _ in rows.values()]
        parts = zip(rows, *(values.detach().split(sizes, 1) for values in (per_token, hits, counted)))
        for k, of_map, hits_of_map, counted_of_map in parts:
            scale = f"scale_{self.sides(inputs)[k]:02d}"
            means[f"loss/{scale}"] = of_map.sum(), counted_of_map.sum()
            means[f"accuracy/{scale}"] = hits_of_map.sum(), counted_of_map.sum()
        return Losses(self.config.cross_entropy_weight * per_token.sum(), means=dict(means))

    @torch.no_grad()
    def roll_out(self, output: GeneratorOutput, inputs: MaskedScalesInputs, call: Call) -> Tensor:
        """Tokens of the maps that the call draws, int64 [B, rows]."""
        rows = self.rows_of(inputs, call)
        parts = []
        for k, along in call.drawn:
            there, here = rows[k]
            parts.append(self.rollout.draw_along(output.prediction[:, there], inputs.uniform[:, here], along))
        return torch.cat(parts, 1)

    def with_drawn(self, inputs: MaskedScalesInputs, carried: Tensor, call: Call) -> MaskedScalesInputs:
        """The inputs, knowing what the call drew."""
        drawn = (inputs.targets if inputs.drawn is None else inputs.drawn).clone()
        start = 0
        for k, _ in call.drawn:
            here = slice(*self.bounds(inputs)[k])
            stop = start + here.stop - here.start
            drawn[:, here], start = carried[:, start:stop], stop
        return replace(inputs, drawn=drawn)

    def bounds(self, inputs: MaskedScalesInputs) -> list[tuple[int, int]]:
        """(first row, row after the last) of each map."""
        return bounds_of(self.sides(inputs))
