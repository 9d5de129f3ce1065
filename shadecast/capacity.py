"""Capacity of a replica: what it does now, what its node is about to do, and how fast an estimate may move.

Speeds are relative (1 = nominal) and logs of them are added. A replica's log speed is explained as

    log speed = residual + sum_r gamma_r * log headroom_r(node)            headroom = 1 - exogenous load

so that a change of its node's headroom counts at once (telemetry sees a hog within its period, before any request
is hurt), while finished *and unfinished* requests correct the residual. An unfinished request that is older than
expected is a censored observation: it enters with its expected log duration given that it has lasted so long
already (the E step of the censored normal model, Tobin 1958, Schmee and Hahn 1979).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace

from shadecast.types import HORIZONS_S, RESOURCES, Forecast, NodeSnapshot

_MIN_HEADROOM = 0.05
_NO_SIGNAL = 0.2
"""Change of log headroom that telemetry's own noise makes, too."""
_FOLLOW = 0.25
"""Part of such a change that a sample brings."""
_MIN_LOG_SPEED = math.log(0.01)
_MAX_LOG_SPEED = math.log(4.0)
_PRIOR_SIGMA = 0.5
_SLOW_HALF_LIFE_S = 60.0
_SURPRISE = 9.0
"""Three standard errors: a difference that is not chance."""
_MANY = 8.0
"""Decayed number of observations that are enough to stand for themselves."""
QUANTILE_WEIGHTS = (0.3, 0.4, 0.3)
"""Of the values at the quantiles .1, .5 and .9 in an expected value: the mean of a normal distribution exactly, and
nearly of most others (Swanson's rule; Hurst, Brown and Swanson 2000)."""
_SPAN_STEPS = 8
_RESIDENCES = 2.5
"""Requests live through this many times their median residence, if they are long: what is forecast counts so far."""
_TABLE_LIFE_S = 1.5
"""A table is made, travels and is in use for so long: a veto must be there before what it is for."""
_VETO_HOLD_S = 0.5
"""Half of what lies between two samples: a forecast's end of a disturbance is not known more exactly."""
HALF_LIFE_S = 2.0
"""Of the live capacity estimate."""
RISE_PER_S, FALL_PER_S = 0.3, 0.6
"""Capacity may move by so much of nominal in a second."""
VETO_SPEED = 0.15
"""Predicted speed under which a node is nearly left."""
VETO_FACTOR = 0.05
"""What a veto leaves of the capacity."""
_VETO_MAX_FRACTION = 0.25
"""A veto of many nodes at once is more likely a bad model."""
_DOWN = math.log(0.5)
"""Expected change of log speed beyond which a node is expected to be down."""
_SQRT_2 = math.sqrt(2.0)
_SQRT_2_PI = math.sqrt(2.0 * math.pi)

Headroom = tuple[float, float, float]
"""Log headroom per resource, in the order of RESOURCES; 0 where unknown."""

NO_HEADROOM: Headroom = (0.0, 0.0, 0.0)
PRIOR_GAMMA: Headroom = (1.0, 0.0, 0.0)
"""Before anything is learned a deployment is taken to be bound by CPU alone."""


def log_headroom(load_fraction: float) -> float:
    """Log of what exogenous load leaves of a resource; 0 (no effect) for a value that is missing."""
    if not math.isfinite(load_fraction):
        return 0.0
    return math.log(min(max(1.0 - load_fraction, _MIN_HEADROOM), 1.0))


def headroom_now(snapshot: NodeSnapshot | None) -> Headroom:
    """Log headroom per resource that a node's telemetry shows."""
    if snapshot is None:
        return NO_HEADROOM
    return (
        log_headroom(snapshot.cpu_background_fraction),
        log_headroom(snapshot.memory_fraction),
        log_headroom(snapshot.network_background_fraction),
    )


def smoothed(before: Headroom, now: Headroom) -> Headroom:
    """The headroom to go by after a new sample: what telemetry's own noise may be counts in part, more at once.

    Equal nodes whose samples differ by noise would else get unequal shares, each in turn.
    """
    changes = [b - a for a, b in zip(before, now, strict=True)]
    cpu, memory, network = (
        a + (_FOLLOW if abs(change) < _NO_SIGNAL else 1.0) * change for a, change in zip(before, changes, strict=True)
    )
    return (cpu, memory, network)


def horizon_weights(age_s: float, span_s: float) -> tuple[float, ...]:
    """Weights [horizon] of a forecast's rows in the mean over `span_s` from now, of a forecast `age_s` old.

    The trajectory is linear between horizons and held beyond the last one. It is indexed by clock time: what a
    forecast said of a moment holds however old it is.
    """
    weights = [0.0] * len(HORIZONS_S)
    for step in range(_SPAN_STEPS):
        ahead_s = age_s + span_s * (step + 0.5) / _SPAN_STEPS
        after = min(bisect_left(HORIZONS_S, ahead_s), len(HORIZONS_S) - 1)
        before = max(after - 1, 0)
        gap_s = HORIZONS_S[after] - HORIZONS_S[before]
        part = min((ahead_s - HORIZONS_S[before]) / gap_s, 1.0) if gap_s and ahead_s > HORIZONS_S[before] else 0.0
        weights[before] += (1.0 - part) / _SPAN_STEPS
        weights[after] += part / _SPAN_STEPS
    return tuple(weights)


def censored_excess(z: float) -> float:
    """E[Y - mu | Y > mu + z sigma] / sigma for a normal Y: the inverse Mills ratio."""
    if z > 6.0:
        return z + 1.0 / z
    survival = 0.5 * math.erfc(z / _SQRT_2)
    return math.exp(-0.5 * z * z) / (_SQRT_2_PI * survival)


class _Decayed:
    """Decayed sum of values and of their weights."""

    __slots__ = ("half_life_s", "total", "weight")

    def __init__(self, half_life_s: float, total: float = 0.0, weight: float = 0.0) -> None:
        self.half_life_s = half_life_s
        self.total = total
        self.weight = weight

    @property
    def mean(self) -> float:
        """Mean of the values; 0 without any."""
        return self.total / self.weight if self.weight > 1e-6 else 0.0


class SpeedEstimate:
    """Live log speed of one replica, from requests, beyond what its node's headroom explains.

    Decayed means of the same observations over a minute, some seconds, and less than one. The slowest one counts until
    a faster one differs from it by more than chance allows, `|difference| * sqrt(weight) / noise > 3`. Then that one
    counts, and the slower one starts anew from it (`settle`): what was before a change is no evidence, and the new
    level must not fade when requests become few.

    A fast mean alone follows its noise: with token streams, whose sizes differ e-fold, that noise made unequal what
    is equal and cost more than a slow node did (docs/decisions/0030).
    """

    __slots__ = ("_all", "_fast", "_plain", "_slow", "_updated_s")

    def __init__(self, half_life_s: float, now_s: float) -> None:
        self._slow = _Decayed(_SLOW_HALF_LIFE_S)
        self._fast = (_Decayed(half_life_s), _Decayed(half_life_s / 4.0))
        self._plain = _Decayed(half_life_s)
        self._all = (self._slow, *self._fast, self._plain)
        self._updated_s = now_s

    def advance(self, now_s: float) -> None:
        """Let older observations fade; a clock that went back changes nothing."""
        elapsed_s = now_s - self._updated_s
        if elapsed_s > 0.0:
            for mean in self._all:
                fade = 0.5 ** (elapsed_s / mean.half_life_s)
                mean.total *= fade
                mean.weight *= fade
            self._updated_s = now_s

    def observe(self, residual_log_speed: float, weight: float = 1.0) -> None:
        """Add one observation of log speed minus what the headroom explains; NaN is ignored."""
        if math.isfinite(residual_log_speed):
            value = weight * min(max(residual_log_speed, _MIN_LOG_SPEED), _MAX_LOG_SPEED)
            for mean in self._all:
                mean.total += value
                mean.weight += weight

    def settle(self, noise_sigma: float) -> None:
        """Take changes that are not chance into the slower means; once a tick."""
        middle, quick = self._fast
        for slower, faster in ((middle, quick), (self._slow, middle)):
            if (faster.mean - slower.mean) ** 2 * faster.weight > _SURPRISE * (noise_sigma * noise_sigma + 1e-9):
                slower.total, slower.weight = faster.total, faster.weight

    def renew(self) -> None:
        """Start the slow mean anew from that over some seconds, if that holds enough: what was before is in doubt."""
        middle = self._fast[0]
        if middle.weight >= _MANY:
            self._slow.total, self._slow.weight = middle.total, middle.weight

    @property
    def weight(self) -> float:
        """Decayed number of recent observations."""
        return self._plain.weight

    @property
    def recent(self) -> float:
        """Mean of the recent observations, noise and all, for tests that bring their own; 0 without any."""
        return self._plain.mean

    def uncertainty(self, noise_sigma: float) -> float:
        """Standard error of `residual`."""
        variance = noise_sigma * noise_sigma + 1e-9
        return math.sqrt(variance / (self._slow.weight + variance / _PRIOR_SIGMA**2))

    def residual(self, noise_sigma: float, extra_sum: float = 0.0, extra_weight: float = 0.0) -> float:
        """Log speed that the headroom does not explain.

        `noise_sigma` is the spread of one observation, around a normal prior at 0 with spread 0.5: few noisy requests
        say little. `extra_*` are observations of this moment that are not kept, of requests that have not ended.
        """
        variance = noise_sigma * noise_sigma + 1e-9
        estimate = self._slow.total / (self._slow.weight + variance / _PRIOR_SIGMA**2)
        for fast in self._fast:
            weight = fast.weight + extra_weight
            mean = (fast.total + extra_sum) / weight if weight > 1e-6 else 0.0
            if (mean - estimate) ** 2 * weight > _SURPRISE * variance:  # three standard errors
                estimate = mean
        return estimate


class Sensitivity:
    """gamma_r >= 0: how a deployment's speed follows each resource's headroom, learned over its replicas.

    Decayed least squares of log speed on log headroom, both as deviations from each replica's own slow mean, shrunk
    towards `PRIOR_GAMMA` and solved for non-negative gamma by coordinate descent.
    """

    _PRIOR_STRENGTH = 2.0
    _FADE = 0.9998
    """Per observation: about 5,000 are remembered."""

    def __init__(self) -> None:
        self.gamma: Headroom = PRIOR_GAMMA
        size = len(RESOURCES)
        self._xx = [[0.0] * size for _ in range(size)]
        self._xy = [0.0] * size

    def observe(self, headroom_deviation: Headroom, log_speed_deviation: float) -> None:
        """Add one finished request's deviations from its replica's slow means."""
        cpu, memory, network = headroom_deviation
        small = abs(cpu) < _NO_SIGNAL and abs(memory) < _NO_SIGNAL and abs(network) < _NO_SIGNAL
        if small or not math.isfinite(log_speed_deviation):
            return  # many small deviations are noise of telemetry, and would pull gamma to 0 (errors in variables)
        for a, x in enumerate(headroom_deviation):
            self._xy[a] = self._xy[a] * self._FADE + x * log_speed_deviation
            row = self._xx[a]
            for b, other in enumerate(headroom_deviation):
                row[b] = row[b] * self._FADE + x * other

    def solve(self) -> Headroom:
        """The present gamma, each in [0, 3]."""
        gamma = list(self.gamma)
        for _ in range(10):
            for a, prior in enumerate(PRIOR_GAMMA):
                rest = sum(self._xx[a][b] * gamma[b] for b in range(len(gamma)) if b != a)
                strength = self._PRIOR_STRENGTH
                gamma[a] = (self._xy[a] - rest + strength * prior) / (self._xx[a][a] + strength)
                gamma[a] = min(max(gamma[a], 0.0), 3.0)
        self.gamma = (gamma[0], gamma[1], gamma[2])
        return self.gamma


def explained(gamma: Headroom, headroom: Headroom) -> float:
    """sum_r gamma_r * log headroom_r."""
    return gamma[0] * headroom[0] + gamma[1] * headroom[1] + gamma[2] * headroom[2]


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a forecast says of one node, for one deployment, over the look-ahead."""

    log_change: float = 0.0
    """Gated change of log speed from now to what is expected over the look-ahead; 0 without a usable forecast."""
    worst_log_speed: float = 0.0
    """Log speed at the worst moment, by medians, relative to an idle node."""
    memory_high: float = 0.0
    """Upper quantile of the memory fraction at the longest horizon."""
    alarm: bool = False
    """The forecast is allowed to veto (its alarms have been right)."""


NO_OUTLOOK = Outlook()


def outlook(
    forecast: Forecast | None,
    now: Headroom | None,
    gamma: Headroom,
    age_s: float,
    ahead_s: float,
) -> Outlook:
    """What a forecast that is `age_s` old says of a request placed at headroom `now` that stays `ahead_s` (median).

    The change of speed is to the *expected* log headroom over what requests live through: calibrated quantiles say how
    sure they are, and an onset that may come is worth its probability. The worst moment is looked for until
    the next table can be in use; memory that runs out loses all requests, so it counts as far as the forecast goes.
    The worst is by medians, more likely than not: what only may come is in the expected value already.
    A broken or missing part counts as no change.
    """
    if forecast is None or now is None:
        return NO_OUTLOOK
    weights = horizon_weights(age_s, min(_RESIDENCES * ahead_s, HORIZONS_S[-1]))
    soonest = min(bisect_right(HORIZONS_S, age_s), len(HORIZONS_S) - 1)
    latest = max(bisect_right(HORIZONS_S, age_s + ahead_s + _TABLE_LIFE_S) - 1, soonest)
    change, worst, memory_high = 0.0, 0.0, 0.0
    for k, resource in enumerate(RESOURCES):
        rows = forecast.quantiles.get(resource)
        if not rows or len(rows) != len(HORIZONS_S):
            continue
        loads = [sum(w * row[q] for w, row in zip(weights, rows, strict=True)) for q in range(3)]
        worst_load = max(row[1] for row in rows[soonest : latest + 1])
        if not all(math.isfinite(load) for load in (*loads, worst_load)):
            continue
        gate = min(max(forecast.gate.get(resource, 0.0), 0.0), 1.0)
        expected = sum(w * log_headroom(load) for w, load in zip(QUANTILE_WEIGHTS, loads, strict=True))
        change += gate * gamma[k] * (expected - now[k])
        worst += gamma[k] * log_headroom(worst_load)
        if resource == "memory":
            memory_high = rows[-1][-1]
    return Outlook(change, worst, memory_high, forecast.veto_allowed)


def limit_down(outlooks: Mapping[str, Outlook]) -> dict[str, Outlook]:
    """The same, with no more than a quarter of the nodes, at least one, expected to be down: the surest ones.

    The others are expected to lose half of their speed at most. Each node expects for itself, so that many may expect
    the same wrong thing; requests would all go to those few that do not.
    """
    down = sorted((view.log_change, node_id) for node_id, view in outlooks.items() if view.log_change < _DOWN)
    allowed = max(int(_VETO_MAX_FRACTION * len(outlooks)), 1)
    limited = {node_id: replace(outlooks[node_id], log_change=_DOWN) for _, node_id in down[allowed:]}
    return {**outlooks, **limited}


def limit_rate(before: float, wanted: float, elapsed_s: float) -> float:
    """`wanted` capacity, moved from `before` by no more than the additive rates allow in `elapsed_s`."""
    if not math.isfinite(wanted):
        return before
    up, down = RISE_PER_S * max(elapsed_s, 0.0), FALL_PER_S * max(elapsed_s, 0.0)
    return min(max(wanted, before - down), before + up)


def vetoes(outlooks: Mapping[str, Outlook], memory_limit: float) -> frozenset[str]:
    """Nodes to leave because their forecast is dire: the worst ones, at most a quarter of all."""
    dire = [
        (view.worst_log_speed - (10.0 if view.memory_high > memory_limit else 0.0), node_id)
        for node_id, view in outlooks.items()
        if view.alarm and (view.worst_log_speed < math.log(VETO_SPEED) or view.memory_high > memory_limit)
    ]
    allowed = int(_VETO_MAX_FRACTION * len(outlooks))
    return frozenset(node_id for _, node_id in sorted(dire)[:allowed])


class Veto:
    """The nodes that are left because their forecast is dire, and a moment longer."""

    def __init__(self) -> None:
        self._until_s: dict[str, float] = {}

    def step(self, outlooks: Mapping[str, Outlook], memory_limit: float, now_s: float) -> frozenset[str]:
        """The nodes to leave now: the dire ones first, at most a quarter of all."""
        dire = vetoes(outlooks, memory_limit)
        self._until_s.update(dict.fromkeys(dire, now_s + _VETO_HOLD_S))
        self._until_s = {n: until_s for n, until_s in self._until_s.items() if until_s > now_s and n in outlooks}
        allowed = int(_VETO_MAX_FRACTION * len(outlooks))
        lately = sorted((n for n in self._until_s if n not in dire), key=lambda n: (-self._until_s[n], n))
        return frozenset([*dire, *lately[: allowed - len(dire)]])
