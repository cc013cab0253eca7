"""MAR is numerically the public one: diffusion head and chain, masked training, iterative drawing."""

import re

import pytest
import torch
from torch import Tensor, nn

from megavar.conditions import Condition
from megavar.config.denoising_mlp import DenoisingMLPConfig
from megavar.config.generators.mar import MARConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.procedures.mar import MARSampling
from megavar.config.recipes.mar import MARRecipeConfig
from megavar.config.token_space import TokenSpace
from megavar.diffusion import Diffusion
from megavar.generators.denoising_mlp import DenoisingMLP, published_name
from megavar.generators.inputs import MaskedInputs
from megavar.generators.mar import MAR
from megavar.generators.mar.published import MARLayout
from megavar.parallel.logical import logical_tensors
from megavar.recipes.mar import MaskedDiffusion, MaskedDiffusionInputs
from megavar.sampling.procedures.mar import MaskedDecoding
from megavar.training.checkpoint.weights import fill, shapes_of
from megavar.transformer.megatron_config import transformer_config

from .cases import Case, Family

pytestmark = pytest.mark.usefixtures("single_process")
MAR_CASES = Family(
    "mar",
    aside={
        "n_rows": "the inputs' shapes say it", "batch": "the inputs' shapes say it", "timm": "a version",
        "attn_dropout": "0 in these cases; fused kernels cannot",
    },
)  # fmt: skip


def is_head(case: Case) -> bool:
    return "z_channels" in case.config


def sampling(text: str, **settings: float) -> MARSampling:
    """The reference's "6" and "ddim5"."""
    found = re.fullmatch(r"(ddim)?(\d+)", text)
    assert found is not None
    return MARSampling(steps=int(found[2]), spacing="strided" if found[1] else "even", **settings)


def draws_of(case: Case, kind: str) -> list[Tensor]:
    return [case[name] for name in sorted(case.tensors) if name.startswith(f"input.{kind}.")]


def build_head(case: Case) -> tuple[DenoisingMLP, dict[str, str]]:
    sizes = DenoisingMLPConfig(width=case.config["width"], depth=case.config["depth"])
    condition, channels = case.config["z_channels"], case.config["target_channels"]
    trunk = transformer_config(ParallelConfig(), torch.float32, depth=1, width=condition, heads=1, feed_forward=1)
    head = DenoisingMLP(sizes, trunk, channels, 2 * channels)
    stored = case.under("weights.net.")
    names = {name: str(published_name(name, sizes)) for name in shapes_of(head)}
    assert sorted(names.values()) == sorted(stored)
    fill(head, {name: stored[theirs] for name, theirs in names.items()})
    return head, names


@MAR_CASES.each_case(is_head)
def test_diffusion_head_equals_the_reference(case: Case) -> None:
    (head, names), chain = build_head(case), Diffusion()
    output = head(case["input.x"], case["input.t"], case["input.z"])
    case.check("output.net_out", output)
    data, noise = case["input.target"], case["input.noise"]
    noisy = chain.noisy(data, noise, case["input.t"])
    case.check("output.x_t", noisy)
    squared, bound = chain.errors(head(noisy, case["input.t"], case["input.z"]), data, noise, case["input.t"])
    case.check("output.fixed_t.mse", squared)
    case.check("output.fixed_t.vb", bound)
    case.check("output.fixed_t.loss", squared + bound)
    times, noise = draws_of(case, "loss")
    given = head(chain.noisy(data, noise, times), times, case["input.z"])
    total = torch.stack(chain.errors(given, data, noise, times)).sum(0)
    loss = (total * case["input.mask"]).sum() / case["input.mask"].sum()
    case.check("output.loss", loss)
    loss.backward()
    case.check_gradients({f"net.{names[name]}": value for name, value in head.named_parameters()})
    case.check("output.train_betas_every50", chain.betas[::50])


@MAR_CASES.each_case(is_head)
def test_chains_equal_the_reference(case: Case) -> None:
    head = build_head(case)[0]
    for kind, suffix in (("num_sampling_steps", ""), ("num_sampling_steps_alt", "_alt")):
        chain = MaskedDecoding(sampling(case.config[kind])).chain
        case.check(f"output.timestep_map{suffix}", chain.kept)
        if not suffix:
            case.check("output.gen_betas", chain.betas)
            continue
        steps = case.tensors["output.pmv.t_index"]
        case.check("output.pmv.t_index", steps)
        output = head(case["input.x"], chain.kept[steps], case["input.z"])
        posterior = chain.posterior(output, case["input.x"], steps)
        for name, found in zip(("mean", "log_variance", "pred_xstart"), posterior):
            case.check(f"output.pmv.{name}", found)
    for kind, draws, guided in (("nocfg", "s1", False), ("cfg", "s2", True), ("cfg_alt", "s3", True)):
        text = case.config["num_sampling_steps_alt" if kind.endswith("alt") else "num_sampling_steps"]
        decoding = MaskedDecoding(sampling(text, temperature=case.config["temperature"]))
        normals, told = draws_of(case, draws), case["input.z_cfg"]
        count, outputs = len(normals[0]), []

        def denoise(noisy: Tensor, times: Tensor, condition: Tensor, outputs: list[Tensor] = outputs) -> Tensor:
            outputs.append(head(noisy, times, condition))
            return outputs[-1]

        halves = [normal[:count] for normal in normals]
        with torch.no_grad():
            given = told if guided else told[:count]
            drawn = decoding.diffuse(denoise, given, halves.__getitem__, case.config["cfg"])
        stored = case.tensors[f"output.sample_{kind}"]  # the half without condition never meets a result
        case.check(f"output.sample_{kind}", torch.cat([drawn, stored[count:]]))
        if guided:
            case.check(f"output.sample_{kind}.net_out", torch.stack(outputs))


def build(case: Case) -> MAR:
    sizes = case.config
    assert sizes["encoder_embed_dim"] == sizes["decoder_embed_dim"]
    assert sizes["encoder_num_heads"] == sizes["decoder_num_heads"] and sizes["norm_eps"] == 1e-6
    choice = MARConfig(
        width=sizes["encoder_embed_dim"],
        encoder_depth=sizes["encoder_depth"],
        decoder_depth=sizes["decoder_depth"],
        heads=sizes["encoder_num_heads"],
        expansion=sizes["mlp_ratio"],
        buffer=sizes["buffer_size"],
        classes=sizes["class_num"],
        head=DenoisingMLPConfig(width=sizes["diffloss_w"], depth=sizes["diffloss_d"]),
        dropout=sizes["proj_dropout"],
        label_drop=sizes["label_drop_prob"],
    )
    side = sizes["img_size"] // sizes["vae_stride"] // sizes["patch_size"]
    channels = sizes["vae_embed_dim"] * sizes["patch_size"] ** 2
    space = TokenSpace("latent", (side,), side * side, None, channels, image_side=sizes["img_size"])
    model = MAR(choice, space, taps=tuple(f"block.{number}" for number in range(choice.depth)))
    fill(model, MARLayout(choice, space).load(case.under("weights."), shapes_of(model)))
    return model


@MAR_CASES.each_case(lambda case: not is_head(case))
def test_training_equals_the_reference(case: Case) -> None:
    model = build(case)
    draws, layout = case.config["diffusion_batch_mul"], MARLayout(model.choice, model.space)
    recipe = MaskedDiffusion(
        MARRecipeConfig(tokenizer_weights="none", noise_draws=draws), model, None,
        classes=model.choice.classes or 0, label_drop=model.choice.label_drop, seed=0,
    )  # fmt: skip
    tokens = case["input.latents"].flatten(2).transpose(1, 2)
    case.check("output.patchified", tokens)
    batch, length, channels = tokens.shape
    masked = case["input.mask"].bool()
    count = int(masked[0].sum())  # the first ones of the order
    assert torch.equal(case["input.orders"].argsort(1) < count, masked)
    times, noise = draws_of(case, "loss")
    times = times.view(draws, batch, length).transpose(0, 1)
    noise = noise.view(draws, batch, length, channels).transpose(0, 1)
    inputs = MaskedInputs(case["input.labels"], tokens, masked)
    output = model(inputs)
    case.check("output.decoder_z", output.prediction)
    junction = model.blocks[str(model.choice.encoder_depth)].junction
    encoded = junction.norm(output.taps[f"block.{model.choice.encoder_depth - 1}"])
    known = torch.cat([torch.ones(batch, model.choice.buffer, dtype=torch.bool), ~masked], 1)
    case.check("output.encoder_out", encoded[known].view(batch, -1, encoded.shape[-1]))
    inputs.noisy, inputs.times = recipe.chain.noisy(tokens[:, None], noise, times), times
    loss = recipe.loss(model(inputs), MaskedDiffusionInputs(inputs, noise)).total / masked.sum()
    case.check("output.loss", loss)
    loss.backward()
    parameters, named = dict(model.named_parameters()), {}
    for tensor in logical_tensors(model):
        gradient = parameters[tensor.parameter].grad
        if gradient is not None:
            (value,) = layout.split(tensor.name, tensor.local(gradient))
            part = named[layout.names(tensor.name)[0]] = nn.Parameter(torch.zeros_like(value))
            part.grad = value.clone()
    stored = case.under("grad_norm.")
    quiet = {name for name, value in stored.items() if float(value) == 0}
    absent = {name: torch.zeros(1) for name in quiet - named.keys()}
    case.check_gradients({name: value for name, value in (named | absent).items() if name in stored})


@MAR_CASES.each_case(lambda case: not is_head(case))
def test_published_layout_round_trips(case: Case) -> None:
    model = build(case)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    ours = {tensor.name: tensor.local(parameters[tensor.parameter]) for tensor in logical_tensors(model)}
    exported, stored = MARLayout(model.choice, model.space).export(ours), case.under("weights.")
    assert sorted(exported) == sorted(stored)
    assert all(torch.equal(exported[name], value) for name, value in stored.items())


class Replayed:
    """The noise of a case in the place of ours: of its two halves the conditional one."""

    def __init__(self, draws: list[Tensor], samples: int) -> None:
        self.draws, self.indices = draws, torch.arange(samples)

    def normal(self, places: Tensor, channels: int, repetition: int = 0) -> Tensor:
        drawn = self.draws.pop(0)
        return drawn[: places.numel()].view(*places.shape, channels)


@MAR_CASES.each_case(lambda case: not is_head(case))
@pytest.mark.parametrize("suffix", ["", "_alt"])
def test_drawing_equals_the_reference(case: Case, suffix: str) -> None:
    model, labels = build(case).eval(), case["input.labels"]
    settings = sampling(
        case.config[f"num_sampling_steps{suffix}"], iterations=case.config["num_iter"], guidance=case.config["cfg"],
        guidance_schedule=case.config["cfg_schedule"], temperature=case.config["temperature"],
    )  # fmt: skip
    decoding = MaskedDecoding(settings)
    decoding.order = lambda length, indices: case["input.orders"]  # type: ignore[method-assign]
    case.check(f"output.timestep_map{suffix}", decoding.chain.kept)
    noise = Replayed(draws_of(case, f"gen{suffix}"), len(labels))
    condition = Condition(labels, classes=model.choice.classes or 0)
    tokenizer = type("Tokens", (), {"space": model.space})()
    steps = list(decoding.steps(model, tokenizer, condition, noise))  # type: ignore[arg-type]
    assert not noise.draws
    case.check_series(f"output.gen_z{suffix}", [step.condition for step in steps])
    case.check("output.gen_cfg_per_iter", torch.tensor([step.guidance for step in steps]))
    side = model.space.sides[0]
    case.check(f"output.sampled_latents{suffix}", steps[-1].tokens.transpose(1, 2).unflatten(2, (side, side)))
