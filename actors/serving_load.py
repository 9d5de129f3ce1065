"""What Serve itself has on each node, summed over the routers: goes back to the node's forecaster, which logs it."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

from shadecast.types import RouterReport

STALE_S = 3.0
"""A router that has not reported for so long carries nothing."""
MIN_INTERVAL_S = 0.01
"""A report so soon after the one before tells no rate: one request would look like a hundred a second and more."""
_NOTHING = 1e-6
"""Arrivals a second that are what adding and taking off leaves."""


@dataclass(slots=True)
class _Router:
    at_s: float = 0.0
    replicas: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Node and requests under way of each replica."""
    arrivals_per_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By node."""


@dataclass(slots=True)
class ServingLoad:
    """Requests under way and arriving by node; feed every router's reports."""

    _routers: dict[tuple[str, str], _Router] = field(default_factory=dict)
    _in_flight: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    _arrivals_per_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Both by node, of all routers: many nodes ask, so they are kept up to date and not summed when asked for."""
    _swept_s: float = -math.inf

    def take(self, report: RouterReport, now_s: float) -> None:
        """What a router says now; of a partial report, in place of what it has said of the same replicas."""
        key = report.deployment, report.router_id
        if now_s - self._swept_s > STALE_S:  # also where no node ever asks
            self._swept_s = now_s
            self._forget_stale(now_s)
        if not report.partial:
            self._forget(key)
        router = self._routers.setdefault(key, _Router())
        router.at_s = now_s
        self._add_arrivals(router, -1.0)
        router.arrivals_per_s.clear()
        for replica_id in report.gone:
            self._take_off(*router.replicas.pop(replica_id, ("", 0)))
        for view in report.replicas:
            node_id, in_flight = router.replicas.get(view.replica_id, (view.node_id, 0))
            self._in_flight[node_id] += view.in_flight - in_flight
            router.replicas[view.replica_id] = (node_id, view.in_flight)
            if view.started and report.interval_s >= MIN_INTERVAL_S:
                router.arrivals_per_s[node_id] += view.started / report.interval_s
        self._add_arrivals(router, 1.0)

    def _add_arrivals(self, router: _Router, sign: float) -> None:
        for node_id, arrivals_per_s in router.arrivals_per_s.items():
            self._arrivals_per_s[node_id] += sign * arrivals_per_s
            if abs(self._arrivals_per_s[node_id]) < _NOTHING:
                del self._arrivals_per_s[node_id]

    def _forget(self, key: tuple[str, str]) -> None:
        router = self._routers.pop(key, None)
        if router is not None:
            self._add_arrivals(router, -1.0)
            for node_id, in_flight in router.replicas.values():
                self._take_off(node_id, in_flight)
        if not self._routers:
            self._in_flight.clear()
            self._arrivals_per_s.clear()

    def _forget_stale(self, now_s: float) -> None:
        for key in [k for k, router in self._routers.items() if now_s - router.at_s > STALE_S]:
            self._forget(key)

    def _take_off(self, node_id: str, in_flight: int) -> None:
        """A replica is gone from a node. Of nodes without requests nothing is kept: they come and go."""
        self._in_flight[node_id] -= in_flight
        if not self._in_flight[node_id]:
            del self._in_flight[node_id]

    def on(self, node_id: str, now_s: float) -> tuple[float, float]:
        """(requests in flight, arrivals per second) on a node, over all deployments and routers."""
        self._forget_stale(now_s)
        return float(self._in_flight.get(node_id, 0)), max(self._arrivals_per_s.get(node_id, 0.0), 0.0)
