"""What is measured on the real model equals what closed forms of VAR said of it.

``closed_forms.csv`` holds their numbers as of commit 9f0263a, where tests held them against real models: parameters of
a rank, operations of an image, bytes that autograd keeps of two images under bf16 with the ``prefix`` kernel.
"""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import SCALES, VARConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.token_space import TokenSpace
from megavar.planning.efficiency import flops_per_image
from megavar.planning.measure import Request, UnmeasurableError, measure, release

SPACE = TokenSpace.of_scales(SCALES[256], 4096, 32, 256)
ROWS = list(csv.DictReader((Path(__file__).parent / "closed_forms.csv").open()))
IMAGES = 2


def request_of(row):
    experts = ExpertsChoice.make(number=8, top_k=3) if int(row["experts"]) else None
    choice = VARConfig(depth=int(row["depth"]), experts=experts, attention_kernel="prefix")
    return Request(choice, SPACE, int(row["tensor"]), bool(int(row["sequence"])), row["recompute"])


@pytest.fixture(scope="module")
def measured():
    return list(zip(ROWS, measure(map(request_of, ROWS)), strict=True))


def test_the_table_is_complete():
    assert {(row["depth"], row["experts"], row["tensor"], row["recompute"]) for row in ROWS} == {
        (depth, experts, tensor, recompute)
        for depth in ("12", "16", "20")
        for experts in ("0", "8")
        for tensor in ("1", "2", "4")
        for recompute in ("none", "selective", "full")
    }


def test_parameters_of_every_rank(measured):
    for row, cost in measured:
        whole = cost.parameters(ParallelConfig(), 0)
        assert (whole.replicated, whole.experts) == (int(row["replicated"]), int(row["expert"])), row
        for experts, column in ((2, "expert_of_two"), (8, "expert_of_eight")):
            assert cost.parameters(ParallelConfig(expert=experts), 0).experts == int(row[column]), row
        for rank, column in enumerate(("replicated_first_of_two", "replicated_last_of_two")):
            assert cost.parameters(ParallelConfig(pipeline=2), rank).replicated == int(row[column]), row


def test_operations(measured):
    for row, cost in measured:
        ranks, model, hardware = int(row["tensor"]), int(row["model_flops"]), int(row["hardware_flops"])
        # Each rank projects all features: two products, because the features need no gradient.
        shared = 2 * int(row["embedding_flops"])
        assert cost.model_flops == (model - shared) / ranks + shared, row
        assert cost.hardware_flops == (hardware - shared) / ranks + shared, row
        if ranks == 1:
            assert cost.weights_per_token == int(row["per_token"]), row
            assert cost.weights_per_image == int(row["per_image"]), row


def test_memory_that_autograd_keeps(measured):
    for row, cost in measured:
        kept = sum(part.saved.at(IMAGES) + part.routed.at(IMAGES) for part in cost.blocks) + cost.head.saved.at(IMAGES)
        blocks, head, logits = int(row["block_saved"]), int(row["head_saved"]), int(row["logits"])
        if row["recompute"] != "full":  # unit-length queries in float32, which one factor per vector took the place of
            blocks -= 4 * IMAGES * SPACE.length * 64 * int(row["depth"]) // int(row["tensor"])
        assert kept == pytest.approx(int(row["depth"]) * blocks + head + logits, rel=0.02), row
        assert len(cost.kinds) == 1
        assert cost.kinds[0].saved.at(IMAGES) + cost.kinds[0].routed.at(IMAGES) == pytest.approx(blocks, rel=0.02), row


def test_what_cannot_be_measured_says_so_and_others_still_can():
    vectors = TokenSpace("latent", (4,), 16, None, 8, 64)
    small = VARConfig(depth=1, width=16, heads=2)
    with pytest.raises(UnmeasurableError, match=r"generator\.name=var cannot be measured"):
        measure([Request(small, vectors)])
    release()
    told = []
    (cost,) = measure([Request(small, SPACE)], lambda done, total: told.append((done, total)))
    assert cost.kind_of_block == (0,) and told == [(0, 1), (1, 1)]


def test_a_process_that_dies_is_an_error_and_another_one_starts(monkeypatch):
    small = VARConfig(depth=2, width=16, heads=2)
    release()
    with monkeypatch.context() as patched:
        patched.setattr("sys.path", ["/nowhere"])  # the process does not find the library
        patched.chdir("/")
        with pytest.raises(UnmeasurableError, match="has died"):
            measure([Request(small, SPACE)])
    (cost,) = measure([Request(small, SPACE)])
    assert cost.kind_of_block == (0, 0)


def test_a_run_of_it_goes_on_without_utilization(capsys):
    vectors = TokenSpace("latent", (4,), 16, None, 8, 64)
    generator = VARConfig(depth=1, width=16, heads=2)
    recipe, tokenizer = SimpleNamespace(trains="generator", counted_terms=()), SimpleNamespace(space=vectors)
    assert flops_per_image(SimpleNamespace(generator=generator, tokenizer=tokenizer, recipe=recipe)) is None
    told = capsys.readouterr().out
    assert told.count("Utilization will not be shown") == 1 and "generator.name=var" in told
