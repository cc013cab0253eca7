"""FlexVAR is numerically the public one: tokenizer, logits for several scale lists, gradients, published layouts."""

import random

import pytest
import torch
import torch.nn.functional as F

from megavar.conditions import Condition
from megavar.config.generators.flexvar import FlexVARConfig
from megavar.config.generators.var import SCALES
from megavar.config.procedures.flexvar import FlexVARSampling
from megavar.config.scale_lists.flexvar import FlexVARScaleLists
from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.llamagen_vq import LlamaGenVQConfig
from megavar.generators.flexvar import FlexVAR
from megavar.generators.flexvar.model import sines
from megavar.generators.flexvar.published import FlexVARLayout
from megavar.generators.inputs import ScaleInputs
from megavar.recipes.scale_lists.flexvar import RandomLists
from megavar.sampling.procedures.flexvar import FlexVARDecoding
from megavar.tokenizers.llamagen_vq import LlamaGenVQ
from megavar.tokenizers.llamagen_vq.published import LlamaGenVQLayout
from tests.parity.test_var_transformer import load, shapes

from .cases import Case, Family

pytestmark = pytest.mark.usefixtures("single_process")
FLEXVAR = Family(
    "flexvar",
    aside={
        "*drop*": "comparisons are without dropout, drop path and label drop",
        "batch": "the inputs' shapes say it",
        "image_*": "the inputs' shapes and values say it",
        "codebook_show_usage": "a statistic of the reference's training",
        "entropy_loss_ratio": "0 in the published model: the loss is not offered",
        "output.train.entropy_loss": "0",
        "output.multi_scale_encode_quant_last": "the same in another order of operations, which training does not use",
    },
)


def is_tokenizer(case: Case) -> bool:
    return "encoder_ch_mult" in case.config


def is_model(case: Case) -> bool:
    return "depth" in case.config


def is_list(case: Case) -> bool:
    return "max_total_tokens" in case.config


def tokenizer_of(case: Case) -> LlamaGenVQ:
    given = case.config
    config = LlamaGenVQConfig(
        scales=tuple(given["patch_nums"]),
        vocabulary_size=given["codebook_size"],
        code_dimension=given["codebook_embed_dim"],
        latent_channels=given["z_channels"],
        base_channels=given["ch"],
        channel_multipliers=tuple(given["encoder_ch_mult"]),
        residual_blocks=given["num_res_blocks"],
        commitment_weight=given["commit_loss_beta"],
    )
    assert config.downsample == given["downsample"] and given["codebook_l2_norm"]
    assert given["decoder_ch_mult"] == given["encoder_ch_mult"]
    model = LlamaGenVQ(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    loaded = LlamaGenVQLayout(config, config.space).load(case.under("weights."), expected)
    model.load_state_dict(loaded | {"quantize.usage_average": model.quantize.usage_average})
    return model


def quantizer_of(case: Case, sides: tuple[int, ...]) -> LlamaGenVQ:
    """The codebook of a transformer's case, in a tokenizer whose other parts are small and unused."""
    codes = case["input.codebook"] if "input.codebook" in case else case["weights.vae.quantize.embedding.weight"]
    config = LlamaGenVQConfig(
        scales=sides, vocabulary_size=len(codes), code_dimension=codes.shape[1], latent_channels=8, base_channels=8,
        norm_groups=8, channel_multipliers=(1,),
    )  # fmt: skip
    model = LlamaGenVQ(config)
    model.quantize.embedding.weight.data.copy_(codes)
    return model


def build(case: Case, sides: tuple[int, ...], kernel: str = "dense") -> FlexVAR:
    given = case.config
    config = FlexVARConfig(
        depth=given["depth"],
        width=given["embed_dim"],
        heads=given["num_heads"],
        feed_forward_ratio=given.get("mlp_ratio", 4.0),
        classes=given["num_classes"],
        shared_adaptive_norm=given["shared_aln"],
        qk_l2_norm=given["attn_l2_norm"],
        drop_path=0.0,
        label_drop=0.0,
        position_side=case["weights.pos_1LC"].shape[-1],
        attention_kernel=kernel,
    )
    assert list(case["weights.pos_1LC"].shape) == given.get("pos_table_shape", list(case["weights.pos_1LC"].shape))
    taps = ("embedding", *(f"block.{number}" for number in range(given["depth"])))
    space = TokenSpace.of_scales(sides, given["vocab_size"], given["Cvae"], image_side=sides[-1])
    model = FlexVAR(config, space, taps=taps)
    assert model.config.layernorm_epsilon == given.get("norm_eps", 1e-6)
    state = {name: value for name, value in case.under("weights.").items() if not name.startswith("vae.")}
    load(model, FlexVARLayout(model.choice, model.space).load(state, shapes(model)))
    return model


def published(model: FlexVAR) -> dict[str, torch.Tensor]:
    """Parameters by the authors' names."""
    layout = FlexVARLayout(model.choice, model.space)
    return {layout.names(name)[0]: parameter for name, parameter in model.named_parameters()}


@FLEXVAR.each_case(is_tokenizer)
def test_tokenizer_equals_the_reference(case: Case) -> None:
    model, sides = tokenizer_of(case), case.config["patch_nums"]
    latents = model.encode(case["input.image"])
    case.check("output.h", latents)
    ids, inputs = model.at(latents)
    case.check("output.idx_all", ids)
    case.check("output.var_input", inputs)
    maps = ids.split([side * side for side in sides], 1)
    case.check_series("output.idx", list(maps))
    areas = [F.interpolate(latents, size=(side, side), mode="area") for side in sides]
    case.check_series("output.h_area", areas)
    case.check("output.idx_fullres", model.quantize.search(latents))
    for index, (side, tokens) in enumerate(zip(sides, maps)):
        codes = model.embed(tokens).mT.unflatten(-1, (side, side))
        case.check(f"output.quant.{index}", codes)
        # Not clamped in the reference; a 1x1 map of it needs at least two values per group of its norms.
        case.check(f"output.image_rec.{index}", model.decoder(model.post_quant_conv(codes)))
    first = case["output.codebook_entry_l2"]
    case.check("output.codebook_entry_l2", model.embed(torch.arange(len(first))))
    state = None
    for k in range(len(sides) - 1):
        state, following = model.grow(state, maps[k], k)
        assert following is not None
        start = sum(side * side for side in sides[1 : k + 1])
        assert torch.equal(following, inputs[:, start : start + sides[k + 1] ** 2])
    assert torch.equal(model.decode(ids), model.decoder(model.post_quant_conv(codes)).clamp(-1, 1))


@FLEXVAR.each_case(is_tokenizer)
def test_tokenizer_loss_and_gradients_equal_the_reference(case: Case) -> None:
    model = tokenizer_of(case)
    quantized = model.quantize(model.quant_conv(model.encoder(case["input.image"])))
    case.check("output.quant_fullres", quantized.features)
    images = model.decoder(model.post_quant_conv(quantized.features))
    case.check("output.train.rec", images)
    error = F.mse_loss(images, case["input.image"])
    case.check("output.train.rec_mse", error)
    share = case.config["commit_loss_beta"]
    case.check("output.train.vq_loss", quantized.loss / (1 + share))  # both parts have the same value
    case.check("output.train.commit_loss", quantized.loss * share / (1 + share))
    (error + quantized.loss).backward()
    case.check_gradients(model)


@FLEXVAR.each_case(is_model)
def test_transformer_equals_the_reference_on_every_list_of_scales(case: Case) -> None:
    for number, sides in enumerate(map(tuple, case.config["patch_nums_train"])):
        model = build(case, tuple(case.config["patch_nums_constructor"]))
        ids = torch.cat(case.series(f"input.gt_idx.{number}"), 1)
        features = quantizer_of(case, sides).inputs(ids)
        case.check(f"output.train{number}.var_input", features)
        output = model(ScaleInputs(case["input.label_B"], features, sides=sides))
        case.check(f"output.train{number}.x_embed", output.taps["embedding"])
        case.check(f"output.train{number}.logits", output.prediction)
        loss = F.cross_entropy(output.prediction.transpose(1, 2), ids)
        case.check(f"output.train{number}.loss", loss)
        if number == 0:
            case.check_series("output.hidden", [output.taps[name] for name in model.taps[1:]])
            loss.backward()
            case.check_gradients(published(model))
            gradient = model.embedding.position.grad
            case.check("output.grad_pos_1LC_norm", gradient.norm(dim=0))


@FLEXVAR.each_case(is_model)
@pytest.mark.parametrize("form", ["var", "llamagen"])
def test_greedy_guided_decoding_equals_the_reference(case: Case, form: str) -> None:
    model = build(case, tuple(case.config["patch_nums_constructor"])).eval()
    settings = FlexVARSampling(
        guidance=case.config["cfg"], guidance_form=form, top_k=case.config["top_k"], largest=case.config["max_pn"]
    )
    condition = Condition(case["input.label_B"], classes=case.config["num_classes"])
    for number, sides in enumerate(map(tuple, case.config["patch_nums_infer"])):
        tokenizer = quantizer_of(case, sides)
        steps = list(FlexVARDecoding(settings).steps(model, tokenizer, condition, noise=None))
        case.check_series(f"output.infer{number}.{form}.idx", [step.ids for step in steps])
        case.check_series(f"output.infer{number}.{form}.logits_cfg", [step.logits for step in steps])


@FLEXVAR.each_case(is_model)
def test_positions_equal_the_reference(case: Case) -> None:
    model = build(case, tuple(case.config["patch_nums_constructor"]))
    for name in case.under("output.pos_area."):
        case.check(f"output.pos_area.{name}", model.embedding.places(int(name))[None])
    case.check("output.pos_init", sines(*model.embedding.position.shape[:2])[None])


@FLEXVAR.each_case(is_model)
def test_published_layout_round_trips(case: Case) -> None:
    model = build(case, tuple(case.config["patch_nums_constructor"]))
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    exported = FlexVARLayout(model.choice, model.space).export(ours)
    stored = case.under("weights.")
    assert sorted(exported) == sorted(stored)
    for name, value in stored.items():
        assert torch.equal(exported[name], value), name


@FLEXVAR.each_case(is_list)
def test_random_lists_equal_the_reference(case: Case) -> None:
    given = case.config
    lists = RandomLists(FlexVARScaleLists(longest=given["max_total_tokens"]), SCALES[256], seed=0)
    stored = [[side for side in row if side] for row in case["output.patch_nums"].tolist()]
    drawn = [list(lists.draw(random.Random(given["seed_base"] + row))) for row in range(len(stored))]
    assert drawn == stored
    case.compared.add("output.patch_nums")
    many = [lists.draw(random.Random(row)) for row in range(given["statistics_over"])]  # of other seeds
    tokens = [sum(side * side for side in sides) for sides in many]
    complete = sum(sides[-1] == SCALES[256][-1] for sides in many) / len(many)
    assert complete == pytest.approx(given["fraction_last_scale_is_16"], abs=0.015)
    assert sum(map(len, many)) / len(many) == pytest.approx(given["mean_num_scales"], abs=0.03)
    assert sum(tokens) / len(many) == pytest.approx(given["mean_tokens"], abs=3)
    assert (min(tokens), max(tokens)) == (given["min_tokens"], given["max_tokens"])
