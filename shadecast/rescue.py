"""Which requests to take off a replica that has collapsed under them (design section 5).

A hog leaves the requests that it caught throttled until it ends: quick detection bounds their number, only sending them
again helps them. Rescue is rare by construction: only idempotent requests, only once each, only from a replica whose
capacity has fallen far below the others', only where starting anew elsewhere is expected to end in less than half the
time, and within a budget of 1 % of the requests. The first attempt is cancelled: hedging that leaves both attempts
running was unsafe in simulation.

A stream is helped where it can go on elsewhere after what its reader has had (`balance.resume`); that costs a tenth.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from shadecast.config import BalanceConfig
from shadecast.pick import load_cost
from shadecast.types import RoutingTable

_HARDLY = 0.4
"""Of the speed below which a replica has collapsed: slower ones hardly answer."""
_BURST = 8.0
"""Rescues that may be saved up, and that there are at the start: about the requests that one replica holds."""
_LEAST_PATIENCE_S = 0.25
"""Two and a half periods of a CPU quota: a throttled, but otherwise idle replica answers within one."""
_PATIENCE = 10.0
"""Times the usual wait."""
_WHILE_HEARD = 3.0
"""Times that patience, with a replica whose streams go on: it is busy, not starved."""
_STREAM_PATIENCE = 4.0
"""Times what streams usually take to their next item."""
_RESUMING = 0.1
"""Of a rescue: what a stream that goes on elsewhere costs, since what it has given need not be computed again."""
_GAIN = 2.0
"""Starting anew must be expected to end in at most 1/_GAIN of the time that staying takes."""


@dataclass(frozen=True, slots=True)
class Stuck:
    """An idempotent live request under way, as a candidate for rescue."""

    request_id: str
    replica_id: str
    age_s: float
    in_flight_at_start: float
    cost: float = 1.0


class Patience:
    """How long a replica may take to say that it takes a request.

    That needs none of the request's own work, so it takes about the same time whatever is asked, and far longer only
    where the replica's process hardly runs. Known to the router at once, where a table shows it seconds later.
    """

    __slots__ = ("_mean_s",)

    def __init__(self) -> None:
        self._mean_s = 0.0

    def accepted(self, after_s: float) -> None:
        """A replica has accepted a request after so long; exponential mean over about 50."""
        self._mean_s += 0.02 * (min(max(after_s, 0.0), _LEAST_PATIENCE_S) - self._mean_s)

    @property
    def limit_s(self) -> float:
        """Beyond this a replica counts as one that does not answer."""
        return max(_LEAST_PATIENCE_S, _PATIENCE * self._mean_s)

    def is_over(self, waited_s: float, heard_ago_s: float) -> bool:
        """Whether to leave a replica that has not accepted for so long; its streams gave the last item so long ago."""
        limit_s = self.limit_s
        return waited_s > (limit_s if heard_ago_s > limit_s else _WHILE_HEARD * limit_s)


@dataclass(frozen=True, slots=True)
class Stalled:
    """A stream under way whose reader waits for its next item."""

    request_id: str
    replica_id: str
    waited_s: float
    items: int
    """That it has given so far."""


class StreamPatience:
    """How long a stream may keep its reader waiting, by what streams of the same deployment take: exponential means."""

    __slots__ = ("_first_s", "_gap_s")

    def __init__(self) -> None:
        self._first_s = self._gap_s = math.nan

    def ended(self, first_item_s: float, items: int, duration_s: float) -> None:
        """A stream went well; NaN where its reader was too late to show the first item's time."""
        if not math.isfinite(first_item_s) or items < 1:
            return
        self._first_s = _towards(self._first_s, first_item_s)
        if items > 1:
            self._gap_s = _towards(self._gap_s, max(duration_s - first_item_s, 0.0) / (items - 1))

    def limit_s(self, items: int) -> float:
        """For the item after `items`; infinite while nothing is known."""
        usual_s = self._gap_s if items else self._first_s
        return max(_LEAST_PATIENCE_S, _STREAM_PATIENCE * usual_s) if math.isfinite(usual_s) else math.inf


def _towards(mean_s: float, seen_s: float) -> float:
    return mean_s + 0.05 * (seen_s - mean_s) if math.isfinite(mean_s) else seen_s


class RescueBudget:
    """Tokens: each request that starts earns a fraction of one, each rescue takes one, a stream that goes on less."""

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction
        self.tokens = _BURST if fraction > 0.0 else 0.0  # the first hog may come early

    def earn(self, requests: float = 1.0) -> None:
        """Requests have started."""
        self.tokens = min(self.tokens + self._fraction * requests, _BURST)

    def take(self) -> bool:
        """Whether one more rescue may be made; if so it is paid for."""
        return self._pay(1.0)

    def take_resuming(self) -> bool:
        """Whether one more stream may go on elsewhere; if so it is paid for."""
        return self._pay(_RESUMING)

    def _pay(self, cost: float) -> bool:
        if self.tokens < cost:
            return False
        self.tokens -= cost
        return True


def collapsed(table: RoutingTable, config: BalanceConfig) -> dict[str, float]:
    """Capacity of the replicas that have fallen below `rescue_speed` of the median of those that take traffic."""
    return _slower(table, config, config.rescue_speed)


def hardly_answering(table: RoutingTable, config: BalanceConfig) -> frozenset[str]:
    """Collapsed replicas that are so slow that sessions make a detour around them.

    Sessions leave later than requests are rescued: a detour for a moment's slowness costs caches in two places.
    """
    return frozenset(_slower(table, config, _HARDLY * config.rescue_speed))


def _slower(table: RoutingTable, config: BalanceConfig, part: float) -> dict[str, float]:
    """Those below `part` of the median, taken by live capacities where these are lower: published ones fall slowly."""
    serving = [min(row.capacity, row.live_capacity or row.capacity) for row in table.rows if row.share > 0.0]
    if len(serving) < 2 or config.rescue_fraction <= 0.0:
        return {}
    limit = part * median(serving)
    return {row.replica_id: row.capacity for row in table.rows if row.capacity < limit}


def is_alone_silent(others: Collection[str], slow: Container[str], silent: Container[str]) -> bool:
    """Whether most of the `others` have neither collapsed nor are silent: then it is the replica that does not accept.

    At a peak those that are well are silent for a moment, one after the other. What is taken off them would all go to
    the last one, or to the one that is not well.
    """
    return 2 * sum(replica_id not in slow and replica_id not in silent for replica_id in others) > len(others)


def worth_rescuing(
    stuck: Iterable[Stuck],
    table: RoutingTable,
    scores: Mapping[str, float],
    config: BalanceConfig,
) -> list[Stuck]:
    """Those that gain most first. `scores` are the relative times that one more request takes on each eligible replica.

    Staying is expected to take what the collapsed replica needs for the whole request less the request's age, and at
    least as long again as it has taken already; starting anew takes the best score times the reference time.
    """
    slow = collapsed(table, config)
    others = [score for replica_id, score in scores.items() if replica_id not in slow]
    if not slow or not others or not table.reference_s > 0.0:
        return []
    best = min(others)
    gains = []
    for each in stuck:
        capacity = slow.get(each.replica_id)
        if capacity is None or not math.isfinite(each.age_s):
            continue
        alone_s = table.reference_s * each.cost
        whole_s = (
            alone_s * load_cost(each.in_flight_at_start + 1.0, table.slots, table.batch_half) / max(capacity, 1e-3)
        )
        stay_s = max(whole_s - each.age_s, each.age_s)
        anew_s = alone_s * best
        if each.age_s > alone_s and stay_s > _GAIN * anew_s:
            gains.append((stay_s - anew_s, each))
    gains.sort(key=lambda pair: (-pair[0], pair[1].request_id))
    return [each for _, each in gains]


def worth_resuming(
    stalled: Iterable[Stalled], patience: StreamPatience, table: RoutingTable, config: BalanceConfig
) -> list[Stalled]:
    """Streams on collapsed replicas that wait beyond the patience, those that wait longest first.

    Nothing is expected of the time that is left: the next item of a replica that hardly runs may take until its hog
    ends, and what the stream has given so far need not be computed again elsewhere.
    """
    slow = collapsed(table, config)
    found = [each for each in stalled if each.replica_id in slow and each.waited_s > patience.limit_s(each.items)]
    return sorted(found, key=lambda each: (-each.waited_s, each.request_id))
