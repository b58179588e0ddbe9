"""Metrics as a monoid: name -> statistic; two collections add associatively, a division happens once, at the end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Stat:
    """A weighted mean in the making: total / count. A plain value has count 1."""

    total: float
    count: float = 1.0

    def __add__(self, other: "Stat") -> "Stat":
        return Stat(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean; NaN when nothing was counted."""
        return self.total / self.count if self.count else float("nan")


@dataclass(slots=True)
class Metrics:
    """An accumulator of named statistics of one step."""

    stats: dict[str, Stat] = field(default_factory=dict)

    def put(self, name: str, value: float | Tensor, count: float = 1.0) -> Self:
        """Adds an observation `value`, already a mean over `count` items."""
        stat = Stat(float(value) * count if count else 0.0, count)
        self.stats[name] = self.stats[name] + stat if name in self.stats else stat
        return self

    def mean(self, name: str, values: Tensor, mask: Tensor) -> Self:
        """Adds the mean of `values` where `mask`."""
        count = int(mask.sum())
        return self.put(name, float(values[mask].double().mean()) if count else 0.0, count)

    def update(self, other: "Metrics | Mapping[str, float]") -> Self:
        """Adds every statistic of `other`."""
        items = other.stats if isinstance(other, Metrics) else {k: Stat(float(v)) for k, v in other.items()}
        for name, stat in items.items():
            self.stats[name] = self.stats[name] + stat if name in self.stats else stat
        return self

    def values(self) -> dict[str, float]:
        """Name -> value, sorted by name."""
        return {name: self.stats[name].value for name in sorted(self.stats)}
