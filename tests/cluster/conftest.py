"""Real local clusters for tests: several raylets on this machine, one cluster per module, always shut down."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from serve_app.launch.control_plane import start_control_plane
from serve_app.launch.local import LocalCluster
from tests.ray_start import started

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


@pytest.fixture(scope="module")
def cluster():
    """A head and two workers with the control plane, and Serve without a proxy."""
    with started(LocalCluster(workers=2)) as local:
        local.connect()
        start_control_plane(page_port=0)
        start_serve(local.address)
        try:
            yield local
        finally:
            serve.shutdown()  # this process forgets the controller, so that the next module finds its own


def start_serve(address: str) -> None:
    """Start Serve from a process of its own, as users do: replicas take over the import path of whoever starts it."""
    code = (
        "import sys, ray; from ray import serve; ray.init(address=sys.argv[1]); serve.start(proxy_location='Disabled')"
    )
    subprocess.run(
        [sys.executable, "-P", "-c", code, address],
        check=True,
        capture_output=True,
        timeout=120,
        cwd=tempfile.gettempdir(),
    )


def deploy(
    folder: Any, import_path: str, app_name: str, env_vars: Mapping[str, str] | None = None, **deployment: Any
) -> Any:
    """Deploy an application from `folder` as a config file would; a second call only changes what differs."""
    config = {
        "applications": [
            {
                "name": app_name,
                "route_prefix": None,
                "import_path": import_path,
                "runtime_env": {"env_vars": {"PYTHONPATH": str(folder), **(env_vars or {})}},
                "deployments": [deployment],
            }
        ]
    }
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
    wanted = deployment.get("num_replicas", 1)

    def running() -> bool:
        app = serve.status().applications.get(app_name)
        if app is None:
            return False
        assert app.status != "DEPLOY_FAILED", app.message
        found = app.deployments.get(deployment["name"])
        return app.status == "RUNNING" and found is not None and found.replica_states.get("RUNNING") == wanted

    wait_for(running, 90.0, f"{wanted} replicas of {app_name}")
    return serve.get_app_handle(app_name)


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The first true value of `condition`; fails, naming what was awaited, after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout_s:g} s: {what}")


def status() -> dict[str, Any]:
    """The coordinator's status."""
    coordinator = ray.get_actor("shadecast-coordinator", namespace="shadecast")
    return ray.get(coordinator.status.remote(), timeout=30)


def deployment_status(name: str) -> dict[str, Any]:
    """One deployment's part of the status, {} while the coordinator does not know it."""
    return next((d for d in status()["deployments"] if d["deployment"] == name), {})
