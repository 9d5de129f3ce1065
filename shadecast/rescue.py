"""Which requests to take off a replica that has become slow or does not answer (design section 5).

A hog leaves the requests that it caught throttled until it ends: quick detection bounds their number, only sending them
again helps them. That is rare by construction: only idempotent requests, only once each, only from a replica whose
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
from typing import Generic, TypeVar

from shadecast.budget import Budget
from shadecast.calls import Call
from shadecast.pick import load_cost
from shadecast.types import RoutingTable

C = TypeVar("C", bound=Call)

SLOW = 0.25
"""Of the median capacity: slower replicas are left by requests that they hold."""
VERY_SLOW = 0.1
"""Of the median capacity: from slower ones sessions fall back to others, too."""
STREAM_COST = 0.1
"""Of a second attempt: what a stream that goes on costs, since what it has given need not be computed again."""
_SAVED_UP = 8.0
"""Second attempts that may be saved up, and that there are at the start: about the requests that one replica holds."""
_LEAST_PATIENCE_S = 0.25
"""Two and a half periods of a CPU quota: a throttled, but otherwise idle replica answers within one."""
_PATIENCE = 10.0
"""Times the usual wait."""
_WHILE_HEARD = 3.0
"""Times that patience, with a replica whose streams go on: it is busy, not starved."""
_STREAM_PATIENCE = 4.0
"""Times what streams usually take to their next item."""
_GAIN = 2.0
"""Starting anew must be expected to end in at most 1/_GAIN of the time that staying takes."""
_EJECTED_S = 1.5
"""The first ejection; each one after it is twice as long, three times, until the replica accepts something."""
_LONGEST_EJECTION = 3


def budget(fraction: float) -> Budget:
    """Of second attempts: `fraction` of the requests, and some at the start, since the first hog may come early."""
    return Budget(fraction, _SAVED_UP, _SAVED_UP if fraction > 0.0 else 0.0)


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
        """Beyond this a replica counts as unresponsive."""
        return max(_LEAST_PATIENCE_S, _PATIENCE * self._mean_s)

    def is_over(self, waited_s: float, heard_ago_s: float) -> bool:
        """Whether to leave a replica that has not accepted for so long; its streams gave the last item so long ago."""
        limit_s = self.limit_s
        return waited_s > (limit_s if heard_ago_s > limit_s else _WHILE_HEARD * limit_s)


class StreamPatience:
    """How long a stream may keep its reader waiting, by what streams of the same deployment take: exponential means."""

    __slots__ = ("_first_s", "_gap_s")

    def __init__(self) -> None:
        self._first_s = self._gap_s = math.nan

    def ended(self, first_item_s: float, items: int, duration_s: float, per_item: float = 1.0) -> None:
        """A stream went well; NaN where its reader was too late to show the first item's time.

        `per_item` are the tokens of its items where these are known: then streams differ in them, not in their pace.
        """
        if not math.isfinite(first_item_s) or items < 1:
            return
        self._first_s = _towards(self._first_s, first_item_s)
        if items > 1:
            self._gap_s = _towards(self._gap_s, max(duration_s - first_item_s, 0.0) / (items - 1) / per_item)

    def limit_s(self, items: int, per_item: float = 1.0) -> float:
        """For the item after `items`, of so many tokens each; infinite while nothing is known."""
        usual_s = self._gap_s * per_item if items else self._first_s
        return max(_LEAST_PATIENCE_S, _STREAM_PATIENCE * usual_s) if math.isfinite(usual_s) else math.inf


def _towards(mean_s: float, seen_s: float) -> float:
    return mean_s + 0.05 * (seen_s - mean_s) if math.isfinite(mean_s) else seen_s


class Ejections:
    """Replicas that are left out because they do not answer: outlier ejection, longer each time in a row."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[int, float]] = {}
        """How often in a row, and until when."""

    def __bool__(self) -> bool:
        return bool(self._held)

    def eject(self, replica_id: str, now_s: float) -> float:
        """Leave a replica out from now on; the end of that. Within an ejection nothing new is learned."""
        times, until_s = self._held.get(replica_id, (0, -math.inf))
        if now_s >= until_s:
            until_s = now_s + _EJECTED_S * 2.0**times
            self._held[replica_id] = (min(times + 1, _LONGEST_EJECTION), until_s)
        return until_s

    def accepted(self, replica_id: str) -> bool:
        """A replica has answered: whether it was held against it that it did not."""
        return self._held.pop(replica_id, None) is not None

    def keep(self, alive: Container[str]) -> None:
        """Forget those that are gone."""
        self._held = {replica_id: held for replica_id, held in self._held.items() if replica_id in alive}

    def at(self, now_s: float) -> frozenset[str]:
        """Those that are left out now."""
        return frozenset(replica_id for replica_id, (_, until_s) in self._held.items() if now_s < until_s)


def slow_replicas(table: RoutingTable, part: float = SLOW) -> dict[str, float]:
    """Capacity of the replicas below `part` of the median of those that take traffic.

    Taken by live capacities where these are lower: published ones fall slowly.
    """
    serving = [min(row.capacity, row.live_capacity or row.capacity) for row in table.rows if row.share > 0.0]
    if len(serving) < 2:
        return {}
    limit = part * median(serving)
    return {row.replica_id: row.capacity for row in table.rows if row.capacity < limit}


def is_alone_unresponsive(others: Collection[str], slow: Container[str], ejected: Container[str]) -> bool:
    """Whether most of the `others` are neither slow nor ejected: then it is the replica that does not answer.

    At a peak those that are well are unresponsive for a moment, one after the other. What is taken off them would all
    go to the last one, or to the one that is not well.
    """
    return 2 * sum(replica_id not in slow and replica_id not in ejected for replica_id in others) > len(others)


def worth_moving(calls: Iterable[C], table: RoutingTable, scores: Mapping[str, float], now_s: float) -> list[C]:
    """Calls that gain most elsewhere first. `scores`: relative times of one more request on each eligible replica.

    Staying is expected to take what the slow replica needs for the whole request less the call's age, and at least as
    long again as it has taken already; starting anew takes the best score times the reference time.
    """
    slow = slow_replicas(table)
    others = [score for replica_id, score in scores.items() if replica_id not in slow]
    if not slow or not others or not table.reference_s > 0.0:
        return []
    best = min(others)
    gains: list[tuple[float, int, C]] = []
    for call in calls:
        capacity, age_s = slow.get(call.replica_id), call.age_s(now_s)
        if capacity is None or not math.isfinite(age_s):
            continue
        alone_s = table.reference_s * call.cost
        whole_s = alone_s * load_cost(call.others + 1.0, table.slots, table.batch_half) / max(capacity, 1e-3)
        stay_s = max(whole_s - age_s, age_s)
        anew_s = alone_s * best
        if age_s > alone_s and stay_s > _GAIN * anew_s:
            gains.append((anew_s - stay_s, len(gains), call))
    return [call for _, _, call in sorted(gains, key=lambda gain: gain[:2])]


@dataclass(frozen=True, slots=True)
class Stalled(Generic[C]):
    """A stream under way whose reader waits for its next item."""

    call: C
    waited_s: float
    items: int
    """That it has given so far."""
    per_item: float = 1.0
    """Tokens of each, where these are known."""


def worth_resuming(stalled: Iterable[Stalled[C]], patience: StreamPatience, slow: Container[str]) -> list[C]:
    """Streams on slow replicas that wait beyond the patience, those that wait longest first.

    Nothing is expected of the time that is left: the next item of a replica that hardly runs may take until its hog
    ends, and what the stream has given so far need not be computed again elsewhere.
    """
    found = [
        each
        for each in stalled
        if each.call.replica_id in slow and each.waited_s > patience.limit_s(each.items, each.per_item)
    ]
    return [each.call for each in sorted(found, key=lambda each: -each.waited_s)]
