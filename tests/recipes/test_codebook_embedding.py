"""reAR's Eq. 6 against loops in float64: which rows, which vectors, which layers; in sequences and in pyramids."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megavar.config.generators.rar import RARConfig
from megavar.config.noise import NoiseConfig
from megavar.config.recipes.rear import RandomOrderConfig, ReARConfig
from megavar.config.terms.codebook_embedding import CodebookEmbeddingConfig
from megavar.errors import ConfigError
from megavar.generators.inputs import ScaleInputs
from megavar.generators.rar import RAR
from megavar.recipes.rear import NextToken, NextTokenInputs
from megavar.recipes.terms.base import heads_of
from megavar.recipes.terms.codebook_embedding import CodebookEmbedding, isometry
from megavar.tokenizers.multiscale_vq import MultiScaleVQ
from tests.recipes.test_rear import SPACE, STEPS, VOCABULARY, batch_of

pytestmark = pytest.mark.usefixtures("single_process")


class Codes:
    """A codebook."""

    space = SPACE
    vectors = torch.randn(VOCABULARY, SPACE.channels, generator=torch.Generator().manual_seed(7))

    def embed(self, ids: Tensor) -> Tensor:
        return self.vectors[ids]


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@pytest.mark.parametrize("options", [
    {}, {"shared": False}, {"output": "model", "hidden": 5}, {"encoding": None}, {"decoding": None},
    {"encoding_zero": "first_block", "decoding": 4, "reduction": "sum"},
])  # fmt: skip
def test_equals_the_equation_under_noise_and_in_any_order(options: dict) -> None:
    choice = CodebookEmbeddingConfig(weight=0.7, **({"hidden": 8} | options))
    term = CodebookEmbedding(choice, Codes(), depth=4)
    taps = ("embedding", *(f"block.{number}" for number in range(4)))
    generator = RAR(RARConfig(depth=4, width=32, heads=4, classes=3, dropout=0.0), SPACE, seed=1, taps=taps,
                    heads=heads_of([term], SPACE))  # fmt: skip
    config = ReARConfig(tokenizer_weights="unused", noise=NoiseConfig(), random_order=RandomOrderConfig())
    recipe = NextToken(config, generator, Codes(), classes=3, label_drop=0.0, seed=4, steps=STEPS, terms=[term])
    batch = batch_of(0, 3)
    inputs = recipe.prepare(batch, 10)
    assert inputs.model.order is not None and not torch.equal(inputs.model.ids, inputs.targets[:, :-1])
    output = generator(inputs.model)
    losses = recipe.loss(output, inputs)

    head = generator.heads[choice.name]
    ids, total, length = batch.tokens.gather(1, inputs.model.order), 0.0, SPACE.length
    read = {"encoding": "embedding", "decoding": "block.2"}
    if options.get("encoding_zero") == "first_block":
        read = {"encoding": "block.0", "decoding": "block.3"}
    read = {kind: tap for kind, tap in read.items() if options.get(kind, 0) is not None}
    for number, (kind, tap) in enumerate(read.items()):
        network = head.networks[0 if choice.shared else number]
        first, second = (network[0].weight.double(), network[0].bias.double()), (network[2].weight, network[2].bias)
        for sample in range(3):
            for i in range(length - 1):  # rows: start, class, then the tokens
                inner = first[0] @ output.taps[tap][sample, 2 + i].double() + first[1]
                inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
                found = second[0].double() @ inner + second[1].double()
                wanted = Codes.vectors[ids[sample, i + (kind == "decoding")]]
                if choice.output == "model":
                    wanted = wanted @ isometry(SPACE.channels, 32, torch.device("cpu"))
                distance = 1 - cosine(found.tolist(), wanted.tolist())
                total += distance / (1 if choice.reduction == "sum" else length - 1)
    assert losses.per_image is not None
    assert float(losses.per_image) == pytest.approx(0.7 * total, rel=1e-5)
    losses.per_image.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    assert generator.embedding.table.weight.grad.abs().sum() > 0


def test_the_isometry_keeps_angles() -> None:
    vectors = torch.randn(5, 4)
    turned = vectors @ isometry(4, 9, torch.device("cpu"))
    torch.testing.assert_close(turned @ turned.t(), vectors @ vectors.t())


def test_a_pyramid_recovers_what_rows_read_of_true_coarser_maps(pyramid: MultiScaleVQ) -> None:
    """Row j of scale k: its clean input, and the code vector of its own token; noise in what was read changes none."""
    sides, space = pyramid.space.sides, pyramid.space
    term = CodebookEmbedding(CodebookEmbeddingConfig(), pyramid, depth=4)
    ids = torch.randint(space.vocabulary, (2, space.length), generator=torch.Generator().manual_seed(1))
    noisy = torch.zeros(2, space.length - sides[0] ** 2, space.channels)
    inputs = NextTokenInputs(ScaleInputs(torch.zeros(2, dtype=torch.int64), noisy), ids)  # type: ignore[arg-type]
    hidden = torch.randn(2, space.length, 2, space.channels)
    losses = term.loss({}, hidden, term.prepare(batch_of(0, 2), inputs))
    clean, vectors, total = pyramid.inputs(ids).double(), pyramid.embed(ids).double(), 0.0
    for sample in range(2):
        early = [1 - cosine(hidden[sample, sides[0] ** 2 + row, 0].tolist(), clean[sample, row].tolist())
                 for row in range(clean.shape[1])]  # fmt: skip
        late = [1 - cosine(hidden[sample, row, 1].tolist(), vectors[sample, row].tolist())
                for row in range(space.length)]  # fmt: skip
        total += sum(early) / len(early) + sum(late) / len(late)
    assert float(losses.total) == pytest.approx(total, rel=1e-5)


def test_layers_and_parameters_are_the_papers() -> None:
    """DE at three quarters; the overhead 3.1, 3.1, 4.2 M of the paper fits one MLP of the model's width only."""
    plain = CodebookEmbeddingConfig()
    assert plain.layers(20) == {"encoding": "embedding", "decoding": "block.14"}
    assert plain.layers(24)["decoding"] == "block.17"
    assert CodebookEmbeddingConfig(decoding=20).layers(20)["decoding"] == "block.19"
    assert CodebookEmbeddingConfig(encoding_zero="first_block", encoding=5).layers(20)["encoding"] == "block.5"
    millions = {
        (shared, output): [round(choice_of(shared, output).parameters(width, 256) / 1e6, 1) for width in (768, 1024)]
        for shared in (True, False) for output in ("codebook", "model")
    }  # fmt: skip
    assert millions == {(True, "codebook"): [2.1, 2.6], (True, "model"): [3.1, 4.2],
                        (False, "codebook"): [4.2, 5.2], (False, "model"): [6.3, 8.4]}  # fmt: skip
    term = CodebookEmbedding(choice_of(True, "model"), Codes(), depth=4)
    head = term.head(SPACE)
    assert head is not None
    built = sum(p.numel() for p in head.build(32).parameters())
    assert built == term.choice.parameters(32, SPACE.channels)


def choice_of(shared: bool, output: str) -> CodebookEmbeddingConfig:
    return CodebookEmbeddingConfig(shared=shared, output=output)


@pytest.mark.parametrize(("options", "expected"), [
    ({"decoding": 5}, "decoding=5"), ({"encoding": 4, "encoding_zero": "first_block"}, "encoding=4"),
    ({"encoding": None, "decoding": None}, "neither"),
])  # fmt: skip
def test_what_does_not_exist_is_refused(options: dict, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        CodebookEmbedding(CodebookEmbeddingConfig(**options), Codes(), depth=4)


def test_vectors_without_codebook_are_refused() -> None:
    tokenizer = Codes()
    tokenizer.space = replace(SPACE, vocabulary=None)
    with pytest.raises(ConfigError, match="without a codebook"):
        CodebookEmbedding(CodebookEmbeddingConfig(), tokenizer, depth=4)

