"""The coordinator's status as Prometheus text (exposition format 0.0.4).

What is not known (null in the status) has no sample: absent means unknown, zero means zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from shadecast.types import QUANTILES, State

_CURRENT = {
    "cpu": "cpu_fraction",
    "cpu_background": "cpu_background_fraction",
    "memory": "memory_fraction",
    "network": "network_fraction",
    "network_background": "network_background_fraction",
    "cpu_pressure": "cpu_pressure_fraction",
    "memory_pressure": "memory_pressure_fraction",
    "gpu": "gpu_fraction",
    "gpu_memory": "gpu_memory_fraction",
}

# name, key in the status, text
_REPLICA = (
    ("share", "share", "Fraction of picks for which the replica is eligible, 0 to 1"),
    ("capacity", "capacity", "Relative speed that routing uses (1 = nominal): live capacity blended with the forecast"),
    ("live_capacity", "live_capacity", "Relative speed as measured now (1 = nominal)"),
    ("queue", "queue", "Requests on the replica, over all routers"),
    ("requests_per_second", "rate_per_s", "Live requests finished per second, recent mean"),
    ("mean_latency_seconds", "mean_s", "Mean duration of recent live requests"),
    ("error_fraction", "error_fraction", "Fraction of recent live requests that failed"),
    ("mirror_fraction", "mirror_fraction", "Fraction of new requests that is copied to the replica"),
    ("retry_in_seconds", "retry_in_s", "Back-off left until the next trial may begin"),
    ("vetoed", "vetoed", "1 where the forecast forbids all but a trickle"),
)
_DEPLOYMENT = (
    ("table_age_seconds", "table_age_s", "Age of the routing table in force"),
    ("table_version", "table_version", "Version of the routing table within this life of the coordinator"),
    ("panic", "panic", "1 while load is spread over all replicas that live"),
    ("predicted_load", "load", "Offered work over predicted capacity of the active set"),
    ("slots", "slots", "c, parallel slots of a replica"),
    ("batch_half", "batch_half", "b0, batch at which a replica's speed halves; 0 means slots"),
    ("look_ahead_seconds", "look_ahead_s", "H, how far ahead the forecast is read"),
)
_DEPLOYMENT_COUNTS = (
    ("requests", "finished", "Live requests finished since the coordinator started"),
    ("request_failures", "failed", "Live requests failed since the coordinator started"),
    ("mirrored_requests", "mirrored", "Requests copied to replicas on trial"),
    ("mirror_drops", "mirror_dropped", "Copies that were due and not sent, because a cap was reached"),
    ("refused_reports", "dropped_reports", "Reports and samples refused because they cannot be true"),
)


def prometheus_text(status: Mapping[str, Any] | None) -> bytes:
    """The metrics of a status of JSON values; None, where the coordinator is away, gives `shadecast_up 0` alone."""
    return generate_latest(_Status(status))


class _Status(Collector):
    def __init__(self, status: Mapping[str, Any] | None) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        up = "1 while the coordinator answers"
        yield GaugeMetricFamily("shadecast_up", up, value=0.0 if self._status is None else 1.0)
        if self._status is None:
            return
        uptime_s = self._status.get("uptime_s")
        if _known(uptime_s):
            yield GaugeMetricFamily("shadecast_coordinator_uptime_seconds", "Since the coordinator started", uptime_s)
        yield from _nodes(self._status.get("nodes") or [])
        yield from _deployments(self._status.get("deployments") or [])


def _nodes(nodes: list[Mapping[str, Any]]) -> Iterator[Metric]:
    by_node = {(str(n.get("node_id")), str(n.get("hostname"))): n for n in nodes}
    names = ("node", "hostname")
    yield _gauge(
        "node_fraction",
        "Use of the node's limit now, by resource; *_background is what is not Serve's own",
        (*names, "resource"),
        (
            ((*key, resource), (node.get("current") or {}).get(field))
            for key, node in by_node.items()
            for resource, field in _CURRENT.items()
        ),
    )
    yield _gauge(
        "node_predicted_fraction",
        "Forecast of the background load as a fraction of the node's limit, by horizon and quantile",
        (*names, "resource", "horizon_s", "quantile"),
        (
            ((*key, resource, horizon.removesuffix(".0"), str(quantile)), value)
            for key, node in by_node.items()
            for resource, horizons in (node.get("predicted") or {}).items()
            for horizon, values in horizons.items()
            for quantile, value in zip(QUANTILES, values, strict=False)
        ),
    )
    for name, text in (
        ("skill", "1 - loss of the forecaster / loss of the best simple rule, recent; above 0 it helps"),
        ("gate", "How far the forecast may be trusted, 0 to 1"),
    ):
        yield _gauge(
            f"forecast_{name}",
            text,
            (*names, "resource"),
            (((*key, r), v) for key, node in by_node.items() for r, v in (node.get(name) or {}).items()),
        )
    for name, field, text in (
        ("node_report_age_seconds", "age_s", "Since the node was last heard of"),
        ("forecaster_resident_bytes", "forecaster_rss_bytes", "Resident memory of the node's forecaster"),
    ):
        yield _gauge(name, text, names, ((key, node.get(field)) for key, node in by_node.items()))
    yield _gauge(
        "forecaster_info",
        "1, labelled with the version of the model that forecasts this node",
        (*names, "version"),
        (((*key, str(n["model_version"])), 1.0) for key, n in by_node.items() if n.get("model_version")),
    )


def _deployments(deployments: list[Mapping[str, Any]]) -> Iterator[Metric]:
    by_name = {str(d.get("deployment")): d for d in deployments}
    for name, field, text in _DEPLOYMENT:
        yield _gauge(name, text, ("deployment",), (((key,), d.get(field)) for key, d in by_name.items()))
    for name, field, text in _DEPLOYMENT_COUNTS:
        counter = CounterMetricFamily(f"shadecast_{name}", text, labels=("deployment",))
        for key, d in by_name.items():
            if _known(d.get(field)):
                counter.add_metric((key,), float(d[field]))
        yield counter
    routers = [(key, r) for key, d in by_name.items() for r in d.get("routers") or []]
    levels = {(key, str(r.get("level"))) for key, r in routers}
    yield _gauge(
        "routers",
        "Routers by the rung of the fail-open ladder that they stand on",
        ("deployment", "level"),
        ((level, sum((k, str(r.get("level"))) == level for k, r in routers)) for level in sorted(levels)),
    )
    replicas = {
        (key, str(r.get("replica_id")), str(r.get("node_id"))): r
        for key, d in by_name.items()
        for r in d.get("replicas") or []
    }
    names = ("deployment", "replica", "node")
    for name, field, text in _REPLICA:
        yield _gauge(f"replica_{name}", text, names, ((key, r.get(field)) for key, r in replicas.items()))
    yield _gauge(
        "replica_state",
        "1 for the state that the connection is in, 0 for the others",
        (*names, "state"),
        (
            ((*key, state.value), 1.0 if r.get("state") == state.value else 0.0)
            for key, r in replicas.items()
            for state in State
        ),
    )


def _gauge(
    name: str, text: str, labels: tuple[str, ...], samples: Iterable[tuple[tuple[str, ...], Any]]
) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(f"shadecast_{name}", text, labels=labels)
    for values, value in samples:
        if _known(value):
            gauge.add_metric(values, float(value))
    return gauge


def _known(value: Any) -> bool:
    return isinstance(value, (int, float))
