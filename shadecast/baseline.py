"""What something usually takes on a nominal replica, and what a deviation says of a replica's speed.

A deployment has two: how long a request takes, and, where it streams, how long an item takes. The second hardly
depends on what was asked, so streams are measured by it as soon as their items are seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from shadecast import capacity as cap

_MEMORY = 200.0
"""Observations that a slow mean remembers."""
_MIN_FOR_REFERENCE = 5.0
_MIN_FOR_SENSITIVITY = 20.0
_NOISE_RATE = 0.005
_MEAN_TO_SIGMA = 1.2533
"""Standard deviation of a normal distribution over its mean absolute deviation."""
_IMPLAUSIBLE = 0.7
"""Log speed above what two standard deviations allow that is still believed."""


@dataclass(slots=True)
class SlowMean:
    """One replica's slow means: of log time at nominal load and headroom, and of the headroom meanwhile."""

    log_work: float = 0.0
    headroom: cap.Headroom = cap.NO_HEADROOM
    weight: float = 0.0


class Baseline:
    """Log of the usual time (the median over replicas), the spread of one observation around it."""

    def __init__(self) -> None:
        self.reference: float | None = None
        self.noise = 0.5

    def refer(self, means: Iterable[SlowMean]) -> None:
        """Take the median over the replicas that take traffic; without any the last one stays."""
        usual = [mean.log_work for mean in means if mean.weight >= _MIN_FOR_REFERENCE]
        if usual:
            self.reference = median(usual)

    def observe(
        self,
        mean: SlowMean,
        log_alone: float,
        headroom: cap.Headroom,
        sensitivity: cap.Sensitivity,
        residual: float,
        *,
        settled: bool,
    ) -> float:
        """Learn from one time and return the log speed that it shows beyond what the headroom explains.

        `log_alone` is the log time with the replica's load taken out, `residual` the estimate before. NaN while no
        reference is known. A time that is too short to be true counts only as far as it is plausible. While the
        headroom is not `settled` nobody knows which one the request felt: no sensitivity is learned from it.
        """
        gamma = sensitivity.gamma
        work = log_alone + cap.explained(gamma, headroom)
        mean.weight = min(mean.weight + 1.0, _MEMORY)
        rate = 1.0 / mean.weight
        h = mean.headroom
        if settled and mean.weight >= _MIN_FOR_SENSITIVITY:
            deviation = (headroom[0] - h[0], headroom[1] - h[1], headroom[2] - h[2])
            sensitivity.observe(deviation, mean.log_work - cap.explained(gamma, h) - log_alone)
        mean.log_work += rate * (work - mean.log_work)
        mean.headroom = (
            h[0] + rate * (headroom[0] - h[0]),
            h[1] + rate * (headroom[1] - h[1]),
            h[2] + rate * (headroom[2] - h[2]),
        )
        if self.reference is None:
            return math.nan
        shown = self.reference - work
        self.noise += _NOISE_RATE * (min(abs(shown - residual), 3.0) * _MEAN_TO_SIGMA - self.noise)
        return min(shown, residual + 2.0 * self.noise + _IMPLAUSIBLE)
