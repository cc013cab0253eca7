"""The suite ``geneval``: images for GenEval's scorer."""

from pathlib import Path

from megavar.config.suites.geneval import GenEvalSuite
from megavar.evaluation.official.geneval import GenEvalFolder
from megavar.evaluation.suites.official import OfficialSuite


class GenEval(OfficialSuite[GenEvalSuite]):
    """A folder per prompt."""

    def folder(self) -> GenEvalFolder:
        """As configured; four images per prompt are usual."""
        return GenEvalFolder(Path(self.choice.prompts), self.choice.per_prompt)
