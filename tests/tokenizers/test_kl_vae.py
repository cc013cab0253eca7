"""KL-VAEs: published sizes and names, posteriors, patches, and images of other sizes. DC-AE as a tokenizer."""

import pytest
import torch

pytest.importorskip("diffusers", reason="the package diffusers is not installed (pip install 'megavar[vlm]')")

from megavar.assembly import load_tokenizer
from megavar.config.choice import resolve
from megavar.config.tokenizers.dc_ae import DCAEConfig
from megavar.config.tokenizers.kl_vae import KLVAEConfig
from megavar.config.tokenizers.vgt_ae import DCAEDecoderConfig
from megavar.errors import CheckpointError
from megavar.tokenizers.base import LatentMap
from megavar.tokenizers.kl_vae import KLVAE
from megavar.tokenizers.kl_vae.published import DiffusersLayout, LDMLayout
from megavar.training.checkpoint.weights import shapes_of, tensors_of

SMALL = {"image_side": 32, "latent_channels": 3, "base_channels": 8, "channel_multipliers": (1, 2, 2), "norm_groups": 4}
F8 = {"latent_channels": 4, "channel_multipliers": (1, 2, 4, 4), "attention": "none", "patch": 2, "scaling": 0.18215}


def small(**options):
    model = KLVAE(KLVAEConfig(**SMALL, **options)).eval().requires_grad_(False)
    model.initialize(torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize(("options", "expected"), [({}, 66_456_019), (F8, 83_653_863)], ids=["KL-16", "f8"])
def test_parameters_are_those_of_published_files(options, expected):
    with torch.device("meta"):
        model = KLVAE(KLVAEConfig(**options))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert model.space.sides == (16,) and model.space.channels == 16 and model.stride == 16


@pytest.mark.parametrize("attention", ["none", "encoder", "both"])
@pytest.mark.parametrize("dialect", [DiffusersLayout, LDMLayout])
def test_published_layouts_round_trip(dialect, attention):
    model = small(attention=attention)
    layout = dialect(model.config, model.space)
    ours = {name: value.clone() for name, value in tensors_of(model).items()}
    state = layout.export(ours)
    assert len(state) == len(ours)
    back = layout.load(state, shapes_of(model))
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)
    del state["decoder.conv_out.bias"]
    with pytest.raises(CheckpointError, match=r"keys missing from the file: decoder\.conv_out\.bias"):
        layout.load(state, shapes_of(model))


def test_names_of_latent_diffusion_are_its_own():
    """Against diffusers' converter, which is the field's reference for these names."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    model = small(attention="both")
    layout = LDMLayout(model.config, model.space)
    state = layout.export(tensors_of(model))
    assert state["encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert layout.ignores("loss.perceptual_loss.net.slice1.0.weight")
    sizes = {key: model.vae.config[key] for key in ("down_block_types", "up_block_types")}
    converted = convert_ldm_vae_checkpoint({f"first_stage_model.{name}": value for name, value in state.items()}, sizes)
    expected = model.vae.state_dict()
    levels = {name for name in expected if "blocks" in name and "attentions" in name and "mid" not in name}
    assert converted.keys() >= expected.keys() - levels  # the converter knows attention in the middle only
    for name in expected.keys() - levels:
        assert torch.equal(converted[name], expected[name]), name


def test_old_names_of_diffusers_are_read():
    model = small()
    layout = DiffusersLayout(model.config, model.space)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in layout.export(tensors_of(model)).items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        state[name] = value
    assert "encoder.mid_block.attentions.0.query.weight" in state
    back = layout.load(state, shapes_of(model))
    assert all(torch.equal(back[name], value) for name, value in tensors_of(model).items())


def test_a_folder_of_diffusers_is_a_file_of_weights(tmp_path):
    """As the hub has SD's and EQ-VAE's: ``config.json`` and ``diffusion_pytorch_model.safetensors``, one or several."""
    model = small()
    for name, options in (("one", {}), ("several", {"max_shard_size": "20KB"})):
        model.vae.save_pretrained(tmp_path / name, **options)
        loaded = load_tokenizer(model.config, str(tmp_path / name), torch.device("cpu"))
        for key, value in tensors_of(model).items():
            assert torch.equal(tensors_of(loaded)[key], value), key
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    next((tmp_path / "several").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"is incomplete: diffusion_pytorch_model\.safetensors\.index\.json"):
        load_tokenizer(model.config, str(tmp_path / "several"), torch.device("cpu"))


@pytest.mark.parametrize("patch", [1, 2])
def test_tokens_are_scaled_patches_of_the_posterior(patch):
    model = small(patch=patch, scaling=0.5)
    assert isinstance(model, LatentMap)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    posterior = model.vae.encode(images).latent_dist
    latents = model.encode(images)
    side = 8 // patch
    normal = torch.randn(2, side * side, 3 * patch**2, generator=torch.Generator().manual_seed(1))
    expected = 0.5 * (posterior.mean + posterior.std * model.unpack(normal))
    drawn = model.sample(latents, normal)
    assert drawn.shape == normal.shape == (2, model.space.length, model.space.channels)
    torch.testing.assert_close(model.unpack(drawn), expected)
    torch.testing.assert_close(model.unpack(model.tokens(latents)), 0.5 * posterior.mean)
    torch.testing.assert_close(model.pack(model.unpack(normal)), normal, rtol=0, atol=0)
    torch.testing.assert_close(model.decode(drawn), model.vae.decode(expected / 0.5).sample.clamp(-1, 1))
    reduced = model.encode(images[..., : model.stride, : model.stride])  # an image of one token
    assert model.tokens(reduced).shape == (2, 1, model.space.channels)


def test_dc_ae_is_diffusers_own(tmp_path):
    """Its folder loads; latents and images are those of diffusers; of another size, too."""
    from diffusers import AutoencoderDC

    sizes = DCAEDecoderConfig(
        channels=(8, 16), layers=(1, 1), blocks=("ResBlock", "EfficientViTBlock"), attention_kernels=((), (5,)),
        head_size=8,
    )
    config = DCAEConfig(image_side=16, channels=4, decoder=sizes, encoder_layers=(1, 2), scaling=0.5)
    torch.manual_seed(0)
    resolve(config)(config).vae.save_pretrained(tmp_path)
    theirs = AutoencoderDC.from_pretrained(tmp_path).eval()
    weights = str(tmp_path / "diffusion_pytorch_model.safetensors")
    model = load_tokenizer(config, weights, torch.device("cpu"))
    assert isinstance(model, LatentMap) and model.space.length == 64
    images = torch.rand(2, 3, 24, 24) * 2 - 1
    with torch.no_grad():
        tokens, latents = model.tokens(model.encode(images)), theirs.encode(images).latent
        torch.testing.assert_close(model.unpack(tokens), latents * 0.5)
        torch.testing.assert_close(model.decode(tokens), theirs.decode(latents).sample.clamp(-1, 1))
    with torch.device("meta"):
        whole = resolve(DCAEConfig())(DCAEConfig())
    assert round(sum(parameter.numel() for parameter in whole.vae.decoder.parameters()) / 1e6, 1) == 159.2
