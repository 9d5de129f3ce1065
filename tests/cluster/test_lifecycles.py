"""What becomes of applications as they live: what a copy causes downstream, replicas that come from none."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from ray import serve

from serve_app.app import AppArgs, build
from serve_app.launch.control_plane import start_control_plane
from serve_app.launch.local import LocalCluster
from tests.cluster import composition_app
from tests.cluster.conftest import deployment_status, status, wait_for
from tests.cluster.slow_start import START_S
from tests.cluster.test_request_path import replicas_of, table
from tests.ports import free_port
from tests.ray_start import started

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def address():
    """Of Serve's proxy, on a cluster with the control plane."""
    port = free_port()
    with started(LocalCluster(workers=1)) as local:
        local.connect()
        start_control_plane(page_port=0)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()


# ------------------------------------------------------------------ copies in a graph of deployments


@pytest.fixture(scope="module")
def graph(address):
    outer = serve.run(composition_app.app, name="graph", route_prefix=None)
    wait_for(lambda: outer.who.remote().result(timeout_s=30) and len(replicas_of(outer)) == 2, 30, "both are known")
    return outer


@pytest.fixture
def copying(graph):
    """The outer deployment, each of whose requests goes to one replica and is copied to the other."""
    primary, candidate = replicas_of(graph)
    with table(graph, {primary: 1.0, candidate: 0.0}, mirrors={candidate: 1.0}):
        yield graph


def seen(name, how):
    """How often the replicas of a deployment were called so, for somebody and for a copy."""
    of_each = serve.get_deployment_handle(name, "graph").broadcast("calls").results(timeout_s=30)
    found = Counter(is_copy for calls in of_each for called, _, is_copy in calls if called == how)
    return found[False], found[True]


WAYS = ["plainly", "of_session", "in_a_task", "in_to_thread", "in_a_thread_with_its_context"]


@pytest.mark.parametrize("name", ["Inner", "Plain"])
def test_what_a_copy_causes_in_another_deployment_is_marked_there_whoever_routes_it(copying, name):
    which = name.lower()
    for how in WAYS:
        for i in range(5):
            assert copying.call.remote(which, how, i).result(timeout_s=30) == i
        wait_for(lambda how=how: seen(name, how) == (5, 5), 20, f"5 calls and 5 marked ones: {how}, {seen(name, how)}")
    for i in range(5):
        assert copying.blocking.remote(which, i).result(timeout_s=30) == i
        assert list(copying.options(stream=True).stream.remote(which, 4)) == list(range(4))
    wait_for(lambda: seen(name, "blocking") == (5, 5), 20, "5 calls and 5 marked ones that block")
    wait_for(lambda: seen(name, "stream") == (20, 20), 20, f"20 items and 20 marked ones: {seen(name, 'stream')}")
    for i in range(5):
        copying.call.remote(which, "in_a_thread", i).result(timeout_s=30)
    wait_for(lambda: seen(name, "in_a_thread") == (10, 0), 20, "a thread of its own has no part in the request")


def test_what_a_copy_causes_in_another_deployment_is_not_counted_there(copying):
    def counted():
        inner = deployment_status("graph/Inner")
        return {name: inner.get(name) for name in ("finished", "failed", "mirrored", "rescued")}

    live, copies = seen("Inner", "plainly")
    wait_for(lambda: counted()["finished"], 20, "the coordinator knows the inner deployment")
    time.sleep(2.5)  # two reports: all that was called before is counted
    before = counted()
    for i in range(40):
        assert copying.call.remote("inner", "plainly", i if i % 2 else "bad").result(timeout_s=30) is not None
    wait_for(lambda: counted()["finished"] >= before["finished"] + 40, 20, "somebody's calls count")
    time.sleep(2.5)  # whatever else would count has come
    assert counted() == {**before, "finished": before["finished"] + 40}, "40 for copies, of which 20 failed, do not"
    assert seen("Inner", "plainly") == (live + 40, copies + 40)


def test_a_batch_is_for_nobody_only_where_each_of_its_requests_is_a_copy(copying):
    def marks():
        return Counter(mark for each in copying.broadcast("batch_marks").results(timeout_s=30) for mark in each)

    for i in range(4):
        assert copying.batched.remote("inner", i).result(timeout_s=30) == i
        wait_for(lambda n=i + 1: marks() == {False: n, True: n}, 20, f"{i + 1} batches and as many of copies")


# ------------------------------------------------------------------ replicas that come from none


TO_ZERO = {
    "min_replicas": 0,
    "initial_replicas": 0,
    "max_replicas": 1,
    "upscale_delay_s": 0.0,
    "downscale_delay_s": 2.0,
    "look_back_period_s": 1.0,
    "metrics_interval_s": 0.2,
    "target_ongoing_requests": 4,
}
INFER = {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [7]}]}


def model_replicas():
    return serve.status().applications["zero"].deployments["slow"].replica_states


@pytest.fixture(scope="module")
def to_zero(address):
    """A gateway before a model without a replica, which takes longer to start than a request waits for a place."""
    args = {
        "model": "tests.cluster.slow_start:SlowStart",
        "num_cpus": 0,
        "autoscaling": TO_ZERO,
        "queue_timeout_s": 1.0,
    }
    serve.run(build(AppArgs.model_validate(args)), name="zero", route_prefix="/zero")
    return f"{address}/zero/v2"


def infer(url, **headers):
    return httpx.post(f"{url}/models/slow/infer", json=INFER, headers=headers, timeout=60.0)


def test_a_model_without_a_replica_is_ready_and_its_first_request_is_answered_once_one_has_started(to_zero):
    for _ in range(2):
        wait_for(lambda: not model_replicas(), 60, "there is no replica")
        assert httpx.get(f"{to_zero}/health/ready").status_code == 200, "else no balancer would send anything"
        assert httpx.get(f"{to_zero}/models/slow/ready").status_code == 200
        began_s = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: infer(to_zero), range(4)))
        assert [answer.status_code for answer in answers] == [200] * 4, [answer.text for answer in answers]
        assert answers[0].json()["outputs"][0]["data"] == [7]
        assert START_S < time.monotonic() - began_s < 45.0
        assert httpx.get(f"{to_zero}/health/ready").status_code == 200
        assert infer(to_zero).status_code == 200, "at once"
    wait_for(lambda: [to for _, to in changes()].count("active") == 2, 10, "each replica has its share")
    assert {to for _, to in changes()} <= {"active", "inactive"}, (
        f"no trial where there is nothing to protect: {changes()}"
    )


def changes():
    return [(c["before"], c["after"]) for c in status()["transitions"] if c["deployment"] == "zero/slow"]


def test_a_request_that_has_no_time_to_wait_for_a_start_is_told_so_in_time(to_zero):
    wait_for(lambda: not model_replicas(), 60, "there is no replica")
    began_s = time.monotonic()
    answer = infer(to_zero, **{"x-request-timeout-seconds": "2"})
    assert answer.status_code in (408, 504), answer.text
    assert time.monotonic() - began_s < 5.0
