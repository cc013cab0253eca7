"""What a recipe is: the algorithm of a paper as the trainer sees it.

A recipe owns modules and says per training step what runs over them: a sequence of *passes*, each a forward (and
backward) over all micro-batches of the step. It knows nothing of engines, ranks, micro-batch numbers or checkpoints.

    class Mine(BaseRecipe):
        def modules(self): return {"generator": self.generator}
        def prepare(self, batch, step): return Inputs(...)              # tokens, labels, noise: without gradient
        def passes(self, module, step): return [Pass(self.forward, self.loss)]
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from megavar.config.root import Config
from megavar.config.teachers.base import TeacherChoice
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.data.batch import Batch
from megavar.data.text import TextEncoder
from megavar.parallel.parameter_rule import ParameterRule

Count = int | Tensor
"""A number of items. An ``int`` promises that it is the same for every micro-batch of the step on every rank; a scalar
tensor may differ, and costs one small all-reduce per step."""



class WriteRows(Protocol):
    """Changes rows of a parameter wherever the optimizer keeps copies."""

    def __call__(self, parameter: Tensor, rows: Tensor, values: Tensor, moves: Tensor | None = None, /) -> None:
        """Move ``rows`` (int64 [n]) of a parameter to ``values`` [n, ...]: all the way, or by ``moves`` [n]."""
        ...


@dataclass
class Losses:
    """The result of a pass on one micro-batch: sums, never means.

    What is differentiated is the sum of ``total`` over all micro-batches and data-parallel ranks divided by the number
    of valid items of the whole step (:meth:`Recipe.valid`), so however a batch is split, every item weighs the same.
    """

    total: Tensor
    """float32 scalar: sum of the losses of the valid items (tokens that count, samples, ...)."""
    named: dict[str, Tensor] = field(default_factory=dict)
    """Metrics by name, without gradient: sums over the valid items; logged as means over them."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """Sums over the micro-batch by name, of any shape, without gradient; see :meth:`Recipe.summarize`."""
    means: dict[str, tuple[Tensor, Count]] = field(default_factory=dict)
    """Metrics by name that are means over something else: its sum over the micro-batch, and how many there are."""
    per_image: Tensor | None = None
    """float32 scalar that is differentiated, too: a sum over the images of the micro-batch, whose divisor is their
    number. For losses that have one value per image, however many of its tokens count (see ``recipes.terms``)."""


@dataclass(frozen=True)
class Pass:
    """One run over all micro-batches of a step. Its graph is gone before the next pass begins.

    A rollout is a pass that ``carry`` s its result to a later one; it is never differentiated through. Two forwards in
    one graph are not offered: ZeRO-2 and 3 reduce a parameter's gradient once per backward.
    """

    forward: Callable[[Callable[..., Any], Any], Any]
    """(callable module, inputs of one micro-batch) -> its output. Call the module, never its attributes."""
    loss: Callable[[Any, Any], Losses] | None
    """(output, inputs) -> losses; on the last pipeline stage. None: the pass runs without a graph."""
    carry: Callable[[Any, Any], Tensor] | None = None
    """(output, inputs) -> what the next pass needs to know of this one, without gradient. Computed on the last pipeline
    stage; all stages (and tensor-parallel ranks) get the same tensor."""
    following: Callable[[Any, Tensor], Any] | None = None
    """(inputs, carried) -> inputs of the next pass. None: the next pass has the same inputs."""
    balance: float = 1.0
    """Weight of the routers' balance losses in this pass."""
    copies: int = 1
    """How often each image is in the batch that the module gets: twice where it is there with and without its condition
    (guidance). Pipeline stages need to know."""

    def __post_init__(self) -> None:
        assert (self.carry is None) == (self.following is None), "carry and following need each other"


class Parts(Protocol):
    """What a recipe is built from (``megavar.assembly.Assembly``)."""

    @property
    def config(self) -> Config:
        """The run's configuration; ``config.recipe`` is the recipe's own section."""
        ...

    @property
    def steps(self) -> int:
        """Length of the run."""
        ...

    @property
    def device(self) -> torch.device:
        """Where modules live."""
        ...

    def tokenizer(self) -> Any:
        """The frozen tokenizer whose tokens a generator learns (``megavar.tokenizers.base``)."""
        ...

    def frozen_tokenizer(self, choice: TokenizerChoice, weights: str, key: str) -> Any:
        """Another frozen tokenizer, whose weights the key ``key`` of the configuration names."""
        ...

    def fresh_tokenizer(self) -> Any:
        """The tokenizer that the run trains, not initialized and on the CPU."""
        ...

    def generator(self, **options: Any) -> nn.Module:
        """This rank's part of the generator: a stage, or a ``ModuleList`` of its chunks."""
        ...

    def teacher(self, choice: TeacherChoice) -> Any:
        """A frozen network that a term compares with (``megavar.teachers.base``)."""
        ...

    def text(self) -> TextEncoder:
        """What makes token ids of captions, which batches hold already: for the row of no caption."""
        ...

    def terms(self) -> list[Any]:
        """The losses that the recipe section adds to the recipe's own."""
        ...


class Recipe(Protocol):
    """The interface between a paper and the trainer; :class:`BaseRecipe` has defaults for most of it."""

    @classmethod
    def build(cls, parts: Parts) -> "Recipe":
        """The recipe that ``parts.config.recipe`` describes, with freshly initialized modules."""
        ...

    def modules(self) -> dict[str, nn.Module]:
        """Trained modules by name, in the order in which they are stepped."""
        ...

    def prepare(self, batch: Batch, step: int) -> Any:
        """Turn a micro-batch into the inputs of the first pass, without gradient (tokenise, drop labels).

        Called once per micro-batch and step, when a pass first needs it.
        """
        ...

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """What runs over ``module`` in step ``step``; at least one pass has a loss."""
        ...

    def valid(self, batch: Batch, step: int) -> Count:
        """Number of items over which a micro-batch's losses are sums; known before anything is computed."""
        ...

    def rule(self, module: str, parameter: str) -> ParameterRule:
        """How a logical tensor of a module is trained."""
        ...

    def active(self, module: str, step: int) -> bool:
        """Whether ``module`` is trained at ``step`` (a discriminator starts late)."""
        ...

    def rate_factor(self, step: int) -> float:
        """By what the learning rate of ``optimizer.schedule`` is multiplied: 1, where a recipe has no phases."""
        ...

    def collect(self) -> dict[str, Tensor]:
        """Statistics that modules recorded on this rank since the last call, and forget them.

        Every rank calls it at the same step and gets the same names and shapes (zeros for what lies on other ranks);
        the trainer adds them up over all ranks of the world.
        """
        ...

    def summarize(self, statistics: dict[str, Tensor]) -> dict[str, float]:
        """Turn statistics (of losses and of :meth:`collect`, summed over ranks and steps) into metrics."""
        ...

    def after_step(self, step: int, write_rows: WriteRows) -> None:
        """Called on every rank after the optimizer steps of all modules (for example to revive dead codes)."""
        ...


@runtime_checkable
class KnowsRules(Protocol):
    """A module that says itself how its parameters are trained, as generators do."""

    def rule(self, name: str) -> ParameterRule:
        """The rule of its logical tensor ``name``."""
        ...


@runtime_checkable
class RecordsRouting(Protocol):
    """A module with routers, as generators are."""

    @property
    def routing_targets(self) -> tuple[str, ...]:
        """Names of what tokens are sent to."""
        ...

    def collect_routing(self) -> dict[str, Tensor]:
        """``load`` [blocks, kinds, targets], ``balance`` and ``passes`` [blocks] since the last call; see
        :meth:`megavar.transformer.backbone.Backbone.collect_routing`."""
        ...


class BaseRecipe:
    """Defaults. A recipe of its own says ``modules``, ``prepare`` and ``passes``."""

    def modules(self) -> dict[str, nn.Module]:
        """See :meth:`Recipe.modules`."""
        raise NotImplementedError

    def prepare(self, batch: Batch, step: int) -> Any:
        """See :meth:`Recipe.prepare`."""
        raise NotImplementedError

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """See :meth:`Recipe.passes`."""
        raise NotImplementedError

    def valid(self, batch: Batch, step: int) -> Count:
        """Losses are sums over samples."""
        return len(batch)

    def rule(self, module: str, parameter: str) -> ParameterRule:
        """The module's own rule if it has one; else everything is trained, and decays."""
        first = chunks_of(self.modules()[module])[0]
        return first.rule(parameter) if isinstance(first, KnowsRules) else ParameterRule()

    def active(self, module: str, step: int) -> bool:
        """Always."""
        return True

    def rate_factor(self, step: int) -> float:
        """1."""
        return 1.0

    def collect(self) -> dict[str, Tensor]:
        """What routers of experts recorded; sums, zero for blocks of other stages."""
        collected: dict[str, Tensor] = {}
        for module in self.modules().values():
            for chunk in chunks_of(module):
                for key, value in chunk.collect_routing().items() if isinstance(chunk, RecordsRouting) else ():
                    collected[key] = collected[key] + value if key in collected else value
        return collected

    def summarize(self, statistics: dict[str, Tensor]) -> dict[str, float]:
        """Of experts the mean balance loss, and each one's share of the tokens."""
        parts = (chunk for module in self.modules().values() for chunk in chunks_of(module))
        names = [chunk.routing_targets for chunk in parts if isinstance(chunk, RecordsRouting)]
        return routing_metrics(statistics, next(filter(None, names), ()))

    def after_step(self, step: int, write_rows: WriteRows) -> None:
        """Nothing to do."""


def chunks_of(module: nn.Module) -> list[nn.Module]:
    """The parts of a module on this pipeline stage: several under virtual pipelining (an ``nn.ModuleList``)."""
    return list(module) if isinstance(module, nn.ModuleList) else [module]


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside the block, what is computed with ``module`` sends gradients to its inputs but not to its parameters."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def routing_metrics(statistics: dict[str, Tensor], targets: Sequence[str]) -> dict[str, float]:
    """Balance loss and share of tokens of each target, from what routers recorded on all ranks; nothing if dense.

    Where tokens meet different numbers of experts, also how many on average, and the share of those that meet none.
    """
    if "load" not in statistics:
        return {}
    load = statistics["load"]
    share = load.sum((0, 1)) / load.sum().clamp(min=1)
    by_layer = load.sum(1) / load.sum((1, 2)).clamp(min=1)[:, None]
    metrics = {"balance": float((statistics["balance"] / statistics["passes"].clamp(min=1)).mean())}
    metrics |= {f"expert_share/{name}": float(value) for name, value in zip(targets, share, strict=True)}
    metrics["expert_share/largest_in_a_layer"] = float(by_layer.max())
    metrics["expert_share/smallest_in_a_layer"] = float(by_layer.min())
    if "met" in statistics:
        met = statistics["met"].sum((0, 1))
        met = met / met.sum().clamp(min=1)
        metrics["experts_per_token/mean"] = float((met * torch.arange(len(met), device=met.device)).sum())
        metrics["experts_per_token/none"] = float(met[0])
    return metrics
