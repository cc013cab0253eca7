"""VGT-AE is numerically the released one: encoders, projection, normalization, noise, decoders, published layout."""

import torch
import torch.nn.functional as F

from megavar.config.tokenizers.vgt_ae import (
    DCAEDecoderConfig,
    InternViTConfig,
    QwenViTConfig,
    SDVAEDecoderConfig,
    VGTAEConfig,
)
from megavar.recipes.latent_noise import disturbance
from megavar.tokenizers.vgt_ae import VGTAE
from megavar.tokenizers.vgt_ae.encoders import merge_patches
from megavar.tokenizers.vgt_ae.published import VGTAELayout

from .cases import Case, Family

VGT_AE = Family("vgt", aside={"batch": "the inputs' shapes say it", "image_shape": "the input's shape says it"})
SMALL = SDVAEDecoderConfig(channels=(8, 8), layers=1, norm_groups=4)
"""A decoder for cases without one."""


def load(case: Case, config: VGTAEConfig, prefixes: tuple[str, ...]) -> VGTAE:
    """A model with the case's weights, read by the published layout; what the case lacks stays as it is."""
    model = VGTAE(config).eval()
    expected = {
        name: tuple(value.shape) for name, value in model.state_dict().items() if name.startswith(prefixes)
    }
    layout = VGTAELayout(config, config.space)
    loaded = layout.load(case.under("weights."), expected)
    model.load_state_dict(model.state_dict() | loaded)
    again = layout.export(loaded)
    stored = case.under("weights.")
    assert again.keys() == stored.keys() and all(torch.equal(again[name], stored[name].float()) for name in stored)
    return model


@VGT_AE.each_case(lambda case: "vit" in case.config)
def test_internvit_latents_equal_the_reference(case: Case) -> None:
    given, vit = case.config, case.config["vit"]
    config = VGTAEConfig(
        image_side=vit["image_size"],
        encoder=InternViTConfig(
            width=vit["hidden_size"],
            depth=vit["num_hidden_layers"],
            heads=vit["num_attention_heads"],
            feed_forward=vit["intermediate_size"],
            patch=vit["patch_size"],
            qkv_bias=vit["qkv_bias"],
            qk_normalization=vit["qk_normalization"],
            norm=vit["norm_type"],
            norm_epsilon=vit["layer_norm_eps"],
            activation=vit["hidden_act"],
        ),
        decoder=SMALL,
        semantic_width=given["llm_hidden_size"],
        channels=given["embed_dim"],
        normalize=given["encoder_norm"],
        scale=given["scale_embeding"],
        posterior=given["kl"],
    )
    model = load(case, config, ("encoder.", "projection."))
    images = case["input.image"]
    with torch.no_grad():
        case.check("output.vit_embeddings", model.encoder.tower.embeddings((images + 1) / 2))
        semantic = model.encoder.semantic(images)
        case.check("output.semantic", semantic)
        case.check("output.semantic01", model.encoder(case["input.image01"]))  # the release does not normalize these
        case.check("output.pixel_shuffle", merge_patches(case["input.shuffle_in"]))
        latents = model.encode(images)
        if config.posterior:
            drawn = next(name for name in case.tensors if name.startswith("input.") and name.endswith("randn"))
            side = latents.shape[-1]
            normal = model.pack(case[drawn])
            latents = model.sample(latents, normal).mT.unflatten(2, (side, side))
        case.check("output.latents", latents)
    assert torch.equal(model.encode(images), model.latents(semantic, *model.space.sides * 2))


@VGT_AE.each_case(lambda case: "merged_grid" in case.config)
def test_qwen_latents_and_images_equal_the_reference(case: Case) -> None:
    given, decoder = case.config, case.config["decoder"]
    assert "AutoencoderDC" in decoder["cls"]
    patch, merge = given["patch_size"], given["spatial_merge_size"]
    config = VGTAEConfig(
        image_side=2 * given["stride"],
        encoder=QwenViTConfig(
            width=16, depth=1, heads=2, feed_forward=16, full_attention=(0,), patch=patch,
            temporal_patch=given["temporal_patch_size"],
        ),  # the reference's tower is fixed features
        decoder=DCAEDecoderConfig(
            channels=decoder["decoder_block_out_channels"],
            layers=decoder["decoder_layers_per_block"],
            blocks=decoder["decoder_block_types"],
            attention_kernels=decoder["decoder_qkv_multiscales"],
            head_size=decoder["attention_head_dim"],
            upsampling=decoder["upsample_block_type"],
            norm=decoder["decoder_norm_types"],
            activation=decoder["decoder_act_fns"],
        ),
        semantic_width=given["llm_hidden_size"],
        channels=decoder["latent_channels"],
        normalize=given["encoder_norm"],
        scale=given["scale_embeding"],
        shift=given["shift_embeding"],
    )  # fmt: skip
    assert (config.stride, given["embed_dim"]) == (patch * merge, decoder["latent_channels"])
    model = load(case, config, ("projection.", "decoder."))
    rows, columns = given["merged_grid"]
    images, semantic = case["input.image"], case["input.features"].view(-1, rows * columns, config.semantic_width)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (model.encoder.mean, model.encoder.deviation))
    with torch.no_grad():
        patches, grid = model.encoder.patches(((images + 1) / 2 - mean) / deviation)
        case.check("output.patches", patches[: len(case["output.patches"])])
        case.check("output.grid_thw", grid)
        x = semantic
        for number, block in enumerate(model.projection.blocks):
            x = block(x)
            case.check(f"output.down_block.{number}", x)
        case.check("output.down_mlp", model.projection(semantic))
        latents = model.latents(semantic, rows, columns)
        case.check("output.latents", latents)
        plain = model.projection(semantic) * config.scale + config.shift
        case.check("output.latents_no_norm", plain.mT.unflatten(2, (rows, columns)))
        if config.normalize:
            assert torch.equal(model.normalize(plain), model.pack(latents))
        case.check("output.decoder_raw", model.decoder((latents - config.shift) / config.scale))
        case.check("output.image_rec", model.decode_maps(latents))
    case.check(
        "output.perturbed",
        case["input.z_noise_in"]
        + disturbance("uniform", 0.1, case["input.perturb.0001.randn_like"], case["input.perturb.0000.rand"]),
    )
    assert F.mse_loss(model.decode(model.pack(case["input.z_noise_in"])[:, :4]), torch.zeros(1, 3, 56, 56)) > 0
