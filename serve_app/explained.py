"""What a router keeps of its decisions for those who ask, and what it puts on OpenTelemetry's spans.

A decision that is not kept costs its request nothing: for the one that is, something else stands in the place of
`choose_at_once`. Nothing is sent before somebody asks: the coordinator's answers have the open questions, the next
report has what was found. `shadecast.decisions` says what is kept. Whatever goes
wrong here, the request is routed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from ray.serve.request_router import PendingRequest, RunningReplica

from serve_app.ray_api import add_span, is_tracing, set_span_attributes
from serve_app.shadow import is_of_copy
from shadecast.decisions import Decision, Question, Ring, answer, candidates, looked_at, questions
from shadecast.pick import PickTable
from shadecast.prefix_score import Comparison

if TYPE_CHECKING:
    from serve_app.ray_api import ServeRouter
    from serve_app.routing.live_call import LiveCall
    from serve_app.routing.live_calls import LiveCalls

logger = logging.getLogger("ray.serve")

_WAITED_S = 0.01
"""A request that got its replica later than this has waited."""
_WATCHED_S = 30.0
"""A question that was not repeated for so long is not watched for any more: the coordinator is away."""


class Explained:
    """Of one router. All on its event loop."""

    def __init__(self, calls: LiveCalls) -> None:
        self._calls = calls
        self.ring = Ring()
        self._router: Any = None
        self._questions: tuple[Question, ...] = ()
        self._asked_s = -math.inf
        self._watched: frozenset[str] = frozenset()
        """Ids of requests that somebody asks for: they are kept when they come."""
        self._tracing = False
        self._due = True
        """The next decision is kept, whatever it is."""
        calls.routes.sessions.on_moved = self._session_moved

    def of(self, router: ServeRouter) -> Explained:
        """The same, at work for this router."""
        self._router = router
        self._look()
        return self

    def _look(self) -> None:
        """Look at the next decision."""
        self._router.choose_now = self._choose

    # ------------------------------------------------------------------ decisions

    def _choose(self, pending: PendingRequest) -> RunningReplica | None:
        """In place of `choose_at_once`: the same, and what it has looked at is kept if it is this one's turn."""
        choose = self._router.choose_at_once
        if not (self._watched or self._tracing):
            self._router.choose_now = choose
        kept = self._due or pending.metadata.request_id in self._watched
        if not (kept or self._tracing):
            return cast("RunningReplica | None", choose(pending))
        routes, seen = self._calls.routes, _SeenPicks(self._calls.routes.picks)
        stands_in: Any = seen
        routes.picks = stands_in  # for this one choice, which nothing interrupts
        try:
            chosen = choose(pending)
        finally:
            if routes.picks is stands_in:  # else they were laid out anew meanwhile
                routes.picks = seen.picks
        if chosen is not None:
            self._due = False
            self._keep(pending, chosen.replica_id.unique_id, looked=seen.looked, keep=kept)
        return cast("RunningReplica | None", chosen)

    def compared(self, pending: PendingRequest, chosen: RunningReplica, *, came_back: bool) -> None:
        """A request got its replica on Serve's way, where replicas tell their queues and requests wait."""
        now_s, waited_s = time.monotonic(), max(time.time() - pending.created_at, 0.0)
        special = "came back" if came_back else "waited" if waited_s > _WAITED_S else ""
        due, self._due = self._due, False
        kept = due or pending.metadata.request_id in self._watched or (special and self.ring.wants(special, now_s))
        if kept or self._tracing:
            detail = {
                "came back": "the replica that was chosen first was full",
                "waited": "no replica was known to have a place when it came",
            }.get(special, "")
            replica_id = chosen.replica_id.unique_id
            self._keep(pending, replica_id, special=special, detail=detail, waited_s=waited_s, keep=bool(kept))

    def refused(self, pending: PendingRequest, error: BaseException) -> None:
        """A request got no replica."""
        waited_s = max(time.time() - pending.created_at, 0.0)
        cancelled = isinstance(error, BaseException) and not isinstance(error, Exception)
        detail = "its caller gave up, or its deadline passed, while it waited" if cancelled else repr(error)[:200]
        if pending.metadata.request_id in self._watched or self.ring.wants("refused", time.monotonic()):
            self._keep(pending, "", special="refused", detail=detail, waited_s=waited_s)

    def rescued(self, call: LiveCall, how: str) -> None:
        """A call goes on elsewhere: it was "retried", "moved" or "resumed"."""
        self._calls.ledger.rescue(how)
        now_s = time.monotonic()
        if self._tracing:
            self._add_span(call.metadata, how, {"shadecast.from": call.replica_id})
        if not (call.metadata.request_id in self._watched or self.ring.wants(how, now_s)):
            return
        took_s = call.duration_s if math.isfinite(call.duration_s) else call.age_s(now_s)
        name, begins = call.replica_id, call.metadata.internal_request_id
        if how == "retried":
            detail, there = f"{name} had not accepted it after {took_s:.2f} s: it is chosen for anew", ""
        else:
            attempts = (c for c in self._calls.book.all_running() if c.is_second)
            again = (c.replica_id for c in attempts if c.metadata.internal_request_id.startswith(begins))
            there = next(again, "")
            what = "the stream" if how == "resumed" else "it"
            detail = f"{what} left {name} after {took_s:.2f} s there: it goes on elsewhere"
        index = self._calls.routes.picks.index
        both = [index[each] for each in (name, there) if each in index]
        self._keep_labels(call.metadata, there, both, special=how, detail=detail)

    def copied(self, call: LiveCall) -> None:
        """A request was copied to a replica on trial."""
        self._calls.ledger.count("mirrored")
        if call.pair is not None:
            self.ring.copied(call.metadata.request_id, call.pair.candidate_id)
            if self._tracing:
                self._add_span(call.metadata, "copied", {"shadecast.replica": call.pair.candidate_id})

    def _session_moved(self, metadata: Any, before: str, after: str) -> None:
        if metadata is not None and self.ring.wants("session moved", time.monotonic()):
            detail = f"its session left {before}, which is gone, drains or is hot, or is not where others look for it"
            index = self._calls.routes.picks.index
            both = [index[each] for each in (before, after) if each in index]
            self._keep_labels(metadata, after, both, special="session moved", detail=detail)

    # ------------------------------------------------------------------ keeping them

    def _keep(
        self,
        pending: PendingRequest,
        chosen: str,
        *,
        looked: Sequence[int] = (),
        special: str = "",
        detail: str = "",
        waited_s: float = 0.0,
        keep: bool = True,
    ) -> None:
        try:
            if keep:
                compared = self._calls.prefixes.compared(pending)
                self._keep_labels(
                    pending.metadata,
                    chosen,
                    looked,
                    special=special,
                    detail=detail,
                    waited_s=waited_s,
                    counted=True,
                    compared=compared if chosen else None,
                )
            if self._tracing and chosen:
                self._put_on_span(pending, chosen, special, waited_s)
        except Exception:
            logger.debug("shadecast: a decision was not put on its span", exc_info=True)

    def _keep_labels(
        self,
        metadata: Any,
        chosen: str,
        looked: Sequence[int],
        *,
        special: str,
        detail: str,
        waited_s: float = 0.0,
        counted: bool = False,
        compared: Comparison | None = None,
    ) -> None:
        """The same where the request itself is not at hand; `counted`: the chosen one's calls have it already."""
        try:
            routes, now_s = self._calls.routes, time.monotonic()
            picks, table = routes.picks, routes.table
            ejected = routes.ejections.at(now_s) if routes.ejections else ()
            nodes = {replica_id: node_id for replica_id, node_id, _ in routes.alive} if table is None else {}
            if compared is not None:
                looked = [picks.index[load.replica_id] for load in compared.loads if load.replica_id in picks.index]
            made = Decision(
                request_id=str(metadata.request_id),
                method=str(metadata.call_method),
                at_s=now_s,
                level=self._level,
                chosen=chosen,
                special=special,
                detail=detail,
                session=bool(metadata.session_id),
                model=str(metadata.multiplexed_model_id or ""),
                waited_s=waited_s,
                of_copy=is_of_copy(metadata),
                eligible=len(picks.pool),
                alive=len(picks.ids),
                prompt_tokens=compared.prompt_tokens if compared is not None else 0,
                candidates=candidates(
                    picks, table, looked, chosen, ejected=ejected, nodes=nodes, counted=counted, compared=compared
                ),
            )
            self.ring.add(made)
        except Exception:
            logger.debug("shadecast: a decision was not kept", exc_info=True)

    @property
    def _level(self) -> str:
        return "observing" if self._calls.observing else self._calls.routes.level

    def _put_on_span(self, pending: PendingRequest, chosen: str, special: str, waited_s: float) -> None:
        picks = self._calls.routes.picks
        i = picks.index.get(chosen)
        parts = picks.parts(i, 1) if i is not None else None  # as they were before this request was counted
        set_span_attributes(
            {
                "shadecast.replica": chosen,
                "shadecast.score": parts.cost / parts.capacity if parts is not None else None,
                "shadecast.level": self._level,
                "shadecast.session": bool(pending.metadata.session_id),
                "shadecast.of_copy": is_of_copy(pending.metadata),
                "shadecast.special": special or None,
                "shadecast.waited_s": waited_s or None,
            }
        )

    def _add_span(self, metadata: Any, what: str, attributes: dict[str, Any]) -> None:
        try:
            add_span(f"shadecast.{what}", metadata, attributes)
        except Exception:
            logger.debug("shadecast: a span was not made", exc_info=True)

    # ------------------------------------------------------------------ who asks

    def asked(self, received: Any) -> None:
        """The questions that are open, as the coordinator has just said."""
        self._questions, self._asked_s = questions(received), time.monotonic()
        self._watched = frozenset(q.request_id for q in self._questions if q.request_id)
        if self._watched:
            self._look()

    def report(self) -> dict[str, Any]:
        """What the next report says; nothing where nobody asks."""
        now_s = time.monotonic()
        self._due, self._tracing = True, is_tracing()
        self._look()
        if now_s - self._asked_s > _WATCHED_S:
            self._questions, self._watched = (), frozenset()
        if not self._questions:
            return {}
        return {"explained": [answer(self.ring, question, now_s) for question in self._questions]}


class _SeenPicks:
    """Picks that note which replicas a choice has looked at; all else is the picks' own."""

    def __init__(self, picks: PickTable) -> None:
        self.picks = picks
        self.looked: tuple[int, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.picks, name)

    def pick(
        self, random: Callable[[], float], choices: int = 4, without: int = -1, pool: Sequence[int] | None = None
    ) -> int:
        """As `PickTable.pick`, with the same draws."""
        draws: list[float] = []

        def drawn() -> float:
            draws.append(random())
            return draws[-1]

        i = self.picks.pick(drawn, choices, without, pool)
        with contextlib.suppress(Exception):  # the choice stands
            self.looked = looked_at(self.picks, draws, choices, without, pool)
        return i
