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
from shadecast.ledger import TOTALS, ReplicaTotals
from shadecast.messages import as_list, check, from_columns, from_mapping, message, numbers, to_mapping
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


@dataclass(slots=True)
class _Router:
    """What has been counted of one router."""

    seq: int
    heard_s: float
    replicas: dict[str, tuple[int, int, int, int, float]] = field(default_factory=dict)
    totals: list[Any] = field(default_factory=list)


class Inbox:
    """All routers of one deployment."""

    def __init__(self) -> None:
        self._routers: dict[str, _Router] = {}

    def take(self, received: Any, now_s: float) -> tuple[RouterReport | None, dict[str, Any]]:
        """The report, None if it cannot be used, and the answer to its router. Raises MessageError."""
        report = check(received, "report")
        seq, base, interval_s, waiting, epoch = numbers(report, ("seq", "base", "interval_s", "waiting", "table_epoch"))
        router_id, deployment = report.get("router_id"), report.get("deployment")
        if not isinstance(router_id, str) or not isinstance(deployment, str):
            raise MessageError(f"report: router_id = {router_id!r}, deployment = {deployment!r}: must be text")
        self._forget(now_s)
        known = self._routers.get(router_id)
        if base and (known is None or base > known.seq):
            return None, answer(acknowledged=0)
        if known is not None and seq <= known.seq:
            return None, answer(acknowledged=known.seq)
        read = self._read(report, known, int(seq))
        if known is None:
            known = self._routers[router_id] = _Router(int(seq), now_s)
        counted = known.totals or ([0.0] * len(TOTALS) if seq == 1 else read.totals)
        mirrored, dropped, uncopyable, rescued, *observed = (
            max(new - old, 0.0) for new, old in zip(read.totals, counted, strict=True)
        )
        known.seq, known.heard_s, known.totals = int(seq), now_s, read.totals
        if not base:
            known.replicas = {}
        known.replicas.update(read.counted)
        gone = tuple(as_list(report.get("gone", ()), "gone"))
        for replica_id in gone:
            known.replicas.pop(replica_id, None)
        held = report.get("held_table")
        return RouterReport(
            router_id,
            deployment,
            int(seq),
            interval_s,
            read.views,
            read.pairs,
            int(mirrored),
            int(dropped),
            int(uncopyable),
            int(rescued),
            int(epoch),
            str(report.get("level", "")),
            Observed(int(observed[0]), observed[1], observed[2]),
            read_table(held, None) if held is not None else None,
            bool(base),
            gone,
            int(waiting),
        ), answer(acknowledged=int(seq))

    def _forget(self, now_s: float) -> None:
        """Routers that were not heard of for so long are no more in the balancer's counts either."""
        for router_id in [k for k, router in self._routers.items() if now_s - router.heard_s > LOST_AFTER_S]:
            del self._routers[router_id]

    def _read(self, report: Mapping[str, Any], known: _Router | None, seq: int) -> _Read:
        rows = from_columns(ReplicaTotals, report.get("replicas", {}))
        since = known.seq if known is not None else 0
        outcomes = _of_replicas(Outcome, report.get("outcomes", {}), len(rows), since)
        unfinished = _of_replicas(Unfinished, report.get("unfinished", {}), len(rows), None)
        read = _Read(
            pairs=tuple(pair for pair in _new(PairedSample, report.get("pairs", {}), since)),
            totals=numbers(report.get("totals", {}), TOTALS),
        )
        views = []
        for at, row in enumerate(rows):
            now = (row.started, row.finished, row.failed, row.items, row.stream_s)
            before = known.replicas.get(row.replica_id) if known is not None else None
            if before is None:  # a router's first second counts; what a router did before we knew it does not
                before = now if known is None and seq > 1 else (0, 0, 0, 0, 0.0)
            started, finished, failed, items, stream_s = (
                max(new - old, 0) for new, old in zip(now, before, strict=True)
            )
            read.counted[row.replica_id] = now
            views.append(
                ReplicaReport(
                    row.replica_id,
                    row.node_id,
                    row.max_ongoing,
                    row.in_flight,
                    int(started),
                    int(finished),
                    int(failed),
                    tuple(outcomes[at]),
                    tuple(unfinished[at]),
                    int(items),
                    stream_s,
                )
            )
        read.views = tuple(views)
        return read


@dataclass(slots=True)
class _Read:
    pairs: tuple[PairedSample, ...]
    totals: list[Any]
    views: tuple[ReplicaReport, ...] = ()
    counted: dict[str, tuple[int, int, int, int, float]] = field(default_factory=dict)


def answer(*, acknowledged: int, **more: Any) -> dict[str, Any]:
    """What a router gets for its report: the number of the last one that was taken; 0 asks for a full one."""
    return message("answer", acknowledged=acknowledged, **more)


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
