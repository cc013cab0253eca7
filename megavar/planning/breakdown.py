"""A sum and its parts."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Breakdown:
    """Base of what adds up: every field of a subclass is a part, in the unit of the subclass."""

    def parts(self) -> dict[str, float]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts().values())
