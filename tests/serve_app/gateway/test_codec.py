"""Large requests and answers are read and written by processes: right, off the loop, whatever becomes of a process."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest

from serve_app.gateway.codec import OFF_LOOP_BYTES
from serve_app.gateway.ingress import InferenceApi
from serve_app.gateway.model_server import ModelInfo, ModelServer
from serve_app.gateway.oip import HEADER_LENGTH, decode_request, encode_response
from serve_app.gateway.tensors import PackedBytes, RawJson, TensorSpec
from tests.serve_app.gateway.gateway_fakes import FakeHandle, client, make_api

MANY = 30_000
INFER = "/v2/models/echo/infer"
ECHO = ModelInfo(name="echo", generates=True)
JSON = {"content-type": "application/json"}


def request(datatype: str, data: list[Any], shape: list[int] | None = None, **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": datatype, "shape": shape or [len(data)], "data": data}], **more}


class EchoServer(ModelServer):
    """Stands where a replica does: what goes in comes out, through the code that unpacks and packs."""

    def __init__(self) -> None:
        super().__init__(f"{__name__}:Echo")


class Echo:
    def infer(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs

    def generate(self, request: dict[str, Any]) -> Iterator[Any]:
        yield {"text_output": "", "keys": list(request), "length": len(request["text_input"])}


def echo_handle() -> FakeHandle:
    server = EchoServer()

    def answer(*args: Any) -> Any:
        return server.generate(*args) if len(args) == 1 else server.infer(*args)

    return FakeHandle(answer)


def echo_api(**settings: Any) -> InferenceApi:
    return make_api(echo_handle(), info=ECHO, **settings)


@pytest.fixture(scope="module")
def api() -> InferenceApi:
    return echo_api()


async def ask(api: InferenceApi, path: str = INFER, **arguments: Any) -> Any:
    async with client(api) as http:
        return await http.post(path, timeout=60.0, **arguments)


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("FP32", [0.5, -1.25] * MANY),
        ("FP64", [0.1, 1e300] * MANY),
        ("FP16", [0.5, 2.0] * MANY),
        ("INT64", [2**53 + 1, -5] * MANY),
        ("UINT8", [0, 255] * MANY),
        ("BOOL", [True, False] * MANY),
        ("BYTES", ["", "grün", "\u0000", "x" * 40] * MANY),
    ],
)
def test_large_tensors_go_to_a_process_and_come_back_as_they_were(
    api: InferenceApi, datatype: str, data: list[Any]
) -> None:
    answer = asyncio.run(ask(api, json=request(datatype, data, id="q")))
    assert answer.status_code == 200, answer.text[:300]
    (output,) = answer.json()["outputs"]
    assert output == {"name": "x", "datatype": datatype, "shape": [len(data)], "data": data}
    assert answer.json()["id"] == "q"


def test_large_binary_strings_come_back_to_the_byte(api: InferenceApi) -> None:
    items = [b"\xff\x00" * (i % 5) for i in range(MANY)]
    array = np.empty(MANY, object)
    array[:] = items
    raw = PackedBytes.of(array).raw
    entry = {"name": "x", "datatype": "BYTES", "shape": [MANY], "parameters": {"binary_data_size": len(raw)}}
    header = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    answer = asyncio.run(ask(api, content=header + raw, headers={HEADER_LENGTH: str(len(header))}))
    assert answer.status_code == 200, answer.text[:300]
    assert answer.content[int(answer.headers[HEADER_LENGTH]) :] == raw


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"inputs": [' + b"[" * 40_000, "nested too deeply"),
        (b'{"a": ' + b" " * OFF_LOOP_BYTES, "the body is not JSON"),
        (b"\xff" * OFF_LOOP_BYTES, "not UTF-8 at byte 0"),
        (json.dumps(request("FP32", [1.0] * MANY, shape=[3])).encode(), f"{MANY} elements, but shape [3] needs 3"),
        (json.dumps(request("FP32", [1.0] * MANY + ["a"])).encode(), "data holds strings, but FP32 takes numbers"),
        (json.dumps(request("BYTES", ["\ud800"] * MANY)).encode(), "half of a surrogate pair"),
    ],
)
def test_large_requests_are_refused_with_the_reason_that_small_ones_get(
    api: InferenceApi, body: bytes, reason: str
) -> None:
    answer = asyncio.run(ask(api, content=body, headers=JSON))
    assert answer.status_code == 400
    assert reason in answer.json()["error"]


def test_a_large_generate_request_reaches_the_model_whole(api: InferenceApi) -> None:
    parameters = {"timeout": 5_000_000, "sequence_id": 7, "top": [1]}
    body = {"text_input": "word " * MANY, "id": "g", "extra": 1, "parameters": parameters}
    handle = echo_handle()
    answer = asyncio.run(ask(make_api(handle, info=ECHO), "/v2/models/echo/generate", json=body)).json()
    assert (answer["length"], answer["keys"], answer["id"]) == (5 * MANY, list(body), "g")
    assert handle.calls[0][0]["session_id"] == "7"
    wrong = asyncio.run(ask(api, "/v2/models/echo/generate", json=body | {"parameters": {"timeout": "soon"}}))
    assert wrong.status_code == 400
    assert RawJson(b"\xef\xbb\xbf{}").load() == {}


def worker_processes() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "serve_app.gateway.codec" in each.cmdline()]


def test_a_process_that_was_killed_is_replaced_and_the_request_answered() -> None:
    api = echo_api()
    before = {each.pid for each in worker_processes()}

    async def run() -> None:
        body = json.dumps(request("FP32", [1.0] * MANY)).encode()
        assert (await ask(api, content=body, headers=JSON)).status_code == 200
        started = [each for each in worker_processes() if each.pid not in before]
        assert started
        for each in started:
            each.kill()
            psutil.wait_procs([each], timeout=10.0)
        assert (await ask(api, content=body, headers=JSON)).status_code == 200

    asyncio.run(run())


def test_small_requests_and_binary_tensors_start_no_process() -> None:
    api = make_api(FakeHandle({"x": np.zeros(10, np.float32)}), info=ECHO)
    before = {each.pid for each in worker_processes()}
    small = json.dumps(request("FP32", [1.0] * 1000)).encode()
    entry = {"name": "x", "datatype": "FP32", "shape": [MANY], "parameters": {"binary_data_size": 4 * MANY}}
    header = json.dumps({"inputs": [entry]}).encode()
    raw = header + np.zeros(MANY, np.float32).tobytes()
    assert len(small) < OFF_LOOP_BYTES < len(raw)
    assert asyncio.run(ask(api, content=small, headers=JSON)).status_code == 200
    assert asyncio.run(ask(api, content=raw, headers={HEADER_LENGTH: str(len(header))})).status_code == 200
    assert {each.pid for each in worker_processes()} <= before


def test_twelve_mebibytes_of_json_take_this_process_a_fraction_of_what_they_take_inline() -> None:
    """Processor time of all threads, for what a thread does here keeps the loop from running as well."""
    numbers = np.random.default_rng(0).random(600_000).round(4).tolist() * 2
    body = json.dumps(request("FP64", numbers)).encode()
    outputs = {"x": np.array(numbers, np.float32)}
    api = make_api(FakeHandle(outputs), info=ECHO)

    async def away() -> float:
        await ask(api, content=json.dumps(request("FP32", [1.0] * MANY)).encode(), headers=JSON)  # starts the process
        begun_s = time.process_time()
        assert (await ask(api, content=body, headers=JSON)).status_code == 200
        return time.process_time() - begun_s

    begun_s = time.process_time()
    encode_response(decode_request(body), outputs, "echo", "1")
    inline_s = time.process_time() - begun_s
    assert asyncio.run(away()) < inline_s / 2


def test_a_large_request_for_which_no_process_is_free_in_time_is_a_503() -> None:
    api = echo_api(request_timeout_s=0.001)
    answer = asyncio.run(ask(api, content=json.dumps(request("FP32", [1.0] * MANY * 4)).encode(), headers=JSON))
    assert answer.status_code == 503
    assert "no process was free" in answer.json()["error"]


def test_the_spec_of_the_model_is_checked_in_the_process_too() -> None:
    info = ModelInfo(name="echo", inputs=(TensorSpec("x", "FP32", (-1,)),))
    api = make_api(echo_handle(), info=info)
    answer = asyncio.run(ask(api, json=request("INT32", [1] * MANY)))
    assert (answer.status_code, answer.json()["error"]) == (400, "input 'x': datatype is INT32, the model takes FP32")
