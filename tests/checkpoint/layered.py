"""A model whose gradients are element-wise, in every layout that exists.

Its parameters carry Megatron-core's marks (tensor-parallel shards, experts in a list and stacked, blocks of a pipeline
stage), and its loss pulls every element towards a target that depends on the logical name and the step only. Training
it is therefore bitwise the same under every layout and ZeRO stage in float32, which lets tests of checkpoints compare
weights, moments and averages of different layouts with ``torch.equal``.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megavar.config.deepspeed import DeepSpeedPlan
from megavar.config.optimizer import OptimizerConfig
from megavar.config.parallel import ParallelConfig
from megavar.parallel import environment, seeds, topology
from megavar.parallel.logical import LogicalTensor, initialize_parameters, logical_tensors
from megavar.parallel.parameter_rule import ParameterRule
from megavar.training.checkpoint import ModuleState
from megavar.training.checkpoint.master import master_tensors
from megavar.training.engine import Engine

BLOCKS, EXPERTS = 2, 4


@dataclass(frozen=True)
class Layout:
    """A point of the layout matrix; ``world`` ranks."""

    world: int = 1
    stage: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    bfloat16: bool = False
    offload: bool = False
    fp32_accumulation: bool = False

    def __str__(self) -> str:
        parts = [f"{self.world}ranks", f"z{self.stage}"]
        parts += [f"{n}{v}" for n, v in (("tp", self.tensor), ("pp", self.pipeline), ("ep", self.expert)) if v > 1]
        return "-".join(parts + [n for n in ("bfloat16", "offload", "fp32_accumulation") if getattr(self, n)])


class Pulled(nn.Module):
    """Holds parameters of its own and pulls them towards targets (ZeRO-3 gathers a module's own parameters)."""

    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, tensors: list[LogicalTensor], step: int, mesh: topology.Topology) -> Tensor:
        loss = torch.zeros(())
        for tensor in tensors:
            target = torch.randn(tensor.shape, generator=seeds.generator(0, tensor.name, step))
            local = tensor.local(getattr(self, tensor.parameter.rpartition(".")[2]))
            distance = local.float() - tensor.shard(target, mesh.tensor_rank, mesh.config.tensor)
            # Expert gradients are summed over the ranks with this expert, then divided by the data-parallel size.
            loss = loss + distance.square().sum() * (mesh.data / mesh.expert_data if tensor.is_expert else 1)
        return loss


class Gated(nn.Module):
    """Marked as Megatron-core marks a gated network: its first layer holds two matrices."""

    config = SimpleNamespace(gated_linear_unit=True)


class GatedPulled(Gated, Pulled):
    """Stacked experts that are gated."""


class Block(nn.Module):
    """One of each kind of parameter."""

    def __init__(self, layout: Layout, width: int) -> None:
        super().__init__()
        t, e = layout.tensor, EXPERTS // layout.expert
        self.norm = Pulled(weight=torch.empty(width))
        self.column = Pulled(weight=torch.empty(3 * width // t, width))
        self.row = Pulled(weight=torch.empty(width, 2 * width // t))
        for dimension, linear in enumerate((self.column, self.row)):
            linear.weight.tensor_model_parallel, linear.weight.partition_dim = t > 1, dimension
        self.listed, self.stacked = nn.Module(), nn.Module()
        self.listed.experts = nn.Module()
        self.listed.experts.local_experts = nn.ModuleList(nn.Module() for _ in range(e))
        for expert in self.listed.experts.local_experts:
            expert.linear_fc1 = Pulled(weight=torch.empty(width, 5))
        self.stacked.experts = Pulled(linear_fc2_weight=torch.empty(e, 7, width))
        self.gated, self.gated_stack = Gated(), Gated()
        self.gated.linear_fc1 = Pulled(weight=torch.empty(2 * 6 // t, width), bias=torch.empty(2 * 6 // t))
        for parameter in self.gated.linear_fc1.parameters():
            parameter.tensor_model_parallel, parameter.partition_dim = t > 1, 0
        self.gated_stack.experts = GatedPulled(linear_fc1_weight=torch.empty(e, 2 * 3, width))
        self.fixed = Pulled(weight=torch.empty(5, width)).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))


class Layered(nn.Module):
    """All blocks of this pipeline stage, under their global numbers."""

    def __init__(self, layout: Layout, mesh: topology.Topology, width: int) -> None:
        super().__init__()
        first, count = mesh.pipeline_rank * BLOCKS // layout.pipeline, BLOCKS // layout.pipeline
        self.mesh = mesh
        self.config, self.balance = TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1), 1.0
        self.blocks = nn.ModuleDict({str(number): Block(layout, width) for number in range(first, first + count)})
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Stages do not exchange anything: each has its own loss."""

    def payload_length(self, inputs: int) -> int:
        return 0

    def forward(self, step: int) -> Tensor:
        by_module: dict[str, list[LogicalTensor]] = {}
        for tensor in logical_tensors(self):
            by_module.setdefault(tensor.parameter.rpartition(".")[0], []).append(tensor)
        return torch.stack([self.get_submodule(n)(tensors, step, self.mesh) for n, tensors in by_module.items()]).sum()


def normal(name: str, full: Tensor, generator: torch.Generator) -> None:
    full.normal_(generator=generator)


class Run:
    """An engine around :class:`Layered` and an average of its weights."""

    def __init__(self, layout: Layout, seed: int = 0, width: int = 8) -> None:
        parallel = ParallelConfig(tensor=layout.tensor, pipeline=layout.pipeline, expert=layout.expert)
        self.layout = layout
        self.mesh = topology.initialize(parallel, environment.environment())
        module = Layered(layout, self.mesh, width)
        initialize_parameters(module, normal, seed)
        dimensions = {tensor.name: len(tensor.shape) for tensor in logical_tensors(module)}
        if layout.bfloat16:
            module.to(torch.bfloat16)
        zero = {"stage": layout.stage, "stage3_param_persistence_threshold": 30, "overlap_comm": False}
        if layout.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        json = {
            "train_batch_size": self.mesh.data,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": layout.bfloat16},
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
            "data_types": {"grad_accum_dtype": "fp32"} if layout.fp32_accumulation else {},
            "steps_per_print": 2**62,
        }
        self.owner = Engine(
            "layered",
            module,
            rule=lambda name: ParameterRule(decays=dimensions[name] > 1),
            optimizer=OptimizerConfig(),
            plan=DeepSpeedPlan(json, layout.stage, 0.0, ()),
            topology=self.mesh,
        )
        self.engine = self.owner.deepspeed
        self.average = [t.detach().clone() for t in master_tensors(self.engine)]

    @property
    def state(self) -> ModuleState:
        return ModuleState(self.engine, self.average)

    def step(self, step: int) -> None:
        loss = self.engine(step)
        self.engine.backward(loss)
        self.owner.step(learning_rate=0.1, weight_decay=0.1)
        torch._foreach_lerp_(self.average, [t.detach() for t in master_tensors(self.engine)], 0.25)
        for name, buffer in self.engine.module.named_buffers():
            if name.endswith("seen"):
                buffer.add_(1)
