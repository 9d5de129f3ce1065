"""Statistics that may be looked at after every observation without losing their error bounds.

Three tools for the gate: a mean of correlated observations with an anytime-valid interval, a betting e-process on a
difference of error rates, and a CUSUM of errors. An e-value is non-negative evidence whose mean is at most 1
while the null hypothesis holds, so that it ever exceeds 1/alpha with probability alpha at most (Ville 1939), however
often one looks. No clock, no randomness; nothing here raises on finite input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_AUTOCORRELATION = 0.9
"""A few dozen buckets cannot tell stronger correlation apart."""
MIN_BUCKETS = 10.0
"""With fewer, correlation cannot be told from a difference: no interval."""
UNSOUND = 0.1
"""Excess error rate that a trial refutes before it lets a candidate pass."""
RAISED = 0.05
"""Excess error rate that the guard finds soonest."""
_BETS = ((0.8, 1.0), (0.15, 0.6), (0.05, 0.25))
"""(weight, bet). 1.0 alone would be ruined by one error, at 1 / (1 - UNSOUND)."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its anytime-valid interval; `count` is the sum of weights, `buckets` their effective number."""

    count: float
    buckets: float
    mean: float
    std_error: float
    lower: float
    upper: float


def critical_t(count: float, buckets: float, alpha: float, mixture: float) -> float:
    """How many standard errors the anytime-valid interval reaches to each side; inf while nothing can be said.

    Sequential t-test with a normal mixture of variance r = `mixture` over the effect size (Lai 1976; Goenen et al.
    2005; Wang and Ramdas 2024), error probability `alpha` a side: with K buckets, g = 1 + n r and
    B = (sqrt(g) / (2 alpha))^(2/K), it is sqrt((K - 1) (B - 1) / (1 - B/g)). For many buckets that becomes
    sqrt(2 (n r + 1) / (n r) * ln(sqrt(n r + 1) / (2 alpha))), the interval for a known variance.
    """
    if buckets <= 1.0:
        return math.inf
    g = 1.0 + count * mixture
    b = (math.sqrt(g) / (2.0 * alpha)) ** (2.0 / buckets)
    return math.sqrt((buckets - 1.0) * max(b - 1.0, 0.0) / (1.0 - b / g)) if b < g else math.inf


class BucketedMean:
    """Mean of observations in buckets of time, whose noise is shared within a bucket and correlated across buckets.

    The variance of the mean comes from the bucket means, times (1 + phi) / (1 - phi) for their lag-one correlation phi,
    which is corrected for its bias in short series (Marriott and Pope 1954); the degrees of freedom shrink by the same
    factor. Running sums: constant memory and time.
    """

    __slots__ = ("_bucket", "_c0", "_c1", "_c2", "_prev", "_q0", "_q1", "_q2", "_s", "_w", "_wm", "_wv")

    def __init__(self) -> None:
        self._bucket: int | None = None
        self._w = self._wv = 0.0  # the open bucket: weight, weighted sum
        self._prev = (0.0, 0.0)  # the last closed bucket: weight, mean
        self._s = self._wm = 0.0  # closed buckets: sums of w, w m
        self._q0 = self._q1 = self._q2 = 0.0  # sums of w^2, w^2 m, w^2 m^2
        self._c0 = self._c1 = self._c2 = 0.0  # neighbours: sums of w w', w w' (m + m'), w w' m m'

    def add(self, bucket: int, value: float, weight: float = 1.0) -> None:
        """Add one observation; a new number of `bucket` closes the one before."""
        if bucket != self._bucket and self._w > 0.0:
            w, m = self._w, self._wv / self._w
            self._s, self._wm, self._q0, self._q1, self._q2, self._c0, self._c1, self._c2 = self._sums_with(w, m)
            self._prev = (w, m)
            self._w = self._wv = 0.0
        self._bucket = bucket
        self._w += weight
        self._wv += weight * value

    def _sums_with(self, w: float, m: float) -> tuple[float, float, float, float, float, float, float, float]:
        w0, m0 = self._prev
        pair = w * w0
        return (
            self._s + w,
            self._wm + w * m,
            self._q0 + w * w,
            self._q1 + w * w * m,
            self._q2 + w * w * m * m,
            self._c0 + pair,
            self._c1 + pair * (m + m0),
            self._c2 + pair * m * m0,
        )

    def interval(self, alpha: float, mixture: float) -> Interval:
        """The interval as of now, the open bucket included as it stands."""
        if self._w <= 0.0:
            return Interval(0.0, 0.0, math.nan, math.nan, -math.inf, math.inf)
        s, wm, q0, q1, q2, c0, c1, c2 = self._sums_with(self._w, self._wv / self._w)
        mean, k = wm / s, s * s / q0
        if k < 2.0:
            return Interval(s, k, mean, math.nan, -math.inf, math.inf)
        g0 = max(q2 - 2.0 * mean * q1 + mean * mean * q0, 0.0)
        g1 = c2 - mean * c1 + mean * mean * c0
        phi = g1 / g0 if g0 > 0.0 else 0.0
        phi = (k * phi + 1.0) / (k - 3.0) if k > 4.0 else MAX_AUTOCORRELATION
        phi = min(max(phi, 0.0), MAX_AUTOCORRELATION)
        inflation = (1.0 + phi) / (1.0 - phi)
        error = math.sqrt(g0 / (1.0 - 1.0 / k) * inflation) / s
        reach = critical_t(s, k / inflation, alpha, mixture) if k >= MIN_BUCKETS else math.inf
        radius = reach * error if math.isfinite(reach) else math.inf
        return Interval(s, k, mean, error, mean - radius, mean + radius)


class Soundness:
    """Evidence that a candidate does not fail more often than a primary by `UNSOUND` or more, from matched pairs.

    X = [only the candidate failed] - [only the primary failed]; what fails on both says nothing. An e-process against
    E X >= UNSOUND, prod (1 - bet (X - UNSOUND)), mixed over fixed bets (Waudby-Smith and Ramdas, "Estimating means of
    bounded random variables by betting", 2023): a large one, so that pairs without an error prove it soon, and smaller
    ones, which an error does not ruin.
    """

    __slots__ = ("_products", "pairs")

    def __init__(self) -> None:
        self._products = [1.0] * len(_BETS)
        self.pairs = 0

    def add(self, candidate_failed: bool, primary_failed: bool) -> None:
        """Add one matched pair."""
        excess = float(candidate_failed) - float(primary_failed) - UNSOUND
        self.pairs += 1
        self._products = [
            min(product * (1.0 - bet * excess), 1e100) for product, (_, bet) in zip(self._products, _BETS, strict=True)
        ]

    @property
    def e_value(self) -> float:
        """Against "the candidate fails at least `UNSOUND` more often"."""
        return sum(weight * product for product, (weight, _) in zip(self._products, _BETS, strict=True))


class ErrorGuard:
    """CUSUM of one replica's errors, request by request, against what is usual elsewhere (Page 1954).

    Each request adds the log likelihood ratio of "fails `RAISED` more often than usual" to "fails as usual"; below
    nothing it begins anew. Errors that the others have as often never trip it, whatever their number.
    """

    __slots__ = ("_scores", "_usual", "failed", "requests", "score")

    def __init__(self) -> None:
        self.requests = self.failed = 0
        """Since the last time that nothing spoke against it."""
        self.score = 0.0
        self._usual = math.nan
        self._scores = (0.0, 0.0)

    def add(self, failed: bool, usual: float) -> None:
        """One request; `usual` is the greatest error rate, in (0, 1), that is still taken for usual."""
        if usual != self._usual:
            raised = min(usual + RAISED, 0.5 + 0.5 * usual)
            self._scores = math.log((1.0 - raised) / (1.0 - usual)), math.log(raised / usual)
            self._usual = usual
        self.score += self._scores[failed]
        self.requests += 1
        self.failed += failed
        if self.score <= 0.0:
            self.score, self.requests, self.failed = 0.0, 0, 0

    def excess(self) -> str:
        """In words."""
        return f"{self.failed} of its last {self.requests} requests failed, at most {self._usual:.1%} is usual"
