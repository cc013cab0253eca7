"""AliTok's tokenizer is numerically the public one: both decoders, losses, gradients, published layout."""

import torch
import torch.nn.functional as F

from megavar.config.tokenizers.alitok import AliTokConfig
from megavar.tokenizers.alitok import AliTok
from megavar.tokenizers.alitok.published import AliTokLayout
from tests.parity.test_titok import check_hidden, sizes, spread

from .cases import Case, Family

ALITOK = Family("alitok", aside={"batch": "the inputs' shapes say it", "image_range": "the inputs' values say it",
                                 "note": "in words"})  # fmt: skip


def is_tokenizer(case: Case) -> bool:
    return "aux_tokens" in case.config and "stage" in case.config


def build(case: Case) -> AliTok:
    given = case.config
    stored = case.under("weights.")
    causal = given["stage"] == 1
    config = AliTokConfig(
        image_side=given["image_size"],
        patch=given["patch_size"],
        prefix=given["aux_tokens"],
        vocabulary_size=given["codebook_size"],
        code_dimension=given["token_size"],
        normalized_codes=given["use_l2_norm"],
        commitment_weight=given["commitment_cost"],
        encoder=sizes(given["encoder"]),
        decoder=sizes(given["decoder"]),
        registers=len(stored["decoder.class_embedding"]),
        causal=causal,
    )
    assert config.side == given["grid_size"] and config.space.length == given["num_latent_tokens"]
    model = AliTok(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(model.state_dict() | AliTokLayout(config, config.space).load(stored, expected))
    return model


@ALITOK.each_case(is_tokenizer)
def test_tokens_and_gradients_equal_the_reference(case: Case) -> None:
    model, images = build(case), 2 * case["input.image"] - 1
    vectors = model.vectors(images)
    case.check("output.z", spread(vectors))
    line = model.quantize(vectors)
    case.check("output.ids", line.ids)
    case.check("output.z_quantized", spread(line.features))
    case.check("output.commitment_loss_mean", line.commitment)
    case.check("output.codebook_loss_mean", line.codebook)
    quantizer = line.commitment + line.codebook
    case.check("output.quantizer_loss", quantizer)
    picture = model.decoder(line.features)
    case.check("output.recon", picture.images)
    total = F.mse_loss(picture.images, case["input.image"]) + quantizer
    if picture.strip is not None:
        case.check("output.aux", picture.strip)
        total = total + (picture.strip - 0.5).square().mean()
    case.check("output.total_loss", total)
    total.backward()
    case.check_gradients(model)
    check_hidden(case, model, images, line.features)
    assert torch.equal(model.tokens(model.encode(images)), line.ids)
    decoded = (model.decode(line.ids) + 1) / 2
    if "output.decode_tokens" in case:
        case.check("output.decode_tokens", decoded)


@ALITOK.each_case(is_tokenizer)
def test_published_layout_round_trips(case: Case) -> None:
    model = build(case)
    exported = AliTokLayout(model.config, model.space).export(model.state_dict())
    stored = case.under("weights.")
    assert sorted(exported) == sorted(stored)
    assert all(torch.equal(exported[name], value) for name, value in stored.items())
