"""`PredictiveRouter`: Serve's request router that picks from the coordinator's table and mirrors to replicas on trial.

Adopt it on any deployment, code unchanged:

    request_router_config=RequestRouterConfig(request_router_class="serve_app.router:PredictiveRouter")

Runs in users' processes (proxies, replicas, drivers), so it imports only the standard library, ray.serve and
shadecast, holds no module-level state, and fails open: whatever is wrong with the control plane, requests go on
by power of two choices. Decisions are in `shadecast.pick`; here is what connects them to Serve.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from ray.exceptions import ActorDiedError
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import (
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)

from serve_app.routing.link import keep_in_touch
from serve_app.routing.mirror import Mirror, key_of
from serve_app.routing.preferences import Preferences
from serve_app.routing.rescue import RESCUE_SUFFIX, Rescuable, Withdrawable
from serve_app.routing.resume import RESUME_SUFFIX, Begun, Resumable
from serve_app.routing.session_homes import SessionHomes
from serve_app.routing.user_functions import load_function
from serve_app.routing.watch import StreamWatch, was_cancelled, watch_end
from shadecast.config import Config
from shadecast.errors import ConfigError
from shadecast.ledger import Ledger, Started
from shadecast.pick import PickTable, cost_table
from shadecast.rescue import (
    Patience,
    RescueBudget,
    Stalled,
    StreamPatience,
    Stuck,
    collapsed,
    hardly_answering,
    is_alone_silent,
    worth_rescuing,
    worth_resuming,
)
from shadecast.types import RouterReport, RoutingTable

logger = logging.getLogger("ray.serve")

_SEND_FAILED_S = 60.0
"""A choice that no replica has accepted after so long, and that nobody waits for, was never sent."""
_LOOK_S = 0.1
"""How often requests that wait for acceptance too long are looked at, at most."""
_TOLD_S = 1.5
"""How long a queue length that a replica told is better than a table's."""
_MOST_OBSERVED = 100.0
"""Longest predicted time, in units of an idle nominal replica's, that counts in a comparison."""
_LONGEST_SHUN = 3
"""A replica that does not accept is left out for 1.5 s, 3 s, 6 s, and no longer than 12 s at a time."""
_LONGEST_WAIT_FOR_HOME_S = 1.0
_LONGEST_WAIT_FOR_PLACE_S = 1.0
"""Then Serve asks the replicas themselves: should a count here ever be wrong, no request must wait for it for ever."""
_DRAWS_FOR_A_PLACE = 3
"""Of many replicas, a pick may fall on full ones while others have places."""
_TRIES_AFTER_LOSS = 3
"""A stream whose replica died may find others of the same node dead, too."""
_FORGET_TABLE_S = 60.0
"""After so long without a coordinator, replicas that the last table kept out are used again."""


@dataclass(slots=True)
class _Stream:
    """A live stream, and how much of it was reported."""

    watch: StreamWatch
    replica_id: str
    resumable: Resumable | None = None
    items: int = 0
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Sent:
    """A request that a replica has accepted."""

    request: PendingRequest
    result: ReplicaResult
    replica_id: str


@dataclass(slots=True)
class _Choice:
    """A request that was chosen for a replica, which has not accepted it yet."""

    replica_id: str
    request: PendingRequest
    since_s: float
    others: int
    """This router's other requests there at the choice."""
    sent: Withdrawable | None = None
    """What it is sent through, if it may be sent elsewhere instead."""


class PredictiveRouter(LocalityMixin, MultiplexMixin, RequestRouter):
    """Least predicted score among d random eligible replicas; power of two choices without a usable table."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._config = Config()
        self.settings: Mapping[str, Any] = {}
        self._router_id = uuid.uuid4().hex
        self.deployment = str(self._deployment_id.app_name) + "/" + str(self._deployment_id.name)
        self._ledger = Ledger(self._router_id, self.deployment)
        self._table: RoutingTable | None = None
        self._table_s = 0.0
        self._cost_key = (1.0, 0.0)
        self._costs = cost_table(*self._cost_key)
        self._by_index: list[RunningReplica] = []
        self._picks = PickTable((), None, {}, {}, self._costs)
        self._sending: dict[str, _Choice] = {}
        """Requests chosen for a replica that has not accepted them yet, by `key_of`."""
        self._pending_calls: dict[int, PendingRequest] = {}
        """Requests that wait for a replica, by the identity of their metadata."""
        self._unsent: dict[str, str] = {}
        """Serve's id of such a request -> its key: calls that one request makes share Serve's id."""
        self._told: dict[str, tuple[float, int, float]] = {}
        """Queue length that a replica told with its last acceptance, own requests there then, when."""
        self._counted: dict[str, int] = {}
        """This router's own requests per replica, at the last report."""
        self._mirrored: list[tuple[str, float]] = []
        self._control: asyncio.Task[None] | None = None
        self._rescuable: dict[str, Rescuable] = {}
        self._streams: dict[str, _Stream] = {}
        self._rescues: set[asyncio.Task[None]] = set()
        self._patience, self._stream_patience = Patience(), StreamPatience()
        self._shunned: dict[str, tuple[int, float]] = {}
        """Of replicas that did not accept: how often in a row, and until when they are left out."""
        self._slow: Collection[str] = ()
        """Replicas that have collapsed, by the table."""
        self._stuck: frozenset[str] = frozenset()
        """Replicas that hardly answer, by the table: sessions make a detour around them."""
        self._looking = self._want_table_back = self._has_near = False
        self._random = random.random
        self._waiting: deque[asyncio.Future[None]] = deque()
        """Requests that wait until one of this router's others has ended: all replicas have as many as they take."""
        self._waiting_for_home = 0
        """Serve routes two requests per replica at a time: at most half of them may wait for their session's own."""
        self._cost_of: Callable[[list[Any], dict[Any, Any]], float] | None = None
        self._laid_out_for = ""
        """The level that the picks were laid out for."""
        self._preferences = Preferences((), (), None, None)
        self._take_settings()

    def _take_settings(self) -> None:
        """What every choice looks up."""
        balance = self._config.balance
        self._choices, self._table_ttl_s, self.report_s = balance.choices, balance.table_ttl_s, balance.report_s
        self._mirror = self._new_mirror()
        self._rescue_budget = RescueBudget(balance.rescue_fraction)
        self._homes = SessionHomes(self._config, self.deployment, time.monotonic())

    def initialize_state(self, config: Mapping[str, Any] | None = None, **unknown: Any) -> None:
        """Take `request_router_kwargs`: `{"config": {"trial": {...}, "balance": {...}}}`.

        A wrong value is logged and the defaults stay in force: a running deployment must not lose its router.
        Use `shadecast.config.Config.from_mapping` before deploying to have it refused there.
        """
        try:
            self._config = Config.from_mapping({**(config or {}), **unknown})
            self.settings = dict(config or {})
        except ConfigError as error:
            logger.error(  # noqa: TRY400
                f"shadecast: {self.deployment}: request_router_kwargs: {error}. Routing goes on with the defaults."
            )
        self._take_settings()
        cost = self._config.balance.cost
        self._cost_of = load_function("balance.cost", cost) if cost else None

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
    ) -> Sequence[list[RunningReplica]]:
        """One choice, as ranks: the picked replica alone, then a second pick in case the first one is full.

        A request that comes back found both full: it is offered several others at once, of which Serve takes the one
        with the shortest queue, with its own growing pauses in between.
        """
        if self._laid_out_for != "table" or time.monotonic() - self._table_s > self._table_ttl_s:
            self._check_level()
        if pending_request is None:
            first = self._picks.pick(self._random, self._choices)
            return [[self._by_index[first]]] if first >= 0 else []
        context, metadata = pending_request.routing_context, pending_request.metadata
        again, context.should_backoff = context.should_backoff, True
        if metadata.session_id:
            if not self._homes.settled:
                await self._homes.wait_for_secret(time.monotonic())
            kept = await self._session_ranks(pending_request)
            if kept is not None:
                return kept
        pool: Sequence[int] | None = None
        if self._has_near or metadata.multiplexed_model_id:
            pool = self._preferences.pool(pending_request)
        if pool is None and self._laid_out_for == "power_of_two":
            return self._several(2)
        first = self._pick_with_place(pool)
        if first < 0 and pool is not None:
            context.should_backoff = False  # the next preference, at once
            return []
        if first < 0 and self._picks.pool:
            first = await self._wait_for_place()
        if pool is None and (again or first < 0):
            return self._several(max(self._choices, 2))
        self._expect(pending_request, first)
        return _Ranks(self, self._by_index[first], pool)

    def _pick_with_place(self, pool: Sequence[int] | None) -> int:
        """A pick to which this router may send one more; -1 if some draws found none.

        A starved replica accepts late, and its own count of requests does not have those that are on their way: going
        by it alone, hundreds would be sent, and neither Serve's limit of waiting requests nor any other router's choice
        would see them.
        """
        for _ in range(_DRAWS_FOR_A_PLACE):
            i = self._picks.pick(self._random, self._choices, -1, pool)
            if i < 0 or not self._is_full(i):
                return i
        return -1

    def _is_full(self, i: int) -> bool:
        """Whether a replica has as many of this router's requests as it takes, those on their way included."""
        most: int = self._by_index[i].max_ongoing_requests
        return self._picks.in_flight[i] >= most

    async def _wait_for_place(self) -> int:
        """A pick, once one of this router's requests has ended; -1 if none has for long. First come, first served."""
        place: asyncio.Future[None] | None = None
        try:
            async with asyncio.timeout(_LONGEST_WAIT_FOR_PLACE_S):
                while (i := self._pick_with_place(None)) < 0:
                    again, place = place is not None, self._event_loop.create_future()
                    (self._waiting.appendleft if again else self._waiting.append)(place)
                    await place
                return i
        except TimeoutError:
            return -1
        except asyncio.CancelledError:
            if place is not None and place.done() and not place.cancelled():
                self._offer_place()  # it was this one's turn
            raise
        finally:
            if place is not None and place in self._waiting:
                self._waiting.remove(place)

    def _offer_place(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return

    # Serve indexes waiting requests by an id that all calls which one request makes have in common, so that of two at
    # the same time one would wait for ever (Ray 2.60). A call's own metadata object tells them apart.

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        chosen = None if is_retry else self._choose_at_once(pending_request)
        if chosen is None:
            try:
                chosen = await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
            except BaseException:  # given up, perhaps just when it had been chosen for: nobody will send it
                self._unsent.pop(pending_request.metadata.internal_request_id, None)
                self._forget_choice(key_of(pending_request))
                raise
        choice = self._sending.get(key_of(pending_request))
        if choice is not None and self._mirror.copyable(pending_request, chosen):
            choice.sent = Withdrawable(chosen)
            if not self._looking:
                self._look_at(self._event_loop.time() + self._patience.limit_s)
            return cast("RunningReplica", choice.sent)
        return chosen

    def _choose_at_once(self, pending_request: PendingRequest) -> RunningReplica | None:
        """The usual choice, where it needs no comparison; None leaves it to `choose_replicas`.

        Serve starts a task for each request, which compares the queues of the replicas that were chosen and wakes the
        request. Where nobody waits for a free place and the picked replica is known to have one, nothing is left to
        compare, and the way there costs more than everything that this router does.
        """
        metadata, context = pending_request.metadata, pending_request.routing_context
        if self._pending_requests_to_route or self.num_routing_tasks_in_backoff or self._waiting:
            return None
        if self._laid_out_for != "table" or time.monotonic() - self._table_s > self._table_ttl_s:
            self._check_level()
        if self._laid_out_for == "power_of_two" or metadata.multiplexed_model_id:
            return None
        picks = self._picks
        turn = picks.turn
        if not metadata.session_id:
            pool = self._preferences.pool(pending_request) if self._has_near else None
            i = picks.pick(self._random, self._choices, -1, pool)
        elif self._homes.settled:
            i = self._session_home(pending_request)
        else:
            return None
        if i < 0:
            return None
        replica = self._by_index[i]
        queue = self._replica_queue_len_cache.get(replica.replica_id)
        if queue is None or queue >= replica.max_ongoing_requests or self._is_full(i):
            picks.turn = turn  # it is still that replica's turn, and nothing was tried
            context.tried_same_node = context.tried_same_az = False
            return None
        context.should_backoff = True
        if metadata.session_id:
            context.tried_same_node = True
        self._expect(pending_request, i)
        self._record_queue_wait_time(pending_request)
        return replica

    def _forget_choice(self, request_id: str) -> None:
        expected = self._sending.pop(request_id, None)
        if expected is not None:
            self._shift(expected.replica_id, -1)

    def _add_pending_request_to_indices(self, pending_request: PendingRequest) -> None:
        super()._add_pending_request_to_indices(pending_request)
        self._pending_calls[id(pending_request.metadata)] = pending_request

    def _remove_pending_request_from_indices(self, pending_request: PendingRequest) -> None:
        super()._remove_pending_request_from_indices(pending_request)
        self._pending_calls.pop(id(pending_request.metadata), None)

    def _get_pending_request_matching_internal_request_id(self, request_metadata: Any = None) -> PendingRequest | None:
        pending = self._pending_calls.get(id(request_metadata))
        return pending if pending is not None and not pending.future.done() else None

    def _check_level(self) -> None:
        if self.level != self._laid_out_for:
            self._lay_out()

    def _second(self, first: RunningReplica, pool: Sequence[int] | None) -> list[RunningReplica]:
        """Another replica, for the case that the first one is full; empty if there is none."""
        picks = self._picks
        without = picks.index.get(first.replica_id.unique_id, -1)
        second = picks.pick(self._random, self._choices, without, pool)
        return [self._by_index[second]] if second >= 0 else []

    async def _session_ranks(self, pending_request: PendingRequest) -> list[list[RunningReplica]] | None:
        """A session's own replica; None, which means the usual choice, once that is not worth waiting for.

        While it is full, a request waits for it as long as a move would cost, so that a burst scatters no session. One
        that does not tell its queue is asked twice: on a cold connection, Serve's first deadline is often too short.
        """
        context = pending_request.routing_context  # Serve's marks of what was tried: no mixin reads them here
        home = self._session_home(pending_request)
        if home < 0:
            return None
        replica = self._by_index[home]
        queue = self._replica_queue_len_cache.get(replica.replica_id)
        if queue is None:
            if context.tried_same_az:
                return None
            context.tried_same_az = context.tried_same_node
        elif self._is_full(home) or (context.tried_same_node and queue >= replica.max_ongoing_requests):
            worth_s = self._migration_s()
            left_s = min(pending_request.created_at + worth_s - time.time(), worth_s)
            if left_s <= 0.0 or self._waiting_for_home >= self.max_num_routing_tasks // 2:
                return None
            self._waiting_for_home += 1
            try:
                await asyncio.sleep(min(left_s, worth_s / 4.0))
            finally:
                self._waiting_for_home -= 1
            home = self._session_home(pending_request)
            if home < 0:
                return None
            replica = self._by_index[home]
            context.should_backoff = False  # it has just paused
        context.tried_same_node = True
        self._expect(pending_request, home)
        return [[replica]]

    def _session_home(self, pending_request: PendingRequest) -> int:
        """Index of the replica that has the request's session, or stands in for it; -1 if none takes traffic."""
        now_s = time.monotonic()
        away = self._stuck if self._laid_out_for == "table" else frozenset()
        if self._shunned:
            away = away | self._shunned_at(now_s)
        return self._homes.home(pending_request.metadata.session_id, now_s, away, self._picks, self._table)

    def _migration_s(self) -> float:
        """What a session's move costs, in seconds; 0 while the time of a request is not known."""
        reference_s = self._table.reference_s if self._table is not None else 0.0
        return min(self._config.session.migration_cost * reference_s, _LONGEST_WAIT_FOR_HOME_S)

    def _several(self, count: int) -> list[list[RunningReplica]]:
        """Random eligible replicas, of which Serve takes the one with the shortest queue: with two its default rule."""
        pool: Sequence[int] = self._picks.pool
        if time.monotonic() - self._table_s > _FORGET_TABLE_S:
            pool = range(len(self._by_index))
        pool = [i for i in pool if not self._is_full(i)] or pool
        drawn = [self._by_index[i] for i in (pool if len(pool) <= count else random.sample(pool, count))]
        # Serve asks a replica for its queue only where none of the drawn ones is known: a newcomer whose first answer
        # came too late would wait for ever beside one in steady use, so the unknown come first
        unknown = [r for r in drawn if self._replica_queue_len_cache.get(r.replica_id) is None]
        if unknown and len(unknown) < len(drawn):
            return [unknown, drawn]
        return [drawn] if drawn else []

    def _expect(self, pending_request: PendingRequest, i: int) -> None:
        """Count a request from its choice on, so that the next choice, milliseconds later, already sees it."""
        picks = self._picks
        request_id = key_of(pending_request)
        self._unsent[pending_request.metadata.internal_request_id] = request_id
        before = self._sending.get(request_id)
        if before is not None:
            self._shift(before.replica_id, -1)
        self._sending[request_id] = _Choice(picks.ids[i], pending_request, time.monotonic(), picks.in_flight[i])
        picks.shift(i, 1)

    def _shift(self, replica_id: str, by: int) -> None:
        i = self._picks.index.get(replica_id)
        if i is not None:
            self._picks.shift(i, by)
            if self._waiting and not self._is_full(i):
                self._offer_place()

    # ------------------------------------------------------------------ outcomes

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """A replica has accepted the request: account for it, and copy it to a replica on trial now and then."""
        request_id = key_of(pending_request)
        replica = replica_id.unique_id
        if (choice := self._sending.get(request_id)) is not None:
            self._patience.accepted(time.monotonic() - choice.since_s)
        self._unsent.pop(pending_request.metadata.internal_request_id, None)
        if self._shunned:
            self._shunned.pop(replica, None)
        others = max((self._replica_queue_len_cache.get(replica_id) or 1) - 1.0, 0.0)
        metadata = pending_request.metadata
        stream = None
        now_s = time.monotonic()
        self._ledger.start(request_id, replica, now_s, others, self._cost(pending_request))
        self._shift(replica, 1)
        self._forget_choice(request_id)  # only now: its place is not free meanwhile
        self._note_queue(replica, others + 1.0, now_s)
        if metadata.is_streaming or not metadata._by_reference:
            stream = self._watch_stream(result, request_id, replica, unary=not metadata.is_streaming)
            if self._resumes(pending_request):
                self._make_resumable(_Sent(pending_request, result, replica), [])
        else:
            watch_end(result, self._event_loop, lambda error: self._ended(request_id, replica, error))
            if self._mirror.copyable(pending_request, self._replicas.get(replica_id)):
                self._rescuable[request_id] = Rescuable(pending_request, result)
        self._rescue_budget.earn()
        if self._mirrored or metadata.session_id:
            candidate_id = self._drawn_to_copy_to(metadata.session_id)
            if candidate_id is not None and candidate_id != replica:
                self._copy(candidate_id, pending_request, replica, others, result=result, stream=stream)

    def _cost(self, pending_request: PendingRequest) -> float:
        """Units of work of a request, by the user's function."""
        if self._cost_of is None:
            return 1.0
        try:
            cost = float(self._cost_of(pending_request.args, pending_request.kwargs))
        except Exception as error:
            logger.debug(f"shadecast: balance.cost failed: {error!r}")
            return 1.0
        return cost if 0.0 < cost < math.inf else 1.0

    def _watch_stream(
        self, result: ReplicaResult, request_id: str, replica: str, *, unary: bool, resumed: bool = False
    ) -> StreamWatch:
        entry: Started | None = None

        def freed() -> None:
            nonlocal entry
            self._count_items(request_id)
            self._streams.pop(request_id, None)
            entry = self._ledger.release(request_id, replica)
            self._shift(replica, -1)

        def ended(error: BaseException | None, duration_s: float) -> None:
            # one that cannot go on says that the method does not take what was had, not that the replica is bad
            cancelled = was_cancelled(error) or (resumed and error is not None and not watch.items)
            if entry is not None and not cancelled:
                entry.items, entry.first_item_s = (1, math.nan) if unary else (watch.items, watch.first_item_s)
                if error is None:
                    self._stream_patience.ended(entry.first_item_s, entry.items, duration_s)
                self._ledger.record(entry, duration_s, ok=error is None)
            self._mirror.primary_done(request_id, None if cancelled else duration_s, ok=error is None)

        def marked() -> None:
            self._mirror.primary_done(request_id, watch.times_s[-1], ok=True)

        watch = StreamWatch(
            result, self._event_loop, time.monotonic, freed=freed, ended=ended, marked=marked, unary=unary
        )
        if not unary:
            self._streams[request_id] = _Stream(watch, replica)
        return watch

    def _count_items(self, request_id: str) -> None:
        """Tell the ledger how a stream has gone on since the last time: the pace of its replica."""
        stream = self._streams.get(request_id)
        if stream is not None:
            items, waited_s = stream.watch.pace()
            self._ledger.pace(stream.replica_id, items - stream.items, waited_s - stream.waited_s)
            stream.items, stream.waited_s = items, waited_s

    def _note_queue(self, replica: str, queue: float, now_s: float) -> None:
        """The replica's own count at this moment is fresher than any table's; what is on its way comes on top."""
        picks = self._picks
        i = picks.index.get(replica)
        if i is not None:
            queue += picks.in_flight[i] - self._ledger.in_flight(replica)
            picks.note(i, queue)
            self._told[replica] = (queue, picks.in_flight[i], now_s)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A request that was sent has ended; one that was never accepted leaves the counts here."""
        self._forget_choice(self._unsent.pop(internal_request_id, ""))

    def _ended(self, request_id: str, replica: str, error: BaseException | None) -> None:
        cancelled = was_cancelled(error)
        duration_s = self._ledger.finish(request_id, replica, time.monotonic(), ok=error is None, counted=not cancelled)
        if duration_s is None:
            return
        self._rescuable.pop(request_id, None)
        self._shift(replica, -1)
        self._mirror.primary_done(request_id, None if cancelled else duration_s, ok=error is None)

    def _drawn_to_copy_to(self, session_id: str) -> str | None:
        """Which replica is to get a copy of a request: one on trial, or one that the session will move to soon.

        The latter checks the new place and warms its caches.
        """
        draw = self._random()
        for candidate_id, fraction in self._mirrored:
            draw -= fraction
            if draw < 0.0:
                return candidate_id
        if session_id and draw < self._config.trial.mirror_fraction:
            return self._homes.destination(session_id)
        return None

    def _copy(
        self,
        candidate_id: str,
        pending_request: PendingRequest,
        primary: str,
        primary_in_flight: float,
        *,
        result: ReplicaResult,
        stream: StreamWatch | None,
    ) -> None:
        i = self._picks.index.get(candidate_id)
        if i is None:
            return
        candidate = self._by_index[i]
        if self._mirror.copyable(pending_request, candidate):
            self._ledger.mirrored += self._mirror.copy(
                pending_request, candidate, primary, primary_in_flight, primary=result, stream=stream
            )
        else:
            self._ledger.uncopyable += 1

    # ------------------------------------------------------------------ rescue

    def _rescue_stuck(self, table: RoutingTable, slow: Collection[str]) -> None:
        """Send requests again that a collapsed replica holds, as far as the budget goes."""
        now_s = time.monotonic()
        stuck = [
            Stuck(request_id, replica_id, now_s - entry.started_s, entry.in_flight_at_start, entry.cost)
            for replica_id in slow
            for request_id, entry in self._ledger.open_on(replica_id)
            if (known := self._rescuable.get(request_id)) is not None and known.awaited and not known.rescued
        ]
        stuck += [
            Stuck(request_id, choice.replica_id, now_s - choice.since_s, choice.others, self._cost(choice.request))
            for request_id, choice in self._sending.items()
            if choice.replica_id in slow and choice.sent is not None
        ]
        picks = self._picks
        scores = {replica_id: picks.score(i) for i, replica_id in enumerate(picks.ids) if picks.share[i] >= 1.0}
        for each in worth_rescuing(stuck, table, scores, self._config.balance):
            if not self._rescue_budget.take():
                return
            self._ledger.give_up(each.replica_id, each.age_s, each.in_flight_at_start, each.cost)
            if each.request_id not in self._rescuable:
                self._withdraw(each.request_id)
                continue
            self._rescuable[each.request_id].rescued = True
            task = self._event_loop.create_task(self._rescue(each))
            self._rescues.add(task)
            task.add_done_callback(self._rescues.discard)

    def _look_at(self, due_s: float) -> None:
        """Look at requests that wait for acceptance at that time of the loop."""
        self._looking = True
        self._event_loop.call_at(due_s, self._leave_silent, due_s)

    def _leave_silent(self, due_s: float) -> None:
        """Send elsewhere what a replica has not accepted for too long; the replica seems full for a moment."""
        self._looking = False
        loop_s, now_s, limit_s = self._event_loop.time(), time.monotonic(), self._patience.limit_s
        if self._sending:
            next_s = min((choice.since_s for choice in self._sending.values()), default=now_s) + limit_s - now_s
            self._look_at(loop_s + max(next_s, _LOOK_S))
        if loop_s > due_s + _LOOK_S:
            return  # this process was stuck itself: answers may lie unread
        late = [
            (request_id, choice)
            for request_id, choice in self._sending.items()
            if choice.sent is not None and choice.sent.waiting and now_s - choice.since_s > limit_s
        ]
        heard_s = self._heard_s() if late else {}
        for request_id, choice in late:
            waited_s = now_s - choice.since_s
            if not self._patience.is_over(waited_s, now_s - heard_s.get(choice.replica_id, -math.inf)):
                continue
            i = self._picks.index.get(choice.replica_id)
            others = [self._picks.ids[j] for j in self._picks.pool if j != i]
            if i is None or not is_alone_silent(others, self._slow, self._shunned_at(now_s)):
                continue
            if not self._rescue_budget.take():
                continue
            self._shun(i, now_s)
            self._ledger.give_up(choice.replica_id, waited_s, choice.others, self._cost(choice.request))
            self._withdraw(request_id)

    def _heard_s(self) -> dict[str, float]:
        """When streams of each replica last gave an item."""
        last_s: dict[str, float] = {}
        for stream in self._streams.values():
            last_s[stream.replica_id] = max(last_s.get(stream.replica_id, -math.inf), stream.watch.last_item_s)
        return last_s

    def _shunned_at(self, now_s: float) -> frozenset[str]:
        return frozenset(replica_id for replica_id, (_, until_s) in self._shunned.items() if now_s < until_s)

    def _shun(self, i: int, now_s: float) -> None:
        """Take a replica that does not answer for full: a moment at first, longer each time until it answers."""
        replica_id = self._picks.ids[i]
        times, until_s = self._shunned.get(replica_id, (0, 0.0))
        if now_s >= until_s:  # else a request from before: nothing new
            until_s = now_s + _TOLD_S * 2.0**times
            self._shunned[replica_id] = (min(times + 1, _LONGEST_SHUN), until_s)
        full = self._by_index[i].max_ongoing_requests + self._picks.in_flight[i]  # also once ours are gone
        self._note_queue(replica_id, float(full), until_s - _TOLD_S)

    def _withdraw(self, request_id: str) -> None:
        """Let Serve choose again for a request that its replica has not accepted."""
        choice = self._sending[request_id]
        if choice.sent is not None and choice.sent.withdraw():
            choice.request.routing_context.should_backoff = False  # it is not the replicas that are full
            self._ledger.rescued += 1

    async def _rescue(self, stuck: Stuck) -> None:
        """One second attempt; if it cannot be placed, the first one simply goes on."""
        held = self._rescuable.get(stuck.request_id)
        sent = await self._send_again(held.request, RESCUE_SUFFIX, stuck.replica_id) if held is not None else None
        if held is None or sent is None:
            return
        request_id, replica_id, second = key_of(sent.request), sent.replica_id, sent.result
        watch_end(second, self._event_loop, lambda error: self._ended(request_id, replica_id, error))
        if held.move(second):
            self._ledger.rescued += 1
        else:
            second.cancel()

    async def _send_again(self, first: PendingRequest, suffix: str, away_from: str, **more: Any) -> _Sent | None:
        """A second attempt, with `more` arguments, that another replica has accepted; None if it finds no place."""
        i = self._picks.pick(self._random, self._choices, self._picks.index.get(away_from, -1))
        if i < 0 or self._picks.ids[i] == away_from:
            return None
        replica, replica_id = self._by_index[i], self._picks.ids[i]
        labels = replace(first.metadata, internal_request_id=first.metadata.internal_request_id + suffix)
        again = PendingRequest(args=first.args, kwargs={**first.kwargs, **more}, metadata=labels, resolved=True)
        try:
            result = replica.try_send_request(again, with_rejection=True)
            answer = await result.get_rejection_response()
        except Exception as error:  # the first attempt is untouched
            logger.debug(f"shadecast: sending {first.metadata.request_id} again failed: {error!r}")
            if isinstance(error, ActorDiedError):
                self.on_replica_actor_died(replica.replica_id)
            return None
        if answer is None or not answer.accepted:
            result.cancel()
            return None
        others = max(answer.num_ongoing_requests - 1.0, 0.0)
        self._ledger.start(key_of(again), replica_id, time.monotonic(), others, self._cost(again))
        self._shift(replica_id, 1)
        return _Sent(again, result, replica_id)

    # ------------------------------------------------------------------ streams that go on elsewhere

    def _resumes(self, request: PendingRequest) -> bool:
        """Whether the deployment says how such a stream goes on; a body that a proxy streams cannot."""
        labels = request.metadata
        if not self._config.balance.resume or not labels.is_streaming or not labels._by_reference:
            return False
        return not (labels.is_http_request or labels.is_grpc_request)

    def _make_resumable(self, sent: _Sent, had: list[Any], *, after_loss: bool = False) -> None:
        replica_id = sent.replica_id  # not the result: it would live on when its reader has dropped it

        async def lost(resumable: Resumable) -> Begun | None:
            for _ in range(_TRIES_AFTER_LOSS):
                begun = await self._go_on_elsewhere(resumable, list(resumable.had), replica_id, after_loss=True)
                if begun is not None:
                    return begun
            return None

        resumable = Resumable(sent.request, sent.result, had, self._event_loop, lost, after_loss=after_loss)
        self._streams[key_of(sent.request)].resumable = resumable

    def _resume_stalled(self, table: RoutingTable) -> None:
        """Let streams go on elsewhere that a collapsed replica holds up, as far as the budget goes."""
        stalled = [
            Stalled(request_id, stream.replica_id, stream.watch.waited_s, stream.watch.items)
            for request_id, stream in self._streams.items()
            if stream.resumable is not None and stream.resumable.movable
        ]
        for each in worth_resuming(stalled, self._stream_patience, table, self._config.balance):
            if not self._rescue_budget.take_resuming():
                return
            resumable = cast("Resumable", self._streams[each.request_id].resumable)
            resumable.moving = True
            task = self._event_loop.create_task(self._resume(resumable, each.replica_id))
            self._rescues.add(task)
            task.add_done_callback(self._rescues.discard)

    async def _resume(self, resumable: Resumable, replica_id: str) -> None:
        had = list(resumable.had)
        try:
            begun = await self._go_on_elsewhere(resumable, had, replica_id, after_loss=resumable.after_loss)
            if begun is not None:
                resumable.move(*begun, len(had))
        finally:
            resumable.moving = False

    async def _go_on_elsewhere(
        self, resumable: Resumable, had: list[Any], away_from: str, *, after_loss: bool
    ) -> Begun | None:
        """A second attempt on another replica, once it has given an item; None if there is none: the first goes on."""
        after = {self._config.balance.resume: had}
        sent = await self._send_again(resumable.request, RESUME_SUFFIX, away_from, **after)
        if sent is None:
            return None
        self._ledger.rescued += 1
        self._watch_stream(sent.result, key_of(sent.request), sent.replica_id, unary=False, resumed=True)
        self._make_resumable(sent, had.copy(), after_loss=after_loss)
        resumable.trying(sent.result)
        try:
            return sent.result, await sent.result.__anext__()
        except StopAsyncIteration as end:
            return sent.result, end
        except BaseException as error:
            sent.result.cancel()
            task = asyncio.current_task()
            if not isinstance(error, Exception) and (task is None or task.cancelling()):
                raise  # this router's own end, or its caller's
            if not was_cancelled(error):
                logger.warning(f"shadecast: {self.deployment}: a stream could not go on elsewhere: {error!r}")
            return None

    # ------------------------------------------------------------------ membership and tables

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's own membership: authoritative, whatever the table says."""
        super().update_replicas(replicas)
        alive = {r.replica_id.unique_id for r in replicas}
        self._shunned = {replica_id: held for replica_id, held in self._shunned.items() if replica_id in alive}
        self._lay_out()
        for _ in range(len(self._waiting)):
            self._offer_place()
        if self._control is None or self._control.done():
            self._control = self._event_loop.create_task(keep_in_touch(weakref.ref(self)))

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Serve found a replica dead: out of the picks at once."""
        super().on_replica_actor_died(replica_id)
        self._lay_out()

    def take_table(self, table: RoutingTable) -> None:
        """Route by a newer table from now on; an older one (reordered, or of a former epoch) is ignored."""
        held = self._table
        if held is not None and (table.epoch, table.version) <= (held.epoch, held.version):
            return
        if held is None:
            self._homes.forget()  # those placed meanwhile, by weights that other routers do not have
        self._table = table
        self._table_s = time.monotonic() - max(table.age_s, 0.0)
        self._lay_out()
        self._slow = slow = collapsed(table, self._config.balance)
        self._stuck = hardly_answering(table, self._config.balance) if slow else frozenset()
        if slow:
            self._rescue_stuck(table, slow)
            self._resume_stalled(table)

    def _lay_out(self) -> None:
        """Precompute the picks for the present replicas and table."""
        table = self._table
        if table is not None and (table.slots, table.batch_half) != self._cost_key:
            self._cost_key = (table.slots, table.batch_half)
            self._costs = cost_table(*self._cost_key)
        mine = self._ledger.all_in_flight()
        for choice in self._sending.values():
            mine[choice.replica_id] = mine.get(choice.replica_id, 0) + 1
        self._by_index = list(self._replicas.values())
        ids = [r.replica_id.unique_id for r in self._by_index]
        self._laid_out_for = self.level
        oldest_s = time.monotonic() - _TOLD_S
        self._told = {replica_id: told for replica_id, told in self._told.items() if told[2] >= oldest_s}
        self._picks = PickTable(
            ids,
            table,
            mine,
            self._counted,
            self._costs,
            seen={replica_id: (queue, mine_then) for replica_id, (queue, mine_then, _) in self._told.items()},
            limits=[r.max_ongoing_requests for r in self._by_index],
            live_only=self._laid_out_for != "table",
        )
        node = self._self_node_id if self._prefer_local_node_routing else None
        zone = self._self_availability_zone if self._prefer_local_az_routing else None
        self._preferences = Preferences(self._picks.pool, self._by_index, node, zone)
        self._has_near = self._preferences.any_near
        rows = table.rows if table is not None else ()
        self._homes.update(self._picks, table, time.monotonic())
        self._mirrored = [
            (row.replica_id, row.mirror_fraction)
            for row in rows
            if row.mirror_fraction > 0.0 and row.replica_id in self._picks.index
        ]

    # ------------------------------------------------------------------ control plane

    def has_replicas(self) -> bool:
        """Whether there is anything to route to."""
        return bool(self._by_index)

    def make_report(self) -> RouterReport:
        """This second's report; forgets choices whose request was cancelled before it was sent."""
        for request_id, choice in list(self._sending.items()):
            future = choice.request.future
            failed = future.done() and time.time() - choice.request.created_at > _SEND_FAILED_S
            if future.cancelled() or failed:
                self._forget_choice(request_id)
        for request_id in self._streams:
            self._count_items(request_id)
        alive = [(r.replica_id.unique_id, r.node_id or "", r.max_ongoing_requests) for r in self._by_index]
        held, self._want_table_back = (self._table if self._want_table_back else None), False
        epoch = self._table.epoch if self._table is not None else 0
        waiting = [
            Started(choice.replica_id, choice.since_s, choice.others, self._cost(choice.request))
            for choice in self._sending.values()
        ]
        report = self._ledger.report(
            time.monotonic(), alive, self.level, table_epoch=epoch, held_table=held, waiting=waiting
        )
        self._counted = {replica_id: self._picks.in_flight[i] for replica_id, i in self._picks.index.items()}
        return report

    def reported(self, *, wants_table_back: bool) -> None:
        """The coordinator has taken a report."""
        self._want_table_back = wants_table_back

    def held_version(self) -> tuple[int, int]:
        """Epoch and version of the table that this router goes by."""
        return (self._table.epoch, self._table.version) if self._table is not None else (0, 0)

    def use_secret(self, secret: bytes | None) -> None:
        """What all routers of the cluster place sessions by; None if it will not be known."""
        self._homes.use_secret(secret)


class ObservingRouter(PredictiveRouter):
    """Routes exactly as Serve's default does, and only reports: what requests do, and what Shadecast would have chosen.

    For a look before anything is switched on. Nothing is copied, withdrawn or sent again, no replica is left out. The
    comparison is by Shadecast's own estimates: of the time on the replica that was chosen, and on the one it would have
    chosen at that moment.
    """

    def _choose_at_once(self, pending_request: PendingRequest) -> None:
        """All goes Serve's way."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Serve's own rule, its locality and multiplexing included."""
        serves_rule = PowerOfTwoChoicesRequestRouter.choose_replicas
        chosen = await serves_rule(cast("Any", self), candidate_replicas, pending_request)
        return cast("list[list[RunningReplica]]", chosen)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """As the parent, after a look at what would have been chosen."""
        picks = self._picks
        taken, ours = picks.index.get(replica_id.unique_id), picks.pick(self._random, self._choices)
        if taken is not None and ours >= 0 and self._table is not None:
            times = min(picks.score(taken), _MOST_OBSERVED), min(picks.score(ours), _MOST_OBSERVED)
            self._ledger.observe(*times)
        super().on_request_routed(pending_request, replica_id, result)

    def _drawn_to_copy_to(self, session_id: str) -> str | None:
        return None

    def _rescue_stuck(self, table: RoutingTable, slow: Collection[str]) -> None:
        """Nothing is sent again."""

    def _resumes(self, request: PendingRequest) -> bool:
        return False

    def make_report(self) -> RouterReport:
        """As the parent's, marked as one of a router that only looks."""
        return replace(super().make_report(), level="observing")


class _Ranks(Sequence[list[RunningReplica]]):
    """The first choice, and a second that is made only if somebody asks for it."""

    __slots__ = ("_first", "_picks", "_pool", "_router")

    def __init__(self, router: PredictiveRouter, first: RunningReplica, pool: Sequence[int] | None) -> None:
        self._router, self._first, self._pool, self._picks = router, first, pool, router._picks

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[list[RunningReplica]]:
        yield [self._first]
        yield self[1]

    def __getitem__(self, rank: Any) -> Any:
        if rank == 0:
            return [self._first]
        if rank != 1:
            raise IndexError(rank)
        router = self._router
        return router._second(self._first, self._pool if router._picks is self._picks else None)
