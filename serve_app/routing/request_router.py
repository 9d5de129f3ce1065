"""Serve's overrides: what a router does when Serve asks or tells it something.

The work is done elsewhere: where a request may go in `routes`, what becomes of it in `live_calls`. Whatever is wrong
with the control plane, requests go on by power of two choices.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from serve_app.ray_api import ServeRouter
from serve_app.routing.link import keep_in_touch
from serve_app.routing.live_call import LiveCall
from serve_app.routing.live_calls import LiveCalls
from serve_app.routing.watched_result import WatchedReplica
from serve_app.user_functions import UserFunction
from shadecast.config import CHOICES, Config, retired_settings, sections
from shadecast.errors import ConfigError
from shadecast.tables import table_message
from shadecast.types import RoutingTable

logger = logging.getLogger("ray.serve")

_OVERDUE = 4.0
"""Times the usual time from which on the coordinator hears of a request at once."""


class Router(ServeRouter):
    """Least predicted score among d random eligible replicas; power of two choices without a usable table."""

    observes = False
    """Whether requests go as Serve sends them, unless a later deployment says otherwise."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings: Any = {}
        """What this router was started with."""
        self.started_wall_s = time.time()
        self._in_force: tuple[bool, Any] | None = None
        self.calls = LiveCalls(uuid.uuid4().hex, self.deployment, Config(), lambda: self.own_place)
        self.explained = self.calls.explained.of(self)
        self.calls.observing = self.observes
        self.calls.second.on_died = self.on_replica_actor_died
        self._routes = self.calls.routes
        self._waiting_for_affinity = 0
        """Serve routes two requests per replica at a time: at most half of them may wait for their session's own."""
        self._control: asyncio.Task[None] | None = None
        self._table_wanted = False

    # ------------------------------------------------------------------ settings

    def initialize_state(self, config: Any = None, **unknown: Any) -> None:
        """Take `request_router_kwargs`: `{"config": {"trial": {...}, "balance": {...}}}`.

        A wrong value is logged and the defaults stay in force: a running deployment must not lose its router.
        Use `shadecast.config.Config.from_mapping` before deploying to have it refused there.
        """
        self.settings = sections({"config": config, **unknown})
        self.use_settings(self.observes, self.settings)

    def use_settings(self, observing: bool, settings: Any) -> None:
        """Go by these from the next request on: the newest that the deployment was given, as the coordinator knows."""
        if (observing, settings) == self._in_force:
            return
        self._in_force = (observing, settings)
        self.calls.observing = observing
        try:
            config = Config.from_mapping(settings)
        except ConfigError as error:
            logger.error(  # noqa: TRY400
                f"shadecast: {self.deployment}: request_router_kwargs: {error}. Routing goes on as it was."
            )
            return
        if gone := retired_settings(settings):
            logger.warning(f"shadecast: {self.deployment}: no settings any more, left out: {', '.join(gone)}")
        self.calls.configure(config)
        cost = config.balance.cost
        self.calls.cost_of = UserFunction("balance.cost", cost, "each request counts as 1") if cost else None

    # ------------------------------------------------------------------ choosing

    def choose_at_once(self, pending_request: PendingRequest) -> RunningReplica | None:
        """The usual choice, where it needs no comparison: nobody waits, and the replica is known to have a place.

        None leaves it to `choose_replicas`. A pick that is not used was not tried.
        """
        routes, metadata, context = self._routes, pending_request.metadata, pending_request.routing_context
        calls = self.calls
        calls.soon.catch_up()
        if calls.observing or calls.waiting.line or metadata.multiplexed_model_id:
            return None
        now_s = time.monotonic()
        if now_s > routes.fresh_until_s and routes.check_level() == "power_of_two":
            return None
        picks, prefixes = routes.picks, calls.prefixes
        if not metadata.session_id or prefixes.reads(pending_request):
            pool = routes.preferred(pending_request) if routes.has_near else None
            i = prefixes.pick(pending_request, pool) if prefixes.on else picks.pick(routes.random, CHOICES, -1, pool)
        elif routes.sessions.settled:
            i = routes.affinity(metadata)
        else:
            return None
        if i < 0:
            return None
        replica = routes.replicas[i]
        queue = self.queue_of(replica.replica_id)
        if queue is None or queue >= replica.max_ongoing_requests or not picks.has_room(i):
            context.tried_same_node = context.tried_same_az = False
            return None
        context.should_backoff = True
        if metadata.session_id:
            context.tried_same_node = True
        calls.choose_at_once(pending_request, i, now_s)
        return replica

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> Sequence[list[RunningReplica]]:
        """One choice. A request that comes back, because that replica is full, is offered others, the best first.

        One that nobody has asked to be sent (a pick for another way) never waits.
        """
        calls, routes = self.calls, self._routes
        calls.soon.catch_up()
        if calls.observing:
            return await self.choose_as_serve(candidate_replicas, pending_request)
        now_s = time.monotonic()
        level = "table" if now_s <= routes.fresh_until_s else routes.check_level()
        if pending_request is None:
            i = routes.pick()
            return [[routes.replicas[i]]] if i >= 0 else []
        context, metadata = pending_request.routing_context, pending_request.metadata
        call, prefixes = calls.find(metadata), calls.prefixes
        again, context.should_backoff = context.should_backoff, True
        by_prefix = prefixes.reads(pending_request)
        if metadata.session_id and not by_prefix:
            if not routes.sessions.settled:
                await routes.sessions.wait_for_secret()
            kept = await self._session_ranks(pending_request, call)
            if kept is not None:
                return kept
        pool = routes.preferred(pending_request) if routes.has_near or metadata.multiplexed_model_id else None
        by_two = pool is None and level == "power_of_two" and not by_prefix
        if call is None:
            return self._pick_only(pending_request, pool, by_two)
        if by_two:
            return self._serves_pair()
        if pool is None and (again or call.replica_id):
            return routes.next_best(call.replica_id)
        first = prefixes.pick(pending_request, pool)
        if first < 0 or not routes.picks.has_room(first):
            first = routes.pick(pool)
        if first < 0 and pool is not None:
            context.should_backoff = False  # the next preference, at once
            return []
        if first < 0 and routes.picks.pool:
            first = await calls.waiting.wait(routes.pick)
        if first < 0:
            return routes.next_best("")
        calls.choose(call, first, now_s)
        return [[routes.replicas[first]]]

    def _pick_only(
        self, pending_request: PendingRequest, pool: Sequence[int] | None, by_two: bool
    ) -> list[list[RunningReplica]]:
        """Who picks takes the first, and sends on a way of its own: no replica says whether it has a place."""
        routes, picks = self._routes, self._routes.picks
        if by_two:
            drawn = sorted(routes.two_random(), key=picks.queue)
        else:
            i = self.calls.prefixes.pick(pending_request, pool)
            i = i if i >= 0 and picks.has_room(i) else routes.pick(pool)
            drawn = [i if i >= 0 else picks.pick(routes.random, CHOICES)]
        if not drawn or drawn[0] < 0:
            return []
        picks.commit(drawn[0])
        self.calls.picked(pending_request, picks.ids[drawn[0]])
        return [[routes.replicas[i] for i in drawn]]

    def _serves_pair(self) -> list[list[RunningReplica]]:
        """Two random replicas, of which Serve takes the one with the shorter queue: its default rule.

        Serve asks a replica for its queue only where none of those offered is known: a newcomer whose first answer came
        too late would wait for ever beside one in steady use, so the unknown come first.
        """
        drawn = [self._routes.replicas[i] for i in self._routes.two_random()]
        unknown = [replica for replica in drawn if self.queue_of(replica.replica_id) is None]
        if unknown and len(unknown) < len(drawn):
            return [unknown, drawn]
        return [drawn] if drawn else []

    async def _session_ranks(
        self, pending_request: PendingRequest, call: LiveCall | None
    ) -> list[list[RunningReplica]] | None:
        """A session's own replica; None, which means the usual choice, once that is not worth waiting for.

        While it is full, a request waits for it as long as a move would cost, so that a burst scatters no session. One
        that does not tell its queue is asked twice: on a cold connection, Serve's first deadline is often too short.
        Then its sessions go to their fallbacks for a while.
        """
        routes, context = self._routes, pending_request.routing_context  # Serve's marks: no mixin reads them here
        own = routes.affinity(pending_request.metadata)
        if own >= 0 and context.tried_same_az and self.queue_of(routes.replicas[own].replica_id) is None:
            self.calls.second.eject_silent(routes.picks.ids[own])
            own = routes.affinity(pending_request.metadata)
        if own < 0:
            return None
        replica = routes.replicas[own]
        queue = self.queue_of(replica.replica_id)
        if queue is None:
            if context.tried_same_az:
                return None
            context.tried_same_az = context.tried_same_node
        elif call is not None and (
            not routes.picks.has_room(own) or (context.tried_same_node and queue >= replica.max_ongoing_requests)
        ):
            worth_s = routes.migration_s
            left_s = min(pending_request.created_at + worth_s - time.time(), worth_s)
            if left_s <= 0.0 or self._waiting_for_affinity >= self.max_num_routing_tasks // 2:
                return None
            self._waiting_for_affinity += 1
            try:
                await asyncio.sleep(min(left_s, worth_s / 4.0))
            finally:
                self._waiting_for_affinity -= 1
            own = routes.affinity(pending_request.metadata)
            if own < 0:
                return None
            replica = routes.replicas[own]
            context.should_backoff = False  # it has just paused
        context.tried_same_node = True
        if call is not None:
            self.calls.choose(call, own, time.monotonic())
        else:
            self.calls.picked(pending_request, routes.picks.ids[own])
        return [[replica]]

    # ------------------------------------------------------------------ what Serve tells of requests

    def asked(self, pending_request: PendingRequest) -> None:
        """A request waits for a replica."""
        self.calls.open(pending_request)

    def chosen(self, pending_request: PendingRequest, replica: RunningReplica) -> None:
        """Serve has taken one of those that it was offered."""
        replica_id, call = replica.replica_id.unique_id, self.calls.open(pending_request)
        if self.calls.observing and call.counts:
            picks = self._routes.picks
            i, ours = picks.index.get(replica_id), picks.pick(self._routes.random, CHOICES)
            if i is not None and ours >= 0 and self._routes.table is not None:
                self.calls.ledger.observed(call, picks.score(i), picks.score(ours), refused=picks.share[i] <= 0.0)
        self.calls.choose_by_id(call, replica_id)

    def given_up(self, pending_request: PendingRequest) -> None:
        """A request is cancelled while it waits."""
        call = self.calls.find(pending_request.metadata)
        if call is not None:
            self.calls.ledger.refuse("cancelled")
            self.calls.drop(call)

    def pending_of(self, metadata: object) -> PendingRequest | None:
        """The request of that very metadata object."""
        call = self.calls.find(metadata)
        return call.pending if call is not None else None

    # ------------------------------------------------------------------ membership

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's own membership: authoritative, whatever the table says."""
        self.calls.loop = self.calls.soon.loop = self.loop
        watched = [r if isinstance(r, WatchedReplica) else WatchedReplica(r, self.calls) for r in replicas]
        super().update_replicas(watched)
        self._routes.set_replicas(cast("list[RunningReplica]", watched))
        self.calls.waiting.offer_all()
        if self._control is None or self._control.done():
            self._control = self.loop.create_task(keep_in_touch(weakref.ref(self)))

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Serve, or an attempt of ours, has found a replica dead: out of the picks at once."""
        super().on_replica_actor_died(replica_id)
        self._routes.remove(replica_id.unique_id)

    # ------------------------------------------------------------------ control plane

    @property
    def level(self) -> str:
        """The rung of the fail-open ladder, or "observing"."""
        return "observing" if self.calls.observing else self._routes.level

    @property
    def table(self) -> RoutingTable | None:
        """The table that this router goes by."""
        return self._routes.table

    def take_table(self, table: RoutingTable) -> None:
        """Route by a newer table from now on."""
        if self._routes.take_table(table):
            self.calls.second.take_table(table)
            self.calls.waiting.offer_all()

    def has_replicas(self) -> bool:
        """Whether there is anything to route to."""
        return bool(self._routes.replicas)

    def is_overdue(self) -> bool:
        """Whether some request takes far longer than usual: the coordinator should hear of it soon."""
        table = self._routes.table
        usual_s = table.reference_s if table is not None else 0.0
        return 0.0 < usual_s < self.calls.book.oldest_s(time.monotonic()) / _OVERDUE

    def make_report(self) -> dict[str, Any]:
        """This second's report."""
        table, wanted, self._table_wanted = self._routes.table, self._table_wanted, False
        return self.calls.report(
            level=self.level,
            table_epoch=table.epoch if table is not None else 0,
            held_table=table_message(table, table.rows) if wanted and table is not None else None,
            settings=self.settings,
            observes=self.observes,
            started_wall_s=self.started_wall_s,
            ejected=sorted(self._routes.ejections.at(time.monotonic())),
        )

    def reported(self, acknowledged: int, *, table_wanted: bool) -> None:
        """The coordinator has taken the report of that number; after a restart it asks for the table that we hold."""
        self.calls.ledger.acknowledged(acknowledged)
        self._table_wanted = table_wanted

    @property
    def between_s(self) -> float:
        """Most time between two exchanges, for what the other routers have to hear soon."""
        return self.calls.prefixes.between_s

    def post(self) -> dict[str, Any] | None:
        """What the other routers should know."""
        return self.calls.prefixes.post(self.calls.ledger.router_id)

    def hear(self, answer: Mapping[str, Any]) -> None:
        """What the other routers have said, and what somebody asks."""
        self.calls.prefixes.hear(answer.get("prefixes"))
        self.explained.asked(answer.get("questions"))

    def use_secret(self, secret: bytes | None) -> None:
        """What all routers of the cluster place sessions by; None if it will not be known."""
        self._routes.sessions.use_secret(secret)
        self.calls.prefixes.use_secret(secret)
