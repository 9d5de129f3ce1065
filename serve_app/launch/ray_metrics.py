"""The control plane's metrics through `ray.util.metrics`: a Prometheus that reads Ray's nodes has them without more.

Ray's names begin with `ray_`. There is one series for the cluster or a deployment, none for a replica or node:
`serve_app.page.metrics` has these. Ray's agent counts each observation of a histogram by itself, so there the number of
observations is bounded, too: beyond it a part of them is passed on, in proportion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from prometheus_client.metrics_core import Metric
from ray.util.metrics import Counter, Gauge, Histogram

from serve_app.page.metrics import summary_families
from serve_app.page.watch import to_json

MOST_DEPLOYMENTS = 20
"""That have series of their own: each costs the coordinator 1 ms of CPU a period."""
MOST_OBSERVATIONS = 2000
"""In one period, over all histograms."""


class RayMetrics:
    """Publishes a coordinator's summary again and again. Threads: one call at a time."""

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        self._counted: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        """What each counter or bucket has been told so far: Ray takes increments."""

    def publish(self, summary: Mapping[str, Any]) -> None:
        """Hand over the present values."""
        families = list(summary_families(to_json(summary), MOST_DEPLOYMENTS))
        for family in families:
            if family.type == "gauge":
                self._set(family)
            elif family.type == "counter":
                self._add(family)
        self._observe([family for family in families if family.type == "histogram"])
        self._forget_all_but({str(deployment.get("deployment")) for deployment in summary.get("deployments") or ()})

    def _forget_all_but(self, deployments: set[str]) -> None:
        """Deployments that are gone leave nothing; one that comes back counts from 0."""
        there = deployments | {"other", None}
        self._counted = {key: value for key, value in self._counted.items() if dict(key[1]).get("deployment") in there}

    def _set(self, family: Metric) -> None:
        for sample in family.samples:
            gauge = self._gauges.get(family.name)
            if gauge is None:
                gauge = self._gauges[family.name] = Gauge(family.name, family.documentation, tuple(sample.labels))
            gauge.set(sample.value, sample.labels)

    def _add(self, family: Metric) -> None:
        for sample in family.samples:
            counter = self._counters.get(family.name)
            if counter is None:
                counter = self._counters[family.name] = Counter(family.name, family.documentation, tuple(sample.labels))
            new = self._new(sample.name, sample.labels, sample.value)
            if new > 0.0:
                counter.inc(new, sample.labels)

    def _new(self, name: str, labels: Mapping[str, str], value: float) -> float:
        """How much a count has grown; one that has fallen began anew."""
        key = (name, frozenset(labels.items()))
        before = self._counted.get(key, 0.0)
        self._counted[key] = value
        return value - before if value >= before else value

    def _observe(self, families: list[Metric]) -> None:
        news = [(family, labels, self._new_in_buckets(family, labels)) for family in families for labels in _of(family)]
        total = sum(count for _, _, buckets in news for _, _, count in buckets)
        part = min(MOST_OBSERVATIONS / total, 1.0) if total else 1.0
        for family, labels, buckets in news:
            histogram = self._histograms.get(family.name)
            if histogram is None:
                bounds = [upper for _, upper, _ in buckets if upper < math.inf]
                histogram = Histogram(family.name, family.documentation, bounds, tuple(labels))
                self._histograms[family.name] = histogram
            for lower, upper, count in buckets:
                value = (lower + upper) / 2.0 if upper < math.inf else 2.0 * lower
                for _ in range(math.ceil(part * count)):
                    histogram.observe(value, labels)

    def _new_in_buckets(self, family: Metric, labels: Mapping[str, str]) -> list[tuple[float, float, int]]:
        """(lower bound, upper bound, new observations) of each bucket."""
        found = []
        counts = [(0.0, 0.0)] + [
            (float(sample.labels["le"]), sample.value)
            for sample in family.samples
            if "le" in sample.labels and labels.items() <= sample.labels.items()
        ]
        for (lower, below), (upper, upto) in pairwise(counts):
            new = self._new(family.name, {**labels, "le": str(upper)}, upto - below)
            found.append((lower, upper, int(new)))
        return found


def _of(family: Metric) -> list[dict[str, str]]:
    """The labels of each histogram of a family."""
    return [dict(sample.labels) for sample in family.samples if sample.name.endswith("_count")]
