"""From a configuration to the objects it describes. Knows no generator, tokenizer or recipe by name."""

import functools
import hashlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megavar import frozen
from megavar.conditions import Conditions
from megavar.config.choice import Choice, resolve
from megavar.config.deepspeed import load_deepspeed_json
from megavar.config.generators.base import GeneratorChoice
from megavar.config.parallel import ParallelConfig
from megavar.config.recipes.base import GeneratorRecipeChoice
from megavar.config.root import Config
from megavar.config.teachers.base import TeacherChoice
from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.data.build import build_text
from megavar.data.caches import CachedSamples, weights_sha256
from megavar.data.source import Source
from megavar.data.text import TextEncoder
from megavar.data.token_file import TokenFile
from megavar.errors import CheckpointError, ConfigError
from megavar.generators.base import Stage
from megavar.parallel.sharded import sharding
from megavar.parallel.topology import Topology
from megavar.recipes.base import Recipe
from megavar.sampling.sampler import Sampler
from megavar.tokenizers.base import Codebook, Tokenizer
from megavar.transformer.compilation import compile_blocks
from megavar.transformer.moe.backends import check_installed
from megavar.weight_folder import write_folder
from megavar.weight_layout import FolderPart, WeightLayout

PARAMETER_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_tokenizer(
    config: TokenizerChoice,
    weights: str,
    device: torch.device,
    together: bool = False,
    key: str = "recipe.tokenizer_weights",
) -> Any:
    """A trained tokenizer in float32, frozen: an ``nn.Module`` with the methods of ``megavar.tokenizers.base``.

    Args:
        weights: a megavar run or checkpoint of a tokenizer, an export, or a file in a public layout of the tokenizer.
        together: all ranks call it at this time, see :func:`megavar.frozen.load`.
        key: that of the configuration which names them, for errors.

    Raises:
        CheckpointError: the weights are missing, damaged, or of another tokenizer.
    """
    tokenizer = resolve(config)(config)
    path = Path(weights)
    if not path.exists():
        raise CheckpointError(
            f"{key}: {weights} does not exist. Train the tokenizer first (list its configuration "
            f"under run.requires to have it trained automatically), or give a file in a public layout."
        )
    layouts = weight_layouts(config, config.space)
    frozen.load(tokenizer, path, layouts, what="The file of tokenizer weights", together=together)
    return frozen.ready(tokenizer, device)


def load_teacher(choice: TeacherChoice, device: torch.device) -> Any:
    """A trained teacher in float32, frozen: an ``nn.Module`` with the methods of ``megavar.teachers.base``.

    Raises:
        CheckpointError: the weights are missing, damaged, or of another network.
    """
    teacher = resolve(choice)(choice)
    path = Path(choice.weights)
    if not path.exists():
        raise CheckpointError(
            f"The weights of the teacher {choice.name!r}, {path}, do not exist. Give a local file in one of its "
            f"published layouts ({', '.join(type(choice).weight_layouts) or 'it has none'}), or list the configuration "
            f"that trains it under run.requires."
        )
    frozen.load(teacher, path, weight_layouts(choice), what=f"The file of the teacher {choice.name!r}")
    return teacher.eval().requires_grad_(False).to(device)


def teacher_sha256(choice: TeacherChoice, teacher: nn.Module) -> str:
    """What a teacher's features depend on: its weights and settings, wherever they lie and in whatever precision."""
    settings = choice.model_dump_json(exclude={"weights", "precision"})
    return hashlib.sha256(f"{weights_sha256(teacher)} {settings}".encode()).hexdigest()


def require_generator(config: Config) -> GeneratorChoice:
    """The generator section.

    Raises:
        ConfigError: there is none.
    """
    if config.generator is None:
        known = ", ".join(GeneratorChoice.alternatives())
        raise ConfigError(
            f"The recipe {config.recipe.name!r} of run {config.run.name} needs a generator. Add a `generator:` section "
            f"with a name, one of {known}, for example `generator: {{name: var, depth: 16}}`."
        )
    return config.generator


def require_generator_recipe(config: Config) -> GeneratorRecipeChoice:
    """The recipe section of a run that trains a generator.

    Raises:
        ConfigError: the run trains something else.
    """
    if not isinstance(config.recipe, GeneratorRecipeChoice):
        raise ConfigError(
            f"Run {config.run.name} trains a {config.recipe.trains} (recipe {config.recipe.name!r}), which draws no "
            f"images. Give the configuration of a generator."
        )
    return config.recipe


def build_generator(
    config: Config,
    topology: Topology | None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **options: Any,
) -> nn.Module:
    """The part of the generator that this rank holds: a stage, or its list of chunks under virtual pipelining.

    Args:
        topology: None builds the whole model on this rank.
        dtype: None takes the one of ``train.precision``.
        options: handed to the generator: ``taps``, ``heads``.
    """
    generator = require_generator(config)
    parallel = topology.config if topology is not None else ParallelConfig()
    space, depth = config.tokenizer.space, generator.limits(config.tokenizer.space).depth
    chunks = []
    with device or torch.device("cpu"):
        for chunk in range(parallel.virtual_pipeline):
            chunks.append(
                resolve(generator)(
                    generator,
                    space,
                    parallel=parallel,
                    stage=Stage.split(depth, parallel, topology.pipeline_rank if topology is not None else 0, chunk),
                    dtype=dtype or PARAMETER_TYPES[config.train.precision],
                    seed=config.train.seed,
                    **options,
                )
            )
    return chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)


def code_vectors(tokenizer: Tokenizer, device: torch.device) -> Tensor:
    """The vectors of all tokens of a tokenizer on ``device``, float32 [V, D].

    Raises:
        ConfigError: its tokens are vectors without a codebook.
    """
    vocabulary = tokenizer.space.vocabulary
    if vocabulary is None or not isinstance(tokenizer, Codebook):
        raise ConfigError(
            f"The generator is tied to the tokenizer's codebook (generator.tied_codebook), but the tokens of this "
            f"tokenizer ({tokenizer.space.kind}) are vectors without one. Remove the key, or choose a tokenizer with a "
            f"codebook."
        )
    return tokenizer.embed(torch.arange(vocabulary, device=device)).detach().float()


def build_sampler(
    config: Config, generator: nn.Module, tokenizer: Tokenizer, conditions: Conditions, device: torch.device
) -> Sampler:
    """What draws the samples of ``config`` from a whole ``generator`` on ``device``."""
    experts = require_generator(config).limits(config.tokenizer.space).experts
    if experts is not None:
        experts.check_decoding()
    procedure = resolve(config.sampling)(config.sampling)
    return Sampler(generator, tokenizer, procedure, conditions, config.sampling, device, build_text(config.data))


def check_consistency(config: Config, source: Source) -> None:
    """Compare sections with each other and with the data, before anything is built.

    Raises:
        ConfigError: the first contradiction, with both places.
    """
    space = config.tokenizer.space
    if config.recipe.trains != "teacher" and config.data.image_size != space.image_side:
        raise ConfigError(
            f"data.image_size={config.data.image_size}, but the tokenizer {config.tokenizer.name!r} with sides "
            f"{list(space.sides)} is made for images of {space.image_side} pixels. Change data.image_size, or the "
            f"sizes in the section tokenizer."
        )
    if config.recipe.trains == "generator":
        generator = require_generator(config)
        experts = generator.limits(space).experts
        if experts is not None:
            experts.check(config.parallel)
            check_installed(experts.backend)
        if generator.class_count not in (None, source.num_classes):
            raise ConfigError(
                f"generator.classes={generator.class_count}, but the data source {config.data.source.name!r} has "
                f"{source.num_classes} classes. Set generator.classes={source.num_classes}."
            )


def weight_layouts(choice: Choice, space: TokenSpace | None = None) -> dict[str, WeightLayout]:
    """The public weight layouts of the model that ``choice`` configures, by name.

    Args:
        space: of the tokens that it makes or predicts; a teacher has none.
    """
    layouts = {}
    for name, place in type(choice).weight_layouts.items():
        module, _, attribute = place.partition(":")
        layouts[name] = getattr(importlib.import_module(module), attribute)(choice, space)
    return layouts


def write_into_folder(choice: Choice, tensors: Mapping[str, Tensor], origin: Path, folder: Path) -> None:
    """Copy the Hugging Face folder ``origin`` to ``folder``, with trained weights in the place of those it has.

    Args:
        tensors: logical tensors of the model that ``choice`` configures.

    Raises:
        ConfigError: such a model is no part of those in folders.
        CheckpointError: ``origin`` is not the one that it began with, or ``folder`` exists.
    """
    if not choice.folder_part:
        raise ConfigError(
            f"{choice.discriminator}={choice.tag()!r} is no part of a model in a Hugging Face folder: only a language "
            f"model or a vision encoder that came from one goes back."
        )
    module, _, name = choice.folder_part.partition(":")
    part: FolderPart = getattr(importlib.import_module(module), name)(choice, tensors, origin)
    write_folder(origin, folder, part.tensors, part.depth)


def trained_choice(config: Config) -> Choice:
    """The section of the recipe's first module: the model that the run is for."""
    own = config.recipe.trained_choice()
    if own is not None:
        return own
    return require_generator(config) if config.recipe.trains == "generator" else config.tokenizer


def build_trained(config: Config, device: torch.device) -> nn.Module:
    """The whole model that the run is for, float32, on one device (``meta`` for its shapes)."""
    if config.recipe.trains == "generator":
        return build_generator(config, None, dtype=torch.float32, device=device)
    choice = trained_choice(config)
    with device:
        return resolve(choice)(choice)


@dataclass(frozen=True)
class Assembly:
    """The parts of a run in training; the recipe takes from here what it needs (``megavar.recipes.base.Parts``)."""

    config: Config
    source: Source
    """Of the training data."""
    device: torch.device
    topology: Topology

    def recipe(self) -> Recipe:
        """The recipe with freshly initialized modules.

        Raises:
            ConfigError: sections contradict each other or the data.
        """
        check_consistency(self.config, self.source)
        section = self.config.recipe
        recipe: Recipe = resolve(section).build(self)
        assert tuple(recipe.modules()) == section.modules, f"{type(section).__name__}.modules lists {section.modules}"
        return recipe

    @property
    def steps(self) -> int:
        """Length of the run."""
        return self.config.train.total_steps(len(self.source))

    def tokenizer(self) -> Any:
        """The frozen tokenizer whose tokens the run's generator learns.

        Raises:
            ConfigError: the training data are tokens of another tokenizer.
            CheckpointError: the weights are missing, damaged, or of another tokenizer.
        """
        return self._tokenizer

    @functools.cached_property
    def _tokenizer(self) -> Any:
        weights = require_generator_recipe(self.config).tokenizer_weights
        tokenizer = load_tokenizer(self.config.tokenizer, weights, self.device, together=True)
        if isinstance(self.source, CachedSamples | TokenFile):
            self.source.check_tokenizer(tokenizer)
        return tokenizer

    def teacher(self, choice: TeacherChoice) -> Any:
        """A frozen network of a term; see :func:`load_teacher`. Not on ``device`` where its features are cached.

        Raises:
            ConfigError: the cached features are another network's.
        """
        if not isinstance(self.source, CachedSamples) or self.source.features is None:
            return load_teacher(choice, self.device)
        teacher = load_teacher(choice, torch.device("cpu"))
        self.source.check_teacher(teacher_sha256(choice, teacher))
        return teacher

    def frozen_tokenizer(self, choice: TokenizerChoice, weights: str, key: str) -> Any:
        """Another frozen tokenizer; see :func:`load_tokenizer`."""
        return load_tokenizer(choice, weights, self.device, together=True, key=key)

    def fresh_tokenizer(self) -> Any:
        """The tokenizer that the run trains, not initialized and on the CPU."""
        return resolve(self.config.tokenizer)(self.config.tokenizer)

    def generator(self, **options: Any) -> nn.Module:
        """This rank's part of the generator, initialized, compiled if asked for; see :func:`build_generator`."""
        section = require_generator(self.config)
        experts = section.limits(self.config.tokenizer.space).experts is not None
        zero, dtype = load_deepspeed_json(Path(self.config.deepspeed)), PARAMETER_TYPES[self.config.train.precision]
        shard = sharding(zero, dtype, self.topology, experts)
        options |= {} if shard is None else {"shard": shard}
        options |= {"codebook": code_vectors(self._tokenizer, self.device)} if section.reads_codebook else {}
        model = build_generator(self.config, self.topology, device=self.device, **options)
        if self.config.train.compile == "blocks":
            compile_blocks(model, self.config.train.compile_backend, self.device)
        return model

    def text(self) -> TextEncoder:
        """What makes token ids of captions.

        Raises:
            ConfigError: ``data.text`` is not set.
        """
        encoder = build_text(self.config.data)
        if encoder is None:
            raise ConfigError(
                f"The recipe {self.config.recipe.name!r} reads captions, but data.text is not set. Add a section "
                f"`text:` to data, with the tokenizer of the language model."
            )
        return encoder

    def terms(self) -> list[Any]:
        """The losses that the recipe section adds to the recipe's own: :class:`megavar.recipes.terms.base.Term`."""
        return [resolve(term).build(term, self) for term in require_generator_recipe(self.config).terms]
