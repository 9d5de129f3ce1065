"""Page, history and metrics against the status of a real coordinator, not against a copy of its keys."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections import Counter
from importlib import resources
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve_app.page.metrics import prometheus_text
from serve_app.page.watch import HISTORY_S, NODE_SERIES, Watch, to_json
from shadecast.types import State
from tests.serve_app.page.page_scene import CHAT, DIGITS, NODES, Scene, make_scene

NOT_YET = {"held"}
"""Fields that the page shows where the coordinator sends them, and does without elsewhere."""


@pytest.fixture(scope="module")
def played() -> tuple[Scene, Watch, dict[str, Any]]:
    """The scene after 330 s, watched once a second."""
    scene = make_scene()
    watch = Watch(scene.coordinator.status, scene.clock_s)

    async def play() -> dict[str, Any]:
        for _ in range(330):
            await scene.play()
            await watch.latest()
        return await watch.latest()

    return scene, watch, asyncio.run(play())


def samples_of(text: bytes) -> dict[str, list[Any]]:
    return {family.name: family.samples for family in text_string_to_metric_families(text.decode())}


def test_the_status_of_a_real_coordinator_is_strict_json(played: Any) -> None:
    status = played[2]
    assert json.loads(json.dumps(status, allow_nan=False)) == status
    assert {d["deployment"] for d in status["deployments"]} == {DIGITS, CHAT}
    unknown = [n["skill"]["network"] for n in status["nodes"] if n["predicted"]]
    assert unknown == [None, None, None]  # NaN in the report


@pytest.mark.parametrize(("function", "name"), [("updateReplica", "r"), ("updateDeployment", "d"), ("updateNode", "n")])
def test_the_page_reads_only_what_the_coordinator_sends(played: Any, function: str, name: str) -> None:
    status = played[2]
    sent = {
        "r": set(status["deployments"][0]["replicas"][0]) | set(status["deployments"][0]["routers"][0]) | NOT_YET,
        "d": set(status["deployments"][0]),
        "n": set(status["nodes"][0]),
    }[name]
    script = resources.files("serve_app.page").joinpath("page.html").read_text()
    start = script.index(f"function {function}(")
    body = script[start : script.index("\n}\n", start)]
    read = set(re.findall(rf"(?<![\w.]){name}\.(\w+)", body))
    assert len(read) > 5
    assert read <= sent


def test_the_page_reads_node_series_under_the_names_of_the_history() -> None:
    script = resources.files("serve_app.page").joinpath("page.html").read_text()
    assert set(re.findall(r'(?:total|background): "(\w+)"', script)) == set(NODE_SERIES)


def test_history_has_one_value_per_time_and_none_where_a_replica_was_not_there(played: Any) -> None:
    history = played[1].history()
    ago_s = history["ago_s"]
    assert ago_s == sorted(ago_s, reverse=True)
    assert HISTORY_S - 2 <= ago_s[0] <= HISTORY_S
    assert set(history["nodes"]) == set(NODES)
    columns = [c for by_name in history["nodes"].values() for c in by_name.values()]
    columns += [c for by_replica in history["rates"].values() for c in by_replica.values()]
    assert {len(column) for column in columns} == {len(ago_s)}
    newcomer = history["rates"][DIGITS]["x9failing"]  # came at 150 s of 330
    assert newcomer[0] is None
    assert newcomer[-1] is not None
    json.dumps(history, allow_nan=False)


def test_metrics_say_what_the_status_says(played: Any) -> None:
    status = played[2]
    metrics = samples_of(prometheus_text(status)[0])
    assert [s.value for s in metrics["shadecast_up"]] == [1.0]
    replicas = {r["replica_id"]: r for d in status["deployments"] for r in d["replicas"]}
    for name, field in (("share", "share"), ("capacity", "capacity"), ("queue", "queue")):
        given = {s.labels["replica"]: s.value for s in metrics[f"shadecast_replica_{name}"]}
        assert given == pytest.approx({k: r[field] for k, r in replicas.items()})
    totals = {s.labels["deployment"]: s.value for s in metrics["shadecast_requests"]}
    assert totals == {d["deployment"]: d["finished"] for d in status["deployments"]}
    middle = {
        (s.labels["node"], s.labels["resource"], s.labels["horizon_s"]): s.value
        for s in metrics["shadecast_node_predicted_fraction"]
        if s.labels["q"] == "0.5"
    }
    assert middle[NODES[0], "cpu", "5"] == status["nodes"][0]["predicted"]["cpu"]["5.0"][1]


def test_each_replica_is_in_exactly_one_state(played: Any) -> None:
    metrics = samples_of(prometheus_text(played[2])[0])
    states = metrics["shadecast_replica_state"]
    assert {s.labels["state"] for s in states} == {state.value for state in State}
    per_replica: Counter[str] = Counter()
    for sample in states:
        per_replica[sample.labels["replica"]] += int(sample.value)
    assert set(per_replica.values()) == {1}


def test_what_is_unknown_has_no_sample_instead_of_a_made_up_zero(played: Any) -> None:
    metrics = samples_of(prometheus_text(played[2])[0])
    assert {s.labels["node"] for s in metrics["shadecast_node_predicted_fraction"]} == set(NODES[:3])
    assert {s.labels["resource"] for s in metrics["shadecast_forecast_skill"]} == {"cpu", "memory"}
    assert not any(math.isnan(s.value) for samples in metrics.values() for s in samples)


def test_names_that_users_chose_arrive_whole_in_metric_labels(played: Any) -> None:
    metrics = samples_of(prometheus_text(played[2])[0])
    assert CHAT in {s.labels["deployment"] for s in metrics["shadecast_table_version"]}


def test_a_status_with_nothing_in_it_gives_valid_metrics() -> None:
    empty = {"schema": 1, "epoch": 1, "uptime_s": None, "nodes": [], "deployments": [], "transitions": []}
    assert samples_of(prometheus_text(empty)[0])["shadecast_up"][0].value == 1.0
    assert [s.value for s in samples_of(prometheus_text(None)[0])["shadecast_up"]] == [0.0]


def test_everything_python_and_numpy_put_in_a_status_becomes_json() -> None:
    given = {
        "nan": math.nan,
        "inf": [math.inf, -math.inf],
        "numpy": (np.float32(0.5), np.int64(3), np.float64(math.nan)),
        "state": State.ACTIVE,
        7: {"yes": True, "none": None, "n": 12},
        "odd": {1},
    }
    assert json.loads(json.dumps(to_json(given), allow_nan=False)) == {
        "nan": None,
        "inf": [None, None],
        "numpy": [0.5, 3, None],
        "state": "active",
        "7": {"yes": True, "none": None, "n": 12},
        "odd": [1],
    }
