"""Vision-language models in local folders, by transformers' own classes, which are imported when a model is loaded."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megavar.errors import CheckpointError, ConfigError, missing_package
from megavar.evaluation.understanding.questions import Question

_TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Answerer(Protocol):
    """Who answers questions about images, one at a time."""

    def write(self, question: Question, longest: int) -> str:
        """An answer of at most ``longest`` tokens, without the blanks around it."""
        ...

    def choose(self, question: Question) -> str:
        """One of ``question.options``."""
        ...


class VisionLanguageModel:
    """See :class:`Answerer`. One question at a time, as published evaluations do: no answer depends on another one."""

    def __init__(self, folder: Path, device: torch.device, precision: str = "bf16", tiles: int | None = None) -> None:
        """Load ``folder``.

        Args:
            tiles: of an image at most (InternVL); None: as the folder says.

        Raises:
            ConfigError: transformers is not installed, or the model does not cut images into tiles.
            CheckpointError: it is no such folder, or lacks weights.
        """
        try:
            from transformers import AutoModelForImageTextToText, AutoProcessor
        except ImportError as error:
            raise missing_package("transformers", "evaluation.understanding") from error
        check_folder(folder)
        self.device, self.dtype = device, _TYPES[precision]
        try:
            self.processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=self.dtype, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CheckpointError(
                f"{folder} is no vision-language model with its processor that transformers can load "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__}): fetch the whole folder."
            ) from error
        model, found = loaded
        if absent := sorted(found["missing_keys"]):
            raise CheckpointError(f"{folder} lacks {len(absent)} tensors, the first is {absent[0]}: fetch it again.")
        self.model: Any = model.eval().requires_grad_(False).to(device)
        self.processor.tokenizer.padding_side = "left"
        self.how = self._tiling(tiles)

    def _tiling(self, tiles: int | None) -> dict[str, Any]:
        if tiles is None:
            return {}
        if not hasattr(self.processor.image_processor, "max_patches"):
            raise ConfigError("evaluation.understanding.tiles is set, but this model does not cut images into tiles.")
        return {"max_patches": tiles, "crop_to_patches": tiles > 1}

    def _inputs(self, question: Question, endings: Sequence[str] = ("",)) -> Any:
        """What the model reads: image, question and the beginning of its answer, followed by each of ``endings``."""
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        asked = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        texts = [asked + ending for ending in endings]
        images = [[question.picture()] for _ in endings]
        inputs = self.processor(text=texts, images=images, padding=True, return_tensors="pt", **self.how)
        return inputs.to(self.device, self.dtype)

    @torch.no_grad()
    def write(self, question: Question, longest: int) -> str:
        """Greedily. Penalties that a folder's generation settings ask for are off, as in published evaluations."""
        inputs = self._inputs(question)
        ends = {self.processor.tokenizer.eos_token_id, *_listed(self.model.generation_config.eos_token_id)} - {None}
        written = self.model.generate(
            **inputs, max_new_tokens=longest, do_sample=False, num_beams=1, repetition_penalty=1.0, temperature=None,
            top_p=None, top_k=None, eos_token_id=sorted(ends), pad_token_id=self.processor.tokenizer.pad_token_id,
        )  # fmt: skip
        new = written[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()

    def choose(self, question: Question) -> str:
        """The likeliest."""
        return question.options[int(self.likelihoods(question).argmax())]

    @torch.no_grad()
    def likelihoods(self, question: Question) -> Tensor:
        """Logarithm of the probability of each option as the beginning of the answer, float32 [options] on the CPU."""
        before = self._inputs(question)["input_ids"].shape[1]
        inputs = self._inputs(question, question.options)
        ids, lengths = inputs["input_ids"][:, before:], inputs["attention_mask"].sum(1)  # padding is on the left
        kept = ids.shape[1] + 1  # of the whole prompt they would take gigabytes
        logits = self.model(**inputs, logits_to_keep=kept).logits[:, -kept:-1]
        surprise = logits.float().log_softmax(-1).gather(2, ids[..., None])[..., 0]
        longest = int(lengths.max())
        return torch.stack([row[longest - int(n) :].sum() for row, n in zip(surprise, lengths)]).cpu()


def check_folder(folder: Path) -> None:
    """Refuse what transformers cannot load, before anything is asked.

    Raises:
        CheckpointError: with what to fetch instead.
    """
    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is no folder of a vision-language model ({error}): fetch it, and name it by "
                              f"evaluation.understanding.model.") from error  # fmt: skip
    if kind == "internvl_chat":
        raise CheckpointError(f"{folder} is InternVL3 in its authors' form, which needs their code: fetch the model "
                              f"in transformers' form, whose name ends in -hf.")  # fmt: skip


def _listed(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
