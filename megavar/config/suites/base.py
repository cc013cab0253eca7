"""The kind of all suites: which images a generator is asked for, and how they are scored."""

from typing import ClassVar

from megavar.config.choice import Choice


class SuiteChoice(Choice):
    """A set of metrics; :class:`megavar.evaluation.base.Suite` is what it configures."""

    package: ClassVar[str] = "megavar.config.suites"

    name: str
    """Which set."""
