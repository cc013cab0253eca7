"""The transformer block: what its spec names, around residual connections.

Hidden states are Megatron's [L, B, C] (sequence first, so that sequence parallelism shards L).
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.transformer.attention import AttentionCore
from megavar.transformer.context import ForwardContext
from megavar.transformer.spec import BlockSpec


class Block(nn.Module):
    """x = residual(x, attention(norm(x) (1 + scale) + shift), gate), then the same around the feed-forward network."""

    def __init__(
        self, config: TransformerConfig, spec: BlockSpec, number: int, depth: int, *, recompute: str = "none"
    ) -> None:
        """Build block ``number`` (from 0) of ``depth``.

        Args:
            recompute: ``selective`` computes attention cores again in the backward pass (``full`` is the backbone's).
        """
        super().__init__()
        norm = {"hidden_size": config.hidden_size, "config": config, "eps": config.layernorm_epsilon}
        self.modulation = None if spec.modulation is None else build_module(spec.modulation, config=config)
        self.attention_norm = build_module(spec.norm, **norm)
        self.attention = build_module(spec.attention, config=config, layer_number=number + 1)
        self.feed_forward_norm = build_module(spec.norm, **norm)
        self.feed_forward = build_module(spec.feed_forward, config=config, number=number)
        self.residual = build_module(spec.residual, config=config, number=number, depth=depth)
        self.number = number
        self._preparing: tuple[Any, ...] = tuple(part for part in self.modules() if hasattr(part, "prepare"))
        self._compiled: Callable[..., Tensor] | None = None
        for core in self._cores():
            core.recompute = recompute == "selective"

    def _cores(self) -> list[AttentionCore]:
        return [module for module in self.attention.modules() if isinstance(module, AttentionCore)]

    def compile_graph(self, backend: str) -> None:
        """Compile what the block computes without a cache: one graph, which blocks alike share.

        Around experts that Dynamo cannot trace the graph breaks (``ExpertFeedForward.one_graph``).

        Args:
            backend: of ``torch.compile``.
        """
        for core in self._cores():
            core.compiled = True
        whole = getattr(self.feed_forward, "one_graph", True)
        self._compiled = torch.compile(self.compute, backend=backend, fullgraph=whole)

    def forward(self, hidden: Tensor, condition: Tensor | None, context: ForwardContext) -> Tensor:
        """:meth:`compute`, with what differs from block to block before and after it."""
        own = context.of_block()
        for part in self._preparing:
            part.prepare(own, hidden.device)
        compute = self.compute if self._compiled is None or context.cache is not None else self._compiled
        output: Tensor = compute(hidden, condition, own)
        context.carried = own.carried
        for record in own.routing or ():
            record.block = self.number
            assert context.routing is not None
            context.routing.append(record)
        return output

    def compute(self, hidden: Tensor, condition: Tensor | None, context: ForwardContext) -> Tensor:
        """One block.

        Args:
            hidden: [L, B, C] (under sequence parallelism L / tensor-parallel size rows).
            condition: what the modulation of the spec takes; None without modulation.
            context: see :class:`ForwardContext`.

        Returns:
            [L, B, C].
        """
        modulated = {} if self.modulation is None else self.modulation(condition)
        for half, norm, body in (
            ("attention", self.attention_norm, self.attention),
            ("feed_forward", self.feed_forward_norm, self.feed_forward),
        ):
            normed, by = norm(hidden), modulated.get(half)
            if by is None:
                hidden = self.residual(hidden, body(normed, context), None, half, context)
            else:
                branch = body(torch.addcmul(by.shift, normed, 1 + by.scale), context)
                hidden = self.residual(hidden, branch, by.gate, half, context)
        return hidden
