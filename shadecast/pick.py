"""Score tables and the d-choice pick: the hot path of every request.

A `PickTable` is built once per routing table (or change of membership). A decision then costs `d` look-ups,
whatever the number of replicas: draw d replicas at random and take the one with the least score, `g(n) / C_i`. Scores
are kept up to date as the router's own calls come and go (`shadecast.calls` counts them; here they are only scored).

`g` is the cost of being one of n requests on a nominal replica (design section 5):

    batching (b0 > 0):  g(n) = 1 + min(n, c)/b0 + max(n - c, 0)/c * (1 + c/b0)
    FIFO slots:         g(n) = 1 + max(n - c, 0)/c + 0.05 n/c

with c slots. The queue is estimated as `q_i = Q_i + (1 + (R - 1)/2) * (mine_now - mine_then)` with R routers: Q_i comes
from the table or, fresher, from the replica's answer to this router's last request there; what this router did since
says half of what the others did, on average (taking it for all of it, R, amplified noise; docs/decisions/0020).
Random choice among d breaks herding (Mitzenmacher 2001); d = 4 because the scores differ by capacity too.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from shadecast.types import RoutingTable

_MAX_QUEUE = 4096
"""Longest queue that the cost table tells apart; beyond it all are equally bad."""
_MIN_CAPACITY = 1e-3
_FULL = 1e9
"""Added to the score of a replica that has all the requests that it takes."""
_OTHERS = 0.5
"""How far this router's own changes are taken for those of each other router."""
_DRAWS = (range(0), *(range(d - 1) for d in range(1, 65)))
"""After the first draw, by the number of choices."""
_TOLD_S = 1.5
_TIE = 0.9
"""A score must be better by a tenth to count: capacities are not known more exactly, and routers must not herd."""


def load_cost(n: float, slots: float, batch_half: float) -> float:
    """g(n), the relative time of a request that is one of `n` on a nominal replica."""
    c = max(slots, 1.0)
    over = max(n - c, 0.0) / c
    if batch_half > 0.0:
        return 1.0 + min(n, c) / batch_half + over * (1.0 + c / batch_half)
    return 1.0 + over + 0.05 * n / c


def cost_table(slots: float, batch_half: float, length: int = _MAX_QUEUE) -> list[float]:
    """`load_cost` of a request that finds q others there, for q = 0 .. length - 1."""
    return [load_cost(q + 1.0, slots, batch_half) for q in range(length)]


def table_scores(table: RoutingTable) -> dict[str, float]:
    """Relative time of one more request on each replica, by the table alone.

    All routers see the same; sessions move by these, not by what one router has just noticed.
    """
    return {
        row.replica_id: load_cost(max(row.queue, 0.0) + 1.0, table.slots, table.batch_half)
        / max(row.capacity, _MIN_CAPACITY)
        for row in table.rows
    }


class ToldQueues:
    """Queue lengths that replicas told with their last acceptance: for a moment they are better than a table's."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[float, int, float]] = {}

    def note(self, replica_id: str, queue: float, mine: int, now_s: float) -> None:
        """A replica has told its queue, while this router had so many calls there."""
        self._told[replica_id] = (queue, mine, now_s)

    def at(self, now_s: float) -> dict[str, tuple[float, int]]:
        """Those that hold still, each with this router's own count then; older ones are forgotten."""
        self._told = {key: told for key, told in self._told.items() if told[2] >= now_s - _TOLD_S}
        return {key: (queue, mine) for key, (queue, mine, _) in self._told.items()}


def copied_to(mirrored: Sequence[tuple[str, float]], draw: float) -> str:
    """The replica on trial that a request is copied to, by its fraction of them and a draw from [0, 1); "" for none."""
    for replica_id, fraction in mirrored:
        draw -= fraction
        if draw < 0.0:
            return replica_id
    return ""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a score is made of: cost / capacity."""

    queue: float
    cost: float
    capacity: float
    full: bool
    """It has all the requests that it takes, by this estimate, or is ejected."""


class PickTable:
    """Everything that a pick looks up, laid out by index.

    `pick` changes nothing; who follows a pick says so by `commit`. `in_flight` are the router's own calls per index,
    set by `count`.
    """

    __slots__ = (
        *("_base", "_cost", "_ejected", "_inverse", "_last", "_limit", "_partial", "_routers", "_then"),
        *("ids", "in_flight", "index", "pool", "scores", "share"),
    )

    def __init__(
        self,
        ids: Sequence[str],
        table: RoutingTable | None,
        mine_now: Mapping[str, int],
        mine_at_table: Mapping[str, int],
        cost: list[float],
        *,
        seen: Mapping[str, tuple[float, int]] | None = None,
        limits: Sequence[float] | None = None,
        live_only: bool = False,
    ) -> None:
        """Lay out `table` for the replicas `ids` that are alive here.

        `mine_now` and `mine_at_table` count this router's own calls now and when the table was counted. `seen` holds
        queue lengths that replicas told lately, each with this router's own count then; they replace the table's.
        Replicas that the table does not know get no traffic while it names others; if none of those that are
        alive is eligible by the table (it is missing, or all that it names are gone), all are.
        `limits` are the calls that each replica takes at most: one that seems full is picked only where all do.
        `live_only` leaves out what was forecast, for a table that is older than forecasts are good for.
        """
        self.ids = tuple(ids)
        self.index = {replica_id: i for i, replica_id in enumerate(self.ids)}
        self.in_flight = [mine_now.get(replica_id, 0) for replica_id in self.ids]
        self._cost = cost
        self._routers = 1.0 + _OTHERS * (max(table.routers, 1) - 1.0) if table is not None else 1.0
        rows = {row.replica_id: row for row in table.rows} if table is not None else {}
        count = len(self.ids)
        self.share = [0.0] * count
        self._inverse = [1.0] * count
        self._base = [0.0] * count
        self._then = [0] * count
        """Own calls when the queue was told."""
        self._ejected = [False] * count
        self._limit = [float(limit) for limit in limits] if limits is not None else [float(_MAX_QUEUE)] * count
        for i, replica_id in enumerate(self.ids):
            row = rows.get(replica_id)
            if row is None:
                continue
            capacity = row.live_capacity if live_only and row.live_capacity > 0.0 else row.capacity
            self.share[i] = row.share
            self._inverse[i] = 1.0 / max(capacity, _MIN_CAPACITY)
            told, mine = (seen or {}).get(replica_id) or (row.queue, mine_at_table.get(replica_id, 0))
            self._base[i] = told - self._routers * mine
            self._then[i] = mine
        if not any(self.share):
            self.share = [1.0] * count
        self.pool = [i for i in range(count) if self.share[i] > 0.0]
        self._partial = any(self.share[i] < 1.0 for i in self.pool)
        self._last = -1
        """The replica of the last pick that was followed; -1 while a scan may begin anywhere."""
        self.scores = [self.score(i) for i in range(count)]

    # ------------------------------------------------------------------ what has changed since

    def count(self, i: int, calls: int) -> None:
        """This router now has so many calls on the replica at index `i`."""
        self.in_flight[i] = calls
        self.scores[i] = self.score(i)

    def note(self, i: int, queue: float) -> None:
        """The replica at index `i` has told its queue length, all routers' requests, just now."""
        self._base[i] = queue - self._routers * self.in_flight[i]
        self._then[i] = self.in_flight[i]
        self.scores[i] = self.score(i)

    def eject(self, i: int, out: bool) -> None:
        """Take the replica at index `i` for full, or no longer."""
        self._ejected[i] = out
        self.scores[i] = self.score(i)

    def commit(self, i: int) -> None:
        """The pick of `i` is followed: where all are looked at, the next one begins behind it."""
        self._last = i

    # ------------------------------------------------------------------ questions

    def has_room(self, i: int) -> bool:
        """Whether the replica at index `i` has fewer of this router's calls than it takes, and is not ejected."""
        return self.in_flight[i] < self._limit[i] and not self._ejected[i]

    def takes(self, i: int) -> bool:
        """Whether the replica at index `i` has a place by all routers' calls, too."""
        return self.in_flight[i] < self._limit[i] and self.scores[i] < _FULL

    def queue(self, i: int) -> float:
        """Requests of all routers on the replica at index `i`, as told, with this router's own changes since."""
        return max(self._base[i] + (self._routers - 1.0) * self._then[i] + self.in_flight[i], 0.0)

    def speed(self, i: int) -> float:
        """Capacity of the replica at index `i`, 1 = nominal."""
        return 1.0 / self._inverse[i]

    def score(self, i: int) -> float:
        """Predicted relative time of one more request on the replica at index `i`; a full one is worse than others."""
        queue = self._base[i] + self._routers * self.in_flight[i]
        cost = self._cost
        at = int(queue + 0.5) if queue > 0.0 else 0
        score = (cost[at] if at < len(cost) else cost[-1]) * self._inverse[i]
        return score if queue < self._limit[i] and not self._ejected[i] else score + _FULL

    def parts(self, i: int, less: int = 0) -> Parts:
        """What the score of the replica at index `i` is made of; was, with so many of this router's calls fewer."""
        queue = max(self._base[i] + self._routers * (self.in_flight[i] - less), 0.0)
        cost = self._cost[min(int(queue + 0.5), len(self._cost) - 1)]
        return Parts(queue, cost, 1.0 / self._inverse[i], queue >= self._limit[i] or self._ejected[i])

    def score_within(self, replica_id: str) -> float:
        """The same of a request that is on a replica already; 0 where that is gone."""
        i = self.index.get(replica_id)
        if i is None:
            return 0.0
        queue = self._base[i] + self._routers * self.in_flight[i]
        at = min(int(queue - 0.5), len(self._cost) - 1) if queue > 1.0 else 0
        return self._cost[at] * self._inverse[i]

    def pick(
        self, random: Callable[[], float], choices: int = 4, without: int = -1, pool: Sequence[int] | None = None
    ) -> int:
        """Index of the replica for the next request, -1 if there is none. `random` gives floats in [0, 1).

        `choices` replicas are drawn with replacement (all, if there are no more), and the least score wins. Where all
        are looked at, ties go round-robin: a CPU quota, say, recovers between requests. A replica with a share below 1
        is eligible for that fraction of the draws. `without` leaves one out; `pool` is a part of the eligible replicas
        to pick from, in rising order. Draws and compares numbers only: nothing is allocated.
        """
        if pool is None:
            pool = self.pool
        count = len(pool)
        if count <= choices or self._partial or without >= 0:
            return self._pick_carefully(random, choices, without, pool)
        scores = self.scores
        best = pool[int(random() * count)]
        best_score = scores[best] * _TIE
        for _ in _DRAWS[choices]:
            i = pool[int(random() * count)]
            score = scores[i]
            if score < best_score:
                best, best_score = i, score * _TIE
        return best

    def _pick_carefully(self, random: Callable[[], float], choices: int, without: int, pool: Sequence[int]) -> int:
        """The pick where some draws do not count: few replicas, partial shares, one left out."""
        count = len(pool)
        if not count:
            return -1
        shares, scores = self.share, self.scores
        all_of_them = count <= choices
        # ties must not always fall to the first
        k = bisect_right(pool, self._last) % count if all_of_them and self._last >= 0 else int(random() * count)
        best, best_score = -1, 0.0
        drawn, tries = 0, count if all_of_them else 4 * choices
        while tries and drawn < choices:
            tries -= 1
            i = pool[k]
            k = (k + 1 if k + 1 < count else 0) if all_of_them else int(random() * count)
            share = shares[i]
            if i == without or (share < 1.0 and random() >= share):
                continue
            drawn += 1
            score = scores[i]
            if best < 0 or score < best_score:
                best, best_score = i, score * _TIE
        if best >= 0 or pool[k] == without:
            return best
        # none was eligible this time; of a part of the pool, a share holds against the others, too
        return pool[k] if pool is self.pool else self._pick_carefully(random, choices, without, self.pool)

    def ranks(
        self, drawn: Sequence[int], away: Collection[str], random: Callable[[], float], choices: int
    ) -> list[list[int]]:
        """Of `drawn`, the best one, a few more that are well, then all others; no rank is empty.

        Not well are those that have no place, are ejected or in `away`.
        """
        drawn = sorted(drawn, key=lambda i: (self.scores[i], random()))
        well = [i for i in drawn if self.has_room(i) and self.ids[i] not in away]
        first = well[:choices]  # those that seem to have a place may be full of other routers' requests
        return [rank for rank in (first[:1], first[1:], [i for i in drawn if i not in first]) if rank]

    def power_of_two(self, random: Callable[[], float]) -> int:
        """Power of two choices over this router's own counts: what is left without a usable table."""
        count = len(self.ids)
        if count == 0:
            return -1
        a = int(random() * count)
        b = int(random() * (count - 1)) if count > 1 else a
        if count > 1 and b >= a:
            b += 1
        return a if self.in_flight[a] <= self.in_flight[b] else b
