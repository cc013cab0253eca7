"""What several suites ask of the data and of images."""

from torch import Tensor

from megavar.config.data import DataConfig
from megavar.errors import ConfigError
from megavar.evaluation.images import ImageSet


def require_source(suite: str, data: DataConfig, wanted: str) -> None:
    """Refuse any source but ``wanted``.

    Raises:
        ConfigError: with suites that fit the source.
    """
    if data.source.name != wanted:
        raise ConfigError(
            f"evaluation.suite.name={suite} scores the source {wanted!r}, but data.source.name is "
            f"{data.source.name!r}. Use evaluation.suite.name=classifier (any source with classes) or adm (with "
            f"Inception weights)."
        )


def classes_of(suite: str, images: ImageSet) -> Tensor:
    """The classes int64 [N] that ``images`` were asked to show.

    Raises:
        ConfigError: they are unknown.
    """
    if images.labels is None:
        raise ConfigError(
            f"evaluation.suite.name={suite} needs the class of every image: score the chunks of megavar sample"
        )
    return images.labels
