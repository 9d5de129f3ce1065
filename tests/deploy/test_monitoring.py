"""Alert rules, dashboard and pod monitors ask for what /metrics has; alerts go off when they should, and only then."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import json
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.serve_app.page.scraping import (
    NO_PROMETHEUS,
    NO_PROMTOOL,
    PROMETHEUS,
    PROMTOOL,
    active_alerts,
    answered,
    played_status,
    samples,
    scraped,
)

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy/prometheus/shadecast-alerts.yaml"
ALERTS = {rule["alert"]: rule for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]}
DASHBOARD = json.loads((ROOT / "deploy/grafana/shadecast.json").read_text())
PANELS = [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
]
QUERIES = [*PANELS, *(pytest.param(rule["expr"], id=name) for name, rule in ALERTS.items())]


@pytest.fixture(scope="module")
def status() -> dict[str, Any]:
    """Of a real coordinator, with a deployment that gives streams, too."""
    played = played_status()
    for deployment in played["deployments"]:
        deployment["first_items"] = deployment["durations"]
    return played


@pytest.fixture(scope="module")
def labels(status: dict[str, Any]) -> dict[str, set[str]]:
    """The labels of each sample of /metrics."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, series in samples(status).items():
        for key in series:
            found[name] |= {label for label, _ in key}
    return found


def expanded(query: str) -> str:
    """As Grafana sends it."""
    return query.replace("$deployment", ".*").replace("$__rate_interval", "30s")


# ---------------------------------------------------------------- every query


@pytest.mark.parametrize("query", QUERIES)
def test_every_metric_and_label_that_is_asked_for_is_in_metrics(query: str, labels: dict[str, set[str]]) -> None:
    query = expanded(query)
    used = re.findall(r"(shadecast_\w+)(?:\{([^}]*)\})?", query)
    assert used
    for name, matchers in used:
        assert name in labels
        asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        assert asked <= labels[name], name
    grouped = {name.strip() for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", query) for name in group.split(",")}
    assert grouped <= set().union(*(labels[name] for name, _ in used))


def test_every_label_that_a_legend_shows_is_in_metrics(labels: dict[str, set[str]]) -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            names = set(re.findall(r"shadecast_\w+", target["expr"]))
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert shown <= set().union(*(labels[name] for name in names)), panel["title"]
    asked = [
        variable["query"]["query"]
        for variable in DASHBOARD["templating"]["list"]
        if isinstance(variable["query"], dict)
    ]
    assert re.findall(r"label_values\((\w+), (\w+)\)", " ".join(asked)) == [("shadecast_panic", "deployment")]


@pytest.mark.skipif(PROMETHEUS is None, reason=NO_PROMETHEUS)
def test_every_query_of_the_dashboard_has_an_answer_in_a_real_prometheus(
    status: dict[str, Any], tmp_path: Path
) -> None:
    async def run() -> list[str]:
        async with scraped(status, tmp_path) as prometheus:
            assert await answered(prometheus, "rate(shadecast_requests_total[30s])"), "two scrapes"
            return [
                str(panel.id)
                for panel in PANELS
                if not await answered(prometheus, expanded(panel.values[0]), timeout_s=5.0)
            ]

    assert asyncio.run(run()) == []


def test_the_dashboard_is_laid_out_without_overlaps() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) > 20


# ---------------------------------------------------------------- alerts

D = 'deployment="app/d"'
WELL = {
    "shadecast_up": "1+0x600",
    "shadecast_nodes": "3+0x600",
    "shadecast_forecasting_nodes": "3+0x600",
    "shadecast_trusted_forecasts": "2+0x600",
    "shadecast_held_targets": "0+0x600",
    "shadecast_coordinator_uptime_seconds": "60+60x600",
    "shadecast_silent_nodes": "0+0x600",
    "shadecast_retraining_failures": "1+0x600",
    "shadecast_retraining_rollbacks": "0+0x600",
    "shadecast_retraining_silent_seconds": "5+0x600",
    f"shadecast_rescued_requests_total{{{D}}}": "0+6x600",
    f"shadecast_table_age_seconds{{{D}}}": "0.4+0x600",
    f"shadecast_panic{{{D}}}": "0+0x600",
    f"shadecast_predicted_load{{{D}}}": "0.4+0x600",
    f"shadecast_ejected_replicas{{{D}}}": "0+0x600",
    f'shadecast_connections{{{D}, state="active"}}': "3+0x600",
    f'shadecast_connections{{{D}, state="shifting"}}': "0+0x600",
    f'shadecast_connections{{{D}, state="inactive"}}': "1+0x600",
    f'shadecast_routers{{{D}, level="table"}}': "2+0x600",
    f"shadecast_requests_total{{{D}}}": "0+600x600",
    f"shadecast_request_failures_total{{{D}}}": "0+6x600",
    f'shadecast_refused_requests_total{{{D}, reason="cancelled"}}': "0+1x600",
    f'shadecast_transitions_total{{{D}, event="trial_failed"}}': "0+0x600",
    f'shadecast_transitions_total{{{D}, event="trial_passed"}}': "0+1x600",
    f"shadecast_refused_reports_total{{{D}}}": "0+0x600",
    f"shadecast_unreadable_reports_total{{{D}}}": "0+0x600",
    f'shadecast_tick_duration_seconds_bucket{{{D}, le="0.5"}}': "0+120x600",
    f'shadecast_tick_duration_seconds_bucket{{{D}, le="1.0"}}': "0+120x600",
    f'shadecast_tick_duration_seconds_bucket{{{D}, le="+Inf"}}': "0+120x600",
    f'shadecast_tick_lateness_seconds_bucket{{{D}, le="1.0"}}': "0+120x600",
    f'shadecast_tick_lateness_seconds_bucket{{{D}, le="2.0"}}': "0+120x600",
    f'shadecast_tick_lateness_seconds_bucket{{{D}, le="+Inf"}}': "0+120x600",
}
"""A minute between values; all is well."""
FAULTS: dict[str, dict[str, str]] = {
    "ShadecastMetricsGone": dict.fromkeys(WELL, "_x600"),
    "ShadecastCoordinatorGone": {**dict.fromkeys(WELL, "_x600"), "shadecast_up": "0+0x600"},
    "ShadecastCoordinatorRestarts": {
        "shadecast_coordinator_uptime_seconds": " ".join(str(60 * (minute % 6)) for minute in range(601))
    },
    "ShadecastTableStale": {f"shadecast_table_age_seconds{{{D}}}": "0+60x600"},
    "ShadecastRoutersWithoutTable": {f'shadecast_routers{{{D}, level="power_of_two"}}': "1+0x600"},
    "ShadecastTicksLate": {
        f'shadecast_tick_lateness_seconds_bucket{{{D}, le="1.0"}}': "0+60x600",
        f'shadecast_tick_lateness_seconds_bucket{{{D}, le="2.0"}}': "0+60x600",
    },
    "ShadecastReplicaRejected": {f'shadecast_transitions_total{{{D}, event="trial_failed"}}': "0+1x600"},
    "ShadecastRequestsRefused": {f'shadecast_refused_requests_total{{{D}, reason="cancelled"}}': "0+12x600"},
    "ShadecastSecondAttempts": {f"shadecast_rescued_requests_total{{{D}}}": "0+60x600"},
    "ShadecastErrorRate": {f"shadecast_request_failures_total{{{D}}}": "0+60x600"},
    "ShadecastPanic": {f"shadecast_panic{{{D}}}": "1+0x600"},
    "ShadecastAllReplicasEjected": {f"shadecast_ejected_replicas{{{D}}}": "3+0x600"},
    "ShadecastOverloaded": {f"shadecast_predicted_load{{{D}}}": "0.95+0x600"},
    "ShadecastNodesSilent": {"shadecast_silent_nodes": "1+0x600"},
    "ShadecastForecastsMissing": {"shadecast_forecasting_nodes": "2+0x600"},
    "ShadecastForecastsOff": {"shadecast_trusted_forecasts": "0+0x600"},
    "ShadecastReportsRefused": {f"shadecast_unreadable_reports_total{{{D}}}": "0+1x600"},
    "ShadecastHeldForLong": {"shadecast_held_targets": "1+0x600"},
    "ShadecastRetrainingFails": {"shadecast_retraining_failures": "2+0x600"},
    "ShadecastRetrainingRolledBack": {"shadecast_retraining_rollbacks": "1+0x600"},
    "ShadecastRetrainingSilent": {"shadecast_retraining_silent_seconds": "301+60x600"},
}
"""What is otherwise where an alert must go off: that one and no other."""


def test_every_alert_has_a_test_a_severity_and_a_line_in_the_runbook_to_which_it_leads() -> None:
    assert set(FAULTS) == set(ALERTS)
    told = []
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"]["summary"]
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        sections = re.split(r"^## (.+)$", (ROOT / page).read_text(), flags=re.MULTILINE)
        anchors = [heading.lower().replace(" ", "-") for heading in sections[1::2]]
        lines = re.findall(r"^\| `(Shadecast\w+)` \| (.+) \|$", sections[2 + 2 * anchors.index(anchor)], re.MULTILINE)
        assert [len(what) > 20 for alert, what in lines if alert == name] == [True], name
        told = [alert for alert, _ in lines]
    assert sorted(told) == sorted(ALERTS), "no line for an alert that is gone"


def all_wrong(status: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """A cluster where all is wrong: from one question to the next counts grow, and the coordinator has restarted."""
    asked = itertools.count()

    def answer() -> dict[str, Any]:
        n = next(asked)
        wrong = copy.deepcopy(status) | {"uptime_s": 5.0 if n % 2 else 60.0, "holds": ["w0d8c5ty"]}
        wrong["retraining"] |= {"failures": 2, "rollbacks": 1, "age_s": 400.0}
        for node in wrong["nodes"]:
            node |= {"age_s": 60.0, "predicted": {}, "gate": {}}
        for deployment in wrong["deployments"]:
            deployment |= {"table_age_s": 9.0, "panic": True, "load": 1.5, "ejected": 9, "levels": {"power_of_two": 2}}
            for count in ("finished", "failed", "rescued", "dropped_reports", "unreadable_reports"):
                deployment[count] += 10 * n
            deployment["refused"]["cancelled"] += 10 * n
            deployment["events"]["trial_failed"] += n
            deployment["tick_lateness"]["counts"][-1] += 1000 * n
        return wrong

    return answer


def gone() -> dict[str, Any]:
    raise RuntimeError("the coordinator is gone")


WRONG = set(ALERTS) - {"ShadecastMetricsGone", "ShadecastCoordinatorGone"}


@pytest.mark.slow
@pytest.mark.skipif(PROMETHEUS is None, reason=NO_PROMETHEUS)
@pytest.mark.parametrize(
    ("how", "expected"),
    [("well", {"ShadecastForecastsMissing"}), ("wrong", WRONG), ("gone", {"ShadecastCoordinatorGone"})],
)
def test_alerts_hold_for_a_page_that_a_real_prometheus_scrapes_where_something_is_wrong(
    status: dict[str, Any], tmp_path: Path, how: str, expected: set[str]
) -> None:
    """Of the scene, one node has no forecast yet. For how long it must hold is `promtool`'s test."""

    async def run() -> None:
        well = {**status, "deployments": [{**deployment, "load": 0.5} for deployment in status["deployments"]]}
        shown = {"well": well, "wrong": all_wrong(status), "gone": gone}[how]
        async with scraped(shown, tmp_path, RULES) as prometheus:
            assert await answered(prometheus, "count_over_time(shadecast_up[1m]) >= 8")
            deadline_s = time.monotonic() + 30.0
            active: dict[str, dict[str, str]] = {}
            while set(active) != expected and time.monotonic() < deadline_s:
                active = await asyncio.to_thread(active_alerts, prometheus)
            assert set(active) == expected
            for annotations in active.values():
                assert "<no value>" not in annotations["summary"]

    asyncio.run(run())


@pytest.mark.slow
@pytest.mark.skipif(PROMETHEUS is None, reason=NO_PROMETHEUS)
def test_an_alert_holds_where_there_is_no_page_to_scrape(tmp_path: Path) -> None:
    async def run() -> None:
        async with scraped(None, tmp_path, RULES) as prometheus:
            deadline_s = time.monotonic() + 30.0
            active: dict[str, dict[str, str]] = {}
            while not active and time.monotonic() < deadline_s:
                with contextlib.suppress(OSError):  # it starts
                    active = await asyncio.to_thread(active_alerts, prometheus)
            assert set(active) == {"ShadecastMetricsGone"}

    asyncio.run(run())


@pytest.mark.skipif(PROMTOOL is None, reason=NO_PROMTOOL)
def test_promtool_takes_the_rules_and_every_query_of_the_dashboard(tmp_path: Path) -> None:
    recorded = [{"record": f"panel:{i}", "expr": expanded(panel.values[0])} for i, panel in enumerate(PANELS)]
    (tmp_path / "panels.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": recorded}]}))
    for path in (RULES, tmp_path / "panels.yml"):
        ran = subprocess.run(
            [str(PROMTOOL), "check", "rules", str(path)], capture_output=True, text=True, timeout=60, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.slow
@pytest.mark.skipif(PROMTOOL is None, reason=NO_PROMTOOL)
@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_an_alert_goes_off_where_it_should_and_only_there(fault: str, tmp_path: Path) -> None:
    series = WELL | FAULTS.get(fault, {})
    firing = f'{{__name__="ALERTS", alertname="{fault}", alertstate="firing"}}'
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (__name__, alertname, alertstate) (ALERTS{alertstate="firing"})',
                "eval_time": "8h",
                "exp_samples": [{"labels": firing, "value": 1}] if fault else [],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(
        json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]})
    )
    ran = subprocess.run(
        [str(PROMTOOL), "test", "rules", str(tmp_path / "test.yml")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


# ---------------------------------------------------------------- Kubernetes


def test_the_pod_monitors_and_annotations_name_ports_that_the_pods_have() -> None:
    cluster = yaml.safe_load((ROOT / "deploy/kuberay-rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    (worker,) = cluster["workerGroupSpecs"]
    templates = {"head": cluster["headGroupSpec"]["template"], "worker": worker["template"]}
    ports = {
        kind: {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
        for kind, template in templates.items()
    }
    monitors = list(yaml.safe_load_all((ROOT / "deploy/prometheus/kuberay-podmonitor.yaml").read_text()))
    asked = set()
    for monitor in monitors:
        assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
        selector = monitor["spec"]["selector"]
        kinds = [selector.get("matchLabels", {}).get("ray.io/node-type")]
        kinds = selector["matchExpressions"][0]["values"] if kinds == [None] else kinds
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert endpoint["path"] == "/metrics"
            for kind in kinds:
                assert endpoint["port"] in ports[kind]
                asked.add((kind, endpoint["port"]))
    assert asked == {("head", "shadecast"), ("head", "metrics"), ("worker", "metrics")}
    annotations = templates["head"]["metadata"]["annotations"]
    assert int(annotations["prometheus.io/port"]) == ports["head"]["shadecast"] == 8266
    command = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["lifecycle"]["postStart"]["exec"]["command"]
    assert "--page-host 0.0.0.0" in command[-1], "else no other pod reaches the page"
