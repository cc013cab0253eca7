"""Tells DeepSpeed which parameters are experts and which Megatron-core groups hold them.

DeepSpeed knows experts by its own layer classes. A parameter-less module of such a class, attached to ours, makes it
treat the tagged parameters as experts of Megatron-core's groups: gradients are reduced and optimizer states partitioned
over the ranks that hold the same experts, and the gradient norm counts every expert once (notes/feasibility.md §2).
"""

from typing import Any

import torch.distributed as dist
from torch import nn

from megavar.parallel.logical import logical_tensors


def expert_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Expert parameters of ``module`` by local name."""
    names = {tensor.parameter for tensor in logical_tensors(module) if tensor.is_expert}
    return {name: parameter for name, parameter in module.named_parameters() if name in names}


def tag_experts(module: nn.Module, zero_stage: int) -> bool:
    """Tag the experts of ``module`` for DeepSpeed where they are spread differently from the other parameters.

    Without expert and tensor parallelism experts are ordinary replicated parameters and nothing is tagged. Call it
    before ``deepspeed.initialize``.

    Returns:
        Whether parameters were tagged.
    """
    from megatron.core import parallel_state

    size = parallel_state.get_expert_model_parallel_world_size()
    tensor_size = parallel_state.get_tensor_model_parallel_world_size()
    experts = expert_parameters(module)
    if not experts or size == tensor_size == 1:
        return False
    name = f"ep_size_{size}"
    for parameter in experts.values():
        p: Any = parameter
        p.allreduce, p.group_name = False, name
        if tensor_size > 1:
            p.tensor_model_parallel = True  # whole experts that differ between tensor ranks: all count in the norm
        if zero_stage == 3:
            p.ds_zero_placement_family, p.ds_zero_partition_group_name = "autoep_expert", name
    # named_modules() finds it anywhere; it must not stand where a container would call it.
    holder: Any = module[0] if isinstance(module, nn.ModuleList) else module
    holder.deepspeed_expert_marker = _marker(name, size, zero_stage)
    return True


def _register_groups(name: str) -> None:
    from deepspeed.utils import groups
    from megatron.core import parallel_state

    expert = parallel_state.get_expert_model_parallel_group()
    same_experts = parallel_state.get_expert_data_parallel_group()
    groups._EXPERT_PARALLEL_GROUP[name] = expert
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(expert)
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = same_experts
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(same_experts)


def _marker(name: str, size: int, zero_stage: int) -> nn.Module:
    """An instance of the class by which DeepSpeed recognizes experts at this ZeRO stage."""
    if zero_stage == 3:  # engine.py:2195 accepts only its automatic expert parallelism with stage 3
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer as Recognized
    else:
        from deepspeed.moe.layer import MoE as Recognized

    class ExpertMarker(Recognized):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = self.num_local_experts = 1  # read for reports only
            self.ep_size = size
            self.expert_group_name = self.ep_group_name = name

        def set_deepspeed_parallelism(self, *arguments: Any, **options: Any) -> None:
            _register_groups(name)

        def forward(self, *arguments: Any) -> Any:
            raise AssertionError("a marker is never called")

    return ExpertMarker()
