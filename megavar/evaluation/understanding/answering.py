"""Answers to a benchmark, shared by all ranks. They are stored in chunks: the same whatever ranks there are, and
however often they were interrupted.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megavar.chunks import ChunkStore, share
from megavar.config.understanding import UnderstandingConfig
from megavar.evaluation.understanding.model import Answerer
from megavar.evaluation.understanding.questions import Benchmark
from megavar.parallel.environment import Environment

_HOW = {"prompts", "answers", "tiles", "precision"}


class Answers:
    """Those of one model to one benchmark."""

    def __init__(
        self, benchmark: Benchmark[Any], settings: UnderstandingConfig, model: Mapping[str, str], directory: Path
    ) -> None:
        """Open them.

        Args:
            model: what identifies it.
            directory: of all answers.
        """
        self.benchmark, self.settings = benchmark, settings
        identity = {"benchmark": benchmark.identity, "model": dict(model)} | settings.model_dump(include=_HOW)
        mark = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
        self.store = ChunkStore.open(
            directory / f"{benchmark.choice.name}-{mark}", count=len(benchmark.questions), size=settings.chunk_size,
            identity=identity,
        )  # fmt: skip

    def ask(self, model: Callable[[], Answerer], place: Environment) -> None:
        """Ask what has no answer yet. Collective; ``model`` is called by ranks that have something to ask."""
        chunks = share(self.store.missing(), place)
        if not chunks:
            return
        asked, count = model(), sum(last - first for first, last in map(self.store.range, chunks))
        with tqdm(
            desc=self.benchmark.choice.name, unit="question", total=count, disable=True if place.rank else None
        ) as bar:
            for chunk in chunks:
                answers = []
                for question in self.benchmark.questions[slice(*self.store.range(chunk))]:
                    open_ = self.settings.answers == "generated" or not question.options
                    answers.append(asked.write(question, self.benchmark.longest) if open_ else asked.choose(question))
                    bar.update()
                self.store.write(chunk, {"answers": np.array(answers, dtype=np.str_)})

    def score(self) -> dict[str, float]:
        """What all answers are worth."""
        return self.benchmark.score([str(one) for chunk in self.store.read_all() for one in chunk["answers"]])
