"""RAR is numerically the public one: raster and permuted training, gradients, guided decoding, published layout."""

import pytest
import torch
import torch.nn.functional as F

from megavar.conditions import Condition
from megavar.config.generators.rar import RARConfig
from megavar.config.procedures.raster import RasterSampling
from megavar.config.token_space import TokenSpace
from megavar.generators.inputs import RasterInputs
from megavar.generators.rar import RAR
from megavar.generators.rar.published import RARLayout
from megavar.sampling.procedures.raster import Raster
from tests.parity.test_var_transformer import load, shapes

from .cases import Case, Family

pytestmark = pytest.mark.usefixtures("single_process")
TRANSFORMER = Family("rar", aside={"batch": "the inputs' shapes say it"})


def build(case: Case) -> RAR:
    sizes = case.config["model"]["generator"]
    length, vocabulary = sizes["image_seq_len"], case.config["model"]["vq_model"]["codebook_size"]
    assert not sizes["dropout"] and not sizes["attn_drop"] and not sizes["class_label_dropout"]
    config = RARConfig(
        depth=sizes["num_hidden_layers"],
        width=sizes["hidden_size"],
        heads=sizes["num_attention_heads"],
        feed_forward=sizes["intermediate_size"],
        classes=sizes["condition_num_classes"],
        dropout=sizes["dropout"],
        spare_positions=case.config["extra_position_rows"],
        spare_steps=case.config["extra_timestep_rows"],
    )
    side = int(length**0.5)
    space = TokenSpace("grid", (side,), length, vocabulary, 4, image_side=side)
    taps = ("embedding", *(f"block.{number}" for number in range(config.depth)))
    model = RAR(config, space, taps=taps)
    load(model, RARLayout(config, space).load(case.under("weights."), shapes(model)))
    return model


@TRANSFORMER.each_case()
@pytest.mark.parametrize("order", ["raster", "permuted"])
def test_training_equals_the_reference(case: Case, order: str) -> None:
    model = build(case)
    ids, labels = case["input.input_ids"], case["input.class_id"]
    vocabulary = case.config["model"]["vq_model"]["codebook_size"]
    case.check("output.condition_ids", vocabulary + 1 + labels)
    case.check("output.none_condition_ids", torch.full_like(labels, vocabulary + 1 + model.choice.classes))
    places = case["input.orders"] if order == "permuted" else None
    if places is not None:
        ids = ids.gather(1, places)
    case.check(f"output.{order}.labels", ids)
    inputs = RasterInputs(labels, ids, places)
    output = model(inputs)
    case.check(f"output.{order}.x_embed", output.taps["embedding"])
    case.check(f"output.{order}.adaln_cond", model.embedding(inputs)[1])
    case.check_series(f"output.{order}.hidden", [output.taps[name] for name in model.taps[1:]])
    case.check(f"output.{order}.logits", output.prediction)
    loss = F.cross_entropy(output.prediction[:, :-1].transpose(1, 2), ids)
    case.check(f"output.{order}.loss", loss)
    case.check(f"output.{order}.correct_tokens", (output.prediction[:, :-1].argmax(-1) == ids).float().mean())
    loss.backward()
    layout = RARLayout(model.choice, model.space)
    published = {layout.names(name)[0]: parameter for name, parameter in model.named_parameters()}
    case.check_gradients(published, f"grad_norm.{order}.")
    free = torch.full_like(labels, model.choice.classes)
    case.check("output.raster.logits_uncond", model(RasterInputs(free, case["input.input_ids"])).prediction)
    # What training leaves out: the last token, which nothing follows.
    shorter = model(RasterInputs(labels, ids[:, :-1], places)).prediction
    torch.testing.assert_close(shorter, output.prediction[:, :-1])


@TRANSFORMER.each_case()
def test_greedy_guided_decoding_equals_the_reference(case: Case) -> None:
    model = build(case).eval()
    settings = RasterSampling(
        guidance=case.config["guidance_scale"],
        guidance_power=case.config["guidance_scale_pow"],
        temperature=case.config["randomize_temperature"],
    )
    procedure, length = Raster(settings), model.space.length
    case.check("output.cfg_schedule", torch.tensor([procedure.scale(step, length) for step in range(length)]))
    condition = Condition(case["input.class_id"], classes=model.choice.classes)
    steps = list(procedure.steps(model, length, condition, noise=None))
    ids = torch.cat([step.ids for step in steps], 1)
    case.check("output.generate_kv.ids", ids)
    case.check("output.generate_nokv.ids", ids)
    conditional, free = torch.cat([step.logits for step in steps], 1).chunk(2)
    case.check("output.generate_kv.cond_logits", conditional)
    case.check("output.generate_kv.uncond_logits", free)
    with torch.no_grad():  # the cache changes nothing
        whole = model(RasterInputs(case["input.class_id"], ids[:, :-1])).prediction
    torch.testing.assert_close(whole, conditional, atol=1e-5, rtol=1e-4)


@TRANSFORMER.each_case()
def test_published_layout_round_trips(case: Case) -> None:
    model = build(case)
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    exported = RARLayout(model.choice, model.space).export(ours)
    stored = case.under("weights.")
    assert sorted(exported) == sorted(stored)
    for name, value in stored.items():
        assert torch.equal(exported[name], value), name
