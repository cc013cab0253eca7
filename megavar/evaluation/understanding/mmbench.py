"""MMBench (Liu et al. 2024), by circular evaluation.

A question with N options is asked N times, the options rotated by one each time, and is right only if all answers are.
In the published tables row ``k 10^6 + i`` is rotation k of question i.
"""

import string
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megavar.config.benchmarks.mmbench import MMBenchBenchmark
from megavar.errors import DataError
from megavar.evaluation.table import Metric
from megavar.evaluation.understanding import prompts
from megavar.evaluation.understanding.choices import chosen, options_of
from megavar.evaluation.understanding.questions import Benchmark, Question, mean
from megavar.evaluation.understanding.tables import Images, Row, read_table

_ROTATION = 10**6


class _Asked(NamedTuple):
    """A rotation of a question."""

    group: int
    options: dict[str, str]
    answer: str


class MMBench(Benchmark[MMBenchBenchmark]):
    """See the module."""

    longest = 100
    table = (Metric("mmbench", "higher"), Metric("mmbench/first", "higher"))

    def read(self, path: Path) -> Sequence[Question]:
        """All rotations."""
        rows = read_table(path, ("index", "image", "question", "answer", "A", "B"))
        images, self._asked, self._rows = Images(rows, path), list[_Asked](), dict[int, Row]()
        rotated = any(group_of(row) != int(row["index"]) for row in rows)
        questions = []
        for row in rows:
            group, options = group_of(row), options_of(row)
            if row["answer"] not in options:
                raise DataError(f"{path}: row {row['index']} has no answer among its options: name a table with "
                                f"answers (MMBench_DEV_EN.tsv; those of the test split are secret).")  # fmt: skip
            if group == int(row["index"]):
                self._rows[group] = row
            for given, answer in [(options, row["answer"])] if rotated else rotations(options, row["answer"]):
                self._asked.append(_Asked(group, given, answer))
                text = prompts.choice(self.prompts, row["question"], given, row.get("hint", ""))
                questions.append(Question(text, images.of(row), tuple(given)))
        return questions

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """Percent of questions that are right in all rotations, of all and by category and split; ``mmbench/first``
        without rotation.
        """
        right: dict[int, list[bool]] = defaultdict(list)
        for asked, answer in zip(self._asked, answers, strict=True):
            right[asked.group].append(chosen(answer, asked.options) == asked.answer)
        circular = {group: all(right[group]) for group in self._rows}
        metrics = {"mmbench": 100 * mean(list(circular.values())),
                   "mmbench/first": 100 * mean([right[group][0] for group in self._rows])}  # fmt: skip
        for column in ("l2-category", "category", "split"):
            for name in sorted({row[column] for row in self._rows.values() if row.get(column)}):
                hits = [circular[group] for group, row in self._rows.items() if row.get(column) == name]
                metrics[f"mmbench/{name}"] = 100 * mean(hits)
        return metrics


def group_of(row: Row) -> int:
    """The number of a row's question."""
    return int(row.get("g_index") or int(row["index"]) % _ROTATION)


def rotations(options: dict[str, str], answer: str) -> Iterator[tuple[dict[str, str], str]]:
    """Options and right letter, rotated by 0 to N - 1 places."""
    letters, texts = string.ascii_uppercase[: len(options)], list(options.values())
    place = list(options).index(answer)
    for turn in range(len(texts)):
        yield dict(zip(letters, texts[turn:] + texts[:turn])), letters[(place - turn) % len(texts)]
