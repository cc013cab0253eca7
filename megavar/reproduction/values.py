"""What a run gave: its scores, its log and its analyses, by the keys that tables name."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavar.config.root import Config
from megavar.config.table import MetricConfig
from megavar.records.reading import metric_lines

LOG = "log/"
TAIL = 0.2
"""Share of a run, at its end, over which a logged value is averaged."""
UNDERSTANDING = "understanding"
"""What scores of a vision-language model with what the run trained in it call their suite."""
INITIAL = "initial weights"
"""What scores of the untrained model call their checkpoint."""


@dataclass(frozen=True)
class ScoreFile:
    """A result file in a run directory."""

    path: Path
    content: Mapping[str, Any]

    @property
    def samples(self) -> Path | None:
        """The directory of the scored samples, if it is still there."""
        folders = (self.path.parent / "generated").glob("*")
        return next((folder for folder in folders if self.path.stem.endswith(f"-{folder.name}")), None)


def scores_of(config: Config) -> ScoreFile | None:
    """The scores of the run's last scored checkpoint by the suite and the sampling that ``config`` asks for; of a
    tokenizer those of its reconstructions by the protocol."""
    found = [file for file in _score_files(Path(config.run.path)) if _belongs(file.content, config)]
    return max(found, key=lambda file: str(file.content["checkpoint"].get("checkpoint")), default=None)


def _score_files(directory: Path) -> Iterator[ScoreFile]:
    for path in sorted(directory.glob("scores-*.json")):
        content = json.loads(path.read_text())
        if content.get("checkpoint", {}).get("checkpoint") != INITIAL:
            yield ScoreFile(path, content)


def _belongs(content: Mapping[str, Any], config: Config) -> bool:
    if config.generator is None:
        asked = config.evaluation.reconstruction
        return bool(
            content["suite"] == f"reconstruction/{asked.protocol}"
            and content["sampler"].get("model_size") == asked.model_size
        )
    suite = str(content["suite"]).partition("/")[0]
    return suite == config.evaluation.suite.name and config.sampling.drew(content["sampler"])


def _logged(directory: Path, name: str) -> float | None:
    lines = metric_lines(directory)
    last = max((line["step"] for line in lines), default=0)
    values = [line[name] for line in lines if name in line and line["step"] > (1 - TAIL) * last]
    return sum(values) / len(values) if values else None


def _analysed(directory: Path, kind: str, name: str) -> float | None:
    path = directory / "analysis" / f"{kind}.json"
    return json.loads(path.read_text())["metrics"].get(name) if path.exists() else None


def values_of(config: Config, metrics: Mapping[str, MetricConfig]) -> dict[str, float]:
    """Our values by the name of their metric; what the run has not given is left out."""
    directory = Path(config.run.path)
    scores = scores_of(config)
    measured = {} if scores is None else dict(scores.content["metrics"])
    measured |= next((dict(file.content["metrics"]) for file in reversed(list(_score_files(directory)))
                      if file.content["suite"] == UNDERSTANDING), {})  # fmt: skip
    found: dict[str, float | None] = {}
    for name, metric in metrics.items():
        kind, separator, rest = (metric.key or "").partition("/")
        if metric.key is None:
            continue
        if metric.key.startswith(LOG):
            found[name] = _logged(directory, metric.key.removeprefix(LOG))
        elif metric.key in measured:
            found[name] = measured[metric.key]
        elif separator:
            found[name] = _analysed(directory, kind, rest)
    return {name: value for name, value in found.items() if value is not None}
