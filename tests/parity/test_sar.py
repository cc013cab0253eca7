"""SAR's step is numerically the released one: both losses, rollout ids, student-forcing inputs, gradients."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megavar.config.recipes.mepa import MEPAConfig
from megavar.config.recipes.sar import SARConfig
from megavar.data.batch import Batch
from megavar.generators.base import GeneratorOutput
from megavar.recipes.base import Pass
from megavar.recipes.next_scale import NextScale
from megavar.recipes.sar import SAR, SARInputs
from megavar.sampling.filters import truncate
from tests.parity.test_flexvar import build, published, quantizer_of

from .cases import Case, Family

pytestmark = pytest.mark.usefixtures("single_process")
TRAINING = Family(
    "sar",
    aside={
        "cond_drop_rate": "comparisons are without dropout, drop path and label drop",
        "batch": "the inputs' shapes say it",
        "feature_map": "the inputs' shapes say it",
        "gamma_in_paper_terms": "a remark",
        "sf_*": "options of a second pass, which teacher forcing has not",
        "sigma": "option of a second pass, which teacher forcing has not",
    },
)
TARGETS = {"csfl": "drawn", "tf_then_single_sf": "true"}


def recipe_of(case: Case, target: str | None = None) -> NextScale:
    given = case.config
    sides = tuple(given["patch_nums_fixed"])
    parts = build(case, sides), quantizer_of(case, sides)
    common = {"tokenizer_weights": "unused", "label_smoothing": given["label_smooth"]}
    place = {"classes": given["num_classes"], "label_drop": 0.0, "seed": 0}
    if given["training_mode"] == "teacher_forcing":
        return NextScale(MEPAConfig(**common), *parts, **place)
    rollout = {"sampled": given["sf_use_sampling"], "guidance": given["sf_cfg_scale"]}
    rollout |= {"top_k": given["sf_top_k"], "top_p": given["sf_top_p"]}
    target = target or TARGETS[given["training_mode"]]
    config = SARConfig(**common, student_weight=given["sigma"], target=target, rollout=rollout)
    return SAR(config, *parts, **place)


@TRAINING.each_case()
def test_a_step_equals_the_reference(case: Case) -> None:
    recipe = recipe_of(case)
    labels = case["input.label_B"]
    batch = Batch(None, labels, torch.arange(len(labels)), torch.zeros_like(labels), latents=case["input.h"])
    inputs = recipe.prepare(batch, 0)
    first, *second = recipe.passes("generator", 0)
    sizes = [side * side for side in case.config["patch_nums_fixed"]]
    case.check_series("output.gt_idx", list(inputs.targets.split(sizes, 1)))
    features = inputs.model.features
    guided = isinstance(recipe, SAR) and recipe.config.rollout.guided
    case.check("output.tf.input", features.repeat(2, 1, 1) if guided else features)
    output = first.forward(recipe.generator, inputs)
    case.check("output.tf.logits", output.prediction)
    total = first.loss(output, inputs).total / inputs.targets.numel()
    case.check("output.tf.loss", total)
    if isinstance(recipe, SAR):
        (student,) = second
        compare_rollout(case, output, inputs, recipe.bounds(inputs))
        inputs = first.following(inputs, first.carry(output, inputs))
        total = total + compare_second_pass(case, recipe, student, inputs)
    case.check("output.total_loss", total)
    total.backward()
    case.check_gradients(published(recipe.generator))


def compare_rollout(case: Case, output: GeneratorOutput, inputs: SARInputs, bounds: Sequence[tuple[int, int]]) -> None:
    """All scales' draws, although a step needs two; sets the numbers that reproduce the reference's draws."""
    recipe = recipe_of(case, target="drawn")
    assert isinstance(recipe, SAR)
    if recipe.config.rollout.guided:
        for scale, (start, stop) in enumerate(bounds):
            if (drawn := f"input.rng.{scale:04d}.multinomial") in case:
                case.check(f"output.rollout_idx.{scale}", case[drawn].view(-1, stop - start))
        inputs.uniform[:] = torch.cat([middle(case, k) for k in range(len(bounds))], 1)
        for scale, rows in enumerate(bounds):
            conditional, free = output.prediction[:, slice(*rows)].chunk(2)
            t = 0.5 * case.config["sf_cfg_scale"] * (1 + scale / (len(bounds) - 1))
            case.check(f"output.rollout_logits.{scale}", (1 + t) * conditional - t * free)
    drawn = recipe.roll_out(output, inputs, tuple(range(1, len(bounds))))
    case.check_series("output.rollout_idx", [drawn[:, slice(*rows)] for rows in bounds])


def middle(case: Case, scale: int) -> Tensor:
    """The middle of the interval that our draw gives to the reference's token: float64 [B, rows]."""
    logits = case[f"output.rollout_logits.{scale}"]
    if (keep := f"output.rollout_keep.{scale}") in case:
        case.check(keep, truncate(logits, case.config["sf_top_k"], case.config["sf_top_p"]).isfinite())
        logits = logits.masked_fill(~case[keep], -torch.inf)
    elif case.config["sf_top_k"] == 1:
        logits = truncate(logits, 1)
    share = logits.double().softmax(-1)
    ids = case[f"output.rollout_idx.{scale}"]
    return (share.cumsum(-1) - share / 2).gather(-1, ids[..., None])[..., 0]


def compare_second_pass(case: Case, recipe: SAR, student: Pass, inputs: SARInputs) -> Tensor:
    """Its inputs, logits, targets and loss; returns gamma times the loss."""
    last = len(recipe.bounds(inputs)) - 1
    rows = slice(*recipe.bounds(inputs)[last])
    case.check("output.sf.input", recipe.student_features(inputs, last))
    output = student.forward(recipe.generator, inputs)
    case.check("output.sf.logits", output.prediction[:, 1:])
    case.check("output.sf.target", (inputs.drawn if recipe.config.target == "drawn" else inputs.targets)[:, rows])
    losses = student.loss(output, inputs)
    loss, tokens = losses.means["loss/student"]
    case.check("output.sf.loss", loss / tokens)
    assert student.balance == case.config["sigma"]
    return losses.total + losses.per_image / len(inputs.targets)
