"""FlowAR (Ren et al. 2024): latents scale by scale, each scale by a flow-matching head."""

from megavar.generators.flowar.model import FlowAR

__all__ = ["FlowAR"]
