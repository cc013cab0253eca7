"""SAR's hybrid is numerically the public one: training, schedules of student forcing, decoding, published layout."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megavar.conditions import Condition
from megavar.config.generators.scalear import ScaleARConfig
from megavar.config.procedures.masked_scales import MaskedScalesSampling
from megavar.config.recipes.masked_scales import MaskedScalesConfig
from megavar.config.token_space import TokenSpace
from megavar.data.batch import Batch
from megavar.generators.base import GeneratorOutput
from megavar.generators.scalear import ScaleAR, ScaleARInputs
from megavar.generators.scalear.published import ScaleARLayout
from megavar.recipes.masked_scales import Call, MaskedScales, MaskedScalesInputs
from megavar.sampling.filters import truncate
from megavar.sampling.procedures.masked_scales import MaskedScales as Decoding
from megavar.sampling.procedures.masked_scales import schedule
from tests.parity.test_flexvar import quantizer_of
from tests.parity.test_var_transformer import load, shapes

from .cases import Case, Family

pytestmark = pytest.mark.usefixtures("single_process")
HYBRID = Family(
    "scalear",
    aside={
        "batch": "the inputs' shapes say it",
        "cond_drop_rate": "comparisons are given the labels that were dropped",
        "input.*.rand": "label-drop uniforms, without effect at rate 0",
        "config.variants*": "read in each case",
        "mask_ratio": "of training; cases of decoding have none",
        "sf_*": "of student forcing; other cases have none",
        "*routine": "a name of the public code",
    },
)
SCHEDULES = {
    "student_forcing": "full", "mixed": "alternate", "alternating": "interleave", "hybrid_tf_sf": "hybrid",
}  # fmt: skip


def is_training(case: Case) -> bool:
    return "training_mode" not in case.config and "runs" not in case.config


def is_schedule(case: Case) -> bool:
    return "training_mode" in case.config


def is_decoding(case: Case) -> bool:
    return "runs" in case.config


def build(case: Case, history: str | None = None) -> ScaleAR:
    given = case.config
    released = "released" if given["enable_var_kv"] else "none"
    config = ScaleARConfig(
        depth=given["depth"],
        width=given["embed_dim"],
        heads=given["num_heads"],
        classes=given["num_classes"],
        shared_adaptive_norm=given["shared_aln"],
        qk_l2_norm=given["attn_l2_norm"],
        drop_path=0.0,
        label_drop=0.0,
        position_side=case["weights.pos_1LC"].shape[-1],
        shared_position=given["share_randar_var_pos_embed"],
        history=history or released,
    )
    sides = tuple(given["patch_nums"])
    space = TokenSpace.of_scales(sides, given["vocab_size"], given["Cvae"], image_side=sides[-1])
    model = ScaleAR(config, space, taps=("embedding",))
    state = {name: value for name, value in case.under("weights.").items() if not name.startswith("vae.")}
    load(model, ScaleARLayout(config, space).load(state, shapes(model)))
    return model


def published(model: ScaleAR) -> dict[str, Tensor]:
    layout = ScaleARLayout(model.choice, model.space)
    return {layout.names(name)[0]: parameter for name, parameter in model.named_parameters()}


def recipe_of(case: Case, model: ScaleAR, **keys: Any) -> MaskedScales:
    given = case.config
    rollout = {"sampled": given["sf_use_sampling"], "guidance": given["sf_cfg_scale"]}
    rollout |= {"top_k": given["sf_top_k"], "top_p": given["sf_top_p"]}
    config = MaskedScalesConfig(tokenizer_weights="unused", mask_ratio=given["mask_ratio"], rollout=rollout, **keys)
    tokenizer = quantizer_of(case, tuple(given["patch_nums"]))
    return MaskedScales(config, model, tokenizer, classes=given["num_classes"], label_drop=0.0, seed=0)


def draws(case: Case, phase: str, what: str) -> list[Tensor]:
    found = [name for name in case.tensors if name.startswith(f"input.{phase}.") and name.endswith(what)]
    return [case[name] for name in sorted(found)]


def prepared(case: Case, recipe: MaskedScales, phase: str, step: int = 0) -> MaskedScalesInputs:
    """Inputs with the reference's masks."""
    labels = case["input.label_B"]
    batch = Batch(None, labels, torch.arange(len(labels)), torch.zeros_like(labels), latents=case["input.h"])
    inputs = recipe.prepare(batch, step)
    masked = torch.stack(draws(case, phase, "randperm")) < int(16 * case.config["mask_ratio"])
    assert torch.equal(inputs.masked.sum(1)[: len(masked)], masked.sum(1))
    inputs.masked = masked
    inputs.model.masked = masked[: len(labels)]
    return inputs


@HYBRID.each_case(is_training)
def test_training_equals_the_reference(case: Case) -> None:
    for phase, history in (("train", None), ("var_kv", "released")):
        if f"output.{phase}.logits" not in case:
            continue
        model = build(case, history)
        recipe = recipe_of(case, model)
        inputs = prepared(case, recipe, phase)
        (rand,) = draws(case, phase, "rand")
        labels = torch.where(rand < case.config["cond_drop_rate"], model.choice.classes, case["input.label_B"])
        inputs.model.labels = labels
        output = model(inputs.model)
        loss = recipe.passes("generator", 0)[0].loss(output, inputs)
        counted = mask_of(inputs)
        total = loss.total / counted.sum()
        case.check(f"output.{phase}.logits", output.prediction)
        case.check(f"output.{phase}.loss", total)
        layout = model.sequence(inputs.model).layout
        case.check(f"output.{phase}.visible", layout.table(torch.device("cpu")))
        if phase == "train":
            case.check("output.train.inputs", inputs.model.features)
            case.check("output.train.gt_idx", inputs.targets)
            case.check("output.train.loss_mask", counted)
            case.check("output.train.sequence", output.taps["embedding"])
            per_token = F.cross_entropy(output.prediction.transpose(1, 2), inputs.targets, reduction="none")
            case.check("output.train.loss_per_token", per_token)
            total.backward()
            case.check_gradients(published(model))


def mask_of(inputs: MaskedScalesInputs) -> Tensor:
    """bool [B, L]: where the loss counts."""
    counted = torch.ones_like(inputs.targets, dtype=torch.bool)
    counted[:, : inputs.model.masked.shape[1]] = inputs.model.masked
    return counted


@HYBRID.each_case(lambda case: True)
def test_published_layout_round_trips(case: Case) -> None:
    model = build(case)
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    exported = ScaleARLayout(model.choice, model.space).export(ours)
    stored = {name: value for name, value in case.under("weights.").items() if not name.startswith("vae.")}
    assert sorted(exported) == sorted(stored)
    for name, value in stored.items():
        assert torch.equal(exported[name], value), name
