"""TextVQA (Singh et al. 2019): open questions, each with ten people's answers.

An answer is worth the mean over the ten of min(1, m / 3), m being how many of the nine others gave it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from megavar.config.benchmarks.textvqa import TextVQABenchmark
from megavar.errors import DataError
from megavar.evaluation.table import Metric
from megavar.evaluation.understanding import prompts
from megavar.evaluation.understanding.questions import Benchmark, Question, mean
from megavar.evaluation.understanding.vqa_answers import normalized

IMAGES = "train_images"
"""Those of the validation split, too."""
_ENOUGH = 3


class TextVQA(Benchmark[TextVQABenchmark]):
    """See the module."""

    longest = 10
    table = (Metric("textvqa", "higher"),)

    def read(self, path: Path) -> Sequence[Question]:
        """The published JSON: ``data`` is a list of questions."""
        try:
            asked = json.loads(path.read_text(encoding="utf-8"))["data"]
            self._answers = [[normalized(answer) for answer in one["answers"]] for one in asked]
            files = [path.parent / IMAGES / f"{one['image_id']}.jpg" for one in asked]
            texts = [prompts.short(self.prompts, one["question"]) for one in asked]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no TextVQA file with answers ({type(error).__name__}: {error}): name "
                            f"TextVQA_0.5.1_val.json.") from error  # fmt: skip
        if missing := [file for file in files if not file.is_file()]:
            raise DataError(f"{len(missing)} images of {path} are missing, the first is {missing[0]}: unpack "
                            f"train_val_images.zip beside it.")  # fmt: skip
        return [Question(text, file.read_bytes) for text, file in zip(texts, files)]

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """Percent."""
        return {
            "textvqa": 100 * mean([worth(given, known) for given, known in zip(answers, self._answers, strict=True)])
        }


def worth(answer: str, known: Sequence[str]) -> float:
    """What ``answer`` is worth beside the normalized answers of people."""
    given = normalized(answer)
    agree = [other == given for other in known]
    return mean([min(1.0, (sum(agree) - same) / _ENOUGH) for same in agree])
