"""The kind of all mixtures of experts: what they have in common whatever router feeds them."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from megavar.config.choice import Choice
from megavar.config.parallel import ParallelConfig
from megavar.errors import ConfigError


class ExpertsChoice(Choice):
    """Mixture of experts in place of the feed-forward network of every block (MEPA section 4.2).

    The router is what distinguishes them: ``implementation`` names its class, and each router may add keys of its own.
    """

    discriminator: ClassVar[str] = "router"
    default: ClassVar[str | None] = "scale_token"
    package: ClassVar[str] = "megavar.config.experts"
    variable_number: ClassVar[bool] = False
    """Whether the router may give tokens different numbers of experts."""

    number: int = Field(8, ge=1)
    """Experts per layer, M (MEPA Table 1)."""
    top_k: int = Field(3, ge=1)
    """Experts per token, m. Not in the paper: 3 is the only value that gives its activated parameter counts with
    experts of the feed-forward network's size in every block (252 M for d12, 585 M for d16)."""
    router: str
    """Which router scores the experts."""
    balance_coefficient: float = Field(0.01, ge=0)
    """Weight of the balance loss (Eq. 10) of each layer. Not in the paper: 0.01 is Switch Transformer's. Megatron-core
    and DeepSpeed divide this loss by top_k; Eq. 10 does not."""
    balance_scope: Literal["image", "micro_batch"] = "image"
    """Over which tokens Eq. 10 takes its means. ``image``: N is "token length of one sample", then the mean over
    images, which does not depend on how a batch is split over ranks or micro-batches. ``micro_batch``: all tokens of
    a micro-batch on one rank (the convention of Switch and Megatron-core)."""
    backend: Literal["auto", "megatron", "grouped", "tutel", "deepspeed"] = "auto"
    """Implementation of the experts; all compute the same and share checkpoints. ``megatron``: Megatron-core's
    SequentialMLP, one expert after the other. ``grouped``: stacked weights and grouped matrix products. ``tutel``:
    Tutel's dispatch and all-to-all (a package of its own). ``deepspeed``: DeepSpeed-MoE's layer, without tensor
    parallelism. ``auto``: ``grouped`` on CUDA, ``megatron`` on CPU."""

    @model_validator(mode="after")
    def _check(self) -> "ExpertsChoice":
        if self.top_k > len(self.targets):
            raise ValueError(f"top_k={self.top_k} exceeds number={len(self.targets)}: lower top_k or add experts")
        return self

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of all that a token can be sent to, in the order of the scores: the columns of routing statistics.

        The first :attr:`number` are the experts; a router may know more targets, which are no feed-forward networks.
        """
        return tuple(map(str, range(self.number)))

    @property
    def carried(self) -> int:
        """float32 numbers per token that the router of a block hands to that of the next one."""
        return 0

    def copies(self, sizes: Sequence[int]) -> float:
        """Experts that compute a token on average: what plans count with.

        Args:
            sizes: tokens of each segment of the sequence.
        """
        return float(self.top_k)

    def check_decoding(self) -> None:
        """Refuse to decode with a router that cannot choose then as it chose in training.

        Raises:
            ConfigError: it cannot.
        """

    def check(self, parallel: ParallelConfig) -> None:
        """Refuse what the experts cannot do under a layout: the only place that says so.

        Raises:
            ConfigError: the first rule that is broken.
        """
        if self.number % parallel.expert:
            raise ConfigError(
                f"generator.experts.number={self.number} is not a multiple of parallel.expert={parallel.expert}: every "
                f"rank holds the same number of experts. Change one of them."
            )
        if self.backend in ("tutel", "deepspeed") and parallel.dispatcher != "alltoall":
            raise ConfigError(
                f"generator.experts.backend={self.backend} exchanges tokens by its own all-to-all, but "
                f"parallel.dispatcher={parallel.dispatcher} is asked for. Set parallel.dispatcher=alltoall, or choose "
                f"the backend megatron or grouped."
            )
        if self.backend == "deepspeed" and parallel.tensor > 1:
            raise ConfigError(
                f"generator.experts.backend=deepspeed cannot run with parallel.tensor={parallel.tensor}: DeepSpeed-MoE "
                f"expects every tensor-parallel rank to hold all tokens (deepspeed/moe/sharded_moe.py drops "
                f"duplicates), while each of ours holds a share of them. Choose the backend megatron, grouped or tutel."
            )
        if self.variable_number and self.backend in ("tutel", "deepspeed"):
            raise ConfigError(
                f"generator.experts.router={self.router} gives tokens different numbers of experts, but "
                f"generator.experts.backend={self.backend} has room for exactly top_k={self.top_k} copies of each. "
                f"Choose the backend megatron or grouped."
            )
