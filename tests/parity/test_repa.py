"""REPA is a case of semantic guidance: its projector, cosine, loss and gradients."""

import math

import pytest
import torch

from megavar.config.terms.base import TermChoice
from megavar.config.terms.semantic_guidance import SemanticGuidanceConfig
from megavar.config.token_space import TokenSpace
from megavar.recipes.terms.semantic_guidance import SemanticGuidance, Targets, projection

from .cases import Case, Family

REPA = Family("moe", aside={"output.cosine.*": "what is logged is their mean over the tokens, which is compared"})


@REPA.each_case(lambda case: "z_dims" in case.config)
def test_repa(case: Case) -> None:
    """One term per encoder; their mean is REPA's loss."""
    given, side = case.config, math.isqrt(case.config["tokens"])
    space = TokenSpace("grid", (side,), side * side, 16, 8, image_side=16 * side)
    choice = TermChoice.make(
        name="semantic_guidance", scales="last", teacher={"name": "dinov2", "weights": "unused", "grid": side},
        projection={"preset": "repa", "hidden": [given["projector_dim"]] * 2},
    )  # fmt: skip
    assert isinstance(choice, SemanticGuidanceConfig)
    term = SemanticGuidance(choice, None, space, depth=12)
    hidden = case["input.x"].clone().requires_grad_()
    total, parameters = torch.zeros(()), {}
    for number, width in enumerate(given["z_dims"]):
        head = projection(choice.projection, given["width"], width)
        head.load_state_dict(case.under(f"weights.projectors.{number}."))
        projected, target = head(hidden), case[f"input.z.{number}"]
        case.check(f"output.projection.{number}", projected)
        losses = term.loss({}, projected, Targets((side,), lambda target=target: target))
        total = total + losses.total / given["batch"] / len(given["z_dims"])
        cosine = case[f"output.cosine.{number}"].mean(-1).sum()
        assert float(losses.means["cosine/01"][0]) == pytest.approx(float(cosine))
        parameters |= {f"projectors.{number}.{name}": value for name, value in head.named_parameters()}
    case.check("output.loss", total)
    case.check("output.weighted_loss", total * given["proj_coeff"])
    total.backward()
    case.check("grad.input", hidden.grad)
    case.check_gradients(parameters)
    for name in case.under("grad.projectors."):
        case.check(f"grad.projectors.{name}", parameters[f"projectors.{name}"].grad)
