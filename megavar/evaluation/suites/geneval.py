"""The suite ``geneval``: images for GenEval's scorer."""

from pathlib import Path

from megavar.config.suites.geneval import GenEvalSuite
from megavar.evaluation.suites.official import OfficialSuite


class GenEval(OfficialSuite[GenEvalSuite]):
    """A folder per prompt (djghosh13/geneval ``evaluation/evaluate_images.py``)."""

    benchmark = "geneval"

    @property
    def prompt_file(self) -> Path:
        """``evaluation_metadata.jsonl``."""
        return Path(self.choice.prompts)

    @property
    def per_prompt(self) -> int:
        """As configured; 4 is usual."""
        return self.choice.per_prompt
