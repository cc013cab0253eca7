"""Blocks of other families written plainly, from complete logical tensors: what ``Block`` with their specs must equal.

Batch first: x [B, L, C]. Everything differentiable; nothing here comes from megavar or Megatron-core.
"""

import torch
import torch.nn.functional as F


def rms_norm(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x, weight, bias, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def turn(x, cos, sin, pairs):
    """Rotary positions by complex numbers: x [B, H, L, D], tables [L, R / 2] or [B, L, R / 2]."""
    size = cos.shape[-1]
    factor = torch.complex(cos, sin) if cos.dim() == 2 else torch.complex(cos, sin)[:, None]
    first, second = (slice(0, 2 * size, 2), slice(1, 2 * size, 2))
    if pairs == "half":
        first, second = slice(0, size), slice(size, 2 * size)
    turned = torch.complex(x[..., first].contiguous(), x[..., second].contiguous()) * factor
    result = x.clone()
    result[..., first], result[..., second] = turned.real, turned.imag
    return result


def attention(values, x, seen, heads, groups, norm=None, table=None, pairs="half"):
    """Softmax attention with grouped queries; Megatron-core's rows are, for each group, its queries, key and value."""
    shared = heads // groups
    batch, length, width = x.shape
    weight = values["attention.linear_qkv.weight"].view(groups, shared + 2, -1, width)
    bias = values["attention.linear_qkv.bias"].view(groups, shared + 2, -1)
    rows = [
        (torch.einsum("blc,gsdc->bgsld", x, weight[:, part]) + bias[:, part][:, :, None]).flatten(1, 2)
        for part in (slice(0, shared), slice(shared, shared + 1), slice(shared + 1, shared + 2))
    ]
    q, k, v = rows
    if norm is not None:
        q, k = norm("attention.q_layernorm", q), norm("attention.k_layernorm", k)
    if table is not None:
        q, k = turn(q, *table, pairs), turn(k, *table, pairs)
    k, v = (part.repeat_interleave(shared, 1) for part in (k, v))
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    output = mixed.transpose(1, 2).reshape(batch, length, -1) @ values["attention.linear_proj.weight"].T
    return output + values.get("attention.linear_proj.bias", 0)


def llama_block(values, x, seen, heads, groups, table, pairs="half", head_norm=False):
    def norm(name, x):
        return rms_norm(x, values[f"{name}.weight"])

    x = x + attention(
        values, norm("attention_norm", x), seen, heads, groups, norm if head_norm else None, table, pairs
    )
    inner = norm("feed_forward_norm", x)
    gate = F.silu(inner @ values["feed_forward.mlp.linear_fc1_gate.weight"].T)
    up = inner @ values["feed_forward.mlp.linear_fc1_up.weight"].T
    return x + (gate * up) @ values["feed_forward.mlp.linear_fc2.weight"].T


def rar_block(values, x, seen, heads, condition):
    """DiT's block with a condition [B, L, C] of each position."""

    def norm(name, x):
        return layer_norm(x, values[f"{name}.weight"], values[f"{name}.bias"])

    vectors = F.silu(condition) @ values["modulation.linear.weight"].T + values["modulation.linear.bias"]
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = vectors.chunk(6, -1)
    inner = norm("attention_norm", x) * (1 + scale_1) + shift_1
    x = x + gate_1 * attention(values, inner, seen, heads, heads, norm)
    inner = norm("feed_forward_norm", x) * (1 + scale_2) + shift_2
    inner = F.gelu(inner @ values["feed_forward.mlp.linear_fc1.weight"].T + values["feed_forward.mlp.linear_fc1.bias"])
    inner = inner @ values["feed_forward.mlp.linear_fc2.weight"].T + values["feed_forward.mlp.linear_fc2.bias"]
    return x + gate_2 * inner
