"""One trained module under DeepSpeed, driven by Megatron-core's schedules, whatever the layout.

``deepspeed.initialize`` gives a plain ``DeepSpeedEngine`` (ZeRO 0-3, offload); Megatron-core's
``get_forward_backward_func`` runs forward and backward of all micro-batches (one stage, 1F1B or interleaved); then one
``step`` reduces, clips and updates. There is no other path.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megavar.config.deepspeed import DeepSpeedPlan
from megavar.config.optimizer import OptimizerConfig
from megavar.parallel import cpu_backend
from megavar.parallel.deepspeed_backend import forget_process_groups, import_deepspeed
from megavar.parallel.topology import DeepSpeedTopology, Topology
from megavar.training import experts
from megavar.training.gradients import ClippedStep, register_sequence_parallel_hooks
from megavar.training.optimizer import DecayRule, build_optimizer, parameter_groups, set_rates

_log = logging.getLogger(__name__)

Forward = Callable[[Callable[..., Any], Any], Any]
"""(callable module, inputs of one micro-batch) -> output."""
Loss = Callable[[Any, Any], Tensor]
"""(output, inputs of the same micro-batch) -> float32 scalar."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; equal on all ranks."""

    applied: bool
    """False where the gradient norm was not finite: weights and optimizer state are as before."""
    gradient_norm: Tensor | float
    """Global norm before clipping (a tensor on the device where no host copy was needed)."""


class Engine:
    """A module of a recipe with its optimizer."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        decays: DecayRule,
        optimizer: OptimizerConfig,
        plan: DeepSpeedPlan,
        topology: Topology,
    ) -> None:
        """Hand ``module`` over to DeepSpeed. Collective.

        Args:
            name: its name in the recipe.
            module: on a pipeline stage the stage's part; an ``nn.ModuleList`` holds the chunks of virtual stages.
            decays: whether a parameter decays.
            plan: from :func:`megavar.config.deepspeed.complete_deepspeed`.
        """
        self.name, self.module, self.plan, self.topology = name, module, plan, topology
        self.chunks: list[nn.Module] = list(module) if isinstance(module, nn.ModuleList) else [module]
        experts.tag_experts(module, plan.stage)
        register_sequence_parallel_hooks(module)
        module.register_forward_hook(_lay_open)  # before DeepSpeed's own hooks
        groups = parameter_groups(module, decays)
        _check_equal_groups(name, len(groups), topology)
        inner = build_optimizer(optimizer, name, groups)
        self.deepspeed: Any = _initialize_deepspeed(module, inner, plan)
        # Stage 0 has no master copy and no norm of its own: clip and guard right before torch's step.
        self._clipped = ClippedStep(inner, plan.clip_norm) if plan.stage == 0 else None
        self._scheduled = [_Scheduled(chunk, self._callable(chunk)) for chunk in self.chunks]
        for note in plan.notes:
            _log.warning("%s: %s", name, note)

    def _callable(self, chunk: nn.Module) -> Callable[..., Any]:
        """What a recipe calls: ZeRO-2 and 3 work through the engine's hooks, the others on the plain module."""
        target = self.deepspeed if self.plan.stage >= 2 or self.deepspeed.zero_cpu_offload() else chunk

        def call(*arguments: Any, **options: Any) -> Any:
            output = target(*arguments, **options)
            return output.closed() if isinstance(output, _Open) else output

        return call

    def forward_backward(self, inputs: list[Any], forward: Forward, loss: Loss) -> None:
        """Forward and backward of all micro-batches; gradients of their mean loss stay in the engine.

        Args:
            inputs: one item per micro-batch.
            forward: runs the module; on a pipeline stage before the last it returns the packed tensor.
            loss: runs on the last stage only.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        # A backward outside the schedules leaves a scalar here, into which they cannot copy their one-element tensor.
        MoEAuxLossAutoScaler.main_loss_backward_scale = None

        def forward_step(iterator: Iterator[Any], model: "_Scheduled") -> tuple[Any, Callable[[Any], Any]]:
            item = next(iterator)
            return forward(model.call, item), lambda output: (_poisoned_if_not_finite(loss(output, item)), {})

        first = self.chunks[0]
        length = 1
        if self.topology.config.pipeline > 1:  # what the recipe would call the module with decides
            length = forward(first.payload_length, inputs[0])  # type: ignore[arg-type]
        single = len(self._scheduled) == 1
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(inputs) if single else [iter(inputs) for _ in self._scheduled],
            model=self._scheduled[0] if single else self._scheduled,
            num_microbatches=len(inputs),
            seq_length=length,
            decoder_seq_length=length,
            micro_batch_size=self.plan.json["train_micro_batch_size_per_gpu"],
            forward_only=False,
        )

    def step(self, learning_rate: float, weight_decay: float) -> StepResult:
        """Reduce gradients, clip them, update, and clear them. Collective.

        A norm that is not finite skips the update, on all ranks alike: DeepSpeed's ZeRO optimizers do so themselves
        (zero/stage_1_and_2.py:3042, zero/stage3.py:2888), stage 0 in :class:`ClippedStep`.
        """
        set_rates(self.deepspeed.optimizer, learning_rate, weight_decay)
        self.deepspeed.step()
        if self._clipped is not None:
            return StepResult(self._clipped.applied, self._clipped.norm)
        return StepResult(not self.deepspeed.optimizer.overflow, self.deepspeed.get_global_grad_norm())

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within the block no gradient reaches this module's parameters (another one of the recipe is trained)."""
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def destroy(self) -> None:
        """Release DeepSpeed's hooks and buffers; the module keeps its weights (not under ZeRO-3)."""
        self.deepspeed.destroy()


class _Scheduled(nn.Module):
    """A module as Megatron-core's schedules want to see it; only the interleaved one insists on an ``nn.Module``."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        from megatron.core.enums import ModelType
        from megatron.core.transformer import TransformerConfig

        super().__init__()
        self.call = call
        self.config = getattr(module, "config", None)
        if not isinstance(self.config, TransformerConfig):  # not made of Megatron-core parts: the smallest one will do
            self.config = TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1)
        self.model_type = ModelType.encoder_or_decoder
        self.set_input_tensor = getattr(module, "set_input_tensor", lambda tensor: None)


class _Open(tuple):
    """The fields of an output dataclass: DeepSpeed looks for tensors in tuples, lists and dicts only."""

    kind: type

    def closed(self) -> Any:
        """The dataclass."""
        return self.kind(**{field.name: value for field, value in zip(dataclasses.fields(self.kind), self)})


@functools.cache
def _open_type(kind: type) -> type[_Open]:
    return type(f"Open{kind.__name__}", (_Open,), {"kind": kind})  # ZeRO-3 rebuilds outputs by their class


def _lay_open(module: nn.Module, arguments: Any, output: Any) -> Any:
    if not dataclasses.is_dataclass(output):
        return None
    kind: type = type(output)
    return _open_type(kind)(getattr(output, field.name) for field in dataclasses.fields(output))


def _poisoned_if_not_finite(loss: Tensor) -> Tensor:
    """A copy of ``loss`` (the schedule divides it in place) whose gradient is NaN if the loss is not finite.

    An infinite loss can have a finite gradient. This way the gradient norm alone tells all ranks to skip the step.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))


def _check_equal_groups(name: str, count: int, topology: Topology) -> None:
    """DeepSpeed's norm does one collective per group: a stage with fewer groups would wait for ever."""
    if topology.config.pipeline > 1:
        from megatron.core import parallel_state

        counts: list[Any] = [None] * topology.config.pipeline
        dist.all_gather_object(counts, count, group=parallel_state.get_pipeline_model_parallel_group())
        assert len(set(counts)) == 1, f"pipeline stages of {name} have different numbers of parameter groups: {counts}"


def _initialize_deepspeed(module: nn.Module, optimizer: torch.optim.Optimizer, plan: DeepSpeedPlan) -> Any:
    cpu_backend.install()
    deepspeed = import_deepspeed()
    _forget_earlier_process_groups()
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=plan.json, mpu=DeepSpeedTopology(), dist_init_required=False
    )
    return engine


_default_groups: list[dist.ProcessGroup | None] = [None]
"""Of this process's runs. None is let go: in a fork, destroying the parent's group would wait for its threads."""


def _forget_earlier_process_groups() -> None:
    """DeepSpeed keeps groups in globals; a second run in this process has new ones."""
    import deepspeed.comm.comm

    if _default_groups[-1] is not dist.group.WORLD:
        forget_process_groups()
        _default_groups.append(dist.group.WORLD)
    if deepspeed.comm.comm.cdb is None:
        deepspeed.init_distributed(verbose=False)
