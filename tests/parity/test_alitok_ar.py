"""AliTok's transformer is numerically the public one: rotary table, training, gradients, guided decoding, layout."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megavar.conditions import Condition
from megavar.config.generators.alitok import AliTokConfig
from megavar.config.procedures.raster import RasterSampling
from megavar.config.token_space import TokenSpace
from megavar.errors import ConfigError
from megavar.generators.alitok import AliTok
from megavar.generators.alitok.model import rotary_table
from megavar.generators.alitok.published import AliTokLayout
from megavar.generators.inputs import RasterInputs
from megavar.parallel.logical import logical_tensors
from megavar.sampling.procedures.raster import Raster
from megavar.training.checkpoint.weights import fill, shapes_of

from .cases import Case, Family

pytestmark = pytest.mark.usefixtures("single_process")
TRANSFORMER = Family("alitok", aside={"batch": "the inputs' shapes say it"})


def is_transformer(case: Case) -> bool:
    return "generator" in case.description["config"].get("model", {})


def build(case: Case) -> AliTok:
    sizes = case.config["model"]["generator"]
    length, vocabulary = sizes["image_seq_len"], case.config["model"]["vq_model"]["codebook_size"]
    assert not sizes["attn_drop"] and not sizes["class_label_dropout"]
    config = AliTokConfig(
        depth=sizes["num_hidden_layers"],
        width=sizes["hidden_size"],
        heads=sizes["num_attention_heads"],
        classes=sizes["condition_num_classes"],
        dropout=sizes["dropout"],
        token_dropout=sizes["tok_dropout"],
        prefix_tokens=case.config["prefix_tokens"],
        grid=case.config["grid"],
    )
    assert config.feed_forward_size == case.config["ffn_hidden"]
    space = TokenSpace("line", (), length, vocabulary, 4, image_side=16)
    model = AliTok(config, space, taps=tuple(f"block.{number}" for number in range(config.depth)))
    fill(model, AliTokLayout(config, space).load(case.under("weights."), shapes_of(model)))
    return model


def logical(model: AliTok, local: dict[str, Tensor]) -> dict[str, Tensor]:
    return {tensor.name: tensor.local(local[tensor.parameter]) for tensor in logical_tensors(model)}


@TRANSFORMER.each_case(is_transformer)
def test_training_equals_the_reference(case: Case) -> None:
    model = build(case)
    ids, labels = case["input.input_ids"], case["input.class_id"]
    vocabulary = case.config["model"]["vq_model"]["codebook_size"]
    case.check("output.condition_ids", vocabulary + 1 + labels)
    case.check("output.none_condition_ids", torch.full_like(labels, vocabulary + 1 + model.choice.classes))
    head_size = model.choice.width // model.choice.heads
    table = rotary_table(model.choice.prefix_tokens, model.choice.grid, head_size)
    case.check("output.freqs_cis", torch.stack(table, -1))
    output = model(RasterInputs(labels, ids))
    case.check("output.logits", output.prediction)
    case.check_series("output.hidden", [output.taps[name] for name in model.taps])
    loss = F.cross_entropy(output.prediction[:, :-1].transpose(1, 2), ids)
    case.check("output.loss", loss)
    case.check("output.correct_tokens", (output.prediction[:, :-1].argmax(-1) == ids).float().mean())
    loss.backward()
    layout = AliTokLayout(model.choice, model.space)
    gradients = {}
    for name, value in logical(model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}).items():
        leaf = gradients[layout.names(name)[0]] = torch.zeros_like(value)
        leaf.grad = value
    case.check_gradients(gradients)
    free = torch.full_like(labels, model.choice.classes)
    case.check("output.logits_uncond", model(RasterInputs(free, ids)).prediction)
    shorter = model(RasterInputs(labels, ids[:, :-1])).prediction  # what training leaves out: the last token
    torch.testing.assert_close(shorter, output.prediction[:, :-1])


@TRANSFORMER.each_case(is_transformer)
def test_greedy_guided_decoding_equals_the_reference(case: Case) -> None:
    model = build(case).eval()
    settings = RasterSampling(
        guidance=case.config["guidance_scale"],
        guidance_power=case.config["guidance_scale_pow"],
        temperature=case.config["randomize_temperature"],
    )
    procedure, length = Raster(settings), model.space.length
    scales = [procedure.scale(step, length) for step in range(length)]
    case.check("output.cfg_schedule", torch.tensor(scales))
    condition = Condition(case["input.class_id"], classes=model.choice.classes)
    steps = list(procedure.steps(model, length, condition, noise=None))
    ids = torch.cat([step.ids for step in steps], 1)
    case.check("output.generate.ids", ids)
    conditional, free = torch.cat([step.logits for step in steps], 1).chunk(2)
    case.check("output.generate.cfg_logits", free + (conditional - free) * torch.tensor(scales)[:, None])
    with torch.no_grad():  # the cache changes nothing
        whole = model(RasterInputs(case["input.class_id"], ids[:, :-1])).prediction
    torch.testing.assert_close(whole, conditional, atol=1e-5, rtol=1e-4)


@TRANSFORMER.each_case(is_transformer)
def test_published_layout_round_trips(case: Case) -> None:
    model = build(case)
    ours = logical(model, {name: parameter.detach() for name, parameter in model.named_parameters()})
    exported = AliTokLayout(model.choice, model.space).export(ours)
    stored = case.under("weights.")
    assert sorted(exported) == sorted(stored)
    for name, value in stored.items():
        assert torch.equal(exported[name], value), name


@pytest.mark.parametrize(("width", "depth", "count"), [
    (768, 24, 177_048_064), (1024, 24, 317_851_648), (1280, 32, 662_141_696),
])  # fmt: skip
def test_sizes_are_the_published_ones(width: int, depth: int, count: int) -> None:
    space = TokenSpace("line", (), 273, 4096, 32, image_side=256)
    with torch.device("meta"):
        model, told = (AliTok(AliTokConfig(width=width, depth=depth, target_positions=target), space)
                       for target in (False, True))  # fmt: skip
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert sum(parameter.numel() for parameter in told.parameters()) == count + 273 * width


def test_any_order_where_rows_know_what_they_predict() -> None:
    """RAR's training on AliTok's transformer: rows turn by the places of their tokens and know what comes."""
    space = TokenSpace("grid", (3,), 9, 11, 4, image_side=12)
    sizes = {"depth": 2, "width": 16, "heads": 2, "prefix_tokens": 0, "grid": 3}
    model = AliTok(AliTokConfig(target_positions=True, **sizes), space, seed=1, taps=("embedding",)).eval()
    with torch.no_grad():
        model.head.projection.weight.normal_()
    ids, labels = torch.arange(18).view(2, 9) % 11, torch.tensor([0, 1])
    order = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(n)) for n in range(2)])
    shuffled = ids.gather(1, order)
    straight, output = (model(RasterInputs(labels, given[:, :-1], places)) for given, places in
                        ((ids, torch.arange(9).expand(2, 9)), (shuffled, order)))  # fmt: skip
    torch.testing.assert_close(straight.prediction, model(RasterInputs(labels, ids[:, :-1])).prediction)
    table, rows = rotary_table(0, 3, 8), model.sequence(RasterInputs(labels, shuffled[:, :-1], order)).rotary
    embedding = model.embedding
    for sample in range(2):
        for step in range(1, 9):
            assert torch.equal(rows[0][sample, step], table[0][1 + order[sample, step - 1]])
            wanted = embedding.table.weight[shuffled[sample, step - 1]] + embedding.target[order[sample, step]]
            torch.testing.assert_close(output.taps["embedding"][sample, step], wanted)
    swapped = order.clone()
    swapped[:, [2, 3]] = order[:, [3, 2]]
    other = model(RasterInputs(labels, ids.gather(1, swapped)[:, :-1], swapped)).prediction
    torch.testing.assert_close(other[:, :2], output.prediction[:, :2])
    assert (other[:, 3] - output.prediction[:, 3]).abs().max() > 1e-4


def test_dropped_tokens_belong_to_samples() -> None:
    """The same elements whatever the micro-batch, and none in evaluation."""
    space = TokenSpace("grid", (3,), 9, 11, 4, image_side=12)
    choice = AliTokConfig(depth=1, width=16, heads=2, classes=3, prefix_tokens=0, grid=3, token_dropout=0.5, dropout=0)
    model = AliTok(choice, space, taps=("embedding",))
    inputs = model.example(4)
    dropped = model(inputs).taps["embedding"] == 0
    assert 0.4 < float(dropped.float().mean()) < 0.6
    half = RasterInputs(inputs.labels[2:], inputs.ids[2:], sample_keys=torch.arange(2, 4))
    assert torch.equal(model(half).taps["embedding"] == 0, dropped[2:])
    assert not bool((model.eval()(inputs).taps["embedding"] == 0).any())


def test_what_it_cannot_read_is_refused() -> None:
    space = TokenSpace("grid", (5,), 25, 11, 4, image_side=12)
    sizes = {"depth": 1, "width": 16, "heads": 2, "prefix_tokens": 0}
    with pytest.raises(ConfigError, match="25 tokens"):
        AliTok(AliTokConfig(grid=4, **sizes), space)
    order = torch.arange(25)[None]
    with pytest.raises(ConfigError, match="random_order"):
        AliTok(AliTokConfig(grid=5, **sizes), space)(RasterInputs(torch.zeros(1).long(), order[:, :-1], order))
