"""The page ``report.html``: everything in one file, nothing from elsewhere."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

import megavar
from megavar.records.alerts import lasting
from megavar.records.history import STATES
from megavar.reporting.cost import Cost, cost_of
from megavar.reporting.facts import PARENT, RunFacts, differences
from megavar.reporting.pictures import Album, inline_svg
from megavar.reporting.scores import Scores, columns, latest, metrics_of, number, suites
from megavar.wording import duration, size

PREVIEWS = 9
"""Grids over time that are shown, evenly chosen."""
PATCH = 20_000
"""Characters of a patch that are shown."""


def render(runs: Sequence[RunFacts], figures: dict[str, tuple[str, Figure]]) -> str:
    """HTML of a report on ``runs``."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )  # fmt: skip
    pictures = {run.name: _pictures(run) for run in runs}
    album = Album(sum(1 + min(PREVIEWS, len(run.previews)) + len(pictures[run.name]) for run in runs))
    costs = [cost_of(run) for run in runs]
    marks = sorted({word for run in runs for _, word in run.marks})
    return environment.get_template("report.html").render(
        title=", ".join(run.name for run in runs),
        made=time.strftime("%d %B %Y, %H:%M"),
        version=megavar.__version__,
        runs=[_run(run, album, pictures[run.name]) for run in runs],
        tables=_tables(runs),
        figures=[
            {"name": name, "heading": heading, "svg": inline_svg(figure, name)}
            for name, (heading, figure) in figures.items()
        ],
        marks=f"Vertical lines: {', '.join(marks)}." if marks else "",
        model=_model(runs),
        differences=differences({run.name: run.config for run in runs}) if len(runs) > 1 else [],
        cost=_cost_rows(costs),
        states=STATES,
    )


def _run(run: RunFacts, album: Album, pictures: list[tuple[str, Path]]) -> dict[str, Any]:
    good, verdict = run.verdict
    grid, chosen = run.grid, _evenly(run.previews, PREVIEWS)
    names, trains = _class_names(run), _trains(run)
    alerts = [f"step {event['step']}: {event.get('message', event['kind'])}" for event in lasting(run.record.events)]
    hero = album.address(grid) if grid else None
    what = "originals above their reconstructions" if trains == "tokenizer" else "samples"
    caption = f"{what}: {grid.relative_to(run.path)}" if grid else ""
    if names and trains == "generator" and len(names) <= 10:
        caption += f"; classes in turn: {', '.join(names)}"
    return {
        "name": run.name,
        "path": run.path,
        "good": good,
        "verdict": verdict,
        "alerts": alerts[-5:],
        "parent": _parent(run),
        "hero": hero,
        "hero_caption": caption,
        "previews": [
            {"step": step, "address": address} for step, path in chosen if (address := album.address(path)) is not None
        ],
        "preview_text": f"{what.capitalize()} at several steps, always of the same "
        + ("images." if trains == "tokenizer" else "seeds and conditions."),
        "pictures": [
            {"heading": heading, "address": address}
            for heading, path in pictures if (address := album.address(path)) is not None
        ],
        "attempts": [
            (a.attempt, a.outcome, a.first_step, a.kept_step, a.lost_steps,
             *(duration(a.seconds.get(state, 0.0)) for state in STATES))
            for a in run.attempts
        ],
        "commands": _commands(run),
        "identity": _identity(run),
        "yaml": run.text("config.yaml"),
        "patch": run.text("code.patch")[:PATCH],
    }  # fmt: skip


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def _pictures(run: RunFacts) -> list[tuple[str, Path]]:
    """Sweeps of ``megavar sample``, and what ``megavar analyze`` has drawn."""
    sweeps = sorted(run.path.glob("generated/*/sweep.png"), key=lambda path: path.stat().st_mtime)[-3:]
    analyses = sorted(run.path.glob("analysis/*.png"))[:6]
    named = f" ({run.name})"
    return [*((f"Samples by guidance{named}", path) for path in sweeps),
            *((f"{path.stem.replace('_', ' ').capitalize()}{named}", path) for path in analyses)]  # fmt: skip


def _trains(run: RunFacts) -> str:
    """What the run was for."""
    name = str(run.config.get("recipe", {}).get("name", ""))
    return "tokenizer" if "tokenizer" in name or run.config.get("generator") is None else "generator"


def _parent(run: RunFacts) -> str:
    parent = run.json(PARENT)
    if not parent:
        return ""
    changed = ", ".join(f"{key} {before} → {now}" for key, (before, now) in parent.get("differences", {}).items())
    return f"Forked from {parent.get('run')} at step {parent.get('step')}: {changed or 'nothing changed'}."


def _tables(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    scored: Scores = {run.name: run.scores for run in runs}
    tables = []
    for suite in suites(scored):
        rows = columns(scored, suite)
        newest = [s for found in scored.values() for s in latest(found) if s.suite == suite]
        lines = [
            {
                "heading": metric.heading,
                "cells": [
                    {"text": number(values.get(metric.key)), "run": name in scored,
                     "met": metric.met(values.get(metric.key)) if metric.key in values else None}
                    for name, values in rows.items()
                ],
            }
            for metric in metrics_of(newest)
        ]  # fmt: skip
        notes = [_drawn(s) for s in newest] + [note for s in newest for note in s.notes]
        tables.append({"suite": suite, "columns": list(rows), "runs": list(scored), "rows": lines, "notes": notes})
    return tables


def _drawn(scored: Any) -> str:
    shown = ("seed", "guidance", "temperature", "top_k", "top_p", "weights", "rounding", "protocol")
    settings = ", ".join(f"{key} {scored.sampler[key]}" for key in shown if key in scored.sampler)
    return f"{scored.path.name}: {scored.count} images of {scored.checkpoint}; {settings}."


def _class_names(run: RunFacts) -> list[str]:
    return list(map(str, run.json("data.json").get("class_names") or ()))


def _model(runs: Sequence[RunFacts]) -> list[tuple[str, list[str]]]:
    def choice(run: RunFacts, key: str) -> str:
        section = run.config.get(key)
        if not isinstance(section, dict):
            return "-"
        name = section.get("name", key)
        plain = {k: v for k, v in section.items() if isinstance(v, int | float | str | list) and v not in ("", [])}
        shown = [f"{k} {json.dumps(v)}" for k, v in plain.items() if k != "name" and not isinstance(v, bool)]
        return f"{name}: {', '.join(shown[:14])}"

    def parameters(run: RunFacts) -> str:
        return "-" if run.parameters is None else f"{run.parameters:,} ({run.parameters / 1e6:.3g} M)"

    def experts(run: RunFacts) -> str:
        section = (run.config.get("generator") or {}).get("experts")
        return ", ".join(f"{k} {json.dumps(v)}" for k, v in section.items()) if isinstance(section, dict) else "none"

    def classes(run: RunFacts) -> str:
        names = _class_names(run)
        more = f" ... ({len(names)})" if len(names) > 40 else ""
        return ", ".join(names[:40]) + more if names else "-"

    def data(run: RunFacts) -> str:
        described = run.json("data.json")
        if not described:
            return "-"
        found = [described.get(key) for key in ("source", "samples", "fingerprint")]
        return "{}: {} samples, fingerprint {}".format(*found)

    def training(run: RunFacts) -> str:
        train, optimizer = run.config["train"], run.config.get("optimizer", {})
        return (
            f"{run.record.total} steps of {train.get('global_batch_size')} images, seed {train.get('seed')}, "
            f"lr {optimizer.get('lr')}, {train.get('precision')}"
        )

    rows = {
        "recipe": lambda run: choice(run, "recipe"), "generator": lambda run: choice(run, "generator"),
        "experts": experts, "tokenizer": lambda run: choice(run, "tokenizer"), "parameters": parameters,
        "training": training, "data": data, "classes": classes,
    }  # fmt: skip
    return [(heading, [cell(run) for run in runs]) for heading, cell in rows.items()]


def _cost_rows(costs: Sequence[Cost]) -> list[tuple[str, list[str]]]:
    rows = [
        ("devices", [f"{cost.devices} x {cost.device}" for cost in costs]),
        ("starts", [str(cost.starts) for cost in costs]),
        ("device hours", [_hours(cost.total) for cost in costs]),
    ]
    rows += [(f"· {state}", [_hours(cost.hours.get(state, 0.0)) for cost in costs]) for state in STATES]
    rows.append(("planned device hours, steps only", [_hours(cost.planned_hours) for cost in costs]))
    for key, heading in (("step_seconds", "seconds per step"), ("memory_gib", "memory, GiB")):
        rows.append((f"{heading}: measured / predicted", [
            f"{_significant(cost.measured.get(key))} / {_significant(cost.expected.get(key))}" for cost in costs
        ]))  # fmt: skip
    rows.append(("lost steps", [str(cost.lost_steps) for cost in costs]))
    rows.append(("disk", [size(sum(cost.disk.values())) for cost in costs]))
    for folder in dict.fromkeys(folder for cost in costs for folder in cost.disk):
        rows.append((f"· {folder}", [size(cost.disk.get(folder, 0)) for cost in costs]))
    return rows


def _hours(hours: float | None) -> str:
    if hours is None:
        return "-"
    return f"{hours:.2f}" if hours >= 1 else duration(hours * 3600)


def _significant(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0}f}"


def _commands(run: RunFacts) -> str:
    start = run.start
    world = int(start.get("layout", {}).get("world_size", 1))
    lines = [f"git checkout {start['commit']}"] if start.get("commit") else []
    if run.text("code.patch"):
        lines.append(f"git apply {run.path / 'code.patch'}")
    lines += ["python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt"]
    launcher = "python -m" if world == 1 else f"torchrun --nproc-per-node {world} -m"
    lines.append(f"{launcher} megavar train {run.path / 'config.yaml'} run.directory=NEW")
    return "\n".join(lines)


def _identity(run: RunFacts) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in run.start.get("packages", {}).items())
    frozen = "; ".join(
        f"{name}: {value.get('path')} {value.get('checkpoint', '')} "
        f"{str(value.get('manifest_sha256') or value.get('sha256') or '')[:16]}".strip()
        for name, value in run.json("weights.json").items() if isinstance(value, dict)
    )  # fmt: skip
    parts = [packages, f"Frozen weights: {frozen}" if frozen else ""]
    return ". ".join(part for part in parts if part)
