"""Tables as text for people."""

from collections.abc import Mapping, Sequence

from megavar.config.table import MetricConfig, RowConfig, TableConfig
from megavar.planning.hardware import GIB
from megavar.planning.plan import Plan
from megavar.reproduction.costs import Machine
from megavar.reproduction.demo import Mean
from megavar.reproduction.ledger import Entry

ARROWS = {"lower": " ↓", "higher": " ↑", None: ""}


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they must be; the first one is left-aligned."""
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    lines = []
    for line in (head, ["-" * width for width in widths], *rows):
        cells = [cell.ljust(width) if column == 0 else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(line, widths))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    return lines


def heading(metric: MetricConfig) -> str:
    """With its direction."""
    return metric.heading + ARROWS[metric.better]


def number(value: float | None, digits: int | None = None) -> str:
    """With so many decimals, or four significant digits."""
    if value is None:
        return "-"
    if digits is not None:
        return f"{value:.{digits}f}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def format_head(table: TableConfig) -> str:
    """Title and protocol."""
    return f"{table.source}: {table.title}\nprotocol: {table.protocol}"


def format_values(table: TableConfig, entries: Mapping[str, Entry | None]) -> str:
    """The paper's values, ours beside them where there are any, and what else the paper says."""
    ours = any(entries.values())
    names = list(table.metrics)
    head = ["row", *(heading(metric) for metric in table.metrics.values()), "params M"]
    head += ["ours: GPU h", "on"] if ours else []
    rows = []
    for row in table.rows:
        entry = entries.get(row.name)
        cells = []
        for name in names:
            digits = table.metrics[name].digits
            here = f" | {number(entry.metrics.get(name), digits)}" if entry else ""
            cells.append(number(row.paper.get(name), digits) + here)
        tail = [f"{entry.gpu_hours:.1f}", f"{entry.ranks} x {entry.device}"] if entry else ["", ""]
        rows.append([row.name, *cells, number(row.paper_parameters), *(tail if ours else [])])
    title = "VALUES: the paper's" + (" | ours" if ours else "; the ledger holds none of ours yet")
    return "\n".join([title, *(f"  {line}" for line in grid(head, rows))])


def format_costs(table: TableConfig, costs: Mapping[str, Mapping[Machine, Plan]], hours: float) -> str:
    """What each run costs on each machine."""
    machines = list(dict.fromkeys(machine for plans in costs.values() for machine in plans))
    head = [
        "run",
        "total M",
        "active M",
        "TFLOP/image",
        *([f"x {table.baseline}"] if (table.baseline or "") in costs else []),
    ]
    head += [column for machine in machines for column in (f"| {machine}: GPU h", "epoch", "GiB", "micro", "jobs")]
    said = {row.name: row.paper_cost for row in table.rows if row.paper_cost and row.name in costs}
    head += ["| the paper"] if said else []
    baseline = costs.get(table.baseline or "")
    base = None if baseline is None else next(iter(baseline.values())).workload.train_flops
    rows = []
    for name, plans in costs.items():
        first = next(iter(plans.values()))
        count, flops = first.workload.parameters, first.workload.train_flops
        cells = [name, f"{count.total / 1e6:.1f}", f"{count.activated / 1e6:.1f}", f"{flops / 1e12:.3f}"]
        cells += [f"{flops / base:.2f}"] if base is not None else []
        for machine in machines:
            cells += _machine_cells(plans[machine])
        rows.append([*cells, *([said.get(name, "-")] if said else [])])
    lines = grid(head, rows)
    notes = sorted({note for plans in costs.values() for plan in plans.values() for note in plan.notes})
    title = (
        f"COSTS of training (predicted, not measured: `megavar plan`)\n  GPU h: of the whole run; epoch: "
        f"hours:minutes; GiB: of the fullest GPU (! does not fit); micro: images at a time; jobs: of {hours:g} hours"
    )
    return "\n".join([title, *(f"  {line}" for line in lines), *(f"  note: {note}" for note in notes)])


def _machine_cells(plan: Plan) -> list[str]:
    prediction = plan.prediction
    epochs = plan.steps * prediction.layout.global_batch / plan.images if plan.images else None
    minutes = round(plan.seconds / epochs / 60) if epochs else None
    return [
        f"{plan.seconds / 3600 * plan.gpus:.0f}",
        "-" if minutes is None else f"{minutes // 60}:{minutes % 60:02d}",
        f"{prediction.memory.total / GIB:.0f}" + ("" if plan.fits else "!"),
        str(prediction.layout.micro_batch),
        str(plan.links),
    ]


def format_remarks(table: TableConfig) -> str:
    """What the paper says beside its numbers, notes on rows, conflicts."""
    said = [
        f"  {row.name}: the paper says {key}: {words}" for row in table.rows for key, words in row.paper_says.items()
    ]
    notes = [f"  {row.name}: {note}" for row in table.rows for note in row.notes]
    lines = ["REMARKS", *said, *notes] if said or notes else []
    if table.conflicts:
        lines += ["CONFLICTS", *(f"  {conflict}" for conflict in table.conflicts)]
    return "\n".join(lines)


def format_commands(table: TableConfig, file: str) -> str:
    """How to go on."""
    ways = {"--submit [ROW ...] [key=value ...]": "through Slurm", "--collect": "finished runs, to the ledger"}
    found = ways if table.trained else {}
    found |= {} if table.demo is None else {"--demo": "here, at a small size"}
    lines = [f"  python -m megavar reproduce {file} {option:<36}{words}" for option, words in found.items()]
    return "\n".join(["NEXT", *lines]) if lines else ""


def format_demo(
    table: TableConfig,
    found: Mapping[str, Mapping[str, Mean]],
    flops: Mapping[str, float | None],
    verdicts: Mapping[str, str],
    minutes: float,
) -> str:
    """Means with standard errors, the paper's value beside them, and the verdicts."""
    demo, headline = table.require_demo(), table.headline
    metrics = demo.metrics
    rows_of: dict[str, RowConfig] = {row.name: row for row in table.rows}
    head = ["row", "seeds", *(heading(metric) for metric in metrics.values()), "GFLOP/image"]
    head += [f"paper: {heading(table.metrics[headline])}"] if headline else []
    rows = []
    for name, means in found.items():
        seeds = max((mean.seeds for mean in means.values()), default=0)
        cells = [name, str(seeds), *(with_error(means.get(metric), metrics[metric].digits) for metric in metrics)]
        work = flops.get(name)
        cells.append("-" if work is None else f"{work / 1e9:.3f}")
        if headline:
            row = rows_of.get(name)
            printed = None if row is None else row.paper.get(headline)
            cells.append("control" if printed is None else number(printed, table.metrics[headline].digits))
        rows.append(cells)
    lines = [f"DEMO of {table.source} at a small size: mean ± standard error over seeds"]
    lines += [f"  {line}" for line in grid(head, rows)]
    lines += [f"  by {metrics[name].heading}: {words}" for name, words in verdicts.items()]
    lines += [f"  note: {note}" for note in (demo.size, *demo.notes)]
    lines.append(f"  {minutes:.0f} processor minutes; it was sized for {demo.minutes:g}")
    return "\n".join(lines)


def with_error(mean: Mean | None, digits: int | None = None) -> str:
    """``3.21 ± 0.05``, with so many decimals, or three or one."""
    if mean is None:
        return "-"
    if digits is None:
        digits = 3 if abs(mean.value) < 10 else 1
    return f"{mean.value:.{digits}f}" + (f" ± {mean.error:.{digits}f}" if mean.seeds > 1 else "")
