"""A router's calls as they really happen: Serve's events go into the book, and what follows from them is done.

`shadecast.calls` says what follows. Everything here runs on the router's event loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any, cast

from ray.serve.request_router import PendingRequest, RunningReplica

from serve_app.explained import Explained
from serve_app.prefixes import Prefixes
from serve_app.ray_api import http_status, is_by_reference, reserved_slot
from serve_app.routing.ends import Soon, tell, was_cancelled, watch_end
from serve_app.routing.live_call import LiveCall
from serve_app.routing.mirror import Mirror
from serve_app.routing.routes import Routes
from serve_app.routing.second_attempts import SecondAttempts
from serve_app.routing.waiting import Waiting
from serve_app.routing.watched_result import WatchedReplica, WatchedResult
from serve_app.shadow import is_of_copy
from serve_app.undispatched import Undispatched
from serve_app.user_functions import UserFunction
from shadecast.calls import TRANSITIONS, Calls, Do, Event, Phase
from shadecast.config import Config
from shadecast.ledger import Ledger
from shadecast.pick import copied_to
from shadecast.reading import Reading

logger = logging.getLogger("ray.serve")

_COUNT, _RECORD, _CLOSE, _WAITING, _CHOOSE = Do.COUNT, Do.RECORD, Do.CLOSE, Phase.WAITING, Event.CHOOSE


class LiveCalls:
    """One router's calls."""

    def __init__(self, router_id: str, deployment: str, config: Config, own_place: Callable[[], Any]) -> None:
        self.loop: asyncio.AbstractEventLoop = cast("asyncio.AbstractEventLoop", None)
        """The router's; known once it has replicas."""
        self.book: Calls[LiveCall] = Calls()
        self.routes = Routes(deployment, self.book, config, own_place)
        self.ledger = Ledger(router_id, deployment, self.book)
        self.prefixes = Prefixes(self.routes, deployment, self.ledger.count)
        self.mirror = Mirror(config.trial, self.ledger.pair, lambda: self.ledger.count("mirror_dropped"))
        self.waiting = Waiting()
        self.soon = Soon(lambda: bool(self.waiting.line))
        """For the ends of calls: caught up with before every choice and report."""
        self.second = SecondAttempts(self, config)
        self.undispatched = Undispatched(self)
        self.explained = Explained(self)
        self.observing = False
        """Requests go as Serve sends them; nothing is copied, or sent again."""
        self._config = config
        self._open: dict[int, LiveCall] = {}
        """Calls that no replica has accepted, by the identity of their metadata: Serve's ids are shared by calls."""
        self._reserved: dict[str, LiveCall] = {}
        """Calls whose place is reserved, by its token."""
        self.cost_of: UserFunction | None = None

    def configure(self, config: Config) -> None:
        """Go by other settings from now on; calls under way go on as they began."""
        self._config = config
        self.routes.configure(config)
        self.prefixes.configure(config.balance, observing=self.observing)
        self.mirror.configure(config.trial)
        self.second.configure(config)

    # ------------------------------------------------------------------ the life of a call

    def tell(self, call: LiveCall, event: Event, at_s: float | None = None, **facts: Any) -> None:
        """Carry out an event and what follows; one that cannot be any more (both ends of a stream, say) is nothing."""
        if (call.phase, event) not in TRANSITIONS:
            return
        for do in self.book.handle(call, event, time.monotonic() if at_s is None else at_s, **facts):
            if do is _COUNT:
                if self.prefixes.on:
                    self.prefixes.counted(call)
                if self.routes.count(call.replica_id) and self.waiting.line:
                    self.waiting.offer()
            elif do is _RECORD:
                self._record(call)
            elif do is _CLOSE:
                self._close(call)
            else:
                how = "retried" if event is Event.RETRY else "moved" if call.had is None else "resumed"
                self.explained.rescued(call, how)
                if call.reading is None:  # streams tell by their pace
                    self.ledger.evidence(call)

    def drop(self, call: LiveCall) -> None:
        """It is over without an outcome."""
        self.tell(call, Event.DROP)

    def _record(self, call: LiveCall) -> None:
        if not call.counts:
            return
        if call.reading is not None:
            self._count_items(call)
            if call.metadata.is_streaming:
                call.items, call.first_item_s = call.reading.items, call.reading.first_item_s
                if call.ok:
                    self.second.ended(call)
            else:
                call.items = 1
        self.ledger.record(call)
        if call.pair is not None:
            call.pair.primary_done(call.duration_s, ok=call.ok)

    def _close(self, call: LiveCall) -> None:
        self.forget(call)
        if call.reading is not None:
            self._count_items(call)
        if call.pair is not None:
            call.pair.primary_done(None, ok=True)  # for one that has ended, nothing new
        call.pair = None
        if call.had is None:  # else the stream may still go on after a death
            call.pending = call.context = None

    def open(self, pending: PendingRequest) -> LiveCall:
        """The call of a request that waits, or has come back; a new one where there is none."""
        call = self._open.get(id(pending.metadata))
        if call is None:
            call = self._new(pending, pending.metadata)
            self.book.open(call, time.monotonic())
        return call

    def choose_at_once(self, pending: PendingRequest, i: int, now_s: float) -> None:
        """A request that has not waited goes to the replica at index `i` of the picks."""
        self.choose(self._new(pending, pending.metadata), i, now_s)

    def _new(self, pending: PendingRequest | None, metadata: Any) -> LiveCall:
        self._open[id(metadata)] = call = LiveCall(pending, metadata)
        if self.cost_of is not None and pending is not None:
            call.cost = self._cost(pending)
        return call

    def forget(self, call: LiveCall) -> None:
        """Nobody asks for it any more."""
        self._open.pop(id(call.metadata), None)

    def find(self, metadata: object) -> LiveCall | None:
        """The call of that very metadata object, unless a replica has accepted it."""
        return self._open.get(id(metadata))

    def choose(self, call: LiveCall, i: int, now_s: float) -> None:
        """The pick of the replica at index `i` is followed, perhaps in place of another one."""
        picks = self.routes.picks
        picks.commit(i)
        if call.phase is _WAITING:
            self.book.handle(call, _CHOOSE, now_s, replica_id=picks.ids[i])
            picks.count(i, int(call.others) + 1)
            if self.prefixes.on:
                self.prefixes.counted(call)
        else:
            self.choose_by_id(call, picks.ids[i])

    def choose_by_id(self, call: LiveCall, replica_id: str) -> None:
        """A replica is chosen that need not be in the picks."""
        if call.phase is Phase.CHOSEN:
            if call.replica_id == replica_id:
                return
            self.tell(call, Event.PASS)
        self.tell(call, Event.CHOOSE, replica_id=replica_id)

    def picked(self, pending: PendingRequest, replica_id: str) -> None:
        """A replica was picked for a request that is sent there on another way: it counts as long as is usual."""
        call = self.open(pending)
        self.choose_by_id(call, replica_id)
        self.undispatched.picked(call)

    def sending(self, pending: PendingRequest, replica_id: str, *, pinned: bool) -> LiveCall:
        """A request is about to be sent to a replica: chosen for it, or (`pinned`) meant for that very one."""
        token = reserved_slot(pending)
        call = self._reserved.pop(token, None) if token is not None else None
        if call is not None:
            call.pending, call.cost, call.pinned = pending, self._cost(pending), True
            return call
        call = self.open(pending)
        self.choose_by_id(call, replica_id)
        self.tell(call, Event.SEND)
        call.pinned = pinned
        if not pinned and not call.is_second and self.may_be_repeated(pending, replica_id):
            call.retriable, call.context = True, contextvars.copy_context()
            self.second.watch_acceptance()
        return call

    def may_be_repeated(self, pending: PendingRequest, replica_id: str) -> bool:
        """Whether a request may be sent twice, by what its deployment says of the method."""
        if self.observing or is_of_copy(pending.metadata):
            return False
        if not (is_by_reference(pending) or pending.metadata.is_streaming):
            return False  # an answer by value is there when its acceptance is: that says nothing of the replica
        i = self.routes.picks.index.get(replica_id)
        return self.mirror.copyable(pending, self.routes.replicas[i] if i is not None else None)

    def reserving(self, metadata: Any, replica_id: str) -> LiveCall:
        """A place for a request is asked for."""
        call = self._open.get(id(metadata)) or self._new(None, metadata)
        self.choose_by_id(call, replica_id)
        self.tell(call, Event.SEND)
        return call

    def reserved(self, call: LiveCall, token: str | None) -> None:
        """The replica has reserved the place, or has none."""
        if token is None:
            self.tell(call, Event.REJECT)
        else:
            self._reserved[token] = call

    def released(self, token: str) -> None:
        """A reserved place is given back without having been used."""
        if (call := self._reserved.pop(token, None)) is not None:
            self.drop(call)

    def accepted(self, call: LiveCall, result: WatchedResult, queue: int | None) -> None:
        """A replica has accepted a call; `queue` is how many requests it then had, as it says, None if it does not."""
        if call.phase is not Phase.SENT:
            return
        pending, replica_id = call.pending, call.replica_id
        if queue is not None:
            if call.counts:
                self.second.patience.accepted(call.age_s(time.monotonic()))
            others = max(queue - 1.0, 0.0)
        else:
            others = self.book.in_flight(replica_id) - 1.0
        self.tell(call, Event.ACCEPT, others=others)
        self.forget(call)
        self.routes.answered(replica_id)
        if queue is not None:
            self.routes.told(replica_id, float(queue))
        if pending is None:
            return  # reserved, and given up before it was dispatched
        self._watch(call, pending, result)
        if not call.is_second and call.counts:
            self.second.earn()
            if not self.observing and not call.pinned:
                self._copy(call, pending, result)
        if not call.retriable and call.had is None:
            call.pending = None  # its arguments are not needed any more

    def _watch(self, call: LiveCall, pending: PendingRequest, result: WatchedResult) -> None:
        """Have the call's end told."""
        metadata, inner, loop = call.metadata, result.inner, self.loop
        if not metadata.is_streaming and is_by_reference(pending):
            watch_end(inner, self.soon.call, functools.partial(self._ended, call), lambda: call.answered)
            return
        call.reading = Reading(time.monotonic())
        call.reading.count = self.prefixes.count_of(call) if self.prefixes.on else None
        if call.counts and not call.pinned and self.second.resumes(pending):
            call.had = [] if call.had is None else call.had
            call.context = call.context or contextvars.copy_context()
        inner.add_done_callback(
            lambda outcome: tell(loop, self._produced, call, outcome if isinstance(outcome, BaseException) else None)
        )

    # ------------------------------------------------------------------ ends

    def _ended(self, call: LiveCall, error: BaseException | None, at_s: float | None = None, ok: bool = True) -> None:
        if was_cancelled(error):
            self.drop(call)
        else:
            self.tell(call, Event.END, at_s, ok=ok and error is None)

    def _produced(self, call: LiveCall, error: BaseException | None) -> None:
        """The replica is done with a stream; how it went is known if that failed, or nobody reads it any more."""
        self.tell(call, Event.PRODUCE)
        if error is not None:
            self._ended(call, error)
        elif call.reading is not None and call.reading.dropped:
            self.drop(call)

    def read_to_the_end(self, call: LiveCall, error: BaseException | None) -> None:
        """The reader has come to the end, or to an error."""
        reading = cast("Reading", call.reading)
        if call.is_second and error is not None and not reading.items:
            self.drop(call)  # a stream that cannot go on says that its method does not take what was had
        else:
            self._ended(call, error, ok=reading.status < 500)

    def reader_gone(self, call: LiveCall, reading: Reading) -> None:
        """Nobody holds the result any more: complete, or never to be."""
        reading.dropped = True
        if call.phase is Phase.PRODUCED:
            self.tell(call, Event.END, ok=reading.status < 500)

    def got(self, call: LiveCall, item: Any, asked_s: float) -> None:
        """The reader of a stream has an item; in its thread."""
        reading = cast("Reading", call.reading)
        reading.got(item, asked_s, time.monotonic())
        if reading.items == 1 and self.prefixes.on:
            tell(self.loop, self.prefixes.computed, call)
        if reading.items == 1 and call.metadata.is_http_request:
            reading.status = http_status(item)
        elif call.pair is not None and reading.is_marked:
            tell(self.loop, self._marked, call)

    def _marked(self, call: LiveCall) -> None:
        if call.pair is not None and call.reading is not None:
            call.pair.primary_done(call.reading.times_s[-1], ok=True)
            call.pair = None

    def _count_items(self, call: LiveCall) -> None:
        """Tell the ledger how a stream has gone on since the last time: the pace of its replica."""
        reading = call.reading
        if reading is not None and call.metadata.is_streaming and call.counts:
            paced = reading.pace(time.monotonic())
            self.ledger.pace(call.replica_id, *paced)
            self.second.hand_over.item.add(*paced, self.routes.picks.score_within(call.replica_id))

    # ------------------------------------------------------------------ copies

    def _copy(self, call: LiveCall, pending: PendingRequest, result: WatchedResult) -> None:
        """Copy a request now and then to a replica on trial."""
        if not self.routes.mirrored:
            return
        worth = self.prefixes.worth(call) if self.prefixes.on else 1.0
        candidate_id = copied_to(self.routes.mirrored, self.routes.random() / worth)
        i = self.routes.picks.index.get(candidate_id)
        if i is None or candidate_id == call.replica_id:
            return
        candidate = unwatched(self.routes.replicas[i])
        if not self.mirror.copyable(pending, candidate):
            self.ledger.count("uncopyable")
            return
        primary, tokens = (call.replica_id, call.others), functools.partial(self.prefixes.copy, call, candidate_id)
        call.pair = self.mirror.copy(pending, candidate, primary, result.inner, call.reading, tokens=tokens)
        if call.pair is not None:
            self.explained.copied(call)

    # ------------------------------------------------------------------ for results and reports

    def limit_of(self, replica_id: str) -> int:
        """Requests that a replica takes: the queue of one that seems full."""
        i = self.routes.picks.index.get(replica_id)
        return self.routes.replicas[i].max_ongoing_requests if i is not None else 1

    def after_death(self, call: LiveCall, error: BaseException) -> Coroutine[Any, Any, Any] | None:
        """How a stream goes on whose replica has died; None if it does not."""
        return self.second.after_death(call, error) if call.had is not None and not call.after_loss else None

    def report(self, **more: Any) -> dict[str, Any]:
        """This second's report."""
        self.soon.catch_up()
        for call in self.book.all_running():
            self._count_items(call)
        alive, memory = self.routes.alive, self.prefixes.memory()
        made = self.ledger.report(time.monotonic(), alive, memory, **self.explained.report(), **more)
        self.routes.reported()
        return made

    def _cost(self, pending: PendingRequest) -> float:
        """Units of work of a request, by the user's function."""
        cost = self.cost_of(pending.args, pending.kwargs, read=float) if self.cost_of is not None else None
        return cost if cost is not None and 0.0 < cost < math.inf else 1.0


def unwatched(replica: RunningReplica) -> RunningReplica:
    """The replica itself: what is sent to it is no call of the book's."""
    return replica.unwatched if isinstance(replica, WatchedReplica) else replica
