"""The live page of the control plane: HTML, JSON and Prometheus metrics; orders with a token (docs/decisions/0080).

Reading is open where no token for it is set, so the page binds to loopback unless told otherwise, and answers only to
host names of its own: a web page elsewhere whose name is made to resolve to this address (DNS rebinding) gets nothing.
`/metrics` may be asked by any IP address, as Prometheus does with pods: what is made to resolve is always a name.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from importlib import resources
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

from serve_app.http_guard import App, Receive, Scope, Send, send_error
from serve_app.page.address import Address, host_name, is_ip_address, is_name
from serve_app.page.metrics import prometheus_text
from serve_app.page.rights import ORDERS_PER_S, WRONG_TOKENS_PER_S, Caller, Limits, Rights, Role, bearer, retry_after_s
from serve_app.page.watch import ControlPlaneAwayError, Explanations, Watch
from serve_app.protocol_error import ProtocolError

logger = logging.getLogger(__name__)

_MAX_BODY_BYTES = 4096
_LONGEST_ID = 512
_SAY_S = 10.0
"""Refused tokens are told of in the log at most so often."""
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Target(BaseModel):
    """Body of an order: a replica id, or a node id for all replicas on it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    target: str = Field(min_length=1, max_length=512)


class Announced(Target):
    """Body of an announcement: something will take a part of a node for some time."""

    starts_in_s: float = Field(default=0.0, allow_inf_nan=False)
    lasts_s: float = Field(allow_inf_nan=False)
    strength: float = Field(default=1.0, allow_inf_nan=False)


_BODIES: Mapping[str, type[Target]] = {"drain": Target, "release": Target, "announce": Announced, "cancel": Target}


def make_app(
    status: Callable[[], Awaitable[dict[str, Any]]],
    order: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]],
    rights: Rights,
    *,
    write_down: Callable[[dict[str, Any]], Awaitable[None]] | None = None,
    explain: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]] | None = None,
    address: Address | None = None,
    now_s: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """The page's application.

    `status()` is the coordinator's status; it may raise anything while that is away. `order`, `write_down` and
    `explain` are the coordinator's, too. `address` says by which names clients may ask.
    """
    watch = Watch(status, now_s)
    html = resources.files("serve_app.page").joinpath("page.html").read_text(encoding="utf-8")
    page_headers = {**_HEADERS, "Content-Security-Policy": _content_policy(html)}

    @contextlib.asynccontextmanager
    async def watching(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.get_running_loop().create_task(watch.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    door = _Door(rights, now_s)
    explanations = Explanations(explain, now_s)

    async def may_look(request: Request) -> None:
        """For every route but the page itself, which knows nothing; orders look at the token themselves."""
        if request.method != "POST" and request.url.path != "/":
            door.admit(request, Role.LOOK)

    app = FastAPI(
        title="Shadecast",
        lifespan=watching,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(may_look)],
    )
    app.state.watch = watch
    app.add_middleware(_HostGuard, address=address or Address())

    @app.exception_handler(ControlPlaneAwayError)
    async def away(_: Request, error: Exception) -> Response:
        return _json({"error": f"control plane away: {error}"}, 503, {"Retry-After": "1"})

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return _json({"error": error.detail}, error.status_code, dict(error.headers or {}))

    @app.get("/")
    async def page() -> Response:
        return Response(html, media_type="text/html", headers=page_headers)

    @app.get("/api/status")
    async def latest() -> Response:
        return _json(await watch.latest())

    @app.get("/api/history")
    async def history() -> Response:
        return _json(watch.history())

    @app.get("/api/explain")
    async def explained(what: str = "", target: str = "") -> Response:
        return _json(await _explained(explanations, what, target))

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        accept = request.headers.get("accept", "")
        try:
            text, content_type = prometheus_text(await watch.latest(), accept)
        except ControlPlaneAwayError:
            text, content_type = prometheus_text(None, accept)
        return Response(text, headers={**_HEADERS, "Content-Type": content_type})

    @app.post("/api/{what}")
    async def ordered(request: Request, what: str) -> Response:
        body = _BODIES.get(what)
        if body is None:
            raise HTTPException(404, "Not Found")
        caller = door.admit(request, Role.OPERATE)
        who = {"role": caller.role.value, "by": "page", "token": caller.fingerprint, "client": _client(request)}
        if caller.role is not Role.OPERATE:
            reason = "this token is for looking; orders need the one for operating"
            if write_down is not None:
                await write_down({"order": what, "who": who, "outcome": f"refused: {reason}"})
            raise HTTPException(403, reason)
        wanted = await _read_body(request, body)
        answer = await order({"order": what, **wanted.model_dump(), "who": who})
        if "refused" in answer:
            hint = "; /api/status lists them" if answer.get("unknown") else ""
            raise HTTPException(404 if answer.get("unknown") else 422, f"{answer['refused']}{hint}")
        return _json(answer)

    return app


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    body = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Response(body, status, {**_HEADERS, **(headers or {})}, "application/json")


def _content_policy(html: str) -> str:
    """Only the page's own script and style run, and it talks to nobody but its own server."""

    def hashed(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _explained(explanations: Explanations, what: str, target: str) -> dict[str, Any]:
    if what not in ("replica", "node") or not 0 < len(target) <= _LONGEST_ID:
        raise HTTPException(422, "ask for /api/explain?what=replica&target=ID, or what=node")
    answer = await explanations.of(what, target)
    if "refused" in answer:
        raise HTTPException(404 if answer.get("unknown") else 503, str(answer["refused"]))
    return answer


class _Door:
    """Looks at tokens, and counts those that are wrong, and orders, of each client."""

    def __init__(self, rights: Rights, now_s: Callable[[], float]) -> None:
        self._rights, self._now_s = rights, now_s
        self._limits = Limits()
        self._refused, self._said_s = 0, -math.inf

    def admit(self, request: Request, role: Role) -> Caller:
        """Who asks; whoever has a token may look. Raises HTTPException: 401, 403, 429."""
        if role is Role.LOOK and not self._rights.look:
            return Caller(Role.LOOK, "")
        if role is Role.OPERATE and not self._rights.operate:
            raise HTTPException(403, "this page was started without a token for orders: it shows, and takes none")
        client = _client(request)
        caller = self._caller(client, bearer(request.headers.get("authorization", "")), role)
        if role is Role.OPERATE and not self._limits.orders(client).take(self._now_s()):
            raise HTTPException(429, "too many orders", {"Retry-After": retry_after_s(ORDERS_PER_S)})
        return caller

    def _caller(self, client: str, token: str, role: Role) -> Caller:
        challenge = {"WWW-Authenticate": "Bearer"}
        if not token:
            what = "orders need" if role is Role.OPERATE else "reading needs"
            raise HTTPException(401, f"{what} the header `Authorization: Bearer <token>`", challenge)
        wrong = self._limits.wrong_tokens(client)
        if not wrong.take(self._now_s()):
            self._say(client)
            raise HTTPException(429, "too many wrong tokens", {"Retry-After": retry_after_s(WRONG_TOKENS_PER_S)})
        caller = self._rights.caller(token)
        if caller is None:
            self._say(client)
            raise HTTPException(401, "the token is none of this page's", challenge)
        wrong.give_back()
        return caller

    def _say(self, client: str) -> None:
        self._refused += 1
        if self._now_s() - self._said_s >= _SAY_S:
            logger.warning("page: requests with a wrong token: %d, the last one from %s", self._refused, client)
            self._refused, self._said_s = 0, self._now_s()


def _client(request: Request) -> str:
    return request.client.host if request.client is not None else "unknown"


async def _read_body(request: Request, kind: type[Target]) -> Target:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise HTTPException(413, f"the body has more than {_MAX_BODY_BYTES} bytes")
    try:
        return kind.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        example = {"target": "<node id>" if kind is Announced else "<replica or node id>"}
        more = {"starts_in_s": 60, "lasts_s": 600} if kind is Announced else {}
        raise HTTPException(422, f"{where}: {first['msg']}. Send {json.dumps({**example, **more})}") from error


class _HostGuard:
    """Refuses requests (421) whose Host is no name of the page; to read metrics, any IP address will do."""

    def __init__(self, app: App, address: Address) -> None:
        self._app = app
        self._address = address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        name, arrived_at = host_name(given), (scope.get("server") or ("",))[0]
        scraped = scope["path"] == "/metrics" and scope["method"] == "GET" and is_ip_address(name)
        if scraped or self._address.is_own(name, arrived_at):
            await self._app(scope, receive, send)
        else:
            shown = name if is_name(name) else "NAME"
            reason = f"Host {given[:100]!r} is no name of this page: ask by its address. If the name is yours, allow it"
            await send_error(ProtocolError(421, f"{reason}: shadecast up --page-allow-host {shown}"), send)
