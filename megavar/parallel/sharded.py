"""Builds a module for ZeRO-3 block by block, so that no rank ever holds all of it.

DeepSpeed shards a whole module when it is handed over. Here a block is sharded as soon as it has its initial values,
which do not depend on what else there is (``logical.py``); DeepSpeed then finds it sharded and takes the rest.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from megavar.parallel.deepspeed_backend import prepare_deepspeed
from megavar.parallel.topology import DeepSpeedTopology, Topology


class Sharding:
    """Called with modules, one after the other: afterwards a rank holds its share of each."""

    def __init__(self, deepspeed: Mapping[str, Any], dtype: torch.dtype) -> None:
        """``deepspeed``: content of the DeepSpeed JSON, whose stage is 3; ``dtype``: of the parameters."""
        self._dtype = dtype
        self._config = {
            "train_micro_batch_size_per_gpu": 1,  # asked for, not used
            "zero_optimization": dict(deepspeed["zero_optimization"]),
            "bf16": {"enabled": dtype == torch.bfloat16},
        }

    def __call__(self, module: nn.Module) -> None:
        """Shard the parameters of ``module``. Collective over the data-parallel ranks."""
        from deepspeed.runtime.zero.partition_parameters import Init

        prepare_deepspeed()
        groups: Any = DeepSpeedTopology()
        Init(
            module=module,
            data_parallel_group=groups.get_data_parallel_group(),
            dtype=self._dtype,
            config_dict_or_path=self._config,
            mpu=groups,
        )


def sharding(
    deepspeed: Mapping[str, Any], dtype: torch.dtype, topology: Topology, has_experts: bool
) -> Sharding | None:
    """What shards blocks as they are built; None where they are whole until DeepSpeed gets them.

    That is so below stage 3, and where experts lie on other ranks than the rest (expert or tensor parallelism): only
    with the complete module DeepSpeed is told which they are (``training/experts.py``).
    """
    spread = has_experts and (topology.config.expert > 1 or topology.config.tensor > 1)
    stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
    return Sharding(deepspeed, dtype) if stage == 3 and not spread else None
