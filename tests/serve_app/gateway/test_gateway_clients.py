"""Unmodified clients of Triton's, and what they and others put on the wire, against a real server."""

from __future__ import annotations

import asyncio
import bz2
import gzip
import json
import socket
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio

from serve_app.gateway.ingress import InferenceApi
from serve_app.gateway.model_server import ModelInfo
from serve_app.gateway.oip import HEADER_LENGTH
from tests.serve_app.gateway.gateway_fakes import FakeHandle, make_api
from tests.serve_app.gateway.local_server import SAMPLE, Everything, everything, served


def gzipped(data: bytes) -> bytes:
    """Without a time in it: the names of tests are to be the same in every process."""
    return gzip.compress(data, mtime=0)


MODEL = "everything"
API, BEHIND = everything()
INFER = f"/v2/models/{MODEL}/infer"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(API) as found:
        yield found


@pytest.fixture
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address, concurrency=4) as found:
        yield found


def inputs(kind: Any = triton, *, binary: bool = True) -> list[Any]:
    made = []
    for spec in Everything.inputs:
        array = SAMPLE[spec.name]
        if spec.name == "words" and not binary:
            array = np.array([b"a", b"b", "grün".encode()], object)
        if spec.datatype == "BF16":
            array = array.astype(ml_dtypes.bfloat16)
        tensor = kind.InferInput(spec.name, list(array.shape), spec.datatype)
        tensor.set_data_from_numpy(array, binary_data=binary or spec.datatype in ("FP16", "BF16"))
        made.append(tensor)
    return made


def outputs(kind: Any = triton, *, binary: bool = True) -> list[Any]:
    return [
        kind.InferRequestedOutput(spec.name, binary_data=binary or spec.name == "words") for spec in Everything.outputs
    ]


def check(result: Any) -> None:
    for spec in Everything.outputs:
        found = result.as_numpy(spec.name)
        assert found.tolist() == SAMPLE[spec.name].tolist(), spec.name


# ---------------------------------------------------------------- tritonclient


def test_health_metadata_configuration_index_and_statistics_by_tritons_client(
    client: triton.InferenceServerClient,
) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "1")
    assert not client.is_model_ready("other")
    assert {"statistics", "model_configuration", "model_repository"} <= set(client.get_server_metadata()["extensions"])
    assert [each["datatype"] for each in client.get_model_metadata(MODEL)["inputs"]][2] == "BF16"
    config = client.get_model_config(MODEL, "1")
    assert (config["name"], config["max_batch_size"]) == (MODEL, 0)
    assert [each["data_type"] for each in config["input"]] == [
        "TYPE_STRING", "TYPE_FP16", "TYPE_BF16", "TYPE_BOOL", "TYPE_FP32",
    ]  # fmt: skip
    assert config["output"][4]["dims"] == [-1, 3]
    ready = {"name": MODEL, "version": "1", "state": "READY", "reason": ""}
    assert client.get_model_repository_index() == [ready]
    before = client.get_inference_statistics(MODEL)["model_stats"][0]
    check(client.infer(MODEL, inputs()))
    with pytest.raises(triton.InferenceServerException):
        client.infer(MODEL, inputs()[:1])
    (after,) = client.get_inference_statistics()["model_stats"]
    assert after["inference_count"] == after["execution_count"] == before["inference_count"] + 1
    assert after["inference_stats"]["queue"]["count"] == before["inference_stats"]["queue"]["count"] + 1
    for name, more in {"success": 1, "fail": 1, "compute_infer": 1, "cache_hit": 0}.items():
        stat, was = after["inference_stats"][name], before["inference_stats"][name]
        assert stat["count"] == was["count"] + more
        assert (stat["ns"] > was["ns"]) == (more > 0)
    assert client.get_inference_statistics(MODEL, "1")["model_stats"][0]["last_inference"] >= before["last_inference"]
    with pytest.raises(triton.InferenceServerException, match="unknown model"):
        client.get_inference_statistics("other")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("up", [None, "gzip", "deflate"])
@pytest.mark.parametrize("down", [None, "gzip", "deflate"])
def test_every_tensor_comes_back_in_every_coding(
    client: triton.InferenceServerClient, *, binary: bool, up: str | None, down: str | None
) -> None:
    result = client.infer(
        MODEL,
        inputs(),
        outputs=outputs(binary=binary),
        request_id="q1",
        request_compression_algorithm=up,
        response_compression_algorithm=down,
        headers={"x-session-id": "s"},
    )
    assert result.get_response()["id"] == "q1"
    if binary:
        check(result)
    else:
        found = {each["name"]: each.get("data") for each in result.get_response()["outputs"]}
        assert found["brain"] == [1.0, -2.5]
        assert found["flag"] == [True, False]


def test_an_answer_is_compressed_for_who_asks_for_one_compression(address: str) -> None:
    body = {"inputs": [entry(name) for name in SAMPLE], "outputs": [{"name": "scores"}]}
    for asked, coding in (("gzip", "gzip"), ("deflate", "deflate"), ("gzip, deflate, br", None), ("br", None)):
        answer = httpx.post(f"http://{address}{INFER}", json=body, headers={"accept-encoding": asked})
        assert answer.headers.get("content-encoding") == coding
        assert answer.json()["outputs"][0]["name"] == "scores"


def test_parameters_of_sequences_priorities_and_timeouts_reach_the_model(client: triton.InferenceServerClient) -> None:
    options = {"sequence_id": 42, "sequence_start": True, "priority": 2, "timeout": 5_000_000}
    check(client.infer(MODEL, inputs(), parameters={"own": "x"}, **options))
    assert BEHIND.parameters == {
        "sequence_id": 42, "sequence_start": True, "sequence_end": False, "priority": 2, "timeout": 5_000_000,
        "own": "x", "binary_data_output": True,
    }  # fmt: skip


def test_a_sequence_stays_on_its_replica_unless_a_header_says_otherwise() -> None:
    handle = FakeHandle({"y": np.zeros(1)})
    api = make_api(handle, info=ModelInfo(name="m"), session_cookie="c")
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}], "parameters": {"sequence_id": 7}}
    with served(api) as address, httpx.Client(base_url=f"http://{address}") as http:
        first = http.post("/v2/models/m/infer", json=body)
        assert "set-cookie" not in first.headers
        http.post("/v2/models/m/infer", json=body, headers={"x-session-id": "mine"})
        for name in ("seven", "sieben für Ü", "\ud83d", None):
            http.post("/v2/models/m/infer", content=json.dumps(body | {"parameters": {"sequence_id": name}}))
        refused = http.post("/v2/models/m/infer", json=body | {"parameters": {"sequence_id": [1]}})
    assert [options.get("session_id") for options, _ in handle.calls][:-1] == [
        "7", "mine", "seven", "sieben%20f%C3%BCr%20%C3%9C", "%5Cud83d",
    ]  # fmt: skip
    assert refused.status_code == 400


@pytest.mark.parametrize("binary", [True, False])
def test_classes_are_the_highest_values_of_each_row(client: triton.InferenceServerClient, *, binary: bool) -> None:
    wanted = triton.InferRequestedOutput("scores", binary_data=binary, class_count=2)
    half = triton.InferRequestedOutput("half", binary_data=binary, class_count=5)
    result = client.infer(MODEL, inputs(), outputs=[wanted, half])
    texts = [[bytes(t) if binary else t.encode() for t in row] for row in result.as_numpy("scores").tolist()]
    assert texts == [[b"0.700000:1", b"0.200000:2"], [b"3.000000:0", b"2.000000:2"]]
    assert result.as_numpy("half").shape == (2,)
    with pytest.raises(triton.InferenceServerException, match="holds no numbers"):
        client.infer(MODEL, inputs(), outputs=[triton.InferRequestedOutput("words", class_count=1)])


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            lambda c: c.get_system_shared_memory_status(),
            "shared memory is an extension that this server does not",
        ),
        (lambda c: c.register_system_shared_memory("r", "/k", 8), "shared memory is an extension"),
        (lambda c: c.unregister_system_shared_memory(), "shared memory is an extension"),
        (lambda c: c.get_cuda_shared_memory_status(), "CUDA shared memory"),
        (lambda c: c.register_cuda_shared_memory("r", b"handle", 0, 8), "CUDA shared memory"),
        (lambda c: c.get_trace_settings(), "tracing"),
        (lambda c: c.update_trace_settings(MODEL, {"trace_level": ["OFF"]}), "tracing"),
        (lambda c: c.get_log_settings(), "log settings"),
        (lambda c: c.update_log_settings({"log_info": True}), "log settings"),
        (lambda c: c.load_model(MODEL), "models come and go with their Serve application"),
        (lambda c: c.unload_model(MODEL), "models come and go with their Serve application"),
        (lambda c: c.load_model("other"), "unknown model"),
    ],
)
def test_what_is_not_offered_says_so_to_tritons_client(
    client: triton.InferenceServerClient, call: Callable[[Any], Any], reason: str
) -> None:
    with pytest.raises(triton.InferenceServerException, match=reason) as caught:
        call(client)
    assert caught.value.status() in ("400", "403", "404")
    announced = client.get_server_metadata()["extensions"]
    assert not {"system_shared_memory", "cuda_shared_memory", "trace", "logging", "sequence"} & set(announced)


def test_tritons_asynchronous_client_works(address: str) -> None:
    async def run() -> None:
        async with triton_aio.InferenceServerClient(address) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready(MODEL)
            assert (await client.get_model_metadata(MODEL))["name"] == MODEL
            assert (await client.get_model_config(MODEL))["name"] == MODEL
            assert (await client.get_inference_statistics(MODEL))["model_stats"][0]["name"] == MODEL
            assert (await client.get_model_repository_index())[0]["state"] == "READY"
            for up, down in ((None, None), ("gzip", "deflate"), ("deflate", "gzip")):
                result = await client.infer(
                    MODEL,
                    inputs(triton_aio),
                    outputs=outputs(triton_aio),
                    request_compression_algorithm=up,
                    response_compression_algorithm=down,
                )
                check(result)
            with pytest.raises(triton.InferenceServerException, match="shared memory"):
                await client.get_system_shared_memory_status()

    asyncio.run(run())


# ---------------------------------------------------------------- statistics


def test_streams_count_as_inferences_when_they_end_well_and_as_failures_when_not() -> None:
    async def good(*_: Any) -> Any:
        yield "a"

    async def bad(*_: Any) -> Any:
        yield "a"
        raise ValueError

    def counts(api: InferenceApi) -> tuple[int, int]:
        stats = api.statistics.describe(api.info)["model_stats"][0]["inference_stats"]
        return stats["success"]["count"], stats["fail"]["count"]

    for settings in ({}, {"stream_keepalive_s": 5.0}):
        for produce, wanted in ((good, (1, 0)), (bad, (0, 1))):
            api = make_api(FakeHandle(produce), info=ModelInfo(name="m", generates=True), **settings)
            with served(api) as address:
                assert httpx.post(f"http://{address}/v2/models/m/generate_stream", json={}).status_code == 200
                while counts(api) == (0, 0):  # the stream's end is counted after the client has seen it
                    httpx.get(f"http://{address}/v2/health/live")
            assert counts(api) == wanted


def test_a_model_without_a_replica_is_unavailable_in_the_index() -> None:
    async def not_ready() -> bool:
        return False

    api = make_api(FakeHandle(None), info=ModelInfo(name="m"), ready=not_ready)
    with served(api) as address, httpx.Client(base_url=f"http://{address}") as http:
        (entry,) = http.post("/v2/repository/index", content=b"").json()
        assert (entry["state"], entry["reason"]) == ("UNAVAILABLE", "no replica of the model is running yet")
        assert http.post("/v2/repository/index", json={"ready": True}).json() == []
        assert http.post("/v2/repository/index", json={"ready": None}).json() == [entry]
        assert http.post("/v2/repository/index", json={"ready": 1}).status_code == 400


# ---------------------------------------------------------------- on the wire


def entry(name: str) -> dict[str, Any]:
    array, spec = SAMPLE[name], next(spec for spec in Everything.inputs if spec.name == name)
    data = ["a", "b", "c"] if name == "words" else array.tolist()
    return {"name": name, "datatype": spec.datatype, "shape": list(array.shape), "data": data}


VALID = json.dumps({"inputs": [entry(name) for name in SAMPLE]}).encode()
HALF = len(VALID) // 2


def bare_deflate(raw: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(raw) + stream.flush()


@pytest.mark.parametrize(
    ("coding", "body", "status"),
    [
        ("GZIP", gzipped(VALID), 200),
        ("x-gzip", gzipped(VALID), 200),
        ("gzip", gzipped(VALID[:HALF]) + gzipped(VALID[HALF:]), 200),
        ("gzip", gzipped(VALID) + gzipped(b""), 200),
        ("gzip", gzipped(VALID) + bytes(512), 200),
        ("gzip", gzipped(VALID[:HALF]) + bytes(3) + gzipped(VALID[HALF:]) + bytes(3), 200),
        ("gzip", gzipped(VALID) + bytes(3) + b"more", 400),
        ("gzip", bytes(3) + gzipped(VALID), 400),
        ("gzip", gzipped(VALID) + b"more", 400),
        ("gzip", gzipped(b"") * 2000, 400),
        ("gzip", b"", 400),
        ("gzip", VALID, 400),
        ("gzip", gzipped(VALID)[:-4], 400),
        ("Deflate", zlib.compress(VALID), 200),
        ("deflate", bare_deflate(VALID), 200),
        ("deflate", bare_deflate(VALID)[:-4], 400),
        ("deflate", zlib.compress(VALID) + bytes(3), 400),
        ("identity", VALID, 200),
        ("", VALID, 200),
        ("identity, gzip", gzipped(VALID), 200),
        ("deflate, gzip", gzipped(zlib.compress(VALID)), 200),
        ("gzip, gzip, gzip, gzip", VALID, 415),
        ("bzip2", bz2.compress(VALID), 415),
        ("gzip", gzipped(b" " * 20_000_000), 413),
        ("gzip, gzip", gzipped(gzipped(b" " * 20_000_000)), 413),
        ("gzip", gzipped(b" " * 10_000_000) * 3, 413),
    ],
)
def test_compressed_bodies_in_every_legal_form_are_read_and_others_refused(
    address: str, coding: str, body: bytes, status: int
) -> None:
    headers = {"content-type": "application/json", "content-encoding": coding}
    answer = httpx.post(f"http://{address}{INFER}", content=body, headers=headers)
    assert answer.status_code == status, answer.text[:200]
    assert API.bodies.held_bytes == 0


@pytest.mark.parametrize(
    ("media", "status"),
    [
        ("application/json;charset=utf-8", 200),
        ('application/json; charset="UTF-8"; boundary=x; ;', 200),
        ("application/json;", 200),
        ("APPLICATION/JSON; Charset=UTF-8", 200),
        ("application/octet-stream; q=1", 200),
        (";", 200),
        ("application/jsonx", 415),
        ("text/json", 415),
        ("application/json, text/plain", 415),
    ],
)
def test_content_types_may_have_parameters(address: str, media: str, status: int) -> None:
    answer = httpx.post(f"http://{address}{INFER}", content=VALID, headers={"content-type": media})
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize(
    ("length", "status"),
    [
        (str(len(VALID)), 200),
        (f"000{len(VALID)}", 200),
        (str(len(VALID) - 1), 400),
        (str(len(VALID) + 1), 400),
        ("0", 400),
        ("-1", 400),
        ("+1", 400),
        ("1e3", 400),
        ("", 400),
        ("9" * 400, 400),
        (f"{len(VALID)}, {len(VALID)}", 400),
    ],
)
def test_the_length_of_the_json_part_is_checked_at_its_edges(address: str, length: str, status: int) -> None:
    answer = httpx.post(f"http://{address}{INFER}", content=VALID, headers={HEADER_LENGTH: length})
    assert answer.status_code == status, answer.text


def raw(address: str, request: bytes) -> tuple[int, bytes]:
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port)), timeout=10.0) as sock:
        sock.sendall(request)
        answer = b""
        while part := sock.recv(65536):
            answer += part
    return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]


def post_bytes(path: str, body: bytes, *headers: bytes) -> bytes:
    lines = [b"POST " + path.encode() + b" HTTP/1.1", b"Host: x", b"Connection: close", *headers]
    if not any(each.lower().startswith((b"content-length", b"transfer")) for each in headers):
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, b"", body])


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post_bytes(INFER, VALID, b"Content-Type: application/json", b"Content-Type: text/plain"), 200),
        (post_bytes(INFER, VALID, b"Content-Encoding: gzip", b"Content-Encoding: gzip"), 400),
        (
            post_bytes(INFER, gzipped(zlib.compress(VALID)), b"Content-Encoding: deflate", b"content-encoding:gzip"),
            200,
        ),
        (post_bytes(INFER, VALID, b"X-Session-Id: a", b"X-Session-Id: b"), 200),
        (post_bytes(INFER, VALID, b"Content-Length: %d" % len(VALID), b"Content-Length: 3"), 400),
        (post_bytes(INFER, gzipped(VALID), b"Content-Encoding: gzip", b"Content-Length: 5"), 400),
        (post_bytes("/v2/models/%65verything/infer", VALID), 200),
        (post_bytes("/v2/models/everything/versions/%31/infer", VALID), 200),
        (post_bytes("/v2/models/everything%2Finfer", VALID), 200),
        (post_bytes("/v2/models/every%00thing/infer", VALID), 404),
        (post_bytes("/v2/models/everything/infer/", VALID), 404),
        (post_bytes("//v2/models/everything/infer", VALID), 404),
        (post_bytes("/v2/models/everything/infer?x=1", VALID), 200),
        (post_bytes("/v1/models/everything:predict", b"{}"), 404),
    ],
)
def test_odd_but_legal_requests_are_answered(address: str, request_: bytes, status: int) -> None:
    found, body = raw(address, request_)
    assert found == status, body
    if status != 200 and body.startswith(b"{"):
        assert json.loads(body)["error"]


def test_version_1_of_the_protocol_is_refused_with_the_way_to_version_2(address: str) -> None:
    answer = httpx.post(f"http://{address}/v1/models/everything:predict", json={"instances": [1]})
    assert "POST /v2/models/everything/infer" in answer.json()["error"]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("flag", [1, 0], "data holds whole numbers, but BOOL takes true or false"),
        ("half", [0.5, 65536], "a number does not fit into FP16"),
        ("brain", [1.0, 3.4e38], "a number does not fit into BF16"),
        ("brain", ["a", "b"], "data holds strings, but BF16 takes numbers"),
        ("scores", [[1, 2, True], [1, 2, 3]], "data holds booleans"),
        ("words", [1, 2, 3], "data holds whole numbers, but BYTES takes strings"),
    ],
)
def test_json_of_another_kind_than_the_tensor_is_refused(address: str, name: str, data: Any, reason: str) -> None:
    body = {"inputs": [entry(each) | ({"data": data} if each == name else {}) for each in SAMPLE]}
    answer = httpx.post(f"http://{address}{INFER}", json=body)
    assert (answer.status_code, reason in answer.json()["error"]) == (400, True), answer.text


def test_probes_that_arrive_together_are_all_answered(address: str) -> None:
    paths = ["/v2/health/live", "/v2/health/ready", f"/v2/models/{MODEL}/ready", "/v2"] * 25

    def get(path: str) -> int:
        return httpx.get(f"http://{address}{path}").status_code

    with ThreadPoolExecutor(20) as pool:
        assert set(pool.map(get, paths)) == {200}


# What the documentation of Triton's generate extension sends with curl: a form, unless curl is told otherwise.
CURL = {"content-type": "application/x-www-form-urlencoded"}
DOCUMENTED = '{"id": "42", "text_input": "client input", "parameters": {"stream": false, "temperature": 0}}'


def test_the_documented_generate_requests_are_answered(address: str) -> None:
    url = f"http://{address}/v2/models/{MODEL}/generate"
    answer = httpx.post(url, content=DOCUMENTED, headers=CURL).json()
    assert answer == {"id": "42", "model_name": MODEL, "model_version": "1", "text_output": "client input "}
    stream = httpx.post(f"{url}_stream", content=DOCUMENTED, headers=CURL)
    assert [line[:6] for line in stream.text.splitlines() if line] == ["data: "] * 2
