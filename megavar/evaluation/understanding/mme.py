"""MME (Fu et al. 2023): two questions about every image, one whose answer is yes and one whose answer is no.

    accuracy  = share of right answers                accuracy+ = share of images with two right answers
    score of a subtask = 100 accuracy + 100 accuracy+, at most 200
    mme_p = sum over the ten subtasks of perception, mme_c = over the four of cognition

Source: the authors' ``eval_tool/calculation.py``, which takes an answer for yes or no by its first four letters.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megavar.config.benchmarks.mme import MMEBenchmark
from megavar.errors import DataError
from megavar.evaluation.table import Metric
from megavar.evaluation.understanding import prompts
from megavar.evaluation.understanding.questions import Benchmark, Question, mean
from megavar.evaluation.understanding.tables import Images, read_table

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_PREFIX = 4
_PICTURES = (".jpg", ".png", ".jpeg")


class _Asked(NamedTuple):
    """Where a question belongs."""

    subtask: str
    image: str
    answer: str
    """yes or no."""


class MME(Benchmark[MMEBenchmark]):
    """See the module."""

    longest = 20
    table = (Metric("mme_p", "higher"), Metric("mme_c", "higher"))

    def read(self, path: Path) -> Sequence[Question]:
        """Of the table, or of the released folder."""
        self._asked: list[_Asked] = []
        return list(self._of_folder(path) if path.is_dir() else self._of_table(path))

    def _of_table(self, path: Path) -> Iterator[Question]:
        rows = read_table(path, ("index", "image", "question", "answer", "category"))
        images = Images(rows, path)
        for row in rows:
            image = row.get("image_path") or images.key(row)
            yield self._question(row["category"], image, row["question"], row["answer"], images.of(row))

    def _of_folder(self, path: Path) -> Iterator[Question]:
        """Subtasks keep ``NAME.jpg`` and ``NAME.txt`` together, or in ``images`` and ``questions_answers_YN``."""
        for subtask in (folder for folder in sorted(path.iterdir()) if folder.name in (*PERCEPTION, *COGNITION)):
            texts = subtask / "questions_answers_YN"
            for file in sorted((texts if texts.is_dir() else subtask).glob("*.txt")):
                folder = subtask / "images" if texts.is_dir() else subtask
                image = next((p for end in _PICTURES if (p := folder / f"{file.stem}{end}").is_file()), None)
                if image is None:
                    raise DataError(f"{file} has no image {folder / file.stem}.jpg: fetch MME's release again.")
                for line in filter(None, map(str.strip, file.read_text(encoding="utf-8").splitlines())):
                    text, _, answer = line.partition("\t")
                    yield self._question(subtask.name, file.stem, text, answer, image.read_bytes)

    def _question(self, subtask: str, image: str, text: str, answer: str, read: Callable[[], bytes]) -> Question:
        if answer.strip().lower() not in ("yes", "no"):
            raise DataError(f"{self.choice.path}: the answer to {text!r} is {answer!r} instead of Yes or No.")
        self._asked.append(_Asked(subtask, image, answer.strip().lower()))
        return Question(prompts.yes_no(self.prompts, text), read, ("Yes", "No"))

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """Both sums, and of every subtask its score, accuracy and accuracy+. Sums only where all subtasks are there."""
        right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for asked, answer in zip(self._asked, answers, strict=True):
            right[asked.subtask][asked.image].append(yes_or_no(answer) == asked.answer)
        scores: dict[str, float] = {}
        metrics: dict[str, float] = {}
        for subtask, images in right.items():
            if unpaired := [image for image, pair in images.items() if len(pair) != 2]:
                raise DataError(f"{self.choice.path}: {subtask}/{unpaired[0]} has not two questions: fetch it again.")
            accuracy = mean([hit for pair in images.values() for hit in pair])
            both = mean([all(pair) for pair in images.values()])
            scores[subtask] = 100 * accuracy + 100 * both
            metrics |= {f"mme/{subtask}": scores[subtask], f"mme/{subtask}/accuracy": accuracy,
                        f"mme/{subtask}/accuracy+": both}  # fmt: skip
        for name, subtasks in (("mme_p", PERCEPTION), ("mme_c", COGNITION)):
            if all(subtask in scores for subtask in subtasks):
                metrics[name] = sum(scores[subtask] for subtask in subtasks)
        return metrics


def yes_or_no(answer: str) -> str | None:
    """What an answer says: ``yes``, ``no``, or neither."""
    beginning = answer.strip().lower()[:_PREFIX]
    return next((word for word in ("yes", "no") if word in beginning), None)
