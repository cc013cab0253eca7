"""The configuration of a run: one YAML file, decoded into this."""

import difflib

from pydantic import Field, model_validator

from megavar.config.base import PathText, Section
from megavar.config.data import DataConfig
from megavar.config.evaluation import EvaluationConfig
from megavar.config.generators.base import GeneratorChoice, Limits
from megavar.config.logging import LoggingConfig
from megavar.config.optimizer import OptimizerConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.procedures.base import SamplingChoice
from megavar.config.procedures.next_scale import NextScaleSampling
from megavar.config.recipes.base import RecipeChoice
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.config.train import TrainConfig
from megavar.config.validation import ValidationConfig

TEXT_TOKENIZER = "text_tokenizer"
"""Name of the text tokenizer among what a run uses and does not train."""


class RunConfig(Section):
    """The run's name and place."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Used in logs, job names and W&B: letters, digits, ``.``, ``_`` and ``-``."""
    directory: PathText | None = None
    """Where everything the run writes goes. Default: ``runs/<name>``."""
    requires: tuple[PathText, ...] = ()
    """Configurations of runs that must be finished first, such as the tokenizer's. ``train`` trains them if they are
    not."""

    @property
    def path(self) -> str:
        """The run directory."""
        return self.directory if self.directory is not None else f"runs/{self.name}"


class Config(Section):
    """Everything that decides a run."""

    run: RunConfig
    """Name and place."""
    recipe: RecipeChoice
    """The algorithm."""
    tokenizer: TokenizerChoice
    """The image tokenizer."""
    generator: GeneratorChoice | None = None
    """The generator; none while a tokenizer is trained."""
    data: DataConfig = DataConfig()
    """Where images come from."""
    train: TrainConfig
    """Length, batch, precision, checkpoints."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedules."""
    parallel: ParallelConfig = ParallelConfig()
    """How the model is spread over devices."""
    deepspeed: PathText = "configs/deepspeed/zero1.json"
    """DeepSpeed's own JSON: the ZeRO stage, offloading, communication sizes."""
    logging: LoggingConfig = LoggingConfig()
    """What a run reports."""
    validation: ValidationConfig | None = None
    """Loss on held-out samples while the run goes on; none by default."""
    sampling: SamplingChoice = NextScaleSampling()
    """How images are drawn."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How images are scored."""
    plugins: tuple[str, ...] = ()
    """Importable modules with a user's own generators, tokenizers, recipes, routers, terms, procedures or suites. They
    are imported before the rest of the file is decoded, so that their alternatives exist."""

    @property
    def limits(self) -> Limits | None:
        """What restricts the layouts of the generator; None while a tokenizer is trained."""
        return None if self.generator is None else self.generator.limits(self.tokenizer.space)

    @property
    def frozen_weights(self) -> dict[str, str]:
        """Paths of what is used and not trained, by what it is: the recipe's networks, and the text tokenizer."""
        text = None if self.data.text is None else self.data.text.tokenizer
        return self.recipe.frozen_weights() | ({} if text is None else {TEXT_TOKENIZER: text})

    @model_validator(mode="after")
    def _warm_up_ends(self) -> "Config":
        """As far as the file says; where epochs and steps are mixed, the trainer compares them."""
        schedule, train = self.optimizer.schedule, self.train
        for unit, length in (("steps", train.steps), ("epochs", train.epochs)):
            warmup = getattr(schedule, f"warmup_{unit}")
            if warmup is not None and length is not None and warmup > length:
                raise ValueError(
                    f"optimizer.schedule.warmup_{unit}={warmup} is longer than the run of train.{unit}={length}: the "
                    f"peak learning rate would never be reached. Shorten the warm-up or lengthen the run"
                )
        return self

    @model_validator(mode="after")
    def _validation_fits(self) -> "Config":
        if self.validation is not None and self.recipe.trains != "generator":
            raise ValueError(
                f"validation is of generators, and the recipe {self.recipe.name!r} trains a {self.recipe.trains}: "
                f"remove it (a tokenizer's reconstructions are scored by evaluation.reconstruction)"
            )
        return self

    @model_validator(mode="after")
    def _recipe_and_generator_fit(self) -> "Config":
        self.recipe.check(self.generator)
        return self

    @model_validator(mode="after")
    def _modules_exist(self) -> "Config":
        """Values for a module that nobody trains would be used by none."""
        ema = self.train.ema.modules if self.train.ema is not None else None
        trained = self.recipe.modules
        for key, names in (("optimizer.modules", self.optimizer.modules), ("train.ema.modules", ema or ())):
            for name in names:
                if name not in trained:
                    near = difflib.get_close_matches(name, trained, 1)
                    hint = f". Did you mean {near[0]!r}?" if near else ""
                    raise ValueError(
                        f"{key} names {name!r}, but the recipe {self.recipe.name!r} trains "
                        f"{' and '.join(map(repr, trained))}{hint}"
                    )
        return self
