"""VAR's tokenizer against the public reference: quantizer alone, whole autoencoder, convolutional blocks.

Each test builds the model from the case's own json config and feeds the case's own inputs.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megavar.config.tokenizers.multiscale_vq import MultiScaleVQConfig
from megavar.tokenizers.convolution import AttentionBlock, Downsample, ResidualBlock, Upsample
from megavar.tokenizers.multiscale_vq import MultiScaleVQ, phi_indices
from megavar.tokenizers.multiscale_vq.quantizer import MultiScaleQuantizer, ScaleStep
from tests.tokenizers.public_files import load_public, public_state

from .cases import Case, Family

VQVAE = Family(
    "var_vqvae",
    aside={
        "batch": "the inputs' shapes say it",
        "f_shape": "the inputs' shapes say it",
        "hw": "the inputs' shapes say it",
        "image_shape": "the inputs' shapes say it",
        "image_range": "how the inputs were drawn",
    },
)


def is_quantizer(case: Case) -> bool:
    return "Cvae" in case.config


def is_autoencoder(case: Case) -> bool:
    return "ch_mult" in case.config


def is_blocks(case: Case) -> bool:
    return "c0" in case.config


def quantizer_options(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Our config keys of the reference's quantizer options, which var_transformer cases share."""
    share, count = reference["share_quant_resi"], reference.get("default_qresi_counts")
    sharing = {0: "per_scale", 1: "shared"}.get(share, "partially_shared")
    return {
        "scales": tuple(reference["v_patch_nums"]),
        "vocabulary_size": reference["vocab_size"],
        "code_dimension": reference.get("Cvae", reference.get("z_channels")),
        "refinement": sharing,
        "refinement_count": share if share > 1 else count or None,
        "refinement_ratio": reference["quant_resi"],
        "normalized_search": reference["using_znorm"],
        "commitment_weight": reference["beta"],
    }


def autoencoder_config(reference: dict[str, Any]) -> MultiScaleVQConfig:
    return MultiScaleVQConfig(
        base_channels=reference["ch"],
        channel_multipliers=tuple(reference["ch_mult"]),
        residual_blocks=reference["num_res_blocks"],
        lowest_level_attention=reference["using_sa"],
        middle_attention=reference["using_mid_sa"],
        dropout=reference["dropout"],
        norm_groups=reference["group_norm"]["num_groups"],
        norm_epsilon=reference["group_norm"]["eps"],
        latent_kernel=reference["quant_conv_ks"],
        **quantizer_options(reference),
    )


def load_quantizer(case: Case) -> MultiScaleQuantizer:
    quantizer = MultiScaleQuantizer(MultiScaleVQConfig(**quantizer_options(case.config)))
    quantizer.load_state_dict(case.under("weights."), strict=True)
    return quantizer


def check_steps(case: Case, steps: list[ScaleStep], features: torch.Tensor, prefix: str = "output.") -> None:
    """Everything the reference computes scale by scale; intermediate tensors are stored for some cases only."""
    case.check_series(f"{prefix}idx", [step.ids for step in steps])
    case.check_series(f"{prefix}f_hat", [step.accumulated for step in steps])
    case.check_series(f"{prefix}f_rest", [features - step.accumulated for step in steps])
    for name, tensors in [
        ("z_down", [step.target for step in steps]),
        ("h_up", [step.upsampled for step in steps]),
        ("h_phi", [step.increment for step in steps]),
    ]:
        stored = case.series(f"{prefix}{name}")
        for index in range(len(stored)):
            case.check(f"{prefix}{name}.{index}", tensors[index])


@VQVAE.each_case(is_quantizer)
@torch.no_grad()
def test_quantizer_tokens_and_maps(case: Case) -> None:
    quantizer, features = load_quantizer(case), case["input.f"]
    check_steps(case, list(quantizer.steps(features)), features)
    ids = quantizer.quantize(features)
    case.check_series("output.idx", ids)
    case.check_series("output.f_hat", quantizer.accumulate(ids))
    if "output.var_input" in case:
        case.check("output.var_input", quantizer.teacher_forcing_input(ids))


@VQVAE.each_case(lambda case: is_quantizer(case) and "output.next_input.0" in case)
@torch.no_grad()
def test_quantizer_decoding_step_by_step(case: Case) -> None:
    quantizer, ids = load_quantizer(case), case.series("output.idx")
    f_hat = torch.zeros_like(case["input.f"])
    inputs = []
    for k, (tokens, scale) in enumerate(zip(ids, quantizer.scales)):
        codes = quantizer.embed(tokens).transpose(1, 2).unflatten(2, (scale, scale))
        f_hat, following = quantizer.next_input(k, f_hat, codes)
        inputs.append(following)
    case.check_series("output.next_input", inputs[:-1])
    case.check("output.f_hat_final_infer", f_hat)


@VQVAE.each_case(lambda case: is_quantizer(case) and "input.f_override" in case)
@torch.no_grad()
def test_quantizer_with_other_rectangular_scales(case: Case) -> None:
    quantizer, features = load_quantizer(case), case["input.f_override"]
    scales = [tuple(scale) if isinstance(scale, list) else scale for scale in case.config["v_patch_nums_override"]]
    check_steps(case, list(quantizer.steps(features, scales)), features, prefix="output.override.")
    ids = quantizer.quantize(features, scales)
    case.check_series("output.override.f_hat", quantizer.accumulate(ids, scales))


@VQVAE.each_case(is_quantizer)
def test_quantizer_training_loss_and_gradients(case: Case) -> None:
    quantizer, features = load_quantizer(case), case["input.f"].clone().requires_grad_()
    output = quantizer(features)
    (output.loss + (case["input.cotangent"] * output.features).sum()).backward()
    case.check("output.train.f_hat_st", output.features)
    case.check("output.train.vq_loss", output.loss)
    case.check("output.train.grad_f", features.grad)
    case.check_gradients(quantizer)


@VQVAE.each_case(lambda case: "phi_index_table" in case.description)
def test_refinement_of_every_scale(case: Case) -> None:
    for key, expected in case.description["phi_index_table"].items():
        convolutions, scales = (int(part.split("=")[1]) for part in key.split(","))
        assert list(phi_indices(convolutions, scales)) == expected, key


def load_autoencoder(case: Case) -> MultiScaleVQ:
    model = MultiScaleVQ(autoencoder_config(case.config))
    model.load_state_dict(case.under("weights."), strict=True)
    return model.eval()


@VQVAE.each_case(is_autoencoder)
@torch.no_grad()
def test_autoencoder_encode_and_decode(case: Case) -> None:
    model, images = load_autoencoder(case), case["input.image"]
    assert model.config.downsample == case.config["downsample"]
    features = model.encode(images)
    case.check("output.encoder_out", model.encoder(images))
    case.check("output.f", features)
    check_steps(case, list(model.quantizer.steps(features)), features)
    ids = model.quantizer.split(model.tokens(model.encode(images)))
    case.check_series("output.idx", ids)
    case.check("output.var_input", model.quantizer.teacher_forcing_input(ids))
    post = model.post_quant_conv(model.quantizer.accumulate(ids)[-1])
    case.check("output.post_quant", post)
    case.check("output.image_rec_unclamped", model.decoder(post))
    case.check("output.image_rec", model.decode(torch.cat(ids, 1)))
    case.check("output.image_rec_scale0", model.decode(ids[0]))


@VQVAE.each_case(is_autoencoder)
def test_autoencoder_training_loss_and_gradients(case: Case) -> None:
    model, images = load_autoencoder(case), case["input.image"]
    output = model(images)
    reconstruction_loss = F.mse_loss(output.images, images)
    (reconstruction_loss + output.quantized.loss).backward()
    case.check("output.train.vq_loss", output.quantized.loss)
    case.check("output.train.rec_mse", reconstruction_loss)
    case.check("output.train.rec", output.images)
    case.check_gradients(model)


@VQVAE.each_case(is_autoencoder)
def test_autoencoder_key_layout_round_trip(case: Case, tmp_path) -> None:
    weights = case.under("weights.")
    path = tmp_path / "reference.pth"
    torch.save(weights, path)
    model = MultiScaleVQ(autoencoder_config(case.config))
    load_public(model, path)
    exported = public_state(model)
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name].float()) for name in weights)


@VQVAE.each_case(is_blocks)
def test_convolutional_blocks(case: Case) -> None:
    config = case.config
    norm = {"norm_groups": config["num_groups"], "norm_epsilon": config["eps"]}
    blocks = nn.ModuleDict(
        {
            "res_same": ResidualBlock(config["c0"], config["c0"], **norm),
            "res_change": ResidualBlock(config["c0"], config["c1"], **norm),
            "attn": AttentionBlock(config["c0"], **norm),
            "down": Downsample(config["c0"]),
            "up": Upsample(config["c0"]),
        }
    )
    blocks.load_state_dict(case.under("weights."), strict=True)
    x = case["input.x"].clone().requires_grad_()
    total = torch.zeros(())
    for name, block in blocks.items():
        y = block(x)
        case.check(f"output.{name}", y)
        total = total + y.square().mean() + y.mean()
    total.backward()
    case.check("output.total", total)
    case.check("output.grad_x", x.grad)
    case.check_gradients(blocks)
