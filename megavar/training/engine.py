"""One trained module under DeepSpeed, driven by Megatron-core's schedules, whatever the layout.

``deepspeed.initialize`` gives a plain ``DeepSpeedEngine`` (ZeRO 0-3, offload); for each pass of a step Megatron-core's
``get_forward_backward_func`` runs forward and backward of all micro-batches (one stage, 1F1B or interleaved); then one
``step`` reduces, clips and updates. There is no other path.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megavar.config.deepspeed import DeepSpeedPlan
from megavar.config.optimizer import OptimizerConfig
from megavar.errors import ConfigError
from megavar.parallel.deepspeed_backend import prepare_deepspeed
from megavar.parallel.parameter_rule import Rule
from megavar.parallel.pipeline_stage import PipelineStage
from megavar.parallel.topology import DeepSpeedTopology, Topology
from megavar.recipes.base import Losses, Pass, chunks_of
from megavar.training import experts
from megavar.training.carried import share_carried
from megavar.training.gradients import ClippedStep, register_sequence_parallel_hooks
from megavar.training.micro_batches import MicroBatches
from megavar.training.optimizer import (
    build_optimizer,
    equal_groups_on_stages,
    freeze,
    parameter_groups,
    parameter_rules,
    set_rates,
)

_log = logging.getLogger(__name__)

Observer = Callable[[int, Losses], None]
"""(number of the micro-batch, its losses): called on the last stage."""


@dataclass(frozen=True)
class Divisors:
    """By what sums of losses are divided: numbers of the whole step, over all micro-batches and ranks."""

    valid: float | Tensor
    """Valid items."""
    images: int
    """Samples."""


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
        rule: Rule,
        optimizer: OptimizerConfig,
        plan: DeepSpeedPlan,
        topology: Topology,
    ) -> None:
        """Hand ``module`` over to DeepSpeed. Collective.

        Args:
            name: its name in the recipe.
            module: on a pipeline stage the stage's part; an ``nn.ModuleList`` holds the chunks of virtual stages.
            rule: how a logical tensor is trained.
            plan: from :func:`megavar.config.deepspeed.complete_deepspeed`.

        Raises:
            ConfigError: the module cannot be cut into pipeline stages, or its rules contradict each other.
        """
        self.name, self.module, self.plan, self.topology = name, module, plan, topology
        self.chunks = chunks_of(module)
        if topology.config.pipeline > 1 and not all(isinstance(chunk, PipelineStage) for chunk in self.chunks):
            raise ConfigError(
                f"parallel.pipeline={topology.config.pipeline}, but {name} ({type(self.chunks[0]).__name__}) cannot be "
                f"cut into pipeline stages. Set parallel.pipeline=1."
            )
        rules = parameter_rules(module, rule)
        freeze(module, rules)
        experts.tag_experts(module, plan.stage)
        register_sequence_parallel_hooks(module)
        module.register_forward_hook(_lay_open)  # before DeepSpeed's own hooks
        with equal_groups_on_stages(name, module, parameter_groups(module, rules), topology) as groups:
            inner = build_optimizer(optimizer, name, groups)
            self.deepspeed: Any = _initialize_deepspeed(module, inner, plan)
        if plan.stage == 0 and topology.data == 1:
            self.deepspeed.enable_backward_allreduce = False  # it would flatten all gradients to share with nobody
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

    def run(
        self,
        passes: Sequence[Pass],
        inputs: MicroBatches,
        divisors: Divisors,
        observe: Observer = lambda number, losses: None,
        *,
        keep_inputs: bool = False,
    ) -> None:
        """Run the passes of a step one after the other; their gradients add up in the engine.

        Args:
            inputs: of the first pass.
            divisors: of the sums that losses are.
            observe: is told the losses of every micro-batch and pass.
            keep_inputs: whether ``inputs`` are needed afterwards (another module of the recipe follows).
        """
        assert any(one.loss is not None for one in passes), f"no pass over {self.name} has a loss"
        for number, one in enumerate(passes):
            last = number == len(passes) - 1
            carried = self._run_pass(one, inputs, divisors, observe, keep_inputs or not last)
            if one.following is not None and not last:
                following = functools.partial(_following, one.following, inputs, carried, keep_inputs)
                inputs, keep_inputs = MicroBatches(inputs.count, following), False

    def _run_pass(
        self, one: Pass, inputs: MicroBatches, divisors: Divisors, observe: Observer, keep: bool
    ) -> list[Tensor]:
        """Forward, and backward if there is a loss, of all micro-batches; returns what the pass carries on."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        carried: dict[int, Tensor] = {}

        def finish(index: int, item: Any, output: Any) -> tuple[Tensor, dict[str, Any]]:
            if one.carry is not None:
                with torch.no_grad():
                    carried[index] = one.carry(output, item).detach()
            if one.loss is None:
                return torch.zeros(()), {}
            losses = one.loss(output, item)
            observe(index, losses)
            return _poisoned_if_not_finite(self._share(losses, divisors, inputs.count)), {}

        def forward_step(iterator: Iterator[Any], model: "_Scheduled") -> tuple[Any, Callable[[Any], Any]]:
            index, item = next(iterator)
            return one.forward(model.call, item), functools.partial(finish, index, item)

        readers = inputs.readers(len(self._scheduled), keep)
        single = len(self._scheduled) == 1
        length = self._prepare_stages(one, inputs)
        with torch.set_grad_enabled(one.loss is not None):  # the schedules leave that to their callers
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=readers[0] if single else readers,
                model=self._scheduled[0] if single else self._scheduled,
                num_microbatches=inputs.count,
                seq_length=length,
                decoder_seq_length=length,
                micro_batch_size=self.plan.json["train_micro_batch_size_per_gpu"] * one.copies,
                forward_only=one.loss is None,
            )
        if one.carry is None:
            return []
        device = next(self.module.parameters()).device
        return share_carried([carried[index] for index in sorted(carried)], inputs.count, device)

    def _prepare_stages(self, one: Pass, inputs: MicroBatches) -> int:
        """Tell the chunks what pass begins; returns the sequence length to announce to the schedules."""
        for chunk in self.chunks:
            if isinstance(chunk, PipelineStage):
                chunk.balance = one.balance / inputs.count  # the schedules take the mean over micro-batches
        if self.topology.config.pipeline == 1:
            return 1
        stage = self.chunks[0]
        assert isinstance(stage, PipelineStage)
        return stage.payload_length(*_module_arguments(one, inputs.peek(0)))

    def _share(self, losses: Losses, divisors: Divisors, micro_batches: int) -> Tensor:
        """This micro-batch's share in the loss of the step, so that the mean over micro-batches, which the schedules
        take, and over data-parallel ranks, which DeepSpeed takes, is the sum of all divided by the divisor.
        """
        parts = micro_batches * self.topology.data
        scale = parts / divisors.valid
        share = losses.total * (scale.to(losses.total.dtype) if isinstance(scale, Tensor) else scale)
        if losses.per_image is not None:
            share = share + losses.per_image * (parts / divisors.images)
        return share

    def step(self, learning_rate: float, weight_decay: float, step: int = 0) -> StepResult:
        """Reduce gradients, clip them, update, and clear them. Collective.

        ``step`` is that of the run: it decides which of the parameters with first and last steps are trained.

        A norm that is not finite skips the update, on all ranks alike: DeepSpeed's ZeRO optimizers do so themselves
        (zero/stage_1_and_2.py:3042, zero/stage3.py:2888), stage 0 in :class:`ClippedStep`.
        """
        set_rates(self.deepspeed.optimizer, learning_rate, weight_decay, step)
        self.deepspeed.step()
        self._forget_gradients()
        if self._clipped is not None:
            return StepResult(self._clipped.applied, self._clipped.norm)
        return StepResult(not self.deepspeed.optimizer.overflow, self.deepspeed.get_global_grad_norm())

    def _forget_gradients(self) -> None:
        """ZeRO-3 overwrites a parameter's part of its gradient buffer in the first backward of a step and adds to it in
        later ones (zero/stage3.py ``partition_grads``): without this, a parameter that only later passes use would add
        to the gradient of the step before, and one that no pass uses would be updated by that again.
        """
        buffer = getattr(self.deepspeed.optimizer, "grad_partitions_flat_buffer", None)
        if buffer is not None:
            buffer.zero_()

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
        self.model_type = ModelType.encoder_or_decoder
        if isinstance(module, PipelineStage):
            self.config, self.set_input_tensor = module.config, module.set_input_tensor
        else:  # never a part of a pipeline: the smallest configuration will do
            self.config = TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1)
            self.set_input_tensor = _ignore


def _ignore(input_tensor: Tensor | list[Tensor]) -> None:
    pass


class _Called(Exception):
    """Carries what a pass wants to call the module with."""


def _module_arguments(one: Pass, item: Any) -> tuple[Any, ...]:
    """What a pass calls the module with, found out without running the module."""

    def record(*arguments: Any) -> Any:
        raise _Called(*arguments)

    try:
        one.forward(record, item)
    except _Called as called:
        return called.args
    raise AssertionError("the forward of a pass does not call the module")


def _following(
    following: Callable[[Any, Tensor], Any], inputs: MicroBatches, carried: list[Tensor], keep: bool, index: int
) -> Any:
    """The inputs of micro-batch ``index`` in the pass after the one that had ``inputs``."""
    return following(inputs.take(index, keep), carried[index])


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


def _initialize_deepspeed(module: nn.Module, optimizer: torch.optim.Optimizer, plan: DeepSpeedPlan) -> Any:
    engine, *_ = prepare_deepspeed().initialize(
        model=module, optimizer=optimizer, config=plan.json, mpu=DeepSpeedTopology(), dist_init_required=False
    )
    return engine
