"""Gradients: what DeepSpeed does not do for a Megatron-core module."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def register_sequence_parallel_hooks(module: nn.Module) -> None:
    """Sum over the tensor-parallel ranks the gradients of parameters marked ``sequence_parallel``.

    Their inputs are sharded along the sequence, so each rank sees a part of the gradient. Megatron-core does this in
    ``finalize_model_grads``, which DeepSpeed does not call.
    """
    from megatron.core import parallel_state

    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return
    group = parallel_state.get_tensor_model_parallel_group()

    def summed(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=group)
        return gradient

    for parameter in module.parameters():
        if getattr(parameter, "sequence_parallel", False) and parameter.requires_grad:
            parameter.register_hook(summed)


def global_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Norm of the gradients of a model that is replicated over data-parallel and sharded over tensor-parallel ranks.

    float32 scalar, equal on all ranks. Parameters without gradient count as zero.
    """
    from megatron.core import parallel_state

    first = parallel_state.get_tensor_model_parallel_rank() == 0
    counted = [p.grad for p in parameters if first or getattr(p, "tensor_model_parallel", False)]
    gradients = [gradient for gradient in counted if gradient is not None]
    device = parameters[0].device
    norms = torch._foreach_norm(gradients) if gradients else []
    square = torch.stack([norm.float() for norm in norms]).square().sum() if norms else torch.zeros((), device=device)
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.all_reduce(square, group=parallel_state.get_tensor_model_parallel_group())
    return square.sqrt()


class ClippedStep:
    """Clips the reduced gradients right before a torch optimizer's step, or cancels a step that is not finite.

    Used with ZeRO stage 0, where the optimizer steps the parameters themselves.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
        self.clip_norm = clip_norm
        self.norm = float("nan")
        """Global gradient norm of the last step, before clipping."""
        self.applied = False
        """Whether the last step was taken."""
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, arguments: Any, options: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for group in optimizer.param_groups:
            if "key" in group and group["key"].timed:  # all count the same steps, as under ZeRO
                for parameter in group["params"]:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
        self.norm = global_norm(parameters).item()
        self.applied = self.norm < float("inf")  # false for NaN, too
        if not self.applied:
            for parameter in parameters:
                parameter.grad = None  # AdamW passes over parameters without gradient, moments and decay included
        elif self.clip_norm > 0:
            scale = min(1.0, self.clip_norm / (self.norm + 1e-6))
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            torch._foreach_mul_(gradients, scale)
