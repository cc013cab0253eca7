"""Our values of published tables: one line per row and set of scores, in a file that is part of the repository."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megavar import storage
from megavar.chunks import ChunkStore
from megavar.config.root import Config
from megavar.config.table import RowConfig, TableConfig
from megavar.errors import DataError
from megavar.records.reading import metric_lines
from megavar.reproduction.values import scores_of, values_of
from megavar.training.run_directory import RunDirectory, identity_of

LEDGER = Path("configs/tables/ledger.jsonl")


@dataclass(frozen=True)
class Entry:
    """A line of the ledger."""

    table: str
    row: str
    run: str
    config: str
    """Hash of what decides the training: :func:`megavar.training.run_directory.identity_of`."""
    commit: str
    """Of the last start; ``+`` behind it: the checkout had changes."""
    device: str
    ranks: int
    """Largest number of processes, one per GPU."""
    gpu_hours: float
    """Of training steps: without starts, saves, sampling and scoring."""
    steps: int
    finished_at: str
    metrics: dict[str, float]
    """Ours, by the table's names."""
    suite: str | None = None
    sampler: dict[str, Any] = dataclasses.field(default_factory=dict)
    count: int | None = None
    """Images scored."""
    samples: str | None = None
    """sha256 over the tokens of all scored samples in their order; None where they are gone."""
    weights: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Frozen networks of the run by name, as ``weights.json`` has them."""


def read(path: Path = LEDGER) -> list[Entry]:
    """All entries; none where there is no file.

    Raises:
        DataError: a line cannot be read.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(Entry(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}, line {number} is no entry of a ledger ({error}). Restore it from git.") from error
    return entries


def entry_of(entries: Iterable[Entry], table: TableConfig, row: RowConfig, config: Config) -> Entry | None:
    """The newest entry of a row: of this table, or of the same training in another one."""
    identity = identity_of(config)
    own = (table.name, row.name)
    found = [entry for entry in entries if (entry.table, entry.row) == own or entry.config == identity]
    return max(found, key=lambda entry: entry.finished_at, default=None)


def collect(table: TableConfig, extra: Iterable[str] = (), path: Path = LEDGER) -> list[Entry]:
    """Add what finished runs of the table gave and the ledger does not have yet; return what was added.

    Args:
        extra: overrides of the configurations, for example of the data's place.
    """
    known = read(path)
    added = []
    for row in table.trained:
        config = table.config_of(row, tuple(extra))
        if RunDirectory.of(config).done and (entry := _entry(table, row, config)).metrics and entry not in known:
            storage.append_line(path, json.dumps(dataclasses.asdict(entry), sort_keys=True))
            added.append(entry)
    return added


def _entry(table: TableConfig, row: RowConfig, config: Config) -> Entry:
    directory = RunDirectory.of(config)
    finished = json.loads((directory.path / "DONE").read_text())
    attempts = _attempts(directory.path)
    last = attempts[-1] if attempts else {}
    scores = scores_of(config)
    content = scores.content if scores is not None else {}
    weights = directory.path / "weights.json"
    return Entry(
        table=table.name,
        row=row.name,
        run=config.run.name,
        config=identity_of(config),
        commit=last.get("commit", "") + ("+" if last.get("changed_files") else ""),
        device=last.get("device") or "unknown",
        ranks=max((attempt["layout"]["world_size"] for attempt in attempts), default=0),
        gpu_hours=round(gpu_hours(directory.path, config.train.global_batch_size), 4),
        steps=max((line["step"] for line in metric_lines(directory.path)), default=0),
        finished_at=finished["finished_at"],
        metrics=values_of(config, table.metrics),
        suite=content.get("suite"),
        sampler=dict(content.get("sampler", {})),
        count=content.get("count"),
        samples=samples_hash(scores.samples) if scores is not None and scores.samples is not None else None,
        weights={
            name: {key: value for key, value in record.items() if key != "path"}
            for name, record in (json.loads(weights.read_text()) if weights.exists() else {}).items()
        },
    )


def _attempts(directory: Path) -> list[dict[str, Any]]:
    path = directory / "attempts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def gpu_hours(directory: Path, global_batch: int) -> float:
    """Process hours of all training steps that the log knows, each with the number of ranks that it ran on."""
    starts = [(attempt["started_at"], attempt["layout"]["world_size"]) for attempt in _attempts(directory)]
    lines = metric_lines(directory)
    seconds, step = 0.0, 0
    for line in lines:
        if "images_per_second" in line:
            ranks = _ranks_at(starts, line["time"])
            seconds += (line["step"] - step) * global_batch / line["images_per_second"] * ranks
        step = line["step"]
    return seconds / 3600


def _ranks_at(starts: list[tuple[str, int]], moment: float) -> int:
    ranks = starts[0][1] if starts else 1
    for started, size in starts:
        if datetime.strptime(started, "%Y-%m-%dT%H:%M:%S%z").timestamp() <= moment:
            ranks = size
    return ranks


def samples_hash(directory: Path) -> str:
    """sha256 over the tokens of all samples, in their order: the same from any number of ranks."""
    digest = hashlib.sha256()
    for arrays in ChunkStore.existing(directory).read_all(["tokens"]):
        digest.update(arrays["tokens"].tobytes())
    return digest.hexdigest()
