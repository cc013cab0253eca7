"""A paper's table as data: its rows as configurations, and what the paper printed for them.

One YAML per table under ``configs/tables/<paper>/``; ``python -m megavar reproduce FILE`` shows, submits, demonstrates
and collects it. A row is a configuration and overrides of it, as on the command line. Free of torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megavar.config.base import Section
from megavar.config.loading import decode, load_config, read_tree
from megavar.config.root import Config
from megavar.errors import ConfigError


class MetricConfig(Section):
    """A column."""

    heading: str = Field(min_length=1)
    """As the paper prints it, without an arrow."""
    key: str | None = None
    """Where our value comes from. A name in the run's scores (``fid``), ``log/NAME`` (mean of a logged value over the
    last fifth of the run), or ``KIND/NAME`` of an analysis (``expert_load/variance``). None: the paper's alone."""
    better: Literal["lower", "higher"] | None = None
    """Direction; None: neither."""
    digits: int | None = Field(None, ge=0)
    """Decimals that the paper prints; None: four significant digits."""


class RowConfig(Section):
    """A row: a run, or a result that the table only quotes."""

    name: str = Field(min_length=1, pattern=r"^[^=]+$")
    """As the paper calls it, unique in the table; no ``=``, which would make it an override on the command line."""
    config: str | None = None
    """Configuration of the run, relative to the repository or absolute. None: the row is quoted from elsewhere."""
    run: str | None = None
    """Name of the run. Rows of several tables that are the same run share it, so that it is trained once."""
    overrides: tuple[str, ...] = ()
    """``dotted.key=value``, after the table's own."""
    paper: dict[str, float] = Field({})
    """The paper's values by metric; what it does not print is left out."""
    paper_parameters: float | None = Field(None, gt=0)
    """Millions of parameters as the paper prints them, which are those activated by one token."""
    parameters_agree: bool = True
    """Whether our count agrees with them to the printed digit; where not, a note says why."""
    paper_says: dict[str, str] = Field({})
    """What else the paper states of the row (epochs, steps, hours), in its words."""
    paper_cost: str | None = None
    """What the paper states of the cost of training, in its words; shown beside our prediction."""
    notes: tuple[str, ...] = ()
    """What a reader must know of this row."""

    @model_validator(mode="after")
    def _runs_are_named(self) -> "RowConfig":
        if (self.config is None) != (self.run is None):
            raise ValueError(f"the row {self.name!r} needs both config and run, or neither where it is only quoted")
        if self.config is None and self.overrides:
            raise ValueError(f"the row {self.name!r} has overrides but no config")
        if not self.parameters_agree and not self.notes:
            raise ValueError(f"the row {self.name!r} does not agree with the paper's parameters: say why in notes")
        return self


class DemoConfig(Section):
    """The same rows at a size at which this machine trains them in minutes, on embedded data."""

    config: str
    """Base configuration of all demo runs."""
    overrides: tuple[str, ...] = ()
    """On top of it, for all rows."""
    rows: dict[str, tuple[str, ...]] = Field({})
    """Overrides that make a row of it, by the row's name. A name that is no row of the table is an additional control,
    which takes no part in the verdict."""
    begin_with: str | None = None
    """Name of the first row, if all others begin with its weights, of the same seed, and a fresh optimizer. A row that
    begins anew says ``train.initial_weights=null``."""
    begin_at: int | None = Field(None, ge=1)
    """Step of the checkpoint that they begin with (``train.checkpoint.keep_every``). None: the last one."""
    metrics: dict[str, MetricConfig] = Field({})
    """What is compared at this size, each with a verdict."""
    analyses: tuple[str, ...] = ()
    """Made of every run when it is trained, as words of ``megavar analyze`` without the run: ``KIND
    analysis.KEY=VALUE``. Metrics name what they find as ``KIND/NAME``."""
    expected: tuple[str, ...] = ()
    """The ordering to test, its best first. Default: the paper's, by the table's headline metric. Given where the rows
    here stand for others (teachers that cannot be loaded)."""
    seeds: int = Field(3, ge=1)
    """Runs of each row."""
    minutes: float = Field(30.0, gt=0)
    """Processor minutes that all runs were sized for."""
    size: str
    """What it is, beside what the paper trained."""
    notes: tuple[str, ...] = ()
    """What else a reader must know."""

    @model_validator(mode="after")
    def _is_measured(self) -> "DemoConfig":
        if not self.rows or not any(metric.key and metric.better for metric in self.metrics.values()):
            raise ValueError("a demo needs rows and a metric with a key and a direction")
        if unknown := [name for name in self.expected if name not in self.rows]:
            raise ValueError(f"expected names {unknown[0]!r}, which is not among the rows of the demo")
        if self.begin_with is not None and self.begin_with != next(iter(self.rows)):
            raise ValueError(f"begin_with names {self.begin_with!r}, which is not the first row of the demo")
        if self.begin_at is not None and self.begin_with is None:
            raise ValueError("begin_at is a step of the row that begin_with names: set begin_with, too")
        return self


class TableConfig(Section):
    """A table of a paper."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names it in the ledger, for example ``mepa-table4``."""
    source: str
    """Where it stands: paper and number."""
    title: str
    """What it compares."""
    protocol: str
    """How the paper measured, and how we do: samples, reference, guidance, what is left open."""
    metrics: dict[str, MetricConfig]
    """Columns by name; the first with a direction is the headline by which rows are ordered."""
    overrides: tuple[str, ...] = ()
    """On top of every row's configuration."""
    images: int | None = Field(None, ge=1)
    """Length of the training data, for costs where they cannot be opened."""
    baseline: str | None = None
    """The row that others are compared with, in FLOPs and improvements."""
    rows: tuple[RowConfig, ...]
    """From top to bottom."""
    conflicts: tuple[str, ...] = ()
    """Where the paper contradicts itself or its code, and what we do."""
    demo: DemoConfig | None = None
    """The table at a small size; None: there is no sense in it."""

    @model_validator(mode="after")
    def _names_exist(self) -> "TableConfig":
        names = [row.name for row in self.rows]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two rows are called {doubled[0]!r}")
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(f"baseline {self.baseline!r} is no row; rows: {', '.join(names)}")
        for row in self.rows:
            if unknown := sorted(row.paper.keys() - self.metrics.keys()):
                raise ValueError(f"the row {row.name!r} has a value of {unknown[0]!r}, which is not among metrics")
        return self

    @property
    def headline(self) -> str | None:
        """The metric that orders rows."""
        return next((name for name, metric in self.metrics.items() if metric.better is not None), None)

    @property
    def trained(self) -> tuple[RowConfig, ...]:
        """Rows that are runs."""
        return tuple(row for row in self.rows if row.config is not None)

    def row(self, name: str) -> RowConfig:
        """The row called ``name``, which must be a run.

        Raises:
            ConfigError: there is none, or it is only quoted.
        """
        names = ", ".join(row.name for row in self.trained)
        for row in self.rows:
            if row.name == name:
                if row.config is None:
                    raise ConfigError(f"The row {name!r} of {self.name} is quoted from elsewhere: nothing trains it. "
                                      f"Rows that are runs: {names}.")  # fmt: skip
                return row
        raise ConfigError(f"{self.name} has no row {name!r}. Rows that are runs: {names}.")

    def words(self, row: RowConfig, extra: Sequence[str] = ()) -> list[str]:
        """The command line's words for a row: its configuration, then all overrides in the order in which they count.

        Args:
            extra: the user's own, for example where the data lie.
        """
        assert row.config is not None
        return [row.config, f"run.name={row.run}", *self.overrides, *row.overrides, *extra]

    def config_of(self, row: RowConfig, extra: Sequence[str] = ()) -> Config:
        """The resolved configuration of a row that is a run.

        Raises:
            ConfigError: it is wrong; the message begins with table and row.
        """
        path, *overrides = self.words(row, extra)
        return _load(f"{self.name}, row {row.name!r}", path, overrides)

    def require_demo(self) -> DemoConfig:
        """The demo.

        Raises:
            ConfigError: there is none.
        """
        if self.demo is None:
            raise ConfigError(f"{self.name} has no demo: its file has no section `demo`.")
        return self.demo

    def demo_words(self, row: str, seed: int, extra: Sequence[str] = (), begin: Sequence[str] = ()) -> list[str]:
        """The command line's words for a row's demo with a seed, which decides initial weights, order of data, samples.

        Args:
            begin: what it begins with, unless the row itself says otherwise.

        Raises:
            ConfigError: there is no such demo.
        """
        demo = self.require_demo()
        if row not in demo.rows:
            raise ConfigError(f"{self.name} has no demo of the row {row!r}.")
        seeds = [f"train.seed={seed}", f"sampling.seed={seed}"]
        return [demo.config, *demo.overrides, *begin, *demo.rows[row], *seeds, *extra]

    def demo_config(self, row: str, seed: int, extra: Sequence[str] = (), begin: Sequence[str] = ()) -> Config:
        """The resolved configuration of a row's demo; arguments as of :meth:`demo_words`.

        Raises:
            ConfigError: it is wrong, or there is no such demo.
        """
        path, *overrides = self.demo_words(row, seed, extra, begin)
        return _load(f"{self.name}, demo of {row!r}", path, overrides)


def _load(where: str, path: str, overrides: Sequence[str]) -> Config:
    try:
        return load_config(path, overrides)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def load_table(path: Path | str) -> TableConfig:
    """Read a table; its rows are not resolved yet.

    Raises:
        ConfigError: the file is wrong.
    """
    return decode(read_tree(Path(path)), TableConfig, str(path))
