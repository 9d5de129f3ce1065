"""The page as an application and as a plain object: who may read, who may order, what is shown while nobody answers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import math
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import typer
from fastapi import FastAPI
from ray.exceptions import RayActorError

from serve_app.launch import commands
from serve_app.page import rights, server
from serve_app.page import watch as page_watch
from serve_app.page.address import Address, PageError
from serve_app.page.app import make_app
from serve_app.page.rights import MOST_CLIENTS, Limits, Rights, digest
from serve_app.page.server import Page
from serve_app.page.watch import ControlPlaneAwayError, Watch

HTML = resources.files("serve_app.page").joinpath("page.html").read_text(encoding="utf-8")
STATUS = {"schema": 1, "epoch": 1, "uptime_s": 1.5, "nodes": [], "deployments": [], "transitions": []}
TOKEN = "correct-horse-battery"
LOOK_TOKEN = "staple-for-the-eyes"
RIGHTS = Rights(operate=digest(TOKEN))
GUARDED = Rights(operate=digest(TOKEN), look=digest(LOOK_TOKEN))
LOOK_BEARER = {"Authorization": f"Bearer {LOOK_TOKEN}"}
BEARER = {"Authorization": f"Bearer {TOKEN}"}


class Plane:
    """A control plane: counts questions, records orders, fails when told to."""

    def __init__(self) -> None:
        self.asked = 0
        self.orders: list[dict[str, Any]] = []
        self.written: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self.known = {"r1": 1, "node": 3}

    async def status(self) -> dict[str, Any]:
        self.asked += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return {**STATUS, "asked": self.asked}

    async def order(self, order: dict[str, Any]) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        self.orders.append(order)
        if order["target"] not in self.known:
            return {"refused": f"no replica or node has the id {order['target']!r}", "unknown": True}
        if order.get("lasts_s", 1.0) <= 0.0:
            return {"refused": "lasts_s must be more", "unknown": False}
        return {"order": order["order"], "target": order["target"], "concerned": self.known[order["target"]]}

    async def explain(self, question: dict[str, Any]) -> dict[str, Any]:
        self.asked += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if question["target"] not in self.known:
            return {"refused": f"no {question['what']} has the id {question['target']!r}", "unknown": True}
        return {**question, "sentences": ["It gets nothing."], "changes": [], "score": math.nan}

    async def write_down(self, entry: dict[str, Any]) -> None:
        self.written.append(entry)


def ask(app: FastAPI, method: str, path: str, **kwargs: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with client_of(app) as client:
            return await client.request(method, path, **kwargs)

    return asyncio.run(go())


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8266")


def app_of(plane: Plane, **kwargs: Any) -> FastAPI:
    rights = kwargs.pop("rights", RIGHTS)
    return make_app(plane.status, plane.order, rights, write_down=plane.write_down, explain=plane.explain, **kwargs)


# ---------------------------------------------------------------- the file


def test_the_page_loads_nothing_from_elsewhere() -> None:
    addresses = set(re.findall(r"https?://[^\"'\s)]+", HTML))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not fetched
    assert not re.search(r"<script[^>]+src|<link[^>]+stylesheet|@import|\burl\(", HTML)


def test_the_page_puts_text_in_as_text_only() -> None:
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|<[^>]*\son\w+=", HTML
    )


def test_every_element_that_the_script_looks_up_is_there_once() -> None:
    wanted = set(re.findall(r"\$\(\"([\w-]+)\"\)", HTML))
    there = re.findall(r"\bid=\"([\w-]+)\"", HTML)
    assert len(wanted) > 15
    assert wanted <= set(there)
    assert len(set(there)) == len(there)


def test_state_names_are_written_and_not_only_coloured() -> None:
    glyphs = re.search(r"const GLYPH = \{(.*?)\}", HTML)
    assert glyphs is not None
    assert re.findall(r"(\w+):", glyphs[1]) == ["active", "shifting", "shadowing", "draining", "inactive"]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed: the script is not parsed here")
def test_the_script_parses(tmp_path: Path) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", HTML, re.DOTALL)
    (tmp_path / "page.js").write_text(script)
    subprocess.run(["node", "--check", tmp_path / "page.js"], check=True, timeout=60)


def test_the_content_policy_lets_only_the_pages_own_script_and_style_run() -> None:
    response = ask(app_of(Plane()), "GET", "/")
    assert response.status_code == 200
    assert response.text == HTML
    policy = response.headers["content-security-policy"]
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy  # nobody can lay the Drain button under their own


# ---------------------------------------------------------------- reading


def test_however_many_look_the_coordinator_is_asked_once() -> None:
    plane = Plane()

    async def look() -> list[httpx.Response]:
        async with client_of(app_of(plane, now_s=lambda: 10.0)) as client:
            return await asyncio.gather(*(client.get("/api/status") for _ in range(50)))

    responses = asyncio.run(look())
    assert {r.status_code for r in responses} == {200}
    assert {r.json()["asked"] for r in responses} == {1}


def test_a_status_older_than_half_a_second_is_asked_for_again() -> None:
    plane, clock = Plane(), [0.0]
    watch = Watch(plane.status, lambda: clock[0])

    async def look() -> list[int]:
        seen = []
        for clock[0] in (1.0, 1.4, 1.6):
            seen.append((await watch.latest())["asked"])
        return seen

    assert asyncio.run(look()) == [1, 1, 2]


def test_a_control_plane_that_is_away_gives_503_with_the_reason_and_comes_back() -> None:
    plane, clock = Plane(), [0.0]
    app = app_of(plane, now_s=lambda: clock[0])
    plane.error = RuntimeError("the actor died\nlong trace")
    away = ask(app, "GET", "/api/status")
    assert away.status_code == 503
    assert away.json() == {"error": "control plane away: asking the coordinator failed: RuntimeError: the actor died"}
    assert away.headers["retry-after"] == "1"
    assert ask(app, "GET", "/").status_code == 200
    plane.error, clock[0] = None, 1.0
    assert ask(app, "GET", "/api/status").status_code == 200


def test_a_coordinator_that_hangs_does_not_hang_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_watch, "_ANSWER_S", 0.02)

    async def hang() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    response = ask(make_app(hang, Plane().order, RIGHTS), "GET", "/api/status")
    assert response.status_code == 503
    assert "did not answer within" in response.json()["error"]


def test_metrics_of_a_control_plane_that_is_away_say_so_and_still_scrape() -> None:
    plane = Plane()
    plane.error = ControlPlaneAwayError("gone")
    response = ask(app_of(plane), "GET", "/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert response.text.strip().splitlines()[-1] == "shadecast_up 0.0"


def test_history_is_collected_while_nobody_looks() -> None:
    plane, looked = Plane(), asyncio.Event()

    async def status() -> dict[str, Any]:
        looked.set()
        return await plane.status()

    async def run() -> None:
        app = make_app(status, plane.order, RIGHTS)
        async with app.router.lifespan_context(app):
            await asyncio.wait_for(looked.wait(), 10)
        assert len(asyncio.all_tasks()) == 1  # nothing pending at the end

    asyncio.run(run())


def test_an_unknown_path_or_method_is_refused_as_json() -> None:
    app = app_of(Plane())
    assert ask(app, "GET", "/nothing").json() == {"error": "Not Found"}
    assert ask(app, "GET", "/api/drain").status_code == 405
    assert ask(app, "GET", "/docs").status_code == 404  # FastAPI's own comes from a CDN


HOSTS = [
    ("127.0.0.1:8266", 200),
    ("localhost", 200),
    ("LOCALHOST:9", 200),
    ("[::1]:8266", 200),
    ("127.8.8.8", 200),
    ("gpu-box", 200),
    ("GPU-box.:8266", 200),
    ("10.0.0.5:8266", 200),
    ("evil.example", 421),
    ("evil.example:8266", 421),
    ("127.0.0.1.evil.example", 421),
    ("localhost.evil.example", 421),
    ("", 421),
    ("[::1", 421),
]


@pytest.mark.parametrize("path", ["/", "/api/status", "/api/history", "/metrics"])
@pytest.mark.parametrize(("host", "status"), HOSTS)
def test_only_names_of_the_page_itself_are_answered(host: str, status: int, path: str) -> None:
    app = app_of(Plane(), address=Address().changed("10.0.0.5", None, ["GPU-box"]))
    assert ask(app, "GET", path, headers={"Host": host}).status_code == status


@pytest.mark.parametrize("host", ["10.42.0.17:8266", "10.42.0.17", "[fd00::17]:8266"])
def test_metrics_and_nothing_else_may_be_asked_by_any_ip_address(host: str) -> None:
    """Prometheus asks pods by their addresses. A page elsewhere needs a name that it can make mean this machine."""
    plane = Plane()
    app = app_of(plane, address=Address("0.0.0.0"))
    assert ask(app, "GET", "/metrics", headers={"Host": host}).status_code == 200
    for path in ("/", "/api/status", "/api/history", "/metrics/", "/metrics/..", "//metrics"):
        assert ask(app, "GET", path, headers={"Host": host}).status_code == 421
    order = ask(app, "POST", "/api/drain", json={"target": "r1"}, headers={"Host": host, **BEARER})
    assert order.status_code == 421
    assert plane.orders == []


def test_the_address_that_a_request_arrived_at_is_a_name_of_the_page() -> None:
    async def go(arrived_at: str, host: str) -> int:
        transport = httpx.ASGITransport(app_of(Plane(), address=Address("0.0.0.0")))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{arrived_at}:80") as client:
            return (await client.get("/api/status", headers={"Host": host})).status_code

    assert asyncio.run(go("192.0.2.7", "192.0.2.7")) == 200
    assert asyncio.run(go("192.0.2.7", "192.0.2.8")) == 421
    assert Address("::").is_own("192.0.2.7", "::ffff:192.0.2.7")
    assert Address("::").is_own("fe80::1", "fe80::1%eth0")
    assert not Address("::").is_own("", "")


@pytest.mark.parametrize("host", ["ray-head.team.svc.cluster.local", "ray-head.team.svc.cluster.local:8266", "Head_1"])
def test_the_option_that_a_refusal_names_exists_and_makes_the_page_answer(host: str) -> None:
    plane = Plane()
    refused = ask(app_of(plane), "GET", "/", headers={"Host": host})
    assert refused.status_code == 421
    named = re.search(r"shadecast (up) (--page-allow-host) (\S+)$", refused.json()["error"])
    assert named is not None
    command, option, name = named.groups()
    (taken,) = [c for c in commands.cli.registered_commands if c.callback and c.callback.__name__ == command]
    context = typer.main.get_command_from_info(taken, pretty_exceptions_short=True, rich_markup_mode=None).make_context(
        command, [option, name]
    )
    address = Address().changed(None, None, context.params["page_allow_host"])
    assert ask(app_of(plane, address=address), "GET", "/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["$(reboot)", "a b", "evil.example;id", "x" * 300, "-rf", "*"])
def test_a_refusal_repeats_no_name_in_its_command_that_is_none(host: str) -> None:
    error = ask(app_of(Plane()), "GET", "/", headers={"Host": host}).json()["error"]
    assert error.endswith("shadecast up --page-allow-host NAME")
    assert "\n" not in error
    assert len(error) < 400


@pytest.mark.parametrize("name", ["", " ", "http://head", "head:8266", "*", "*.svc", "a..b", "-x", "a/b", "a b", "é"])
def test_a_name_that_is_none_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(PageError, match="--page-allow-host") as caught:
        Address().changed(None, None, [name])
    assert repr(name) in str(caught.value)


def test_what_is_given_changes_an_address_and_names_add_up() -> None:
    first = Address().changed("0.0.0.0", None, ["Head.example.", "[fd00::1]"])
    assert first == Address("0.0.0.0", 8266, ("head.example", "fd00::1"))
    assert first.changed(None, 9000, ["b", "head.example"]) == Address(
        "0.0.0.0", 9000, ("head.example", "fd00::1", "b")
    )
    assert first.changed("[::1]", None, ()).host == "::1"


# ---------------------------------------------------------------- listening


def test_the_page_is_for_this_machine_alone_unless_told_otherwise() -> None:
    for given in ((), ("127.0.0.1",), ("localhost",), ("::1",)):
        assert Address(*given).is_local
    for host in ("0.0.0.0", "::", "10.0.0.5", "gpu-box"):
        assert not Address(host).is_local


IPV6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")


@pytest.mark.parametrize(
    ("host", "shown", "reached"),
    [
        ("127.0.0.1", "http://127.0.0.1", ["127.0.0.1"]),
        ("0.0.0.0", "http://127.0.0.1", ["127.0.0.1"]),
        pytest.param("::1", "http://[::1]", ["[::1]"], marks=IPV6),
        pytest.param("::", "http://[::1]", ["[::1]", "127.0.0.1"], marks=IPV6),
    ],
)
def test_the_page_answers_at_every_address_that_its_host_stands_for(host: str, shown: str, reached: list[str]) -> None:
    async def run() -> None:
        served = Page(host, 0, RIGHTS.plain(), find=lambda: handle_of(Plane()))
        address = await served.start()
        try:
            assert address.rpartition(":")[0] == shown
            for one in reached:
                at = f"http://{one}:{address.rpartition(':')[2]}"
                assert (await get(at, "/api/status")).status_code == 200
                assert (await get(at, "/metrics", headers={"Host": "10.1.2.3"})).status_code == 200
                assert (await get(at, "/", headers={"Host": "10.1.2.3"})).status_code == 421
        finally:
            await served.stop()

    asyncio.run(run())


# ---------------------------------------------------------------- orders


@pytest.mark.parametrize("order", ["drain", "release", "cancel"])
def test_an_order_with_the_token_reaches_the_coordinator_with_who_gave_it(order: str) -> None:
    plane = Plane()
    response = ask(app_of(plane), "POST", f"/api/{order}", json={"target": "node"}, headers=BEARER)
    assert response.status_code == 200
    assert response.json() == {"order": order, "target": "node", "concerned": 3}
    (ordered,) = plane.orders
    assert ordered["order"] == order
    assert ordered["target"] == "node"
    assert ordered["who"] == {"role": "operate", "by": "page", "token": digest(TOKEN)[:8], "client": "127.0.0.1"}


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Basic " + TOKEN,
        TOKEN,
        "Bearer correct-horse",
        f"Bearer {TOKEN} 2",
        "Bearer é",
    ],
)
def test_an_order_without_the_token_is_refused_before_its_body_is_read(header: str) -> None:
    plane = Plane()
    headers = {"Authorization": header.encode()} if header else {}
    response = ask(app_of(plane), "POST", "/api/drain", content=b"{not json", headers=headers)
    assert response.status_code == 401
    assert "token" in response.json()["error"]
    assert response.headers["www-authenticate"] == "Bearer"
    assert TOKEN not in response.text
    assert plane.orders == []


@pytest.mark.parametrize("header", ["", "Bearer ", "Bearer x"])
def test_a_page_without_a_token_takes_no_orders(header: str) -> None:
    plane = Plane()
    app = app_of(plane, rights=Rights())
    response = ask(app, "POST", "/api/drain", json={"target": "r1"}, headers={"Authorization": header})
    assert response.status_code == 403
    assert plane.orders == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b"[]", 422),
        (b'{"target": 5}', 422),
        (b'{"target": ""}', 422),
        (b'{"target": null}', 422),
        (b'{"target": "r1", "force": true}', 422),
        (b'{"target": "' + b"r" * 513 + b'"}', 422),
        (b"\xff\xfe", 422),
        (b" " * 5000, 413),
    ],
)
def test_a_malformed_order_is_refused_in_one_line(body: bytes, status: int) -> None:
    plane = Plane()
    response = ask(app_of(plane), "POST", "/api/drain", content=body, headers=BEARER)
    assert response.status_code == status
    assert "\n" not in response.json()["error"]
    assert plane.orders == []


def test_an_order_for_an_id_that_nobody_has_is_answered_with_404() -> None:
    response = ask(app_of(Plane()), "POST", "/api/drain", json={"target": "nobody"}, headers=BEARER)
    assert response.status_code == 404
    assert "'nobody'" in response.json()["error"]


def test_an_order_while_the_control_plane_is_away_says_that_it_was_not_carried_out() -> None:
    plane = Plane()
    plane.error = ControlPlaneAwayError("restarting")
    response = ask(app_of(plane), "POST", "/api/drain", json={"target": "r1"}, headers=BEARER)
    assert response.status_code == 503
    assert response.json() == {"error": "control plane away: restarting"}


def test_an_announcement_takes_numbers_and_reaches_the_coordinator() -> None:
    plane = Plane()
    body = {"target": "node", "starts_in_s": 60, "lasts_s": 600.5, "strength": 0.5}
    assert ask(app_of(plane), "POST", "/api/announce", json=body, headers=BEARER).status_code == 200
    assert {key: plane.orders[0][key] for key in body} == body
    for wrong in ({"target": "node"}, {**body, "lasts_s": "long"}, {**body, "lasts_s": -1}):
        assert ask(app_of(plane), "POST", "/api/announce", json=wrong, headers=BEARER).status_code == 422
    assert ask(app_of(plane), "POST", "/api/reboot", json=body, headers=BEARER).status_code == 404


# ---------------------------------------------------------------- why


def test_why_a_replica_stands_where_it_does_is_told_as_json() -> None:
    response = ask(app_of(Plane()), "GET", "/api/explain?what=node&target=node")
    assert response.status_code == 200
    assert response.json() == {
        "what": "node", "target": "node", "sentences": ["It gets nothing."], "changes": [], "score": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 422),
        ("?what=last", 422),
        ("?what=request&target=q", 422),
        ("?what=replica&target=", 422),
        ("?what=replica&target=" + "x" * 513, 422),
        ("?what=replica&target=nobody", 404),
    ],
)
def test_what_the_page_cannot_explain_is_refused_with_a_reason(query: str, status: int) -> None:
    plane = Plane()
    response = ask(app_of(plane), "GET", "/api/explain" + query)
    assert response.status_code == status
    assert response.json()["error"]
    assert plane.asked == (status == 404), "what is wrong is not passed on"


def test_however_many_ask_why_the_coordinator_has_one_question_at_a_time() -> None:
    plane, clock = Plane(), [10.0]
    most = under_way = 0

    async def explain(question: dict[str, Any]) -> dict[str, Any]:
        nonlocal most, under_way
        under_way += 1
        most = max(most, under_way)
        try:
            return await Plane.explain(plane, question)
        finally:
            under_way -= 1

    plane.explain = explain  # type: ignore[method-assign]

    async def look() -> list[httpx.Response]:
        async with client_of(app_of(plane, now_s=lambda: clock[0])) as client:
            paths = [f"/api/explain?what=replica&target={target}" for target in ("r1", "node", "nobody")] * 20
            return await asyncio.gather(*(client.get(path) for path in paths))

    assert {r.status_code for r in asyncio.run(look())} == {200, 404}
    assert (most, plane.asked) == (1, 3)


def test_while_the_control_plane_is_away_why_is_answered_with_503() -> None:
    plane = Plane()
    plane.error = RuntimeError("the actor died")
    response = ask(app_of(plane), "GET", "/api/explain?what=replica&target=r1")
    assert response.status_code == 503
    assert response.json()["error"] == "control plane away: asking the coordinator failed: RuntimeError: the actor died"


def test_every_replica_and_node_has_a_button_that_asks_why() -> None:
    assert len(re.findall(r"whyButton\(\"(?:replica|node)\"", HTML)) == 2
    assert "api/explain?" in HTML


# ---------------------------------------------------------------- roles


READS = ["/api/status", "/api/history", "/api/explain?what=replica&target=r1", "/metrics"]


def test_what_is_read_is_all_that_the_page_has_to_read() -> None:
    routes = {route.path for route in app_of(Plane()).routes if "GET" in (getattr(route, "methods", None) or ())}
    assert routes == {"/", *(path.split("?")[0] for path in READS)}, (
        "a new one belongs into READS, so that it is tried without a token"
    )


@pytest.mark.parametrize("path", READS)
def test_with_a_token_for_looking_nobody_reads_without_one_of_the_two(path: str) -> None:
    app = app_of(Plane(), rights=GUARDED)
    refused = ask(app, "GET", path)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert ask(app, "GET", path, headers={"Authorization": "Bearer " + "x" * 20}).status_code == 401
    for headers in (LOOK_BEARER, BEARER):
        assert ask(app, "GET", path, headers=headers).status_code == 200
    assert ask(app, "GET", "/").status_code == 200, "the page itself, which knows nothing, asks for the token"


@pytest.mark.parametrize("path", READS)
def test_without_a_token_for_looking_reading_is_open(path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert ask(app_of(Plane()), "GET", path, headers=headers).status_code == 200


@pytest.mark.parametrize("order", ["drain", "release", "announce", "cancel"])
def test_who_may_look_may_not_order_and_the_attempt_is_written_down(order: str) -> None:
    plane = Plane()
    body = {"target": "node", "lasts_s": 5}
    response = ask(app_of(plane, rights=GUARDED), "POST", f"/api/{order}", json=body, headers=LOOK_BEARER)
    assert response.status_code == 403
    assert "for looking" in response.json()["error"]
    assert plane.orders == []
    (entry,) = plane.written
    assert entry["order"] == order
    assert entry["who"]["role"] == "look"
    assert entry["outcome"].startswith("refused")


def test_a_page_that_was_started_by_version_0_2_keeps_its_token() -> None:
    assert Rights.of(TOKEN) == RIGHTS
    assert Rights.of("") == Rights()


def test_a_client_with_many_wrong_tokens_has_to_wait_and_then_gets_in() -> None:
    plane, clock = Plane(), [0.0]
    app = app_of(plane, now_s=lambda: clock[0])
    wrong = {"Authorization": "Bearer " + "x" * 20}

    def drain(headers: dict[str, str]) -> httpx.Response:
        return ask(app, "POST", "/api/drain", json={"target": "r1"}, headers=headers)

    assert [drain(wrong).status_code for _ in range(12)] == [401] * 10 + [429] * 2
    locked = drain(BEARER)
    assert locked.status_code == 429, "guessing on would be no use: the right token is not looked at either"
    clock[0] += float(locked.headers["retry-after"])
    assert drain(BEARER).status_code == 200
    assert drain(BEARER).status_code == 200, "the right token costs nothing"


def test_orders_of_one_client_are_limited_and_others_are_not_concerned() -> None:
    plane, clock = Plane(), [0.0]
    app = app_of(plane, now_s=lambda: clock[0])

    async def burst(host: str, times: int) -> list[int]:
        transport = httpx.ASGITransport(app, client=(host, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8266") as client:
            sent = [await client.post("/api/drain", json={"target": "r1"}, headers=BEARER) for _ in range(times)]
            return [each.status_code for each in sent]

    assert asyncio.run(burst("10.0.0.1", 32)) == [200] * 30 + [429] * 2
    assert asyncio.run(burst("10.0.0.2", 1)) == [200]
    clock[0] += 1.0
    assert asyncio.run(burst("10.0.0.1", 2)) == [200, 429]


def test_however_many_clients_there_are_few_are_remembered() -> None:
    limits = Limits()
    for number in range(3 * MOST_CLIENTS):
        limits.orders(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}").take(0.0)
    assert len(limits) == MOST_CLIENTS


def test_a_client_is_an_address_or_a_network_of_one_machine() -> None:
    assert rights.client_of("10.0.0.1") == rights.client_of("::ffff:10.0.0.1") == "10.0.0.1"
    assert rights.client_of("fd00::1") == rights.client_of("fd00::ffff:1%eth0") == "fd00::/64"
    assert rights.client_of("fd00:0:0:1::1") != rights.client_of("fd00::1")
    assert rights.client_of("testclient") == "unknown"


def test_refused_tokens_are_told_of_in_the_log_now_and_then_without_the_token(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    clock = [0.0]
    app = app_of(Plane(), now_s=lambda: clock[0])
    guess = "guess-that-must-not-be-logged"
    for _ in range(20):
        ask(app, "POST", "/api/drain", json={"target": "r1"}, headers={"Authorization": f"Bearer {guess}"})
    said = [record.getMessage() for record in caplog.records if record.name == "serve_app.page.app"]
    assert said == ["page: requests with a wrong token: 1, the last one from 127.0.0.1"]
    assert guess not in caplog.text


def test_no_secret_is_in_what_the_page_logs_answers_or_holds(caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    """At the level DEBUG of everything: orders that are done, refused, malformed, and a coordinator that fails."""
    caplog.set_level("DEBUG")
    plane = Plane()
    served = Page("127.0.0.1", 0, GUARDED.plain(), find=lambda: handle_of(plane))

    async def run() -> str:
        texts = []
        address = await served.start()
        async with httpx.AsyncClient(trust_env=False) as client:
            for headers in (BEARER, LOOK_BEARER, {"Authorization": f"Bearer {TOKEN}x"}):
                for path in ("/", *READS):
                    texts.append((await client.get(address + path, headers=headers)).text)
                for body in (b'{"target": "r1"}', b'{"target": "nobody"}', b"{", b" " * 5000):
                    sent = await client.post(f"{address}/api/drain", content=body, headers=headers)
                    texts += [sent.text, str(sent.headers)]
            plane.error = RuntimeError("the coordinator is broken")
            with contextlib.suppress(httpx.HTTPError):
                texts.append((await client.post(f"{address}/api/drain", json={"target": "r1"}, headers=BEARER)).text)
        await served.stop()
        return "\n".join(texts)

    shown = asyncio.run(run()) + str(plane.orders) + str(plane.written) + repr(vars(served)) + repr(served._rights)
    ours = "\n".join(r.getMessage() + str(r.exc_text or "") for r in caplog.records if not r.name.startswith("http"))
    written = "".join(capfd.readouterr())  # uvicorn's own log goes there
    ours += written
    assert "broken" in written, "what went wrong is logged"
    for secret in (TOKEN, LOOK_TOKEN):
        assert secret not in shown
        assert secret not in ours


# ---------------------------------------------------------------- the actor, as a plain object


class Method:
    """`handle.method.remote(...)`, as Ray has it."""

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self.remote = call


def handle_of(plane: Plane) -> Any:
    return SimpleNamespace(status=Method(plane.status), order=Method(plane.order), write_down=Method(plane.write_down))


async def get(address: str, path: str, **kwargs: Any) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(address + path, **kwargs)


def test_the_page_listens_serves_and_stops() -> None:
    plane = Plane()

    async def run() -> None:
        served = Page("127.0.0.1", 0, RIGHTS.plain(), find=lambda: handle_of(plane))
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        address = await served.start()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address)
        assert await served.start() == address  # a second start finds the first
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        assert "Shadecast" in (await get(address, "/")).text
        assert (await get(address, "/api/status")).json()["epoch"] == 1
        assert (await get(address, "/", headers={"Host": "evil.example"})).status_code == 421
        async with httpx.AsyncClient(trust_env=False) as client:
            sent = await client.post(f"{address}/api/drain", json={"target": "r1"}, headers=BEARER)
        assert sent.json()["concerned"] == 1
        forever = asyncio.ensure_future(served.serve_forever())
        await asyncio.sleep(0)  # it waits now
        await asyncio.wait_for(served.stop(), 10)
        await asyncio.wait_for(forever, 10)
        with pytest.raises(httpx.ConnectError):
            await get(address, "/")
        assert len(asyncio.all_tasks()) == 1  # nothing pending at the end

    asyncio.run(run())


def test_a_coordinator_that_restarted_is_found_again() -> None:
    old, new, found = Plane(), Plane(), []
    old.error = RayActorError()

    def find() -> Any:
        found.append(1)
        if len(found) == 2:
            return None
        return handle_of(old if len(found) == 1 else new)

    async def run() -> None:
        served = Page("127.0.0.1", 0, RIGHTS.plain(), find=find)
        for reason in ("down or restarting", "no actor"):
            with pytest.raises(ControlPlaneAwayError, match=reason):
                await served._status()
        assert (await served._status())["epoch"] == 1
        assert (await served._order({"order": "drain", "target": "node"}))["concerned"] == 3
        assert len(found) == 3  # and kept while it answers

    asyncio.run(run())


def test_an_order_to_a_coordinator_of_an_older_version_says_what_to_do() -> None:
    served = Page("127.0.0.1", 0, RIGHTS.plain(), find=lambda: SimpleNamespace(status=Method(Plane().status)))
    with pytest.raises(ControlPlaneAwayError, match="older version: `shadecast down`, then `shadecast up`"):
        asyncio.run(served._order({"order": "drain", "target": "node"}))


def test_a_coordinator_that_does_not_answer_is_looked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_COORDINATOR_ANSWER_S", 0.02)
    found = []

    async def hang() -> None:
        await asyncio.Event().wait()

    def find() -> Any:
        found.append(1)
        return SimpleNamespace(status=Method(hang))

    async def run() -> None:
        served = Page("127.0.0.1", 0, RIGHTS.plain(), find=find)
        for _ in range(2):
            with pytest.raises(ControlPlaneAwayError, match="did not answer within"):
                await served._status()

    asyncio.run(run())
    assert len(found) == 2


def test_a_taken_port_is_one_error_that_names_it_and_says_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PageError) as caught:
            asyncio.run(Page("127.0.0.1", port, RIGHTS.plain(), find=lambda: None).start())
    message = str(caught.value)
    assert f"127.0.0.1:{port}" in message
    assert "another --page-port" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("host", "port", "reason"),
    [
        ("127.0.0.1", 70000, "from 0"),
        ("127.0.0.1", -1, "from 0"),
        ("192.0.2.1", 0, "--page-host"),
        ("999.1.1.1", 0, "--page-host"),
        ("http://10.0.0.1", 0, "--page-host"),
        ("10.0.0.1:8266", 0, "--page-host"),
        ("a" * 70, 0, "--page-host"),
    ],
)
def test_an_address_that_cannot_be_is_refused_by_name(host: str, port: int, reason: str) -> None:
    for listen in (Address(host, port).check, lambda _: asyncio.run(Page(host, port, RIGHTS.plain()).start())):
        with pytest.raises(PageError, match=reason) as caught:
            listen(None)
        assert f"{host}:{port}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_empty_host_is_not_taken_for_all_addresses() -> None:
    with pytest.raises(PageError, match="--page-host is empty"):
        Address().changed(" ", None, ())


def test_the_port_of_the_page_that_will_be_replaced_counts_as_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as own:
        address = Address("127.0.0.1", own.getsockname()[1])
        address.changed(None, None, ["head"]).check(address)
        with pytest.raises(PageError, match="taken"):
            address.check(None)


def test_a_starter_that_finds_the_page_running_learns_its_rights_and_where_it_listens() -> None:
    served = Page("0.0.0.0", 0, GUARDED.plain(), ["head"], find=lambda: None)
    assert Rights.of(asyncio.run(served.rights())) == GUARDED
    assert asyncio.run(served.address()) == ("0.0.0.0", 0, ("head",))


def test_a_failed_start_may_be_tried_again() -> None:
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            served = Page("127.0.0.1", other.getsockname()[1], RIGHTS.plain(), find=lambda: handle_of(Plane()))
            with pytest.raises(PageError):
                await served.start()
        assert (await get(await served.start(), "/")).status_code == 200
        await served.stop()

    asyncio.run(run())
