"""What Serve itself has on each node, summed over the routers: goes back to the node's forecaster, which logs it."""

from __future__ import annotations

from dataclasses import dataclass, field

from shadecast.types import RouterReport

STALE_S = 3.0
"""A router that has not reported for so long carries nothing."""


@dataclass(slots=True)
class ServingLoad:
    """Requests under way and arriving by node; feed every router's reports."""

    _routers: dict[tuple[str, str], tuple[float, dict[str, tuple[float, float]]]] = field(default_factory=dict)

    def take(self, report: RouterReport, now_s: float) -> None:
        """Replace what this router said before."""
        nodes: dict[str, tuple[float, float]] = {}
        for replica in report.replicas:
            in_flight, arrivals_per_s = nodes.get(replica.node_id, (0.0, 0.0))
            arrived = replica.started / max(report.interval_s, 1e-3)
            nodes[replica.node_id] = (in_flight + replica.in_flight, arrivals_per_s + arrived)
        self._routers[report.deployment, report.router_id] = (now_s, nodes)

    def on(self, node_id: str, now_s: float) -> tuple[float, float]:
        """(requests in flight, arrivals per second) on a node, over all deployments and routers."""
        for key in [k for k, (at_s, _) in self._routers.items() if now_s - at_s > STALE_S]:
            del self._routers[key]
        shares = [nodes[node_id] for _, nodes in self._routers.values() if node_id in nodes]
        return sum(s[0] for s in shares), sum(s[1] for s in shares)
