"""Percentiles of a stream in bounded memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Final

__all__ = ["QuantileSketch"]

_LEAST: Final = 1e-9
_GREATEST: Final = 1e15
_ZERO: Final = -(10**9)  # the bucket of 0, before all others
_PENDING: Final = 512


class QuantileSketch:
    """Counts values so that any percentile can be told to within a stated relative error.

    As long as there are at most `distinct` different values, all are kept and percentiles are exact (turns
    and tool calls stay so for ever). From then on it is a DDSketch (Masson et al., arXiv 1908.10693): bucket
    i holds the values in (g^(i-1), g^i], with g = (1 + e) / (1 - e), and stands for 2 g^i / (g + 1), which is
    within e of each of them. Magnitudes below 1e-9 count as 0, those above 1e15 as 1e15, so there are at
    most 2,764 buckets for each sign at e = 0.01. Count, sum, least and greatest value are always exact.

    Args:
        relative_error: e, in (0, 1).
        distinct: how many different values are kept as they are.

    Raises:
        ValueError: an argument is out of range.
    """

    __slots__ = (
        "_buckets",
        "_count",
        "_distinct",
        "_exact",
        "_factor",
        "_greatest",
        "_least",
        "_negative",
        "_pending",
        "_scale",
        "_total",
        "relative_error",
    )

    def __init__(self, relative_error: float = 0.01, *, distinct: int = 256) -> None:
        if not 0.0 < relative_error < 1.0 or distinct < 0:
            raise ValueError(f"needs 0 < relative_error < 1 and distinct >= 0: {relative_error=} {distinct=}")
        self.relative_error = relative_error
        self._distinct = distinct
        self._factor = (1.0 + relative_error) / (1.0 - relative_error)
        self._scale = 1.0 / math.log(self._factor)
        # Values wait here to be counted many at a time: that is five times as fast as one by one.
        self._pending: list[float] = []
        self._exact: Counter[float] | None = Counter()
        self._buckets: Counter[int] = Counter()
        self._negative: Counter[int] = Counter()
        self._count = 0
        self._total = 0.0
        self._least = math.inf
        self._greatest = -math.inf

    def add(self, value: float) -> None:
        """Count a finite value; one that is not finite is left out."""
        pending = self._pending
        pending.append(value)
        if len(pending) >= _PENDING:
            self._fold()

    def merge(self, other: QuantileSketch) -> None:
        """Add all that another sketch counted; percentiles are as if this one had counted it.

        Raises:
            ValueError: the other has another relative error.
        """
        if other.relative_error != self.relative_error:
            raise ValueError(
                f"sketches of different relative errors: {self.relative_error} and {other.relative_error}"
            )
        self._fold()
        other._fold()
        self._count += other._count
        self._total += other._total
        self._least = min(self._least, other._least)
        self._greatest = max(self._greatest, other._greatest)
        if other._exact is None:
            self._leave_exact()
            self._buckets.update(other._buckets)
            self._negative.update(other._negative)
        elif self._exact is None:
            self._count_in_buckets(list(other._exact.elements()))
        else:
            self._exact.update(other._exact)
            if len(self._exact) > self._distinct:
                self._leave_exact()

    @property
    def count(self) -> int:
        """How many values were counted."""
        self._fold()
        return self._count

    @property
    def mean(self) -> float | None:
        """The mean; None if nothing was counted."""
        self._fold()
        return self._total / self._count if self._count else None

    @property
    def greatest(self) -> float | None:
        """The greatest value; None if nothing was counted."""
        self._fold()
        return self._greatest if self._count else None

    @property
    def exact(self) -> bool:
        """Whether percentiles are exact."""
        self._fold()
        return self._exact is not None

    def quantile(self, fraction: float) -> float | None:
        """Return the nearest-rank quantile: the value of rank ceil(fraction * count), the least for 0.

        Args:
            fraction: in [0, 1]; 0.5 is the median.

        Returns:
            The value, None if nothing was counted.

        Raises:
            ValueError: the fraction is not in [0, 1].
        """
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"a quantile's fraction must be in [0, 1], not {fraction}")
        self._fold()
        if not self._count:
            return None
        rank = max(1, math.ceil(fraction * self._count))
        if self._exact is not None:
            return _at_rank(sorted(self._exact.items()), rank)
        falling = sorted(self._negative.items(), reverse=True)
        ordered = [(-self._middle(index), count) for index, count in falling]
        ordered += [(self._middle(index), count) for index, count in sorted(self._buckets.items())]
        return min(max(_at_rank(ordered, rank), self._least), self._greatest)

    def __repr__(self) -> str:
        precision = "exact" if self.exact else f"relative error {self.relative_error:g}"
        return f"<QuantileSketch of {self.count} values, {precision}>"

    def _fold(self) -> None:
        """Count what is pending."""
        if not self._pending:
            return
        values, self._pending = self._pending, []
        total = sum(values)
        if not math.isfinite(total):
            values = [value for value in values if math.isfinite(value)]
            total = sum(values)
            if not values:
                return
        self._count += len(values)
        self._total += total
        self._least = min(self._least, min(values))
        self._greatest = max(self._greatest, max(values))
        if self._exact is None:
            self._count_in_buckets(values)
            return
        self._exact.update(values)
        if len(self._exact) > self._distinct:
            self._leave_exact()

    def _leave_exact(self) -> None:
        if self._exact is not None:
            values, self._exact = self._exact, None
            self._count_in_buckets(list(values.elements()))

    def _count_in_buckets(self, values: Sequence[float]) -> None:
        log, ceil, scale = math.log, math.ceil, self._scale
        usual = [value for value in values if _LEAST <= value <= _GREATEST]
        self._buckets.update([ceil(log(value) * scale) for value in usual])
        if len(usual) == len(values):
            return
        for value in values:
            if abs(value) < _LEAST:
                self._buckets[_ZERO] += 1
            elif not 0.0 < value <= _GREATEST:
                buckets = self._buckets if value > 0.0 else self._negative
                buckets[ceil(log(min(abs(value), _GREATEST)) * scale)] += 1

    def _middle(self, index: int) -> float:
        """Return what a bucket stands for."""
        return 0.0 if index == _ZERO else 2.0 * self._factor**index / (self._factor + 1.0)


def _at_rank(ordered: list[tuple[float, int]], rank: int) -> float:
    for value, count in ordered:
        rank -= count
        if rank <= 0:
            return value
    return ordered[-1][0]
