"""The live page of the control plane: HTML, JSON and Prometheus metrics; orders to drain and release with a token.

Reading is open, so the page binds to loopback unless told otherwise, and answers only to host names of its own: a web
page elsewhere whose name is made to resolve to this address (DNS rebinding) gets nothing. `/metrics` may be asked by
any IP address, as Prometheus does with pods: what is made to resolve is always a name.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import ray
import uvicorn
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.exceptions import RayActorError
from starlette.exceptions import HTTPException

from serve_app.coordinator import COORDINATOR, find_coordinator
from serve_app.http_guard import App, Receive, Scope, Send, send_error
from serve_app.page.address import Address, PageError, host_name, is_ip_address, is_name
from serve_app.page.metrics import prometheus_text
from serve_app.page.watch import ControlPlaneAwayError, Watch, one_line
from serve_app.protocol_error import ProtocolError

logger = logging.getLogger(__name__)

_MAX_BODY_BYTES = 4096
_COORDINATOR_ANSWER_S = 3.0
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Target(BaseModel):
    """Body of an order: a replica id, or a node id for all replicas on it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    target: str = Field(min_length=1, max_length=512)


def make_app(
    status: Callable[[], Awaitable[dict[str, Any]]],
    command: Callable[[str, bool], Awaitable[int]],
    token: str,
    *,
    address: Address | None = None,
    now_s: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """The page's application.

    `status()` is the coordinator's status; it may raise anything while that is away. `command(target, drain)`
    returns the number of connections concerned. Without a `token` no order is taken. `address` says by which names
    clients may ask.
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

    app = FastAPI(title="Shadecast", lifespan=watching, openapi_url=None, docs_url=None, redoc_url=None)
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

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        accept = request.headers.get("accept", "")
        try:
            text, content_type = prometheus_text(await watch.latest(), accept)
        except ControlPlaneAwayError:
            text, content_type = prometheus_text(None, accept)
        return Response(text, headers={**_HEADERS, "Content-Type": content_type})

    async def order(request: Request, drain: bool) -> Response:
        _authorise(request.headers.get("authorization", ""), token)
        target = await _read_target(request)
        concerned = await command(target, drain)
        if concerned == 0:
            raise HTTPException(404, f"no replica or node has the id {target!r}; /api/status lists them")
        return _json({"target": target, "drain": drain, "concerned": concerned})

    @app.post("/api/drain")
    async def drain(request: Request) -> Response:
        return await order(request, drain=True)

    @app.post("/api/release")
    async def release(request: Request) -> Response:
        return await order(request, drain=False)

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


def _authorise(header: str, token: str) -> None:
    """Raises HTTPException unless the header is `Bearer <token>`, in time that does not depend on where they differ."""
    if not token:
        raise HTTPException(403, "this page was started without a token: it shows, and takes no orders")
    scheme, _, given = header.partition(" ")
    challenge = {"WWW-Authenticate": "Bearer"}
    if scheme.lower() != "bearer" or not given.strip():
        reason = "orders need the header `Authorization: Bearer <token>`; the control plane printed the token at start"
        raise HTTPException(401, reason, challenge)
    if not hmac.compare_digest(given.strip().encode(errors="replace"), token.encode(errors="replace")):
        raise HTTPException(401, "the token is not the one that the control plane printed at start", challenge)


async def _read_target(request: Request) -> str:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise HTTPException(413, f"the body has more than {_MAX_BODY_BYTES} bytes")
    try:
        return Target.model_validate_json(bytes(body)).target
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise HTTPException(422, f'{where}: {first["msg"]}. Send {{"target": "<replica or node id>"}}') from error


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


# ---------------------------------------------------------------- the actor


class Page:
    """The page as an async actor: wrap with `ray.remote`, then call `start` (again after a failure, if you like)."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8266,
        token: str = "",
        names: Sequence[str] = (),
        find: Callable[[], Any | None] = find_coordinator,
    ) -> None:
        """As `Address`. `find` looks the coordinator up; it may block, and returns None for none."""
        self._address = Address(host, port, tuple(names))
        self._token = token
        self._find = find
        self._coordinator: Any = None
        self._running: _Running | None = None
        _start_again_after_restart()

    async def start(self) -> str:
        """Listen, and return the address, `http://host:port`; at once where it listens already. Raises PageError."""
        running = self._running = self._running or self._listen()
        ready = asyncio.ensure_future(running.server.ready.wait())
        await asyncio.wait({ready, running.serving}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if running.serving.done():
            self._running = None
            raise PageError(f"page at {running.address}: the server stopped; its log says why")
        return running.address

    async def address(self) -> tuple[str, int, tuple[str, ...]]:
        """What `Address` it was started with, for a starter that found this page running."""
        return self._address.host, self._address.port, self._address.names

    async def serve_forever(self) -> None:
        """Start, and return only when the server has ended."""
        await self.start()
        if self._running is not None:
            await asyncio.shield(self._running.serving)

    async def token(self) -> str:
        """What orders need, for a starter that found this page running; who can call the actor may order anyway."""
        return self._token

    async def stop(self) -> None:
        """Stop listening, and wait until that is done."""
        running, self._running = self._running, None
        if running is not None:
            running.server.should_exit = True
            await running.serving

    def _listen(self) -> _Running:
        listener = self._address.listen()
        app = make_app(self._status, self._command, self._token, address=self._address)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=2,
        )
        server = _Server(config)
        serving = asyncio.get_running_loop().create_task(server.serve(sockets=[listener]))
        return _Running(server, serving, self._address.url(listener.getsockname()[1]))

    async def _status(self) -> dict[str, Any]:
        status: dict[str, Any] = await self._call("status")
        return status

    async def _command(self, target: str, drain: bool) -> int:
        return int(await self._call("command", target, drain))

    async def _call(self, method: str, *args: Any) -> Any:
        """Ask the coordinator, found anew after it did not answer. Raises ControlPlaneAwayError."""
        try:
            async with asyncio.timeout(_COORDINATOR_ANSWER_S):
                if self._coordinator is None:
                    self._coordinator = await asyncio.to_thread(self._find)
                if self._coordinator is None:
                    raise ControlPlaneAwayError(f"no actor {COORDINATOR!r} on this cluster; `shadecast up` starts one")
                return await getattr(self._coordinator, method).remote(*args)
        except TimeoutError as error:
            self._coordinator = None
            reason = f"the coordinator did not answer within {_COORDINATOR_ANSWER_S:g} s"
            raise ControlPlaneAwayError(reason) from error
        except RayActorError as error:
            self._coordinator = None
            raise ControlPlaneAwayError(f"the coordinator is down or restarting ({one_line(error)})") from error


def _start_again_after_restart() -> None:
    """Where Ray has restarted this actor, nobody else would call `start`: queue that call for after the constructor."""
    if not ray.is_initialized():
        return
    context = ray.get_runtime_context()
    if context.get_actor_id() is not None and context.was_current_actor_reconstructed:
        context.current_actor.start.remote()


@dataclass(frozen=True, slots=True)
class _Running:
    server: _Server
    serving: asyncio.Task[None]
    address: str


class _Server(uvicorn.Server):
    """uvicorn inside somebody else's event loop: leaves signals alone, says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to Ray's worker."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self.ready.set()
