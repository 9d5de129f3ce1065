"""What one router remembers of its own requests: exactly one start and one end each, and a report now and then.

Entries live as long as their request does; nothing expires by time, because a counter that forgets a live request
stays wrong for ever after. Threads: the owner calls everything from one event loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from shadecast.types import Observed, Outcome, PairedSample, ReplicaReport, RouterReport, RoutingTable, Unfinished

_MAX_OUTCOMES = 64
_MAX_UNFINISHED = 16
_MAX_PAIRS = 256


@dataclass(slots=True)
class Started:
    """A live request under way."""

    replica_id: str
    started_s: float
    in_flight_at_start: float
    cost: float = 1.0
    first_item_s: float = float("nan")
    items: int = 0


class _Counts:
    __slots__ = ("failed", "finished", "items", "open", "outcomes", "started", "stream_s")

    def __init__(self) -> None:
        self.open: dict[str, Started] = {}
        self.outcomes: list[Outcome] = []
        self.started = self.finished = self.failed = self.items = 0
        self.stream_s = 0.0


class Ledger:
    """Live requests and their outcomes per replica, since the last report."""

    def __init__(self, router_id: str, deployment: str) -> None:
        self._router_id = router_id
        self._deployment = deployment
        self._replicas: dict[str, _Counts] = {}
        self._pairs: list[PairedSample] = []
        self._seq = 0
        self._reported_s: float | None = None
        self.mirrored = self.mirror_dropped = self.uncopyable = self.rescued = 0
        self.finished_total = self.failed_total = 0
        self._observed = Observed()

    def start(
        self, request_id: str, replica_id: str, now_s: float, in_flight_at_start: float, cost: float = 1.0
    ) -> None:
        """A replica has accepted a request. A second start of the same id on the same replica is ignored."""
        counts = self._replicas.get(replica_id)
        if counts is None:
            counts = self._replicas[replica_id] = _Counts()
        if request_id not in counts.open:
            counts.open[request_id] = Started(replica_id, now_s, in_flight_at_start, cost)
            counts.started += 1

    def finish(self, request_id: str, replica_id: str, now_s: float, *, ok: bool, counted: bool = True) -> float | None:
        """A request has ended; returns its duration in seconds, or None if it was not open (so: only once).

        `counted` False (a cancelled client) frees the place without an outcome.
        """
        entry = self.release(request_id, replica_id)
        if entry is None:
            return None
        duration_s = max(now_s - entry.started_s, 0.0)
        if counted:
            self.record(entry, duration_s, ok=ok)
        return duration_s

    def release(self, request_id: str, replica_id: str) -> Started | None:
        """Free a request's place without an outcome yet; None if it was not open (so: only once)."""
        counts = self._replicas.get(replica_id)
        return counts.open.pop(request_id, None) if counts is not None else None

    def record(self, entry: Started, duration_s: float, *, ok: bool) -> None:
        """Keep the outcome of a request whose place was freed, for the next report."""
        counts = self._replicas.get(entry.replica_id)
        if counts is None:
            counts = self._replicas[entry.replica_id] = _Counts()
        counts.finished += 1
        self.finished_total += 1
        if not ok:
            counts.failed += 1
            self.failed_total += 1
        outcomes = counts.outcomes
        if len(outcomes) >= _MAX_OUTCOMES:
            del outcomes[0]
        outcomes.append(Outcome(duration_s, entry.in_flight_at_start, ok, entry.cost, entry.first_item_s, entry.items))

    def observe(self, time_taken: float, time_ours: float) -> None:
        """A request was routed by another rule: predicted relative times of what it chose, and of what ours would."""
        was = self._observed
        self._observed = Observed(was.requests + 1, was.time_taken + time_taken, was.time_ours + time_ours)

    def give_up(self, replica_id: str, waited_s: float, in_flight_at_start: float, cost: float = 1.0) -> None:
        """A request was taken off a replica after so long: it would have taken longer, which is evidence that must not
        go with it. No request counts as finished."""
        counts = self._replicas.get(replica_id)
        if counts is None:
            counts = self._replicas[replica_id] = _Counts()
        counts.outcomes = [*counts.outcomes[1 - _MAX_OUTCOMES :], Outcome(waited_s, in_flight_at_start, True, cost)]

    def pace(self, replica_id: str, items: int, stream_s: float) -> None:
        """Streams on a replica gave `items` in `stream_s` seconds of waiting for them (summed over the streams)."""
        counts = self._replicas.get(replica_id)
        if counts is not None:
            counts.items += items
            counts.stream_s += stream_s

    def pair(self, sample: PairedSample) -> None:
        """Keep a mirrored pair for the next report; the oldest give way."""
        if len(self._pairs) >= _MAX_PAIRS:
            del self._pairs[0]
        self._pairs.append(sample)

    def in_flight(self, replica_id: str) -> int:
        """Live requests of this router on one replica."""
        counts = self._replicas.get(replica_id)
        return len(counts.open) if counts is not None else 0

    def open_on(self, replica_id: str) -> list[tuple[str, Started]]:
        """Live requests of this router on one replica, oldest first."""
        counts = self._replicas.get(replica_id)
        return list(counts.open.items()) if counts is not None else []

    def all_in_flight(self) -> dict[str, int]:
        """Live requests of this router on every replica that has any."""
        return {replica_id: len(counts.open) for replica_id, counts in self._replicas.items() if counts.open}

    def report(
        self,
        now_s: float,
        alive: Iterable[tuple[str, str, int]],
        level: str = "",
        *,
        table_epoch: int = 0,
        held_table: RoutingTable | None = None,
        waiting: Iterable[Started] = (),
    ) -> RouterReport:
        """Everything since the last report, and start anew. `alive` lists (replica_id, node_id, max_ongoing).

        `waiting` are requests that were sent, or are about to be, and that their replica has not accepted yet. They
        count as in flight: a replica that is too slow even to say yes would look idle without them.
        Replicas that are gone are left out of the report, and forgotten once nothing is open on them.
        """
        interval_s = 0.0 if self._reported_s is None else max(now_s - self._reported_s, 0.0)
        self._reported_s = now_s
        self._seq += 1
        replicas = []
        alive_ids = set()
        unanswered: dict[str, list[Started]] = {}
        for entry in waiting:
            unanswered.setdefault(entry.replica_id, []).append(entry)
        for replica_id, node_id, max_ongoing in alive:
            alive_ids.add(replica_id)
            counts = self._replicas.get(replica_id)
            sent = unanswered.get(replica_id, [])
            if counts is None:
                if not sent:
                    replicas.append(ReplicaReport(replica_id, node_id, max_ongoing, 0))
                    continue
                counts = self._replicas[replica_id] = _Counts()
            first = islice(counts.open.values(), _MAX_UNFINISHED)  # insertion order is age order
            oldest = sorted([*first, *sent], key=lambda s: s.started_s)[:_MAX_UNFINISHED]
            replicas.append(
                ReplicaReport(
                    replica_id,
                    node_id,
                    max_ongoing,
                    len(counts.open) + len(sent),
                    counts.started,
                    counts.finished,
                    counts.failed,
                    tuple(counts.outcomes),
                    tuple(Unfinished(max(now_s - s.started_s, 0.0), s.in_flight_at_start, s.cost) for s in oldest),
                    counts.items,
                    counts.stream_s,
                )
            )
            counts.outcomes = []
            counts.started = counts.finished = counts.failed = counts.items = 0
            counts.stream_s = 0.0
        for replica_id in [r for r, c in self._replicas.items() if r not in alive_ids and not c.open]:
            del self._replicas[replica_id]
        report = RouterReport(
            self._router_id,
            self._deployment,
            self._seq,
            interval_s,
            tuple(replicas),
            tuple(self._pairs),
            self.mirrored,
            self.mirror_dropped,
            self.uncopyable,
            self.rescued,
            table_epoch,
            level,
            self._observed,
            held_table,
        )
        self._pairs = []
        self._observed = Observed()
        self.mirrored = self.mirror_dropped = self.uncopyable = self.rescued = 0
        return report
