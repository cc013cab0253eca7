"""Routers from outside the package: what a researcher writes."""

from typing import ClassVar, Literal

import torch.nn.functional as F

from megavar.config.experts.base import ExpertsChoice
from megavar.transformer.moe.router import Router


class AboveMeanExperts(ExpertsChoice):
    """Every expert that scores above ``factor`` times the mean: between none and all of them."""

    implementation: ClassVar[str] = "tests.transformer.foreign_router:AboveMeanRouter"
    variable_number: ClassVar[bool] = True

    router: Literal["above_mean"] = "above_mean"
    factor: float = 1.0


class AboveMeanRouter(Router):
    def __init__(self, config, experts, **place):
        super().__init__(config, experts, **place)
        self.weight = self.parameter(experts.number, config.hidden_size)

    def scores(self, hidden, kinds):
        return F.linear(hidden.float(), self.weight.float()).softmax(-1)

    def choose(self, scores):
        assignment = scores.detach() > self.experts.factor / self.experts.number
        return scores * assignment, assignment
