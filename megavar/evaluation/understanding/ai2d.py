"""AI2D (Kembhavi et al. 2016): one choice about a diagram, percent right. VLMEvalKit's table."""

from collections.abc import Sequence
from pathlib import Path

from megavar.config.benchmarks.ai2d import AI2DBenchmark
from megavar.errors import DataError
from megavar.evaluation.table import Metric
from megavar.evaluation.understanding import prompts
from megavar.evaluation.understanding.choices import chosen, options_of
from megavar.evaluation.understanding.questions import Benchmark, Question, mean
from megavar.evaluation.understanding.tables import Images, read_table


class AI2D(Benchmark[AI2DBenchmark]):
    """See the module."""

    longest = 10
    table = (Metric("ai2d", "higher"),)

    def read(self, path: Path) -> Sequence[Question]:
        """A question for every row."""
        rows = read_table(path, ("index", "image", "question", "answer", "A", "B"))
        images, self._asked, questions = Images(rows, path), list[tuple[dict[str, str], str]](), []
        for row in rows:
            options = options_of(row)
            if row["answer"] not in options:
                raise DataError(f"{path}: row {row['index']} has no answer among its options: fetch AI2D_TEST.tsv.")
            self._asked.append((options, row["answer"]))
            text = prompts.choice(self.prompts, row["question"], options)
            questions.append(Question(text, images.of(row), tuple(options)))
        return questions

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """Percent."""
        right = [
            chosen(given, options) == answer for given, (options, answer) in zip(answers, self._asked, strict=True)
        ]
        return {"ai2d": 100 * mean(right)}
