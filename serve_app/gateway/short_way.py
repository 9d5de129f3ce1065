"""The frequent requests' way past FastAPI's middlewares and routes, which take a third of the gateway's own time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from serve_app.http_guard import App, Receive, Scope, Send
from serve_app.protocol_error import ProtocolError

Endpoint = Callable[[Request], Awaitable[Response]]
OnError = Callable[[Request, Exception], Awaitable[Response]]


class ShortWayApp(FastAPI):
    """A FastAPI application that hands POSTs of some exact paths to an application each, and does all others itself."""

    short_way: Mapping[str, App] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] == "http" and scope["method"] == "POST":
            path: str = scope["path"]
            root: str = scope.get("root_path", "")
            short = self.short_way.get(path.removeprefix(root) if root else path)
            if short is not None:
                await short(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


def endpoint_app(endpoint: Endpoint, path_params: Mapping[str, str], refused: OnError, failed: OnError) -> App:
    """`endpoint` as an application: `refused` answers its ProtocolErrors, `failed` all others.

    Those are raised again afterwards, as FastAPI does, so that Serve logs them.
    """

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["path_params"] = dict(path_params)
        request = Request(scope, receive, send)
        try:
            response = await endpoint(request)
        except ProtocolError as error:
            response = await refused(request, error)
        except Exception as error:
            await (await failed(request, error))(scope, receive, send)
            raise
        await response(scope, receive, send)

    return app
