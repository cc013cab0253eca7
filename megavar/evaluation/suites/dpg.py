"""The suite ``dpg``: images for DPG-Bench's scorer."""

from pathlib import Path

from megavar.config.suites.dpg import DPGSuite
from megavar.evaluation.official.dpg import DPGFolder
from megavar.evaluation.suites.official import OfficialSuite


class DPG(OfficialSuite[DPGSuite]):
    """A grid of four images per prompt."""

    def folder(self) -> DPGFolder:
        """Always four images per prompt: the quarters of a grid."""
        return DPGFolder(Path(self.choice.prompts))
