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
        "mask_ratio": "of training; cases of decoding have none",
        "sf_*": "of student forcing; other cases have none",
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


@HYBRID.each_case(is_schedule)
def test_schedules_of_student_forcing_equal_the_reference(case: Case) -> None:
    variants = case.config["variants"]
    for variant in variants:
        keys: dict[str, Any] = {"schedule": SCHEDULES[case.config["training_mode"]]}
        if keys["schedule"] == "hybrid":
            keys["true_until"] = variant.get("hybrid_tf_scales", case.config.get("hybrid_tf_scales"))
        model = build(case)
        compare_step(case, recipe_of(case, model, **keys), variant)
        model_gradients = f"grad_norm.{variant['name']}." if len(variants) > 1 else "grad_norm."
        case.check_gradients(published(model), model_gradients)


def compare_step(case: Case, recipe: MaskedScales, variant: dict[str, Any]) -> None:
    """All calls of one step, with the reference's masks and draws."""
    phase, step = variant["name"], variant.get("g_it", 0)
    inputs = prepared(case, recipe, phase, step)
    case.check(f"output.{phase}.gt_idx", inputs.targets)
    calls, passes = recipe.calls(step), recipe.passes("generator", step)
    sides = inputs.model.sides
    described = [([sides[k] for k in call.maps], call.student) for call in calls]
    assert described == [(call["scales"], call["student_forcing"]) for call in variant["calls"]]
    total, parts = torch.zeros(()), {False: [], True: []}
    logits, samples = {}, 0
    for number, (call, one) in enumerate(zip(calls, passes, strict=True)):
        guided = variant["calls"][number]["rows"] > len(inputs.targets)
        assert not guided or recipe.rollout.config.guided
        seen: list[ScaleARInputs] = []
        recipe.call(seen.append, inputs, call, doubled=guided)
        where = f"output.{phase}.call.{number}"
        case.check(f"{where}.input", seen[0].features)
        output = recipe.generator(seen[0])
        case.check(f"{where}.logits", output.prediction)
        counted = torch.ones(output.prediction.shape[:2], dtype=torch.bool)
        if seen[0].masked is not None:
            counted[:, : seen[0].masked.shape[1]] = seen[0].masked
        case.check(f"{where}.loss_mask", counted)
        own = output if number + 1 < len(calls) else recipe.rollout.conditional(output) if guided else output
        losses = one.loss(own, inputs)
        total = total + losses.total
        conditional = recipe.rollout.conditional(output) if guided else output
        rows = recipe.rows_of(inputs, call)
        logits |= {k: conditional.prediction[:, there] for k, (there, _) in rows.items()}
        share = sum(int(counted[: len(inputs.targets), there].sum()) for there, _ in rows.values())
        parts[call.student].append((losses.total.detach(), share))
        if recipe.rollout.config.guided:
            samples = replay(case, phase, recipe, inputs, output, call, samples)
        if one.following is not None:
            inputs = one.following(inputs, one.carry(output, inputs))
    case.check(f"output.{phase}.logits", torch.cat([logits[k] for k in sorted(logits)], 1))
    case.check(f"output.{phase}.loss_mask", mask_of(inputs))
    loss = total / mask_of(inputs).sum()
    case.check(f"output.{phase}.loss", loss)
    for student, name in ((False, "teacher_loss"), (True, "student_loss")):
        if f"output.{phase}.{name}" in case:
            count = sum(share for _, share in parts[student])
            value = sum((part for part, _ in parts[student]), torch.zeros(())) / max(count, 1)
            case.check(f"output.{phase}.{name}", value)
    loss.backward()


def replay(
    case: Case,
    phase: str,
    recipe: MaskedScales,
    inputs: MaskedScalesInputs,
    output: GeneratorOutput,
    call: Call,
    of: int,
) -> int:
    """Compare what the sampler gets and keeps, and set the numbers that draw the reference's tokens."""
    rows = recipe.rows_of(inputs, call)
    for k, along in call.drawn:
        name = f"output.{phase}.sample_{{}}.{of}".format
        if name("idx") not in case:
            continue
        there, here = rows[k]
        conditional, free = output.prediction[:, there].chunk(2)
        t = 0.5 * case.config["sf_cfg_scale"] * (1 + along)
        logits = (1 + t) * conditional - t * free
        case.check(name("logits"), logits)
        case.check(name("keep"), truncate(logits, case.config["sf_top_k"], case.config["sf_top_p"]).isfinite())
        found = draws(case, phase, "multinomial")[of].view(len(logits), -1)
        case.check(name("idx"), found)
        inputs.uniform[:, here] = middle(logits, case[name("keep")], found)
        drawn = recipe.rollout.draw_along(output.prediction[:, there], inputs.uniform[:, here], along)
        assert torch.equal(drawn, found)
        of += 1
    return of


def middle(logits: Tensor, keep: Tensor, ids: Tensor) -> Tensor:
    """The middle of the interval that our draw gives to the reference's token: float64 [B, rows]."""
    share = logits.detach().masked_fill(~keep, -torch.inf).double().softmax(-1)
    return (share.cumsum(-1) - share / 2).gather(-1, ids[..., None])[..., 0]


class Replayed(Decoding):
    """Decoding with the reference's order and draws, which remembers what the blocks get."""

    given: Sequence[Tensor]
    orders: Tensor
    keeps: list[Tensor]
    calls = 0

    def order(self, condition: Any, size: int, noise: Any) -> Tensor:
        return self.orders

    def pick(self, logits: Tensor, noise: Any, start: int, repetition: int) -> Tensor:
        settings = self.settings
        self.keeps.append(truncate(logits / settings.temperature, settings.top_k, settings.top_p).isfinite())
        self.calls += 1
        return self.given[self.calls - 1].view(len(logits), -1)


@HYBRID.each_case(is_decoding)
def test_decoding_equals_the_reference(case: Case) -> None:
    model = build(case).eval()
    tokenizer = quantizer_of(case, tuple(case.config["patch_nums"]))
    embedded: list[Tensor] = []
    embed = model.embed
    model.embed = lambda inputs: embedded.append((made := embed(inputs)).hidden.chunk(2)[0]) or made
    for run in case.config["runs"]:
        name = run["name"]
        procedure = Replayed(
            MaskedScalesSampling(
                guidance=run["cfg"],
                guidance_form="llamagen" if run["llamagen"] else "var",
                first_steps=run["cosine_steps"],
                top_k=run["top_k"],
                top_p=run["top_p"],
            )
        )
        procedure.given, procedure.keeps = draws(case, name, "multinomial"), []
        procedure.orders = torch.stack(draws(case, name, "randperm"))
        embedded.clear()
        condition = Condition(case["input.label_B"], classes=model.choice.classes)
        steps = list(procedure.steps(model, tokenizer, condition, None))
        case.check(f"output.{name}.schedule", torch.tensor(schedule(procedure.orders.shape[1], run["cosine_steps"])))
        case.check_series(f"output.{name}.sequence_cond", embedded)
        case.check_series(f"output.{name}.logits", [step.logits for step in steps])
        case.check_series(f"output.{name}.keep", procedure.keeps)
        case.check_series(f"output.{name}.sampled", [step.sampled for step in steps])
        case.check_series(f"output.{name}.ids", [step.ids for step in steps if step.finished])


@HYBRID.each_case()
def test_published_layout_round_trips(case: Case) -> None:
    model = build(case)
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    exported = ScaleARLayout(model.choice, model.space).export(ours)
    stored = {name: value for name, value in case.under("weights.").items() if not name.startswith("vae.")}
    assert sorted(exported) == sorted(stored)
    for name, value in stored.items():
        assert torch.equal(exported[name], value), name
