"""What is trained, apart from how it is spread: predicts the costs of any layout of it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from megavar.config.generators.base import Limits
from megavar.config.generators.var import VARConfig
from megavar.config.token_space import TokenSpace
from megavar.planning.flops import model_flops, sampling_flops
from megavar.planning.hardware import FRAGMENTATION, RESERVED
from megavar.planning.layout import Layout
from megavar.planning.memory import FLOAT32, SEARCH_BYTES, Memory, bucket_bytes, rank_memory, state_bytes
from megavar.planning.parameters import ParameterCount, RankParameters, count_parameters, rank_parameters
from megavar.planning.shape import GeneratorShape
from megavar.planning.timing import Machine, StepTime, data_seconds, optimizer_seconds, step_time
from megavar.planning.tokenizer_cost import TokenizerCost

HEADROOM = 0.95
"""Share of the device's memory that a layout may fill."""


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
    def generator(self) -> VARConfig | None:
        """What the rules of layouts ask about; None for a tokenizer."""

    @property
    def limits(self) -> Limits | None:
        """What the rules of layouts ask about; None for a tokenizer."""
        return None

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

    @property
    def peak(self) -> float:
        """Operations per second of a GPU in the run's precision."""
        return self.machine.gpu.bf16 if self.element == 2 else self.machine.gpu.fp32


@dataclass(frozen=True)
class GeneratorWorkload(Workload):
    """A next-scale generator on the tokens of a frozen tokenizer."""

    shape: GeneratorShape
    kernel: str
    """Attention kernel."""
    tokenizer: TokenizerCost | None
    """None where tokens are cached."""

    @property
    def generator(self) -> VARConfig:
        """The generator."""
        return self.shape.generator

    @property
    def limits(self) -> Limits:
        """Of the generator."""
        space = TokenSpace.of_scales(self.shape.scales, self.shape.vocabulary, self.shape.code_dimension, 0)
        return self.generator.limits(space)

    @property
    def parameters(self) -> ParameterCount:
        """Of the generator."""
        return count_parameters(self.shape)

    @property
    def train_flops(self) -> float:
        """Of the generator; the frozen tokenizer is not counted."""
        return model_flops(self.shape)

    def sample_flops(self, guidance: bool) -> float:
        """Per drawn image, without the tokenizer's decoder."""
        return sampling_flops(self.shape, guidance)

    def predict(self, layout: Layout) -> Prediction:
        """Costs of a layout: memory of the fuller one of the first and the last pipeline stage."""
        memories = {
            stage: rank_memory(
                self.shape,
                layout,
                pipeline_rank=stage,
                element=self.element,
                kernel=self.kernel,
                ema=self.ema,
                tokenizer=self.tokenizer,
                image_bytes=self.image_bytes,
            )
            for stage in {0, layout.parallel.pipeline - 1}
        }
        fullest = max(memories, key=lambda stage: memories[stage].total)
        time = step_time(
            self.shape,
            layout,
            self.machine,
            utilization=self.utilization,
            element=self.element,
            kernel=self.kernel,
            tokenizer=self.tokenizer,
        )
        held = rank_parameters(self.shape, layout.parallel, fullest)
        host = state_bytes(held, layout, self.element, ema=self.ema).host
        return Prediction(layout, memories[fullest], fullest, time, host)


@dataclass(frozen=True)
class AutoencoderWorkload(Workload):
    """A tokenizer in training: its autoencoder, without discriminator and perceptual network."""

    cost: TokenizerCost

    @property
    def generator(self) -> None:
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

