"""The rows of a table at a small size: which runs that are, what they gave, and whether the paper's ordering holds.

Each row and seed is an ordinary run in a directory that is named after its configuration: interrupted, it continues;
done, it is not run again; the same run of two tables is run once.
"""

import hashlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavar import storage
from megavar.config.root import Config
from megavar.config.table import MetricConfig, TableConfig
from megavar.errors import ExitCode
from megavar.reproduction.values import values_of
from megavar.training.checkpoint.store import checkpoint_name
from megavar.training.run_directory import RunDirectory, decides

FOLDER = Path("runs/demo")
COSTS = "processor_seconds.json"
CLEAR = 2.0
"""Standard errors by which a difference is called clear."""


@dataclass(frozen=True)
class DemoRun:
    """A row with a seed."""

    row: str
    seed: int
    config: Config

    @property
    def done(self) -> bool:
        """Whether its last step is reached."""
        return RunDirectory.of(self.config).done

    @property
    def processor_seconds(self) -> float:
        """That it has cost up to now, over all starts, scoring included."""
        path = Path(self.config.run.path) / COSTS
        return json.loads(path.read_text()) if path.exists() else 0.0

    def values(self, metrics: Mapping[str, MetricConfig]) -> dict[str, float]:
        """What it gave, complete or not."""
        return values_of(self.config, metrics)


def demo_runs(table: TableConfig, seeds: int, extra: Sequence[str], folder: Path = FOLDER) -> list[DemoRun]:
    """All runs, seed after seed, so that every row has as many seeds as any other when the demo is interrupted.

    Raises:
        ConfigError: the table has no demo.
    """
    return [
        DemoRun(row, seed, _placed(table, row, seed, extra, folder))
        for seed in range(seeds)
        for row in table.require_demo().rows
    ]


def _placed(table: TableConfig, row: str, seed: int, extra: Sequence[str], folder: Path) -> Config:
    """The configuration in a directory that is named after its words: later versions, with more keys, find it again."""
    demo, begin = table.require_demo(), []
    if demo.begin_with not in (None, row):
        path = Path(_placed(table, demo.begin_with, seed, extra, folder).run.path)
        if demo.begin_at is not None:
            path = path / "checkpoints" / checkpoint_name(demo.begin_at)
        begin = [f"train.initial_weights={{path: {json.dumps(str(path))}}}"]
    config, words = table.demo_config(row, seed, extra, begin), table.demo_words(row, seed, extra, begin)
    deciding = sorted({word for word in words if decides(word.partition("=")[0])})
    digest = hashlib.sha256(json.dumps(deciding).encode()).hexdigest()
    name = f"{config.run.name}-seed{seed}-{digest[:8]}"
    run = config.run.model_copy(update={"name": name, "directory": str(folder / name)})
    return config.model_copy(update={"run": run})


def train_all(
    table: TableConfig,
    runs: Sequence[DemoRun],
    train: Callable[[Config], ExitCode],
    say: Callable[[str], None] = print,
) -> ExitCode:
    """Train and score what is missing, one run after the other.

    Args:
        train: trains and scores one run, or continues it.
        say: told before each run which it is and how long all will take.

    Returns:
        FINISHED, or the code of the run that stopped: then the same command continues.
    """
    demo = table.require_demo()
    metrics = demo.metrics
    waiting = [run for run in runs if not run.done or run.values(metrics).keys() != metrics.keys()]
    if len(waiting) < len(runs):
        say(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already.")
    took: list[float] = []
    for number, run in enumerate(waiting):
        left = f", about {statistics.mean(took) * (len(waiting) - number) / 60:.0f} min left" if took else ""
        say(f"[{number + 1}/{len(waiting)}] {run.row}, seed {run.seed}{left}: {run.config.run.path}")
        began, busy = time.monotonic(), time.process_time()
        code = train(run.config)
        took.append(time.monotonic() - began)
        spent = run.processor_seconds + time.process_time() - busy
        storage.write_json_atomic(Path(run.config.run.path) / COSTS, round(spent, 1))
        if code != ExitCode.FINISHED:
            return code
    return ExitCode.FINISHED


@dataclass(frozen=True)
class Mean:
    """Of the seeds of a row."""

    value: float
    error: float
    """Standard error; not a number with fewer than two seeds."""
    seeds: int

    @staticmethod
    def of(values: Sequence[float]) -> "Mean":
        """With the sample variance."""
        spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return Mean(statistics.fmean(values), spread, len(values))


def means(table: TableConfig, runs: Sequence[DemoRun]) -> dict[str, dict[str, Mean]]:
    """By row and metric, over the seeds that are done."""
    demo = table.require_demo()
    found: dict[str, dict[str, Mean]] = {}
    for row in demo.rows:
        values = [run.values(demo.metrics) for run in runs if run.row == row and run.done]
        found[row] = {
            name: Mean.of([value[name] for value in values if name in value])
            for name in demo.metrics
            if any(name in value for value in values)
        }
    return found


@dataclass(frozen=True)
class Pair:
    """Two rows of which the paper finds the first better."""

    better: str
    worse: str
    advantage: float
    """Of the first over the second here, positive if it is better here, too."""
    error: float
    """Standard error of the advantage."""

    @property
    def holds(self) -> bool:
        """Whether the means are in the paper's order."""
        return self.advantage > 0

    @property
    def clear(self) -> bool:
        """Whether they are further apart than chance explains."""
        return abs(self.advantage) > CLEAR * self.error


def paper_order(table: TableConfig, rows: Sequence[str]) -> list[str]:
    """Those of ``rows`` for which the paper prints the table's headline metric, its best first; or the demo's own."""
    headline, expected = table.headline, table.require_demo().expected
    if expected or headline is None:
        return [name for name in expected if name in rows]
    printed = {row.name: row.paper[headline] for row in table.rows if headline in row.paper and row.name in rows}
    return sorted(printed, key=lambda name: printed[name], reverse=table.metrics[headline].better == "higher")


def compare(table: TableConfig, found: Mapping[str, Mapping[str, Mean]], metric: str) -> list[Pair]:
    """All pairs of rows with a value, in the paper's order."""
    demo = table.require_demo()
    sign = 1.0 if demo.metrics[metric].better == "higher" else -1.0
    order = [row for row in paper_order(table, list(found)) if metric in found[row]]
    pairs = []
    for better, worse in itertools.combinations(order, 2):
        a, b = found[better][metric], found[worse][metric]
        pairs.append(Pair(better, worse, sign * (a.value - b.value), math.hypot(a.error, b.error)))
    return pairs


def verdict(pairs: Sequence[Pair]) -> str:
    """One sentence: whether the paper's ordering holds."""
    if not pairs:
        return "there is nothing to compare yet"
    against = [pair for pair in pairs if not pair.holds and pair.clear]
    clear = sum(pair.holds and pair.clear for pair in pairs)
    agreeing = sum(pair.holds for pair in pairs)
    count = f"{agreeing} of {len(pairs)} pairs are in the paper's order, {clear} of them clearly"
    if against:
        names = "; ".join(f"{pair.worse} is clearly better than {pair.better}" for pair in against)
        return f"the paper's ordering does NOT hold at this size ({names}); {count}"
    if all(pair.holds for pair in pairs):
        return f"the paper's ordering holds; {count} (by more than {CLEAR:g} standard errors)"
    return f"the paper's ordering is neither shown nor contradicted at this size; {count}"


def summary(table: TableConfig, runs: Sequence[DemoRun]) -> dict[str, Any]:
    """Means, pairs and verdicts as plain values."""
    demo = table.require_demo()
    found = means(table, runs)
    compared = {name: compare(table, found, name) for name, metric in demo.metrics.items() if metric.better}
    return {
        "table": table.name,
        "done": sum(run.done for run in runs),
        "runs": [{"row": run.row, "seed": run.seed, "directory": run.config.run.path, "done": run.done,
                  "values": run.values(demo.metrics)} for run in runs],
        "rows": {row: {name: {"mean": mean.value, "error": mean.error if mean.seeds > 1 else None, "seeds": mean.seeds}
                       for name, mean in values.items()} for row, values in found.items()},
        "paper_order": paper_order(table, list(found)),
        "verdicts": {name: verdict(pairs) for name, pairs in compared.items()},
        "processor_minutes": round(sum(run.processor_seconds for run in runs) / 60, 1),
    }  # fmt: skip
