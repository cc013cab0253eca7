"""How long and how to train."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megavar.config.base import PathText, Section
from megavar.config.checkpoint import CheckpointConfig


class EmaConfig(Section):
    """An exponential moving average of the fp32 weights, kept beside the optimizer state and used for sampling."""

    decay: float = Field(0.9999, ge=0, lt=1)
    """Share of the old average that each step keeps."""
    warmup: bool = True
    """Lower the decay to (1 + t) / (10 + t) in the first steps t after ``start_step``, so that the weights it starts
    from are forgotten."""
    start_step: int = Field(0, ge=0)
    """First step whose weights are averaged; until then the average is the weights themselves (VGT: 10000)."""
    modules: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Names of the recipe's modules that are averaged; default: all. A discriminator, which is never used after
    training, need not be."""


class InitialWeightsConfig(Section):
    """Weights with which a new run begins. Its optimizer state is fresh. Not read once there is a checkpoint."""

    path: PathText
    """A megavar run or checkpoint, an export (``.safetensors``), or a file in a public layout of the model. A language
    model's may be the local folder of Hugging Face's with its ``model.safetensors``, whole or in numbered files."""
    layout: str = "auto"
    """Of a file: the name of one of the model's public weight layouts (VAR: ``var``), or ``megavar`` for an export;
    ``auto`` takes the one that fits."""
    weights: Literal["model", "ema"] = "model"
    """Of a checkpoint: the weights themselves, or their moving average."""
    fresh: tuple[str, ...] = ()
    """Parts that begin with random values although the rest is given: beginnings of tensor names (``head.``,
    ``embedding.classes``). Every other tensor must be there in the right shape, and nothing else."""


class RecoveryConfig(Section):
    """What to do about a loss or gradient that is not finite. All ranks decide alike.

    Such a step is never applied. More than ``skips`` of them in a row make the run roll back to its last checkpoint and
    continue with later data; after ``rollbacks`` of those without a new checkpoint in between, the run ends with exit
    code 86.
    """

    skips: int = Field(3, ge=0)
    """Consecutive steps that may be skipped."""
    rollbacks: int = Field(2, ge=0)
    """Times the run may return to a checkpoint before it gives up."""
    divergence_factor: float | None = Field(10.0, gt=1)
    """A run whose logged losses stay above this multiple of the first one has diverged and ends, with exit code 86:
    every loss of ours begins near that of guessing, so ten times more is no training. None: never."""
    spike_factor: float = Field(2.0, gt=1)
    """A loss above this multiple of the median of the recent past is recorded as a spike in ``metrics.jsonl``."""
    spike_window: int = Field(100, ge=10)
    """Logged losses that make up the recent past."""


class WatchdogConfig(Section):
    """Ends a process that hangs, so that its job can be requeued (exit code 87)."""

    enabled: bool = True
    """Watch the time between steps."""
    factor: float = Field(20.0, gt=1)
    """A step may take this multiple of the median step time ..."""
    minimum_seconds: float = Field(300.0, gt=0)
    """... but never less than this."""
    start_seconds: float = Field(3600.0, gt=0)
    """Limit for the first step after a start (compilation, cold file system) and for saving or loading a checkpoint."""


class TrainConfig(Section):
    """Length, batch, precision, and what happens around the steps."""

    steps: int | None = Field(None, ge=1)
    """Optimizer steps of the run. Give this or ``epochs``."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training data, fractions allowed. Give this or ``steps``."""
    global_batch_size: int = Field(768, ge=1)
    """Samples of one step over all ranks. Never changed silently: it must divide evenly."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples that one rank computes at a time, at most: of its share of the batch the largest even part, the rest is
    accumulated. It changes memory and speed, never what is trained. Default: all of its share."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of weights and activations. With ``bf16`` the optimizer keeps fp32 master weights."""
    tf32: bool | None = None
    """Whether CUDA may round the factors of float32 matrix products to TF32 (10 bits of mantissa). Default: with
    ``bf16``, whose head computes in float32, as VAR's training and sampling do (``--tf32=1``); never with ``fp32``.
    Convolutions in float32 (tokenizers) use TF32 in any case, PyTorch's default and VAR's."""
    deterministic: bool = False
    """Ask for repeatable CUDA kernels wherever PyTorch has them; it warns of those that it lacks (bicubic resizing in a
    tokenizer's backward pass). Blocks with FlexAttention and experts of their own rank repeat without it."""
    compile: Literal["none", "blocks"] = "none"
    """``blocks``: each block of the generator is one graph of ``torch.compile``, forward and backward, which all blocks
    share. Compiled code rounds differently: it is part of what the run is. Experts that are spread over ranks, or whose
    backend is not ``grouped``, stay outside of the graphs; decoding is not compiled; tensor parallelism and ZeRO-3 are
    refused. With lists of scales that change, ``attention_kernel: prefix`` would compile anew for each."""
    compile_backend: Literal["inductor", "aot_eager"] = "inductor"
    """``inductor`` writes kernels; ``aot_eager`` runs the same graphs without: to see whether a difference is its."""
    seed: int = Field(0, ge=0)
    """Decides initial weights, data order, augmentation, label drop and all noise of training."""
    ema: EmaConfig | None = None
    """Moving average of the weights; none by default, as in VAR."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    initial_weights: InitialWeightsConfig | None = None
    """Weights to begin with instead of random ones."""
    fresh: bool = False
    """Start anew although the run directory holds checkpoints: they are moved away, not deleted. Once: later jobs and
    attempts of a launcher continue the new run."""
    recovery: RecoveryConfig = RecoveryConfig()
    """Losses and gradients that are not finite."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """Hanging steps."""
    cpu_threads: int | None = Field(None, ge=1, le=1024)
    """Threads of each process for operations on the CPU; default: as many as PyTorch likes. Small models are faster
    with 1, and much faster where other processes use the cores, because waiting threads spin."""
    agreement_interval: int = Field(1, ge=1)
    """Steps between the exchanges in which all ranks agree to stop, or learn that one of them met a damaged sample that
    ends the run. More saves two small collectives per step; a rank that cannot read its samples between exchanges then
    ends alone, without a checkpoint, and the launcher ends the others."""
    garbage_collection_interval: int = Field(200, ge=1)
    """Steps between runs of Python's cyclic garbage collector, at the same step on all ranks so that none waits."""

    def total_steps(self, samples: int) -> int:
        """Steps of the run over ``samples`` samples."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * samples / self.global_batch_size))

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give the length of the run either as steps or as epochs")
        return self
