"""TiTok is numerically the public one: tokens, codes or pixels, both stages, posteriors, gradients, public layouts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megavar.config.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from megavar.config.tokenizers.titok import TiTokConfig
from megavar.config.tokenizers.vision import VisionTransformerConfig
from megavar.tokenizers.titok import TiTok
from megavar.tokenizers.titok.published import TiTokLayout, TiTokStage1Layout

from .cases import Case, Family

TITOK = Family(
    "titok",
    aside={
        "batch": "the inputs' shapes say it",
        "image_*": "the inputs' shapes and values say it",
        "model.vq_model.vit_*_model_size": "names of sizes that stand under encoder and decoder",
        "pixel.*": "read for models with a pixel decoder",
        "losses.quantizer_weight": "read where the quantizer has a loss",
        "input.target_codes": "read in the first stage",
        "note": "in words",
        "model.vq_model.finetune_decoder": "read of models that predict codes",
    },
)


def sizes(given: dict) -> VisionTransformerConfig:
    return VisionTransformerConfig(width=given["width"], depth=given["layers"], heads=given["heads"])


def layout_of(case: Case, config: TiTokConfig) -> TiTokLayout:
    both = config.legacy and not case.config["model"]["vq_model"]["finetune_decoder"]
    return (TiTokStage1Layout if both else TiTokLayout)(config, config.space)


def build(case: Case) -> TiTok:
    given, image_side = case.config["model"]["vq_model"], case.config["dataset"]["preprocessing"]["crop_size"]
    pixel, patch = case.config["pixel"], given["vit_dec_patch_size"]
    assert len(pixel["channel_mult"]) == pixel["num_resolutions"]
    config = TiTokConfig(
        tokens=given["num_latent_tokens"],
        quantization=given["quantize_mode"],
        vocabulary_size=given["codebook_size"],
        code_dimension=given["token_size"],
        normalized_codes=given["use_l2_norm"],
        commitment_weight=given["commitment_cost"],
        encoder=sizes(case.config["encoder"]),
        decoder=sizes(case.config["decoder"]),
        patch=given["vit_enc_patch_size"],
        decoder_patch=patch,
        image_side=image_side,
        legacy=given["is_legacy"],
        pixel=MaskGITVQGANConfig(
            side=image_side // patch,
            vocabulary_size=pixel["num_embeddings"],
            code_dimension=pixel["embedding_dim"],
            base_channels=pixel["hidden_channels"],
            channel_multipliers=tuple(pixel["channel_mult"]),
            residual_blocks=pixel["num_res_blocks"],
        ),
    )
    model = TiTok(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    loaded = layout_of(case, config).load(case.under("weights."), expected)
    model.load_state_dict(model.state_dict() | loaded)
    return model


def spread(vectors: Tensor) -> Tensor:
    """[B, K, C] as the reference has it, [B, C, 1, K]."""
    return vectors.mT[:, :, None]


def check_hidden(case: Case, model: TiTok, images: Tensor, vectors: Tensor) -> None:
    """Hidden states of both transformers, block by block."""
    for name, part in (("enc", model.encoder), ("dec", model.decoder)):
        seen: list[Tensor] = []
        hooks = [b.register_forward_hook(lambda _, __, out, into=seen: into.append(out)) for b in part.transformer]
        model.vectors(images) if name == "enc" else model.decoder(vectors)
        case.check_series(f"output.{name}_hidden", seen)
        for hook in hooks:
            hook.remove()


def is_vq(case: Case) -> bool:
    return case.config["model"]["vq_model"]["quantize_mode"] == "vq"


@TITOK.each_case(is_vq)
def test_tokens_and_gradients_equal_the_reference(case: Case) -> None:
    model, images = build(case), 2 * case["input.image"] - 1
    second = case.config["model"]["vq_model"]["finetune_decoder"]
    with torch.set_grad_enabled(not second):  # the second stage trains the decoder alone
        vectors = model.vectors(images)
    case.check("output.z", spread(vectors))
    line = model.quantize(vectors)
    case.check("output.z_quantized", spread(line.features))
    case.check("output.ids", line.ids)
    assert torch.equal(model.tokens(model.encode(images)), line.ids)
    case.check("output.commitment_loss", line.commitment)
    case.check("output.codebook_loss", line.codebook)
    case.check("output.quantizer_loss", line.commitment + line.codebook)
    quantizer = case.config["losses"]["quantizer_weight"] * (line.commitment + line.codebook)
    decoded = model.decoder(line.features.detach() if second else line.features)
    case.check("output.decoder_out", decoded)
    of_ids = model.decoder(model.embed(line.ids))
    if model.config.legacy and not second:
        case.check("output.decode_tokens", of_ids)
        error = F.cross_entropy(decoded.flatten(2), case["input.target_codes"])
        case.check("output.stage1.reconstruction_loss", error)
        total = error + quantizer
    else:
        picture, _ = model.picture(line.features.detach() if second else line.features)
        if "output.decoded" in case:
            case.check("output.decoded", picture)
        of_ids, _ = model.picture(model.embed(line.ids))
        case.check("output.decode_tokens", of_ids)
        total = F.mse_loss(picture, case["input.image"]) + (0 if second else quantizer)
        assert torch.equal(model.decode(line.ids), (2 * of_ids - 1).clamp(-1, 1))
    case.check("output.total_loss", total)
    total.backward()
    layout = layout_of(case, model.config)
    case.check_gradients({layout.names(name)[0]: p for name, p in model.named_parameters()})
    check_hidden(case, model, images, line.features)


@TITOK.each_case(lambda case: not is_vq(case))
def test_posteriors_and_gradients_equal_the_reference(case: Case) -> None:
    model, images = build(case), 2 * case["input.image"] - 1
    vectors = model.vectors(images)
    case.check("output.z", spread(vectors))
    posterior = model.posterior(vectors)
    case.check("output.posterior_mean", spread(posterior.mean))
    case.check("output.posterior_logvar", spread(posterior.log_variance))
    case.check("output.kl", posterior.divergence().sum(-1))
    drawn = posterior.sample(case["input.noise.0000.randn"][:, :, 0].mT)
    case.check("output.z_quantized", spread(drawn))
    decoded = model.decoder(drawn)
    case.check("output.decoder_out", decoded)
    total = F.mse_loss(decoded, case["input.image"]) + 1e-3 * posterior.divergence().sum(-1).mean()
    case.check("output.total_loss", total)
    total.backward()
    layout = layout_of(case, model.config)
    case.check_gradients({layout.names(name)[0]: p for name, p in model.named_parameters()})
    check_hidden(case, model, images, drawn)
    means = model.tokens(model.encode(images))
    assert torch.equal(means, posterior.mean) and model.space.vocabulary is None
    assert model.decode(means).shape == images.shape


@TITOK.each_case()
def test_published_layout_round_trips(case: Case) -> None:
    model = build(case)
    exported = layout_of(case, model.config).export(model.state_dict())
    stored = case.under("weights.")
    assert sorted(exported) == sorted(stored)
    assert all(torch.equal(exported[name], value) for name, value in stored.items())


SMALL = VisionTransformerConfig(width=512, depth=8, heads=8)
BASE = VisionTransformerConfig(width=768, depth=12, heads=12)


@pytest.mark.parametrize(
    ("options", "millions"),
    [
        ({}, (641.05, 303.4, 306.8)),
        ({"tokens": 64, "encoder": BASE, "decoder": BASE}, (204.81, 85.9, 88.1)),
        ({"tokens": 128, "encoder": SMALL, "decoder": SMALL}, (83.67, 25.8, 27.0)),
    ],
)
def test_the_published_sizes(options: dict, millions: tuple[float, ...]) -> None:
    with torch.device("meta"):
        model = TiTok(TiTokConfig(**options))
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, model.encoder, model.decoder)]
    assert counts[0] == pytest.approx(millions[0], abs=0.006)
    assert counts[1:] == pytest.approx(millions[1:], abs=0.06)
