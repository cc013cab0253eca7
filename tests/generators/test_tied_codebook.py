"""RAR tied to the tokenizer's codebook (reAR Table 3): code vectors in the place of learned tables, not trained."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megavar.assembly import code_vectors
from megavar.config.generators.rar import RARConfig
from megavar.config.token_space import TokenSpace
from megavar.errors import ConfigError
from megavar.generators.inputs import RasterInputs
from megavar.generators.rar import RAR
from megavar.transformer.cache import KeyValueCache

pytestmark = pytest.mark.usefixtures("single_process")
SPACE = TokenSpace("grid", (3,), 9, 24, 4, image_side=12)
VECTORS = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))


def build(tied: str | None, codebook: torch.Tensor | None = VECTORS) -> RAR:
    choice = RARConfig(depth=2, width=32, heads=4, classes=5, dropout=0.0, tied_codebook=tied)
    return RAR(choice, SPACE, seed=1, taps=("embedding", "block.1"), codebook=codebook)


@pytest.mark.parametrize("tied", ["embedding", "head", "both"])
def test_codes_are_the_tokenizers_and_the_rest_is_learned(tied: str) -> None:
    model, plain = build(tied), build(None)
    inputs = RasterInputs(torch.tensor([1, 5]), torch.arange(16).view(2, 8))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "modulation" in name or name.endswith("bias"):
                value.normal_(std=0.3)
    output = model(inputs)
    frozen = {name for name, _ in model.named_parameters() if model.rule(name).frozen}
    expected = {"embedding.codes.vectors", "head.projection.weight"}
    assert frozen == {name for name in expected if tied == "both" or tied in name}
    for name in frozen:
        assert torch.equal(dict(model.named_parameters())[name], VECTORS)
    if tied != "head":
        codes = model.embedding.codes
        rows = VECTORS[inputs.ids] @ codes.projection.weight.t() + codes.projection.bias
        places = torch.arange(2, 10)
        rows = rows + model.embedding.position[places] + model.embedding.target[places + 1] * (places <= 9)[:, None]
        torch.testing.assert_close(output.taps["embedding"][:, 2:], rows)
        assert len(model.embedding.table.weight) == len(plain.embedding.table.weight) - 24
    if tied != "embedding":
        conditions = model.embedding(inputs)[1]
        scale, shift = model.head.modulation(conditions).unbind(-2)
        hidden = nn.functional.layer_norm(output.taps["block.1"], (32,), eps=1e-6) * (1 + scale) + shift
        logits = hidden @ model.head.to_codes.weight.t() @ VECTORS.t()
        torch.testing.assert_close(output.prediction, logits[:, 1:], rtol=1e-4, atol=1e-5)
    for name in frozen:
        dict(model.named_parameters())[name].requires_grad_(False)
    model(inputs).prediction.square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name not in frozen)


def test_decoding_with_cache_equals_decoding_without() -> None:
    model = build("both").eval()
    labels, ids, cache = torch.tensor([0, 3]), torch.arange(16).view(2, 8), KeyValueCache(10)
    with torch.no_grad():
        whole = model(RasterInputs(labels, ids)).prediction
    for step in range(9):
        newest = ids[:, step - 1 : step] if step else ids[:, :0]
        row = model.step(RasterInputs(labels, newest, start=step + 1 if step else 0), cache)[:, -1]
        torch.testing.assert_close(row, whole[:, step], rtol=1e-5, atol=1e-5)


def test_vectors_without_codebook_are_refused() -> None:
    tokenizer = SimpleNamespace(space=replace(SPACE, vocabulary=None))
    with pytest.raises(ConfigError, match=r"generator\.tied_codebook.*Remove the key"):
        code_vectors(tokenizer, torch.device("cpu"))
