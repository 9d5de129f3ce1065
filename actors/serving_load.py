"""What Serve itself has on each node, summed over the routers: goes back to the node's forecaster, which logs it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from shadecast.types import RouterReport

STALE_S = 3.0
"""A router that has not reported for so long carries nothing."""


@dataclass(slots=True)
class _Router:
    at_s: float = 0.0
    replicas: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Node and requests under way of each replica."""
    in_flight: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    arrivals_per_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Both by node."""


@dataclass(slots=True)
class ServingLoad:
    """Requests under way and arriving by node; feed every router's reports."""

    _routers: dict[tuple[str, str], _Router] = field(default_factory=dict)

    def take(self, report: RouterReport, now_s: float) -> None:
        """What a router says now; of a partial report, in place of what it has said of the same replicas."""
        key = report.deployment, report.router_id
        router = self._routers.get(key)
        if router is None or not report.partial:
            router = self._routers[key] = _Router()
        router.at_s = now_s
        router.arrivals_per_s.clear()
        for replica_id in report.gone:
            node_id, in_flight = router.replicas.pop(replica_id, ("", 0))
            router.in_flight[node_id] -= in_flight
        for view in report.replicas:
            node_id, in_flight = router.replicas.get(view.replica_id, (view.node_id, 0))
            router.in_flight[node_id] += view.in_flight - in_flight
            router.replicas[view.replica_id] = (node_id, view.in_flight)
            router.arrivals_per_s[node_id] += view.started / max(report.interval_s, 1e-3)

    def on(self, node_id: str, now_s: float) -> tuple[float, float]:
        """(requests in flight, arrivals per second) on a node, over all deployments and routers."""
        for key in [k for k, router in self._routers.items() if now_s - router.at_s > STALE_S]:
            del self._routers[key]
        routers = self._routers.values()
        in_flight = sum(router.in_flight.get(node_id, 0.0) for router in routers)
        return in_flight, sum(router.arrivals_per_s.get(node_id, 0.0) for router in routers)
