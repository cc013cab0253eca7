"""The state-dict layout of the public VAR checkpoints (``var_d16.pth`` ...), to and from ours.

Ours are logical tensors (``parallel/logical.py``), so a published file can be loaded under any tensor-parallel split.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from megavar.config.generators.var import VARConfig
from megavar.errors import CheckpointError
from megavar.transformer.sequence import SequenceLayout

_BLOCK = {
    "attn.q_bias": "attention.linear_qkv.q_bias",
    "attn.v_bias": "attention.linear_qkv.v_bias",
    "attn.scale_mul_1H11": "attention.q_layernorm.log_temperature",
    "attn.mat_qkv.weight": "attention.linear_qkv.weight",
    "attn.proj.weight": "attention.linear_proj.weight",
    "attn.proj.bias": "attention.linear_proj.bias",
    "ffn.fc1.weight": "feed_forward.mlp.linear_fc1.weight",
    "ffn.fc1.bias": "feed_forward.mlp.linear_fc1.bias",
    "ffn.fc2.weight": "feed_forward.mlp.linear_fc2.weight",
    "ffn.fc2.bias": "feed_forward.mlp.linear_fc2.bias",
    "ada_lin.1.weight": "modulation.linear.weight",
    "ada_lin.1.bias": "modulation.linear.bias",
    "ada_gss": "modulation.offset",
}
_OUTSIDE = {
    "pos_start": "embedding.start_position",
    "pos_1LC": "embedding.position",
    "word_embed.weight": "embedding.features.weight",
    "word_embed.bias": "embedding.features.bias",
    "class_emb.weight": "embedding.classes.weight",
    "lvl_embed.weight": "embedding.scale",
    "shared_ada_lin.1.weight": "shared_modulation.linear.weight",
    "shared_ada_lin.1.bias": "shared_modulation.linear.bias",
    "head_nm.ada_lin.1.weight": "head.modulation.linear.weight",
    "head_nm.ada_lin.1.bias": "head.modulation.linear.bias",
    "head.weight": "head.projection.weight",
    "head.bias": "head.projection.bias",
}
_ADDED_DIMENSIONS = {"pos_start": 1, "pos_1LC": 1, "ada_gss": 2}
_EXPERT_NAMES = ("feed_forward.moe.",)


def published_name(name: str) -> str | None:
    """The authors' name of our logical tensor ``name``; None where the public model has no such tensor."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    table = _BLOCK if match else _OUTSIDE
    inner = match.group(2) if match else name
    for published, ours in table.items():
        if ours == inner:
            return f"blocks.{match.group(1)}.{published}" if match else published
    return None


def _interleave_heads(weight: Tensor, heads: int) -> Tensor:
    """[3 H D, C] ordered (q, k, v) x head -> Megatron-core's head x (q, k, v)."""
    return weight.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def _separate_heads(weight: Tensor, heads: int) -> Tensor:
    """Undo :func:`_interleave_heads`."""
    return weight.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def to_published(tensors: Mapping[str, Tensor], config: VARConfig, scales: tuple[int, ...]) -> dict[str, Tensor]:
    """Our logical tensors as the authors' state dict, buffers included.

    Raises:
        CheckpointError: the model has experts, which the public class cannot hold.
    """
    if config.experts is not None:
        raise CheckpointError(
            "A VAR with experts has no counterpart in the authors' layout. Export it as safetensors instead "
            "(tools/convert_checkpoint.py --format safetensors)."
        )
    result: dict[str, Tensor] = {}
    for name, value in tensors.items():
        published = published_name(name)
        assert published is not None, name
        key = published.split(".", 2)[-1] if published.startswith("blocks.") else published
        if key == "attn.mat_qkv.weight":
            value = _separate_heads(value, config.attention_heads)
        elif key == "attn.scale_mul_1H11":
            value = value.view(1, -1, 1, 1)
        elif key in _ADDED_DIMENSIONS:
            value = value.reshape((1,) * _ADDED_DIMENSIONS[key] + tuple(value.shape))
        result[published] = value
    return result | _buffers(config, scales, result)


def _buffers(config: VARConfig, scales: tuple[int, ...], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference's persistent buffers, which our model computes on the fly."""
    scale = SequenceLayout.of_scales(scales).segment_index()
    mask = torch.where(scale[:, None] >= scale[None, :], 0.0, -torch.inf)
    buffers = {"lvl_1L": scale[None], "attn_bias_for_masking": mask[None, None]}
    for number in range(config.depth):
        buffers[f"blocks.{number}.attn.zero_k_bias"] = torch.zeros_like(tensors[f"blocks.{number}.attn.q_bias"])
    return buffers


def from_published(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], config: VARConfig
) -> dict[str, Tensor]:
    """The authors' state dict as our logical tensors, float32.

    Args:
        state: content of a public checkpoint.
        expected: shape of every logical tensor of our model by name.

    Raises:
        CheckpointError: keys or shapes do not fit the configured model.
    """
    ignored = {"lvl_1L", "attn_bias_for_masking"}
    names = {published_name(name): name for name in expected}
    given = {key for key in state if key not in ignored and not key.endswith("zero_k_bias")}
    missing, unexpected = sorted(set(map(str, names)) - given), sorted(given - set(map(str, names)))
    if missing or unexpected:
        raise CheckpointError(
            f"The file is not a VAR checkpoint of this configuration: missing {missing[:4] or 'nothing'}, unexpected "
            f"{unexpected[:4] or 'nothing'}. Check generator.depth, generator.shared_adaptive_norm and "
            f"generator.experts (public VAR checkpoints are dense)."
        )
    result: dict[str, Tensor] = {}
    for published, name in names.items():
        value = state[str(published)].float()
        if name.endswith("linear_qkv.weight"):
            value = _interleave_heads(value, config.attention_heads)
        if value.numel() != torch.Size(expected[name]).numel():
            raise CheckpointError(
                f"{published} has shape {tuple(value.shape)} in the file, but the configured model needs "
                f"{expected[name]} ({name}). Check generator.depth, generator.classes and the tokenizer's scales."
            )
        result[name] = value.reshape(expected[name]).contiguous()
    return result
