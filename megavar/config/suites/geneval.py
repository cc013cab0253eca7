"""The suite ``geneval``."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.base import PathText
from megavar.config.suites.base import SuiteChoice


class GenEvalSuite(SuiteChoice):
    """Images of GenEval's prompts in the folders that its scorer reads, which runs in an environment of its own."""

    implementation: ClassVar[str] = "megavar.evaluation.suites.geneval:GenEval"

    name: Literal["geneval"] = "geneval"
    prompts: PathText
    """The official repository's ``prompts/evaluation_metadata.jsonl``."""
    per_prompt: int = Field(4, ge=1)
    """Images per prompt."""
