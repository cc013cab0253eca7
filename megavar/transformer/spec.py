"""What a block is made of: five Megatron-core ``ModuleSpec``s, and three common choices of them.

The parts and how a block builds and calls them:

=================  ==================================================  ========================================
part               built with                                          called with
=================  ==================================================  ========================================
``norm`` (twice)   ``hidden_size, config, eps``                        hidden
``modulation``     ``config``; None: there is no modulation            condition -> :class:`Modulated` by half
``attention``      ``config, layer_number`` (from 1)                   hidden, context -> hidden
``feed_forward``   ``config, number``                                  hidden, context -> hidden
``residual``       ``config, number, depth``                           hidden, branch, gate (None: ungated), half,
                                                                       context -> hidden
=================  ==================================================  ========================================

plus the parameters of the spec. A part that has a method ``prepare(context, device)`` is asked before each pass: what
depends on the number of the block or on the sequence layout it computes there and leaves in the context, so that one
compiled graph serves all blocks and all layouts. Hidden states are [L, B, C]; sizes are the ``TransformerConfig``'s; a
half is "attention" or "feed_forward".
"""

import functools
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from megavar.config.experts.base import ExpertsChoice
from megavar.transformer.attention import AttentionCore, BlockAttention, UnitLength, UnitLengthWithTemperature
from megavar.transformer.dropout import Dropout, DropPath
from megavar.transformer.feed_forward import FeedForward
from megavar.transformer.linear import BiasedOutputLinear, ColumnLinear, OutputLinear, QKVLinear
from megavar.transformer.modulation import ImageModulation, PositionModulation, SharedModulation
from megavar.transformer.moe.layer import ExpertFeedForward
from megavar.transformer.norms import AffineLayerNorm, PlainNorm, RMSNorm
from megavar.transformer.rotary import Pairs


@dataclass(frozen=True)
class BlockSpec:
    """The parts of a block; see the module."""

    norm: ModuleSpec
    modulation: ModuleSpec | None
    attention: ModuleSpec
    feed_forward: ModuleSpec
    residual: ModuleSpec


def attention(
    kernel: str,
    *,
    linear_qkv: Any = ColumnLinear,
    linear_proj: Any = OutputLinear,
    query_norm: type | None = None,
    key_norm: type | None = None,
    pairs: Pairs = "half",
) -> ModuleSpec:
    """Megatron-core's self-attention around our core.

    Args:
        kernel: name of a kernel or ``auto``.
        query_norm, key_norm: of the heads; built with ``hidden_size, config, eps``.
        pairs: channels that rotary positions turn together.
    """
    submodules = SelfAttentionSubmodules(
        linear_qkv=linear_qkv,
        core_attention=functools.partial(AttentionCore, kernel=kernel, pairs=pairs),  # type: ignore[arg-type]
        linear_proj=linear_proj,
        q_layernorm=query_norm,  # type: ignore[arg-type]
        k_layernorm=key_norm,  # type: ignore[arg-type]
    )
    return ModuleSpec(module=BlockAttention, submodules=submodules)


def feed_forward(experts: ExpertsChoice | None = None, kinds: int = 1, dropout: float = 0.0) -> ModuleSpec:
    """The dense network with ``dropout`` of its inner channels, or experts (without it) for ``kinds`` of segments."""
    if experts is None:
        return ModuleSpec(module=FeedForward, params={"dropout": dropout})
    return ModuleSpec(module=ExpertFeedForward, params={"experts": experts, "kinds": kinds})


def var_block(
    *,
    kernel: str = "auto",
    unit_length: bool = True,
    shared_modulation: bool = False,
    drop_path: float = 0.0,
    experts: ExpertsChoice | None = None,
    kinds: int = 1,
) -> BlockSpec:
    """VAR's block (``basic_var.py``): plain layer norm, modulation per image, unit-length queries and keys, drop path.

    Args:
        unit_length: divide queries and keys by their length; a temperature per head takes the scale's place.
        shared_modulation: conditions are the vectors that all blocks share.
        drop_path: rate of the last block.
    """
    heads = (UnitLengthWithTemperature, UnitLength) if unit_length else (None, None)
    return BlockSpec(
        norm=ModuleSpec(module=PlainNorm),
        modulation=ModuleSpec(module=SharedModulation if shared_modulation else ImageModulation),
        attention=attention(kernel, linear_qkv=QKVLinear, query_norm=heads[0], key_norm=heads[1]),
        feed_forward=feed_forward(experts, kinds),
        residual=ModuleSpec(module=DropPath, params={"rate": drop_path}),
    )


def rar_block(
    *, kernel: str = "auto", dropout: float = 0.1, experts: ExpertsChoice | None = None, kinds: int = 1
) -> BlockSpec:
    """RAR's block (``rar.py``): layer norm, modulation per position, layer norm of heads, dropout.

    Its configuration has exact GELU and biases everywhere (``activation="gelu", bias=True, qkv_bias=True``).
    """
    return BlockSpec(
        norm=ModuleSpec(module=AffineLayerNorm),
        modulation=ModuleSpec(module=PositionModulation),
        attention=attention(kernel, query_norm=AffineLayerNorm, key_norm=AffineLayerNorm),
        feed_forward=feed_forward(experts, kinds, dropout),
        residual=ModuleSpec(module=Dropout, params={"rate": dropout}),
    )


def llama_block(
    *,
    kernel: str = "auto",
    head_norm: bool = False,
    projection_bias: bool = False,
    pairs: Pairs = "half",
    dropout: float = 0.0,
    experts: ExpertsChoice | None = None,
    kinds: int = 1,
) -> BlockSpec:
    """The block of Llama, Qwen (``qkv_bias=True``) and AliTok: RMSNorm, rotary positions, gated network, no modulation.

    Its configuration has a gated SiLU network without biases and perhaps grouped queries
    (``activation="silu", gated=True, groups=...``).

    Args:
        head_norm: RMSNorm of queries and keys (Qwen3, AliTok).
        projection_bias: of attention's output (AliTok).
        dropout: of both branches.
    """
    norm = RMSNorm if head_norm else None
    output = BiasedOutputLinear if projection_bias else OutputLinear
    return BlockSpec(
        norm=ModuleSpec(module=RMSNorm),
        modulation=None,
        attention=attention(kernel, linear_proj=output, query_norm=norm, key_norm=norm, pairs=pairs),
        feed_forward=feed_forward(experts, kinds),
        residual=ModuleSpec(module=Dropout, params={"rate": dropout}),
    )
