"""VGT-AE's training: pretrained folders, losses of both stages, rules of parameters, sizes, missing packages."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from megavar.assembly import write_into_folder
from megavar.config.choice import resolve
from megavar.config.loading import load_config
from megavar.config.recipes.vgt_ae import LatentNoiseConfig, VGTAETrainingConfig
from megavar.config.tokenizers.kl_vae import KLVAEConfig
from megavar.config.tokenizers.vgt_ae import (
    DCAEDecoderConfig,
    InternViTConfig,
    QwenViTConfig,
    SDVAEDecoderConfig,
    VGTAEConfig,
    ViTDecoderConfig,
)
from megavar.data.batch import Batch
from megavar.errors import CheckpointError, ConfigError
from megavar.recipes.vgt_ae import VGTAETraining
from megavar.tokenizers.base import LatentMap, Normalized
from megavar.tokenizers.vgt_ae import VGTAE
from megavar.tokenizers.vgt_ae.pretrained import load_decoder, load_encoder
from megavar.tokenizers.vgt_ae.published import VGTAELayout

CPU = torch.device("cpu")
DECODER = SDVAEDecoderConfig(channels=(16, 16), layers=1, norm_groups=4)
INTERN = VGTAEConfig(
    image_side=32, semantic_width=24, channels=8, decoder=DECODER,
    encoder=InternViTConfig(width=16, depth=2, heads=2, feed_forward=32, patch=4),
)  # fmt: skip
QWEN = VGTAEConfig(
    image_side=32, semantic_width=24, channels=8, decoder=DECODER,
    encoder=QwenViTConfig(width=16, depth=2, heads=2, feed_forward=32, patch=4, window=16, full_attention=(1,)),
)  # fmt: skip
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def batch(images=IMAGES, first=0):
    count = len(images)
    ids = torch.arange(first, first + count)
    return Batch(images, torch.full((count,), -1), ids, torch.zeros_like(ids))


def training(tokenizer=INTERN, **settings):
    return VGTAETraining(VGTAETrainingConfig(**settings), tokenizer, 3, CPU)


def step(recipe, data, at=0):
    inputs = recipe.prepare(data, at)
    output = recipe.reconstruction(recipe.tokenizer, inputs)
    return inputs, output, recipe.autoencoder_loss(output, inputs, at)

def goes_back(config, model, origin, folder):
    """Unchanged an encoder gives an equal folder, and trained it is where it was."""
    tensors = dict(model.state_dict())
    write_into_folder(config, tensors, origin, folder)
    assert (folder / "model.safetensors").read_bytes() == (origin / "model.safetensors").read_bytes()
    trained = folder.with_name(f"{folder.name} trained")
    write_into_folder(config, {name: value + 1 for name, value in tensors.items()}, origin, trained)
    tuned, given = (load_file(place / "model.safetensors") for place in (trained, origin))
    changed = {name for name, value in tuned.items() if not torch.equal(value, given[name])}
    assert changed == {name for name in given if "language_model" not in name and "lm_head" not in name
                       and not name.startswith("model.")}  # fmt: skip


TEXT = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2}  # fmt: skip


@pytest.fixture(scope="module")
def internvl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("internvl")
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(InternVLConfig(
        vision_config={"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
                       "patch_size": [4, 4], "image_size": [32, 32], "attention_bias": True},
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=60, image_seq_length=16,
    )).eval()  # fmt: skip
    for parameter in model.parameters():  # transformers begins with zeros in places
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder, model


def test_internvl_folders_load_and_say_what_transformers_says(internvl, tmp_path):
    folder, theirs = internvl
    model = VGTAE(INTERN)
    model.initialize(0)
    load_encoder(model, str(folder), key="recipe.encoder_weights")
    pixels = ((IMAGES + 1) / 2 - torch.tensor(model.encoder.mean).view(3, 1, 1)) / torch.tensor(
        model.encoder.deviation
    ).view(3, 1, 1)
    with torch.no_grad():
        expected = theirs.model.get_image_features(pixels).pooler_output
        torch.testing.assert_close(model.encoder.semantic(IMAGES), expected.view(3, 16, 24), rtol=0, atol=2e-5)
    # InternVL's own folder: the names of its own code
    own = VGTAELayout(INTERN, INTERN.space).export({f"encoder.{n}": v for n, v in model.encoder.state_dict().items()})
    own = {f"vision_model.{n.removeprefix('encoder.')}" if n.startswith("encoder.") else n: v for n, v in own.items()}
    save_file(own | {"language_model.lm_head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    again = VGTAE(INTERN)
    load_encoder(again, str(tmp_path), key="recipe.encoder_weights")
    goes_back(INTERN, model, folder, tmp_path / "back")
    goes_back(INTERN, again, tmp_path, tmp_path.with_name("own back"))
    both = model.encoder.state_dict(), again.encoder.state_dict()
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    deeper = INTERN.model_copy(update={"encoder": INTERN.encoder.model_copy(update={"depth": 1})})
    with pytest.raises(CheckpointError, match=r"recipe\.encoder_weights.*keys unknown to the model"):
        load_encoder(VGTAE(deeper), str(folder), key="recipe.encoder_weights")
    with pytest.raises(CheckpointError, match="does not hold the configured vision encoder"):
        load_encoder(VGTAE(QWEN), str(folder), key="recipe.encoder_weights")


def test_qwen_folders_load_and_say_what_transformers_says(tmp_path):
    torch.manual_seed(0)
    theirs = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
                       "window_size": 16, "out_hidden_size": 24, "fullatt_block_indexes": [1]},
        text_config={**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}},
    )).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    model = VGTAE(QWEN)
    load_encoder(model, str(tmp_path), key="recipe.encoder_weights")
    ours, other = model.encoder.tower.state_dict(), theirs.model.visual.state_dict()
    assert ours.keys() == other.keys() and all(torch.equal(ours[name], other[name]) for name in ours)
    goes_back(QWEN, model, tmp_path, tmp_path.with_name("qwen back"))
    semantic = model.encoder.semantic(IMAGES)
    alone = torch.cat([model.encoder.semantic(image[None]) for image in IMAGES])
    torch.testing.assert_close(semantic, alone, rtol=0, atol=1e-5)
    assert semantic.shape == (3, 16, 24)


def test_decoders_load_from_diffusers_folders(tmp_path):
    sizes = DCAEDecoderConfig(
        channels=(8, 16), layers=(1, 1), blocks=("ResBlock", "EfficientViTBlock"), attention_kernels=((), (5,)),
        head_size=8,
    )
    same = {"block_types": sizes.blocks, "layers_per_block": (1, 1), "qkv_multiscales": ((), (5,)),
            "block_out_channels": (8, 16)}  # fmt: skip
    AutoencoderDC(
        latent_channels=8, attention_head_dim=8, upsample_block_type="interpolate",
        **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in same.items()},
    ).save_pretrained(tmp_path / "dc")  # fmt: skip
    model = VGTAE(INTERN.model_copy(update={"decoder": sizes}))
    load_decoder(model, str(tmp_path / "dc"), key="recipe.decoder_weights")
    stored = load_file(tmp_path / "dc/diffusion_pytorch_model.safetensors")
    own = model.decoder.state_dict()
    assert all(torch.equal(own[name], stored[f"decoder.{name}"]) for name in own)
    AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4,
    ).save_pretrained(tmp_path / "sd")  # fmt: skip
    model = VGTAE(INTERN)
    before = model.decoder.conv_in.weight.clone()
    load_decoder(model, str(tmp_path / "sd"), key="recipe.decoder_weights")
    stored, own = load_file(tmp_path / "sd/diffusion_pytorch_model.safetensors"), model.decoder.state_dict()
    assert torch.equal(own.pop("conv_in.weight"), before)  # reads 8 channels, the file's 4
    assert all(torch.equal(own[name], stored[f"decoder.{name}"]) for name in own)
    with pytest.raises(CheckpointError, match=r"recipe\.decoder_weights.*does not hold the configured decoder"):
        load_decoder(model, str(tmp_path / "dc"), key="recipe.decoder_weights")
    with pytest.raises(CheckpointError, match="no diffusers folder"):
        load_decoder(model, str(tmp_path), key="recipe.decoder_weights")


@pytest.mark.parametrize("decoder", [DECODER, ViTDecoderConfig(width=16, depth=1, heads=2)])
@pytest.mark.parametrize("encoder", [INTERN, QWEN], ids=["intern_vit", "qwen_vit"])
def test_it_is_a_map_of_latents(encoder, decoder):
    model = VGTAE(encoder.model_copy(update={"decoder": decoder}))
    model.initialize(1)
    with torch.no_grad():
        model.projection.out[3].weight.mul_(1e4)  # fresh ones say so little that the norm's epsilon counts
    assert isinstance(model, LatentMap) and isinstance(model, Normalized)
    with torch.no_grad():
        tokens = model.tokens(model.encode(IMAGES))
        images = model.decode(tokens)
    assert (tokens.shape, images.shape, model.stride) == ((3, 16, 8), (3, 3, 32, 32), 8)
    assert torch.equal(model.pack(model.unpack(tokens)), tokens)
    torch.testing.assert_close(model.normalize(tokens), tokens, rtol=0, atol=1e-4)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(3, 16), rtol=0, atol=1e-5)
    assert images.abs().max() <= 1


def test_the_first_stage_adds_up():
    """Squared error and distillation, which is nothing until the encoder moves."""
    recipe = training(INTERN.model_copy(update={"normalize": False}), distillation_weight=2.0)
    inputs, output, losses = step(recipe, batch())
    assert losses.named["distillation"] == 0
    torch.testing.assert_close(losses.total / 3, F.mse_loss(output.images, IMAGES))
    with torch.no_grad():
        recipe.tokenizer.encoder.projector[3].bias.add_(0.1)
    _, output, losses = step(recipe, batch())
    torch.testing.assert_close(losses.named["distillation"] / 3, torch.tensor(0.01))
    torch.testing.assert_close(losses.total / 3, F.mse_loss(output.images, IMAGES) + 0.02)
    losses.total.backward()
    assert recipe.tokenizer.encoder.tower.embeddings.patch_embeddings.projection.weight.grad.abs().max() > 0
    assert inputs.noise is None and all(not p.requires_grad for p in recipe.teacher.parameters())


@pytest.mark.parametrize("kind", ["fixed", "uniform"])
def test_noise_belongs_to_the_sample(kind):
    recipe = training(encoder="frozen", noise=LatentNoiseConfig(kind=kind, strength=0.1))
    whole = recipe.prepare(batch(), 0).noise
    parts = [recipe.prepare(batch(IMAGES[i : i + 1], i), 5).noise for i in range(3)]
    assert torch.equal(whole, torch.cat(parts)) and recipe.teacher is None
    many = recipe.prepare(batch(IMAGES[:1].expand(400, -1, -1, -1)), 0).noise.flatten(1).std(1)
    assert abs(float(many.mean()) - (0.1 if kind == "fixed" else 0.05)) < 0.005
    assert (float(many.std()) > 0.02) == (kind == "uniform")


def test_a_posterior_is_held_near_a_normal_distribution():
    recipe = training(INTERN.model_copy(update={"posterior": True}), kl_weight=0.5, distillation_weight=0.0)
    inputs, output, losses = step(recipe, batch())
    mean, logarithm = output.latents.double().chunk(2, 1)
    distribution = torch.distributions.Normal(mean, (0.5 * logarithm).exp())
    expected = torch.distributions.kl_divergence(distribution, torch.distributions.Normal(0.0, 1.0)).sum() / 3
    torch.testing.assert_close(losses.named["divergence"].double() / 3, expected, rtol=1e-5, atol=1e-6)
    whole = F.mse_loss(output.images, IMAGES) + 0.5 * losses.named["divergence"] / 3
    torch.testing.assert_close(losses.total / 3, whole)
    tokens = recipe.tokenizer.sample(output.latents, inputs.normal)
    torch.testing.assert_close(tokens, recipe.tokenizer.tokens(output.latents) + (0.5 * recipe.tokenizer.pack(
        output.latents[:, 8:])).exp() * inputs.normal)  # fmt: skip


def test_rules_follow_the_release():
    recipe = training()
    rules = {name: recipe.rule("autoencoder", name) for name, _ in recipe.tokenizer.named_parameters()}
    slow = {name for name, rule in rules.items() if rule.lr_factor == 0.5}
    assert slow == {name for name in rules if name.startswith("encoder.tower.")}
    assert not rules["encoder.tower.embeddings.cls_token"].decays
    assert not rules["encoder.tower.embeddings.patch_embeddings.projection.weight"].decays
    assert rules["projection.out.1.weight"].decays and not rules["projection.out.0.weight"].decays
    frozen = training(encoder="frozen")
    assert {name for name in rules if frozen.rule("autoencoder", name).frozen} == {
        name for name in rules if name.startswith("encoder.")
    }


def test_another_tokenizer_and_the_adaptive_weight_are_refused():
    with pytest.raises(ConfigError, match=r"recipe\.name=vgt_ae trains tokenizer\.name=vgt_ae"):
        training(KLVAEConfig(image_side=32, base_channels=32))
    with pytest.raises(ConfigError, match=r"recipe\.adversarial\.adaptive=false"):
        training(adversarial={"layers": 2})


@pytest.mark.parametrize(
    ("path", "decoder", "millions"),
    [
        ("ae_stage1", None, 472.6), ("ae_qwen_stage1", None, 853.2), ("ae_stage1", "sd_vae", 363.0),
        ("ae_stage1", "vit", 467.2), ("ae_qwen_stage1", "sd_vae", 743.6), ("ae_qwen_stage1", "vit", 847.8),
    ],
)
def test_sizes_are_those_of_table_4(path, decoder, millions, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    config = load_config(f"configs/vgt/{path}.yaml").tokenizer
    if decoder is not None:
        config = VGTAEConfig.model_validate(config.model_dump() | {"decoder": {"name": decoder}})
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in VGTAE(config).parameters())
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("package", "config"),
    [("transformers", INTERN), ("transformers", QWEN), ("diffusers", INTERN), ("diffusers", KLVAEConfig())],
)
def test_a_missing_package_is_one_sentence(package, config, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs the package {package}, .*pip install 'megavar\[vlm\]'\.$"):
        resolve(config)(config)
