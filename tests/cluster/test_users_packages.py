"""A cluster whose machines have a user's `models`, `train` and `actors` on their PYTHONPATH: both sides work.

Imported by a process that is not the user's, the user's packages raise: whatever works here has found its own. So it is
with a training, in test_forecast_loop.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path

import pytest
import ray
from ray import serve

from serve_app.launch.control_plane import forecaster_states
from serve_app.launch.local import LocalCluster
from tests.cluster.conftest import deploy, deployment_status, start_serve, status, wait_for
from tests.ports import free_port
from tests.ray_start import started

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

NODES = 2
PACKAGE = """
    import os
    if "OF_THE_USER" not in os.environ:
        raise ImportError(f"a user's {__name__}, imported by a process that is not the user's")
    ANSWER = 42
"""
APP = """
    import actors, models, train
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    @serve.deployment(
        ray_actor_options={"num_cpus": 0.1},
        request_router_config=RequestRouterConfig(request_router_class="serve_app.router:PredictiveRouter"),
    )
    class Model:
        async def predict(self, x):
            return x * models.ANSWER

    app = Model.bind()
"""


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    """The folder of a user's application, on the PYTHONPATH of all machines."""
    folder = tmp_path_factory.mktemp("users")
    for name in ("models", "train", "actors"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(textwrap.dedent(PACKAGE))
    (folder / "user_app.py").write_text(textwrap.dedent(APP))
    return folder


@pytest.fixture(scope="module")
def shadecast(users, tmp_path_factory):
    """Runs the command line in the parent folder of a clone, and the page's address: `up` was called there."""
    parent = tmp_path_factory.mktemp("parent")
    (parent / "shadecast" / "serve_app").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", f"{users}{os.pathsep}{parent}")
        with started(LocalCluster(workers=NODES - 1)) as local:
            environment.setenv("RAY_ADDRESS", local.address)

            def run(*arguments):
                command = [str(Path(sys.executable).with_name("shadecast")), *arguments]
                ran = subprocess.run(command, cwd=parent, capture_output=True, text=True, timeout=240, check=False)
                assert ran.returncode == 0, ran.stdout + ran.stderr
                return ran.stdout

            local.connect()
            start_serve(local.address)
            try:
                page = re.search(r"http://\S+:\d+", run("up", "--page-port", str(free_port())))
                yield run, page.group()
            finally:
                serve.shutdown()


async def ask(handle, times=20):
    return [await handle.predict.remote(i) for i in range(times)]


def test_every_node_reports_to_a_control_plane_that_was_started_beside_a_clone(shadecast):
    wait_for(lambda: len(status()["nodes"]) == NODES, 60, "every node reports")
    wait_for(lambda: all(node["predicted"] for node in status()["nodes"]), 90, "a forecast on every node")
    run, page = shadecast
    assert len(json.loads(run("status", "--json"))["nodes"]) == NODES
    with urllib.request.urlopen(f"{page}/api/status", timeout=30) as answer:
        assert len(json.load(answer)["nodes"]) == NODES


def test_an_application_answers_from_its_own_models_through_our_router(shadecast, users):
    handle = deploy(users, "user_app:app", "shop", {"OF_THE_USER": "yes"}, name="Model", num_replicas=2)
    assert asyncio.run(ask(handle)) == [i * 42 for i in range(20)]

    def levels():
        asyncio.run(ask(handle, 1))
        return {router["level"] for router in deployment_status("shop/Model").get("routers", [])}

    wait_for(lambda: levels() == {"table"}, 30, "the router goes by a table")
    assert asyncio.run(ask(handle)) == [i * 42 for i in range(20)]


def lives():
    """Epoch of the coordinator and process id of each node's forecaster; None while one of them is restarting."""
    with contextlib.suppress(ray.exceptions.RayActorError):
        return status()["epoch"], {node: state["pid"] for node, state in forecaster_states().items()}


def test_a_coordinator_and_a_forecaster_that_were_killed_come_back(shadecast):
    epoch, processes = lives()
    killed = next(iter(processes))
    for name in ("shadecast-coordinator", f"shadecast-forecaster-{killed}"):
        ray.kill(ray.get_actor(name, namespace="shadecast"), no_restart=False)

    def restarted():
        now = lives()
        return now if now and now[0] != epoch and now[1][killed] != processes[killed] else None

    _, now = wait_for(restarted, 60, "another coordinator and another forecaster answer")
    assert {node for node, pid in now.items() if pid != processes[node]} == {killed}
    wait_for(lambda: len(status()["nodes"]) == NODES, 60, "every node reports to the new coordinator")
