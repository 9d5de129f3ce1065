"""Requests that pass FastAPI's machinery by are answered as those that do not."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import numpy as np
import pytest

from serve_app.gateway.http_app import make_app
from serve_app.gateway.ingress import InferenceApi
from tests.serve_app.gateway.gateway_fakes import FakeHandle, make_api

BODY = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
INFER = "/v2/models/digits/infer"


def answers(path: str, root_path: str = "", **request: Any) -> tuple[httpx.Response, httpx.Response]:
    """By the short way, and by FastAPI's."""

    async def run() -> tuple[httpx.Response, httpx.Response]:
        found = []
        for short in (True, False):
            app = make_app(make_api(FakeHandle({"digit": np.array([7])})))
            assert app.short_way
            if not short:
                app.short_way = {}
            transport = httpx.ASGITransport(app, root_path=root_path)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
                found.append(await http.post(path, **request))
        return found[0], found[1]

    return asyncio.run(run())


@pytest.mark.parametrize("root_path", ["", "/prefix", "/a/deep one"])
@pytest.mark.parametrize("path", [INFER, "/v2/models/digits/versions/1/infer", "/v2/models/%64igits/infer"])
@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"json": BODY}, 200),
        ({"json": {"inputs": 3}}, 400),
        ({"json": BODY, "headers": {"x-session-id": "s" * 600}}, 400),
        ({"json": BODY, "headers": {"content-type": "text/html"}}, 415),
        ({"json": BODY, "headers": {"much": "x" * 40_000}}, 431),
        ({"json": BODY, "headers": {"x-request-id": "mine"}}, 200),
    ],
)
def test_answers_are_those_of_fastapis_way(path: str, root_path: str, request_: dict[str, Any], status: int) -> None:
    short, long = answers(root_path + path, root_path, **request_)
    assert short.status_code == long.status_code == status
    assert short.content == long.content

    def headers(response: httpx.Response) -> dict[str, str]:
        return {name: value for name, value in response.headers.items() if name != "x-request-id"}

    assert headers(short) == headers(long)
    assert short.headers.get("x-request-id", "").count("-") == long.headers.get("x-request-id", "").count("-")


def test_what_nobody_expected_is_a_500_and_is_raised_for_serves_log() -> None:
    class Broken(InferenceApi):
        async def infer(self, request: Any) -> Any:
            raise ZeroDivisionError

    api = make_api(FakeHandle(None))
    api.__class__ = Broken

    async def run(*, raises: bool) -> httpx.Response:
        transport = httpx.ASGITransport(make_app(api), raise_app_exceptions=raises)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            return await http.post(INFER, json=BODY)

    assert asyncio.run(run(raises=False)).json() == {"error": "the gateway failed: ZeroDivisionError"}
    with pytest.raises(ZeroDivisionError):
        asyncio.run(run(raises=True))


def test_with_browsers_allowed_all_goes_through_the_cors_rules() -> None:
    api = make_api(FakeHandle({"digit": np.array([7])}), allow_origins=("https://a.example",))
    assert not make_app(api).short_way
