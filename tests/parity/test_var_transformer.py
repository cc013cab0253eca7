"""Our VAR is numerically the public one: logits, losses, gradients, greedy guided decoding, published layout."""

from collections import ChainMap

import pytest
import torch

from megavar.conditions import Condition
from megavar.config.generators.var import VARConfig
from megavar.config.procedures.next_scale import NextScaleSampling
from megavar.config.recipes.mepa import MEPAConfig
from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.multiscale_vq import MultiScaleVQConfig
from megavar.generators.inputs import ScaleInputs
from megavar.generators.var import VAR
from megavar.generators.var.published import VARLayout
from megavar.parallel.logical import logical_tensors
from megavar.parallel.vocabulary import vocabulary_cross_entropy
from megavar.recipes.next_scale import NextScale as NextScaleRecipe
from megavar.recipes.next_scale import NextScaleInputs
from megavar.sampling.filters import truncate
from megavar.sampling.procedures.next_scale import NextScale
from megavar.tokenizers.multiscale_vq import MultiScaleVQ

from .cases import Case, Family
from .test_var_vqvae import quantizer_options

pytestmark = pytest.mark.usefixtures("single_process")
TRANSFORMER = Family(
    "var_transformer",
    aside={
        "*drop*_rate": "comparisons are without dropout, drop path and label drop",
        "batch": "the inputs' shapes say it",
        "positions": "the inputs' shapes say it",
        "V": "the inputs' shapes say it",
    },
)


def is_model(case: Case) -> bool:
    return "depth" in case.config


def is_filter(case: Case) -> bool:
    return "combos" in case.config


def build(case: Case, kernel: str = "dense") -> VAR:
    given = case.config
    config = VARConfig(
        depth=given["depth"],
        width=given["embed_dim"],
        heads=given["num_heads"],
        feed_forward_ratio=given["mlp_ratio"],
        classes=given["num_classes"],
        shared_adaptive_norm=given["shared_aln"],
        qk_l2_norm=given["attn_l2_norm"],
        drop_path=0.0,
        label_drop=0.0,
        attention_kernel=kernel,
    )
    taps = ("embedding", *(f"block.{number}" for number in range(given["depth"])))
    model = VAR(
        config,
        TokenSpace.of_scales(tuple(given["patch_nums"]), given["vocab_size"], given["Cvae"], image_side=16),
        taps=taps,
    )
    # Not options of ours: a case that has others tests another model.
    assert model.config.kv_channels == given["head_dim"] and model.config.layernorm_epsilon == given["norm_eps"]
    assert model.space.length == given["L"]
    state = {name: value for name, value in case.under("weights.").items() if not name.startswith("vae.")}
    load(model, layout(model).load(state, shapes(model)))
    return model


def layout(model: VAR) -> VARLayout:
    return VARLayout(model.choice, model.space)


def shapes(model: VAR) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in logical_tensors(model)}


def load(model: VAR, tensors: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


def tokenizer_of(case: Case) -> MultiScaleVQ:
    """The case's quantizer in a tokenizer whose other parts are small and unused."""
    given = case.config
    only_in_training = {"beta": 0.25}
    reference = ChainMap(given["quant"], given, {"v_patch_nums": given["patch_nums"]}, only_in_training)
    small = {"base_channels": 8, "norm_groups": 8, "channel_multipliers": (1,)}
    tokenizer = MultiScaleVQ(MultiScaleVQConfig(**quantizer_options(reference) | small))
    tokenizer.quantize.load_state_dict(case.under("weights.vae.quantize."))
    return tokenizer


def inputs_of(case: Case) -> tuple[ScaleInputs, torch.Tensor]:
    targets = torch.cat(case.series("input.gt_idx"), dim=1)
    return ScaleInputs(case["input.label_B"], case["output.var_input"]), targets


def recipe_of(case: Case, model: VAR, label_smoothing: float) -> NextScaleRecipe:
    config = MEPAConfig(tokenizer_weights="unused", label_smoothing=label_smoothing)
    classes = case.config["num_classes"]
    return NextScaleRecipe(config, model, tokenizer_of(case), classes=classes, label_drop=0.0, seed=0)


@pytest.mark.parametrize("kernel", ["dense", "prefix"])
@TRANSFORMER.each_case(is_model)
def test_teacher_forcing_equals_the_reference(case: Case, kernel: str) -> None:
    model = build(case, kernel)
    inputs, targets = inputs_of(case)
    output = model(inputs)
    case.check("output.logits", output.prediction)
    case.check("output.x_embed", output.taps["embedding"])
    case.check_series("output.hidden", [output.taps[number] for number in model.taps[1:]])
    case.check("output.ce_per_token", vocabulary_cross_entropy(output.prediction, targets))
    smoothing = case.config["label_smoothing_variant"]
    smoothed = recipe_of(case, model, smoothing).loss(output, NextScaleInputs(inputs, targets))
    case.check("output.loss_label_smooth", smoothed.total / targets.numel())
    losses = recipe_of(case, model, 0.0).loss(output, NextScaleInputs(inputs, targets))
    case.check("output.loss", losses.total / targets.numel())
    last_scale, tokens = losses.means[f"loss/scale_{case.config['patch_nums'][-1]:02d}"]
    case.check("output.L_tail", last_scale / tokens)
    (losses.total / targets.numel()).backward()
    published = {}
    for name, parameter in model.named_parameters():
        (key,) = layout(model).names(name)
        published[key] = parameter
    case.check_gradients(published)


@TRANSFORMER.each_case(is_model)
def test_teacher_forcing_input_equals_the_reference(case: Case) -> None:
    features = tokenizer_of(case).quantize.teacher_forcing_input(case.series("input.gt_idx"))
    case.check("output.var_input", features)


@TRANSFORMER.each_case(is_model)
def test_unconditional_logits_equal_the_reference(case: Case) -> None:
    model = build(case)
    inputs, _ = inputs_of(case)
    inputs.labels = torch.full_like(inputs.labels, case.config["num_classes"])
    with torch.no_grad():
        case.check("output.logits_uncond", model(inputs).prediction)


@TRANSFORMER.each_case(is_model)
def test_greedy_guided_decoding_equals_the_reference(case: Case) -> None:
    settings = NextScaleSampling(guidance=case.config["cfg"], top_k=case.config["top_k"], top_p=case.config["top_p"])
    condition = Condition(case["input.label_B"], classes=case.config["num_classes"])
    steps = list(NextScale(settings).steps(build(case).eval(), tokenizer_of(case), condition, noise=None))
    case.check_series("output.infer.idx", [step.ids for step in steps])
    case.check_series("output.infer.logits_cfg", [step.logits for step in steps])
    case.check_series("output.infer.f_hat", [step.state for step in steps])
    case.check("output.infer.f_hat_final", steps[-1].state)


@TRANSFORMER.each_case(is_model)
def test_published_layout_round_trips(case: Case) -> None:
    model = build(case)
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    published = layout(model).export(ours)
    stored = {name: value for name, value in case.under("weights.").items() if not name.startswith("vae.")}
    assert sorted(published) == sorted(stored)
    for name, value in stored.items():
        assert published[name].shape == value.shape, name
        assert torch.equal(published[name], value), name


@TRANSFORMER.each_case(is_filter)
def test_truncation_equals_the_reference(case: Case) -> None:
    for index, combination in enumerate(case.config["combos"]):
        logits = truncate(case["input.logits"], combination["top_k"], combination["top_p"])
        case.check(f"output.keep.{index}", logits.isfinite())
        case.check(f"output.probs.{index}", logits.softmax(-1))
