"""The life of every call in one router: one literal table, and a book in which all counts are looked up.

A call is one attempt to have a request answered. `Calls.handle` takes what happened to it and returns what is to be
done about it; the table alone says where an event leads. Whatever else a router needs to know of its calls (how many
are on a replica, on their way or waiting, how old they are, which may be retried or moved) is derived from this book.

Nothing expires by time: a book that forgets a live call is wrong for ever after. All calls come from one thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from itertools import chain, islice
from typing import Generic, TypeVar

from shadecast.errors import TransitionError


class Phase(StrEnum):
    """Where a call stands."""

    WAITING = "waiting"
    """Asked for; no replica is chosen."""
    CHOSEN = "chosen"
    """A replica is chosen: the call takes a place there, so that the next choice sees it."""
    SENT = "sent"
    """On its way: the replica has not said whether it takes it."""
    ACCEPTED = "accepted"
    """The replica works on it."""
    PRODUCED = "produced"
    """The replica has given all of a stream and is free again; whether it went well is known once it has been read."""
    ENDED = "ended"
    """It went well or failed, and is recorded as an outcome."""
    MOVED = "moved"
    """Another attempt has taken over; this one keeps its place until its replica has noticed that it is cancelled."""
    DROPPED = "dropped"
    """Over without an outcome: cancelled, never sent, or left for another attempt."""


class Event(StrEnum):
    """What may happen to a call."""

    CHOOSE = "choose"
    PASS = "pass"  # noqa: S105 - no password
    """The choice is not used: the replica turned out to be full."""
    SEND = "send"
    ACCEPT = "accept"
    REJECT = "reject"
    """The replica is full; the caller asks again."""
    RETRY = "retry"
    """The router does not wait for the replica's word any longer; the caller asks again."""
    PRODUCE = "produce"
    END = "end"
    MOVE = "move"
    DROP = "drop"


class Do(StrEnum):
    """What follows from an event, for the owner of the book to carry out."""

    COUNT = "count"
    """The number of calls on `call.replica_id` has changed: score the replica anew."""
    RECORD = "record"
    """`call.duration_s` and `call.ok` are an outcome."""
    EVIDENCE = "evidence"
    """`call.duration_s` is how long it has taken, at least."""
    CLOSE = "close"
    """Nothing more happens to it: let go of what is kept beside it."""


_COUNT, _CLOSE = (Do.COUNT,), (Do.CLOSE,)
_LEAVE = (Do.COUNT, Do.CLOSE)

TRANSITIONS: Mapping[tuple[Phase, Event], tuple[Phase, tuple[Do, ...]]] = {
    (Phase.WAITING, Event.CHOOSE): (Phase.CHOSEN, _COUNT),
    (Phase.WAITING, Event.DROP): (Phase.DROPPED, _CLOSE),
    (Phase.CHOSEN, Event.PASS): (Phase.WAITING, _COUNT),
    (Phase.CHOSEN, Event.SEND): (Phase.SENT, ()),
    (Phase.CHOSEN, Event.DROP): (Phase.DROPPED, _LEAVE),
    (Phase.SENT, Event.ACCEPT): (Phase.ACCEPTED, ()),
    (Phase.SENT, Event.REJECT): (Phase.WAITING, _COUNT),
    (Phase.SENT, Event.RETRY): (Phase.WAITING, (Do.COUNT, Do.EVIDENCE)),
    (Phase.SENT, Event.DROP): (Phase.DROPPED, _LEAVE),
    (Phase.ACCEPTED, Event.PRODUCE): (Phase.PRODUCED, _COUNT),
    (Phase.ACCEPTED, Event.END): (Phase.ENDED, (Do.COUNT, Do.RECORD, Do.CLOSE)),
    (Phase.ACCEPTED, Event.MOVE): (Phase.MOVED, (Do.EVIDENCE,)),
    (Phase.ACCEPTED, Event.DROP): (Phase.DROPPED, _LEAVE),
    (Phase.PRODUCED, Event.END): (Phase.ENDED, (Do.RECORD, Do.CLOSE)),
    (Phase.PRODUCED, Event.DROP): (Phase.DROPPED, _CLOSE),
    (Phase.MOVED, Event.PRODUCE): (Phase.DROPPED, _LEAVE),
    (Phase.MOVED, Event.END): (Phase.DROPPED, _LEAVE),
    (Phase.MOVED, Event.DROP): (Phase.DROPPED, _LEAVE),
}


class Call:
    """One attempt. Its owner may keep more beside it, in a subclass; what stands here is written by `Calls` alone.

    Defaults are the class's, so that making one costs next to nothing.
    """

    phase = Phase.WAITING
    replica_id = ""
    """Where it is, or was before it had to wait again."""
    since_s = 0.0
    """When it was asked for, chosen (also once sent) or accepted (also once moved)."""
    others = 0.0
    """Other calls on the replica: of this router at the choice, of all, as the replica says, from acceptance on."""
    cost = 1.0
    """Units of work."""
    duration_s = math.nan
    """Of an outcome, or the least that it would have taken."""
    ok = True
    items = 0
    """Of a stream that has ended; 0 of a single answer."""
    first_item_s = math.nan
    predicted = predicted_ours = 0.0
    refused = False
    """As in `Outcome`."""
    counts = True
    """Whether it is somebody's request. One that a copy has caused takes its place, and nothing is learned from it."""

    @property
    def origin(self) -> str:
        """Equal for calls whose failures may be the doing of one sender; asked for where one has failed."""
        return ""

    def age_s(self, now_s: float) -> float:
        """Since the choice, or from acceptance on since that."""
        return max(now_s - self.since_s, 0.0)


C = TypeVar("C", bound=Call)
_WAITING, _CHOSEN, _SENT, _ACCEPTED, _PRODUCED, _ENDED, _MOVED, _DROPPED = Phase  # as globals: half the time


class _Replica(Generic[C]):
    """Calls that take a place on one replica, each kind in the order in which they came; totals since the start."""

    __slots__ = ("failed", "finished", "on_the_way", "running", "started")

    def __init__(self) -> None:
        self.on_the_way: dict[C, None] = {}
        self.running: dict[C, None] = {}
        self.started = self.finished = self.failed = 0


class Calls(Generic[C]):
    """The book of one router's calls."""

    __slots__ = ("_produced", "_replicas", "_waiting", "changed")

    def __init__(self) -> None:
        self._waiting: dict[C, None] = {}
        self._produced: dict[C, None] = {}
        self._replicas: dict[str, _Replica[C]] = {}
        self.changed: set[str] = set()
        """Replicas whose counts have changed; whoever reads them empties it."""

    # ------------------------------------------------------------------ events

    def open(self, call: C, now_s: float) -> None:
        """A new call, which waits. One that is chosen for at once need not be opened."""
        call.since_s = now_s
        self._waiting[call] = None

    def handle(
        self, call: C, event: Event, now_s: float, *, replica_id: str = "", others: float = 0.0, ok: bool = True
    ) -> tuple[Do, ...]:
        """Carry out an event and return what follows from it.

        CHOOSE needs the `replica_id`, ACCEPT the `others` that the replica has told of, END whether it went `ok`.
        Raises TransitionError, and changes nothing, if the table does not list the event in the call's phase.
        """
        before = call.phase
        try:
            after, follows = TRANSITIONS[before, event]
        except KeyError:
            allowed = ", ".join(e for p, e in TRANSITIONS if p is before) or "none"
            raise TransitionError(f"call: event {event} is not allowed in phase {before}; allowed: {allowed}") from None
        call.phase = after
        if after is _SENT:
            return follows
        if after is _CHOSEN:
            self._waiting.pop(call, None)
            replica = self._replicas.get(replica_id) or self._of(replica_id)
            self.changed.add(replica_id)
            call.replica_id, call.since_s = replica_id, now_s
            call.others = len(replica.running) + len(replica.on_the_way)
            replica.on_the_way[call] = None
            return follows
        if before is _WAITING:
            self._waiting.pop(call, None)
            return follows
        replica = self._of(call.replica_id)
        self.changed.add(call.replica_id)
        if after is _ACCEPTED:
            del replica.on_the_way[call]
            replica.running[call] = None
            replica.started += call.counts
            call.since_s, call.others = now_s, others
            return follows
        if before is not _PRODUCED:
            call.duration_s = now_s - call.since_s
        if after is _ENDED:
            call.ok = ok
            replica.finished += call.counts
            replica.failed += call.counts and not ok
        left, entered = self._kept_in(before, replica), self._kept_in(after, replica)
        if left is not entered:
            if left is not None:
                left.pop(call, None)
            if entered is not None:
                entered[call] = None
        if after is _WAITING:
            call.since_s = now_s
        return follows

    def _kept_in(self, phase: Phase, replica: _Replica[C]) -> dict[C, None] | None:
        if phase is _ACCEPTED or phase is _MOVED:
            return replica.running
        if phase is _CHOSEN or phase is _SENT:
            return replica.on_the_way
        if phase is _WAITING:
            return self._waiting
        return self._produced if phase is _PRODUCED else None

    def _of(self, replica_id: str) -> _Replica[C]:
        replica = self._replicas.get(replica_id)
        if replica is None:
            replica = self._replicas[replica_id] = _Replica()
        return replica

    def forget(self, replica_id: str) -> bool:
        """Let go of a replica that is gone, once no call is left there; whether that is so."""
        kept = self._replicas.get(replica_id)
        if kept is not None and (kept.running or kept.on_the_way):
            return False
        self._replicas.pop(replica_id, None)
        return True

    # ------------------------------------------------------------------ what is in the book

    def in_flight(self, replica_id: str) -> int:
        """Calls that take a place on a replica: chosen for it, on their way or running."""
        kept = self._replicas.get(replica_id)
        return len(kept.running) + len(kept.on_the_way) if kept is not None else 0

    def on_the_way(self, replica_id: str) -> int:
        """Of those, the ones that the replica has not accepted."""
        kept = self._replicas.get(replica_id)
        return len(kept.on_the_way) if kept is not None else 0

    def all_in_flight(self) -> dict[str, int]:
        """Of every replica that has any."""
        return {r: count for r, k in self._replicas.items() if (count := len(k.running) + len(k.on_the_way))}

    def totals(self, replica_id: str) -> tuple[int, int, int]:
        """Calls accepted, ended, and ended badly on a replica, as long as this router has known it."""
        kept = self._replicas.get(replica_id)
        return (kept.started, kept.finished, kept.failed) if kept is not None else (0, 0, 0)

    @property
    def waiting(self) -> int:
        """Calls without a replica, those that count."""
        return sum(call.counts for call in self._waiting)

    @property
    def open_calls(self) -> int:
        """Calls that are not over."""
        return len(self._waiting) + len(self._produced) + sum(self.all_in_flight().values())

    def unaccepted(self) -> Iterator[C]:
        """Calls that were sent, or are about to be, on all replicas."""
        return chain.from_iterable(list(kept.on_the_way) for kept in self._replicas.values())

    def running(self, replica_id: str) -> Iterator[C]:
        """Calls that a replica works on, oldest first, without those that have moved on."""
        kept = self._replicas.get(replica_id)
        return (call for call in (list(kept.running) if kept is not None else ()) if call.phase is _ACCEPTED)

    def all_running(self) -> Iterator[C]:
        """Calls that any replica works on, also those that have moved on."""
        return chain.from_iterable(list(kept.running) for kept in self._replicas.values())

    def oldest_s(self, now_s: float) -> float:
        """Age of the oldest call that counts, of those that replicas work on; 0 without any."""
        oldest = (next(_counting(kept.running), None) for kept in self._replicas.values())
        return max((call.age_s(now_s) for call in oldest if call is not None), default=0.0)

    def unfinished(self, replica_id: str, most: int) -> list[C]:
        """The oldest calls that count and take a place on a replica, the oldest first."""
        kept = self._replicas.get(replica_id)
        if kept is None:
            return []
        first = chain(islice(_counting(kept.running), most), islice(_counting(kept.on_the_way), most))
        return sorted(first, key=lambda call: call.since_s)[:most]


def _counting(calls: Iterable[C]) -> Iterator[C]:
    return (call for call in calls if call.counts)
