"""The thin ingress: reads HTTP requests of the Open Inference Protocol v2 and calls the model through its handle.

A router cannot copy a request whose body still streams through Serve's proxy; a request that this gateway has read is a
plain method call on the next hop, where `PredictiveRouter` picks and mirrors. No torch here, no user code: what reaches
a replica has been checked against the model's declared tensors, so bad input never counts as a replica's failure.
"""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from ray import serve
from starlette.requests import Request

from serve_app.gateway import openapi
from serve_app.gateway.codec import OFF_LOOP_BYTES, Codec
from serve_app.gateway.event_stream import EventStream, events, opened
from serve_app.gateway.grpc_service import InferenceRpcs, InferenceService
from serve_app.gateway.http_app import make_app
from serve_app.gateway.model_call import CallOptions, ModelCaller, call_options, retry_budget, sequence_id
from serve_app.gateway.model_server import ModelInfo
from serve_app.gateway.oip import HEADER_LENGTH, parse_json_object
from serve_app.gateway.readiness import Readiness
from serve_app.gateway.triton import NOT_OFFERED, Statistics, index_entry, model_config
from serve_app.http_guard import BodyReader, compression_asked
from serve_app.protocol_error import ProtocolError
from serve_app.ray_api import route_in_this_loop

logger = logging.getLogger("ray.serve")

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "generate",
    "model_configuration",
    "model_repository",
    "parameters",
    "statistics",
)
"""Those of Triton's that are offered, by Triton's names."""
TIMEOUT_HEADER = "x-request-timeout-seconds"
"""Serve's own header; its proxy stops waiting after that time with a 408."""
_PROXY_MARGIN_S = 0.05
SESSION_HEADER = "x-session-id"
"""Serve's default; `RAY_SERVE_SESSION_ID_HEADER_KEY` changes it for Serve and for the gateway."""


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Limits of the gateway, validated by `serve_app.app.AppArgs`."""

    max_body_bytes: int = 16 * 2**20
    max_total_body_bytes: int = 512 * 2**20
    body_idle_timeout_s: float = 10.0
    request_timeout_s: float = 60.0
    queue_timeout_s: float = 10.0
    retry_fraction: float = 0.2
    session_header: str = SESSION_HEADER
    session_cookie: str = ""
    allow_origins: tuple[str, ...] = ()
    """Whose pages may call from a browser: origins, or "*" for all; nobody's by default."""
    stream_keepalive_s: float = 0.0
    """Streams answer at once and get a comment whenever nothing came for so long; 0 is off."""
    scales_to_zero: bool = False
    """The model may have no replica: it is ready without one, and requests wait until one has started."""


_MEDIA = ("application/json", "application/octet-stream", "application/x-www-form-urlencoded")
Ready = Callable[[], Awaitable[bool]]


class InferenceApi:
    """The protocol's endpoints over a `ModelCaller`: requests in, responses out."""

    def __init__(self, caller: ModelCaller, info: ModelInfo, settings: GatewaySettings, ready: Ready) -> None:
        self._caller = caller
        self.info = info
        self._settings = settings
        self._ready = ready
        self._codec = Codec(settings.request_timeout_s)
        self.statistics = Statistics()
        self.session_header = settings.session_header
        self.allow_origins = settings.allow_origins
        self.bodies = BodyReader(
            settings.max_body_bytes,
            settings.max_total_body_bytes,
            settings.body_idle_timeout_s,
            settings.request_timeout_s,
        )

    # ------------------------------------------------ health and metadata

    async def live(self, _: Request) -> Response:
        """The process answers."""
        return JSONResponse({"live": True})

    async def ready(self, _: Request) -> Response:
        """A replica of the model runs."""
        if not await self._ready():
            raise ProtocolError(503, "no replica of the model is running yet", {"Retry-After": "1"})
        return JSONResponse({"ready": True})

    async def server_metadata(self, _: Request) -> Response:
        """Name, version and extensions of the server."""
        return JSONResponse({"name": openapi.SERVER_NAME, "version": openapi.VERSION, "extensions": list(EXTENSIONS)})

    async def model_metadata(self, request: Request) -> Response:
        """The model's tensors."""
        self._check_model(request)
        return JSONResponse(self.info.describe())

    async def model_ready(self, request: Request) -> Response:
        """A replica of this model runs."""
        self._check_model(request)
        if not await self._ready():
            raise ProtocolError(503, f"no replica of model {self.info.name!r} is running yet", {"Retry-After": "1"})
        return JSONResponse({"name": self.info.name, "ready": True})

    async def model_config(self, request: Request) -> Response:
        """Triton's model configuration."""
        self._check_model(request)
        return JSONResponse(model_config(self.info))

    async def model_statistics(self, request: Request) -> Response:
        """Triton's statistics of the model, or of all models, which is the same: counted in this gateway."""
        if "model" in request.path_params:
            self._check_model(request)
        return JSONResponse(self.statistics.describe(self.info))

    async def repository_index(self, request: Request) -> Response:
        """Triton's list of the models that there are."""
        async with self._body(request) as body:
            asked = parse_json_object(body) if body else {}
        only_ready = asked.get("ready")
        if not isinstance(only_ready, bool | None):
            raise ProtocolError(400, "'ready' must be true or false")
        ready = await self._ready()
        return JSONResponse([index_entry(self.info, ready=ready)] if ready or not only_ready else [])

    async def not_loaded(self, request: Request) -> Response:
        """Models are not loaded and unloaded by clients here."""
        self.info.check_served(request.path_params["model"], None)
        action = request.url.path.rsplit("/", 1)[-1]
        raise ProtocolError(403, f"{action}: models come and go with their Serve application here (serve deploy)")

    async def not_offered(self, request: Request) -> Response:
        """Extensions of Triton's that are not there."""
        name = next(part for part in request.url.path.split("/") if part in NOT_OFFERED)
        raise ProtocolError(400, f"{NOT_OFFERED[name]} is an extension that this server does not offer")

    async def not_v1(self, request: Request) -> Response:
        """The protocol before this one."""
        raise ProtocolError(
            404, f"{request.url.path[:80]}: this server speaks version 2 only: POST /v2/models/{self.info.name}/infer"
        )

    # ------------------------------------------------ inference

    async def infer(self, request: Request) -> Response:
        """One inference, JSON or binary."""
        self._check_model(request)
        if not self.info.infers:
            raise ProtocolError(400, f"model {self.info.name!r} has no infer: POST its /generate")
        with self.statistics.request() as timed:
            async with self._body(request) as body:
                length = request.headers.get(HEADER_LENGTH)
                timed.begins()
                begun_s = time.monotonic()
                asked = await self._codec.decode(body, length, self.info.inputs, self.info.outputs)
                timed.ends("compute_input")
                options = self._options(request, asked.parameters, begun_s if len(body) >= OFF_LOOP_BYTES else None)
                outputs = await self._caller.infer(asked.inputs, dict(asked.parameters), options)
                timed.ends("compute_infer")
                answer = await self._codec.encode(asked, outputs, self.info.name, self.info.version)
                timed.ends("compute_output")
            timed.succeeded()
        coding = compression_asked(request.headers.get("accept-encoding", ""))
        content = await self.bodies.compress(answer.body, coding) if coding else answer.body
        headers = {} if answer.header_length is None else {HEADER_LENGTH: str(answer.header_length)}
        if coding:
            headers |= {"Content-Encoding": coding, "Vary": "Accept-Encoding"}
        media = "application/json" if answer.header_length is None else "application/octet-stream"
        return self._with_cookie(Response(content, headers=headers, media_type=media), request, options)

    async def generate(self, request: Request) -> Response:
        """One generation as one JSON object: texts joined, the last value of everything else."""
        self._check_generates(request)
        with self.statistics.request() as timed:
            async with self._asked(request) as (asked, whole, options):
                stream = await self._caller.stream(whole, options)
            merged: dict[str, Any] = {}
            try:
                async for item in stream.items():
                    for key, value in self._event(item, asked).items():
                        joined = key == "text_output" and isinstance(merged.get(key), str) and isinstance(value, str)
                        merged[key] = merged[key] + value if joined else value
            finally:
                stream.close()
            response = Response(_dumps(merged), media_type="application/json")
            timed.succeeded()
        return self._with_cookie(response, request, options)

    async def generate_stream(self, request: Request) -> Response:
        """One generation as server-sent events, each with a JSON object."""
        self._check_generates(request)
        async with AsyncExitStack() as held:
            timed = held.enter_context(self.statistics.request())
            if self._settings.stream_keepalive_s:  # the answer begins now, the call with it
                asked, whole, options = await held.enter_async_context(self._asked(request))
                open_ = partial(self._caller.stream, whole, options)
            else:
                async with self._asked(request) as (asked, whole, options):
                    stream = await self._caller.stream(whole, options)
                held.callback(stream.close)
                open_ = partial(opened, stream)
            chunks = events(open_, partial(self._encoded, asked), self._settings.stream_keepalive_s, timed.succeeded)
            response = EventStream(chunks, held.pop_all())
        return self._with_cookie(response, request, options)

    def _encoded(self, asked: Mapping[str, Any], item: Any) -> str:
        return _dumps(self._event(item, asked))

    def _check_generates(self, request: Request) -> None:
        self._check_model(request)
        if not self.info.generates:
            raise ProtocolError(400, f"model {self.info.name!r} has no generate: POST its /infer")

    @asynccontextmanager
    async def _asked(self, request: Request) -> AsyncIterator[tuple[dict[str, Any], Any, CallOptions]]:
        """A generate request: what the gateway reads of it, what goes to the model, and the call's options."""
        async with self._body(request) as body:
            begun_s = time.monotonic()
            asked, whole = await self._codec.parse(body)
            parameters = asked.get("parameters")
            if not isinstance(parameters, dict | None):
                raise ProtocolError(400, "'parameters' of the request must be an object")
            if not isinstance(asked.get("id"), str | None):
                raise ProtocolError(400, "'id' must be a string")
            options = self._options(request, parameters or {}, begun_s if len(body) >= OFF_LOOP_BYTES else None)
            yield asked, whole, options

    def _event(self, item: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
        """An item of the model's stream as the object that goes to the client."""
        event = {"model_name": self.info.name, "model_version": self.info.version}
        if isinstance(asked.get("id"), str):
            event["id"] = asked["id"]
        if isinstance(item, Mapping):
            return event | {str(key): value for key, value in item.items()}
        if isinstance(item, str):
            return event | {"text_output": item}
        raise ProtocolError(500, f"the model's stream gave {type(item).__name__}; it must give dicts or strings")

    # ------------------------------------------------ what a request brings

    def _check_model(self, request: Request) -> None:
        self.info.check_served(request.path_params["model"], request.path_params.get("version"))

    def _body(self, request: Request) -> Any:
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # curl says that it sends a form unless told otherwise, and examples of Triton's do not tell it
        if media not in ("", *_MEDIA) and not media.endswith("+json"):
            raise ProtocolError(415, f"Content-Type {media[:80]!r}: send application/json or application/octet-stream")
        headers = request.headers
        encoding = ", ".join(headers.getlist("content-encoding"))  # on several lines it is one list
        return self.bodies.read(request.receive, headers.get("content-length"), encoding)

    def _options(self, request: Request, parameters: Mapping[str, Any], begun_s: float | None = None) -> CallOptions:
        """Options of the call. What a large request, read since `begun_s`, took of its time is gone."""
        limits = [self._settings.request_timeout_s]
        header = request.headers.get(TIMEOUT_HEADER)
        if header is not None:
            limits.append(max(_seconds(header) - _PROXY_MARGIN_S, 0.001))
        options = call_options(parameters, limits, self._session(request, parameters))
        if begun_s is None:
            return options
        return replace(options, timeout_s=max(options.timeout_s - (time.monotonic() - begun_s), 0.001))

    def _session(self, request: Request, parameters: Mapping[str, Any]) -> str:
        """The session's id: Serve's header (`-` and `_` alike), Triton's sequence id, the cookie, a new one for it."""
        header = self.session_header
        session_id = request.headers.get(header) or request.headers.get(header.replace("-", "_"), "")
        session_id = session_id or sequence_id(parameters)
        if session_id or not self._settings.session_cookie:
            return session_id
        cookie = request.cookies.get(self._settings.session_cookie, "")
        if 0 < len(cookie) <= 128 and cookie.isascii() and cookie.isprintable():
            return cookie
        request.state.new_session = uuid.uuid4().hex
        return str(request.state.new_session)

    def _with_cookie(self, response: Response, request: Request, options: CallOptions) -> Response:
        if options.session_id and options.session_id == getattr(request.state, "new_session", None):
            response.set_cookie(self._settings.session_cookie, options.session_id, httponly=True, samesite="lax")
        return response


@serve.ingress()
class Gateway(InferenceRpcs):
    """The class of Serve's ingress deployment. `model` is the handle of the `ModelServer` deployment."""

    def __init__(self, model: Any, info: ModelInfo, settings: GatewaySettings) -> None:
        route_in_this_loop(model)
        budget = retry_budget(settings.retry_fraction)
        ready = Readiness(model.app_name, model.deployment_name, scales_to_zero=settings.scales_to_zero)
        waits = ready.may_start if settings.scales_to_zero else None
        queue_timeout_s, repeats = settings.queue_timeout_s, info.safe_to_repeat
        caller = ModelCaller(model, time.monotonic, queue_timeout_s, repeats, budget, may_start=waits)
        self._api = InferenceApi(caller, info, settings, ready)
        self._service = InferenceService(
            caller, info, settings, ready, bodies=self._api.bodies, statistics=self._api.statistics
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application of this replica, made once it is constructed."""
        return make_app(self._api)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise ProtocolError(400, f"header {TIMEOUT_HEADER} = {text[:40]!r}: must be seconds above 0")
    return value


def _dumps(value: Any) -> str:
    """JSON without NaN; arrays and numpy numbers as lists and numbers. Raises ProtocolError (500)."""
    try:
        return json.dumps(value, allow_nan=False, default=_plain, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ProtocolError(500, f"the model's answer does not fit into JSON: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, bytes):
        return value.decode()
    raise TypeError(f"{type(value).__name__} is not JSON")
