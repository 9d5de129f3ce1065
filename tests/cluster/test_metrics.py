"""Metrics of a running cluster: through the page from elsewhere, and through Ray's own export."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
from typing import Any

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from serve_app.launch.control_plane import ControlPlane, start_control_plane, stop_control_plane
from serve_app.page.address import PageError
from tests.cluster.conftest import deploy, deployment_status, wait_for
from tests.ports import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

APP = """
    import asyncio
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    @serve.deployment(
        ray_actor_options={"num_cpus": 0.1},
        request_router_config=RequestRouterConfig(request_router_class="serve_app.router:PredictiveRouter"),
    )
    class Model:
        async def __call__(self, fails):
            await asyncio.sleep(0.03)
            if fails:
                raise ValueError("broken")
            return "well"

    app = Model.bind()
"""
NAME = "metrics/Model"
WELL, BROKEN = 40, 5


@pytest.fixture(scope="module")
def plane(cluster: Any) -> ControlPlane:
    """The control plane of the cluster, its page at all addresses."""
    return start_control_plane(page_host="0.0.0.0", page_port=free_port())


@pytest.fixture(scope="module")
def served(plane: ControlPlane, tmp_path_factory: Any) -> None:
    """A deployment that has answered WELL requests and failed BROKEN ones, as the coordinator knows."""
    folder = tmp_path_factory.mktemp("app")
    (folder / "metrics_app.py").write_text(textwrap.dedent(APP))
    handle = deploy(folder, "metrics_app:app", "metrics", name="Model", num_replicas=2)
    for _ in range(WELL):  # one by one: a router that is busy hears late that a replica has accepted
        assert handle.remote(False).result() == "well"
    for answer in [handle.remote(True) for _ in range(BROKEN)]:
        with pytest.raises(ValueError, match="broken"):
            answer.result()
    wait_for(lambda: deployment_status(NAME).get("finished") == WELL + BROKEN, 30.0, "all requests are reported")


def get(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        return str(answer.read().decode())


def samples(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def one(found: dict[str, list[tuple[dict[str, str], float]]], name: str, **labels: str) -> float:
    """The only sample with these labels; NaN where there is none."""
    values = [value for given, value in found.get(name, []) if labels.items() <= given.items()]
    assert len(values) <= 1, f"{name} comes {len(values)} times"
    return values[0] if values else math.nan


def test_the_page_tells_whoever_asks_by_address_how_long_requests_took(plane: ControlPlane, served: None) -> None:
    def scraped() -> dict[str, list[tuple[dict[str, str], float]]] | None:
        found = samples(get(plane.page_url + "/metrics", Host="10.42.0.17:8266"))
        return found if one(found, "shadecast_requests_total", deployment=NAME) == WELL + BROKEN else None

    found = wait_for(scraped, 10.0, "the page has a status that is new enough")
    assert one(found, "shadecast_request_failures_total", deployment=NAME) == BROKEN
    assert one(found, "shadecast_request_duration_seconds_count", deployment=NAME) == WELL
    assert one(found, "shadecast_request_duration_seconds_bucket", deployment=NAME, le="0.01") < WELL / 2
    assert one(found, "shadecast_request_duration_seconds_bucket", deployment=NAME, le="5.0") == WELL
    assert one(found, "shadecast_tick_duration_seconds_count", deployment=NAME) > 0
    assert one(found, "shadecast_tick_lateness_seconds_count", deployment=NAME) > 0
    assert one(found, "shadecast_connections", deployment=NAME, state="active") == 2
    assert one(found, "shadecast_routers", deployment=NAME, level="table") >= 1


def test_rays_own_export_has_the_same_numbers(served: None) -> None:
    """As users' Prometheus reads it from every node."""
    targets = [f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics" for n in ray.nodes() if n["Alive"]]

    def published() -> dict[str, list[tuple[dict[str, str], float]]] | None:
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        for target in targets:
            for name, values in samples(get(target)).items():
                if name.startswith("ray_shadecast"):
                    found.setdefault(name, []).extend(values)
        done = one(found, "ray_shadecast_requests_total", deployment=NAME) == WELL + BROKEN
        return found if done and "ray_shadecast_request_duration_seconds_count" in found else None

    found = wait_for(published, 90.0, "Ray's agents export the coordinator's metrics")
    assert one(found, "ray_shadecast_up") == 1
    assert one(found, "ray_shadecast_request_failures_total", deployment=NAME) == BROKEN
    assert one(found, "ray_shadecast_connections", deployment=NAME, state="active") == 2
    assert one(found, "ray_shadecast_panic", deployment=NAME) == 0
    assert one(found, "ray_shadecast_nodes") == 3
    count = one(found, "ray_shadecast_request_duration_seconds_count", deployment=NAME)
    assert count == WELL
    buckets = {
        float(labels["le"]): value
        for labels, value in found["ray_shadecast_request_duration_seconds_bucket"]
        if labels["deployment"] == NAME
    }
    assert buckets[0.01] < WELL / 2, "they take 30 ms"
    assert buckets[5.0] == buckets[math.inf] == WELL
    for values in found.values():
        assert not any("replica" in labels or "node" in labels for labels, _ in values), "a series each would be many"
        assert len(values) < 200


def refused(url: str, host: str) -> str:
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(url, Host=host)
    assert caught.value.code == 421
    return str(json.load(caught.value)["error"])


def test_what_a_refusal_says_to_start_works_on_the_running_cluster(plane: ControlPlane, cluster: Any) -> None:
    page = plane.page_url + "/api/status"
    error = refused(page, "head.example")
    command = error.rpartition(": ")[2].split()
    assert command[0] == "shadecast"
    ran = subprocess.run(
        [sys.executable, "-m", "serve_app", *command[1:], "--address", cluster.address],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=dict(os.environ),
    )
    assert ran.returncode == 0, ran.stderr
    assert plane.page_url in ran.stdout, "address and port stay"
    assert plane.token_source in ran.stdout, "and where the token is"
    assert json.loads(get(page, Host="head.example"))["schema"] == 1
    refused(page, "other.example")
    again = start_control_plane()
    assert (again.page_url, again.rights, again.page_address.names) == (plane.page_url, plane.rights, ("head.example",))


def test_a_host_that_cannot_be_leaves_the_page_that_runs_as_it_is(plane: ControlPlane, cluster: Any) -> None:
    before = start_control_plane()
    with pytest.raises(PageError, match="--page-host"):
        start_control_plane(page_host="999.1.1.1")
    assert start_control_plane() == before
    assert get(plane.page_url + "/metrics")
    ran = subprocess.run(
        [sys.executable, "-m", "serve_app", "up", "--page-host", "no such host", "--address", cluster.address],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 2
    assert len(ran.stderr.strip().splitlines()) == 1, ran.stderr
    assert "--page-host" in ran.stderr


def test_a_host_that_cannot_be_starts_nothing_where_nothing_runs(plane: ControlPlane) -> None:
    serve.delete("metrics")
    stop_control_plane()

    def actors() -> list[str]:
        return [e["name"] for e in ray.util.list_named_actors(all_namespaces=True) if e["namespace"] == "shadecast"]

    wait_for(lambda: not actors(), 30.0, "the control plane is gone")
    with pytest.raises(PageError, match="--page-host"):
        start_control_plane(page_host="192.0.2.1")
    assert actors() == []
