"""Where a request may go: the coordinator's table, Serve's membership, locality, and where sessions live.

Membership is Serve's, whatever the table says. What is known is laid out once for each table or change of membership
(`shadecast.pick`), and a choice is a few look-ups.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RunningReplica

from serve_app.sessions import Sessions
from shadecast.calls import Calls
from shadecast.config import CHOICES, TABLE_TTL_S, Config
from shadecast.locality import Locality
from shadecast.pick import PickTable, ToldQueues, cost_table
from shadecast.rescue import VERY_SLOW, Ejections, slow_replicas
from shadecast.sessions import worth_waiting_s
from shadecast.tables import level
from shadecast.types import RoutingTable

_FORGET_TABLE_S = 60.0
"""After so long without a coordinator, replicas that the last table kept out are used again."""
_DRAWS_FOR_ROOM = 3
"""Of many replicas, a pick may fall on full ones while others have places."""
_TIMERS_EARLY_S = 0.005
"""uvloop's timers may come a moment before their time."""
_OFFERED = 16
"""Replicas that a request which has come back is offered."""


class Routes:
    """All that one router knows of its replicas. `own_place` is the node and zone that it prefers, None if it does not.

    Calls come from the router's event loop.
    """

    def __init__(self, deployment: str, calls: Calls[Any], config: Config, own_place: Callable[[], Any]) -> None:
        self._deployment, self._calls, self._config, self._own_place = deployment, calls, config, own_place
        self.random = random.random
        self.table: RoutingTable | None = None
        self._table_s = 0.0
        self.replicas: list[RunningReplica] = []
        """Those that are alive, by the index of the picks."""
        self.alive: list[tuple[str, str, int]] = []
        """Their ids, nodes and greatest numbers of calls, as reported."""
        self._cost_key = (1.0, 0.0)
        self._costs = cost_table(*self._cost_key)
        self.picks = PickTable((), None, {}, {}, self._costs)
        self._laid_out_for = ""
        """The level that the picks were laid out for."""
        self.fresh_until_s = -math.inf
        """Until then that is the full rule's."""
        self.has_near = False
        """Whether some replica is preferred because it is near."""
        self._told = ToldQueues()
        self._reported: dict[str, int] = {}
        """Own calls per replica, as the coordinator was told last."""
        self.mirrored: list[tuple[str, float]] = []
        """Replicas on trial, and which fraction of the requests is copied to them."""
        self.slow: Collection[str] = ()
        self._very_slow: frozenset[str] = frozenset()
        self.ejections = Ejections()
        self._locality = Locality((), (), None, None)
        self.sessions = Sessions(config, deployment)

    def configure(self, config: Config) -> None:
        """Go by other settings from now on."""
        self._config = config
        self.sessions.configure(config)

    # ------------------------------------------------------------------ what is known

    def take_table(self, table: RoutingTable) -> bool:
        """Go by a newer table from now on; an older one (reordered, or of a former epoch) is ignored."""
        held = self.table
        if held is not None and (table.epoch, table.version) <= (held.epoch, held.version):
            return False
        if held is None:
            self.sessions.forget()  # those placed meanwhile, by weights that other routers do not have
        self.table = table
        self._table_s = time.monotonic() - max(table.age_s, 0.0)
        self.slow = slow_replicas(table)
        self._very_slow = frozenset(slow_replicas(table, VERY_SLOW)) if self.slow else frozenset()
        self.lay_out()
        return True

    def set_replicas(self, replicas: Sequence[RunningReplica]) -> None:
        """Serve's membership."""
        self.replicas = list(replicas)
        self.alive = [(r.replica_id.unique_id, r.node_id or "", r.max_ongoing_requests) for r in replicas]
        self.ejections.keep({replica_id for replica_id, _, _ in self.alive})
        self.lay_out()

    def remove(self, replica_id: str) -> None:
        """A replica has died: once, however often that is said."""
        if replica_id in self.picks.index:
            self.set_replicas([r for r in self.replicas if r.replica_id.unique_id != replica_id])

    def count(self, replica_id: str) -> bool:
        """The number of calls on a replica has changed; whether it has a place."""
        i = self.picks.index.get(replica_id)
        if i is None:
            return False
        self.picks.count(i, self._calls.in_flight(replica_id))
        return self.picks.has_room(i)

    def told(self, replica_id: str, queue: float) -> None:
        """A replica's own count at this moment is fresher than any table's; what is on its way comes on top."""
        i = self.picks.index.get(replica_id)
        if i is not None:
            queue += self._calls.on_the_way(replica_id)
            self.picks.note(i, queue)
            self._told.note(replica_id, queue, self.picks.in_flight[i], time.monotonic())

    def eject(self, replica_id: str, loop: asyncio.AbstractEventLoop) -> None:
        """Leave out a replica that does not answer: a moment at first, longer each time until it does."""
        now_s, i = time.monotonic(), self.picks.index.get(replica_id)
        if i is not None:
            until_s = self.ejections.eject(replica_id, now_s)
            self.picks.eject(i, True)
            loop.call_later(until_s - now_s + _TIMERS_EARLY_S, self._readmit, replica_id)

    def answered(self, replica_id: str) -> None:
        """A replica has accepted a call."""
        if self.ejections and self.ejections.accepted(replica_id):
            self._readmit(replica_id)

    def _readmit(self, replica_id: str) -> None:
        i = self.picks.index.get(replica_id)
        if i is not None and replica_id not in self.ejections.at(time.monotonic()):
            self.picks.eject(i, False)

    def reported(self) -> None:
        """The coordinator is told of the present counts: the next table's queues have them."""
        self._reported = self._calls.all_in_flight()

    def lay_out(self) -> None:
        """Precompute the picks for the present replicas and table."""
        table, picks_of = self.table, [replica.replica_id.unique_id for replica in self.replicas]
        if table is not None and (table.slots, table.batch_half) != self._cost_key:
            self._cost_key = (table.slots, table.batch_half)
            self._costs = cost_table(*self._cost_key)
        self._laid_out_for = self.level
        now_s = time.monotonic()
        self.picks = picks = PickTable(
            picks_of,
            table,
            self._calls.all_in_flight(),
            self._reported,
            self._costs,
            seen=self._told.at(now_s),
            limits=[replica.max_ongoing_requests for replica in self.replicas],
            live_only=self._laid_out_for != "table",
        )
        for replica_id in self.ejections.at(now_s) if self.ejections else ():
            if (i := picks.index.get(replica_id)) is not None:
                picks.eject(i, True)
        collapsed = {picks.index[replica_id] for replica_id in self._very_slow if replica_id in picks.index}
        node, zone = self._own_place()
        self._locality = Locality(picks.pool, self.replicas, node, zone, collapsed)
        self.has_near = self._locality.any_near
        self.fresh_until_s = self._table_s + TABLE_TTL_S if self._laid_out_for == "table" else -math.inf
        self.sessions.update(picks, table)
        rows = [row for row in table.rows if row.mirror_fraction > 0.0] if table is not None else []
        self.mirrored = [(row.replica_id, row.mirror_fraction) for row in rows if row.replica_id in picks.index]

    # ------------------------------------------------------------------ the fail-open ladder

    @property
    def level(self) -> str:
        """The rung, by the table's age."""
        return level(self.table, time.monotonic() - self._table_s)

    def check_level(self) -> str:
        """The level, with the picks laid out for it."""
        if time.monotonic() > self.fresh_until_s and self.level != self._laid_out_for:
            self.lay_out()
        return self._laid_out_for

    # ------------------------------------------------------------------ where to

    def preferred(self, pending_request: PendingRequest) -> Sequence[int] | None:
        """Replicas to pick from first; None if all are alike. Each preference is tried once per request."""
        return self._locality.pool(pending_request.metadata.multiplexed_model_id, pending_request.routing_context)

    def pick(self, pool: Sequence[int] | None = None, without: int = -1) -> int:
        """A pick that has a place; -1 if some draws found none.

        An unresponsive replica accepts late, and its own count of requests does not have those that are on their way:
        going by it alone, hundreds would be sent, and neither Serve's limit of waiting requests nor any other router's
        choice would see them.
        """
        for _ in range(_DRAWS_FOR_ROOM):
            i = self.picks.pick(self.random, CHOICES, without, pool)
            if i < 0 or self.picks.has_room(i):
                return i
        return -1

    def next_best(self, tried: str) -> list[list[RunningReplica]]:
        """Ranks for a request that has come back from `tried`: the best, a few more that are well, then all others.

        Serve asks a rank's replicas for their queues at the same time.
        """
        drawn, away = _sample(self.allowed(), _OFFERED), {tried, *self.slow}
        return [[self.replicas[i] for i in rank] for rank in self.picks.ranks(drawn, away, self.random, CHOICES)]

    def two_random(self) -> list[int]:
        """What Serve's own rule looks at, of those that the last table has not kept out."""
        allowed = self.allowed()
        return _sample([i for i in allowed if self.picks.has_room(i)] or allowed, 2)

    def allowed(self) -> Sequence[int]:
        """What the table has not kept out; all, if that is long ago."""
        forgotten = time.monotonic() - self._table_s > _FORGET_TABLE_S
        return range(len(self.picks.ids)) if forgotten else self.picks.pool

    def affinity(self, metadata: Any) -> int:
        """Index of the replica that has a request's session, or of a fallback; -1 if none takes traffic."""
        away = self._very_slow if self._laid_out_for == "table" else frozenset()
        if self.ejections:
            away = away | self.ejections.at(time.monotonic())
        return self.sessions.find(metadata, away, self.picks, self.table)

    @property
    def migration_s(self) -> float:
        """What a session's move costs, in seconds; 0 while the time of a request is not known."""
        return worth_waiting_s(self._config.session, self.table)


def _sample(pool: Sequence[int], most: int) -> list[int]:
    return list(pool) if len(pool) <= most else random.sample(pool, most)
