"""The HTTP application around an `InferenceApi`: its routes, error bodies, header limits and request ids."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, cast

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve_app.gateway import openapi
from serve_app.gateway.oip import HEADER_LENGTH
from serve_app.gateway.short_way import ShortWayApp, endpoint_app
from serve_app.gateway.triton import NOT_OFFERED
from serve_app.http_guard import ID_HEADERS, App, HeaderGuard, RequestIds
from serve_app.protocol_error import ProtocolError

if TYPE_CHECKING:
    from serve_app.gateway.ingress import InferenceApi


def make_app(api: InferenceApi) -> ShortWayApp:
    """The HTTP application around `api`: routes, error bodies, header limits, request ids."""
    app = ShortWayApp(
        title="Open Inference Protocol v2", version=openapi.VERSION, redirect_slashes=False, redoc_url=None
    )
    routes: list[tuple[str, str, Callable[..., Awaitable[Response]]]] = [
        ("GET", "/v2", api.server_metadata),
        ("GET", "/v2/health/live", api.live),
        ("GET", "/v2/health/ready", api.ready),
        ("GET", "/v2/models/stats", api.model_statistics),
        ("POST", "/v2/repository/index", api.repository_index),
        ("POST", "/v2/repository/models/{model}/load", api.not_loaded),
        ("POST", "/v2/repository/models/{model}/unload", api.not_loaded),
    ]
    for base in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        routes += [
            ("GET", base, api.model_metadata),
            ("GET", f"{base}/ready", api.model_ready),
            ("GET", f"{base}/config", api.model_config),
            ("GET", f"{base}/stats", api.model_statistics),
            ("POST", f"{base}/infer", api.infer),
            ("POST", f"{base}/generate", api.generate),
            ("POST", f"{base}/generate_stream", api.generate_stream),
        ]
    for method, path, endpoint in routes:
        app.add_api_route(path, endpoint, methods=[method], **openapi.describe(method, path, api.info))
        if method == "GET":
            app.add_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
    elsewhere = [f"/v2/{name}{rest}" for name in NOT_OFFERED for rest in ("", "/{rest:path}")]
    for path in (*elsewhere, "/v2/models/{model}/trace/setting"):
        app.add_route(path, api.not_offered, methods=["GET", "POST"], include_in_schema=False)
    for path in ("/v1/models", "/v1/models/{rest:path}"):
        app.add_route(path, api.not_v1, methods=["GET", "POST"], include_in_schema=False)
    app.add_exception_handler(ProtocolError, _refused)
    app.add_exception_handler(HTTPException, _not_routed)
    app.add_exception_handler(Exception, _failed)
    id_headers = (*ID_HEADERS, api.session_header.encode())
    app.add_middleware(HeaderGuard, id_headers=id_headers)
    app.add_middleware(RequestIds)
    if api.allow_origins:
        methods = ("GET", "HEAD", "POST")
        app.add_middleware(
            CORSMiddleware,
            allow_origins=api.allow_origins,
            allow_methods=methods,
            allow_headers=("*",),
            expose_headers=(HEADER_LENGTH, "X-Request-Id", "Retry-After"),
        )
        return app
    model = {"model": api.info.name}
    short_way: dict[str, App] = {}
    for base, names in (("", model), (f"/versions/{api.info.version}", model | {"version": api.info.version})):
        for name, endpoint in (("infer", api.infer), ("generate_stream", api.generate_stream)):
            short = endpoint_app(endpoint, names, _refused, _failed)
            short_way[f"/v2/models/{api.info.name}{base}/{name}"] = RequestIds(HeaderGuard(short, id_headers))
    app.short_way = short_way
    return app


async def _refused(_: Request, error: Exception) -> Response:
    refusal = cast(ProtocolError, error)
    return JSONResponse({"error": refusal.reason}, status_code=refusal.status, headers=refusal.headers)


async def _not_routed(request: Request, error: Exception) -> Response:
    missed = cast(HTTPException, error)
    reason = f"{request.method[:20]} {request.url.path[:200]}: {missed.detail}; the API is described at /docs"
    return JSONResponse({"error": reason}, status_code=missed.status_code, headers=missed.headers)


async def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"the gateway failed: {type(error).__name__}"}, status_code=500)
