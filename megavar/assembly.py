"""From a configuration to the objects it describes."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megavar import frozen
from megavar.conditions import Conditions
from megavar.config.choice import Choice
from megavar.config.generators.var import VARConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.recipes.mepa import MEPAConfig
from megavar.config.root import Config
from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.data.source import Source
from megavar.errors import CheckpointError, ConfigError
from megavar.generators.base import Stage
from megavar.generators.var import VAR
from megavar.parallel.topology import Topology
from megavar.recipes.base import Recipe
from megavar.recipes.next_scale import NextScale
from megavar.sampling.sampler import Sampler
from megavar.tokenizers.base import Tokenizer
from megavar.tokenizers.multiscale_vq import MultiScaleVQ
from megavar.training.checkpoint.initial import InitialWeights
from megavar.transformer.moe.backends import check_backend
from megavar.weight_file import read_weights_file
from megavar.weight_layout import Shape, WeightLayout

PARAMETER_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve(choice: Choice) -> Any:
    """The class that ``choice`` configures, which is imported now.

    Raises:
        ConfigError: its module cannot be imported or has no such class.
    """
    module, _, name = choice.implementation.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{choice.discriminator}={choice.tag()!r} is implemented by {choice.implementation!r}, which cannot be "
            f"imported ({error}). Correct `implementation` of {type(choice).__module__}.{type(choice).__name__}, or "
            f"install what the module imports."
        ) from error


def load_tokenizer(config: TokenizerChoice, weights: str, device: torch.device) -> MultiScaleVQ:
    """A trained tokenizer in float32, frozen.

    Args:
        weights: a megavar run or checkpoint of a tokenizer, an export, or a file in a public layout of the tokenizer.

    Raises:
        CheckpointError: the weights are missing, damaged, or of another tokenizer.
    """
    tokenizer = MultiScaleVQ(config)
    path = Path(weights)
    if not path.exists():
        raise CheckpointError(
            f"recipe.tokenizer_weights: {weights} does not exist. Train the tokenizer first (list its configuration "
            f"under run.requires to have it trained automatically), or give a file in a public layout."
        )
    frozen.load(tokenizer, path, weight_layouts(config, config.space), what="The file of tokenizer weights")
    return tokenizer.eval().requires_grad_(False).to(device)


def require_generator(config: Config) -> VARConfig:
    """The generator section.

    Raises:
        ConfigError: there is none.
    """
    if config.generator is None:
        raise ConfigError(
            f"The recipe {config.recipe.name!r} of run {config.run.name} needs a generator. Add a `generator:` "
            f"section, for example `generator: {{name: var, depth: 16}}`."
        )
    return config.generator


def build_generator(
    config: Config, topology: Topology | None, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> nn.Module:
    """The part of the generator that this rank holds: a stage, or its list of chunks under virtual pipelining.

    Args:
        topology: None builds the whole model on this rank.
        dtype: None takes the one of ``train.precision``.
    """
    generator = require_generator(config)
    parallel = topology.config if topology is not None else ParallelConfig()
    chunks = []
    with device or torch.device("cpu"):
        for chunk in range(parallel.virtual_pipeline):
            stage = Stage.split(generator.depth, parallel, topology.pipeline_rank if topology is not None else 0, chunk)
            chunks.append(
                VAR(
                    generator,
                    config.tokenizer.space,
                    parallel=parallel,
                    stage=stage,
                    dtype=dtype or PARAMETER_TYPES[config.train.precision],
                    seed=config.train.seed,
                )
            )
    return chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)


def build_sampler(
    config: Config, generator: nn.Module, tokenizer: Tokenizer, conditions: Conditions, device: torch.device
) -> Sampler:
    """What draws the samples of ``config`` from a whole ``generator`` on ``device``."""
    procedure = resolve(config.sampling)(config.sampling)
    return Sampler(generator, tokenizer, procedure, conditions, config.sampling, device)


def build_recipe(config: Config, topology: Topology, source: Source, device: torch.device) -> Recipe:
    """The recipe with freshly initialized modules on ``device``.

    Raises:
        ConfigError: sections contradict each other or the data.
    """
    check_consistency(config, source)
    if isinstance(config.recipe, MEPAConfig):
        tokenizer = load_tokenizer(config.tokenizer, config.recipe.tokenizer_weights, device)
        generator = build_generator(config, topology, device=device)
        choice = require_generator(config)
        return NextScale(
            config.recipe,
            generator,
            tokenizer,
            classes=choice.classes,
            label_drop=choice.label_drop,
            seed=config.train.seed,
        )
    from megavar.recipes.tokenizer import TokenizerTraining

    fresh = config.initial_weights is None
    return TokenizerTraining(config.recipe, config.tokenizer, config.train.seed, device, fresh)


def check_consistency(config: Config, source: Source) -> None:
    """Compare sections with each other and with the data, before anything is built.

    Raises:
        ConfigError: the first contradiction, with both places.
    """
    tokenizer = config.tokenizer
    if config.data.image_size != tokenizer.image_side:
        raise ConfigError(
            f"data.image_size={config.data.image_size}, but tokenizer.scales end with {tokenizer.scales[-1]} and "
            f"tokenizer.channel_multipliers downsample by {tokenizer.downsample}: images must be "
            f"{tokenizer.image_side} pixels. Change data.image_size or tokenizer.scales."
        )
    if config.recipe.name == "mepa":
        generator = require_generator(config)
        if generator.experts is not None:
            check_backend(generator.experts, config.parallel)
        if generator.classes != source.num_classes:
            raise ConfigError(
                f"generator.classes={generator.classes}, but the data source {config.data.source.name!r} has "
                f"{source.num_classes} classes. Set generator.classes={source.num_classes}."
            )


def weight_layouts(choice: Choice, space: TokenSpace) -> dict[str, WeightLayout]:
    """The public weight layouts of the model that ``choice`` configures, by name."""
    layouts = {}
    for name, place in type(choice).weight_layouts.items():
        module, _, attribute = place.partition(":")
        layouts[name] = getattr(importlib.import_module(module), attribute)(choice, space)
    return layouts


def trained_choice(config: Config) -> Choice:
    """The section of the recipe's first module: the model that the run is for."""
    return require_generator(config) if config.recipe.trains == "generator" else config.tokenizer


def build_trained(config: Config, device: torch.device) -> nn.Module:
    """The whole model that the run is for, float32, on one device (``meta`` for its shapes)."""
    if config.recipe.trains == "generator":
        return build_generator(config, None, dtype=torch.float32, device=device)
    with device:
        return resolve(config.tokenizer)(config.tokenizer)


def initial_weights(config: Config) -> InitialWeights | None:
    """The weights with which the run begins; None: random ones."""
    given = config.initial_weights
    if given is None:
        return None
    layouts = weight_layouts(trained_choice(config), config.tokenizer.space)

    def read(path: Path, expected: Mapping[str, Shape], fresh: tuple[str, ...]) -> dict[str, Tensor]:
        return read_weights_file(path, expected, layouts, given.layout, fresh, "The file of initial weights")

    return InitialWeights(Path(given.path), read, given.fresh, ema=given.weights == "ema")
