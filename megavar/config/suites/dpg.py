"""The suite ``dpg``."""

from typing import ClassVar, Literal

from megavar.config.base import PathText
from megavar.config.suites.base import SuiteChoice


class DPGSuite(SuiteChoice):
    """Four images of every prompt of DPG-Bench as the 2x2 grids that its scorer reads."""

    implementation: ClassVar[str] = "megavar.evaluation.suites.dpg:DPG"

    name: Literal["dpg"] = "dpg"
    prompts: PathText
    """The official repository's folder ``dpg_bench/prompts``."""
