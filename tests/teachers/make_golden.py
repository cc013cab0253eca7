"""Writes the golden files: tiny networks of timm's and transformers' own classes, random weights, their features.

    pip install timm transformers
    python -m tests.teachers.make_golden

Each file has the network as its authors' files name it (``weights.``), an image (``input``, in [-1, 1]) and the patch
tokens after the last norm (``output``).
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megavar.config.teachers.vit import ViTShape
from megavar.teachers.vit import normalized

FOLDER = Path(__file__).parent / "golden"
WIDTH, DEPTH, HEADS = 16, 2, 2
LEARNED = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "patch": 4, "feed_forward": 64, "stored_grid": 5}
ROTARY = LEARNED | {"stored_grid": None, "registers": 4, "key_bias": False, "epsilon": 1e-5}
GATED = {"gated": True, "feed_forward": 48}
SHAPES = {
    "timm_dinov2": ViTShape(**LEARNED),
    "timm_dinov2_registers": ViTShape(**LEARNED, registers=4),
    "timm_dinov2_gated": ViTShape(**LEARNED | GATED),
    "timm_dinov3": ViTShape(**ROTARY),
    "timm_dinov3_biases_gated": ViTShape(**ROTARY | GATED),
    "timm_mocov3": ViTShape(**LEARNED, layer_scale=False),
    "transformers_dinov2": ViTShape(**LEARNED, antialias=False),
    "transformers_dinov2_registers_gated": ViTShape(**LEARNED | GATED, registers=4),
    "transformers_dinov3": ViTShape(**ROTARY),
    "transformers_dinov3_gated": ViTShape(**ROTARY | GATED),
}
"""What each file is, in our words. The image has 3 x 3 patches, so that stored positions are resampled."""


def timm_model(name: str, shape: ViTShape) -> Any:
    from timm.layers import GluMlp
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    common = {"img_size": 20, "patch_size": 4, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_classes": 0,
              "dynamic_img_size": True}  # fmt: skip
    if "dinov3" in name:
        return Eva(**common, qkv_bias="biases" in name, init_values=1.0, rope_type="dinov3", rope_temperature=100,
                   use_rot_pos_emb=True, use_abs_pos_emb=False, rope_rotate_half=True, num_reg_tokens=4,
                   use_fc_norm=False, swiglu_mlp=shape.gated, swiglu_align_to=8, global_pool="avg",
                   mlp_ratio=shape.feed_forward / WIDTH,
                   norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-5))  # fmt: skip
    gated = {"mlp_layer": functools.partial(GluMlp, gate_last=False), "act_layer": torch.nn.SiLU, "mlp_ratio": 6}
    more: dict[str, Any] = gated if shape.gated else {}
    return VisionTransformer(
        **common, **more, init_values=1.0 if shape.layer_scale else None, global_pool="token",
        reg_tokens=shape.registers, no_embed_class=shape.registers > 0,
    )  # fmt: skip


def transformers_model(name: str, shape: ViTShape) -> Any:
    import transformers

    common = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "patch_size": 4,
              "image_size": 20}  # fmt: skip
    if "dinov3" in name:
        return transformers.DINOv3ViTModel(
            transformers.DINOv3ViTConfig(**common, intermediate_size=shape.feed_forward, num_register_tokens=4,
                                         use_gated_mlp=shape.gated, hidden_act="silu" if shape.gated else "gelu")
        )  # fmt: skip
    kind = "Dinov2WithRegisters" if shape.registers else "Dinov2"
    more = {"num_register_tokens": 4} if shape.registers else {}
    config = getattr(transformers, f"{kind}Config")(**common, **more, use_swiglu_ffn=shape.gated)
    return getattr(transformers, f"{kind}Model")(config)


def disturb(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Random values everywhere: fresh norms, scales, biases and tokens would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else parameter * (1 + 0.2 * noise) + 0.1 * noise)


@torch.no_grad()
def write(name: str, shape: ViTShape) -> None:
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(2, 3, 12, 12, generator=generator) * 2 - 1
    seen = normalized(images, shape)
    weights: dict[str, Tensor]
    if name.startswith("timm"):
        model = timm_model(name, shape).eval()
        disturb(model, generator)
        output, weights = model.forward_features(seen)[:, 1 + shape.registers :], model.state_dict()
    else:
        model = transformers_model(name, shape).eval()
        disturb(model, generator)
        output = model(seen).last_hidden_state[:, 1 + shape.registers :]
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)  # the names of published files are not those of the module
            weights = load_file(f"{folder}/model.safetensors")
    tensors = {f"weights.{key}": value.contiguous() for key, value in weights.items()}
    save_file(tensors | {"input": images, "output": output.contiguous()}, FOLDER / f"{name}.safetensors")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, shape in SHAPES.items():
        write(name, shape)
