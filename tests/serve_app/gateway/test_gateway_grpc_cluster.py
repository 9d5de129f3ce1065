"""The gRPC service through Serve's own proxy on a real cluster, with an unmodified client, sync and asynchronous."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from tritonclient.utils import InferenceServerException

from serve_app.gateway import digits
from serve_app.launch.control_plane import running_coordinator, start_control_plane
from tests.ports import free_port
from tests.ray_start import start

ROOT = Path(__file__).parents[3]

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

WORDS = {"application": "words"}
USER_MODEL = """
import asyncio
import os


class Words:
    inputs = [("text", "BYTES", [-1])]
    outputs = [("process", "INT64", [1])]

    async def infer(self, inputs, parameters):
        if "wait" in parameters:
            await asyncio.Event().wait()
        return {"process": [os.getpid()]}

    async def generate(self, request):
        for number, word in enumerate(request["text_input"].split()):
            yield {"text_output": word, "number": number}
"""


class Cluster:
    def __init__(self, http_port: int, grpc_port: int) -> None:
        self.http = f"http://127.0.0.1:{http_port}"
        self.grpc = f"127.0.0.1:{grpc_port}"
        self.config: dict[str, Any] = {}

    def deploy(self) -> None:
        """What `serve deploy` does."""
        client = _get_global_client()
        client.deploy_apps(ServeDeploySchema.model_validate(self.config))
        for name in ("digits", "words"):
            client._wait_for_application_running(name, timeout_s=120)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("user_app")
    (folder / "words_model.py").write_text(USER_MODEL)
    running = Cluster(free_port(), free_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        start(lambda: ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False))
        try:
            deploy_from_config_file(running, folder)
            yield running
        finally:
            serve.shutdown()
            ray.shutdown()


def deploy_from_config_file(cluster: Cluster, folder: Path) -> None:
    """What `serve deploy` does with the Kubernetes file's Serve configuration, beside a class of a user's own."""
    resource = yaml.safe_load((ROOT / "deploy" / "kuberay-rayservice.yaml").read_text())
    config = yaml.safe_load(resource["spec"]["serveConfigV2"])
    config["http_options"] |= {"host": "127.0.0.1", "port": int(cluster.http.rpartition(":")[2])}
    config["grpc_options"] |= {"port": int(cluster.grpc.rpartition(":")[2])}
    (served,) = config["applications"]
    served["args"] |= {"num_cpus": 0.2, "max_replicas_per_node": None, "gateway_replicas": 1, "replicas": 2}
    words = {"model": "words_model:Words", "num_cpus": 0.2, "replicas": 2, "router": "predictive"}
    path = {"env_vars": {"PYTHONPATH": f"{folder}:{ROOT}"}}
    config["applications"].append(
        served | {"name": "words", "route_prefix": "/words", "args": words, "runtime_env": path}
    )
    serve.start(http_options=config["http_options"], grpc_options=config["grpc_options"])
    cluster.config = config
    cluster.deploy()


def pixels(rows: np.ndarray) -> triton.InferInput:
    tensor = triton.InferInput("pixels", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows)
    return tensor


def text(value: str = "?", name: str = "text") -> triton.InferInput:
    tensor = triton.InferInput(name, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([value.encode()], object))
    return tensor


DIGITS = {"application": "digits"}


def test_health_and_metadata(cluster: Cluster) -> None:
    with triton.InferenceServerClient(cluster.grpc) as client:
        assert client.is_server_live(headers=DIGITS)
        assert client.is_server_ready(headers=DIGITS)
        assert client.is_model_ready("digits", headers=DIGITS)
        assert not client.is_model_ready("other", headers=DIGITS)
        assert client.get_server_metadata(headers=DIGITS).name == "shadecast"
        metadata = client.get_model_metadata("digits", headers=DIGITS)
        assert [(i.name, i.datatype, list(i.shape)) for i in metadata.inputs] == [("pixels", "FP32", [-1, 64])]
        assert client.get_model_config("words", headers=WORDS).config.input[0].name == "text"
        assert client.get_model_repository_index(headers=WORDS).models[0].name == "words"


def test_digits_are_read_right_by_both_clients_and_over_http(cluster: Cluster) -> None:
    _, _, images, labels = digits.split()
    with triton.InferenceServerClient(cluster.grpc) as client:
        answers = [
            client.infer("digits", [pixels(images)], headers=DIGITS, request_id="q"),
            client.infer("digits", [pixels(images)], headers=DIGITS, compression_algorithm="gzip"),
        ]
    answers.append(asyncio.run(infer_aio(cluster, "digits", [pixels(images)], headers=DIGITS)))
    request = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [450, 64], "data": images.tolist()}]}
    (digit, _) = httpx.post(f"{cluster.http}/v2/models/digits/infer", json=request, timeout=30.0).json()["outputs"]
    for answer in answers:
        assert answer.as_numpy("digit").tolist() == digit["data"]
        assert float((answer.as_numpy("digit") == labels).mean()) >= digits.MIN_ACCURACY
    assert answers[0].get_response().id == "q"


async def infer_aio(cluster: Cluster, *args: Any, **options: Any) -> Any:
    async with triton_aio.InferenceServerClient(cluster.grpc) as client:
        return await client.infer(*args, **options)


@pytest.mark.parametrize(
    ("model", "tensor", "options", "code", "reason"),
    [
        ("other", pixels(np.zeros((1, 64), np.float32)), {}, "NOT_FOUND", "unknown model 'other'"),
        ("digits", pixels(np.zeros((1, 63), np.float32)), {}, "INVALID_ARGUMENT", "shape is [1, 63]"),
        ("digits", pixels(np.zeros((70_000, 64), np.float32)), {}, "RESOURCE_EXHAUSTED", "larger than 16777216 bytes"),
        ("digits", pixels(np.zeros((1, 64), np.float32)), {"headers": {"application": "no"}}, "NOT_FOUND", "'no'"),
    ],
)
def test_the_client_is_told_what_is_wrong(
    cluster: Cluster, model: str, tensor: Any, options: dict[str, Any], code: str, reason: str
) -> None:
    with (
        triton.InferenceServerClient(cluster.grpc) as client,
        pytest.raises(InferenceServerException) as caught,
    ):
        client.infer(model, [tensor], **({"headers": DIGITS} | options))
    assert caught.value.status() == f"StatusCode.{code}"
    assert reason in caught.value.message()


def test_a_clients_deadline_ends_its_request_and_frees_the_replica(cluster: Cluster) -> None:
    with triton.InferenceServerClient(cluster.grpc) as client:
        for _ in range(20):  # more than two replicas take at one time
            with pytest.raises(InferenceServerException) as caught:
                client.infer("words", [text()], headers=WORDS, parameters={"wait": True}, client_timeout=0.3)
            assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        client.infer("words", [text()], headers=WORDS, client_timeout=30.0)
        with pytest.raises(InferenceServerException, match=r"no answer within 0.3 s"):
            client.infer("words", [text()], headers=WORDS, parameters={"wait": True}, timeout=300_000)


def test_sessions_spread_over_replicas_and_each_stays_on_its_own_over_both_protocols(cluster: Cluster) -> None:
    request = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["?"]}]}
    url = f"{cluster.http}/words/v2/models/words/infer"
    homes: dict[str, int] = {}
    with triton.InferenceServerClient(cluster.grpc) as client:

        def process(session: str) -> int:
            answer = client.infer("words", [text()], headers=WORDS | {"x-session-id": session})
            return int(answer.as_numpy("process")[0])

        while len(set(homes.values())) < 2 or len(homes) < 8:
            session = f"session-{len(homes)}"
            homes[session] = process(session)
        for session, home in homes.items():
            (over_http,) = httpx.post(url, json=request, headers={"x-session-id": session}).json()["outputs"]
            assert {process(session), *over_http["data"]} == {home}


def test_a_stream_answers_each_request(cluster: Cluster) -> None:
    _, _, images, labels = digits.split()
    got: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(cluster.grpc) as client:
        client.start_stream(lambda result, error: got.put(error or result), headers=DIGITS)
        for row in range(10):
            client.async_stream_infer("digits", [pixels(images[row : row + 1])], request_id=str(row))
        client.async_stream_infer("other", [pixels(images[:1])])
        client.async_stream_infer("digits", [pixels(images[10:20])])
        answers = [got.get(timeout=30.0) for _ in range(12)]
        client.stop_stream()
    assert [answer.get_response().id for answer in answers[:10]] == [str(row) for row in range(10)]
    assert "unknown model 'other'" in str(answers[10])
    read = [int(answer.as_numpy("digit")[0]) for answer in answers[:10]] + answers[11].as_numpy("digit").tolist()
    assert float((np.array(read) == labels[:20]).mean()) >= 0.9


def test_a_model_that_generates_streams_its_items(cluster: Cluster) -> None:
    got: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(cluster.grpc) as client:
        client.start_stream(lambda result, error: got.put(error or result), headers=WORDS)
        client.async_stream_infer("words", [text("a few words", "text_input")], enable_empty_final_response=True)
        answers = [got.get(timeout=30.0) for _ in range(4)]
        client.stop_stream()
    assert [answer.as_numpy("text_output").tolist() for answer in answers[:3]] == [[b"a"], [b"few"], [b"words"]]
    assert [answer.as_numpy("number").tolist() for answer in answers[:3]] == [[0], [1], [2]]
    assert answers[3].get_response().parameters["triton_final_response"].bool_param


def test_a_model_that_generates_streams_to_the_asynchronous_client(cluster: Cluster) -> None:
    async def talk() -> list[Any]:
        async def sent() -> AsyncIterator[dict[str, Any]]:
            for words in ("one two", "three"):
                yield {"model_name": "words", "inputs": [text(words, "text_input")]}

        async with triton_aio.InferenceServerClient(cluster.grpc) as client:
            answers = client.stream_infer(sent(), headers=WORDS)
            return [result.as_numpy("text_output")[0] async for result, _ in answers]

    assert asyncio.run(talk()) == [b"one", b"two", b"three"]


def test_what_is_not_offered_is_unimplemented(cluster: Cluster) -> None:
    with (
        triton.InferenceServerClient(cluster.grpc) as client,
        pytest.raises(InferenceServerException) as caught,
    ):
        client.load_model("digits", headers=DIGITS)
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


def test_a_newcomer_gets_copies_of_rpcs_then_answers_them(cluster: Cluster) -> None:
    def status() -> dict[str, Any]:
        deployments = ray.get(coordinator.status.remote())["deployments"]
        return next((found for found in deployments if found["deployment"] == "words/words"), {})

    def states() -> list[str]:
        return sorted(replica["state"] for replica in status().get("replicas", ()))

    start_control_plane(page_port=0)
    coordinator = running_coordinator()

    async def ten(at_a_time: int) -> set[int]:
        """Which processes answer ten requests."""
        free = asyncio.Semaphore(at_a_time)
        async with triton_aio.InferenceServerClient(cluster.grpc) as client:

            async def one() -> int:
                async with free:
                    return int((await client.infer("words", [text()], headers=WORDS)).as_numpy("process")[0])

            return set(await asyncio.gather(*(one() for _ in range(10))))

    def ask(at_a_time: int = 1) -> set[int]:
        return asyncio.run(ten(at_a_time))

    def check(until_s: float) -> None:
        assert time.monotonic() < until_s, (states(), status())

    settled_s, before = time.monotonic() + 17.0, set[int]()  # replicas of a first start enter untried for 15 s
    while states() != ["active"] * 2 or time.monotonic() < settled_s:
        check(settled_s + 40.0)
        before |= ask()
    cluster.config["applications"][1]["deployments"] = [{"name": "words", "num_replicas": 3}]
    cluster.deploy()
    until_s, while_tried, after = time.monotonic() + 90.0, set[int](), set[int]()
    while states() != ["active"] * 3:
        check(until_s)
        answered = ask()
        if "shadowing" in states():  # still: the coordinator is the first to know of a change
            while_tried |= answered
    while len(after) < 3:  # at a time: where nobody is busy, the fastest may answer all
        check(until_s)
        after |= ask(at_a_time=10)
    assert status()["mirrored"] >= 20
    assert len(before) == 2
    assert while_tried == before, "no answer of a newcomer on trial reaches a client"
    assert len(after) == 3
