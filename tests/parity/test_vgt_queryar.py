"""QueryAR is numerically the public one: flow heads, training sequence, cached drawing in groups, orders."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megavar import flow_matching
from megavar.conditions import Condition
from megavar.config.denoising_mlp import DenoisingMLPConfig
from megavar.config.generators.query_ar import QueryARConfig
from megavar.config.language_model import LanguageModelConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.procedures.query_ar import QuerySampling
from megavar.config.recipes.vgt import VGTConfig
from megavar.config.token_space import TokenSpace
from megavar.data.text import Text
from megavar.generators.denoising_mlp import DenoisingMLP, TimeEmbedding, published_name
from megavar.generators.language_model import positions_of
from megavar.generators.query_ar import QueryAR
from megavar.generators.query_ar.published import PREFIX, VGTLayout
from megavar.parallel.logical import logical_tensors
from megavar.recipes.vgt import QueryFlow, QueryFlowInputs, training_rows
from megavar.sampling.procedures.query_ar import QueryDecoding, guided
from megavar.training.checkpoint.weights import fill, shapes_of
from megavar.transformer.megatron_config import transformer_config

from .cases import Case, Family

pytestmark = pytest.mark.usefixtures("single_process")
VGT = Family(
    "vgt",
    aside={
        "llm.arch": "a name",
        "batch": "the inputs' shapes say it",
        "n_tokens": "the inputs' shapes say it",
        "text_lengths": "the masks say it",
        "text_lengths_cond_then_uncond": "the masks say it",
        "output.n": "a number of schedules",
    },
)


def is_head(case: Case) -> bool:
    return "cfg2" in case.config


def is_wide_head(case: Case) -> bool:
    return "dec_dim" in case.config


def is_schedule(case: Case) -> bool:
    return "schedules" in case.config


def is_drawing(case: Case) -> bool:
    return "acc_ratio" in case.config


def is_training(case: Case) -> bool:
    return "metaquery_max_size" in case.config and not is_drawing(case)


def build(case: Case) -> QueryAR:
    sizes, text, head = case.config, case.config["llm"], case.config["flow_head"]
    choice = QueryARConfig(
        language_model=LanguageModelConfig(
            vocabulary=text["vocab_size"],
            width=text["hidden_size"],
            feed_forward=text["intermediate_size"],
            depth=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            groups=text["num_key_value_heads"],
            rotary_base=text["rope_theta"],
            norm_epsilon=text["rms_norm_eps"],
        ),
        query_sides=tuple(sizes["metaquery_max_size"]),
        head=DenoisingMLPConfig(width=head["dim"], depth=head["layers"]),
        image_start=(sizes["img_start_token_id"],),
    )
    rows, columns = sizes["latent_hw"]
    assert rows == columns, "maps are square here"
    channels = sizes["latent_dim"] * sizes["latent_patch_size"] ** 2
    space = TokenSpace("latent", (rows,), rows * columns, None, channels, image_side=28 * rows)
    model = QueryAR(choice, space, taps=("embedding", *(f"block.{n}" for n in range(choice.language_model.depth))))
    fill(model, VGTLayout(choice, space).load(case.under("weights."), shapes_of(model)))
    return model


class Patches:
    """Maps to rows of patches, and normalization, without an autoencoder."""

    def __init__(self, space: TokenSpace, patch: int) -> None:
        self.space, self.patch = space, patch

    def pack(self, maps: Tensor) -> Tensor:
        return nn.functional.pixel_unshuffle(maps, self.patch).flatten(2).transpose(1, 2)

    def unpack(self, tokens: Tensor) -> Tensor:
        side = self.space.sides[0]
        return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), self.patch)

    def normalize(self, tokens: Tensor) -> Tensor:
        return nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)


@VGT.each_case(is_training)
def test_training_equals_the_reference(case: Case) -> None:
    model = build(case)
    shift = case.config["flow_head"]["timeshift"] or 1.0
    recipe = QueryFlow(
        VGTConfig(tokenizer_weights="none", time_shift=shift), model, Patches(model.space, 1),
        classes=0, label_drop=0.0, seed=0,
    )  # fmt: skip
    patches = Patches(model.space, case.config["latent_patch_size"])
    maps = case["input.image_latents"]
    tokens = patches.pack(maps)
    case.check("output.latent_seq", tokens)
    case.check("output.unpatchified", patches.unpack(tokens))
    batch, length = tokens.shape[:2]
    order = case["input.rng.0000.randperm"].expand(batch, -1)
    back = order.argsort(1)

    def picked(values: Tensor, places: Tensor = order) -> Tensor:
        return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))

    noise = case["input.rng.0001.randn_like"].view_as(tokens)
    times = recipe.shifted(flow_matching.logit_normal(case["input.rng.0002.normal"].view(batch, length)))
    inputs = training_rows(
        case["input.input_ids"], case["input.attention_mask"].bool(), torch.tensor(model.choice.image_start),
        picked(tokens), order, picked(noise), times.gather(1, order), torch.arange(batch),
    )  # fmt: skip
    output = model(inputs)
    case.check("output.inputs_embeds", output.taps["embedding"])
    case.check("output.position_ids", positions_of(inputs.valid))
    case.check("output.full_attention_mask", inputs.valid)
    last = model.norm(output.taps[f"block.{model.sizes.depth - 1}"])
    case.check("output.last_hidden_state", last)
    hidden = [*output.taps.values()][:-1]
    case.check_series("output.llm_hidden", [*hidden, last])
    case.check("output.meta_query", model.image.middle(model.image.queries)[None])
    case.check("output.pos_embed", model.image.middle(model.image.position)[None])
    asked = replace(inputs, noisy=None)
    case.check("output.conditions", picked(model(asked).prediction, back).flatten(0, 1))
    case.check("output.targets", picked(picked(tokens), back).flatten(0, 1))
    case.check("output.flow_xt", picked(inputs.noisy, back).flatten(0, 1))
    case.check("output.flow_t", 1 - times.flatten())
    found = recipe.loss(output, QueryFlowInputs(inputs, picked(tokens), picked(noise), order))
    loss = found.total / (batch * length)
    case.check("output.loss", loss)
    loss.backward()
    gradients = gradients_of(model, VGTLayout(model.choice, model.space))
    gradients["lmm.language_model.lm_head.weight"] = torch.zeros(1)
    case.check_gradients({name: value for name, value in gradients.items() if f"grad_norm.{name}" in case})


def gradients_of(model: nn.Module, layout: VGTLayout) -> dict[str, Tensor]:
    """Stand-ins for the authors' parameters, by their names, with our gradients."""
    parameters, named = dict(model.named_parameters()), {}
    for tensor in logical_tensors(model):
        parameter = parameters[tensor.parameter]
        assert parameter.grad is not None, tensor.name
        gradient = layout.split(tensor.name, tensor.local(parameter.grad))
        for name, value in zip(layout.names(tensor.name), gradient):
            named[name] = torch.zeros_like(value)
            named[name].grad = value.clone()
    return named


@VGT.each_case(lambda case: is_training(case) or is_drawing(case))
def test_published_layout_round_trips(case: Case) -> None:
    model = build(case)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    ours = {tensor.name: tensor.local(parameters[tensor.parameter]) for tensor in logical_tensors(model)}
    exported = VGTLayout(model.choice, model.space).export(ours)
    stored = case.under("weights.")
    left = stored.keys() - exported.keys()
    assert left == {"lmm.language_model.lm_head.weight"} and not exported.keys() - stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in exported.items())
    assert any(name.startswith(PREFIX) for name in exported)


def condition_of(case: Case) -> Condition:
    """Conditional texts, of which a case stores those without captions behind them."""
    ids, mask = case["input.input_ids"], case["input.attention_mask"].bool()
    (with_caption, free), (valid, free_valid) = ids.chunk(2), mask.chunk(2)
    assert torch.equal(free, free[:1].expand_as(free))
    labels = torch.full((len(with_caption),), -1)
    return Condition(labels, text=Text(with_caption, valid), empty_text=Text(free[:1], free_valid[:1]))


class Replayed:
    """The noise of a case in the place of ours."""

    def __init__(self, draws: list[Tensor], samples: int = 1) -> None:
        self.draws, self.indices = draws, torch.arange(samples)

    def normal(self, places: Tensor, channels: int, repetition: int = 0) -> Tensor:
        return self.draws.pop(0).view(*places.shape, channels)


@VGT.each_case(is_drawing)
def test_drawing_equals_the_reference(case: Case) -> None:
    model, sizes = build(case).eval(), case.config
    assert case.config["flow_head"].get("timeshift"), "drawing does not read it"
    decoding = QueryDecoding(
        QuerySampling(
            tokens_per_step=sizes["acc_ratio"],
            order=sizes["scheduler_type"],
            order_seed=sizes.get("scheduler_seed"),
            guidance=sizes["cfg_scale"],
            guidance_schedule=sizes["cfg_schedule"],
            steps=sizes["num_steps"],
            last_step=sizes["last_step_size"],
            context="release",
        )
    )
    draws = [case[name] for name in sorted(case.tensors) if name.startswith("input.rng.") and name.endswith("randn")]
    orders = [case[name] for name in sorted(case.tensors) if name.startswith("input.rng.") and "randperm" in name]
    space, tokenizer = model.space, Patches(model.space, sizes["latent_patch_size"])
    for order in orders:
        assert torch.equal(decoding.order(space.length, torch.arange(1))[0], order)
    seen: list[Any] = []
    step = model.step

    def noted(inputs: Any, *rest: Any) -> Tensor:
        seen.append(inputs)
        return step(inputs, *rest)

    model.step = noted  # type: ignore[method-assign]
    condition = condition_of(case)
    groups = list(decoding.steps(model, tokenizer, condition, Replayed(draws, len(condition))))  # type: ignore[arg-type]
    assert not draws
    for number, (inputs, group) in enumerate(zip(seen, groups)):
        case.check(f"output.group{number}.inputs_embeds", model.embed(inputs).hidden)
        positions = positions_of(inputs.valid) if inputs.positions is None else inputs.positions
        case.check(f"output.group{number}.position_ids", positions)
        case.check(f"output.group{number}.conditions", group.condition.flatten(0, 1))
        case.check(f"output.group{number}.sampled_raw", group.raw.flatten(0, 1))
    case.check("output.cfg_per_group", torch.tensor([group.guidance for group in groups]))
    places, tokens = (torch.cat([getattr(group, part) for group in groups], 1) for part in ("places", "tokens"))
    latents = torch.empty_like(tokens).scatter(1, places[..., None].expand_as(tokens), tokens)
    case.check("output.latents", tokenizer.unpack(latents))


@VGT.each_case(is_schedule)
def test_orders_and_groups_equal_the_reference(case: Case) -> None:
    schedules = case.config["schedules"]
    case.check("output.n", torch.full_like(case.tensors["output.n"], len(schedules)))
    for schedule in schedules:
        total, groups = schedule["total_tokens"], schedule["num_steps"]
        decoding = QueryDecoding(
            QuerySampling(tokens_per_step=total // groups, order=schedule["type"], order_seed=schedule["seed"])
        )
        sizes = decoding.sizes(total)
        if len(sizes) != groups:  # more groups than latents in one make: not what generation asks for
            least, larger = divmod(total, groups)
            sizes = [least + 1] * larger + [least] * (groups - larger)
        order = decoding.order(total, torch.arange(1))[0]
        assert [part.tolist() for part in order.split(sizes)] == schedule["schedule"]


def build_head(case: Case, sizes: DenoisingMLPConfig, prefix: str) -> DenoisingMLP:
    condition, channels = case.config["cond_dim"], case.config["input_dim"]
    trunk = transformer_config(ParallelConfig(), torch.float32, depth=1, width=condition, heads=1, feed_forward=1)
    head = DenoisingMLP(sizes, trunk, channels, channels)
    stored = case.under(f"weights.{prefix}")
    names = {name: published_name(name, sizes) for name in shapes_of(head)}
    assert sorted(filter(None, names.values())) == sorted(stored)
    fill(head, {name: stored[theirs] for name, theirs in names.items() if theirs is not None})
    return head


@VGT.each_case(is_wide_head)
def test_wide_flow_head_equals_the_reference(case: Case) -> None:
    sizes = DenoisingMLPConfig(
        width=case.config["enc_dim"], depth=case.config["enc_layers"],
        decoder_width=case.config["dec_dim"], decoder_depth=case.config["dec_layers"],
    )  # fmt: skip
    head = build_head(case, sizes, "")
    velocity = head(case["input.x"], case["input.t"], case["input.c"])
    case.check("output.velocity", velocity)
    velocity.square().mean().backward()
    case.check_gradients({published_name(name, sizes) or "": value for name, value in head.named_parameters()})


@VGT.each_case(is_head)
def test_flow_head_equals_the_reference(case: Case) -> None:
    sizes = DenoisingMLPConfig(
        width=case.config["dim"], depth=case.config["layers"], expansion=case.config["mlp_ratio"]
    )
    head, shift = build_head(case, sizes, "net."), case.config["timeshift"] or 1.0
    recipe = QueryFlow(
        VGTConfig(
            tokenizer_weights="none", time_shift=shift,
            times={"logit-normal": "logit_normal", "auto": "uniform"}[case.config["sample_t"]],
        ),
        head, None, classes=0, label_drop=0.0, seed=0,
    )  # fmt: skip
    velocity, hidden = head(case["input.x"], case["input.t"], case["input.c"], with_hidden=True)
    case.check("output.velocity", velocity)
    case.check_series("output.hidden", hidden)
    case.check("output.time_embed", head.time(case["input.t"]))
    case.check("output.timestep_sincos", TimeEmbedding.sinusoids(case["input.t"]))
    grid = torch.linspace(0, 1, 11)
    case.check("output.time_shift_fn_rae", 1 - recipe.shifted(grid))
    case.check("output.time_shift_fn", 1 - flow_matching.shifted(1 - grid, shift))
    case.check("output.time_shift_forward", flow_matching.shifted(1 - grid, shift))

    def errors(kind: str) -> tuple[Tensor, Tensor, Tensor]:
        noise, data = case[f"input.{kind}.0000.randn_like"], case["input.target"]
        times = recipe.shifted(flow_matching.logit_normal(case[f"input.{kind}.0001.normal"]))
        noisy = flow_matching.interpolate(data, noise, times[:, None])
        predicted = -head(noisy, 1 - times, case["input.c"])
        return flow_matching.velocity_error(predicted, data, noise), noisy, times

    masked, mask = errors("loss_mask")[0], case["input.mask"]
    case.check("output.loss_masked", (masked * mask).sum() / (mask.sum() + 1e-8))
    found, noisy, times = errors("loss")
    case.check("output.loss_xt", noisy)
    case.check("output.loss_t", 1 - times)
    case.check("output.loss", found.mean())
    found.mean().backward()
    parameters = {f"net.{published_name(name, sizes)}": value for name, value in head.named_parameters()}
    case.check_gradients(parameters)


@VGT.each_case(is_head)
@pytest.mark.parametrize("kind", ["s_nocfg", "s_cfg", "s_cfg3", "s_new"])
def test_sampler_equals_the_reference(case: Case, kind: str) -> None:
    sizes = DenoisingMLPConfig(
        width=case.config["dim"], depth=case.config["layers"], expansion=case.config["mlp_ratio"]
    )
    head, steps, told = build_head(case, sizes, "net."), case.config["num_sampling_steps"], case["input.c_cfg"]
    strengths: tuple[float, ...] = {"s_nocfg": (), "s_cfg3": (case.config["cfg"], case.config["cfg2"])}.get(
        kind, (case.config["cfg"],)
    )
    draws = [case[name] for name in sorted(case.tensors) if name.startswith(f"input.{kind}.")]
    settings = QuerySampling(steps=steps, last_step=case.config["last_step_size"])
    if kind == "s_new":  # its second row never meets the first
        settings, told = QuerySampling(steps=steps, last_step=0.0, time_shift=1.5), told[[0, len(told) // 2]]
        draws = [draw[:1] for draw in draws]
    if kind == "s_cfg3":
        told = told[: 3 * len(draws[0])]
    trajectory: list[Tensor] = []

    def velocity_at(noisy: Tensor, time: float) -> Tensor:
        trajectory.append(noisy)
        together = noisy.repeat(len(strengths) + 1, 1)
        return guided(-head(together, torch.full((len(together),), 1 - time), told), *strengths)

    with torch.no_grad():
        drawn = flow_matching.euler_maruyama(
            velocity_at, draws[0], QueryDecoding(settings).grid, lambda step: draws[step],
            plain_last=settings.last_step > 0,
        )  # fmt: skip
    case.check(f"output.{kind}.sample", drawn)
    if kind != "s_new":
        case.check(f"output.{kind}.trajectory", torch.stack(trajectory))
