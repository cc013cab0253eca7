"""Reference curves: what a run's loss looked like with other seeds, and whether this one looks the same.

A file of ``configs/tables/curves`` holds ``name``, ``metric`` (``validation/loss`` or ``loss``), ``seeds``, ``steps``
and for each step ``mean``, ``low`` and ``high`` over the seeds; ``made`` says how.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megavar.errors import DataError

MARGIN = 3.0
"""A new seed is inside within this many standard deviations of the mean: of three seeds, lowest and highest alone would
leave out half of all others."""


@dataclass(frozen=True)
class Curve:
    """A band."""

    name: str
    metric: str
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    made: str = ""

    @classmethod
    def of(cls, name: str, metric: str, runs: Mapping[int, Mapping[int, float]], made: str) -> "Curve":
        """The band of several runs.

        Args:
            runs: by seed the values by step.

        Raises:
            DataError: there are fewer than two runs, or no step that all of them have.
        """
        steps = sorted(set.intersection(*(set(points) for points in runs.values()))) if runs else []
        if len(runs) < 2 or not steps:
            raise DataError(f"A band of {metric} needs two runs or more with a value at the same steps.")
        mean, low, high = [], [], []
        for step in steps:
            values = [points[step] for points in runs.values()]
            middle = sum(values) / len(values)
            deviation = math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))
            mean.append(middle)
            low.append(min(*values, middle - MARGIN * deviation))
            high.append(max(*values, middle + MARGIN * deviation))
        return cls(name, metric, tuple(sorted(runs)), tuple(steps), tuple(mean), tuple(low), tuple(high), made)

    @classmethod
    def load(cls, path: Path) -> "Curve":
        """Read a file.

        Raises:
            DataError: it is missing or no curve.
        """
        try:
            content = json.loads(path.read_text())
            lists = {key: tuple(content[key]) for key in ("seeds", "steps", "mean", "low", "high")}
            assert len({len(lists[key]) for key in ("steps", "mean", "low", "high")}) == 1 and lists["steps"]
            return cls(str(content["name"]), str(content["metric"]), made=str(content.get("made", "")), **lists)
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise DataError(
                f"{path} is no reference curve ({type(error).__name__}). validation.reference names a file that "
                f"`python -m tools.reference_curve` wrote."
            ) from None

    def text(self) -> str:
        """The content of its file."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def band(self, step: int) -> tuple[float, float] | None:
        """Low and high at ``step``, in between two steps on a straight line; None outside of the curve."""
        if not self.steps[0] <= step <= self.steps[-1]:
            return None
        after = next(place for place, there in enumerate(self.steps) if there >= step)
        if self.steps[after] == step:
            return self.low[after], self.high[after]
        share = (step - self.steps[after - 1]) / (self.steps[after] - self.steps[after - 1])
        low, high = (
            ends[after - 1] + share * (ends[after] - ends[after - 1]) for ends in (self.low, self.high)
        )  # fmt: skip
        return low, high

    def verdict(self, points: Sequence[tuple[int, float]]) -> str | None:
        """``inside``, ``above`` or ``below`` the band at the newest of ``points`` (step, value) that it covers."""
        for step, value in reversed(points):
            band = self.band(step)
            if band is not None:
                return "below" if value < band[0] else "above" if value > band[1] else "inside"
        return None
