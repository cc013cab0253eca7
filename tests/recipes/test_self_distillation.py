"""DINO's loss, centre and average by their formulas; views; what is refused; what comes out knows classes."""

import math

import pytest
import torch
from torch import nn

from megavar.config.loading import load_config
from megavar.config.optimizer import ConstantSchedule, OptimizerConfig
from megavar.config.recipes.self_distillation import CropsConfig, SelfDistillationConfig
from megavar.config.teachers.self_distilled import ViTConfig
from megavar.data.batch import Batch
from megavar.data.digits import Digits
from megavar.errors import ConfigError
from megavar.recipes.self_distillation import Said, SelfDistillation, _check, crop, koleo, sinkhorn_shift
from megavar.teachers.vit import VisionTransformer

MEAN = {"centering": "mean", "koleo_weight": 0.0}
VIT = ViTConfig(width=16, depth=1, heads=2, patch=4, grid=4)


def recipe(**values) -> SelfDistillation:
    config = SelfDistillationConfig(network=VIT, prototypes=6, **values)
    return SelfDistillation(config, steps=10, seed=0, device=torch.device("cpu"))


def batch(number: int, epoch: int = 0) -> Batch:
    ids = torch.arange(number)
    images = torch.rand(number, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return Batch(images, ids, ids, torch.full_like(ids, epoch))


def test_loss_by_loops_in_float64() -> None:
    distillation = recipe(**MEAN, student_temperature=0.2, teacher_temperature=0.05)
    distillation.network.centre.copy_(torch.linspace(-0.1, 0.2, 6))
    student, average = torch.randn(4, 3, 6), torch.randn(2, 3, 6) / 5
    losses = distillation.loss(Said(student, average, average), None)
    s, t = student.double() / 0.2, (average.double() - distillation.network.centre.double()) / 0.05
    expected = 0.0
    for image in range(3):
        terms = [-(t[a, image].softmax(-1) * s[b, image].log_softmax(-1)).sum() for a in range(2) for b in range(4)
                 if a != b]  # fmt: skip
        assert len(terms) == 6
        expected += float(sum(terms)) / 6
    assert float(losses.total) == pytest.approx(expected, rel=1e-5)


def test_centre_and_average_move_by_their_formulas() -> None:
    distillation = recipe(**MEAN, center_momentum=0.7, average_momentum=0.9)
    network = distillation.network
    with torch.no_grad():
        for _, student in network.pairs():
            student.add_(1.0)
    distillation.passes("teacher", 4)
    said = torch.randn(2, 5, 6)
    distillation.loss(Said(torch.randn(4, 5, 6, requires_grad=True), said, said), None)
    before = [average.clone() for average, _ in network.pairs()]
    distillation.after_step(4, lambda *rows: None)
    torch.testing.assert_close(network.centre, 0.3 * said.mean((0, 1)))
    momentum = 1 - 0.1 * (math.cos(math.pi * 4 / 10) + 1) / 2
    for old, (average, _) in zip(before, network.pairs(), strict=True):
        torch.testing.assert_close(average, old + (1 - momentum))


def test_only_the_student_is_trained_and_only_its_matrices_decay() -> None:
    network = recipe().network
    rules = {name: network.rule(name) for name, _ in network.named_parameters()}
    trained = {name for name, rule in rules.items() if not rule.frozen}
    assert trained == {name for name in rules if name.startswith("heads.student.")} and len(trained) < len(rules)
    layers = network.heads["student"].named_modules()
    matrices = {f"heads.student.{name}.weight" for name, layer in layers if isinstance(layer, (nn.Linear, nn.Conv2d))}
    assert {name for name in trained if rules[name].decays} == matrices


def test_views_are_functions_of_the_sample() -> None:
    distillation = recipe()
    made = distillation.prepare(batch(6), 0)
    large, small = made.large, made.small
    assert large.shape == (2, 6, 3, 16, 16) and small.shape == (2, 6, 3, 8, 8)
    again = distillation.prepare(batch(4), 3).large
    assert torch.equal(again, large[:, :4])
    other = distillation.prepare(batch(6, epoch=1), 0).large
    assert not torch.equal(other, large) and not torch.equal(large[0], large[1])


def test_a_crop_of_everything_is_the_image() -> None:
    plain = CropsConfig(brightness=0.0, contrast=0.0)
    images, drawn = batch(2).require_images(), torch.full((2, 6), 0.3)
    torch.testing.assert_close(crop(images, drawn, 16, (1.0, 1.0), plain), images, rtol=0, atol=1e-5)
    mirrored = crop(images, drawn, 16, (1.0, 1.0), CropsConfig(brightness=0.0, contrast=0.0, flip=True))
    torch.testing.assert_close(mirrored, images.flip(-1), rtol=0, atol=1e-5)
    quarter = crop(images, torch.tensor([[0.0, 0.0, 0.0, 1, 0.5, 0.5]] * 2), 8, (0.25, 0.25), plain)
    torch.testing.assert_close(quarter, images[:, :, :8, :8], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.precision=bf16", "Set fp32"),
        ("deepspeed=configs/deepspeed/zero3.json", "Use stage 0 to 2"),
        ("recipe.network.grid=8", "has 8 patches of 4 pixels along a side, 32 pixels"),
        ("recipe.centering=mean", "koleo_weight=1.0 needs the vectors.* Set it to 0"),
        ("recipe.crops.local_side=6", "not a multiple of recipe.network.patch=4"),
    ],
)
def test_what_it_cannot_do_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _check(load_config("configs/mepa/teacher_digits.yaml", [override]))


def test_sinkhorn_knopp_is_the_alternation_of_rows_and_columns() -> None:
    logits = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, 0] += 6  # nearly collapsed to one answer
    shares = logits.exp()
    for _ in range(3):
        shares = shares / shares.sum(0)
        shares = shares / shares.sum(1, keepdim=True)
    found = (logits + sinkhorn_shift(logits)).softmax(-1)
    torch.testing.assert_close(found, shares)
    spread = found.mean(0)
    assert _entropy(spread) > 0.95 * math.log(6) > 5 * _entropy(logits.softmax(-1).mean(0))


def _entropy(shares: torch.Tensor) -> float:
    return float(-(shares * shares.log()).sum())


def test_koleo_by_loops() -> None:
    vectors, others = torch.randn(2, 5), torch.randn(4, 5)
    own = others[1:3]
    units = others / others.norm(dim=1, keepdim=True)
    for row, found in enumerate(koleo(vectors, own, others)):
        near = max((n for n in range(4) if n != row + 1), key=lambda n: float(units[row + 1] @ units[n]))
        expected = -math.log(float((vectors[row] / vectors[row].norm() - units[near]).norm()))
        assert float(found) == pytest.approx(expected, abs=1e-4)


def neighbours_right(network: torch.nn.Module, train: Digits, test: Digits) -> float:
    """Share of test digits whose 20 nearest training digits by the mean patch feature agree on the class."""
    features = []
    for digits in (train, test):
        images = torch.stack([torch.tensor(digits.read(i).image) for i in range(len(digits))]).permute(0, 3, 1, 2)
        with torch.no_grad():
            tokens = VisionTransformer.forward(network, images / 127.5 - 1)
        features.append(torch.nn.functional.normalize(tokens[:, 1:].mean(1), dim=-1))
    nearest = (features[1] @ features[0].T).topk(20).indices
    votes = torch.nn.functional.one_hot(torch.tensor(train.labels)[nearest], 10).sum(1)
    return float((votes.argmax(1) == torch.tensor(test.labels)).float().mean())


def test_it_does_not_collapse_and_learns_classes() -> None:
    """A few seconds: digits that resemble each other come together, well above random features."""
    config = SelfDistillationConfig(
        network=ViTConfig(depth=2), crops=CropsConfig(global_scale=(0.7, 1.0), local_number=0), average_momentum=0.9
    )
    steps, train, test = 120, Digits("train"), Digits("test")
    distillation = SelfDistillation(config, steps=steps, seed=0, device=torch.device("cpu"))
    before = neighbours_right(distillation.network, train, test)
    images = torch.stack([torch.tensor(train.read(i).image) for i in range(len(train))]).permute(0, 3, 1, 2) / 127.5 - 1
    order = torch.Generator().manual_seed(0)

    def batches(step: int) -> list[Batch]:
        ids = torch.randperm(len(train), generator=order)[:64]
        return [Batch(images[ids], ids, ids, torch.full_like(ids, step))]

    optimizer = OptimizerConfig(lr=3e-3, weight_decay=0.04, gradient_clipping=3.0, schedule=ConstantSchedule())
    values = distilled_by_hand(distillation, batches, steps, optimizer)
    assert 0.2 * math.log(256) < values[-1]["entropy"] < 0.9 * math.log(256)  # neither the same answer nor none
    assert values[-1]["loss"] < math.log(256) - 0.4
    assert neighbours_right(distillation.network, train, test) > before + 0.1


def distilled_by_hand(distillation, batches, steps: int, optimizer: OptimizerConfig) -> list[dict]:
    """Plain torch."""
    named = [(distillation.network.rule(name), value) for name, value in distillation.network.named_parameters()]
    trained = [(rule, value) for rule, value in named if not rule.frozen]
    groups = [{"params": [value], "weight_decay": optimizer.weight_decay * rule.decays} for rule, value in trained]
    adam, values = torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas), []
    for step in range(steps):
        (batch,) = batches(step)
        inputs = distillation.prepare(batch, step)
        ask, learn = distillation.passes("teacher", step)
        with torch.no_grad():
            inputs = ask.following(inputs, ask.carry(ask.forward(distillation.network, inputs), inputs))
        losses = learn.loss(learn.forward(distillation.network, inputs), inputs)
        adam.zero_grad()
        (losses.total / len(batch)).backward()
        nn.utils.clip_grad_norm_([value for _, value in trained], optimizer.gradient_clipping)
        for group in adam.param_groups:
            group["lr"] = optimizer.lr * min(1.0, 10 * (step + 1) / steps)
        adam.step()
        distillation.after_step(step, lambda *rows: None)
        values.append({name: float(value) / len(batch) for name, value in losses.named.items()})
    return values
