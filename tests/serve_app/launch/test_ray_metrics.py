"""What is handed to `ray.util.metrics`: increments once each, few tags, few observations."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from typing import Any

import pytest

from serve_app.launch import ray_metrics
from serve_app.launch.ray_metrics import MOST_DEPLOYMENTS, MOST_OBSERVATIONS, RayMetrics
from shadecast.histogram import BOUNDS_S
from tests.deep_size import deep_size
from tests.serve_app.page.scraping import played_status

Key = tuple[tuple[str, str], ...]


class Export:
    """Ray's side, with its rules: what it has been told, by name and tags."""

    def __init__(self) -> None:
        self.values: dict[str, dict[Key, float]] = defaultdict(dict)
        self.observed: dict[str, dict[Key, list[float]]] = defaultdict(lambda: defaultdict(list))

    def kind(self, act: Any) -> Any:
        export = self

        class Metric:
            def __init__(self, name: str, description: str, *rest: Any) -> None:
                assert description
                self.name, self.keys = name, rest[-1]
                assert isinstance(self.keys, tuple)
                if len(rest) == 2:
                    assert all(bound > 0.0 for bound in rest[0])

            def tell(self, value: float, tags: dict[str, str]) -> None:
                assert set(tags) == set(self.keys)
                assert all(isinstance(tag, str) for tag in tags.values())
                assert not math.isnan(value)
                act(export, self.name, tuple(sorted(tags.items())), value)

            set = inc = observe = tell

        return Metric

    def gauge(self, name: str, key: Key, value: float) -> None:
        self.values[name][key] = value

    def counter(self, name: str, key: Key, value: float) -> None:
        assert value > 0.0, "Ray raises on anything else"
        self.values[name][key] = self.values[name].get(key, 0.0) + value

    def histogram(self, name: str, key: Key, value: float) -> None:
        self.observed[name][key].append(value)


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Export:
    made = Export()
    monkeypatch.setattr(ray_metrics, "Gauge", made.kind(Export.gauge))
    monkeypatch.setattr(ray_metrics, "Counter", made.kind(Export.counter))
    monkeypatch.setattr(ray_metrics, "Histogram", made.kind(Export.histogram))
    return made


@pytest.fixture(scope="module")
def status() -> dict[str, Any]:
    return played_status()


def total(values: dict[Key, float]) -> float:
    return sum(values.values())


def test_counts_are_handed_over_once_and_begin_anew_with_a_coordinator(export: Export, status: dict[str, Any]) -> None:
    metrics, later = RayMetrics(), copy.deepcopy(status)
    finished = sum(d["finished"] for d in status["deployments"])
    for _ in range(3):
        metrics.publish(status)
    assert total(export.values["shadecast_requests"]) == finished
    later["deployments"][0]["finished"] += 7
    metrics.publish(later)
    assert total(export.values["shadecast_requests"]) == finished + 7
    later["deployments"][0]["finished"] = 3
    metrics.publish(later)
    assert total(export.values["shadecast_requests"]) == finished + 10
    assert export.values["shadecast_up"] == {(): 1.0}


def test_each_duration_is_observed_once_within_its_bucket(export: Export, status: dict[str, Any]) -> None:
    one = copy.deepcopy(status)
    one["deployments"] = one["deployments"][:1]
    counts = [0] * (len(BOUNDS_S) + 1)
    counts[0], counts[5], counts[-1] = 2, 3, 1
    one["deployments"][0]["durations"] = {"counts": counts, "sum_s": 500.0}
    metrics = RayMetrics()
    metrics.publish(one)
    metrics.publish(one)
    (values,) = export.observed["shadecast_request_duration_seconds"].values()
    assert len([v for v in values if 0.0 < v <= BOUNDS_S[0]]) == 2
    assert len([v for v in values if BOUNDS_S[4] < v <= BOUNDS_S[5]]) == 3
    assert len([v for v in values if v > BOUNDS_S[-1]]) == 1
    assert len(values) == 6


def test_however_many_requests_there_are_few_observations_are_made_and_quantiles_hold(
    export: Export, status: dict[str, Any]
) -> None:
    busy = copy.deepcopy(status)
    counts = [0] * (len(BOUNDS_S) + 1)
    counts[6], counts[9] = 900_000, 100_000
    busy["deployments"][0]["durations"] = {"counts": counts, "sum_s": 1e5}
    RayMetrics().publish(busy)
    seen = [v for of in export.observed.values() for values in of.values() for v in values]
    assert len(seen) <= MOST_OBSERVATIONS + 200, "each bucket is rounded up"
    name = busy["deployments"][0]["deployment"]
    values = export.observed["shadecast_request_duration_seconds"][("deployment", name),]
    slow = sum(value > BOUNDS_S[8] for value in values) / len(values)
    assert slow == pytest.approx(0.1, abs=0.01)


def test_there_is_no_series_of_a_replica_or_node(export: Export, status: dict[str, Any]) -> None:
    RayMetrics().publish(status)
    tags = {tag for of in (*export.values.values(), *export.observed.values()) for key in of for tag, _ in key}
    assert tags == {"deployment", "state", "level", "event", "reason"}
    assert sum(map(len, export.values.values())) < 60 * len(status["deployments"])


def test_however_many_deployments_there_are_few_have_series_of_their_own(
    export: Export, status: dict[str, Any]
) -> None:
    one = status["deployments"][0]
    many = {**status, "deployments": [{**one, "deployment": f"app{i}/d"} for i in range(300)]}
    RayMetrics().publish(many)
    assert len(export.values["shadecast_requests"]) == MOST_DEPLOYMENTS + 1
    assert total(export.values["shadecast_requests"]) == 300 * one["finished"]


def test_deployments_that_are_gone_leave_nothing(export: Export, status: dict[str, Any]) -> None:
    metrics, one = RayMetrics(), status["deployments"][0]
    metrics.publish({**status, "deployments": [one]})
    size = deep_size(metrics._counted)
    for i in range(50):
        metrics.publish({**status, "deployments": [{**one, "deployment": f"app{i}/d"}]})
    metrics.publish({**status, "deployments": [one]})
    assert deep_size(metrics._counted) <= 1.1 * size
    assert export.values["shadecast_requests"][("deployment", one["deployment"]),] == 2 * one["finished"]


def test_what_is_not_known_is_not_handed_over(export: Export, status: dict[str, Any]) -> None:
    unknown = copy.deepcopy(status)
    unknown["deployments"][0]["load"] = math.nan
    unknown["uptime_s"] = None
    RayMetrics().publish(unknown)
    assert len(export.values["shadecast_predicted_load"]) == len(status["deployments"]) - 1
    assert "shadecast_coordinator_uptime_seconds" not in export.values
