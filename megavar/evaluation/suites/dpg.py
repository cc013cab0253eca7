"""The suite ``dpg``: images for DPG-Bench's scorer."""

from pathlib import Path

from megavar.config.suites.dpg import DPGSuite
from megavar.evaluation import layouts
from megavar.evaluation.suites.official import OfficialSuite


class DPG(OfficialSuite[DPGSuite]):
    """A grid of four images per prompt (TencentQQGYLab/ELLA ``dpg_bench/compute_dpg_bench.py``)."""

    benchmark = "dpg"

    @property
    def prompt_file(self) -> Path:
        """The folder of texts."""
        return Path(self.choice.prompts)

    @property
    def per_prompt(self) -> int:
        """Always four: the quarters of a grid."""
        return layouts.PER_PROMPT
