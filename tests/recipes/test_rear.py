"""Next-token recipes: noise by Eq. 4 and its schedules, orders by RAR's annealing, the loss of true tokens."""

import pytest
import torch
import torch.nn.functional as F

from megavar.config.generators.rar import RARConfig
from megavar.config.loading import load_config
from megavar.config.noise import NoiseConfig
from megavar.config.recipes.rear import RandomOrderConfig, ReARConfig
from megavar.config.token_space import TokenSpace
from megavar.data.batch import Batch
from megavar.errors import ConfigError
from megavar.generators.rar import RAR
from megavar.recipes.noise import noisy
from megavar.recipes.rear import NextToken

pytestmark = pytest.mark.usefixtures("single_process")
SIDE, VOCABULARY, STEPS = 4, 32, 100
SPACE = TokenSpace("grid", (SIDE,), SIDE * SIDE, VOCABULARY, 4, image_side=8)


class Tokens:
    """Of a tokenizer only its space is needed: batches hold tokens."""

    space = SPACE


def batch_of(first: int, count: int) -> Batch:
    ids = torch.arange(first, first + count)
    tokens = (ids[:, None] * 7 + torch.arange(SPACE.length) * 5) % VOCABULARY
    return Batch(None, ids % 3, ids, torch.full_like(ids, 2), tokens=tokens)


def recipe(**options) -> NextToken:
    generator = RAR(RARConfig(depth=2, width=32, heads=4, classes=3, dropout=0.0), SPACE, seed=1)
    config = ReARConfig(tokenizer_weights="unused", **options)
    return NextToken(config, generator, Tokens(), classes=3, label_drop=0.25, seed=4, steps=STEPS)


@pytest.mark.parametrize(("schedule", "progress", "most"), [
    ("fixed", 0.9, 0.5), ("uniform", 0.9, 0.5), ("linear", 0.25, 0.375), ("truncated", 3 / 8, 0.25),
    ("truncated", 0.75, 0.0), ("truncated", 1.0, 0.0),
])  # fmt: skip
def test_shares_of_wrong_tokens(schedule: str, progress: float, most: float) -> None:
    """Eq. 4: per sequence e ~ U(0, f(t)), each token wrong with probability e; 1/2 of them at t = 3/8 for c = 1."""
    assert NoiseConfig(schedule="truncated").most(3 / 8) == pytest.approx(0.5)
    config = NoiseConfig(schedule=schedule, share=0.5)
    assert config.most(progress) == pytest.approx(most)
    batch = batch_of(0, 4000)
    ids = torch.zeros(4000, 40, dtype=torch.int64)
    wrong = noisy(ids, config, batch, progress, 1000, seed=3)
    share = (wrong != 0).double().mean(1)  # a thousandth of the codes drawn are right by chance
    mean = most if schedule == "fixed" else most / 2
    assert float(share.mean()) == pytest.approx(mean, abs=0.01)
    spread = (most / 12**0.5) ** 2 if schedule != "fixed" else 0.0
    binomial = mean / 40 - ((mean**2 + spread) / 40)
    assert float(share.var()) == pytest.approx(spread + binomial, rel=0.1, abs=1e-6)
    codes = wrong[wrong != 0]
    assert len(codes) == 0 or float(codes.double().mean()) == pytest.approx(500, rel=0.03)
    half = noisy(ids[2000:], config, batch_of(2000, 2000), progress, 1000, seed=3)
    assert torch.equal(half, wrong[2000:]), "noise depends on who computes it"


def test_orders_fade_from_always_to_never() -> None:
    order = RandomOrderConfig()
    assert [order.share(t) for t in (0.0, 0.5, 0.625, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    made, batch = recipe(random_order={}), batch_of(0, 400)
    for step, share in [(0, 1.0), (60, 0.6), (75, 0.0)]:
        inputs = made.prepare(batch, step)
        if inputs.model.order is None:
            assert share == 0
            continue
        raster = (inputs.model.order == torch.arange(SPACE.length)).all(1).double().mean()
        assert float(1 - raster) == pytest.approx(share, abs=0.06)
        assert torch.equal(inputs.model.order.sort(1).values[0], torch.arange(SPACE.length))
        assert torch.equal(inputs.targets, batch.tokens.gather(1, inputs.model.order))
        assert torch.equal(inputs.model.ids, inputs.targets[:, :-1])


def test_random_order_is_refused_where_rows_do_not_know_what_they_predict() -> None:
    """Before anything is built; RAR takes it (configs/rear/rar_b.yaml)."""
    words = ["generator={name: alitok, prefix_tokens: 0}", "recipe.random_order={}"]
    with pytest.raises(ConfigError, match=r"base\.yaml.*recipe\.random_order.*'alitok'.*Remove"):
        load_config("configs/rear/base.yaml", words)


def test_targets_are_true_and_inputs_are_not() -> None:
    """Eq. 5: logits after noisy tokens, compared with true ones; classes are dropped, never noised."""
    made, batch = recipe(noise={"schedule": "fixed", "share": 0.5}), batch_of(0, 64)
    inputs = made.prepare(batch, 10)
    assert torch.equal(inputs.targets, batch.tokens)
    wrong = noisy(batch.tokens, made.config.noise, batch, 0.1, VOCABULARY, 4)
    assert torch.equal(inputs.model.ids, wrong[:, :-1]) and not torch.equal(wrong, batch.tokens)
    kept = inputs.model.labels != 3
    assert torch.equal(inputs.model.labels[kept], batch.labels[kept]) and 0.1 < float((~kept).double().mean()) < 0.4
    (only,) = made.passes("generator", 10)
    output = only.forward(made.generator, inputs)
    losses = only.loss(output, inputs)
    wanted = F.cross_entropy(output.prediction.transpose(1, 2), batch.tokens, reduction="sum")
    torch.testing.assert_close(losses.total, wanted)
    assert made.valid(batch, 10) == 64 * SPACE.length
    assert float(losses.named["accuracy"]) == float((output.prediction.argmax(-1) == batch.tokens).sum())
