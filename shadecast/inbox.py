"""Reads the routers' reports for one deployment: totals become increments, and nothing is counted twice.

A report that builds on one which is not known here (the coordinator has restarted, or had forgotten the router) is
answered by the wish for a full one. See `shadecast.ledger` for what a report holds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shadecast.config import LOST_AFTER_S
from shadecast.errors import MessageError
from shadecast.histogram import Durations, from_message
from shadecast.ledger import TOTALS, ReplicaTotals
from shadecast.messages import as_list, check, from_columns, from_mapping, message, numbers, rows_of, to_mapping
from shadecast.tables import read_table
from shadecast.types import (
    Forecast,
    NodeReport,
    NodeSnapshot,
    Observed,
    Outcome,
    PairedSample,
    ReplicaReport,
    RouterReport,
    Unfinished,
)

_Counted = tuple[int, int, int, int, float]
"""Started, finished, failed, items, stream-seconds."""
_NOTHING: _Counted = (0, 0, 0, 0, 0.0)
_FORGET_S = 60.0
"""What was counted of a router is remembered longer than the router counts, so that its evidence is not taken twice."""
_MOST_REASONS, _LONGEST_REASON = 12, 40


@dataclass(slots=True)
class _Router:
    """What has been counted of one router."""

    seq: int
    heard_s: float
    replicas: dict[str, _Counted] = field(default_factory=dict)
    totals: list[Any] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    durations: tuple[Durations, Durations] = (Durations(), Durations())


class Inbox:
    """All routers of one deployment."""

    def __init__(self) -> None:
        self._routers: dict[str, _Router] = {}

    def take(self, received: Any, now_s: float) -> tuple[RouterReport | None, int]:
        """The report, None if it cannot be used, and the number of the last one taken; 0 asks for a full one.

        Raises MessageError, and keeps nothing of it, if it cannot be read.
        """
        report = check(received, "report")
        seq, base = (int(number) for number in numbers(report, ("seq", "base")))
        router_id = report.get("router_id")
        self._forget(now_s)
        known = self._routers.get(router_id) if isinstance(router_id, str) else None
        if base and (known is None or base > known.seq or now_s - known.heard_s > LOST_AFTER_S):
            return None, 0  # the balancer counts nothing of it any more
        if known is not None and seq <= known.seq:
            return None, known.seq
        try:
            read = self._read(report, known, seq, base)
        except (TypeError, ValueError, LookupError, OverflowError) as error:
            version = report.get("version", "?")
            raise MessageError(f"a report of Shadecast {version} cannot be read: {error!r}") from None
        if known is None:
            known = self._routers[read.report.router_id] = _Router(seq, now_s)
        known.seq, known.heard_s, known.totals = seq, now_s, read.totals
        known.refused, known.durations = read.refused, read.durations
        for replica_id in read.began - read.counted.keys():
            known.replicas.pop(replica_id, None)
        if base:
            known.replicas.update(read.counted)
        else:
            known.replicas = read.counted
        return read.report, seq

    def _forget(self, now_s: float) -> None:
        for router_id in [k for k, router in self._routers.items() if now_s - router.heard_s > _FORGET_S]:
            del self._routers[router_id]

    def _read(self, message: Mapping[str, Any], known: _Router | None, seq: int, base: int) -> _Read:
        rows = list(rows_of(ReplicaTotals, message.get("replicas", {})))
        since = known.seq if known is not None else 0
        outcomes = _of_replicas(Outcome, message.get("outcomes", {}), len(rows), since)
        unfinished = _of_replicas(Unfinished, message.get("unfinished", {}), len(rows), None)
        began = _newer(message.get("began", {}), since)
        was_counted = known.replicas if known is not None else {}
        counted, views = {}, []
        for at, (replica_id, node_id, max_ongoing, in_flight, *totals_of, kv_own, kv_told) in enumerate(rows):
            started, finished, failed, items, stream_s = totals_of
            now = int(started), int(finished), int(failed), int(items), float(stream_s)
            # a router's first second counts; what it did before we knew of it does not
            if replica_id in began and (known is not None or seq == 1):
                before = _NOTHING
            else:
                before = was_counted.get(replica_id, now)
            counted[str(replica_id)] = now
            views.append(
                ReplicaReport(
                    str(replica_id),
                    str(node_id),
                    int(max_ongoing),
                    int(in_flight),
                    max(now[0] - before[0], 0),
                    max(now[1] - before[1], 0),
                    max(now[2] - before[2], 0),
                    tuple(outcomes.get(at, ())),
                    tuple(unfinished.get(at, ())),
                    max(now[3] - before[3], 0),
                    max(now[4] - before[4], 0.0),
                    float(kv_own),
                    float(kv_told),
                )
            )
        totals = numbers(message.get("totals", {}), TOTALS)
        was = known.totals if known is not None and known.totals else ([0.0] * len(TOTALS) if seq == 1 else totals)
        new = dict(zip(TOTALS, (max(b - a, 0.0) for a, b in zip(was, totals, strict=True)), strict=True))
        counts_at_all = known is not None or seq == 1
        refused = _refused(message.get("refused", {}))
        refused_before = known.refused if known is not None else ({} if counts_at_all else refused)
        durations = tuple(from_message(message.get(name, {}), name) for name in ("durations", "first_items"))
        durations_before = known.durations if known is not None else (Durations(), Durations())
        took = [b.since(a) if counts_at_all else Durations() for a, b in zip(durations_before, durations, strict=True)]
        interval_s, waiting, epoch = numbers(message, ("interval_s", "waiting", "table_epoch"))
        held = message.get("held_table")
        report = RouterReport(
            _text(message, "router_id"),
            _text(message, "deployment"),
            seq,
            float(interval_s),
            tuple(views),
            tuple(_new(PairedSample, message.get("pairs", {}), since)),
            int(new["mirrored"]),
            int(new["mirror_dropped"]),
            int(new["uncopyable"]),
            int(new["rescued"]),
            int(epoch),
            str(message.get("level", "")),
            Observed(int(new["observed"]), new["observed_time_taken"], new["observed_time_ours"]),
            read_table(held, None) if held is not None else None,
            bool(base),
            tuple(str(replica_id) for replica_id in as_list(message.get("gone", ()), "gone")),
            int(waiting),
            int(new["retried"]),
            int(new["moved"]),
            int(new["resumed"]),
            {reason: max(count - refused_before.get(reason, 0), 0) for reason, count in refused.items()},
            tuple(str(replica_id) for replica_id in as_list(message.get("ejected", ()), "ejected")),
            durations=took[0],
            first_items=took[1],
            prompt_tokens=int(new["prompt_tokens"]),
            cached_tokens=int(new["cached_tokens"]),
        )
        return _Read(report, totals, counted, began, refused, (durations[0], durations[1]))


@dataclass(frozen=True, slots=True)
class _Read:
    report: RouterReport
    totals: list[Any]
    counted: dict[str, _Counted]
    began: set[str]
    refused: dict[str, int]
    durations: tuple[Durations, Durations]


def _refused(received: Any) -> dict[str, int]:
    """Totals by reason; raises MessageError. Reasons that this version does not know are taken as they come, if few."""
    if not isinstance(received, Mapping):
        raise MessageError(f"refused: a mapping is expected, not {type(received).__name__}")
    counts = dict(zip(received, numbers(received, tuple(received)), strict=True))
    found: dict[str, int] = defaultdict(int)
    for reason, count in counts.items():
        plain = isinstance(reason, str) and reason.isidentifier() and len(reason) <= _LONGEST_REASON
        found[reason if plain and (reason in found or len(found) < _MOST_REASONS) else "other"] += int(count)
    return dict(found)


def _text(message: Mapping[str, Any], name: str) -> str:
    value = message.get(name)
    if not isinstance(value, str):
        raise MessageError(f"report: {name} = {value!r}: must be text")
    return value


def _newer(columns: Any, since: int) -> set[str]:
    """The replicas in columns whose `seq` is newer than `since`."""
    if not isinstance(columns, Mapping):
        raise MessageError(f"began: columns are expected, not {type(columns).__name__}")
    replica_ids, seqs = (as_list(columns.get(name, ()), name) for name in ("replica_id", "seq"))
    return {replica_id for replica_id, seq in zip(replica_ids, seqs, strict=True) if seq > since}


def _new(kind: type[Any], columns: Any, since: int) -> list[Any]:
    """Objects from columns whose `seq` is newer than `since`."""
    if not isinstance(columns, Mapping):
        raise MessageError(f"{kind.__name__}: columns are expected, not {type(columns).__name__}")
    found = from_columns(kind, {name: column for name, column in columns.items() if name not in ("at", "seq")})
    seqs = as_list(columns.get("seq", ()), "seq")
    if len(seqs) != len(found):
        raise MessageError(f"{kind.__name__}: {len(seqs)} numbers of {len(found)} objects")
    return [each for seq, each in zip(seqs, found, strict=True) if seq > since]


def _of_replicas(kind: type[Any], columns: Any, replicas: int, since: int | None) -> dict[int, list[Any]]:
    """Objects from columns by the index of the replica that they belong to, those newer than `since`."""
    if not isinstance(columns, Mapping):
        raise MessageError(f"{kind.__name__}: columns are expected, not {type(columns).__name__}")
    found = from_columns(kind, {name: column for name, column in columns.items() if name not in ("at", "seq")})
    places = as_list(columns.get("at", ()), "at")
    seqs = [0] * len(found) if since is None else as_list(columns.get("seq", ()), "seq")
    if len(places) != len(found) or len(seqs) != len(found):
        raise MessageError(f"{kind.__name__}: {len(places)} places and {len(seqs)} numbers of {len(found)} objects")
    by_replica: dict[int, list[Any]] = defaultdict(list)
    for at, seq, each in zip(places, seqs, found, strict=True):
        if not isinstance(at, int) or not 0 <= at < replicas:
            raise MessageError(f"{kind.__name__}: at = {at!r}: must be a place from 0 to {replicas - 1}")
        if since is None or seq > since:
            by_replica[at].append(each)
    return by_replica


def node_message(report: NodeReport) -> dict[str, Any]:
    """What a forecaster sends."""
    return message("node", **to_mapping(report))


def read_node(received: Any) -> NodeReport:
    """A node's telemetry and forecast; raises MessageError."""
    found = check(received, "node")
    forecast = found.get("forecast")
    return from_mapping(
        NodeReport,
        found,
        snapshot=from_mapping(NodeSnapshot, found.get("snapshot")),
        forecast=from_mapping(Forecast, forecast) if forecast is not None else None,
    )
