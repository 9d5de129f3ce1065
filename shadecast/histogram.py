"""Counts of durations in fixed buckets, so that the routers' can be added up and read by Prometheus.

Bounds are those of a 1-2-5 series: an objective of 0.1, 0.5 or 2 s lies on one. A report carries the counts since the
router's start, some 20 numbers whatever the traffic.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from shadecast.errors import MessageError

SCHEME = 1
"""Of the bounds that a report's counts are by; counts by other bounds are not read."""
BOUNDS_S: tuple[float, ...] = tuple(float(f"{m}e{e}") for e in range(-3, 3) for m in (1, 2, 5) if (m, e) != (5, 2))
"""Upper bounds, included, from 1 ms to 200 s; the last bucket has none."""
TICK_BOUNDS_S: tuple[float, ...] = tuple(float(f"{m}e{e}") for e in range(-4, 1) for m in (1, 2, 5))
"""Of a coordinator's ticks, 0.1 ms to 5 s."""


@dataclass(frozen=True, slots=True)
class Durations:
    """Finished counts: `counts` has one more entry than there are bounds. Empty where nothing is known."""

    counts: tuple[int, ...] = ()
    sum_s: float = 0.0

    def plus(self, more: Durations) -> Durations:
        """Both together."""
        if not (self.counts and more.counts):
            return self if self.counts else more
        return Durations(tuple(a + b for a, b in zip(self.counts, more.counts, strict=True)), self.sum_s + more.sum_s)

    def since(self, before: Durations) -> Durations:
        """What has come after `before`; nothing counts backwards."""
        if not (self.counts and before.counts):
            return self
        new = tuple(max(b - a, 0) for a, b in zip(before.counts, self.counts, strict=True))
        return Durations(new, max(self.sum_s - before.sum_s, 0.0))


class Histogram:
    """Counts durations."""

    __slots__ = ("_bounds_s", "_counts", "_sum_s")

    def __init__(self, bounds_s: Sequence[float] = BOUNDS_S) -> None:
        self._bounds_s = bounds_s
        self._counts = [0] * (len(bounds_s) + 1)
        self._sum_s = 0.0

    def add(self, duration_s: float) -> None:
        """One more; NaN and what is negative are none."""
        if duration_s >= 0.0:
            self._counts[bisect_left(self._bounds_s, duration_s)] += 1
            self._sum_s += duration_s

    def durations(self) -> Durations:
        """What was counted so far."""
        return Durations(tuple(self._counts), self._sum_s)


def to_message(durations: Durations) -> dict[str, object]:
    """For a report; empty where nothing was counted."""
    if not any(durations.counts):
        return {}
    return {"scheme": SCHEME, "counts": list(durations.counts), "sum_s": durations.sum_s}


def from_message(received: object, name: str) -> Durations:
    """From a report; nothing where the sender has none, or counts by other bounds. Raises MessageError."""
    if not isinstance(received, dict):
        raise MessageError(f"{name}: a mapping is expected, not {type(received).__name__}")
    if received.get("scheme") != SCHEME:
        return Durations()
    counts, sum_s = received.get("counts"), received.get("sum_s")
    if not (
        isinstance(counts, list)
        and len(counts) == len(BOUNDS_S) + 1
        and all(type(count) is int and count >= 0 for count in counts)
    ):
        raise MessageError(f"{name}: counts = {str(counts)[:100]}: {len(BOUNDS_S) + 1} counts are expected")
    if not (isinstance(sum_s, float) and 0.0 <= sum_s < float("inf")):
        raise MessageError(f"{name}: sum_s = {sum_s!r}: seconds are expected")
    return Durations(tuple(counts), sum_s)
