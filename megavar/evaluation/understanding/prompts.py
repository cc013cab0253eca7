"""The words around a question. They move scores by points, so they are a key of the configuration.

Sources: InternVL ``internvl_chat/eval`` (mme, mmbench, vqa); VLMEvalKit ``dataset/image_{mcq,vqa,yorn}.py`` and
``vlm/qwen2_vl/prompt.py``. Wordings for Chinese questions are left out.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Wording(NamedTuple):
    """Of one evaluation code."""

    yes_no: str
    choice: str
    """``{options}`` are lines ``A. text``."""
    hint: str
    """Before a choice that has one."""
    short: str


WORDINGS = {
    "internvl": Wording(
        yes_no="{question} Answer the question using a single word or phrase.",
        choice="{question}\n{options}\nAnswer with the option's letter from the given choices directly.",
        hint="{hint}\n",
        short="{question}\nAnswer the question using a single word or phrase.",
    ),
    "vlmevalkit": Wording(
        yes_no="{question}",
        choice="Question: {question}\nOptions:\n{options}\nPlease select the correct answer from the options above. \n",
        hint="Hint: {hint}\n",
        short="{question}\nAnswer the question using a single word or phrase.",
    ),
    "qwen2_vl": Wording(
        yes_no="{question}",
        choice="Question: {question}\nOptions:\n{options}\nPlease select the correct answer from the options above.",
        hint="Hint: {hint}\n",
        short="{question}\nPlease try to answer the question with short words or phrases if possible.",
    ),
}


def yes_no(style: str, question: str) -> str:
    """A question that is answered by yes or no."""
    return WORDINGS[style].yes_no.replace("{question}", question)


def choice(style: str, question: str, options: Mapping[str, str], hint: str = "") -> str:
    """A question with lettered options."""
    lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    before = WORDINGS[style].hint.replace("{hint}", hint) if hint else ""
    template = WORDINGS[style].choice
    return before + template.replace("{options}", lines).replace("{question}", question)


def short(style: str, question: str) -> str:
    """An open question."""
    return WORDINGS[style].short.replace("{question}", question)
