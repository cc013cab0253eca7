"""Questions with lettered options: how an answer is read. MMBench and AI2D share it.

Source: VLMEvalKit ``utils/matching_util.py``, exact matching (no other model is asked what an answer means). Compared
with that code on 60,000 random answers.
"""

import re
import string
from collections.abc import Mapping

from megavar.evaluation.understanding.tables import Row

NEITHER = "Z"
"""What an answer is read as that refuses to choose; it is no option."""
_REFUSALS = (
    "Sorry, I can't help with images of people yet.", "I can't process this file.",
    "I'm sorry, but without the image provided", "Cannot determine the answer",
)  # fmt: skip
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4
"""A letter counts if it is among so many last words."""
_SENTENCE = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)


def options_of(row: Row) -> dict[str, str]:
    """The options of a table's row by letter; empty cells are none."""
    return {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter)}


def chosen(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that ``answer`` chooses: by letter, or else by the text of one option; None: no one can tell."""
    return _by_letter(answer, options) or _by_text(answer, options)


def _by_letter(answer: str, options: Mapping[str, str]) -> str | None:
    if any(refusal in answer for refusal in _REFUSALS):
        return NEITHER
    words = answer.translate(_SEPARATORS).split()
    found = [letter for letter in options if letter in words]
    if len(found) == 1 and words.index(found[0]) >= len(words) - _LAST_WORDS:
        return found[0]
    if not found and NEITHER in words:
        return NEITHER
    sentence = _SENTENCE.search(answer)
    return sentence[1].upper() if sentence and sentence[1].upper() in options else None


def _by_text(answer: str, options: Mapping[str, str]) -> str | None:
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else None
