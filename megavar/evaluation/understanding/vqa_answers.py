"""The form in which short answers are compared, as EvalAI's server does for VQA and TextVQA.

Source: facebookresearch/mmf ``EvalAIAnswerProcessor``, its slips included: whether a mark becomes a space is decided
for the whole answer, and a full stop goes unless a digit follows it. Compared with it on 40,000 random answers.
"""

import re

_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32
"""A slip of the original: the flag re.UNICODE, which is 32, stands where the number of replacements does."""
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've shouldn't should've shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
    "you'll you're you've"
)  # fmt: skip
_MENDED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split() for place, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # fmt: skip
"""Words that lack one apostrophe; the last is a slip of the original."""


def normalized(answer: str) -> str:
    """Lower case, without punctuation and articles, numbers as digits, contractions with their apostrophes."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    spread = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        spread = spread.replace(mark, "" if beside_space else " ")
    words = (_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", spread, count=_MOST_FULL_STOPS).split())
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)
