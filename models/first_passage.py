"""Probability that a drifting random walk reaches a limit in time: memory on its way to the out-of-memory kill."""

from __future__ import annotations

import math


def first_passage(distance: float, drift_per_s: float, deviation: float, horizon_s: float) -> float:
    """Chance that Brownian motion (`drift_per_s`, `deviation` per root second) climbs `distance` by `horizon_s`.

    `P = Phi((m H - d) / (s sqrt H)) + exp(2 m d / s^2) Phi((-d - m H) / (s sqrt H))` (inverse Gaussian law,
    Schroedinger 1915; Cox and Miller, 1965, 5.7). NaN in, NaN out.
    """
    if math.isnan(distance + drift_per_s + deviation + horizon_s):
        return math.nan
    if distance <= 0:
        return 1.0
    if horizon_s <= 0:
        return 0.0
    if deviation <= 0:
        return 1.0 if drift_per_s * horizon_s >= distance else 0.0
    root = deviation * math.sqrt(horizon_s)
    direct = _phi((drift_per_s * horizon_s - distance) / root)
    exponent = 2.0 * drift_per_s * distance / deviation**2
    tail = _phi((-distance - drift_per_s * horizon_s) / root)
    reflected = math.exp(min(exponent + math.log(tail), 0.0)) if tail > 0 else 0.0
    return min(1.0, direct + reflected)


def _phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))
