"""What is trained, apart from how it is spread: predicts the costs of any layout of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

from megavar.config.generators.base import GeneratorChoice, Limits
from megavar.config.parallel import ParallelConfig
from megavar.config.terms.base import TermChoice
from megavar.config.token_space import TokenSpace
from megavar.planning.cost import Cost, RankParameters, TokenizerCost
from megavar.planning.hardware import FRAGMENTATION, RESERVED
from megavar.planning.layout import Layout
from megavar.planning.measure import Precision, Request, measure
from megavar.planning.memory import FLOAT32, SEARCH_BYTES, Memory, bucket_bytes, rank_memory, state_bytes
from megavar.planning.passes import Work
from megavar.planning.timing import Machine, StepTime, data_seconds, optimizer_seconds, step_flops, step_time

HEADROOM = 0.95
"""Share of the device's memory that a layout may fill."""
Progress = Callable[[int, int], None]
"""Called with the number of measurements done and of all."""


@dataclass(frozen=True)
class ParameterCount:
    """Scalars of a whole model."""

    total: int
    activated: int
    """Those that take part in computing one token, of the experts only those that it meets (MEPA's "activated")."""
    per_token: int
    """Weights that are multiplied with every token: attention, activated feed-forward networks, router, head."""
    per_image: int
    """Weights that are multiplied once per image: modulation networks."""


@dataclass(frozen=True)
class Prediction:
    """A layout with what it costs."""

    layout: Layout
    memory: Memory
    """Of the fullest rank."""
    stage: int
    """Pipeline stage of that rank."""
    time: StepTime
    host: float
    """Bytes that a rank offloads to its node's memory."""

    def fits(self, capacity: float) -> bool:
        """Whether the fullest rank stays within a device of ``capacity`` bytes, with some headroom."""
        return self.memory.total <= capacity * HEADROOM


@dataclass(frozen=True)
class Workload(ABC):
    """A model in training on a machine."""

    machine: Machine
    utilization: float
    """Model FLOPs over peak while the model computes."""
    element: int
    """Bytes of a weight."""
    ema: bool
    """Whether a moving average of the weights is kept."""
    image_bytes: float
    """Of one prepared image: pixels, tokens, features."""

    @property
    @abstractmethod
    def limits(self) -> Limits | None:
        """What the rules of layouts ask about; None for a tokenizer."""

    @property
    @abstractmethod
    def parameters(self) -> ParameterCount:
        """Of the whole model."""

    @property
    @abstractmethod
    def train_flops(self) -> float:
        """Model FLOPs per image, forward and backward."""

    @abstractmethod
    def predict(self, layout: Layout) -> Prediction:
        """Costs of a layout that the rules allow."""

    def prepare(self, layouts: Iterable[Layout], progress: Progress) -> None:
        """Measure what predictions of ``layouts`` need, all at once."""
        return  # nothing that depends on the layout

    @property
    def peak(self) -> float:
        """Operations per second of a GPU in the run's precision."""
        return self.machine.gpu.bf16 if self.element == 2 else self.machine.gpu.fp32


@dataclass(frozen=True)
class GeneratorWorkload(Workload):
    """A generator on the tokens of a frozen tokenizer."""

    choice: GeneratorChoice
    space: TokenSpace
    tokenizer: TokenizerCost | None
    """None where tokens are cached."""
    terms: tuple[TermChoice, ...] = ()
    """Losses whose heads are trained with the generator."""
    teachers: tuple[TokenizerCost, ...] = ()
    """Of the terms, where their features are not cached."""
    work: Work = field(default_factory=Work)
    """Of the passes of a step."""
    _costs: dict[tuple[int, bool, str], Cost] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def limits(self) -> Limits:
        """Of the generator."""
        return self.choice.limits(self.space)

    @property
    def parameters(self) -> ParameterCount:
        """Of the generator."""
        return count_parameters(self.choice, self.space, self.cost(ParallelConfig()))

    @property
    def train_flops(self) -> float:
        """Of the generator; the frozen tokenizer is not counted."""
        return step_flops(self.cost(ParallelConfig()), self.work)

    def _request(self, parallel: ParallelConfig) -> Request:
        precision: Precision = "bf16" if self.element == 2 else "fp32"
        is_sharded = parallel.sequence and parallel.tensor > 1
        return Request(self.choice, self.space, parallel.tensor, is_sharded, parallel.recompute, precision, self.terms)

    @property
    def frozen(self) -> TokenizerCost | None:
        """Tokenizer and teachers together."""
        networks = [network for network in (self.tokenizer, *self.teachers) if network is not None]
        if not networks:
            return None
        return TokenizerCost(
            sum(network.parameters for network in networks),
            sum(network.encode_flops for network in networks),
            sum(network.decode_flops for network in networks),
            max(network.encode_bytes for network in networks),
            None,
        )

    def cost(self, parallel: ParallelConfig) -> Cost:
        """Of one rank."""
        key = (parallel.tensor, parallel.sequence, parallel.recompute)
        if key not in self._costs:
            (self._costs[key],) = measure([self._request(parallel)])
        return self._costs[key]

    def prepare(self, layouts: Iterable[Layout], progress: Progress) -> None:
        """Measure the ranks of all layouts and of the undivided model."""
        parallels = [ParallelConfig(), *(layout.parallel for layout in layouts)]
        measure([self._request(parallel) for parallel in parallels], progress)

    def predict(self, layout: Layout) -> Prediction:
        """Costs of a layout: memory of the fuller one of the first and the last pipeline stage."""
        cost = self.cost(layout.parallel)
        memories = {
            stage: rank_memory(
                cost,
                layout,
                pipeline_rank=stage,
                element=self.element,
                ema=self.ema,
                tokenizer=self.frozen,
                image_bytes=self.image_bytes,
                largest=self.work.largest,
            )
            for stage in {0, layout.parallel.pipeline - 1}
        }
        fullest = max(memories, key=lambda stage: memories[stage].total)
        time = step_time(
            cost,
            layout,
            self.machine,
            whole=self.cost(ParallelConfig()),
            work=self.work,
            utilization=self.utilization,
            element=self.element,
            tokenizer=self.frozen,
        )
        host = state_bytes(cost.parameters(layout.parallel, fullest), layout, self.element, ema=self.ema).host
        return Prediction(layout, memories[fullest], fullest, time, host)


def count_parameters(choice: GeneratorChoice, space: TokenSpace, cost: Cost) -> ParameterCount:
    """Scalars of a generator, from the costs of a rank that holds all of it."""
    held = cost.parameters(ParallelConfig(), 0)
    experts = choice.limits(space).experts
    unused = 0 if experts is None else 1 - experts.copies(space.sizes) / experts.number
    activated = held.total - round(held.experts * unused)
    return ParameterCount(held.total, activated, cost.weights_per_token, cost.weights_per_image)


@dataclass(frozen=True)
class TokenizerWorkload(Workload):
    """A tokenizer in training: its autoencoder, without discriminator and perceptual network."""

    cost: TokenizerCost

    @property
    def limits(self) -> None:
        """None."""
        return None

    @property
    def parameters(self) -> ParameterCount:
        """Of the autoencoder."""
        return ParameterCount(self.cost.parameters, self.cost.parameters, 0, 0)

    @property
    def train_flops(self) -> float:
        """Of the autoencoder."""
        return 3 * (self.cost.encode_flops + self.cost.decode_flops)

    @property
    def peak(self) -> float:
        """cuDNN computes float32 convolutions in TF32, PyTorch's default."""
        return self.machine.gpu.bf16 if self.element == 2 else self.machine.gpu.tf32

    def predict(self, layout: Layout) -> Prediction:
        """Costs of a layout."""
        held = RankParameters(self.cost.parameters, 0)
        state = state_bytes(held, layout, self.element, ema=self.ema)
        buckets = bucket_bytes(held, layout, self.element)
        assert self.cost.training_bytes is not None, "a tokenizer in training is a module that can be called"
        activations = layout.micro_batch * self.cost.training_bytes * self.element / FLOAT32 + SEARCH_BYTES
        training = state.gradients + buckets + activations
        share = layout.micro_batch * layout.micro_batches
        memory = Memory(
            weights=state.weights,
            gradients=state.gradients,
            optimizer=state.optimizer,
            ema=state.ema,
            buckets=buckets,
            activations=activations,
            tokenizer=share * self.image_bytes,
            reserved=RESERVED + FRAGMENTATION * training,
        )
        time = StepTime(
            compute=share * self.train_flops / (self.peak * self.utilization),
            data=data_seconds(held, layout, self.machine, self.element),
            optimizer=optimizer_seconds(held, layout, self.machine),
        )
        return Prediction(layout, memory, 0, time, state.host)
