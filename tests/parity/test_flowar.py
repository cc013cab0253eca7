"""FlowAR is numerically the public one: both flow heads, training at several lists of scales, guided drawing."""

import pytest
import torch
from torch import Tensor, nn

from megavar import flow_matching
from megavar.conditions import Condition
from megavar.config.generators.flowar import HEAD_SIZE, FlowARConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.procedures.flowar import FlowARSampling
from megavar.config.recipes.flowar import FlowARRecipeConfig
from megavar.config.token_space import TokenSpace
from megavar.generators.flowar import FlowAR
from megavar.generators.flowar.head import FlowHead, TimeEmbedding, integer_times
from megavar.generators.flowar.published import FlowARLayout
from megavar.generators.inputs import FlowScaleInputs
from megavar.parallel.logical import logical_tensors
from megavar.recipes.flowar import FlowInputs, NextScaleFlow
from megavar.sampling.procedures.flowar import NextScaleFlow as Sampler
from megavar.training.checkpoint.weights import fill, shapes_of
from megavar.transformer.sequence import visible

from .cases import Case, Family

pytestmark = pytest.mark.usefixtures("single_process")
FLOWAR = Family("flowar", aside={"batch": "the inputs' shapes say it", "latent": "the input's shape says it"})


class Patches:
    """Packing without a tokenizer: tokens are the pixels of the map."""

    stride = 1

    def __init__(self, space: TokenSpace) -> None:
        self.space = space

    def unpack(self, tokens: Tensor) -> Tensor:
        side = int(tokens.shape[1] ** 0.5)
        return tokens.transpose(1, 2).unflatten(2, (side, side))

    def pack(self, maps: Tensor) -> Tensor:
        return maps.flatten(2).transpose(1, 2)

    def encode(self, images: Tensor) -> Tensor:
        return images

    def tokens(self, latents: Tensor) -> Tensor:
        return self.pack(latents)


def is_head(case: Case) -> bool:
    return "grid_sides" in case.config


def is_training(case: Case) -> bool:
    return "label_drop_prob" in case.config


def is_drawing(case: Case) -> bool:
    return "scale" in case.config and not is_training(case)


def space_of(scales: tuple[int, ...], channels: int) -> TokenSpace:
    return TokenSpace("latent", (scales[-1],), scales[-1] ** 2, None, channels, image_side=scales[-1] * 16)


def build(case: Case) -> FlowAR:
    sizes = case.config
    assert sizes["null_class"] == sizes["num_class_rows"] - 1
    config = FlowARConfig(
        scales=tuple(sizes["scale"]),
        width=sizes["embed_dim"],
        encoder_depth=sizes["depth_encoder"],
        decoder_depth=sizes["depth_decoder"],
        heads=sizes["num_heads"],
        head_depth=sizes["diffloss_d"],
        head_width=sizes["diffloss_w"],
        head_cross_attention=sizes["cross"],
        classes=sizes["num_class_rows"] - 1,
    )
    assert config.feed_forward_size == sizes["mlp_hidden"]
    space = space_of(config.scales, sizes["vae_embed_dim"])
    model = FlowAR(config, space, taps=tuple(f"block.{number}" for number in range(config.depth)))
    fill(model, FlowARLayout(config, space).load(case.under("weights."), shapes_of(model)))
    return model


@FLOWAR.each_case(is_training)
def test_training_equals_the_reference(case: Case) -> None:
    model = build(case)
    scales, space = model.choice.scales, model.space
    recipe = NextScaleFlow(
        FlowARRecipeConfig(tokenizer_weights="none", posterior="mean"), model, Patches(space),
        classes=case.config["null_class"], label_drop=case.config["label_drop_prob"], seed=0,
    )  # fmt: skip
    dropped = case["input.train.0000.rand"] < recipe.label_drop
    labels = torch.where(dropped, recipe.classes, case["input.labels"])
    case.check("output.labels_after_drop", labels)
    latent = case["input.latent"]
    data = recipe.truths(type("Given", (), {"latents": latent})())  # type: ignore[arg-type]
    case.check_series("output.gt", data)
    features = recipe.features(data)
    case.check("output.inputs", features)
    draws = range(len(scales))
    times = [case[f"input.train.{1 + 2 * k:04d}.rand"] for k in draws]
    noise = [case[f"input.train.{2 + 2 * k:04d}.randn_like"] for k in draws]
    noisy = [flow_matching.interpolate(*given) for given in zip(data, noise, times)]
    case.check_series("output.xt", noisy)
    inputs = FlowScaleInputs(labels, features, torch.cat(noisy, 1), torch.cat(times, 1)[..., 0])
    output = model(inputs)
    case.check_series("output.block", list(output.taps.values()))
    joining = model.blocks[str(model.choice.encoder_depth)].junction
    case.check("output.encoder_out", joining.norm(output.taps[f"block.{model.choice.encoder_depth - 1}"]))
    told = model(FlowScaleInputs(labels, features)).prediction
    case.check("output.z", told)
    sizes = [side * side for side in scales]
    case.check_series("output.velocity", list(output.prediction.split(sizes, 1)))
    losses = recipe.loss(output, FlowInputs(inputs, torch.cat(data, 1), torch.cat(noise, 1)))
    errors = flow_matching.velocity_error(output.prediction, torch.cat(data, 1), torch.cat(noise, 1))
    case.check_series("output.loss_per_sample", [part.mean(1) for part in errors.split(sizes, 1)])
    case.check("output.loss_scale", torch.stack([total / count for total, count in losses.means.values()]))
    loss = losses.total / recipe.valid(labels, 0)  # type: ignore[arg-type]
    case.check("output.loss", loss)
    rows = torch.arange(sum(sizes))
    case.check("output.visible", visible(model.sequence(inputs).layout.levels(), rows[:, None], rows))
    loss.backward()
    case.check_gradients(gradients_of(model, FlowARLayout(model.choice, space)))


@FLOWAR.each_case(lambda case: not is_head(case))
def test_published_layout_round_trips(case: Case) -> None:
    model = build(case)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    ours = {tensor.name: tensor.local(parameters[tensor.parameter]) for tensor in logical_tensors(model)}
    exported = FlowARLayout(model.choice, model.space).export(ours)
    stored = case.under("weights.")
    assert sorted(exported) == sorted(stored)
    for name, value in stored.items():
        if name.endswith("freqs"):
            torch.testing.assert_close(exported[name], value, rtol=1e-3, atol=0)  # stored in float16
        else:
            assert torch.equal(exported[name], value), name


class Replayed:
    """The noise of a case in the place of ours."""

    def __init__(self, draws: list[Tensor]) -> None:
        self.draws = draws

    def normal(self, positions: Tensor, channels: int) -> Tensor:
        return self.draws.pop(0)


@FLOWAR.each_case(is_drawing)
def test_guided_drawing_equals_the_reference(case: Case) -> None:
    model = build(case).eval()
    sampler = Sampler(
        FlowARSampling(
            steps=case.config["num_steps"],
            guidance=case.config["cfg"],
            guidance_until=case.config["guidance_high"],
        )
    )
    labels, count = case["input.labels"], len(model.choice.scales)
    noise = Replayed([case[f"input.sample.{k:04d}.randn"][: len(labels)] for k in range(count)])
    condition = Condition(labels, classes=model.choice.classes)
    case.check("output.cfg_per_scale", torch.tensor([sampler.guidance_of(k, count) for k in range(count)]))
    case.check("output.time_int", integer_times(sampler.times()[:-1]).expand(count, -1))
    steps = list(sampler.steps(model, Patches(model.space), condition, noise))  # type: ignore[arg-type]
    for k, step in enumerate(steps):
        case.check(f"output.z.{k}", step.condition)
        case.check(f"output.sample.{k}", step.tokens)
        if step.features is not None:
            case.check(f"output.input.{k}", step.features)
    case.check("output.latent", Patches(model.space).unpack(steps[-1].tokens))
    with torch.no_grad():  # the cache changes nothing
        features = torch.cat([step.features for step in steps[1:]], 1)  # type: ignore[misc]
        whole = model(FlowScaleInputs(labels, features)).prediction
    cached = torch.cat([step.condition[: len(labels)] for step in steps], 1)
    torch.testing.assert_close(whole, cached, atol=2e-5, rtol=1e-4)


def build_head(case: Case) -> FlowHead:
    sizes = case.config
    choice = FlowARConfig(
        scales=tuple(sizes["grid_sides"]), width=sizes["z_channels"], heads=1, head_depth=sizes["num_res_blocks"],
        head_width=sizes["model_channels"], head_cross_attention=sizes["cross"], rope_side=sizes["rope_pt_seq_len"],
    )  # fmt: skip
    assert (sizes["heads"], sizes["head_dim"]) == (choice.head_width // HEAD_SIZE, HEAD_SIZE)
    assert choice.head_feed_forward_size == sizes["mlp_hidden"]
    head = FlowHead(choice, FlowAR.layers(choice, ParallelConfig(), torch.float32), sizes["in_channels"])
    state = {f"flownet.{name}": value for name, value in case.under("weights.").items()}
    whole = nn.ModuleDict({"head": head})
    fill(whole, FlowARLayout(choice, None).load(state, shapes_of(whole)))
    return head


def gradients_of(model: nn.Module, layout: FlowARLayout, prefix: str = "") -> dict[str, Tensor]:
    """Stand-ins for the authors' parameters, by their names, with our gradients."""
    parameters, named = dict(model.named_parameters()), {}
    for tensor in logical_tensors(model):
        parameter = parameters[tensor.parameter]
        assert parameter.grad is not None, tensor.name
        part = tensor.local(parameter.detach()).clone()
        part.grad = tensor.local(parameter.grad).clone()
        named[layout.names(tensor.name)[0].removeprefix(prefix)] = part
    return named


@FLOWAR.each_case(is_head)
def test_flow_head_equals_the_reference(case: Case) -> None:
    head = build_head(case)
    sides = tuple(case.config["grid_sides"])
    times = case["input.t"][:, None]
    for side in sides:
        z = case[f"input.z.side{side}"]
        case.check(f"output.velocity.side{side}", head(case[f"input.x.side{side}"], times, z, (side,)))
    together = head(
        torch.cat([case[f"input.x.side{side}"] for side in sides], 1), times.expand(-1, len(sides)),
        torch.cat([case[f"input.z.side{side}"] for side in sides], 1), sides,
    )  # fmt: skip
    apart = torch.cat([case.tensors[f"output.velocity.side{side}"] for side in sides], 1)
    torch.testing.assert_close(together, apart, atol=2e-5, rtol=1e-4)
    case.check("output.time_int", integer_times(case["input.t"]))
    case.check("output.time_embed", head.time(case["input.t"]))
    case.check("output.timestep_sincos", TimeEmbedding.sinusoids(case["input.t"]))
    hidden: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda module, given, made: hidden.append(made)) for block in head.blocks]
    last = sides[-1]
    head(case[f"input.x.side{last}"], times, case[f"input.z.side{last}"], (last,))
    [hook.remove() for hook in hooks]
    case.check_series("output.hidden", [one.transpose(0, 1) for one in hidden])
    t, noise = case["input.loss.0000.rand"], case["input.loss.0001.randn_like"]
    noisy = flow_matching.interpolate(case["input.data"], noise, t)
    case.check("output.loss_xt", noisy)
    predicted = head(noisy, t[..., 0], case[f"input.z.side{last}"], (last,))
    case.check("output.loss_velocity", predicted)
    loss = flow_matching.velocity_error(predicted, case["input.data"], noise).mean(1)
    case.check("output.loss_per_sample", loss)
    case.check("output.loss", loss.mean())
    loss.mean().backward()
    whole = nn.ModuleDict({"head": head})
    case.check_gradients(gradients_of(whole, FlowARLayout(FlowARConfig(), None), "flownet."))


@FLOWAR.each_case(is_head)
@pytest.mark.parametrize("kind", ["s_nocfg", "s_cfg", "s_cfg25"])
def test_sampler_equals_the_reference(case: Case, kind: str) -> None:
    head = build_head(case)
    n = 25 if kind == "s_cfg25" else case.config["num_steps"]
    high = 0.9 if kind == "s_cfg25" else case.config["guidance_high"]
    guidance = 1.0 if kind == "s_nocfg" else case.config["cfg"]
    sampler = Sampler(FlowARSampling(steps=n, guidance=guidance, guidance_until=high))
    side, seen, given = case.config["grid_sides"][-1], [], case[f"input.{kind}.0000.randn"]

    class Alone:
        def velocity(self, noisy: Tensor, times: Tensor, condition: Tensor, scale: int) -> Tensor:
            seen.append((integer_times(times[:1]), noisy))
            return head(noisy, times[:, None], condition, (side,))

    for steps in (10, 25, 50):
        grid = Sampler(FlowARSampling(steps=steps)).times()
        if f"output.t_grid.{steps}" in case:
            case.check(f"output.t_grid.{steps}", grid)
            case.check(f"output.t_grid_int.{steps}", integer_times(grid[:-1]))
    begin = given if kind == "s_nocfg" else given[: len(given) // 2]
    with torch.no_grad():
        drawn = sampler.flow(Alone(), begin, case["input.z_sample"], 0, guidance)  # type: ignore[arg-type]
    # The unguided half of a guided drawing never meets a result, and is not computed here: its rows are as stored.
    case.check(f"output.{kind}.sample", torch.cat([drawn, case.tensors[f"output.{kind}.sample"][len(drawn) :]]))
    case.check(f"output.{kind}.time_int", torch.cat([time for time, _ in seen]))
    if f"output.{kind}.network_input" in case:
        stored = case[f"output.{kind}.network_input"].clone()
        found = stored.clone()
        for step, (_, noisy) in enumerate(seen):
            found[step, : len(noisy)] = noisy
        case.check(f"output.{kind}.network_input", found)
