import pytest
import torch
import torch.nn.functional as F

from megavar.config.tokenizers.multiscale_vq import MultiScaleVQConfig
from megavar.tokenizers.multiscale_vq import MultiScaleQuantizer, phi_indices


def make(**options) -> MultiScaleQuantizer:
    defaults = {"scales": (1, 2, 3, 4), "vocabulary_size": 20, "code_dimension": 6, "code_initial_std": 0.5}
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(MultiScaleVQConfig(**(defaults | options)))
    torch.nn.init.normal_(quantizer.embedding.weight, std=0.5)
    return quantizer


def features(batch: int = 3, side: int = 4, channels: int = 6) -> torch.Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        (8, [0, 0, 1, 1, 2, 2, 3, 3]),
        (9, [0, 0, 1, 1, 2, 2, 2, 3, 3]),
        (10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (14, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
    ],
)
def test_refinement_of_the_published_scale_lists(scales, expected):
    assert list(phi_indices(4, scales)) == expected


@pytest.mark.parametrize("scales", [8, 9, 10, 14])
def test_the_general_rule_gives_the_published_lists(scales, monkeypatch):
    published = phi_indices(4, scales)
    monkeypatch.setattr("megavar.tokenizers.multiscale_vq.quantizer.PUBLISHED_PHI_INDICES", {})
    assert phi_indices(4, scales) == published


def test_a_tie_of_the_general_rule_goes_the_way_of_float64():
    assert phi_indices(4, 3) == (0, 2, 3)
    assert phi_indices(5, 1) == (0,)


def test_every_scale_takes_the_nearest_code_of_what_is_left():
    quantizer, f = make(), features()
    rest = f.clone()
    for k, (step, side) in enumerate(zip(quantizer.steps(f), quantizer.scales)):
        target = F.adaptive_avg_pool2d(rest, side).permute(0, 2, 3, 1).reshape(-1, 6)
        expected = torch.tensor([int((quantizer.embedding.weight - z).norm(dim=1).argmin()) for z in target])
        assert torch.equal(step.ids.flatten(), expected), k
        rest = rest - step.increment
    assert torch.allclose(rest, f - step.accumulated, atol=1e-6)


def test_cosine_search_adds_unnormalized_codes():
    quantizer, f = make(normalized_search=True, refinement_ratio=0.0), features()
    step = list(quantizer.steps(f))[-1]
    target = F.normalize(step.target.permute(0, 2, 3, 1).reshape(-1, 6), dim=1)
    expected = (target @ F.normalize(quantizer.embedding.weight, dim=1).T).argmax(1)
    assert torch.equal(step.ids.flatten(), expected)
    codes = quantizer.embed(step.ids).transpose(1, 2).reshape(3, 6, 4, 4)
    assert torch.equal(step.increment, codes)  # without refinement, the last scale adds the raw codes


def test_search_in_chunks_equals_search_at_once(monkeypatch):
    quantizer = make()
    vectors = torch.randn(101, 6)
    at_once = quantizer.nearest(vectors)
    monkeypatch.setattr("megavar.tokenizers.nearest._DISTANCE_ELEMENTS", 20 * 7)
    assert torch.equal(quantizer.nearest(vectors), at_once)


def test_gradient_passes_straight_through():
    quantizer, f = make(commitment_weight=0.0), features().requires_grad_()
    output = quantizer(f)
    upstream = torch.randn_like(f)
    (output.features * upstream).sum().backward()
    assert torch.equal(f.grad, upstream)
    assert quantizer.embedding.weight.grad is None or not quantizer.embedding.weight.grad.any()
    assert torch.allclose(output.features, quantizer.accumulate(output.ids)[-1], atol=1e-6)


def test_loss_trains_codes_by_the_codebook_term_and_features_by_the_commitment_term():
    f = features()
    quantizer = make(commitment_weight=0.5)
    inputs = f.clone().requires_grad_()
    output = quantizer(inputs)
    output.loss.backward()
    maps = quantizer.accumulate(output.ids)
    expected = sum(2 * 0.5 * (f - m) / f.numel() for m in maps) / len(maps)
    assert torch.allclose(inputs.grad, expected, atol=1e-7)
    assert torch.allclose(output.loss, sum(1.5 * F.mse_loss(m, f) for m in maps) / len(maps), rtol=1e-5)
    assert quantizer.embedding.weight.grad.any()


def test_usage_counts_every_token():
    quantizer = make()
    output = quantizer(features(batch=5))
    expected = torch.zeros(4, 20)
    for k, ids in enumerate(output.ids):
        for token in ids.flatten().tolist():
            expected[k, token] += 1
    assert torch.equal(output.usage, expected)
    assert output.usage.sum(1).tolist() == [5, 20, 45, 80]


def test_targets_are_what_was_quantized():
    quantizer, f = make(), features()
    output = quantizer(f)
    assert output.targets.shape == (3, 30, 6)
    assert not output.targets.requires_grad
    assert torch.equal(quantizer.nearest(output.targets.reshape(-1, 6)).view(3, -1), torch.cat(output.ids, dim=1))


def test_teacher_forcing_input_is_what_decoding_produces_step_by_step():
    quantizer, f = make(), features()
    ids = quantizer.quantize(f)
    f_hat, pieces = torch.zeros_like(f), []
    for k, (tokens, side) in enumerate(zip(ids, quantizer.scales)):
        f_hat, following = quantizer.next_input(
            k, f_hat, quantizer.embed(tokens).transpose(1, 2).unflatten(2, (side, side))
        )
        pieces.append(following.flatten(2).transpose(1, 2))
    assert torch.allclose(quantizer.teacher_forcing_input(ids), torch.cat(pieces[:-1], dim=1), atol=1e-6)
    assert torch.allclose(quantizer.accumulate(ids)[-1], f_hat, atol=1e-6)


def test_one_scale_has_no_teacher_forcing_input():
    quantizer = make(scales=(4,), refinement="shared")
    ids = quantizer.quantize(features())
    assert quantizer.teacher_forcing_input(ids).shape == (3, 0, 6)
    assert len(quantizer.accumulate(ids)) == 1


def test_first_scales_alone_give_their_accumulated_maps():
    quantizer = make()
    ids = quantizer.quantize(features())
    for partial, full in zip(quantizer.accumulate(ids[:2]), quantizer.accumulate(ids)):
        assert torch.equal(partial, full)


def test_computes_in_float32_under_autocast_and_with_short_parameters():
    quantizer, f = make(), features()
    expected = quantizer(f)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantizer(f)
    assert torch.equal(output.features, expected.features)
    assert all(torch.equal(a, b) for a, b in zip(output.ids, expected.ids))
    short = make().bfloat16()
    assert short(f.bfloat16()).features.dtype == torch.float32
    assert short.quantize(f.bfloat16())[0].dtype == torch.int64


def test_feature_map_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"5x5.*last scale is 4x4"):
        make().quantize(features(side=5))


@pytest.mark.parametrize(
    ("refinement", "count", "key"),
    [
        ("shared", None, "quant_resi.qresi.weight"),
        ("partially_shared", 3, "quant_resi.qresi_ls.2.weight"),
        ("per_scale", None, "quant_resi.3.weight"),
    ],
)
def test_key_layout_of_refinements(refinement, count, key):
    quantizer = make(refinement=refinement, refinement_count=count)
    keys = [name for name in quantizer.state_dict() if name.endswith("weight") and "quant_resi" in name]
    assert keys[-1] == key
    quantizer.quantize(features())  # every scale finds its refinement
