"""The coordinator's status as metrics: Prometheus text (0.0.4), OpenMetrics, or families for another exporter.

What is not known (null in the status) has no sample: absent means unknown, zero means zero. The number of series is
bounded: beyond so many deployments, replicas and nodes, counts are added up under the label value "other", the rest is
left out. Which have their own does not change while they live: a count that moved would look like a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from shadecast.config import LOST_AFTER_S
from shadecast.histogram import BOUNDS_S, TICK_BOUNDS_S
from shadecast.types import QUANTILES, State

MOST_DEPLOYMENTS, MOST_REPLICAS, MOST_NODES = 100, 500, 100
"""That have series of their own; replicas over all deployments."""
OTHER = "other"
RETRAINING_STATES = ("waiting", "training", "probation")

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
    ("held", "held", "1 where an operator, or Ray, keeps it out of traffic"),
    ("ejecting_routers", "ejected_by", "Routers that leave it out for a moment because it does not answer"),
)
_SUMMED = frozenset({"queue", "requests_per_second"})
"""Of replicas without series of their own."""
_Merge = Callable[[Sequence[float]], float]
# name, key in the status, of several deployments together (None: nothing can be said), text
_DEPLOYMENT: tuple[tuple[str, str, _Merge | None, str], ...] = (
    ("table_age_seconds", "table_age_s", max, "Age of the routing table in force"),
    ("table_version", "table_version", None, "Version of the routing table within this life of the coordinator"),
    ("panic", "panic", max, "1 while load is spread over all replicas that live"),
    ("observing", "observing", sum, "1 where routers only observe: requests go as Serve sends them"),
    ("predicted_load", "load", max, "Offered work over predicted capacity of the active set"),
    ("slots", "slots", None, "c, parallel slots of a replica"),
    ("batch_half", "batch_half", None, "b0, batch at which a replica's speed halves; 0 means slots"),
    ("look_ahead_seconds", "look_ahead_s", None, "H, how far ahead the forecast is read"),
    ("waiting_requests", "waiting", sum, "Requests that wait in routers for a replica"),
    ("ejected_replicas", "ejected", sum, "Replicas that some router leaves out because they do not answer"),
    ("held_replicas", "held", sum, "Replicas that an operator, or Ray, keeps out of traffic"),
)
# name, key in the status, text
_DEPLOYMENT_COUNTS = (
    ("requests", "finished", "Live requests finished since the coordinator started"),
    ("request_failures", "failed", "Live requests failed since the coordinator started"),
    ("mirrored_requests", "mirrored", "Requests copied to replicas on trial"),
    ("mirror_drops", "mirror_dropped", "Copies that were due and not sent, because a cap was reached"),
    ("uncopyable_requests", "uncopyable", "Requests that were due to be copied, and may not be called twice"),
    ("rescued_requests", "rescued", "Second attempts in all: retried, moved or resumed"),
    ("retried_requests", "retried", "Requests sent anew because a replica had not accepted them"),
    ("moved_requests", "moved", "Accepted requests sent again from a slow replica to another one"),
    ("resumed_streams", "resumed", "Streams that went on from another replica"),
    ("prompt_tokens", "prompt_tokens", "Tokens of prompts that replicas were chosen for (balance.prefix)"),
    (
        "cached_prompt_tokens",
        "cached_tokens",
        "Of those: what the chosen replica had, as far as its router knows",
    ),
    ("refused_reports", "dropped_reports", "Reports and samples refused because they cannot be true"),
    ("unreadable_reports", "unreadable_reports", "Reports refused because they cannot be read"),
    ("observed_requests", "observed.requests", "Requests that Serve routed while Shadecast only observed"),
)
# name, key in the status, label, text: the values in the status are mappings
_LABELLED_COUNTS = (
    ("refused_requests", "refused", "reason", "Requests that got no replica, by reason"),
    ("transitions", "events", "event", "Changes of connections' states, by event: trials passed and failed, ..."),
)
_LABELLED_GAUGES = (
    ("connections", "states", "state", "Connections to replicas by state"),
    ("routers", "levels", "level", "Routers by the rung of the fail-open ladder that they stand on"),
)
# name, key in the status, bounds, text
_HISTOGRAMS = (
    ("request_duration_seconds", "durations", BOUNDS_S, "Live requests that went well, from acceptance to the end"),
    ("first_item_seconds", "first_items", BOUNDS_S, "Streams that went well: from acceptance to the first item"),
    ("tick_duration_seconds", "tick_durations", TICK_BOUNDS_S, "Time that the coordinator takes to make a table"),
    ("tick_lateness_seconds", "tick_lateness", TICK_BOUNDS_S, "How long after it was due a table is begun"),
)


def prometheus_text(status: Mapping[str, Any] | None, accept: str = "") -> tuple[bytes, str]:
    """The metrics of a status of JSON values, and their content type by what a scraper accepts.

    None, where the coordinator is away, gives `shadecast_up 0` alone.
    """
    encode, content_type = choose_encoder(accept)
    return encode(_Status(status)), content_type


class _Status(Collector):
    def __init__(self, status: Mapping[str, Any] | None) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        yield from summary_families(self._status)
        if self._status is not None:
            yield from _nodes(self._status.get("nodes") or [])
            yield from _replicas(self._status.get("deployments") or [])


def summary_families(status: Mapping[str, Any] | None, most: int = MOST_DEPLOYMENTS) -> Iterator[Metric]:
    """What there is one of for the cluster, and one for each of the first `most` deployments."""
    up = "1 while the coordinator answers"
    yield GaugeMetricFamily("shadecast_up", up, value=0.0 if status is None else 1.0)
    if status is None:
        return
    deployments = status.get("deployments") or []
    for name, value, text in (
        ("coordinator_uptime_seconds", status.get("uptime_s"), "Since the coordinator started"),
        ("deployments", len(deployments), "Deployments that report"),
        ("nodes", len(status.get("nodes") or []), "Nodes that report"),
        ("held_targets", len(status.get("holds") or []), "Replicas and nodes that operators keep out of traffic"),
        ("leaving_nodes", len(status.get("leaving") or []), "Nodes that Ray is about to take away"),
    ):
        yield _gauge(name, text, (), (((), value),))
    yield from _forecasts(status.get("nodes") or [], len(status.get("unheard") or []))
    yield from _retraining(status.get("retraining"))
    yield from _deployments(deployments, most)


def _forecasts(nodes: list[Mapping[str, Any]], unheard: int) -> Iterator[Metric]:
    """Over all nodes: whether they are heard of, and whether forecasts count."""
    ages_s: list[Any] = [n.get("age_s") for n in nodes]
    silent = unheard + sum(_known(age_s) and age_s > LOST_AFTER_S for age_s in ages_s)
    yield _gauge(
        "silent_nodes", "Nodes not heard of for so long that their forecast does not count", (), (((), silent),)
    )
    gates = [[gate for gate in (n.get("gate") or {}).values() if _known(gate)] for n in nodes]
    trusted = sum(any(gate > 0.0 for gate in of_node) for of_node in gates)
    forecasting = sum(bool(n.get("predicted")) for n in nodes)
    yield _gauge("forecasting_nodes", "Nodes that have a forecast", (), (((), forecasting),))
    yield _gauge("trusted_forecasts", "Nodes whose forecast counts, for some resource", (), (((), trusted),))


def _retraining(view: Mapping[str, Any] | None) -> Iterator[Metric]:
    """How self-retraining stands; without samples where it is off."""
    view = view or {}
    state = view.get("state")
    failures: Any = view.get("failures")
    if _known(failures) and state == "training":
        failures -= 1  # what is under way counts as failed until it has ended well
    for name, value, text in (
        ("failures", failures, "Trainings of forecasters that failed, in a row"),
        ("rollbacks", view.get("rollbacks"), "Promoted versions that were worse live and were taken back, in a row"),
        ("silent_seconds", view.get("age_s"), "Since self-retraining last said how it stands"),
    ):
        yield _gauge(f"retraining_{name}", text, (), (((), value),))
    yield _gauge(
        "retraining_state",
        "1 for what self-retraining does now, 0 for the rest",
        ("state",),
        (((each,), float(each == state)) for each in RETRAINING_STATES if state is not None),
    )


def _nodes(nodes: list[Mapping[str, Any]]) -> Iterator[Metric]:
    by_node = {(str(n.get("node_id")), str(n.get("hostname"))): n for n in nodes[:MOST_NODES]}
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
        (*names, "resource", "horizon_s", "q"),  # the label "quantile" is for summaries
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


def _deployments(deployments: list[Mapping[str, Any]], most: int) -> Iterator[Metric]:
    """Each with its own series, or all that are too many under `OTHER`."""
    own = {str(d.get("deployment")): [d] for d in deployments[:most]}
    groups = own | ({OTHER: deployments[most:]} if len(deployments) > most else {})
    label = ("deployment",)
    for name, field, merge, text in _DEPLOYMENT:
        values = ((key, _values(group, field)) for key, group in groups.items() if merge or len(group) == 1)
        yield _gauge(name, text, label, (((key,), (merge or max)(found)) for key, found in values if found))
    for name, field, text in _DEPLOYMENT_COUNTS:
        counts = ((key, _values(group, field)) for key, group in groups.items())
        yield _counter(name, text, label, (((key,), sum(found)) for key, found in counts if found))
    for name, field, more, text in _LABELLED_COUNTS:
        yield _counter(name, text, (*label, more), _by_label(groups, field))
    for name, field, more, text in _LABELLED_GAUGES:
        yield _gauge(name, text, (*label, more), _by_label(groups, field))
    for name, field, bounds_s, text in _HISTOGRAMS:
        yield _histogram(name, text, bounds_s, ((key, [d.get(field) for d in group]) for key, group in groups.items()))


def _values(deployments: Iterable[Mapping[str, Any]], field: str) -> list[float]:
    """The known ones; "a.b" is the field b of the field a."""
    found: list[Any] = list(deployments)
    for name in field.split("."):
        found = [(entry or {}).get(name) for entry in found]
    return [float(value) for value in found if _known(value)]


def _by_label(groups: Mapping[str, Sequence[Mapping[str, Any]]], field: str) -> Iterator[tuple[tuple[str, ...], float]]:
    for key, group in groups.items():
        for value in sorted({v for d in group for v in d.get(field) or {}}):
            yield (key, value), sum((d.get(field) or {}).get(value, 0) for d in group)


def _replicas(deployments: list[Mapping[str, Any]]) -> Iterator[Metric]:
    listed = (
        ((str(d.get("deployment")), str(r.get("replica_id")), str(r.get("node_id"))), r)
        for d in deployments
        for r in d.get("replicas") or []
    )
    replicas = dict(islice(listed, MOST_REPLICAS))
    rest = list(listed)
    names = ("deployment", "replica", "node")
    for name, field, text in _REPLICA:
        gauge = _gauge(f"replica_{name}", text, names, ((key, r.get(field)) for key, r in replicas.items()))
        others = _values((r for _, r in rest), field) if name in _SUMMED else []
        if others:
            gauge.add_metric((OTHER, OTHER, OTHER), sum(others))
        yield gauge
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


_Samples = Iterable[tuple[tuple[str, ...], Any]]


def _gauge(name: str, text: str, labels: tuple[str, ...], samples: _Samples) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(f"shadecast_{name}", text, labels=labels)
    for values, value in samples:
        if _known(value):
            gauge.add_metric(values, float(value))
    return gauge


def _counter(name: str, text: str, labels: tuple[str, ...], samples: _Samples) -> CounterMetricFamily:
    counter = CounterMetricFamily(f"shadecast_{name}", text, labels=labels)
    for values, value in samples:
        if _known(value):
            counter.add_metric(values, float(value))
    return counter


def _histogram(
    name: str, text: str, bounds_s: Sequence[float], groups: Iterable[tuple[str, list[Mapping[str, Any] | None]]]
) -> HistogramMetricFamily:
    """Of each group, its deployments added up."""
    family = HistogramMetricFamily(f"shadecast_{name}", text, labels=("deployment",))
    bounds = [*map(str, bounds_s), "+Inf"]
    for key, group in groups:
        known = [one for one in group if one and one.get("counts")]
        if known:
            counts = accumulate(sum(column) for column in zip(*(one["counts"] for one in known), strict=True))
            total_s = sum(one["sum_s"] for one in known)
            family.add_metric((key,), list(zip(bounds, map(float, counts), strict=True)), total_s)
    return family


def _known(value: Any) -> bool:
    return isinstance(value, (int, float))
