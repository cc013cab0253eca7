"""The configuration of a run: one YAML file, decoded into this."""

from pydantic import Field

from megavar.config.base import Section
from megavar.config.data import DataConfig
from megavar.config.evaluation import EvaluationConfig
from megavar.config.generator import GeneratorConfig
from megavar.config.logging import LoggingConfig
from megavar.config.optimizer import OptimizerConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.recipe import RecipeConfig
from megavar.config.sampling import SamplingConfig
from megavar.config.tokenizer import TokenizerConfig
from megavar.config.train import TrainConfig


class RunConfig(Section):
    """The run's name and place."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Used in logs, job names and W&B: letters, digits, ``.``, ``_`` and ``-``."""
    directory: str | None = None
    """Where everything the run writes goes. Default: ``runs/<name>``."""
    requires: tuple[str, ...] = ()
    """Configurations of runs that must be finished first, such as the tokenizer's. ``train`` trains them if they are
    not. Paths are relative to the repository or absolute."""

    @property
    def path(self) -> str:
        """The run directory."""
        return self.directory if self.directory is not None else f"runs/{self.name}"


class Config(Section):
    """Everything that decides a run."""

    run: RunConfig
    """Name and place."""
    recipe: RecipeConfig
    """The algorithm."""
    tokenizer: TokenizerConfig
    """The image tokenizer."""
    generator: GeneratorConfig | None = None
    """The generator; none while a tokenizer is trained."""
    data: DataConfig = DataConfig()
    """Where images come from."""
    train: TrainConfig
    """Length, batch, precision, checkpoints."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedules."""
    parallel: ParallelConfig = ParallelConfig()
    """How the model is spread over devices."""
    deepspeed: str = "configs/deepspeed/zero1.json"
    """DeepSpeed's own JSON: the ZeRO stage, offloading, communication sizes."""
    logging: LoggingConfig = LoggingConfig()
    """What a run reports."""
    sampling: SamplingConfig = SamplingConfig()
    """How images are drawn."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How images are scored."""
