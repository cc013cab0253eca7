"""Generators: p(tokens | condition) as a stack of blocks. What to write for a new one.

A generator is a :class:`~megavar.transformer.backbone.Backbone` that knows what its tokens are. It is written as if
there were one process, and runs under every layout. Take a class-conditional raster model with causal attention:

* ``layers``       "24 blocks of width 1024, 16 heads, a feed-forward network of 4096":
                   one call of ``transformer_config``.
* ``build_first``  ``self.classes`` and ``self.tokens``, two ``nn.Embedding``, and ``self.position``. Only the first
                   pipeline stage has them.
* ``sequence``     ``TokenSequence(SequenceLayout((256,), rule="causal"))``, and the sample keys of the inputs. While
                   decoding: as many tokens as the inputs hold.
* ``embed``        the class's row, then the rows of all tokens but the last, each plus its position: [B, 256, C].
* ``spec``         which norm, modulation, attention and feed-forward network block i is made of.
* ``build_last``   the last norm and a ``ColumnParallelLinear`` to the vocabulary, both built with ``self.unsharded``:
                   outside the blocks every rank has all tokens. Only the last stage has them.
* ``predict``      from hidden states [256, B, C] to logits: ``self.head(self.norm(hidden))[0].transpose(0, 1)``.
* ``example``      inputs of so many images, for the planner, benchmarks and dry runs.

Its section of the configuration is a subclass of ``GeneratorChoice`` that names the class and says what limits the
layouts (``limits``). There is nothing else to register.

What may be left out has a default: ``condition_rows`` and ``modulating`` (no conditions but those in the tokens),
``initial_value`` and ``own_rule`` (PyTorch's scale; decay on all but biases and norms), ``kinds_of`` (one kind of
segment), ``gather`` (the last dimension of the prediction is shared by tensor-parallel ranks). Decoding is ``step``: it
calls the same methods with inputs that hold the newest tokens only.

Three rules keep every layout equal to one process: draw nothing from a global random state (dropout is counter-based,
``transformer/dropout.py``), read parameters in ``forward`` of the module that owns them (ZeRO-3 gathers them there),
and wait for no device (no ``.item()``).
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.generators.base import GeneratorChoice
from megavar.config.parallel import ParallelConfig
from megavar.config.token_space import TokenSpace
from megavar.parallel.pipeline_stage import Stage
from megavar.transformer.backbone import Backbone
from megavar.transformer.block import Block
from megavar.transformer.interface import Embedded, GeneratorOutput, Head, TokenSequence
from megavar.transformer.spec import BlockSpec

__all__ = ["Embedded", "Generator", "GeneratorOutput", "Head", "Stage", "TokenSequence"]


class Generator(Backbone):
    """One pipeline stage of a generator; see the module for what a subclass says."""

    class_table: ClassVar[str] = "embedding.classes.weight"
    """Name of the parameter whose last rows are the classes and "no class", where it is asked by class."""

    def __init__(
        self,
        choice: GeneratorChoice,
        space: TokenSpace,
        *,
        parallel: ParallelConfig | None = None,
        stage: Stage | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        taps: tuple[str, ...] = (),
        heads: Mapping[str, Head] | None = None,
        shard: Callable[[nn.Module], None] | None = None,
        codebook: Tensor | None = None,
    ) -> None:
        """Build this stage, with initial values that are the same in every layout.

        Args:
            choice: the generator's section of the configuration.
            space: the tokens it generates.
            parallel: layout; the process groups must exist. None means a single process.
            stage: part of the model to hold; None means all of it.
            dtype: type of parameters and hidden states.
            seed: of initial values, dropout and drop path.
            taps: outputs that are returned beside the prediction: ``embedding``, ``block.0`` ...
            heads: networks on the last stage that read taps, by the name of the loss they serve.
            shard: called with every block when it has its initial values, before the next one is built (ZeRO-3).
            codebook: the tokens' code vectors, float32 [V, D], for a choice that says ``reads_codebook``; None where
                weights are loaded afterwards, which hold them.
        """
        parallel = parallel or ParallelConfig()
        self.choice, self.space, self.codebook = choice, space, codebook
        super().__init__(
            self.layers(choice, parallel, dtype),
            kinds=self.kinds_of(space),
            experts=choice.limits(space).experts,
            parallel=parallel,
            stage=stage,
            seed=seed,
            taps=taps,
            heads=heads or {},
            shard=shard,
        )

    @classmethod
    @abstractmethod
    def layers(cls, choice: Any, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
        """The configuration of the blocks' layers: one call of
        :func:`megavar.transformer.megatron_config.transformer_config`."""

    @classmethod
    def kinds_of(cls, space: TokenSpace) -> int:
        """Number of kinds of segments that routers and their statistics tell apart (VAR: the scales)."""
        return 1

    @abstractmethod
    def spec(self, number: int) -> BlockSpec:
        """What block ``number`` (from 0) is made of: one of the functions of :mod:`megavar.transformer.spec`, or an own
        :class:`BlockSpec`."""

    def block(self, number: int) -> Block:
        """Block ``number`` of the model, from 0."""
        return Block(self.config, self.spec(number), number, self.config.num_layers, recompute=self.recompute)

    @abstractmethod
    def example(self, images: int) -> Any:
        """Inputs for ``images`` samples on the current default device, of the shapes and types of real ones."""
