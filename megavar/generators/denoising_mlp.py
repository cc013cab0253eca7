"""The network that denoises one token given a vector (``diffloss.py`` of MAR, ``flow_head.py`` of VGT).

    y      = time(t) + W_c condition
    x      = W_i noisy
    block    x + gate * MLP(LN(x) * (1 + scale) + shift)          shift, scale, gate = linear(SiLU(y))
    output = linear(LN(x) * (1 + scale) + shift)                  shift, scale       = linear(SiLU(y))

With a second stack (DDT) ``s = linear(SiLU(time(t) + x))`` takes both the place of x and that of y from there on.
Blocks are shared by tensor-parallel ranks. Shapes: any leading dimensions, C channels of a token, W width, Z of the
condition.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.denoising_mlp import DenoisingMLPConfig
from megavar.config.parallel import ParallelConfig
from megavar.transformer.linear import ColumnLinear, OutputLinear
from megavar.transformer.megatron_config import transformer_config
from megavar.transformer.modulation import ModulationNetwork
from megavar.transformer.norms import AffineLayerNorm, normalize
from megavar.transformer.rotary import frequencies

TIME_CHANNELS = 256


class TimeEmbedding(nn.Module):
    """Sinusoids of a time, and a network of two layers."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(TIME_CHANNELS, width, dtype=dtype)
        self.second = nn.Linear(width, width, dtype=dtype)

    @staticmethod
    def sinusoids(times: Tensor) -> Tensor:
        """[...] -> cosines, then sines, float32 [..., 256]."""
        angles = times.float()[..., None] * frequencies(TIME_CHANNELS, device=times.device)
        return torch.cat([angles.cos(), angles.sin()], -1)

    def forward(self, times: Tensor) -> Tensor:
        """[...] -> [..., W]."""
        return self.second(F.silu(self.first(self.sinusoids(times).to(self.first.weight.dtype))))


class DenoisingBlock(nn.Module):
    """A residual network, modulated token by token."""

    def __init__(self, config: TransformerConfig, inner: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm = AffineLayerNorm(width, config, config.layernorm_epsilon)
        self.first = ColumnLinear(
            width, inner, config=config, init_method=lambda weight: weight, bias=True, gather_output=False
        )
        self.second = OutputLinear(
            inner, width, config=config, init_method=lambda weight: weight, bias=True, input_is_parallel=True
        )
        self.modulation = ModulationNetwork(config, 3)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """[..., W] twice -> [..., W]."""
        shift, scale, gate = self.modulation(condition).unbind(-2)
        inner = F.silu(self.first(self.norm(hidden) * (1 + scale) + shift)[0])
        return hidden + gate * self.second(inner)[0]


class DenoisingMLP(nn.Module):
    """See the module."""

    def __init__(self, sizes: DenoisingMLPConfig, trunk: TransformerConfig, channels: int, outputs: int) -> None:
        """Build it.

        Args:
            trunk: of the transformer whose output is the condition, without sequence parallelism.
            channels: C of the token.
            outputs: channels of the prediction.
        """
        super().__init__()
        self.sizes, dtype = sizes, trunk.params_dtype
        first = _layers(sizes.width, trunk)
        self.time = TimeEmbedding(sizes.width, dtype)
        self.condition = nn.Linear(trunk.hidden_size, sizes.width, dtype=dtype)
        self.input = nn.Linear(channels, sizes.width, dtype=dtype)
        self.blocks = nn.ModuleList(DenoisingBlock(first, sizes.inner(sizes.width)) for _ in range(sizes.depth))
        last = first
        if sizes.decoder_width is not None:
            width = sizes.decoder_width
            last = _layers(width, trunk)
            same = width == sizes.width
            self.bridge = nn.Identity() if same else nn.Linear(sizes.width, width, dtype=dtype)
            self.decoder = nn.ModuleList(DenoisingBlock(last, sizes.inner(width)) for _ in range(sizes.decoder_depth))
        self.modulation = ModulationNetwork(last, 2)
        self.projection = nn.Linear(last.hidden_size, outputs, dtype=dtype)

    def forward(self, noisy: Tensor, times: Tensor, condition: Tensor, *, with_hidden: bool = False) -> Any:
        """Predict.

        Args:
            noisy: float32 [..., C].
            times: [...].
            condition: [..., Z].
            with_hidden: return the outputs of the first stack's blocks, too. (A list that is handed in and filled would
                be lost under ZeRO-3, whose hooks copy arguments.)

        Returns:
            float32 [..., outputs]; with hidden states a pair of it and a list of [..., W].
        """
        before = noisy.shape[:-1]  # one row per token: shared layers know no more than three dimensions
        noisy, times, condition = noisy.flatten(0, -2), times.flatten(), condition.flatten(0, -2)
        time = self.time(times)
        told, hidden = time + self.condition(condition), self.input(noisy.to(condition.dtype))
        of_blocks = []
        for block in self.blocks:
            hidden = block(hidden, told)
            of_blocks.append(hidden)
        if self.sizes.decoder_width is not None:
            told = hidden = self.bridge(F.silu(time + hidden))
            for block in self.decoder:
                hidden = block(hidden, told)
        shift, scale = self.modulation(told).unbind(-2)
        output = self.projection(normalize(hidden) * (1 + scale) + shift).float().unflatten(0, before)
        return (output, [one.unflatten(0, before) for one in of_blocks]) if with_hidden else output


def _layers(width: int, trunk: TransformerConfig) -> TransformerConfig:
    ranks = trunk.tensor_model_parallel_size  # no heads here, but Megatron-core shares them
    parallel = ParallelConfig(tensor=ranks)
    return transformer_config(parallel, trunk.params_dtype, depth=1, width=width, heads=ranks, feed_forward=width)


def initial_value(name: str, value: Tensor, generator: torch.Generator) -> None:
    """The reference's: every block the identity, the prediction zero; the time's network normal, the rest Xavier's.

    Args:
        name: of a logical tensor of a :class:`DenoisingMLP`, without prefix.
    """
    if name.endswith("bias") or "modulation." in name or name.startswith("projection."):
        value.zero_()
    elif value.ndim == 1:
        value.fill_(1.0)
    elif name.startswith("time."):
        value.normal_(std=0.02, generator=generator)
    else:
        nn.init.xavier_uniform_(value, generator=generator)


_PARTS = {"norm": "in_ln", "first": "mlp.0", "second": "mlp.2", "modulation.linear": "adaLN_modulation.1"}
_OUTSIDE = {
    "time.first": "time_embed.mlp.0",
    "time.second": "time_embed.mlp.2",
    "condition": "cond_embed",
    "input": "input_proj",
    "bridge": "s_projector",
    "modulation.linear": "final_layer.adaLN_modulation.1",
    "projection": "final_layer.linear",
}


def published_name(name: str, sizes: DenoisingMLPConfig) -> str | None:
    """The reference's name of a logical tensor of a :class:`DenoisingMLP`, both without prefix; None: it has none."""
    layer, _, kind = name.rpartition(".")
    if layer in _OUTSIDE:
        return f"{_OUTSIDE[layer]}.{kind}"
    stack, number, part = (*layer.split(".", 2), "", "")[:3]
    if part not in _PARTS:
        return None
    stacks = {"blocks": "res_blocks" if sizes.decoder_width is None else "enc_blocks", "decoder": "dec_blocks"}
    return f"{stacks[stack]}.{number}.{_PARTS[part]}.{kind}"
