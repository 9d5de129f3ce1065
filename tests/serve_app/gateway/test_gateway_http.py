"""The gateway's HTTP: routes, statuses, limits, sessions, streams; in process, the model's handle a plain object.

Every answer that is not 2xx is JSON `{"error": reason}`.
"""

from __future__ import annotations

import asyncio
import codecs
import gzip
import json
import threading
import time
import zlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from ray import serve
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.schema import ApplicationStatus

from serve_app.gateway.http_app import make_app
from serve_app.gateway.ingress import InferenceApi
from serve_app.gateway.model_server import ModelInfo, Refusal
from serve_app.gateway.oip import HEADER_LENGTH
from serve_app.gateway.readiness import Readiness
from tests.serve_app.gateway.gateway_fakes import INFO, FakeHandle, client, make_api


def gzipped(data: bytes) -> bytes:
    """Without a time in it: the names of tests are to be the same in every process."""
    return gzip.compress(data, mtime=0)


REQUEST = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
JSON = {"content-type": "application/json"}
INFER = "/v2/models/digits/infer"
STREAM = "/v2/models/digits/generate_stream"
DIGIT = {"digit": np.array([7])}


def send(api: InferenceApi, method: str, path: str, **request: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client(api) as http:
            return await http.request(method, path, **request)

    return asyncio.run(run())


def post(path: str = INFER, handle: FakeHandle | None = None, **request: Any) -> httpx.Response:
    if not {"json", "content"} & set(request):
        request["json"] = REQUEST
    settings = request.pop("settings", {})
    return send(make_api(handle or FakeHandle(DIGIT), **settings), "POST", path, **request)


def reason(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    return str(response.json()["error"])


# ---------------------------------------------------------------- health and metadata


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/digits/ready", {"name": "digits", "ready": True}),
        ("/v2/models/digits/versions/1/ready", {"name": "digits", "ready": True}),
        ("/v2/models/digits", INFO.describe()),
        ("/v2/models/digits/versions/1", INFO.describe()),
    ],
)
def test_health_and_metadata_answer(path: str, answer: dict[str, Any]) -> None:
    response = send(make_api(FakeHandle(DIGIT)), "GET", path)
    assert (response.status_code, response.json()) == (200, answer)
    assert send(make_api(FakeHandle(DIGIT)), "HEAD", path).status_code == 200, "as balancers ask"


ORIGIN = {"origin": "https://app.example.org"}
PREFLIGHT = ORIGIN | {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}


def test_pages_of_allowed_origins_may_call_and_nobody_else_by_default() -> None:
    api = make_api(FakeHandle(DIGIT), allow_origins=("https://app.example.org",))
    asked = send(api, "OPTIONS", INFER, headers=PREFLIGHT)
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, ORIGIN["origin"])
    answer = send(api, "POST", INFER, json=REQUEST, headers=ORIGIN)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, ORIGIN["origin"])
    assert HEADER_LENGTH.lower() in answer.headers["access-control-expose-headers"].lower()
    refused = send(api, "POST", "/v2/models/other/infer", json=REQUEST, headers=ORIGIN)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (404, ORIGIN["origin"])
    other = send(api, "OPTIONS", INFER, headers=PREFLIGHT | {"origin": "https://elsewhere.org"})
    assert "access-control-allow-origin" not in other.headers
    default = make_api(FakeHandle(DIGIT))
    assert send(default, "OPTIONS", INFER, headers=PREFLIGHT).status_code == 405
    assert "access-control-allow-origin" not in send(default, "POST", INFER, json=REQUEST, headers=ORIGIN).headers


def test_the_server_names_its_extensions() -> None:
    answer = send(make_api(FakeHandle(DIGIT)), "GET", "/v2").json()
    assert answer["name"] == "shadecast"
    assert "binary_tensor_data" in answer["extensions"]


def test_without_a_running_replica_the_server_is_live_but_not_ready() -> None:
    async def not_ready() -> bool:
        return False

    api = make_api(FakeHandle(DIGIT), ready=not_ready)
    assert send(api, "GET", "/v2/health/live").status_code == 200
    assert "no replica" in reason(send(api, "GET", "/v2/health/ready"), 503)
    assert "no replica" in reason(send(api, "GET", "/v2/models/digits/ready"), 503)


@pytest.mark.parametrize(
    ("to_zero", "status", "states", "ready", "may_start"),
    [
        (True, "RUNNING", {}, True, True),
        (True, "RUNNING", {"STARTING": 1}, True, True),
        (True, "RUNNING", {"RUNNING": 1, "STARTING": 1}, True, False),
        (True, "DEPLOYING", {"STARTING": 1}, False, False),
        (True, "UNHEALTHY", {}, False, False),
        (False, "RUNNING", {"STARTING": 1}, False, False),
        (False, "RUNNING", {"RUNNING": 1}, True, False),
    ],
)
def test_a_model_that_scales_to_zero_is_ready_without_a_replica(
    monkeypatch: pytest.MonkeyPatch, to_zero: bool, status: str, states: dict[str, int], ready: bool, may_start: bool
) -> None:
    deployment = SimpleNamespace(replica_states=states)
    app = SimpleNamespace(status=ApplicationStatus(status), deployments={"model": deployment})
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={"app": app}))

    async def ask() -> tuple[bool, bool]:
        readiness = Readiness("app", "model", scales_to_zero=to_zero)
        return await readiness(), await readiness.may_start()

    assert asyncio.run(ask()) == (ready, may_start)


def test_readiness_asks_at_most_once_a_second_and_outlives_a_silent_controller() -> None:
    class Controlled(Readiness):
        asked = 0
        answer: bool | Exception = True

        def _ask(self) -> bool:
            self.asked += 1
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    now_s = [0.0]
    readiness = Controlled("app", "model", lambda: now_s[0])

    async def run() -> None:
        assert await readiness()
        readiness.answer = False
        assert await readiness()  # still known
        assert readiness.asked == 1
        now_s[0] = 1.0
        assert not await readiness()
        readiness.answer, now_s[0] = True, 2.0
        assert await readiness()
        readiness.answer, now_s[0] = RuntimeError("controller"), 3.0
        assert await readiness()
        assert readiness.asked == 4

    asyncio.run(run())


def test_probes_that_arrive_together_get_the_answer_to_one_question() -> None:
    class Slow(Readiness):
        asked = 0
        answers = threading.Event()

        def _ask(self) -> bool:
            self.asked += 1
            return self.answers.wait(5.0)

    async def run() -> None:
        readiness = Slow("app", "model", lambda: 0.0)
        probes = [asyncio.ensure_future(readiness()) for _ in range(5)]
        await asyncio.sleep(0)
        probes[0].cancel()  # the first one leaves
        readiness.answers.set()
        assert await asyncio.gather(*probes[1:]) == [True] * 4
        assert readiness.asked == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/", 404),
        ("GET", "/v3/models", 404),
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/digits/versions/2", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("POST", "/v2/models/digits/versions/9/infer", 404),
        ("GET", INFER, 405),
        ("DELETE", "/v2/models/digits", 405),
        ("POST", "/v2/health/live", 405),
    ],
)
def test_unknown_paths_models_and_methods_are_named(method: str, path: str, status: int) -> None:
    response = send(make_api(FakeHandle(DIGIT)), method, path)
    assert path.rsplit("/", maxsplit=1)[-1] in reason(response, status) or "unknown" in reason(response, status)
    assert ("allow" in response.headers) == (status == 405)


# ---------------------------------------------------------------- inference


def test_json_in_json_out() -> None:
    response = post(json=REQUEST | {"id": "q1"})
    assert response.status_code == 200
    assert response.json() == {
        "model_name": "digits",
        "model_version": "1",
        "outputs": [{"name": "digit", "datatype": "INT64", "shape": [1], "data": [7]}],
        "id": "q1",
    }


def test_binary_in_binary_out() -> None:
    seen: list[Any] = []

    def model(inputs: dict[str, Any], *_: Any) -> Any:
        seen.append(inputs["pixels"])
        return DIGIT

    header = json.dumps(
        {
            "parameters": {"binary_data_output": True},
            "inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}],
        }
    ).encode()
    response = post(
        handle=FakeHandle(model),
        content=header + np.array([3, 4], "<f4").tobytes(),
        headers={"Inference-Header-Content-Length": str(len(header)), "content-type": "application/octet-stream"},
    )
    split = int(response.headers["inference-header-content-length"])
    assert seen[0].tolist() == [[3, 4]]
    assert response.content[split:] == np.array([7], "<i8").tobytes()
    assert json.loads(response.content[:split])["outputs"][0]["parameters"] == {"binary_data_size": 8}


def test_bad_input_never_reaches_a_replica() -> None:
    handle = FakeHandle(DIGIT)
    bad = {"inputs": [REQUEST["inputs"][0] | {"shape": [1, 3]}]}
    assert "the model takes [-1, 2]" in reason(post(handle=handle, json=bad), 400)
    assert "the body is not JSON" in reason(post(handle=handle, content=b"{", headers=JSON), 400)
    assert handle.calls == []


@pytest.mark.parametrize(
    ("raised", "status", "text"),
    [
        (RayTaskError("infer", "at /secret/path", ValueError("no such layer")), 500, "ValueError: no such layer"),
        (ActorDiedError(), 503, "lost"),
        (Refusal("too many rows"), 400, "too many rows"),
        (Refusal("no word '\ud83d'"), 400, r"no word '\ud83d'"),
        (RayTaskError("infer", "", OSError("no file \udcff")), 500, r"no file \udcff"),
    ],
)
def test_failures_of_the_model_have_a_short_reason(raised: Any, status: int, text: str) -> None:
    response = post(handle=FakeHandle(raised))
    assert text in reason(response, status)
    assert "secret" not in response.text
    assert ("retry-after" in response.headers) == (status == 503)


def test_a_model_that_gives_something_else_than_arrays_is_at_fault() -> None:
    assert "complex128" in reason(post(handle=FakeHandle({"digit": np.zeros(1, complex)})), 500)


def test_a_model_that_only_generates_says_so() -> None:
    only_text = ModelInfo(name="digits", infers=False, generates=True)
    api = make_api(FakeHandle(DIGIT), info=only_text)
    assert "has no infer" in reason(send(api, "POST", INFER, json=REQUEST), 400)
    only_tensors = ModelInfo(name="digits", generates=False)
    api = make_api(FakeHandle(DIGIT), info=only_tensors)
    assert "has no generate" in reason(send(api, "POST", STREAM, json={}), 400)


# ---------------------------------------------------------------- body limits


SMALL = {"max_body_bytes": 2000, "max_total_body_bytes": 3000}


def test_a_large_body_is_refused_by_its_announced_length() -> None:
    async def never() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    response = post(content=never(), headers=JSON | {"content-length": "2001"}, settings=SMALL)
    assert "larger than 2000 bytes" in reason(response, 413)


def test_a_large_chunked_body_is_refused_while_it_comes() -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 500
            yield b" " * 500

    assert "larger than 2000 bytes" in reason(post(content=endless(), headers=JSON, settings=SMALL), 413)
    assert sent <= 3000


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_bodies_are_read(encoding: str) -> None:
    raw = json.dumps(REQUEST).encode()
    packed = gzipped(raw) if encoding == "gzip" else zlib.compress(raw)
    assert post(content=packed, headers=JSON | {"content-encoding": encoding}).status_code == 200


def test_a_zip_bomb_is_stopped_at_the_limit() -> None:
    bomb = gzip.compress(b" " * 100_000_000, compresslevel=9)
    response = post(content=bomb, headers=JSON | {"content-encoding": "gzip"}, settings={"max_body_bytes": 200_000})
    assert "larger than 200000 bytes when decompressed" in reason(response, 413)


def test_what_many_members_cost_does_not_grow_with_what_follows_them() -> None:
    def cost_s(packed: bytes) -> float:
        begun_s = time.process_time()
        headers = {HEADER_LENGTH.lower(): "0", "content-encoding": "gzip"}
        assert post(content=packed, headers=headers).status_code == 200
        return time.process_time() - begun_s

    members = gzipped(b"") * 990
    large = gzip.compress(np.random.default_rng(0).random(2**20, np.float32).tobytes(), 1, mtime=0)
    assert cost_s(members + large) < 3 * (cost_s(members + gzipped(bytes(8))) + cost_s(large))


@pytest.mark.parametrize(
    ("packed", "text"),
    [
        (b"not gzip", "not valid gzip"),
        (gzipped(b"x" * 100)[:-8], "cut off"),
        (gzipped(b"{}") + b"more", "follow the end"),
        (b"", "cut off"),
    ],
)
def test_damaged_compression_is_refused(packed: bytes, text: str) -> None:
    assert text in reason(post(content=packed, headers=JSON | {"content-encoding": "gzip"}), 400)


def test_an_unknown_compression_is_refused_with_the_known_ones() -> None:
    response = post(content=b"x", headers=JSON | {"content-encoding": "br"})
    assert "gzip, deflate or none" in reason(response, 415)
    assert response.headers["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize("media", ["text/plain", "multipart/form-data; boundary=x", "image/png"])
def test_other_content_types_are_refused(media: str) -> None:
    assert "application/json" in reason(post(content=b"{}", headers={"content-type": media}), 415)


@pytest.mark.parametrize(
    "media",
    [
        "application/json; charset=utf-8",
        "application/vnd.x+json",
        "Application/JSON",
        "application/x-www-form-urlencoded",  # what curl says unless it is told otherwise
    ],
)
def test_kinds_of_json_are_taken(media: str) -> None:
    content = json.dumps(REQUEST).encode()
    assert post(content=content, headers={"content-type": media}).status_code == 200


def test_a_byte_order_mark_before_json_is_no_part_of_it() -> None:
    content = codecs.BOM_UTF8 + json.dumps(REQUEST).encode()
    assert post(content=content, headers=JSON).status_code == 200
    assert post(content=content, headers=JSON | {HEADER_LENGTH.lower(): str(len(content))}).status_code == 200


def test_a_body_that_stops_coming_is_given_up() -> None:
    async def stalls() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    response = post(content=stalls(), headers=JSON, settings={"body_idle_timeout_s": 0.02})
    assert "1 bytes came" in reason(response, 408)


def test_bodies_under_way_have_a_common_limit_that_is_given_back() -> None:
    async def run() -> None:
        started, gate = asyncio.Event(), asyncio.Event()

        async def wait() -> Any:
            started.set()
            await gate.wait()
            return DIGIT

        api = make_api(FakeHandle(lambda *_: wait()), **SMALL)
        padded = json.dumps(REQUEST).encode().ljust(1600)
        async with client(api) as http:
            first = asyncio.create_task(http.post(INFER, content=padded, headers=JSON))
            await started.wait()
            refused = await http.post(INFER, content=padded, headers=JSON)
            assert "too many request bodies" in reason(refused, 503)
            assert refused.headers["retry-after"] == "1"
            gate.set()
            assert (await first).status_code == 200
            assert (await http.post(INFER, content=padded, headers=JSON)).status_code == 200
            assert (await http.post(INFER, content=b"{", headers=JSON)).status_code == 400
        assert api.bodies.held_bytes == 0

    asyncio.run(run())


# ---------------------------------------------------------------- headers, sessions, deadlines


@pytest.mark.parametrize(
    ("headers", "status", "text"),
    [
        ({"x-session-id": "s" * 513}, 400, "at most 512"),
        ({"x-session-id": "s" * 1_000_000}, 431, "at most 32768"),
        ({"x-session_id": b"\xff\xfe"}, 400, "printable ASCII"),
        ({"x-request-id": b"\xc3\xa4"}, 400, "printable ASCII"),
        ({"serve_multiplexed_model_id": "m" * 600}, 400, "at most 512"),
        ({"serve-multiplexed-model-id": "\t"}, 400, "printable ASCII"),
        ({"x-request-timeout-seconds": "soon"}, 400, "must be seconds above 0"),
        ({"x-request-timeout-seconds": "-1"}, 400, "must be seconds above 0"),
        ({"x-request-timeout-seconds": "nan"}, 400, "must be seconds above 0"),
        ({f"x-{number}": "v" * 1000 for number in range(40)}, 431, "at most 32768"),
    ],
)
def test_headers_have_limits(headers: dict[str, Any], status: int, text: str) -> None:
    assert text in reason(post(headers=headers), status)


def test_other_headers_may_hold_any_bytes() -> None:
    assert post(headers={"x-name": b"\xff\xfe"}).status_code == 200


def test_the_session_header_reaches_the_router() -> None:
    handle = FakeHandle(DIGIT)
    response = post(handle=handle, headers={"x-session-id": "abc"})
    assert handle.calls[0][0]["session_id"] == "abc"
    assert "set-cookie" not in response.headers


def test_serves_own_setting_of_the_session_header_holds() -> None:
    handle = FakeHandle(DIGIT)
    post(handle=handle, headers={"x_user": "abc"}, settings={"session_header": "x-user"})
    assert handle.calls[0][0]["session_id"] == "abc"


def test_a_browser_without_a_session_gets_one_in_a_cookie_and_keeps_it() -> None:
    async def run() -> None:
        handle = FakeHandle(DIGIT)
        async with client(make_api(handle, session_cookie="shadecast")) as http:
            first = await http.post(INFER, json=REQUEST)
            second = await http.post(INFER, json=REQUEST)
        assert "HttpOnly" in first.headers["set-cookie"]
        assert "set-cookie" not in second.headers
        sessions = [options["session_id"] for options, _ in handle.calls]
        assert sessions[0] == sessions[1] == first.cookies["shadecast"]

    asyncio.run(run())


def test_the_session_header_goes_before_the_cookie() -> None:
    handle = FakeHandle(DIGIT)
    headers = {"x-session-id": "header", "cookie": "shadecast=cookie"}
    response = post(handle=handle, headers=headers, settings={"session_cookie": "shadecast"})
    assert handle.calls[0][0]["session_id"] == "header"
    assert "set-cookie" not in response.headers


def test_a_cookie_that_is_no_session_is_replaced() -> None:
    handle = FakeHandle(DIGIT)
    headers = {"cookie": "shadecast=" + "x" * 500}
    response = post(handle=handle, headers=headers, settings={"session_cookie": "shadecast"})
    assert handle.calls[0][0]["session_id"] == response.cookies["shadecast"] != "x" * 500


def test_a_request_id_is_made_where_none_came_and_left_alone_where_one_did() -> None:
    assert len(post().headers["x-request-id"]) == 36
    assert "x-request-id" not in post(headers={"x-request-id": "mine"}).headers


@pytest.mark.parametrize(
    ("headers", "parameters", "left_s"),
    [
        ({}, {}, 60.0),
        ({"x-request-timeout-seconds": "5"}, {}, 4.95),
        ({}, {"timeout": 2_000_000}, 2.0),
        ({}, {"timeout": 0}, 60.0),  # Triton's "none"
        ({"x-request-timeout-seconds": "1.05"}, {"timeout": 2_000_000}, 1.0),
        ({"x-request-timeout-seconds": "1000"}, {"timeout": 10**12}, 60.0),
    ],
)
def test_the_shortest_deadline_is_carried_to_the_model(
    headers: dict[str, str], parameters: dict[str, Any], left_s: float
) -> None:
    handle = FakeHandle(DIGIT)
    assert post(handle=handle, headers=headers, json=REQUEST | {"parameters": parameters}).status_code == 200
    assert handle.calls[0][1][2] == pytest.approx(left_s)


@pytest.mark.parametrize("timeout", [-1, 1.5, "1", True])
def test_a_wrong_timeout_is_refused(timeout: Any) -> None:
    assert "microseconds" in reason(post(json=REQUEST | {"parameters": {"timeout": timeout}}), 400)


# ---------------------------------------------------------------- generation


async def words(*items: Any) -> AsyncIterator[Any]:
    for item in items:
        yield item


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-accel-buffering"] == "no"
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_stream_comes_as_server_sent_events() -> None:
    handle = FakeHandle(lambda *_: words("Hel", {"text_output": "lo", "score": np.float32(0.5)}))
    got = events(post(STREAM, handle, json={"text_input": "Hi", "id": "g1"}))
    common = {"model_name": "digits", "model_version": "1", "id": "g1"}
    assert got == [common | {"text_output": "Hel"}, common | {"text_output": "lo", "score": 0.5}]
    assert handle.calls[0][1] == ({"text_input": "Hi", "id": "g1"},)


def test_generate_joins_the_texts_into_one_object() -> None:
    handle = FakeHandle(lambda *_: words("Hel", {"text_output": "lo", "done": True}))
    answer = post("/v2/models/digits/generate", handle, json={}).json()
    assert answer == {"model_name": "digits", "model_version": "1", "text_output": "Hello", "done": True}


def test_a_stream_that_breaks_ends_with_an_error_event() -> None:
    async def breaks() -> AsyncIterator[Any]:
        yield "one"
        raise RayTaskError("generate", "", ValueError("lost the thread"))

    got = events(post(STREAM, FakeHandle(lambda *_: breaks()), json={}))
    assert got[0]["text_output"] == "one"
    assert got[1] == {"error": "the model failed: ValueError: lost the thread"}


@pytest.mark.parametrize("item", [3, {"text_output": float("nan")}, {"text_output": object()}])
def test_items_that_json_cannot_carry_end_the_stream_with_a_reason(item: Any) -> None:
    got = events(post(STREAM, FakeHandle(lambda *_: words(item)), json={}))
    assert list(got[0]) == ["error"]


@pytest.mark.parametrize(
    ("request_", "status", "text"),
    [
        ({"json": []}, 400, "must be a JSON object"),
        ({"json": {"parameters": 3}}, 400, "must be an object"),
        ({"json": {"parameters": False}}, 400, "must be an object"),
        ({"json": {"id": 3}}, 400, "'id' must be a string"),
        ({"content": b"\xff", "headers": JSON}, 400, "not UTF-8"),
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415, "Content-Type"),
    ],
)
def test_bad_generate_requests_are_refused(request_: dict[str, Any], status: int, text: str) -> None:
    assert text in reason(post(STREAM, FakeHandle(lambda *_: words()), **request_), status)


def test_a_client_that_leaves_a_stream_cancels_it() -> None:
    async def run() -> FakeHandle:
        async def endless() -> AsyncIterator[str]:
            while True:
                yield "word"
                await asyncio.sleep(0)

        handle = FakeHandle(lambda *_: endless())
        app = make_app(make_api(handle))
        got_first = asyncio.Event()
        incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        await incoming.put({"type": "http.request", "body": b"{}", "more_body": False})

        async def deliver(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body" and not got_first.is_set():
                got_first.set()
                await incoming.put({"type": "http.disconnect"})

        scope = {
            "type": "http", "method": "POST", "path": STREAM, "raw_path": STREAM.encode(), "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
            "server": ("gateway", 80), "client": ("client", 1), "root_path": "",
        }  # fmt: skip
        await asyncio.wait_for(app(scope, incoming.get, deliver), 5.0)
        return handle

    assert asyncio.run(run()).responses[0].cancelled


# ---------------------------------------------------------------- streams that are kept alive


class Reader:
    """A client of one stream over bare ASGI: what it was sent, as it came; it may leave."""

    def __init__(self, api: InferenceApi, body: bytes = b"{}", headers: dict[str, str] | None = None) -> None:
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
        self._sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        named = JSON | (headers or {})
        scope = {
            "type": "http", "method": "POST", "path": STREAM, "raw_path": STREAM.encode(), "query_string": b"",
            "headers": [(k.encode(), v.encode()) for k, v in named.items()], "http_version": "1.1", "scheme": "http",
            "server": ("gateway", 80), "client": ("client", 1), "root_path": "",
        }  # fmt: skip
        self.ended = asyncio.ensure_future(make_app(api)(scope, self._incoming.get, self._sent.put))

    async def next(self) -> dict[str, Any]:
        return await asyncio.wait_for(self._sent.get(), 5.0)

    async def rest(self) -> list[str]:
        await asyncio.wait_for(self.ended, 5.0)
        messages = [self._sent.get_nowait() for _ in range(self._sent.qsize())]
        return [message["body"].decode() for message in messages if message.get("body")]

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})


def test_a_stream_answers_before_its_first_item_and_is_kept_alive_until_and_between_items() -> None:
    async def run() -> None:
        gates = [asyncio.Event(), asyncio.Event()]

        async def slow() -> AsyncIterator[str]:
            for gate, word in zip(gates, ("one", "two"), strict=True):
                await gate.wait()
                yield word

        reader = Reader(make_api(FakeHandle(lambda *_: slow()), stream_keepalive_s=0.01))
        start = await reader.next()
        assert (start["status"], dict(start["headers"])[b"x-accel-buffering"]) == (200, b"no")
        for gate, word in zip(gates, ("one", "two"), strict=True):
            for _ in range(3):
                assert (await reader.next())["body"] == b":\n\n"
            gate.set()
            while (body := (await reader.next())["body"]) == b":\n\n":
                pass
            assert json.loads(body.removeprefix(b"data: "))["text_output"] == word
        assert set(await reader.rest()) <= {":\n\n"}

    asyncio.run(run())


def test_without_the_setting_no_comment_is_sent() -> None:
    response = post(STREAM, FakeHandle(lambda *_: words("one")), json={})
    assert response.text.startswith("data: ")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda *_: words(Refusal("no prompt")), "no prompt"),
        (RayTaskError("generate", "", ValueError("lost")), "the model failed: ValueError: lost"),
        (ActorDiedError(), "the request was lost: its replica died or could not be reached; try again"),
    ],
)
def test_once_the_answer_has_begun_an_error_before_the_first_item_is_an_event(answer: Any, error: str) -> None:
    response = post(STREAM, FakeHandle(answer), json={}, settings={"stream_keepalive_s": 5.0})
    assert (response.status_code, response.text) == (200, f':\n\ndata: {{"error": "{error}"}}\n\n')


def test_what_is_wrong_with_the_request_itself_keeps_its_status() -> None:
    settings = {"stream_keepalive_s": 5.0}
    assert "'id'" in reason(post(STREAM, FakeHandle(None), json={"id": 1}, settings=settings), 400)
    assert "unknown model" in reason(
        post("/v2/models/x/generate_stream", FakeHandle(None), json={}, settings=settings), 404
    )


@pytest.mark.parametrize(
    ("settings", "headers", "error"),
    [
        ({"request_timeout_s": 0.05}, {}, "no answer within 0.05 s"),
        ({}, {"x-request-timeout-seconds": "0.1"}, "no answer within 0.05 s"),
    ],
)
def test_deadlines_hold_for_streams_that_are_kept_alive(
    settings: dict[str, float], headers: dict[str, str], error: str
) -> None:
    async def run() -> None:
        async def never() -> AsyncIterator[str]:
            await asyncio.Event().wait()
            yield ""

        handle = FakeHandle(lambda *_: never())
        reader = Reader(make_api(handle, stream_keepalive_s=0.01, **settings), headers=headers)
        sent = await reader.rest()
        assert sent.count(":\n\n") > 1
        assert sent[-1] == f'data: {{"error": "{error}"}}\n\n'
        assert handle.responses[0].cancelled

    asyncio.run(run())


@pytest.mark.parametrize("items_before", [0, 1])
def test_a_client_that_leaves_a_stream_that_is_kept_alive_cancels_it(items_before: int) -> None:
    async def run() -> None:
        cleaned = asyncio.Event()

        async def waits() -> AsyncIterator[str]:
            try:
                for _ in range(items_before):
                    yield "item"
                await asyncio.Event().wait()
            finally:
                cleaned.set()

        handle = FakeHandle(lambda *_: waits())
        api = make_api(handle, stream_keepalive_s=0.01)
        reader = Reader(api)
        for _ in range(4 + items_before):
            await reader.next()
        assert api.bodies.held_bytes == 2, "the request is under way"
        reader.leave()
        await asyncio.wait_for(reader.ended, 5.0)
        await asyncio.wait_for(cleaned.wait(), 5.0)
        await asyncio.sleep(0)
        assert handle.responses[0].cancelled
        assert api.bodies.held_bytes == 0
        assert len(asyncio.all_tasks()) == 1, "nothing goes on"

    asyncio.run(run())


# ---------------------------------------------------------------- description


def test_the_openapi_description_covers_every_route_with_its_errors() -> None:
    described = send(make_api(FakeHandle(DIGIT)), "GET", "/openapi.json").json()
    paths = described["paths"]
    assert set(paths) >= {"/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/{model}/infer"}
    infer = paths["/v2/models/{model}/versions/{version}/infer"]["post"]
    assert {parameter["name"] for parameter in infer["parameters"]} == {"model", "version"}
    assert {"400", "404", "413", "415", "503", "504"} <= set(infer["responses"])


def test_requests_made_from_the_description_are_answered() -> None:
    described = send(make_api(FakeHandle(DIGIT)), "GET", "/openapi.json").json()
    (schema,) = described["paths"][INFER.replace("digits", "{model}")]["post"]["requestBody"]["content"].values()
    for form in schema["schema"]["properties"]["inputs"]["anyOf"]:
        inputs = [
            {key: rule["const"] for key, rule in entry["properties"].items() if "const" in rule}
            | {"data": [entry["properties"]["data"]["items"]["maximum"]] * entry["properties"]["data"]["minItems"]}
            for entry in form["prefixItems"]
        ]
        assert post(json={"inputs": inputs}).status_code == 200


def test_what_the_model_does_not_offer_is_not_described() -> None:
    api = make_api(FakeHandle(DIGIT), info=ModelInfo(name="digits", generates=False))
    assert "/v2/models/{model}/generate" not in send(api, "GET", "/openapi.json").json()["paths"]


def test_an_error_of_the_gateway_itself_is_a_500_without_details() -> None:
    async def broken() -> bool:
        raise RuntimeError("secret")

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(make_api(FakeHandle(DIGIT), ready=broken)), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            return await http.get("/v2/health/ready")

    response = asyncio.run(run())
    assert reason(response, 500) == "the gateway failed: RuntimeError"
