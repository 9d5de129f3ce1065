"""What a router tells the coordinator: its calls' outcomes, counts and ages, as far as they have changed.

Counts are totals since the router's start, and evidence (outcomes, mirrored pairs) carries the number of the report
that it went into first: whatever gets lost on the way, nothing is counted twice. A report holds what has changed since
the last one that was acknowledged; the first one, and one that is asked for, hold all. `shadecast.inbox` reads them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shadecast.calls import Call, Calls
from shadecast.histogram import Histogram, to_message
from shadecast.messages import message, to_columns
from shadecast.types import Outcome, PairedSample, Unfinished

_MAX_OUTCOMES = 64
_MAX_UNFINISHED = 16
_MAX_PAIRS = 256
_MOST_NEW = 1000
LONGEST_PREDICTED = 100.0
"""In units of an idle nominal replica's time, what counts in a comparison: a full replica's has no bound."""

TOTALS = (
    "mirrored",
    "mirror_dropped",
    "uncopyable",
    "rescued",
    "observed",
    "observed_time_taken",
    "observed_time_ours",
    "retried",
    "moved",
    "resumed",
    "prompt_tokens",
    "cached_tokens",
)
"""Counts of a router that are no replica's."""
_UNKNOWN = (-1.0, -1.0)
_NO_MEMORY: Mapping[str, tuple[float, float]] = {}
REFUSALS = ("cancelled",)
"""Why a request got no replica: its caller gave up, or its deadline passed, while it waited."""


@dataclass(frozen=True, slots=True)
class ReplicaTotals:
    """One replica in a report: how it is reached, its calls now, and totals since the router's start."""

    replica_id: str
    node_id: str = ""
    max_ongoing: int = 1
    in_flight: int = 0
    started: int = 0
    finished: int = 0
    failed: int = 0
    items: int = 0
    """Items (tokens where these are known) that streams gave, each stream's first one not counted, while somebody was
    waiting for them."""
    stream_s: float = 0.0
    """The time in which they did, summed over the streams."""
    kv_own: float = -1.0
    """Fraction of its memory for keys and values that this router's calls take; below 0 where nobody counts."""
    kv_told: float = -1.0
    """Fraction that is used, as the engine itself says; below 0 where it does not."""


@dataclass(slots=True)
class _Told:
    """What was last reported of a replica."""

    changed: int = 0
    """Number of the report in which it last changed; 0: it is not among those reported."""
    new: bool = True
    items: float = 0.0
    stream_s: float = 0.0
    outcomes: deque[tuple[int, Outcome]] = field(default_factory=lambda: deque(maxlen=_MAX_OUTCOMES))


class Ledger:
    """Evidence and counts of one router. Threads: the owner calls everything from one event loop."""

    def __init__(self, router_id: str, deployment: str, calls: Calls[Any]) -> None:
        self.router_id, self._deployment, self._calls = router_id, deployment, calls
        self._replicas: dict[str, _Told] = {}
        self._alive: Sequence[tuple[str, str, int]] = ()
        self._members: dict[str, tuple[str, int]] = {}
        """Node and greatest number of calls of each replica that is alive."""
        self._changed: set[str] = set()
        """Replicas with evidence, or other members than before, since the last report."""
        self._unheard: set[str] = set()
        """Replicas with changes that no acknowledged report holds."""
        self._leaving: set[str] = set()
        """Replicas that are not alive any more, and have calls left."""
        self._gone: dict[str, int] = {}
        """Replicas that were reported and are not alive any more: the report that says so."""
        self._began: dict[str, int] = {}
        """Replicas whose totals begin at nothing, now or when they come back: the report that says so."""
        self._memory: Mapping[str, tuple[float, float]] = {}
        self._pairs: deque[tuple[int, PairedSample]] = deque(maxlen=_MAX_PAIRS)
        self._seq = 0
        self._acknowledged = 0
        self._reported_s: float | None = None
        self.totals = dict.fromkeys(TOTALS, 0.0)
        self._refused: dict[str, int] = {}
        self._new: list[float] = []
        """Durations of calls that went well, which are not counted yet: that is not in a request's way."""
        self._durations, self._first_items = Histogram(), Histogram()

    # ------------------------------------------------------------------ evidence

    def record(self, call: Call) -> None:
        """A call has ended: its outcome."""
        origin = "" if call.ok else call.origin
        outcome = Outcome(
            call.duration_s,
            call.others,
            call.ok,
            call.cost,
            call.first_item_s,
            call.items,
            origin,
            call.predicted,
            call.predicted_ours,
            call.refused,
        )
        if call.ok:
            self._new.append(call.duration_s)
            if call.items:
                self._first_items.add(call.first_item_s)
            if len(self._new) == _MOST_NEW:
                self._count_new()
        self._keep(call.replica_id, outcome)

    def evidence(self, call: Call) -> None:
        """A call was taken off its replica after so long: that must not take the evidence along. No request ended."""
        self._keep(call.replica_id, Outcome(call.duration_s, call.others, True, call.cost))

    def _keep(self, replica_id: str, outcome: Outcome) -> None:
        self._of(replica_id).outcomes.append((self._seq + 1, outcome))
        self._changed.add(replica_id)

    def pace(self, replica_id: str, items: float, stream_s: float) -> None:
        """Streams on a replica gave `items` in `stream_s` seconds of waiting for them (summed over the streams)."""
        told = self._of(replica_id)
        told.items += items
        told.stream_s += stream_s
        self._changed.add(replica_id)

    def pair(self, sample: PairedSample) -> None:
        """A mirrored pair is complete; the oldest give way."""
        self._pairs.append((self._seq + 1, sample))

    def count(self, name: str, by: float = 1.0) -> None:
        """Add to one of TOTALS."""
        self.totals[name] += by

    def observed(self, call: Call, taken: float, ours: float, *, refused: bool) -> None:
        """What Serve has chosen for a call, and what would have been, by our own estimates."""
        call.predicted, call.predicted_ours, call.refused = taken, ours, refused
        self.count("observed")
        self.count("observed_time_taken", min(taken, LONGEST_PREDICTED))
        self.count("observed_time_ours", min(ours, LONGEST_PREDICTED))

    def _count_new(self) -> None:
        for duration_s in self._new:
            self._durations.add(duration_s)
        self._new.clear()

    @property
    def mean_s(self) -> float:
        """The mean duration of all calls that went well; 0 without any."""
        self._count_new()
        counted = self._durations.durations()
        return counted.sum_s / max(sum(counted.counts), 1)

    def rescue(self, how: str) -> None:
        """A call goes on elsewhere: it was "retried", "moved" or "resumed"."""
        self.count("rescued")
        self.count(how)

    def refuse(self, reason: str) -> None:
        """A request got no replica. Reasons are few, in the form of names."""
        self._refused[reason] = self._refused.get(reason, 0) + 1

    def _of(self, replica_id: str) -> _Told:
        told = self._replicas.get(replica_id)
        if told is None:
            told = self._replicas[replica_id] = _Told()
        return told

    # ------------------------------------------------------------------ reports

    def report(
        self,
        now_s: float,
        alive: Sequence[tuple[str, str, int]],
        memory: Mapping[str, tuple[float, float]] = _NO_MEMORY,
        **more: Any,
    ) -> dict[str, Any]:
        """The next report. `alive` lists (replica_id, node_id, max_ongoing), the same object as long as it is the same.
        `memory` are `kv_own` and `kv_told` of each replica of a language model.

        Calls that a replica has not accepted count as in flight: one that is too slow even to say yes would look idle
        without them. Replicas that are gone are forgotten once no call is left on them; that they are gone, once it was
        acknowledged, or while nobody acknowledges anything. `more` travels as it is.
        """
        interval_s = 0.0 if self._reported_s is None else max(now_s - self._reported_s, 0.0)
        self._reported_s = now_s
        self._seq += 1
        base = self._acknowledged
        if memory != self._memory:
            self._changed.update(r for r in memory.keys() | self._memory.keys() if memory.get(r) != self._memory.get(r))
            self._memory = memory
        self._take_changes(alive)
        self._count_new()
        if not base:  # the report holds all, and whoever reads it forgets the rest
            self._gone.clear()
            self._began = {replica_id: seq for replica_id, seq in self._began.items() if replica_id in self._replicas}
        rows: list[ReplicaTotals] = []
        outcomes: list[tuple[int, int, Outcome]] = []
        unfinished: list[tuple[int, Unfinished]] = []
        for at, replica_id in enumerate(sorted(self._unheard) if base else self._members):
            told = self._of(replica_id)
            started, finished, failed = self._calls.totals(replica_id)
            node_id, max_ongoing = self._members[replica_id]
            in_flight, items, stream_s = self._calls.in_flight(replica_id), int(told.items), told.stream_s
            counts = in_flight, started, finished, failed, items, stream_s
            kv = memory.get(replica_id, _UNKNOWN)
            rows.append(ReplicaTotals(replica_id, node_id, max_ongoing, *counts, *kv))
            outcomes += [(at, seq, outcome) for seq, outcome in told.outcomes]
            unfinished += [
                (at, Unfinished(call.age_s(now_s), call.others, call.cost))
                for call in self._calls.unfinished(replica_id, _MAX_UNFINISHED)
            ]
        return message(
            "report",
            router_id=self.router_id,
            deployment=self._deployment,
            seq=self._seq,
            base=base,
            interval_s=interval_s,
            replicas=to_columns(rows),
            gone=[replica_id for replica_id, seq in self._gone.items() if seq > base],
            began={"replica_id": list(self._began), "seq": list(self._began.values())},
            outcomes={
                "at": [at for at, _, _ in outcomes],
                "seq": [seq for _, seq, _ in outcomes],
                **to_columns([outcome for _, _, outcome in outcomes]),
            },
            unfinished={"at": [at for at, _ in unfinished], **to_columns([each for _, each in unfinished])},
            pairs={"seq": [seq for seq, _ in self._pairs], **to_columns([pair for _, pair in self._pairs])},
            waiting=self._calls.waiting,
            totals=dict(self.totals),
            refused=dict(self._refused),
            durations=to_message(self._durations.durations()),
            first_items=to_message(self._first_items.durations()),
            **more,
        )

    def _take_changes(self, alive: Sequence[tuple[str, str, int]]) -> None:
        """What has changed since the last report, in the book, in the evidence and in who is alive."""
        changed = self._changed | self._calls.changed
        self._changed, self._calls.changed = set(), set()
        if alive is not self._alive:
            members = {replica_id: (node_id, max_ongoing) for replica_id, node_id, max_ongoing in alive}
            changed.update(r for r, member in members.items() if self._members.get(r) != member)
            changed.update(self._members.keys() - members.keys())
            self._alive, self._members = alive, members
        for replica_id in changed & self._members.keys():
            told = self._of(replica_id)
            if told.new:
                self._began[replica_id] = self._seq
            told.changed, told.new = self._seq, False
            self._unheard.add(replica_id)
            self._gone.pop(replica_id, None)
        self._leaving = (self._leaving | changed) - self._members.keys()
        for replica_id in list(self._leaving):
            self._leave(replica_id)

    def _leave(self, replica_id: str) -> None:
        """A replica is not alive: say so, and forget it once no call is left there."""
        self._unheard.discard(replica_id)
        told = self._of(replica_id)
        if told.changed:
            self._gone[replica_id] = self._seq
        told.changed, told.new = 0, False
        if self._calls.forget(replica_id):
            self._leaving.discard(replica_id)
            del self._replicas[replica_id]
            self._began[replica_id] = self._seq

    def acknowledged(self, seq: int) -> None:
        """The coordinator has taken report `seq`; 0 means that it wants to have everything.

        So does one that has taken only an older one than was acknowledged: it has restarted.
        """
        self._acknowledged = seq = seq if seq >= self._acknowledged else 0
        if not seq:
            self._unheard.update(self._members)
        for replica_id in list(self._unheard):
            told = self._replicas[replica_id]
            while told.outcomes and told.outcomes[0][0] <= seq:
                told.outcomes.popleft()
            if told.changed <= seq:
                self._unheard.discard(replica_id)
        while self._pairs and self._pairs[0][0] <= seq:
            self._pairs.popleft()
        self._gone = {replica_id: at for replica_id, at in self._gone.items() if at > seq}
        self._began = {replica_id: at for replica_id, at in self._began.items() if at > seq}
