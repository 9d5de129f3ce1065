"""Metrics are what Prometheus takes, say all that alerts need, and stay few however large the cluster is."""

from __future__ import annotations

import asyncio
import copy
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from serve_app.page import metrics as m
from serve_app.page.metrics import prometheus_text
from shadecast.histogram import BOUNDS_S
from tests.actors.test_retrainer import PROMOTED, Rig
from tests.serve_app.page.page_scene import CHAT, DIGITS
from tests.serve_app.page.scraping import (
    NO_PROMETHEUS,
    NO_PROMTOOL,
    PROMETHEUS,
    PROMTOOL,
    answered,
    played_status,
    samples,
    scraped,
)

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"


@pytest.fixture(scope="module")
def status() -> dict[str, Any]:
    return played_status()


def of(found: dict[tuple[tuple[str, str], ...], float], **labels: str) -> float:
    """The sum of those with these labels."""
    return sum(value for key, value in found.items() if labels.items() <= dict(key).items())


# ---------------------------------------------------------------- form


@pytest.mark.skipif(PROMTOOL is None, reason=NO_PROMTOOL)
@pytest.mark.parametrize("away", [False, True])
def test_promtool_finds_nothing_to_complain_of(status: dict[str, Any], away: bool) -> None:
    text, _ = prometheus_text(None if away else status)
    ran = subprocess.run([str(PROMTOOL), "check", "metrics"], input=text, capture_output=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"", b"")


def test_both_formats_are_read_by_their_parsers_and_say_the_same(status: dict[str, Any]) -> None:
    plain, plain_type = prometheus_text(status)
    opened, opened_type = prometheus_text(status, OPENMETRICS)
    assert plain_type.startswith("text/plain; version=0.0.4")
    assert opened_type.startswith("application/openmetrics-text; version=1.0.0")
    assert opened.endswith(b"# EOF\n")

    def values(families: Any) -> dict[Any, float]:
        return {(s.name, *sorted(s.labels.items())): s.value for f in families for s in f.samples}

    assert values(read_openmetrics(opened.decode())) == values(read_text(plain.decode()))


def test_each_metric_has_a_help_text_and_a_name_by_the_rules_and_no_series_comes_twice(status: dict[str, Any]) -> None:
    seen: Counter[Any] = Counter()
    for family in read_text(prometheus_text(status)[0].decode()):
        assert family.name.startswith("shadecast_")
        assert family.documentation
        assert family.type in ("gauge", "counter", "histogram")
        for forbidden in ("_ms", "_milliseconds", "_percent", "_kb", "_mb", "_gauge", "_counter"):
            assert not family.name.endswith(forbidden)
        for sample in family.samples:
            seen[sample.name, tuple(sorted(sample.labels.items()))] += 1
            assert (sample.name.endswith("_total")) == (family.type == "counter")
            if family.type != "histogram":
                assert not {"le", "quantile"} & set(sample.labels)
    assert set(seen.values()) == {1}


def test_every_metric_that_the_tables_name_has_a_value_in_a_real_status(status: dict[str, Any]) -> None:
    found = samples(status)
    names = {f"shadecast_replica_{name}" for name, *_ in m._REPLICA}
    names |= {f"shadecast_{name}" for name, *_ in (*m._DEPLOYMENT, *m._LABELLED_GAUGES)}
    names |= {f"shadecast_{name}_total" for name, *_ in (*m._DEPLOYMENT_COUNTS, *m._LABELLED_COUNTS)}
    names |= {f"shadecast_{name}_count" for name, *_ in m._HISTOGRAMS}
    names.remove("shadecast_first_item_seconds_count")  # the scene has no streams
    assert names - set(found) == set()
    assert len(names) > 40


# ---------------------------------------------------------------- what they say


def test_metrics_count_what_happened(status: dict[str, Any]) -> None:
    found = samples(status)
    assert of(found["shadecast_transitions_total"], deployment=DIGITS, event="trial_failed") >= 1
    assert of(found["shadecast_transitions_total"], deployment=DIGITS, event="trial_passed") >= 1
    assert of(found["shadecast_connections"], deployment=DIGITS) == 5
    assert of(found["shadecast_ejected_replicas"], deployment=DIGITS) == 1
    assert of(found["shadecast_replica_ejecting_routers"], replica="w0d8c5ty") == 2
    assert of(found["shadecast_ejected_replicas"], deployment=CHAT) == 0
    assert of(found["shadecast_refused_requests_total"], deployment=DIGITS, reason="cancelled") == 165
    assert of(found["shadecast_rescued_requests_total"], deployment=DIGITS) == 2 * 165
    assert of(found["shadecast_waiting_requests"], deployment=DIGITS) == 1
    assert of(found["shadecast_observing"], deployment=DIGITS) == 0
    assert of(found["shadecast_nodes"]) == 4
    assert of(found["shadecast_forecasting_nodes"]) == 3
    assert of(found["shadecast_trusted_forecasts"]) == 3
    assert of(found["shadecast_deployments"]) == 2


def test_the_histogram_of_durations_holds_each_request_that_went_well(status: dict[str, Any]) -> None:
    found = samples(status)
    well = of(found["shadecast_requests_total"], deployment=DIGITS)
    well -= of(found["shadecast_request_failures_total"], deployment=DIGITS)
    assert of(found["shadecast_request_duration_seconds_count"], deployment=DIGITS) == well > 1000
    buckets = {
        float(dict(key)["le"]): value
        for key, value in found["shadecast_request_duration_seconds_bucket"].items()
        if dict(key)["deployment"] == DIGITS
    }
    assert [*sorted(buckets)][:-1] == list(BOUNDS_S)
    assert list(buckets.values()) == sorted(buckets.values())
    assert buckets[0.05] < 0.5 * well < buckets[0.2], "the scene's usual request takes 50 ms and a little"
    mean_s = of(found["shadecast_request_duration_seconds_sum"], deployment=DIGITS) / well
    assert 0.05 < mean_s < 0.1


def test_a_training_counts_as_failed_once_it_has_ended_badly_and_off_has_no_samples(status: dict[str, Any]) -> None:
    seen: list[dict[str, Any]] = []

    class Watched(Rig):
        def work(self, what: str, **values: Any) -> Any:
            if what == "retrain":
                seen.append(self.retrainer.view())
            return super().work(what, **values)

    rig = Watched({"failed": "no space"}, {"failed": "no space"}, PROMOTED)
    seen.append(rig.looks())
    for _ in range(3):
        seen.append(rig.looks(1, 2 * 3600.0))
    found = [samples({**status, "retraining": {**view, "age_s": 1.0}}) for view in seen]
    assert [of(each["shadecast_retraining_failures"]) for each in found] == [0, 0, 1, 1, 2, 2, 0]
    states = [
        [dict(key)["state"] for key, value in each["shadecast_retraining_state"].items() if value] for each in found
    ]
    assert states == [[s] for s in ("waiting", "training", "waiting", "training", "waiting", "training", "probation")]
    assert of(found[0]["shadecast_retraining_silent_seconds"]) == 1.0
    assert not [name for name in samples({**status, "retraining": None}) if "retraining" in name]


def test_nodes_that_are_not_heard_of_are_counted_however_many_there_are(status: dict[str, Any]) -> None:
    assert of(samples(status)["shadecast_silent_nodes"]) == 0
    huge = large(status, 1, 600)
    for node in huge["nodes"][-3:]:
        node["age_s"] = 5.1
    assert of(samples(huge)["shadecast_silent_nodes"]) == 3
    assert of(samples({**status, "unheard": ["e"]})["shadecast_silent_nodes"]) == 1


def test_a_deployment_that_only_observes_says_so(status: dict[str, Any]) -> None:
    watched = copy.deepcopy(status)
    watched["deployments"][0] |= {"observing": True, "observed": {"requests": 7, "time_taken": 2.0, "time_ours": 1.0}}
    found = samples(watched)
    assert of(found["shadecast_observing"]) == 1
    assert of(found["shadecast_observed_requests_total"]) == 7


# ---------------------------------------------------------------- how many


def large(status: dict[str, Any], deployments: int, nodes: int) -> dict[str, Any]:
    """The status with more of everything."""
    digits = next(d for d in status["deployments"] if d["deployment"] == DIGITS)
    node = status["nodes"][0]
    return {
        **status,
        "deployments": [
            {**digits, "deployment": f"app{i}/d", "replicas": [
                {**r, "replica_id": f"{i}-{r['replica_id']}"} for r in digits["replicas"]
            ]} for i in range(deployments)
        ],
        "nodes": [{**node, "node_id": f"{i:056x}"} for i in range(nodes)],
    }  # fmt: skip


def test_series_are_bounded_whatever_the_cluster_and_what_has_none_of_its_own_is_added_up(
    status: dict[str, Any],
) -> None:
    huge = large(status, 600, 600)
    found, more = samples(huge), samples(large(status, 900, 900))
    assert sum(map(len, found.values())) == sum(map(len, more.values())) < 26_000
    for name in ("requests_total", "request_duration_seconds_count", "connections", "waiting_requests"):
        one = of(samples(status)[f"shadecast_{name}"], deployment=DIGITS)
        assert of(found[f"shadecast_{name}"]) == pytest.approx(600 * one), name
    queue = sum(r["queue"] for d in huge["deployments"] for r in d["replicas"])
    assert of(found["shadecast_replica_queue"]) == pytest.approx(queue)
    assert of(found["shadecast_nodes"]) == 600


def test_what_is_not_shown_by_itself_still_raises_an_alert(status: dict[str, Any]) -> None:
    huge = large(status, m.MOST_DEPLOYMENTS + 20, 1)
    huge["deployments"][-1] |= {"panic": True, "table_age_s": 99.0}
    found = samples(huge)
    assert of(found["shadecast_panic"], deployment="other") == 1
    assert of(found["shadecast_table_age_seconds"], deployment="other") == 99.0


def test_who_has_series_keeps_them_when_others_come(status: dict[str, Any]) -> None:
    """A count that moved to `other` would look like a restart."""
    before = {dict(key)["deployment"] for key in samples(large(status, 150, 1))["shadecast_requests_total"]}
    after = {dict(key)["deployment"] for key in samples(large(status, 151, 1))["shadecast_requests_total"]}
    assert before == after
    assert len(before) == m.MOST_DEPLOYMENTS + 1


# ---------------------------------------------------------------- a real Prometheus


@pytest.mark.skipif(PROMETHEUS is None, reason=NO_PROMETHEUS)
def test_a_real_prometheus_elsewhere_scrapes_all_metrics_and_computes_quantiles(
    status: dict[str, Any], tmp_path: Path
) -> None:
    async def run() -> None:
        async with scraped(status, tmp_path) as at:
            assert await answered(at, 'up{job="shadecast"} == 1'), "it scrapes"
            (names,) = await answered(at, 'count({job="shadecast", __name__=~"shadecast_.*"})')
            assert int(names["value"][1]) == sum(map(len, samples(status).values()))
            p50 = f'histogram_quantile(0.5, shadecast_request_duration_seconds_bucket{{deployment="{DIGITS}"}})'
            (middle,) = await answered(at, p50)
            assert 0.05 < float(middle["value"][1]) < 0.1
            (label,) = await answered(at, 'shadecast_panic{deployment=~"chat/.*"}')
            assert label["metric"]["deployment"] == CHAT, "names that users chose arrive whole"

    asyncio.run(run())
