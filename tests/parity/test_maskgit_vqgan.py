"""MaskGIT's VQGAN is numerically the public port: tokens, images, losses, gradients, published layout."""

import pytest
import torch
import torch.nn.functional as F

from megavar.config.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from megavar.tokenizers.maskgit_vqgan import MaskGITVQGAN
from megavar.tokenizers.maskgit_vqgan.published import MaskGITVQGANLayout

from .cases import Case, Family

MASKGIT = Family("maskgit_vqgan", aside={"image_range": "the inputs' values say it"})


def build(case: Case) -> MaskGITVQGAN:
    given = case.config
    multipliers = tuple(given["channel_mult"])
    assert len(multipliers) == given["num_resolutions"] and given["z_channels"] == given["embedding_dim"]
    config = MaskGITVQGANConfig(
        side=given["resolution"] // 2 ** (len(multipliers) - 1),
        vocabulary_size=given["num_embeddings"],
        code_dimension=given["embedding_dim"],
        image_channels=given["num_channels"],
        base_channels=given["hidden_channels"],
        channel_multipliers=multipliers,
        residual_blocks=given["num_res_blocks"],
        codebook_weight=given["commitment_cost"],
    )
    assert given["dropout"] == config.dropout
    model = MaskGITVQGAN(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    loaded = MaskGITVQGANLayout(config, config.space).load(case.under("weights."), expected)
    model.load_state_dict(loaded | {"quantize.usage_average": model.quantize.usage_average})
    assert list(case["input.image"].shape) == given["image_shape"]
    return model


@MASKGIT.each_case()
def test_tokens_and_images_equal_the_reference(case: Case) -> None:
    model, images = build(case), 2 * case["input.image"] - 1
    latents = model.encode(images)
    case.check("output.z", latents)
    ids = model.tokens(latents)
    case.check("output.ids", ids)
    rows = latents.flatten(2).mT
    case.check("output.soft_code", F.softmax(-torch.cdist(rows, model.embed(torch.arange(model.space.vocabulary)))
                                             .square(), -1))  # fmt: skip
    codes = model.embed(ids).mT.unflatten(-1, latents.shape[2:])
    case.check("output.codebook_entry", codes)
    case.check("output.image_rec_unclamped", model.decoder(codes))
    case.check("output.image_rec", (model.decode(ids) + 1) / 2)


@MASKGIT.each_case()
def test_losses_and_gradients_equal_the_reference(case: Case) -> None:
    model, images = build(case), case["input.image"].clone().requires_grad_()
    output = model(2 * images - 1)
    case.check("output.z_q", output.quantized.features)
    case.check("output.train.quantizer_loss", output.quantized.loss)
    error = F.mse_loss((output.images + 1) / 2, images.detach())
    case.check("output.train.rec_mse", error)
    (error + output.quantized.loss).backward()
    case.check("output.train.grad_image", images.grad)
    case.check_gradients(model)


@MASKGIT.each_case()
def test_published_layout_round_trips(case: Case) -> None:
    model = build(case)
    exported = MaskGITVQGANLayout(model.config, model.space).export(model.state_dict())
    stored = case.under("weights.")
    assert sorted(exported) == sorted(stored)
    assert all(torch.equal(exported[name], value) for name, value in stored.items())


def test_the_published_sizes() -> None:
    with torch.device("meta"):
        model = MaskGITVQGAN(MaskGITVQGANConfig())
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts == {"encoder": 23_775_104, "decoder": 30_478_339, "quantize": 262_144}
    assert model.space.image_side == 256 and model.space.stored_type == "uint16"
    with pytest.raises(ValueError, match="not a multiple of norm_groups"):
        MaskGITVQGANConfig(base_channels=48)
