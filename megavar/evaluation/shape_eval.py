"""ShapeEval: GenEval's six tasks, rules and result format on rendered shapes, with an exact detector.

Two scores. The lenient one is GenEval's rule (at least the objects asked for), comparable in meaning. The strict one
also demands that nothing else is there: a mosaic of everything scores on the lenient rule and nothing on the strict. A
model is limited by its tokenizer, so its score is read beside the tokenizer's ceiling: that of reconstructed scenes.

Source of the lenient rule and of the columns: djghosh13/geneval, ``evaluation/{evaluate_images,summary_scores}.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megavar.data.shapes_grammar import TAGS, Prompt, vocabulary
from megavar.data.shapes_renderer import Box, Draws, lay_out, relations, render
from megavar.errors import DataError
from megavar.evaluation.shape_detector import Detection, detect
from megavar.evaluation.table import Metric
from megavar.storage import write_text_atomic

METRICS = (
    Metric("strict", better="higher"),
    Metric("lenient", better="higher"),
    *(Metric(f"strict/{tag}", better="higher") for tag in TAGS),
    *(Metric(f"lenient/{tag}", better="higher") for tag in TAGS),
)


def score_scenes(
    images: Tensor, prompts: Sequence[Prompt], *, filenames: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Judge uint8 ``images`` [N, 3, H, W] against one prompt each.

    Returns one record per image with GenEval's columns (``filename, tag, prompt, correct, reason, metadata, details``),
    which its summary script reads, and ``strict_correct``.
    """
    if (
        images.dtype != torch.uint8
        or images.dim() != 4
        or images.shape[2] != images.shape[3]
        or len(images) == 0
        or (images.shape[-1] not in (32, 64))
    ):
        raise DataError(
            f"ShapeEval judges uint8 images [N, 3, S, S] of 32 or 64 pixels, got {images.dtype} "
            f"{list(images.shape)}: sample at the size of the shapes source"
        )
    if len(images) != len(prompts):
        raise DataError(f"{len(images)} images for {len(prompts)} prompts: give every image its prompt")
    names = filenames or [f"{index:05d}.png" for index in range(len(images))]
    records = []
    found = detect(images.permute(0, 2, 3, 1).contiguous().numpy())
    for name, prompt, detections in zip(names, prompts, found):
        correct, reason = judge(detections, prompt)
        strict = correct and len(detections) == prompt.count
        if correct and not strict:
            reason = f"strict: expected {prompt.count} objects in all, found {len(detections)}"
        details: dict[str, list[list[float]]] = {}
        for detection in detections:
            details.setdefault(detection.shape, []).append([*detection.box, detection.score])
        records.append(
            {
                "filename": name,
                "tag": prompt.tag,
                "prompt": prompt.text,
                "correct": correct,
                "reason": reason,
                "metadata": json.dumps(prompt.metadata()),
                "details": json.dumps(details),
                "strict_correct": strict,
            }
        )
    return records


def judge(detections: Sequence[Detection], prompt: Prompt) -> tuple[bool, str]:
    """GenEval's rule: every clause of ``prompt`` holds for the most certain objects of its shape; and why not."""
    reasons = []
    groups: list[list[Detection] | None] = []
    for wanted in prompt.include:
        found = [detection for detection in detections if detection.shape == wanted.shape][: wanted.count]
        reason = ""
        if len(found) < wanted.count:
            reason = f"expected {wanted.shape}>={wanted.count}, found {len(found)}"
        elif wanted.color is not None and (right := sum(d.color == wanted.color for d in found)) < wanted.count:
            reason = f"expected {wanted.color} {wanted.shape}>={wanted.count}, found {right} {wanted.color}; and " + (
                ", ".join(f"1 {detection.color}" for detection in found if detection.color != wanted.color)
            )
        elif wanted.position is not None:
            reason = _misplaced([d.box for d in found], groups[0], wanted.shape, wanted.position)
        groups.append(None if reason else found)
        reasons += [reason] if reason else []
    if prompt.tag == "counting":
        wanted = prompt.include[0]
        present = sum(detection.shape == wanted.shape for detection in detections)
        if present > wanted.count:
            reasons.append(f"expected {wanted.shape}<{wanted.count + 1}, found {present}")
    return not reasons, "\n".join(reasons)


def _misplaced(boxes: list[Box], targets: list[Detection] | None, shape: str, position: str) -> str:
    if targets is None:
        return f"no target for {shape} to be {position}"
    for box in boxes:
        for target in targets:
            seen = relations(box, target.box)
            if position not in seen:
                return f"expected {shape} {position} target, found {' and '.join(sorted(seen))} target"
    return ""


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Scores of judged images.

    ``lenient`` and ``strict`` are unweighted means of the tasks' accuracies over images, as GenEval's overall score;
    ``lenient/<tag>``, ``strict/<tag>`` the accuracies; ``<rule>/images`` and ``<rule>/prompts`` the shares of right
    images, and of prompts with at least one right image (prompts are told apart by their metadata).
    """
    scores: dict[str, float] = {}
    for rule, column in (("lenient", "correct"), ("strict", "strict_correct")):
        by_tag: dict[str, list[bool]] = {}
        by_prompt: dict[str, bool] = {}
        for record in records:
            by_tag.setdefault(record["tag"], []).append(record[column])
            by_prompt[record["metadata"]] = by_prompt.get(record["metadata"], False) or record[column]
        tasks = {tag: float(np.mean(values)) for tag, values in by_tag.items()}
        scores[rule] = float(np.mean(list(tasks.values())))
        scores |= {f"{rule}/{tag}": tasks[tag] for tag in TAGS if tag in tasks}
        scores[f"{rule}/images"] = float(np.mean([record[column] for record in records]))
        scores[f"{rule}/prompts"] = float(np.mean(list(by_prompt.values())))
    return scores


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write judged images as JSON lines, the file that GenEval's ``summary_scores.py`` takes."""
    write_text_atomic(path, "".join(json.dumps(record) + "\n" for record in records))


def true_scenes(prompts: Sequence[Prompt], image_size: int, *, seed: int = 0) -> Tensor:
    """Render a right image for each prompt: uint8 [N, 3, S, S]; image i is a function of (seed, i, prompt)."""
    words = vocabulary(image_size)
    scenes = [
        lay_out(prompt, words, image_size, Draws(seed, "shapes/true_scenes", index), held_out=True)
        for index, prompt in enumerate(prompts)
    ]
    images = np.stack([render(scene, image_size) for scene in scenes])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def tokenizer_ceiling(
    reconstruct: Callable[[Tensor], Tensor],
    prompts: Sequence[Prompt],
    image_size: int,
    *,
    batch: int = 64,
    seed: int = 0,
) -> dict[str, float]:
    """Scores of right scenes after ``reconstruct`` (uint8 [B, 3, S, S] to the same): the most a model can reach."""
    scenes = true_scenes(prompts, image_size, seed=seed)
    return summarize(score_scenes(torch.cat([reconstruct(part) for part in scenes.split(batch)]), prompts))
