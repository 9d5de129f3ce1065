"""Fuzzing the gateway over ASGI: whatever a client sends, the answer comes, is JSON with a reason, and is not a 5xx.

The model behind it always answers, so a 5xx would be the gateway's own fault.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.gateway.http_app import make_app
from tests.serve_app.gateway.gateway_fakes import FakeHandle, call, make_api

DIGIT = {"digit": np.array([7])}
VALID = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
values = st.recursive(
    scalars | st.sampled_from(["pixels", "digit", "FP32", "BYTES", [1, 2], [[1.0, 2.0]], 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
paths: list[tuple[str | int, ...]] = [
    ("id",),
    ("parameters",),
    ("parameters", "timeout"),
    ("parameters", "binary_data_output"),
    ("inputs",),
    ("inputs", 0),
    ("inputs", 0, "name"),
    ("inputs", 0, "datatype"),
    ("inputs", 0, "shape"),
    ("inputs", 0, "data"),
    ("inputs", 0, "parameters"),
    ("inputs", 0, "parameters", "binary_data_size"),
    ("outputs",),
    ("outputs", 0),
    ("text_input",),
]
header_names = st.sampled_from(
    [
        "content-type", "content-encoding", "content-length", "transfer-encoding", "x-session-id", "x-request-id",
        "x-request-timeout-seconds", "inference-header-content-length", "cookie", "accept", "expect", "range",
        "serve_multiplexed_model_id",
    ]
).map(str.encode)  # fmt: skip
header_values = st.sampled_from(
    ["", "0", "-1", "5", "99999999999999999999", "application/json", "text/html", "gzip", "chunked", "a" * 600, "NaN"]
).map(str.encode) | st.binary(max_size=20).map(lambda raw: raw.replace(b"\r", b"").replace(b"\n", b"").strip())
urls = st.sampled_from(
    [
        "/v2/models/digits/infer",
        "/v2/models/digits/versions/1/infer",
        "/v2/models/digits/generate",
        "/v2/models/digits/generate_stream",
    ]
) | st.text(st.characters(codec="utf-8"), max_size=10).map(lambda name: f"/v2/models/{name}/infer")


def replaced(request: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """`request` with `value` at `path`, whatever was on the way there before."""
    changed = json.loads(json.dumps(request))
    at: Any = changed
    for step, after in pairwise(path):
        if isinstance(at, list):
            at = at[int(step)]
            continue
        if not isinstance(at.get(step), list if isinstance(after, int) else dict):
            at[step] = [{}] if isinstance(after, int) else {}
        at = at[step]
    at[path[-1]] = value
    return changed


damaged = st.builds(replaced, st.just(VALID), st.sampled_from(paths), values).map(lambda r: json.dumps(r).encode())
cut = st.builds(lambda raw, at: raw[: at % (len(raw) + 1)], st.just(json.dumps(VALID).encode()), st.integers(0, 500))
bodies = damaged | cut | st.binary(max_size=60) | damaged.map(zlib.compress)


async def answer(method: str, path: str, content: bytes, headers: list[tuple[bytes, bytes]]) -> tuple[int, bytes]:
    async def words() -> Any:
        yield "word"

    def model(*args: Any) -> Any:
        return words() if len(args) == 1 else DIGIT

    api = make_api(FakeHandle(model), body_idle_timeout_s=1.0, max_body_bytes=100_000)
    status, _, body = await asyncio.wait_for(call(make_app(api), method, path, headers, content), 10.0)
    assert api.bodies.held_bytes == 0
    return status, body


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(["POST", "POST", "POST", "GET", "PUT", "HEAD", "OPTIONS"]),
    urls,
    bodies,
    st.lists(st.tuples(header_names, header_values), max_size=3),
)
def test_whatever_comes_in_the_answer_is_no_5xx_and_has_a_reason(
    method: str, path: str, content: bytes, headers: list[tuple[bytes, bytes]]
) -> None:
    status, body = asyncio.run(answer(method, path, content, headers))
    assert status < 500, body
    if status >= 400 and method != "HEAD":
        assert json.loads(body)["error"]


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(paths), values)
def test_one_wrong_field_gives_an_answer_or_a_reason(path: tuple[str | int, ...], value: Any) -> None:
    content = json.dumps(replaced(VALID, path, value)).encode()
    status, body = asyncio.run(answer("POST", "/v2/models/digits/infer", content, []))
    assert status in (200, 400), body
    if status == 400:
        assert json.loads(body)["error"]
