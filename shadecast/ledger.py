"""What a router tells the coordinator: its calls' outcomes, counts and ages, as far as they have changed.

Counts are totals since the router's start, and evidence (outcomes, mirrored pairs) carries the number of the report
that it went into first: whatever gets lost on the way, nothing is counted twice. A report holds what has changed since
the last one that was acknowledged; the first one, and one that is asked for, hold all. `shadecast.inbox` reads them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from shadecast.calls import Call, Calls
from shadecast.messages import message, to_columns
from shadecast.types import Outcome, PairedSample, Unfinished

_MAX_OUTCOMES = 64
_MAX_UNFINISHED = 16
_MAX_PAIRS = 256

TOTALS = (
    "mirrored",
    "mirror_dropped",
    "uncopyable",
    "rescued",
    "observed",
    "observed_time_taken",
    "observed_time_ours",
)
"""Counts of a router that are no replica's."""


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
    """Items that streams gave, each stream's first one not counted, while somebody was waiting for them."""
    stream_s: float = 0.0
    """The time in which they did, summed over the streams."""


@dataclass(slots=True)
class _Told:
    """What was last reported of a replica."""

    state: tuple[Any, ...] = ()
    changed: int = 0
    """Number of the report in which that changed."""
    recorded: int = 0
    """Outcomes since the start."""
    items: int = 0
    stream_s: float = 0.0
    outcomes: deque[tuple[int, Outcome]] = field(default_factory=lambda: deque(maxlen=_MAX_OUTCOMES))


class Ledger:
    """Evidence and counts of one router. Threads: the owner calls everything from one event loop."""

    def __init__(self, router_id: str, deployment: str, calls: Calls[Any]) -> None:
        self._router_id, self._deployment, self._calls = router_id, deployment, calls
        self._replicas: dict[str, _Told] = {}
        self._gone: dict[str, int] = {}
        """Replicas that were reported and are not alive any more: the report that says so."""
        self._forgotten: dict[str, int] = {}
        """Replicas whose totals begin anew if they come back: the report that says so."""
        self._pairs: deque[tuple[int, PairedSample]] = deque(maxlen=_MAX_PAIRS)
        self._seq = 0
        self._acknowledged = 0
        self._reported_s: float | None = None
        self.totals = dict.fromkeys(TOTALS, 0.0)

    # ------------------------------------------------------------------ evidence

    def record(self, call: Call) -> None:
        """A call has ended: its outcome."""
        outcome = Outcome(call.duration_s, call.others, call.ok, call.cost, call.first_item_s, call.items)
        self._keep(call.replica_id, outcome)

    def evidence(self, call: Call) -> None:
        """A call was taken off its replica after so long: that must not take the evidence along. No request ended."""
        self._keep(call.replica_id, Outcome(call.duration_s, call.others, True, call.cost))

    def _keep(self, replica_id: str, outcome: Outcome) -> None:
        told = self._of(replica_id)
        told.outcomes.append((self._seq + 1, outcome))
        told.recorded += 1

    def pace(self, replica_id: str, items: int, stream_s: float) -> None:
        """Streams on a replica gave `items` in `stream_s` seconds of waiting for them (summed over the streams)."""
        told = self._of(replica_id)
        told.items += items
        told.stream_s += stream_s

    def pair(self, sample: PairedSample) -> None:
        """A mirrored pair is complete; the oldest give way."""
        self._pairs.append((self._seq + 1, sample))

    def count(self, name: str, by: float = 1.0) -> None:
        """Add to one of TOTALS."""
        self.totals[name] += by

    def _of(self, replica_id: str) -> _Told:
        told = self._replicas.get(replica_id)
        if told is None:
            told = self._replicas[replica_id] = _Told()
        return told

    # ------------------------------------------------------------------ reports

    def report(self, now_s: float, alive: Iterable[tuple[str, str, int]], **more: Any) -> dict[str, Any]:
        """The next report. `alive` lists (replica_id, node_id, max_ongoing); `more` travels as it is.

        Calls that a replica has not accepted count as in flight: one that is too slow even to say yes would look idle
        without them. Replicas that are gone are forgotten once no call is left on them.
        """
        interval_s = 0.0 if self._reported_s is None else max(now_s - self._reported_s, 0.0)
        self._reported_s = now_s
        self._seq += 1
        base = self._acknowledged
        rows: list[ReplicaTotals] = []
        outcomes: list[tuple[int, int, Outcome]] = []
        unfinished: list[tuple[int, Unfinished]] = []
        listed = set()
        for replica_id, node_id, max_ongoing in alive:
            listed.add(replica_id)
            told = self._of(replica_id)
            started, finished, failed, chosen = self._calls.totals(replica_id)
            in_flight = self._calls.in_flight(replica_id)
            state = (node_id, max_ongoing, in_flight, chosen, started, finished, failed, told.recorded, told.stream_s)
            if state != told.state:
                told.state, told.changed = state, self._seq
            if told.changed <= base:
                continue
            totals = (in_flight, started, finished, failed, told.items, told.stream_s)
            at = len(rows)
            rows.append(ReplicaTotals(replica_id, node_id, max_ongoing, *totals))
            outcomes += [(at, seq, outcome) for seq, outcome in told.outcomes]
            unfinished += [
                (at, Unfinished(call.age_s(now_s), call.others, call.cost))
                for call in self._calls.unfinished(replica_id, _MAX_UNFINISHED)
            ]
        self._forget(listed)
        return message(
            "report",
            router_id=self._router_id,
            deployment=self._deployment,
            seq=self._seq,
            base=base,
            interval_s=interval_s,
            replicas=to_columns(rows),
            gone=[replica_id for replica_id, seq in self._gone.items() if seq > base] if base else [],
            forgotten={"replica_id": list(self._forgotten), "seq": list(self._forgotten.values())},
            outcomes={
                "at": [at for at, _, _ in outcomes],
                "seq": [seq for _, seq, _ in outcomes],
                **to_columns([outcome for _, _, outcome in outcomes]),
            },
            unfinished={"at": [at for at, _ in unfinished], **to_columns([each for _, each in unfinished])},
            pairs={"seq": [seq for seq, _ in self._pairs], **to_columns([pair for _, pair in self._pairs])},
            waiting=self._calls.waiting,
            totals=dict(self.totals),
            **more,
        )

    def _forget(self, listed: set[str]) -> None:
        self._calls.forget(listed)
        for replica_id in [r for r in self._replicas if r not in listed]:
            told = self._replicas[replica_id]
            if told.state:
                self._gone[replica_id] = self._seq
                told.state = ()
            if not self._calls.knows(replica_id):
                self._forgotten[replica_id] = self._seq
                del self._replicas[replica_id]
        for replica_id in listed & self._gone.keys():
            del self._gone[replica_id]

    def acknowledged(self, seq: int) -> None:
        """The coordinator has taken report `seq`; 0 means that it wants to have everything."""
        self._acknowledged = seq
        for told in self._replicas.values():
            while told.outcomes and told.outcomes[0][0] <= seq:
                told.outcomes.popleft()
        while self._pairs and self._pairs[0][0] <= seq:
            self._pairs.popleft()
        self._gone = {replica_id: at for replica_id, at in self._gone.items() if at > seq}
        self._forgotten = {replica_id: at for replica_id, at in self._forgotten.items() if at > seq}
