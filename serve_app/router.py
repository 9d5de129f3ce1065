"""`PredictiveRouter`: Serve's request router that picks from the coordinator's table and mirrors to replicas on trial.

Adopt it on any deployment, code unchanged:

    request_router_config=RequestRouterConfig(request_router_class="serve_app.router:PredictiveRouter")

Runs in users' processes (proxies, replicas, drivers), so it imports only the standard library, ray.serve and
shadecast, holds no module-level state, and fails open: whatever is wrong with the control plane, requests go on
by power of two choices. Decisions are in `shadecast.pick`; here is what connects them to Serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.serve.request_router import (
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)

from serve_app.control import COORDINATOR, NAMESPACE
from serve_app.mirror import Mirror, was_cancelled, watch_end
from serve_app.rescue import RESCUE_SUFFIX, Rescuable
from shadecast.config import Config
from shadecast.errors import ConfigError
from shadecast.ledger import Ledger
from shadecast.pick import PickTable, cost_table
from shadecast.rescue import RescueBudget, Stuck, collapsed, worth_rescuing
from shadecast.sessions import SessionMap
from shadecast.types import RoutingTable, State

logger = logging.getLogger("ray.serve")

_LONG_POLL_S = 5.0
_SECRET_KEY = b"session-secret"
_FORGET_TABLE_S = 60.0
"""After so long without a coordinator, replicas that the last table kept out are used again."""


class PredictiveRouter(LocalityMixin, MultiplexMixin, RequestRouter):
    """Least predicted score among d random eligible replicas; power of two choices without a usable table."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._config = Config()
        self._settings: Mapping[str, Any] = {}
        self._router_id = uuid.uuid4().hex
        self._deployment = str(self._deployment_id.app_name) + "/" + str(self._deployment_id.name)
        self._ledger = Ledger(self._router_id, self._deployment)
        self._mirror = self._new_mirror()
        self._table: RoutingTable | None = None
        self._table_s = 0.0
        self._cost_key = (1.0, 0.0)
        self._cost = cost_table(*self._cost_key)
        self._by_index: list[RunningReplica] = []
        self._picks = PickTable((), None, {}, {}, self._cost)
        self._sending: dict[str, tuple[str, PendingRequest]] = {}
        """Requests chosen for a replica that has not accepted them yet."""
        self._counted: dict[str, int] = {}
        """This router's own requests per replica, at the last report."""
        self._mirrored: list[tuple[str, float]] = []
        self._control: asyncio.Task[None] | None = None
        self._rescuable: dict[str, Rescuable] = {}
        self._rescue_budget = RescueBudget(self._config.balance.rescue_fraction)
        self._rescues: set[asyncio.Task[None]] = set()
        self._random = random.random
        self._sessions: SessionMap | None = None
        """Made with the first request that has a session."""
        self._session_secret = self._deployment.encode()
        self._want_table_back = False

    def initialize_state(self, config: Mapping[str, Any] | None = None, **unknown: Any) -> None:
        """Take `request_router_kwargs`: `{"config": {"trial": {...}, "balance": {...}}}`.

        A wrong value is logged and the defaults stay in force: a running deployment must not lose its router.
        Use `shadecast.config.Config.from_mapping` before deploying to have it refused there.
        """
        try:
            self._config = Config.from_mapping({**(config or {}), **unknown})
            self._settings = dict(config or {})
        except ConfigError as error:
            logger.error(  # noqa: TRY400
                f"shadecast: {self._deployment}: request_router_kwargs: {error}. Routing goes on with the defaults."
            )
        self._mirror = self._new_mirror()
        self._rescue_budget = RescueBudget(self._config.balance.rescue_fraction)

    def _new_mirror(self) -> Mirror:
        return Mirror(self._config.trial, time.monotonic, self._ledger.pair, self._count_drop)

    def _count_drop(self) -> None:
        self._ledger.mirror_dropped += 1

    # ------------------------------------------------------------------ choosing

    @property
    def level(self) -> str:
        """The rung of the fail-open ladder: "table", "stale_table" or "power_of_two"."""
        if self._table is None:
            return "power_of_two"
        age_s = time.monotonic() - self._table_s
        if age_s > self._config.balance.local_only_age_s:
            return "power_of_two"
        return "table" if age_s <= self._config.balance.table_ttl_s else "stale_table"

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One choice, as ranks: the picked replica alone, then a second pick in case the first one is full."""
        if pending_request is None:
            first = self._picks.pick(self._random, self._config.balance.choices)
            return [[self._by_index[first]]] if first >= 0 else []
        pending_request.routing_context.should_backoff = True
        if pending_request.metadata.session_id:
            kept = self._session_ranks(pending_request)
            if kept is not None:
                return kept
        if self._prefer_local_node_routing or pending_request.metadata.multiplexed_model_id:
            preferred = self._preferred(pending_request)
            if preferred is not None:
                return preferred
        if self.level == "power_of_two":
            return self._two_choices()
        picks, choices = self._picks, self._config.balance.choices
        first = picks.pick(self._random, choices)
        if first < 0:
            return []
        self._expect(pending_request, picks.ids[first])
        second = picks.pick(self._random, choices)
        if second == first:
            return [[self._by_index[first]]]
        return [[self._by_index[first]], [self._by_index[second]]]

    def _session_ranks(self, pending_request: PendingRequest) -> list[list[RunningReplica]] | None:
        """A session's own replica; once that was found full, the usual choice, so that a request never waits for it."""
        context = pending_request.routing_context
        if context.tried_same_node:
            return None
        context.tried_same_node = True  # Serve's mark of "the preferred replica was tried": no mixin reads it here
        if self._sessions is None:
            self._sessions = SessionMap(self._config.session, self._session_secret, self._config.trial.drain_s)
            self._update_sessions(self._sessions)
        replica_id = self._sessions.lookup(pending_request.metadata.session_id, time.monotonic())
        i = self._picks.index.get(replica_id) if replica_id is not None else None
        if replica_id is None or i is None:
            return None
        self._expect(pending_request, replica_id)
        return [[self._by_index[i]]]

    def _update_sessions(self, sessions: SessionMap) -> None:
        """Tell the sessions of a new table or membership."""
        picks, table = self._picks, self._table
        rows = {row.replica_id: row for row in table.rows} if table is not None else {}
        weights = {
            replica_id: rows[replica_id].session_weight if replica_id in rows else 1.0
            for i, replica_id in enumerate(picks.ids)
            if picks.share[i] > 0.0
        }
        scores = {replica_id: picks.score(i) for i, replica_id in enumerate(picks.ids) if picks.share[i] > 0.0}
        draining = [r for r in picks.ids if r in rows and rows[r].state is State.DRAINING]
        sessions.update(weights, scores, time.monotonic(), draining)

    def _two_choices(self) -> list[list[RunningReplica]]:
        """Two random replicas, of which Serve takes the one with the shorter queue: its own default rule."""
        picks = self._picks
        pool = [i for i, share in enumerate(picks.share) if share > 0.0]
        if not pool or time.monotonic() - self._table_s > _FORGET_TABLE_S:
            pool = list(range(len(picks.ids)))
        if not pool:
            return []
        return [[self._by_index[i] for i in random.sample(pool, min(2, len(pool)))]]

    def _preferred(self, pending_request: PendingRequest) -> list[list[RunningReplica]] | None:
        """Serve's own preferences (multiplexed model, same node), within what the table makes eligible."""
        if pending_request.metadata.multiplexed_model_id:
            wanted = self.apply_multiplex_routing(pending_request)
        else:
            wanted = self.apply_locality_routing(pending_request)
        pending_request.routing_context.should_backoff = True
        picks = self._picks
        pool = [i for i, r in enumerate(self._by_index) if r.replica_id in wanted and picks.share[i] > 0.0]
        if not pool or len(pool) == len(picks.ids):
            return None
        best = min(pool, key=picks.score)
        self._expect(pending_request, picks.ids[best])
        return [[self._by_index[best]]]

    def _expect(self, pending_request: PendingRequest, replica_id: str) -> None:
        """Count a request from its choice on, so that the next choice, milliseconds later, already sees it."""
        request_id = pending_request.metadata.internal_request_id
        before = self._sending.get(request_id)
        if before is not None:
            self._shift(before[0], -1)
        self._sending[request_id] = (replica_id, pending_request)
        self._shift(replica_id, 1)

    def _shift(self, replica_id: str, by: int) -> None:
        i = self._picks.index.get(replica_id)
        if i is not None:
            self._picks.in_flight[i] += by

    # ------------------------------------------------------------------ outcomes

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """A replica has accepted the request: account for it, and copy it to a replica on trial now and then."""
        request_id = pending_request.metadata.internal_request_id
        replica = replica_id.unique_id
        expected = self._sending.pop(request_id, None)
        if expected is not None:
            self._shift(expected[0], -1)
        others = max((self._replica_queue_len_cache.get(replica_id) or 1) - 1.0, 0.0)
        self._ledger.start(request_id, replica, time.monotonic(), others)
        self._shift(replica, 1)
        watch_end(result, self._event_loop, lambda error: self._ended(request_id, replica, error))
        self._rescue_budget.earn()
        if not pending_request.metadata.is_streaming and self._mirror.copyable(pending_request):
            self._rescuable[request_id] = Rescuable(pending_request, result)
        if self._mirrored:
            self._maybe_copy(pending_request, replica, others)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A request that was sent has ended; one that was never accepted leaves the counts here."""
        expected = self._sending.pop(internal_request_id, None)
        if expected is not None:
            self._shift(expected[0], -1)

    def _ended(self, request_id: str, replica: str, error: BaseException | None) -> None:
        cancelled = was_cancelled(error)
        duration_s = self._ledger.finish(request_id, replica, time.monotonic(), ok=error is None, counted=not cancelled)
        if duration_s is None:
            return
        self._rescuable.pop(request_id, None)
        self._shift(replica, -1)
        self._mirror.primary_done(request_id, None if cancelled else duration_s, ok=error is None)

    def _maybe_copy(self, pending_request: PendingRequest, primary: str, primary_in_flight: float) -> None:
        if not self._mirror.copyable(pending_request):
            self._ledger.uncopyable += 1
            return
        draw = self._random()
        for candidate_id, fraction in self._mirrored:
            draw -= fraction
            if draw < 0.0:
                i = self._picks.index.get(candidate_id)
                if i is not None and candidate_id != primary:
                    copied = self._mirror.copy(pending_request, self._by_index[i], primary, primary_in_flight)
                    self._ledger.mirrored += copied
                return

    # ------------------------------------------------------------------ rescue

    def _rescue_stuck(self, table: RoutingTable) -> None:
        """Send requests again that a collapsed replica holds, as far as the budget goes."""
        slow = collapsed(table, self._config.balance)
        if not slow or not self._rescuable:
            return
        now_s = time.monotonic()
        stuck = [
            Stuck(request_id, replica_id, now_s - entry.started_s, entry.in_flight_at_start, entry.cost)
            for replica_id in slow
            for request_id, entry in self._ledger.open_on(replica_id)
            if (known := self._rescuable.get(request_id)) is not None and known.awaited and not known.rescued
        ]
        picks = self._picks
        scores = {replica_id: picks.score(i) for i, replica_id in enumerate(picks.ids) if picks.share[i] >= 1.0}
        for each in worth_rescuing(stuck, table, scores, self._config.balance):
            if not self._rescue_budget.take():
                return
            self._rescuable[each.request_id].rescued = True
            task = self._event_loop.create_task(self._rescue(each))
            self._rescues.add(task)
            task.add_done_callback(self._rescues.discard)

    async def _rescue(self, stuck: Stuck) -> None:
        """One second attempt; if it cannot be placed, the first one simply goes on."""
        held = self._rescuable.get(stuck.request_id)
        i = self._picks.pick(self._random, self._config.balance.choices)
        if held is None or i < 0 or self._picks.ids[i] == stuck.replica_id:
            return
        replica = self._by_index[i]
        request_id = stuck.request_id + RESCUE_SUFFIX
        labels = replace(held.request.metadata, internal_request_id=request_id)
        again = PendingRequest(args=held.request.args, kwargs=held.request.kwargs, metadata=labels, resolved=True)
        try:
            second = replica.try_send_request(again, with_rejection=True)
            answer = await second.get_rejection_response()
        except Exception as error:  # the first attempt is untouched
            logger.debug(f"shadecast: rescue of {stuck.request_id} failed: {error}")
            return
        if answer is None or not answer.accepted or not held.move(second):
            second.cancel()
            return
        replica_id = replica.replica_id.unique_id
        self._ledger.start(request_id, replica_id, time.monotonic(), max(answer.num_ongoing_requests - 1.0, 0.0))
        self._ledger.rescued += 1
        self._shift(replica_id, 1)
        watch_end(second, self._event_loop, lambda error: self._ended(request_id, replica_id, error))

    # ------------------------------------------------------------------ membership and tables

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's own membership: authoritative, whatever the table says."""
        super().update_replicas(replicas)
        self._lay_out()
        if self._control is None or self._control.done():
            self._control = self._event_loop.create_task(_control_loop(weakref.ref(self)))

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Serve found a replica dead: out of the picks at once."""
        super().on_replica_actor_died(replica_id)
        self._lay_out()

    def take_table(self, table: RoutingTable) -> None:
        """Route by a newer table from now on; an older one (reordered, or of a former epoch) is ignored."""
        held = self._table
        if held is not None and (table.epoch, table.version) <= (held.epoch, held.version):
            return
        self._table = table
        self._table_s = time.monotonic() - max(table.age_s, 0.0)
        self._lay_out()
        self._rescue_stuck(table)

    def _lay_out(self) -> None:
        """Precompute the picks for the present replicas and table."""
        table = self._table
        if table is not None and (table.slots, table.batch_half) != self._cost_key:
            self._cost_key = (table.slots, table.batch_half)
            self._cost = cost_table(*self._cost_key)
        mine = self._ledger.all_in_flight()
        for replica_id, _ in self._sending.values():
            mine[replica_id] = mine.get(replica_id, 0) + 1
        self._by_index = list(self._replicas.values())
        ids = [r.replica_id.unique_id for r in self._by_index]
        self._picks = PickTable(ids, table, mine, self._counted, self._cost)
        rows = table.rows if table is not None else ()
        if self._sessions is not None:
            self._update_sessions(self._sessions)
        self._mirrored = [
            (row.replica_id, row.mirror_fraction)
            for row in rows
            if row.mirror_fraction > 0.0 and row.replica_id in self._picks.index
        ]

    # ------------------------------------------------------------------ control plane

    def _make_report(self) -> Any:
        """This second's report; forgets choices whose request was cancelled before it was sent."""
        for request_id, (replica_id, pending) in list(self._sending.items()):
            if pending.future.cancelled():
                del self._sending[request_id]
                self._shift(replica_id, -1)
        alive = [(r.replica_id.unique_id, r.node_id or "", r.max_ongoing_requests) for r in self._by_index]
        held, self._want_table_back = (self._table if self._want_table_back else None), False
        epoch = self._table.epoch if self._table is not None else 0
        report = self._ledger.report(time.monotonic(), alive, self.level, table_epoch=epoch, held_table=held)
        self._counted = {replica_id: self._picks.in_flight[i] for replica_id, i in self._picks.index.items()}
        return report

    def _use_secret(self, secret: bytes) -> None:
        """Place sessions by the cluster's secret, so that all routers agree and no client can choose its replica."""
        if secret != self._session_secret:
            self._session_secret = secret
            self._sessions = None


async def _control_loop(router: weakref.ref[PredictiveRouter]) -> None:
    """Report each second and keep a long poll for the next table open, until the router or Ray is gone. Never raises.

    Ray is asked for before every call, because a call on a process that has shut Ray down would start a new cluster.
    """
    poll: asyncio.Task[Any] | None = None
    coordinator: Any = None
    known_secret = False
    try:
        while ray.is_initialized() and (this := router()) is not None:
            period_s = this._config.balance.report_s * random.uniform(0.95, 1.05)
            try:
                if not known_secret:
                    this._use_secret(await asyncio.get_running_loop().run_in_executor(None, _cluster_secret))
                    known_secret = True
                if coordinator is None:
                    coordinator = await asyncio.get_running_loop().run_in_executor(None, _find_coordinator)
                if coordinator is not None:
                    if poll is None or poll.done():
                        poll = asyncio.get_running_loop().create_task(_poll_tables(router, coordinator))
                    want_back = await asyncio.wait_for(
                        coordinator.report_router.remote(this._make_report(), this._settings), 2.0
                    )
                    this._want_table_back = bool(want_back)
            except (RayActorError, TimeoutError) as error:
                coordinator = None
                logger.debug(f"shadecast: coordinator does not answer: {error}")
            except Exception:
                coordinator = None
                logger.warning("shadecast: reporting failed; routing goes on without", exc_info=True)
            del this
            await asyncio.sleep(period_s)
    finally:
        if poll is not None:
            poll.cancel()


async def _poll_tables(router: weakref.ref[PredictiveRouter], coordinator: Any) -> None:
    """Take tables as they are published; ends with the coordinator that it was started for."""
    with contextlib.suppress(RayActorError, asyncio.CancelledError):
        while ray.is_initialized() and (this := router()) is not None:
            held = this._table
            seen = (held.epoch, held.version) if held is not None else (0, 0)
            deployment = this._deployment
            del this
            table = await coordinator.wait_table.remote(deployment, seen, _LONG_POLL_S)
            this = router()
            if this is not None and table is not None:
                this.take_table(table)
            del this


def _cluster_secret() -> bytes:
    """What session ids are hashed with, made by the first router of a cluster. Blocks: call it in a thread."""
    _internal_kv_put(_SECRET_KEY, os.urandom(16), overwrite=False, namespace=NAMESPACE.encode())
    secret: bytes = _internal_kv_get(_SECRET_KEY, namespace=NAMESPACE.encode())
    return secret


def _find_coordinator() -> Any:
    """The coordinator's handle, or None while there is none. Blocks: call it in a thread."""
    try:
        return ray.get_actor(COORDINATOR, namespace=NAMESPACE)
    except ValueError:
        return None
