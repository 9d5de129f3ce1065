"""The whole application on a real cluster: an unmodified client, a user's own class, damage on the wire, failures.

The user's application lies in a folder of its own with packages named `models` and `train`, as many have, and is
started from there with `serve run`, as a user would.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
import tritonclient.http as triton
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from serve_app.gateway import digits
from tests.ports import free_port
from tests.ray_start import start

ROOT = Path(__file__).parents[3]

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

USER_MODEL = """
import asyncio, os, time
from pathlib import Path
import numpy as np
from ray import serve
from models.labels import LABEL          # the user's own folder, not the one that shadecast installs
from train import TRAINED


class Probe:
    inputs = [("text", "BYTES", [-1])]
    outputs = [("text", "BYTES", [-1]), ("process", "INT64", [1])]

    def __init__(self, folder):
        self.folder = Path(folder)

    async def infer(self, inputs, parameters):
        if "die_once" in parameters:
            try:
                (self.folder / parameters["die_once"]).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os._exit(1)
        if "wait_for" in parameters:
            await self.gate(parameters["wait_for"])
        if "fail" in parameters:
            raise RuntimeError("the model broke\\n" + __file__)
        text = f"{LABEL} {TRAINED} {serve.get_multiplexed_model_id()}".strip()
        return {"text": [text.encode()] * len(inputs["text"]), "process": [os.getpid()]}

    async def generate(self, request, had=()):
        for word in ("first ", "second ", "third")[len(had):]:
            if word != "first ":
                await self.gate(request["wait_for"])
            yield {"text_output": word}

    async def gate(self, name):
        (self.folder / f"{name}.waiting.{os.getpid()}").touch()
        while not (self.folder / name).exists():
            await asyncio.sleep(0.02)
"""


class Cluster:
    """Addresses of the running applications, and the folder through which the user's model is steered."""

    def __init__(self, port: int, folder: Path) -> None:
        self.address = f"127.0.0.1:{port}"
        self.port = port
        self.folder = folder

    def open_gate(self, name: str) -> None:
        (self.folder / name).touch()

    def waiting(self, name: str) -> int:
        return len(list(self.folder.glob(f"{name}.waiting.*")))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    app = tmp_path_factory.mktemp("user_app")
    for name, text in {
        "user_model.py": USER_MODEL,
        "models/__init__.py": "",
        "models/labels.py": "LABEL = 'users-models'\n",
        "train/__init__.py": "TRAINED = 'users-train'\n",
    }.items():
        (app / name).parent.mkdir(exist_ok=True)
        (app / name).write_text(text)
    steering = tmp_path_factory.mktemp("steering")
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "serve_app.http_guard:proxy_middlewares")
        started = start(lambda: ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False))
        address = started.address_info["gcs_address"]
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            deploy_from_config_file(num_cpus=0.2, session_cookie="shadecast", body_idle_timeout_s=1)
            started_app = subprocess.run(
                [
                    *(sys.executable, "-m", "ray.serve.scripts", "run", "serve_app.app:build", "--non-blocking"),
                    *("--address", address, "--name", "user", "--route-prefix", "/user"),
                    *("model=user_model:Probe", f'model_args={{"folder": "{steering}"}}', "model_name=probe"),
                    *("replicas=2", "num_cpus=0.2", "max_ongoing_requests=1", "queue_timeout_s=1"),
                ],
                cwd=app,
                env={**os.environ, "PYTHONPATH": ""},
                check=False,  # `serve run` ends with 0 in any case
                timeout=120,
                capture_output=True,
                text=True,
            )
            assert serve.status().applications["user"].status == "RUNNING", started_app.stderr[-3000:]
            yield Cluster(port, steering)
        finally:
            serve.shutdown()
            ray.shutdown()


def deploy_from_config_file(**changes: Any) -> None:
    """What `serve deploy examples/serve_config.yaml` does, with other arguments here and there."""
    config = yaml.safe_load((ROOT / "examples" / "serve_config.yaml").read_text())
    config["applications"][0]["args"] |= changes
    client = _get_global_client()
    client.deploy_apps(ServeDeploySchema.model_validate(config))
    client._wait_for_application_running("digits", timeout_s=120)


def probe(cluster: Cluster, timeout_s: float = 30.0, headers: dict[str, str] | None = None, **parameters: Any) -> Any:
    request = {
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["?"]}],
        "parameters": parameters,
    }
    url = f"http://{cluster.address}/user/v2/models/probe/infer"
    return httpx.post(url, json=request, timeout=timeout_s, headers=headers)


def pixels_input(rows: np.ndarray, *, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput("pixels", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows, binary_data=binary)
    return tensor


def test_an_unmodified_triton_client_works(cluster: Cluster) -> None:
    with triton.InferenceServerClient(cluster.address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("digits")
        assert not client.is_model_ready("other")
        assert client.get_server_metadata()["name"] == "shadecast"
        metadata = client.get_model_metadata("digits")
        assert metadata["inputs"] == [{"name": "pixels", "datatype": "FP32", "shape": [-1, 64]}]
        assert [output["datatype"] for output in metadata["outputs"]] == ["INT64", "FP32"]
        with pytest.raises(triton.InferenceServerException, match="unknown model 'other'"):
            client.get_model_metadata("other")


def test_digits_are_read_right_in_every_way_of_sending_them(cluster: Cluster) -> None:
    _, _, images, labels = digits.split()
    digit = triton.InferRequestedOutput("digit", binary_data=False)
    with triton.InferenceServerClient(cluster.address) as client:
        answers = [
            client.infer("digits", [pixels_input(images)]),
            client.infer("digits", [pixels_input(images, binary=False)], outputs=[digit]),
            client.infer("digits", [pixels_input(images)], request_compression_algorithm="gzip"),
            client.infer("digits", [pixels_input(images)], request_compression_algorithm="deflate"),
            client.infer("digits", [pixels_input(images)], model_version="1", request_id="q"),
            client.async_infer("digits", [pixels_input(images)]).get_result(),
        ]
    for answer in answers:
        assert float((answer.as_numpy("digit") == labels).mean()) >= digits.MIN_ACCURACY
    assert answers[0].as_numpy("probabilities").shape == (len(images), 10)
    assert answers[1].as_numpy("probabilities") is None
    assert answers[4].get_response()["id"] == "q"


def test_the_client_is_told_what_is_wrong(cluster: Cluster) -> None:
    with (
        triton.InferenceServerClient(cluster.address) as client,
        pytest.raises(
            triton.InferenceServerException, match=r"shape is \[1, 63\], the model takes \[-1, 64\]"
        ) as caught,
    ):
        client.infer("digits", [pixels_input(np.zeros((1, 63), np.float32))])
    assert caught.value.status() == "400"


def test_a_users_class_is_served_with_its_own_models_folder(cluster: Cluster) -> None:
    text = triton.InferInput("text", [2], "BYTES")
    text.set_data_from_numpy(np.array([b"a", b"b"], object))
    with triton.InferenceServerClient(f"{cluster.address}/user") as client:
        assert client.get_model_metadata("probe")["inputs"][0]["datatype"] == "BYTES"
        answer = client.infer("probe", [text]).as_numpy("text")
    assert answer.tolist() == [b"users-models users-train"] * 2


def test_the_multiplexed_model_id_reaches_the_model(cluster: Cluster) -> None:
    answer = probe(cluster, headers={"serve_multiplexed_model_id": "german"}).json()
    assert answer["outputs"][0]["data"] == ["users-models users-train german"]


def test_a_browser_keeps_its_session(cluster: Cluster) -> None:
    request = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [0, 64], "data": []}]}
    with httpx.Client(base_url=f"http://{cluster.address}") as client:
        first = client.post("/v2/models/digits/infer", json=request)
        second = client.post("/v2/models/digits/infer", json=request)
    assert first.cookies["shadecast"]
    assert "set-cookie" not in second.headers


def test_a_failure_of_the_model_is_a_500_with_one_line(cluster: Cluster) -> None:
    answer = probe(cluster, fail=1)
    assert answer.status_code == 500
    assert answer.json() == {"error": "the model failed: RuntimeError: the model broke"}


def test_a_request_whose_replica_dies_is_answered_by_another(cluster: Cluster) -> None:
    answer = probe(cluster, die_once="death", timeout_s=60.0)
    assert answer.status_code == 200, answer.text
    assert (cluster.folder / "death").exists()


def test_full_replicas_answer_503_within_the_bounded_wait(cluster: Cluster) -> None:
    wait_until_two_replicas_answer(cluster)
    with ThreadPoolExecutor(2) as pool:
        blocked = [pool.submit(probe, cluster, wait_for="full") for _ in range(2)]
        while cluster.waiting("full") < 2:
            assert not any(future.done() for future in blocked)
            threading.Event().wait(0.02)
        refused = probe(cluster)
        assert refused.status_code == 503
        assert "no replica had room within 1 s" in refused.json()["error"]
        assert refused.headers["retry-after"] == "1"
        cluster.open_gate("full")
        assert [future.result().status_code for future in blocked] == [200, 200]
    assert probe(cluster).status_code == 200


def test_a_deadline_ends_the_request_and_frees_the_replica(cluster: Cluster) -> None:
    for _ in range(3):
        answer = probe(cluster, wait_for="never", timeout=300_000)
        assert answer.status_code == 504
    assert probe(cluster).status_code == 200


def test_clients_that_leave_free_their_replicas(cluster: Cluster) -> None:
    for _ in range(3):
        with pytest.raises(httpx.ReadTimeout):
            probe(cluster, timeout_s=0.3, wait_for="never")
    url = f"http://{cluster.address}/user/v2/models/probe/generate_stream"
    for _ in range(3):
        with httpx.stream("POST", url, json={"wait_for": "never"}, timeout=30.0) as response:
            assert next(stream_events(response))["text_output"] == "first "
    assert probe(cluster).status_code == 200


def test_the_documented_fastapi_application_works_with_the_router_on_its_model(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = (ROOT / "docs" / "protocol.md").read_text().split("```python\n")
    (code,) = (block.split("```")[0] for block in blocks if "serve.ingress(api)" in block)
    code = code.replace("num_replicas=4,", 'num_replicas=1, ray_actor_options={"num_cpus": 0.1},')
    code = code.replace("@serve.deployment\n", '@serve.deployment(ray_actor_options={"num_cpus": 0.1})\n')
    (tmp_path / "documented.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    documented = importlib.import_module("documented")
    ray.cloudpickle.register_pickle_by_value(documented)
    serve.run(documented.app, name="documented", route_prefix="/own")
    answer = httpx.post(f"http://{cluster.address}/own/score", params={"text": "Hi!!"}, timeout=30.0)
    assert (answer.status_code, answer.json()) == (200, 0.5)
    serve.delete("documented")


def wait_until_two_replicas_answer(cluster: Cluster) -> None:
    """The replica that another test killed is replaced in a while."""
    seen: set[int] = set()
    while len(seen) < 2:
        seen.add(probe(cluster).json()["outputs"][1]["data"][0])


def stream_events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line:
            yield json.loads(line.removeprefix("data: "))


def test_a_stream_arrives_item_by_item(cluster: Cluster) -> None:
    url = f"http://{cluster.address}/user/v2/models/probe/generate_stream"
    with httpx.stream("POST", url, json={"wait_for": "stream"}, timeout=30.0) as response:
        events = stream_events(response)
        assert next(events)["text_output"] == "first "
        cluster.open_gate("stream")  # nothing after the first item exists before this
        assert [event["text_output"] for event in events] == ["second ", "third"]


def test_a_stream_whose_replica_dies_is_finished_by_another_one(cluster: Cluster) -> None:
    wait_until_two_replicas_answer(cluster)
    url = f"http://{cluster.address}/user/v2/models/probe/generate_stream"
    with httpx.stream("POST", url, json={"wait_for": "killed"}, timeout=60.0) as response:
        events = stream_events(response)
        assert next(events)["text_output"] == "first "
        while not (waiting := list(cluster.folder.glob("killed.waiting.*"))):
            threading.Event().wait(0.02)
        os.kill(int(waiting[0].suffix[1:]), signal.SIGKILL)
        cluster.open_gate("killed")
        assert [event["text_output"] for event in events] == ["second ", "third"]


def test_generate_gives_one_object(cluster: Cluster) -> None:
    cluster.open_gate("whole")
    url = f"http://{cluster.address}/user/v2/models/probe/generate"
    answer = httpx.post(url, json={"wait_for": "whole"}, timeout=30.0).json()
    assert answer["text_output"] == "first second third"


# ---------------------------------------------------------------- damage on the wire

INFER = b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"


def raw(cluster: Cluster, data: bytes) -> int:
    """Status of the answer to raw bytes; 0 where the server just hangs up."""
    with socket.create_connection(("127.0.0.1", cluster.port), timeout=20.0) as sock:
        with contextlib.suppress(OSError):  # refused before everything was sent
            sock.sendall(data)
        try:
            answer = sock.makefile("rb").readline()
        except ConnectionResetError:
            return 0
    return int(answer.split()[1]) if answer else 0


@pytest.mark.parametrize(
    ("data", "allowed"),
    [
        (LIVE + b"x-session-id: \xff\xfe\r\n\r\n", {400}),
        (LIVE + b"x-request-id: \xff\xfe\r\n\r\n", {400}),
        (LIVE + b"serve_multiplexed_model_id: \xff\xfe\r\n\r\n", {400}),
        (LIVE + b"x-request-timeout-seconds: \xff\xfe\r\n\r\n", {400}),
        (LIVE + b"x-other: \xff\xfe\r\n\r\n", {200}),
        (LIVE + b"x-session-id: " + b"a" * 1_000_000 + b"\r\n\r\n", {431}),
        (LIVE + b"x-request-id: " + b"a" * 1_000_000 + b"\r\n\r\n", {431}),
        (LIVE + b"x-many: 1\r\n" * 20_000 + b"\r\n", {431}),
        (b"GET /v2/%ff%fe%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", {404}),
        (b"GET /v2/\xff HTTP/1.1\r\nHost: x\r\n\r\n", {400}),
        (b"NONSENSE\r\n\r\n", {400}),
        (b"\x00" * 1000, {400}),
        (INFER + b"content-length: 2\r\ncontent-type: text/plain\r\n\r\n{}", {415}),
        (INFER + b"content-length: 2\r\ncontent-encoding: br\r\n\r\n{}", {415}),
        (INFER + b"content-length: 2\r\n\r\n{}", {400}),
        (INFER + b"content-length: 2\r\n\r\n\xff\xff", {400}),
        (INFER + b"content-length: 100\r\n\r\n{}", {408}),
        (INFER + b"content-length: nonsense\r\n\r\n{}", {400}),
        (INFER + b"content-length: 100000000\r\n\r\n" + b" " * 1_000_000, {0, 413}),
        (INFER + b"transfer-encoding: chunked\r\n\r\n" + (b"100000\r\n" + b" " * 0x100000 + b"\r\n") * 30, {0, 413}),
        (INFER + b"transfer-encoding: chunked\r\n\r\nnonsense\r\n", {0, 400}),
    ],
)  # fmt: skip
def test_damage_on_the_wire_is_refused_and_nothing_hangs(cluster: Cluster, data: bytes, allowed: set[int]) -> None:
    assert raw(cluster, data) in allowed
    with triton.InferenceServerClient(cluster.address) as client:
        assert client.is_server_live()


# ---------------------------------------------------------------- the end, so it comes last


def test_a_live_stream_is_finished_when_the_application_is_deleted(cluster: Cluster) -> None:
    url = f"http://{cluster.address}/user/v2/models/probe/generate_stream"
    with httpx.stream("POST", url, json={"wait_for": "last"}, timeout=60.0) as response:
        events = stream_events(response)
        assert next(events)["text_output"] == "first "
        with ThreadPoolExecutor(1) as pool:
            deleted = pool.submit(serve.delete, "user")
            while httpx.get(f"http://{cluster.address}/user/v2/health/live").status_code == 200:
                threading.Event().wait(0.05)
            assert not deleted.done()
            cluster.open_gate("last")
            assert [event["text_output"] for event in events] == ["second ", "third"]
            deleted.result(timeout=60.0)
