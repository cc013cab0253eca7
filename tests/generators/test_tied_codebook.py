"""Raster transformers tied to the tokenizer's codebook (reAR Table 3): code vectors, not trained, instead of tables."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megavar.assembly import code_vectors
from megavar.config.generators.alitok import AliTokConfig
from megavar.config.generators.rar import RARConfig
from megavar.config.token_space import TokenSpace
from megavar.errors import ConfigError
from megavar.generators.alitok import AliTok
from megavar.generators.inputs import RasterInputs
from megavar.generators.rar import RAR
from megavar.transformer.cache import KeyValueCache

pytestmark = pytest.mark.usefixtures("single_process")
SPACE = TokenSpace("grid", (3,), 9, 24, 4, image_side=12)
VECTORS = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))


def build(kind: str, tied: str | None) -> RAR | AliTok:
    sizes = {"depth": 2, "width": 32, "heads": 4, "classes": 5, "dropout": 0.0, "tied_codebook": tied}
    choice, make = RARConfig(**sizes), RAR
    if kind == "alitok":
        choice, make = AliTokConfig(prefix_tokens=0, grid=3, token_dropout=0.0, **sizes), AliTok
    return make(choice, SPACE, seed=1, taps=("embedding", "block.1"), codebook=VECTORS)


@pytest.mark.parametrize("tied", ["embedding", "head", "both"])
@pytest.mark.parametrize("kind", ["rar", "alitok"])
def test_codes_are_the_tokenizers_and_the_rest_is_learned(kind: str, tied: str) -> None:
    model, plain = build(kind, tied), build(kind, None)
    inputs = RasterInputs(torch.tensor([1, 5]), torch.arange(16).view(2, 8))
    parameters = dict(model.named_parameters())
    frozen = {name for name in parameters if model.rule(name).frozen}
    expected = {"embedding.codes.vectors", "head.projection.weight"}
    assert frozen == {name for name in expected if tied == "both" or tied in name}
    for name in frozen:
        assert torch.equal(parameters[name], VECTORS)
    assert all(model.rule(name).decays for name in ("embedding.codes.projection.weight", "head.to_codes.weight")
               if name in parameters)  # fmt: skip
    with torch.no_grad():
        for name, value in parameters.items():
            if name not in frozen and ("modulation" in name or name.endswith("bias") or name.startswith("head.")):
                value.normal_(std=0.3)
    output = model(inputs)
    if tied != "head":
        codes = model.embedding.codes
        rows = VECTORS[inputs.ids] @ codes.projection.weight.t() + codes.projection.bias
        if kind == "rar":
            places = torch.arange(2, 10)
            rows = rows + model.embedding.position[places]
            rows = rows + model.embedding.target[places + 1] * (places <= 9)[:, None]
        torch.testing.assert_close(output.taps["embedding"][:, -8:], rows)
        assert len(model.embedding.table.weight) == len(plain.embedding.table.weight) - 24
    if tied != "embedding":
        hidden = output.taps["block.1"]
        if kind == "rar":
            scale, shift = model.head.modulation(model.embedding(inputs)[1]).unbind(-2)
            hidden = (nn.functional.layer_norm(hidden, (32,), eps=1e-6) * (1 + scale) + shift)[:, 1:]
        else:
            hidden = nn.functional.rms_norm(hidden, (32,), model.norm.weight, eps=1e-5)
        logits = hidden @ model.head.to_codes.weight.t() @ VECTORS.t()
        torch.testing.assert_close(output.prediction, logits, rtol=1e-4, atol=1e-5)
    for name in frozen:
        parameters[name].requires_grad_(False)
    model(inputs).prediction.square().sum().backward()
    assert all(p.grad is not None for name, p in parameters.items() if name not in frozen)


def test_decoding_with_cache_equals_decoding_without() -> None:
    model = build("rar", "both").eval()
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
