"""The last words of a run that is trained."""

from collections.abc import Mapping

from megavar.records.run import RunRecord
from megavar.wording import duration, size

_SHOWN = 4
"""Scores on the card; the table above it has all."""


def end_card(record: RunRecord, scores: Mapping[str, float]) -> str:
    """What came out, where it is, and what to do next."""
    spent = sum(sum(row.seconds.values()) - row.seconds["waiting"] for row in record.history)
    restarts = f", {record.restarts} restart{'s' if record.restarts > 1 else ''}" if record.restarts else ""
    rows = [("steps", f"{record.step:,} in {duration(spent)}{restarts}, {record.device_hours:.3g} device hours")]
    if record.loss is not None:
        held_out = record.validation_points
        beside = f", {held_out[-1][1]:.3f} on held-out images" if held_out else ""
        verdict = record.verdict
        rows.append(("loss", f"{record.loss:.3f}{beside}" + (f", {verdict} the reference band" if verdict else "")))
    if scores:
        shown = [f"{name} {value:.4g}" for name, value in list(scores.items())[:_SHOWN]]
        rows.append(("scores", ", ".join(shown) + (", ..." if len(scores) > _SHOWN else "")))
    pictures = sorted(record.path.glob("samples/*.png"))
    if pictures:
        rows.append(("pictures", str(pictures[-1])))
    if record.alerts:
        rows.append(("alerts", "; ".join(alert["message"] for alert in record.alerts)))
    rows.append(("disk", f"{size(record.disk_bytes)} in {record.path}"))
    rows += [("next" if number == 0 else "", command) for number, command in enumerate(_next(record))]
    width = max(len(name) for name, _ in rows)
    return "\n".join([f"{record.name} is trained", *(f"  {name:<{width}}  {text}" for name, text in rows)])


def _next(record: RunRecord) -> list[str]:
    if record.config.get("generator") is None:
        return [f"python -m megavar report {record.path}"]
    return [
        f"python -m megavar sample {record.path} --guidance 0 1.5 4 --number 8 --png {record.path / 'pictures'}",
        f"python -m megavar report {record.path}",
    ]
