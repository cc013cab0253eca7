"""Small benchmarks in their published layouts."""

import base64
import csv
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from megavar.evaluation.understanding.mme import PERCEPTION


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(seed: int) -> str:
    return base64.b64encode(picture(seed)).decode()


def table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def mme(path: Path) -> Path:
    """A pair of questions of each subtask of perception, three of counting; second questions refer to an image."""
    rows: list[dict[str, str]] = []
    for number, subtask in enumerate((*PERCEPTION, "count", "count")):
        for answer in ("Yes", "No"):
            image = encoded(number) if answer == "Yes" else str(len(rows) - 1)
            rows.append({"index": str(len(rows)), "image": image, "category": subtask, "answer": answer,
                         "question": f"Is it {number}? Please answer yes or no.",
                         "image_path": f"{subtask}/{number:02d}.png"})  # fmt: skip
    return table(path, rows)


def mme_folder(root: Path) -> Path:
    """The same as a released folder, half of whose subtasks keep images and texts apart."""
    for number, subtask in enumerate((*PERCEPTION, "count", "count")):
        images = texts = root / subtask
        if PERCEPTION.index(subtask) % 2:
            images, texts = root / subtask / "images", root / subtask / "questions_answers_YN"
        for folder in (images, texts):
            folder.mkdir(parents=True, exist_ok=True)
        (images / f"{number:02d}.jpg").write_bytes(picture(number))
        question = f"Is it {number}? Please answer yes or no."
        (texts / f"{number:02d}.txt").write_text(f"{question}\tYes\n{question}\tNo\n")
    return root


MMBENCH = (
    ({"A": "cat", "B": "dog", "C": "cow"}, "A", "logic_reasoning"),
    ({"A": "two", "B": "one"}, "B", "coarse_perception"),
    ({"A": "left", "B": "right"}, "A", "logic_reasoning"),
)


def mmbench(path: Path, rotated: bool) -> Path:
    """Three questions of 3, 2 and 2 options, with their rotations or without."""
    rows = []
    for number, (options, answer, kind) in enumerate(MMBENCH, 5):
        texts = list(options.values())
        for turn in range(len(texts) if rotated else 1):
            moved = dict(zip(options, texts[turn:] + texts[:turn]))
            right = next(letter for letter, text in moved.items() if text == options[answer])
            rows.append({"index": str(turn * 10**6 + number), "question": f"What is {number}?", "answer": right,
                         "hint": "Look." if number == 5 else "", **dict.fromkeys("ABCD", ""), **moved,
                         "image": str(number) if turn else encoded(number), "category": f"of {number}",
                         "l2-category": kind, "split": "dev"})  # fmt: skip
    return table(path, rows)


def ai2d(path: Path) -> Path:
    """Four questions; the right answers are A, B, A, D."""
    rows = [
        {"index": str(number), "question": f"Which part is {number}?", "answer": answer, "A": "leaf", "B": "root",
         "C": "stem", "D": "seed", "category": "parts", "image": encoded(number)}
        for number, answer in enumerate("ABAD")
    ]  # fmt: skip
    return table(path, rows)


def textvqa(root: Path) -> Path:
    """Two questions: all ten people say "stop", and four say "Yes." to the second."""
    (root / "train_images").mkdir(parents=True)
    people = [["stop"] * 10, ["Yes."] * 4 + ["no", "No", "a dog", "dogs", "two", "2"]]
    asked = []
    for number, answers in enumerate(people):
        (root / "train_images" / f"im{number}.jpg").write_bytes(picture(number))
        asked.append({"question": f"what does sign {number} say?", "image_id": f"im{number}", "question_id": number,
                      "answers": answers, "flickr_original_url": "", "set_name": "val"})  # fmt: skip
    path = root / "TextVQA_0.5.1_val.json"
    path.write_text(json.dumps({"dataset_type": "val", "dataset_name": "textvqa", "data": asked}))
    return path


def all_of(root: Path) -> list[dict[str, str]]:
    """The four benchmarks, as sections of a configuration."""
    return [
        {"name": "mme", "path": str(mme(root / "MME.tsv"))},
        {"name": "mmbench", "path": str(mmbench(root / "MMBench_DEV_EN.tsv", rotated=True))},
        {"name": "ai2d", "path": str(ai2d(root / "AI2D_TEST.tsv"))},
        {"name": "textvqa", "path": str(textvqa(root / "textvqa"))},
    ]
