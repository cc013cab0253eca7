"""The offline text-to-image suite: ShapeEval on rendered scenes."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megavar.conditions import Conditions, PromptConditions
from megavar.config.shapes import ShapesSource
from megavar.config.suites.shapes import ShapesSuite
from megavar.data.build import build_source
from megavar.data.shapes_grammar import TAGS, Prompt, evaluation_prompts
from megavar.errors import ConfigError
from megavar.evaluation import shape_eval
from megavar.evaluation.base import Scores, Suite
from megavar.evaluation.images import ImageSet
from megavar.evaluation.suites.sources import require_source


class Shapes(Suite[ShapesSuite]):
    """GenEval's six tasks, judged by an exact detector."""

    def check(self) -> None:
        """Only shapes with captions are scored."""
        require_source(self.choice.name, self.data, "shapes")
        if build_source(self.data).num_classes:
            raise ConfigError(
                "evaluation.suite.name=shapes asks for scenes by captions, but data.source.conditioning is class. Use "
                "evaluation.suite.name=classifier."
            )

    def prompts(self) -> list[Prompt]:
        """What is asked for, in index order."""
        choice, size = self.choice, self.data.image_size
        tags = self.data.source.tags if isinstance(self.data.source, ShapesSource) else TAGS
        return evaluation_prompts(size, per_tag=choice.per_tag, held_out=choice.held_out, seed=choice.seed, tags=tags)

    def conditions(self) -> Conditions:
        """Every prompt ``per_prompt`` times."""
        texts = tuple(prompt.text for prompt in self.prompts())
        return PromptConditions(self.choice.name, texts, self.choice.per_prompt)

    def score(self, images: ImageSet, device: torch.device, work_directory: Path) -> Scores:
        """Judge every image; the verdicts go into ``shape_eval.jsonl``."""
        prompts = self.prompts()
        asked = [prompt for prompt in prompts for _ in range(self.choice.per_prompt)]
        records = shape_eval.score_scenes(images.read(0, len(images)), asked)
        shape_eval.write_records(work_directory / "shape_eval.jsonl", records)
        reference = {**self.choice.model_dump(), "image_size": self.data.image_size, "prompts": len(prompts)}
        return Scores(shape_eval.summarize(records), shape_eval.METRICS, {"name": "shape detector"}, reference)

    def baselines(self, count: int) -> dict[str, dict[str, float]]:
        """Right scenes, and right scenes of the next prompt."""
        prompts = self.prompts()
        true = shape_eval.true_scenes(prompts, self.data.image_size)
        turned = prompts[1:] + prompts[:1]
        return {
            "right scenes": shape_eval.summarize(shape_eval.score_scenes(true, prompts)),
            "other captions": shape_eval.summarize(shape_eval.score_scenes(true, turned)),
        }

    def ceiling(self, reconstruct: Callable[[Tensor], Tensor]) -> dict[str, dict[str, float]]:
        """Right scenes as the tokenizer renders them."""
        prompts = self.prompts()
        return {"tokenizer's ceiling": shape_eval.tokenizer_ceiling(reconstruct, prompts, self.data.image_size)}
