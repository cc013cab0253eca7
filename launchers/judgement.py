"""What the findings of all nodes mean together: comparisons, the exit code, nodes to replace, and the table."""

import statistics
from collections.abc import Mapping, Sequence

from launchers.checks import Finding, Status
from megavar.errors import ExitCode

ANSWERS = "answers"
"""The check that every node spoke in time."""

Report = dict[str, list[Finding]]
"""Findings by node."""


def slow(values: Mapping[str, float], tolerance: float) -> list[str]:
    """Names whose value is far below the median: by ``tolerance`` of it and by five median absolute deviations.

    Fewer than three values cannot tell who is slow.
    """
    if len(values) < 3:
        return []
    median = statistics.median(values.values())
    deviation = 1.4826 * statistics.median(abs(value - median) for value in values.values())
    threshold = median - max(tolerance * median, 5 * deviation)
    return [name for name, value in values.items() if value < threshold]


def compare(
    check: str, unit: str, values: Mapping[str, float], *, tolerance: float, verdict: Status = "fail"
) -> dict[str, Finding]:
    """A finding per node for a rate that should be the same everywhere; ``verdict`` is the status of slow ones."""
    if not values:
        return {}
    outliers, median = slow(values, tolerance), statistics.median(values.values())
    found: dict[str, Finding] = {}
    for node, value in values.items():
        if node in outliers:
            found[node] = Finding(check, verdict, f"{value:.3g} {unit}, the median is {median:.3g}", value)
        else:
            found[node] = Finding(check, "pass", f"{value:.3g} {unit}", value)
    return found


def matmul(rates: Sequence[float]) -> Finding:
    """Of one node: TFLOP/s of its GPUs, of which none may be far slower than the others; nodes compare the slowest."""
    odd = slow({str(index): rate for index, rate in enumerate(rates)}, 0.1)
    if odd:
        found = ", ".join(f"GPU {index} does {rates[int(index)]:.3g}" for index in odd)
        return Finding("matmul", "fail", f"{found} TFLOP/s, the median is {statistics.median(rates):.3g}")
    return Finding("matmul", "pass", "", min(rates))


def clock(offsets: Mapping[str, float]) -> dict[str, Finding]:
    """Offsets in seconds to the first node's clock: logs of several nodes are compared by time."""
    found: dict[str, Finding] = {}
    for node, offset in offsets.items():
        status: Status = "fail" if abs(offset) > 60 else "warn" if abs(offset) > 1 else "pass"
        found[node] = Finding("clock", status, f"{offset:+.3f} s" + ("" if status == "pass" else ": synchronize it"))
    return found


def compared(report: Report, offsets: dict[str, float], *, gpus: bool) -> Report:
    """Add the comparisons between nodes: clocks, and rates of which one node's is far below the others'.

    CPUs are shared with whatever else a node does: there a slow one is only worth a warning.
    """
    units = {"matmul": "TFLOP/s", "all-reduce within nodes": "GiB/s", "all-reduce between nodes": "GiB/s"}
    tolerances = {"matmul": 0.1, "all-reduce within nodes": 0.1, "all-reduce between nodes": 0.3}
    result = {node: [item for item in findings if item.value is None or item.check not in units]
              for node, findings in report.items()}  # fmt: skip
    for check, unit in units.items():
        values = {node: item.value for node, findings in report.items() for item in findings
                  if item.check == check and item.value is not None}  # fmt: skip
        rated = compare(check, unit, values, tolerance=tolerances[check], verdict="fail" if gpus else "warn")
        for node, finding in rated.items():
            result[node].append(finding)
    for node, finding in clock(offsets).items():
        result[node].append(finding)
    return result


def add_silent_nodes(report: Report, names: list[str]) -> None:
    """Enter which of all nodes ``names``, in the order of their ranks, gave no answer.

    If most of them are silent, it is the first one that nobody reaches; if just half are, it may be either.
    """
    silent = [name for name in names if name not in report]
    for name in names:
        report.setdefault(name, [])
        if name in silent:
            status: Status = "fail" if 2 * len(silent) <= len(names) else "warn"
            report[name].append(Finding(ANSWERS, status, "gave no answer in time"))
        elif name == names[0] and 2 * len(silent) >= len(names):
            report[name].append(Finding(ANSWERS, "fail", f"hears {len(names) - len(silent) - 1} other nodes"))
        elif silent:
            report[name].append(Finding(ANSWERS, "pass", ""))


def exit_code(report: Report) -> ExitCode:
    """The meaning of all findings together. A run's own fault is seen by every node that looks."""
    failed = {item.check for findings in report.values() for item in findings if item.status == "fail"}
    if any(_of_the_run(report, check) for check in failed):
        return ExitCode.CONFIGURATION
    return ExitCode.PREFLIGHT if failed else ExitCode.FINISHED


def _of_the_run(report: Report, check: str) -> bool:
    failures = [item for findings in report.values() for item in findings if item.check == check]
    return all(item.status == "fail" and item.of_the_run for item in failures)


def bad_nodes(report: Report) -> list[str]:
    """Nodes that failed a check which other nodes passed, or, in a run on one node, a check of the node itself."""
    of_one_node = ("gpus", "limits", "shared memory", "matmul")
    found = []
    for node, findings in report.items():
        for item in findings:
            alone = len(report) == 1 and item.check in of_one_node
            if item.status == "fail" and (alone or item.check == ANSWERS or _only_some(report, item.check)):
                found.append(node)
                break
    return found


def _only_some(report: Report, check: str) -> bool:
    states = [item.status == "fail" for findings in report.values() for item in findings if item.check == check]
    return any(states) and not all(states)


def table(report: Report) -> str:
    """One row per check: its worst status, how many nodes passed, and what the others say."""
    order: dict[str, list[tuple[str, Finding]]] = {}
    for node, findings in report.items():
        for item in findings:
            order.setdefault(item.check, []).append((node, item))
    severity: dict[Status, int] = {"pass": 0, "warn": 1, "fail": 2}
    lines = [f"{'check':<26} {'result':<6} {'nodes':>7}  detail"]
    for check, entries in order.items():
        worst = max((item.status for _, item in entries), key=severity.__getitem__)
        passed = sum(item.status == "pass" for _, item in entries)
        if worst == "pass":
            details = [_summary([item for _, item in entries])]
        else:
            details = [f"{node}: {item.detail}" for node, item in entries if item.status != "pass"]
        shown = worst if worst == "pass" else worst.upper()
        lines.append(f"{check:<26} {shown:<6} {passed:>3}/{len(entries):<3}  {details[0]}")
        lines += [f"{'':<43}{detail}" for detail in details[1:10]]
        if len(details) > 10:
            lines.append(f"{'':<43}... and {len(details) - 10} more nodes")
    return "\n".join(lines)


def _summary(items: list[Finding]) -> str:
    values = [item.value for item in items if item.value is not None]
    if len(values) > 1:
        unit = items[0].detail.split(" ", 1)[-1]
        return f"{min(values):.3g} to {max(values):.3g} {unit}"
    return items[0].detail
