import math

import pytest
import torch
from safetensors.torch import save_file

from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.multiscale_vq import MultiScaleVQConfig
from megavar.errors import CheckpointError
from megavar.tokenizers.base import Pyramid
from megavar.tokenizers.multiscale_vq import MultiScaleVQ
from tests.tokenizers.public_files import load_public, public_state, save_public

TINY = MultiScaleVQConfig(scales=(1, 2, 4), vocabulary_size=16, code_dimension=8, base_channels=8, norm_groups=4,
                          channel_multipliers=(1, 2, 2), residual_blocks=1)  # fmt: skip


@pytest.fixture
def tiny() -> MultiScaleVQ:
    torch.manual_seed(0)
    return MultiScaleVQ(TINY)


def images(batch: int = 2, channels: int = 3, side: int = 16) -> torch.Tensor:
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_published_model_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = MultiScaleVQ(MultiScaleVQConfig())
    assert sum(p.numel() for p in model.parameters()) == 108_948_355
    assert model.config.image_side == 256
    assert dict(model.named_buffers())["quantize.ema_vocab_hit_SV"].shape == (10, 4096)


def test_shapes_and_ranges(tiny):
    x = images()
    assert tiny.encode(x).shape == (2, 8, 4, 4)
    ids = tiny.tokens(tiny.encode(x))
    assert ids.shape == (2, 21) and ids.dtype == torch.int64 and ids.min() >= 0 and ids.max() < 16
    for count in (1, 5, 21):  # the first scales alone can be decoded
        decoded = tiny.decode(ids[:, :count])
        assert decoded.shape == x.shape
        assert decoded.abs().max() <= 1
    output = tiny(x)
    assert output.images.shape == x.shape
    assert output.last_features.shape == (2, 8, 16, 16)
    assert not output.last_features.requires_grad
    assert tiny.space == TokenSpace("scales", (1, 2, 4), 21, 16, 8, 16, 3)
    with pytest.raises(ValueError, match="4 tokens are not those of the first of the scales"):
        tiny.decode(ids[:, :4])


def test_it_is_a_pyramid(tiny):
    """Growing scale by scale gives the inputs of teacher forcing and the map that is decoded."""
    assert isinstance(tiny, Pyramid)
    latents = tiny.encode(images())
    ids, inputs = tiny.at(latents)
    assert torch.equal(ids, tiny.tokens(latents)) and torch.equal(inputs, tiny.inputs(ids))
    assert inputs.shape == (2, 20, 8) and torch.equal(tiny.embed(ids), tiny.quantizer.embedding.weight[ids])
    state, grown = None, []
    for k, scale_ids in enumerate(tiny.quantizer.split(ids)):
        state, following = tiny.grow(state, scale_ids, k)
        grown.append(following)
    assert grown.pop() is None
    assert torch.equal(torch.cat(grown, 1), inputs)
    assert torch.equal(tiny.decode_features(state), tiny.decode(ids))


def test_training_pass_reconstructs_what_encode_and_decode_do(tiny):
    x = images()
    assert torch.allclose(tiny(x).images.clamp(-1, 1), tiny.decode(tiny.tokens(tiny.encode(x))), atol=1e-5)


def test_one_channel_images():
    model = MultiScaleVQ(TINY.model_copy(update={"image_channels": 1}))
    x = images(channels=1)
    assert model.decode(model.tokens(model.encode(x))).shape == x.shape


def test_other_image_size_with_other_scales(tiny):
    x = torch.cat([images(), images()], dim=3)  # 16 x 32
    scales = [(1, 2), (2, 4), (4, 8)]
    ids = tiny.tokens(tiny.encode(x), scales)
    assert [t.shape[1] for t in tiny.quantizer.split(ids, scales)] == [2, 8, 32]
    assert tiny.decode(ids, scales).shape == x.shape


def test_tokens_do_not_change_under_autocast(tiny):
    x = images(batch=8)
    expected = tiny.tokens(tiny.encode(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tiny.tokens(tiny.encode(x)), expected)
        assert tiny.encode(x).dtype == torch.float32
        assert tiny(x).quantized.features.dtype == torch.float32


def test_every_parameter_in_use_gets_a_gradient(tiny):
    output = tiny(images(batch=4))
    (output.images.square().mean() + output.quantized.loss).backward()
    missing = [name for name, p in tiny.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    # 3 scales use refinements 0, 2 and 3
    assert missing == ["quantize.quant_resi.qresi_ls.1.weight", "quantize.quant_resi.qresi_ls.1.bias"]


def test_fresh_parameters_are_a_function_of_the_generator(tiny):
    states = []
    for seed in (5, 5, 6):
        tiny.initialize(torch.Generator().manual_seed(seed))
        states.append({name: p.clone() for name, p in tiny.named_parameters()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["encoder.conv_in.weight"], states[2]["encoder.conv_in.weight"])
    first = states[0]["encoder.conv_in.weight"].detach().abs()  # uniform in +- 1 / sqrt(fan in)
    assert 0.9 / math.sqrt(27) < first.max() <= 1 / math.sqrt(27)
    assert float(first.mean()) == pytest.approx(0.5 / math.sqrt(27), rel=0.1)
    assert float(states[0]["quantize.embedding.weight"].detach().std()) == pytest.approx(TINY.code_initial_std, rel=0.1)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_reference_layout_round_trip(tiny, tmp_path, suffix):
    exported = public_state(tiny)
    path = tmp_path / f"model{suffix}"
    torch.save(exported, path) if suffix == ".pth" else save_file(exported, path)
    other = MultiScaleVQ(TINY)
    load_public(other, path)
    loaded = public_state(other)
    assert exported.keys() == loaded.keys()
    assert all(torch.equal(exported[name], loaded[name]) for name in exported)
    assert torch.equal(tiny.tokens(tiny.encode(images())), other.tokens(other.encode(images())))


def test_usage_counts_of_another_number_of_scales_are_accepted(tiny, tmp_path):
    tiny.quantizer.ema_vocab_hit_SV.fill_(3)
    path = tmp_path / "model.pth"
    torch.save(public_state(tiny) | {"quantize.ema_vocab_hit_SV": torch.ones(10, 16)}, path)
    load_public(tiny, path)
    assert torch.equal(tiny.quantizer.ema_vocab_hit_SV, torch.full((3, 16), 3.0))
    torch.save(public_state(tiny) | {"quantize.ema_vocab_hit_SV": torch.ones(3, 17)}, path)
    with pytest.raises(CheckpointError, match="ema_vocab_hit_SV is 3x17 in the file and 3x16 in the model"):
        load_public(tiny, path)


def test_checkpoint_of_another_model_is_refused_with_the_differences(tiny, tmp_path):
    path = tmp_path / "other.pth"
    wider = TINY.model_copy(update={"code_dimension": 4, "refinement": "shared", "residual_blocks": 2})
    save_public(MultiScaleVQ(wider), path)
    before = public_state(tiny)
    with pytest.raises(CheckpointError) as error:
        load_public(tiny, path)
    message = str(error.value)
    for part in ("keys missing from the file: quantize.quant_resi.qresi_ls.0.bias", "and 4 more", str(path),
                 "keys unknown to the model: decoder.up.0.block.2.conv1.bias", "set the tokenizer keys",
                 "decoder.conv_in.weight is 16x4x3x3 in the file and 16x8x3x3 in the model"):  # fmt: skip
        assert part in message
    assert "\n" not in message
    after = public_state(tiny)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_files_that_are_no_state_dict_are_refused(tiny, tmp_path):
    missing, truncated, nested = tmp_path / "absent.pth", tmp_path / "truncated.pth", tmp_path / "nested.pth"
    save_public(tiny, truncated)
    truncated.write_bytes(truncated.read_bytes()[:5000])
    torch.save({"epoch": 3, "steps": [4, 5]}, nested)
    text = tmp_path / "text.safetensors"
    text.write_text("not tensors")
    for path, reason in [(missing, "does not exist"), (truncated, "cannot be read"), (text, "cannot be read"),
                         (nested, "not a plain state dict")]:  # fmt: skip
        with pytest.raises(CheckpointError, match=reason) as error:
            load_public(tiny, path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": (1, 3, 2)}, "decrease somewhere"),
        ({"base_channels": 20}, "multiple of norm_groups 32"),
        ({"latent_kernel": 2}, "even"),
        ({"refinement": "shared", "refinement_count": 4}, "shared means one"),
        ({"refinement_count": 1}, "write that"),
        ({"vocabulary_size": 1}, "greater than or equal to 2"),
        ({"chanels": 3}, "Extra inputs"),
    ],
)
def test_contradicting_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MultiScaleVQConfig(**options)


def test_lists_from_a_file_become_tuples():
    config = MultiScaleVQConfig.model_validate_json('{"scales": [1, 2, 4], "channel_multipliers": [1, 2]}')
    assert config.scales == (1, 2, 4)
    assert config.downsample == 2
    assert config.image_side == 8
