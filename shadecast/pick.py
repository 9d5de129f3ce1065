"""Score tables and the d-choice pick: the hot path of every request.

A `PickTable` is built once per routing table (or change of membership). A decision then costs `d` look-ups,
whatever the number of replicas: draw d replicas at random, score each as `g(n) / C_i`, take the least.

`g` is the cost of being one of n requests on a nominal replica (design section 5):

    batching (b0 > 0):  g(n) = 1 + min(n, c)/b0 + max(n - c, 0)/c * (1 + c/b0)
    FIFO slots:         g(n) = 1 + max(n - c, 0)/c + 0.05 n/c

with c slots. The queue is estimated between tables as `q_i = Q_i + R * (mine_now - mine_at_table)`, R routers.
Random choice among d breaks herding (Mitzenmacher 2001); d = 4 because the scores differ by capacity too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from shadecast.types import RoutingTable

_MAX_QUEUE = 4096
"""Longest queue that the cost table tells apart; beyond it all are equally bad."""
_MIN_CAPACITY = 1e-3
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


class PickTable:
    """Everything that a pick looks up, laid out by index. Immutable but for the router's own counts.

    `in_flight` is the router's live count per index; the owner adds and subtracts as requests start and end.
    """

    __slots__ = ("_base", "_cost", "_full", "_inverse", "_partial", "_routers", "ids", "in_flight", "index", "share")

    def __init__(
        self,
        ids: Sequence[str],
        table: RoutingTable | None,
        mine_now: Mapping[str, int],
        mine_at_table: Mapping[str, int],
        cost: list[float],
    ) -> None:
        """Lay out `table` for the replicas `ids` that are alive here.

        `mine_now` and `mine_at_table` count this router's own requests now and when the table was counted.
        Replicas that the table does not know get no traffic while it names others; if none of those that are
        alive is eligible by the table (it is missing, or all that it names are gone), all are.
        """
        self.ids = tuple(ids)
        self.index = {replica_id: i for i, replica_id in enumerate(self.ids)}
        self.in_flight = [mine_now.get(replica_id, 0) for replica_id in self.ids]
        self._cost = cost
        self._routers = float(max(table.routers, 1)) if table is not None else 1.0
        rows = {row.replica_id: row for row in table.rows} if table is not None else {}
        count = len(self.ids)
        self.share = [0.0] * count
        self._inverse = [1.0] * count
        self._base = [0.0] * count
        for i, replica_id in enumerate(self.ids):
            row = rows.get(replica_id)
            if row is None:
                continue
            self.share[i] = row.share
            self._inverse[i] = 1.0 / max(row.capacity, _MIN_CAPACITY)
            self._base[i] = row.queue - self._routers * mine_at_table.get(replica_id, 0)
        if not any(self.share):
            self.share = [1.0] * count
        self._full = [i for i in range(count) if self.share[i] >= 1.0]
        self._partial = [i for i in range(count) if 0.0 < self.share[i] < 1.0]

    def score(self, i: int) -> float:
        """Predicted relative time of one more request on the replica at index `i`."""
        queue = self._base[i] + self._routers * self.in_flight[i]
        if queue <= 0.0:
            return self._cost[0] * self._inverse[i]
        return self._cost[min(int(queue + 0.5), len(self._cost) - 1)] * self._inverse[i]

    def pick(self, random: Callable[[], float], choices: int = 4) -> int:
        """Index of the replica for the next request, -1 if there is none. `random` gives floats in [0, 1).

        A replica with a share below 1 is eligible for that fraction of the picks.
        """
        full, partial = self._full, self._partial
        count = len(full)
        if partial:
            eligible = [i for i in partial if random() < self.share[i]]
            if eligible or not count:
                return self._pick_mixed(random, choices, eligible or partial)
        if count <= choices:
            drawn: Sequence[int] = full
            if not count:
                return -1
            start = int(random() * count)  # ties must not always fall to the first
        else:
            drawn = [full[int(random() * count)] for _ in range(choices)]
            start = 0
        cost, inverse, base, routers, mine = self._cost, self._inverse, self._base, self._routers, self.in_flight
        last = len(cost) - 1
        best, best_score = -1, 0.0
        for k in range(start, start + len(drawn)):
            i = drawn[k - len(drawn)]
            queue = base[i] + routers * mine[i] + 0.5
            score = cost[0 if queue < 1.0 else last if queue > last else int(queue)] * inverse[i]
            if best < 0 or score < best_score * _TIE:
                best, best_score = i, score
        return best

    def _pick_mixed(self, random: Callable[[], float], choices: int, eligible: list[int]) -> int:
        """The pick when replicas with a partial share are in this time: d draws from both kinds together."""
        pool_full, extra = len(self._full), len(eligible)
        pool = pool_full + extra
        if pool <= choices:
            drawn = [*self._full, *eligible]
            start = int(random() * pool)
            drawn = drawn[start:] + drawn[:start]
        else:
            picks = (int(random() * pool) for _ in range(choices))
            drawn = [self._full[k] if k < pool_full else eligible[k - pool_full] for k in picks]
        return min(drawn, key=self.score)

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
