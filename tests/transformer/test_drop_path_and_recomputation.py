"""Drop path is a function of (seed, sample); recomputation changes nothing but memory."""

import pytest
import torch

from megavar.config.parallel import ParallelConfig
from megavar.parallel import seeds
from megavar.transformer.context import ForwardContext
from megavar.transformer.dropout import DropPath, keep_mask
from megavar.transformer.megatron_config import transformer_config
from megavar.transformer.sequence import SequenceLayout
from tests.transformer import tiny

pytestmark = pytest.mark.usefixtures("one_process")


def context(keys, seed=0):
    return ForwardContext(SequenceLayout((1,)), seed=seed, sample_keys=keys)


def test_keep_mask_depends_on_seed_sample_block_and_branch_alone():
    keys = torch.tensor([7, 3, 11, 3])
    mask = keep_mask(context(keys), "drop_path/attention", 5, 8, 0.5)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(keep_mask(context(keys[order]), "drop_path/attention", 5, 8, 0.5), mask[order])
    assert mask[1] == mask[3]
    alone = seeds.uniform(0, "drop_path/attention", 5, keys) >= 0.5  # drawn for all blocks or for one: the same
    assert torch.equal(mask > 0, alone)
    many = torch.arange(4000)
    masks = [
        keep_mask(context(many, seed), stream, block, 4, 0.25)
        for seed, stream, block in [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2)]
    ]
    for mask in masks:
        assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
        assert abs((mask > 0).float().mean() - 0.75) < 0.03
    for other in masks[1:]:  # independent: 0.75^2 + 0.25^2 of the samples agree by chance
        assert abs(((masks[0] > 0) == (other > 0)).float().mean() - 0.625) < 0.03


def test_no_keys_or_no_rate_keeps_everything():
    assert keep_mask(context(None), "x", 1, 4, 0.5) is None
    assert torch.equal(keep_mask(context(torch.arange(3)), "x", 1, 4, 0.0), torch.ones(3))


@pytest.mark.parametrize("gated", [False, True])
def test_what_is_kept_of_a_gated_branch_is_added(gated):
    """x + gate branch / (1 - rate) where it is kept, x where it is dropped; at the rate of the block."""
    config = transformer_config(ParallelConfig(), torch.float32, depth=3, width=4, heads=1, feed_forward=4)
    residual, keys = DropPath(config, 1, 3, rate=0.8), torch.arange(64)
    hidden, branch, gate = torch.randn(3, 2, 64, 4, generator=torch.Generator().manual_seed(0))
    gate = gate[0] if gated else None
    given = context(keys)
    residual.prepare(given, keys.device)
    found = residual(hidden, branch, gate, "feed_forward", given)
    kept = seeds.uniform(0, "drop_path/feed_forward", 1, keys) >= 0.4
    assert 20 < kept.sum() < 60
    change = branch / 0.6 if gate is None else gate * branch / 0.6
    torch.testing.assert_close(found, torch.where(kept[:, None], hidden + change, hidden))


def test_a_sample_drops_the_same_branches_in_any_batch():
    model = tiny.model(tiny.config({}, drop_path=0.6))
    given, _ = tiny.inputs(6)
    given.sample_keys = torch.arange(6) * 13
    together = model(given).prediction
    order = torch.tensor([4, 1, 5])
    # Kernels round differently in batches of another size (by 1.3e-6 on an AMD EPYC); other branches differ by 0.1.
    torch.testing.assert_close(model(tiny.rows(given, order)).prediction, together[order], rtol=1e-5, atol=5e-6)
    given.sample_keys = torch.arange(6) * 13 + 1
    assert not torch.allclose(model(given).prediction, together, atol=1e-3)
    given.sample_keys = None
    kept = model(given).prediction
    assert not torch.allclose(kept, together, atol=1e-3)
    model.eval()
    given.sample_keys = torch.arange(6) * 13
    torch.testing.assert_close(model(given).prediction, kept)


def test_rate_rises_linearly_from_zero():
    model = tiny.model(tiny.config(None, depth=5, drop_path=0.2))
    rates = [block.residual.rate for block in model.blocks.values()]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert tiny.config(None, depth=24, drop_path=None).drop_path_rate == pytest.approx(0.1)


@pytest.mark.parametrize(
    "experts",
    [None, {}, {"router": "scale"}, {"router": "expert_choice"}, {"router": "zero_computation"}],
    ids=["dense", "scale_token", "scale", "expert_choice", "zero_computation"],
)
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_changes_neither_loss_nor_gradients_nor_statistics(mode, experts):
    def run(recompute):
        model = tiny.model(tiny.config(experts, drop_path=0.5), ParallelConfig(recompute=recompute))
        given, targets = tiny.inputs()
        given.sample_keys = torch.arange(3)
        loss = tiny.loss(model(given), targets)
        loss.backward()
        return loss, tiny.gradients(model), model.collect_routing()

    loss, gradients, statistics = run(mode)
    expected_loss, expected_gradients, expected_statistics = run("none")
    assert torch.equal(loss, expected_loss)
    tiny.assert_same(gradients, expected_gradients)
    tiny.assert_same(statistics, expected_statistics, rtol=0, atol=0)
    if experts is not None:
        assert statistics["passes"].tolist() == [1, 1]
        if experts.get("router") != "expert_choice":
            assert statistics["load"].sum() == 2 * 3 * tiny.TOKENS * 2  # blocks, samples, tokens, experts per token
