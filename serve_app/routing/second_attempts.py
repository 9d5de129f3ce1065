"""Second attempts of calls that are stuck or slow: cancelled and retried, moved to another replica, or resumed there.

Which calls, and how many, is decided in `shadecast.rescue` and `shadecast.handover`. A call that no replica has
accepted is cancelled and Serve chooses again; an accepted one gets another attempt beside it, and its caller goes on
with that once it was accepted, or has given its first item. The budget pays for what was done.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from ray.exceptions import ActorDiedError
from ray.serve.request_router import PendingRequest, ReplicaID

from serve_app.ray_api import is_by_reference
from serve_app.routing.ends import was_cancelled
from shadecast.calls import Phase
from shadecast.config import Config
from shadecast.continuation import OPENAI, again, may_continue
from shadecast.handover import HandOver, Move, Running
from shadecast.rescue import (
    STREAM_COST,
    Patience,
    Stalled,
    StreamPatience,
    budget,
    is_alone_unresponsive,
    worth_moving,
    worth_resuming,
)
from shadecast.types import RoutingTable

if TYPE_CHECKING:
    from serve_app.routing.live_call import LiveCall
    from serve_app.routing.live_calls import LiveCalls
    from serve_app.routing.watched_result import WatchedResult

logger = logging.getLogger("ray.serve")

MOVED_SUFFIX, RESUMED_SUFFIX = "-moved", "-resumed"
_LOOK_S = 0.1
"""How often calls that wait for acceptance too long are looked at, at most."""
_TRIES_AFTER_LOSS = 3
"""A stream whose replica died may find others of the same node dead, too."""

Begun = tuple["WatchedResult", list[Any]]
"""An attempt and, of a stream, its first item; StopAsyncIteration if it had nothing left to give."""


class SecondAttempts:
    """Of one router. All on its event loop."""

    def __init__(self, calls: LiveCalls, config: Config) -> None:
        self._calls = calls
        self.patience, self.stream_patience, self.hand_over = Patience(), StreamPatience(), HandOver()
        self._resume = config.balance.resume
        self._budget = budget(config.balance.rescue_fraction)
        self._fraction = config.balance.rescue_fraction
        self._looking = False
        self._moving: set[LiveCall] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_died: Callable[[ReplicaID], None] = lambda _: None
        """Told of replicas that an attempt has found dead."""

    def configure(self, config: Config) -> None:
        """Go by other settings."""
        self._resume = config.balance.resume
        if config.balance.rescue_fraction != self._fraction:
            self._fraction = config.balance.rescue_fraction
            self._budget = budget(self._fraction)

    def earn(self) -> None:
        """A call was accepted."""
        self._budget.request()

    # ------------------------------------------------------------------ calls that no replica accepts

    def watch_acceptance(self) -> None:
        """A call that may be retried was sent."""
        if not self._looking:
            self._look_at(self._calls.loop.time() + self.patience.limit_s)

    def _look_at(self, due_s: float) -> None:
        self._looking = True
        self._calls.loop.call_at(due_s, self._look, due_s)

    def _look(self, due_s: float) -> None:
        """Cancel and retry what a replica has not accepted for too long; it is ejected for a moment."""
        self._looking = False
        if self._calls.observing:
            return
        loop_s, now_s, limit_s = self._calls.loop.time(), time.monotonic(), self.patience.limit_s
        sent = [call for call in self._calls.book.unaccepted() if call.retriable and call.phase is Phase.SENT]
        if sent:
            next_s = min(call.since_s for call in sent) + limit_s - now_s
            self._look_at(loop_s + max(next_s, _LOOK_S))
        if loop_s > due_s + _LOOK_S:
            return  # this process was stuck itself: answers may lie unread
        for call in sent:
            waited_s = call.age_s(now_s)
            if waited_s > limit_s and self.patience.is_over(waited_s, now_s - self._heard_s(call.replica_id)):
                replica_id = call.replica_id
                if self._is_alone(replica_id, now_s) and self._retry(call):
                    self._calls.routes.eject(replica_id, self._calls.loop)

    def _is_alone(self, replica_id: str, now_s: float) -> bool:
        """Whether it is the replica that does not answer, and not everything."""
        routes, picks = self._calls.routes, self._calls.routes.picks
        others = [picks.ids[i] for i in picks.pool if picks.ids[i] != replica_id]
        return replica_id in picks.index and is_alone_unresponsive(others, routes.slow, routes.ejections.at(now_s))

    def eject_silent(self, replica_id: str) -> None:
        """A replica has not told its queue, however often it was asked: it is left out for a moment."""
        if self._is_alone(replica_id, time.monotonic()):
            self._calls.routes.eject(replica_id, self._calls.loop)

    def _retry(self, call: LiveCall) -> bool:
        """Cancel a call that was not accepted: Serve chooses again. Whether it was done."""
        attempt = call.attempt
        if attempt is None or not self._budget.take():
            return False
        done = attempt.stop_waiting()
        if not done:
            self._budget.give_back()
        return done

    def _heard_s(self, replica_id: str) -> float:
        """When streams of a replica last gave an item."""
        running = self._calls.book.running(replica_id)
        return max((c.reading.last_item_s for c in running if c.reading is not None), default=-math.inf)

    # ------------------------------------------------------------------ calls that a slow replica holds

    def take_table(self, table: RoutingTable) -> None:
        """Send again what slow replicas hold, as far as the budget goes, and hand a stream over where that pays."""
        routes, slow = self._calls.routes, self._calls.routes.slow
        if self._calls.observing:
            return
        if self._resume and self._fraction > 0.0:
            move = self.hand_over.choose(table, routes.picks, self._calls.book, routes.pick, self._running)
            if move is not None:
                self._start(move.stream.call, self._hand_over(move))
        if not slow:
            return
        book, now_s = self._calls.book, time.monotonic()
        held = [call for replica_id in slow for call in book.running(replica_id)]
        stuck = [call for call in held if call.retriable and call.reading is None and self._movable(call)]
        stuck += [call for call in book.unaccepted() if call.retriable and call.phase is Phase.SENT]
        picks = routes.picks
        scores = {replica_id: picks.score(i) for i, replica_id in enumerate(picks.ids) if picks.share[i] >= 1.0}
        for call in worth_moving(stuck, table, scores, now_s):
            if call.phase is Phase.SENT:
                self._retry(call)
            elif self._budget.take():
                self._start(call, self._move(call, 1.0))
        stalled = [
            Stalled(call, call.reading.waited_s(now_s), call.reading.items, call.reading.per_item)
            for call in held
            if call.had is not None and call.reading is not None and self._movable(call)
        ]
        for call in worth_resuming(stalled, self.stream_patience, slow):
            if self._budget.take(cost=STREAM_COST):
                self._start(call, self._move(call, STREAM_COST))

    def _movable(self, call: LiveCall) -> bool:
        attempt = call.attempt
        return attempt is not None and attempt.movable and call not in self._moving

    def _start(self, call: LiveCall, work: Coroutine[Any, Any, None]) -> None:
        self._moving.add(call)
        task = self._calls.loop.create_task(work, context=call.context)
        self._tasks.add(task)

        def over(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._moving.discard(call)

        task.add_done_callback(over)

    async def _move(self, call: LiveCall, cost: float, there: str = "") -> None:
        """If no other replica takes it, the first attempt simply goes on."""
        after, begun, moved = len(call.had or ()), None, False
        try:
            begun = await self._go_on(call, there)
            moved = begun is not None and (first := call.attempt) is not None and first.move(*begun, after)
        finally:
            if not moved:
                self._budget.give_back(cost)
                if begun is not None:
                    begun[0].cancel()
                if (first := call.attempt) is not None:
                    first.stay()

    async def _send_again(self, first: LiveCall, there: str) -> WatchedResult | None:
        """Another attempt that another replica has accepted, `there` if it is named; None if it finds no place."""
        calls, pending = self._calls, first.pending
        routes, had = calls.routes, first.had if first.had is None else list(first.had)
        i = routes.picks.index.get(there, -1)
        if pending is not None and not there:
            i = routes.pick(without=routes.picks.index.get(first.replica_id, -1))
        if pending is None or i < 0 or routes.picks.ids[i] == first.replica_id:
            return None
        whole, suffix = first.whole or pending, MOVED_SUFFIX if had is None else RESUMED_SUFFIX
        if (rest := again(self._resume, whole.args, whole.kwargs, had)) is None:
            return None
        labels = replace(pending.metadata, internal_request_id=pending.metadata.internal_request_id + suffix)
        second = PendingRequest(args=list(rest.args), kwargs=dict(rest.kwargs), metadata=labels, resolved=True)
        call = calls.open(second)
        call.is_second, call.after_loss, call.paid_s, call.had = True, first.after_loss, first.paid_s, had
        call.before, call.whole, call.mend = first.units, None if rest.mend is None else whole, rest.mend
        try:
            result = cast("WatchedResult", routes.replicas[i].try_send_request(second, with_rejection=True))
            answer = await result.get_rejection_response()
        except Exception as error:  # the first attempt is untouched
            logger.debug(f"shadecast: sending {labels.request_id} again failed: {error!r}")
            if isinstance(error, ActorDiedError):
                self._dead(call.replica_id)
            return None
        if answer is not None and not answer.accepted:
            result.cancel()
            calls.drop(call)
            return None
        return result

    def _dead(self, replica_id: str) -> None:
        """An attempt has found a replica dead, perhaps before Serve has."""
        i = self._calls.routes.picks.index.get(replica_id)
        if i is not None:
            self.on_died(self._calls.routes.replicas[i].replica_id)

    # ------------------------------------------------------------------ streams

    def resumes(self, pending: PendingRequest) -> bool:
        """Whether the deployment says how such a stream goes on; a body that a proxy streams cannot."""
        metadata = pending.metadata
        if not self._resume or self._calls.observing or not metadata.is_streaming or not is_by_reference(pending):
            return False
        if metadata.is_http_request or metadata.is_grpc_request:
            return False
        return self._resume != OPENAI or may_continue(pending.args, pending.kwargs)

    async def _go_on(self, call: LiveCall, there: str = "") -> Begun | None:
        """Another attempt, of a stream once it has given an item after what was had; None: the first one goes on."""
        began_s, had = time.monotonic(), call.units
        second = await self._send_again(call, there)
        if second is None or call.had is None:
            return None if second is None else (second, [])
        first = call.attempt
        if first is not None:
            first.trying(second)
        try:
            item = await second.__anext__()
        except StopAsyncIteration as end:
            item = end
        except BaseException as error:
            second.cancel()
            task = asyncio.current_task()
            if not isinstance(error, Exception) and (task is None or task.cancelling()):
                raise  # this router's own end, or its caller's
            if not was_cancelled(error):
                logger.warning(f"shadecast: a stream could not go on elsewhere: {error!r}")
            return None
        took_s = time.monotonic() - began_s
        second.call.paid_s += took_s
        score = self._calls.routes.picks.score_within(second.call.replica_id)
        self.hand_over.begun(second.call.ahead_tokens or call.cost, had, took_s, score)
        return second, [item]

    # ------------------------------------------------------------------ streams that a slower replica holds

    def _running(self, call: LiveCall) -> Running[LiveCall] | None:
        """A stream that may move. One of a multiplexed model stays: another replica may have to load that."""
        may = call.had is not None and self._movable(call) and not call.metadata.multiplexed_model_id
        return Running(call, call.units, call.prompt_tokens or call.cost, call.paid_s) if may else None

    async def _hand_over(self, move: Move[LiveCall]) -> None:
        """The reader waits for the first item there, but not much longer than was expected."""
        call, there = move.stream.call, move.target
        if (first := call.attempt) is None or not first.hold():
            return
        del first
        try:
            async with asyncio.timeout(move.patience_s):
                await self._move(call, 0.0, there)
        except TimeoutError:
            score = self._calls.routes.picks.score_within(there)
            self.hand_over.begun(move.stream.prompt, move.stream.items, move.patience_s, score)

    def ended(self, call: LiveCall) -> None:
        """A stream went well."""
        self._calls.prefixes.ended(call)
        per_item = call.reading.per_item if call.reading is not None else 1.0
        self.stream_patience.ended(call.first_item_s, call.items, call.duration_s, per_item)
        self.hand_over.lengths.add(call.units)
        if not call.is_second:
            score = self._calls.routes.picks.score_within(call.replica_id)
            self.hand_over.begun(call.ahead_tokens or call.cost, 0, call.first_item_s, score)

    # ------------------------------------------------------------------ streams whose replica has died

    async def after_death(self, call: LiveCall, error: BaseException) -> Begun | None:
        """A stream whose replica has died, once: a request that kills replicas must not kill them all."""
        call.after_loss = True
        if isinstance(error, ActorDiedError):
            self._dead(call.replica_id)
        for _ in range(_TRIES_AFTER_LOSS):
            begun = await self._go_on(call)
            if begun is not None:
                self._calls.explained.rescued(call, "resumed")
                return begun
        return None
