"""How long a request takes when n share a replica, learned from (in-flight at start, duration) pairs.

Two families explain nearly all model servers: slots (flat up to c requests, then they queue) and batching (a straight
rise, speed halved at batch b0). Both are `load_cost` of `pick.py`; the one with the least squared log error wins.

Observed times are judged by the curve that fits. Replicas are chosen by one that trusts it no further than loads were
seen: where all of them cost the same, the fit is open, and by an open curve the replica that seems fastest by a little
gets everything until it is saturated (docs/decisions/0051).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from shadecast.pick import load_cost

_BINS = 64
_SLOTS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)
_HALVES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_MIN_OBSERVATIONS = 200.0
_MIN_PER_BIN = 5.0
_MIN_BINS = 4
_UNBOUNDED = 4096.0
"""Slots of a replica that batches whatever comes."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Slots c and half-speed batch b0 (0: FIFO slots) of a deployment's replicas."""

    slots: float = 1.0
    batch_half: float = 0.0
    learned: bool = False

    def correction(self, others: float) -> float:
        """`factor` for judging observed times; 1 until the curve is learned.

        Correcting by a curve that is too steep makes busy replicas look fast, which makes them busier still; without
        any correction busy replicas look slow, which corrects itself.
        """
        return self.factor(others) if self.learned else 1.0

    def factor(self, others: float) -> float:
        """Expected time of a request that finds `others` on the replica, relative to one that finds none."""
        return load_cost(others + 1.0, self.slots, self.batch_half) / load_cost(1.0, self.slots, self.batch_half)

    def throughput(self) -> float:
        """Requests that a nominal replica finishes in the time that one alone takes."""
        alone = load_cost(1.0, self.slots, self.batch_half)
        return self.slots * alone / load_cost(self.slots, self.slots, self.batch_half)


class CurveLearner:
    """Decayed means of log duration per in-flight count, and the best curve through them."""

    def __init__(self, slots: float, batch_half: float) -> None:
        self._given = (math.nan, math.nan)
        self.fix(slots, batch_half)
        self._count = np.zeros(_BINS)
        self._sum = np.zeros(_BINS)
        grid = [(c, 0.0) for c in _SLOTS] + [(_UNBOUNDED, b) for b in _HALVES]
        self._grid = grid
        self._usual = self._most = 1.0
        """Requests that share a replica on average, in whole numbers so that tables change rarely, and at most."""
        queue = np.arange(_BINS)
        self._log_factors = np.array([[math.log(Curve(c, b).factor(float(n))) for n in queue] for c, b in grid])

    def fix(self, slots: float, batch_half: float) -> None:
        """Positive `slots` or `batch_half` come from the configuration and end the learning of both."""
        if (slots, batch_half) == self._given:
            return
        self._given = (slots, batch_half)
        self._fixed = slots > 0.0 or batch_half > 0.0
        self.curve = Curve(max(slots, 1.0) if slots or not batch_half else _UNBOUNDED, batch_half, self._fixed)

    def observe(self, others: float, log_duration: float) -> None:
        """Add one finished request: `log_duration` with the replica's own speed taken out."""
        if self._fixed or not 0.0 <= others < _BINS or not math.isfinite(log_duration):
            return
        n = int(others)
        self._count[n] += 1.0
        self._sum[n] += log_duration

    def fit(self) -> Curve:
        """Choose the curve anew once enough different loads were seen; older observations fade."""
        if self._fixed:
            return self.curve
        used = self._count >= _MIN_PER_BIN
        if self._count.sum() >= _MIN_OBSERVATIONS and used.sum() >= _MIN_BINS:
            weight = np.sqrt(self._count[used])  # a bin's mean is never exact: large bins must not rule alone
            mean = self._sum[used] / self._count[used]
            residual = mean - self._log_factors[:, used]
            centred = residual - (residual * weight).sum(axis=1, keepdims=True) / weight.sum()
            errors = (centred**2 * weight).sum(axis=1)
            slots, half = self._grid[int(np.argmin(errors))]
            self.curve = Curve(slots, half, learned=True)
            self._usual = 1.0 + round(float(self._count @ np.arange(_BINS) / self._count.sum()))
            self._most = 1.0 + float(np.flatnonzero(used)[-1])
        if self._count.sum() > 20.0 * _MIN_OBSERVATIONS:
            self._count *= 0.5
            self._sum *= 0.5
        return self.curve

    def cautious(self, *, streams: bool) -> Curve:
        """The curve to choose replicas by, no flatter than the loads that were seen allow.

        Streams share what a replica has: where more of them cost nothing yet, the usual load halves the speed, so that
        replicas are filled in proportion to their capacity. A given curve, and one that is not learned, is as it is.
        """
        fitted = self.curve
        if self._fixed or not fitted.learned:
            return fitted
        if fitted.batch_half > 0.0:
            return replace(fitted, batch_half=min(fitted.batch_half, self._most))
        if streams:
            return Curve(_UNBOUNDED, min(fitted.slots, self._usual), learned=True)
        return replace(fitted, slots=min(fitted.slots, self._most))
