"""Stand-ins for Serve's handles and replicas, and an HTTP client without a network."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import grpc
import httpx
import tritonclient.grpc.aio as triton

from serve_app.gateway.grpc_service import InferenceRpcs, InferenceService
from serve_app.gateway.http_app import make_app
from serve_app.gateway.ingress import GatewaySettings, InferenceApi
from serve_app.gateway.model_call import ModelCaller, retry_budget
from serve_app.gateway.model_server import ModelInfo
from serve_app.gateway.tensors import TensorSpec
from serve_app.grpc_proxy import add_inference_service

INFO = ModelInfo(
    name="digits",
    platform="pytorch",
    inputs=(TensorSpec("pixels", "FP32", (-1, 2), finite=True),),
    outputs=(TensorSpec("digit", "INT64", (-1,)),),
    generates=True,
)


class FakeResponse:
    """Like a DeploymentResponse: awaitable or an asynchronous iterator, with `cancel`."""

    def __init__(self, produce: Any) -> None:
        self._produce = produce
        self.cancelled = False

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def _answer(self) -> Any:
        if isinstance(self._produce, BaseException):
            raise self._produce
        return await self._produce if inspect.isawaitable(self._produce) else self._produce

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if isinstance(self._produce, BaseException):
            raise self._produce
        return await anext(self._produce)

    def cancel(self) -> None:
        self.cancelled = True


class FakeHandle:
    """Like a DeploymentHandle: each call takes the next of `answers`, the last one for ever.

    An answer is a value, an exception, a coroutine or asynchronous generator, or a function of the call's arguments
    that gives one of these.
    """

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)
        self.calls: list[tuple[dict[str, Any], tuple[Any, ...]]] = []
        self.responses: list[FakeResponse] = []
        self._root = self
        self._options: dict[str, Any] = {}

    def options(self, **options: Any) -> FakeHandle:
        other = FakeHandle()
        other._root, other._options = self._root, self._options | options
        return other

    def remote(self, *args: Any) -> FakeResponse:
        root = self._root
        root.calls.append((self._options, args))
        answer = root._answers.pop(0) if len(root._answers) > 1 else root._answers[0]
        if isinstance(answer, Callable):  # type: ignore[arg-type]
            answer = answer(*args)
        root.responses.append(FakeResponse(answer))
        return root.responses[-1]


class FullResponse(FakeResponse):
    """A response whose request no replica takes, with Serve's own method for waiting on that."""

    async def _fetch_future_result_async(self) -> None:
        await asyncio.Event().wait()


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make_caller(handle: FakeHandle, clock: Callable[[], float] | None = None, **changes: Any) -> ModelCaller:
    settings = {"queue_timeout_s": 5.0, "budget": retry_budget()} | changes
    return ModelCaller(handle, clock or Clock(), **settings)


async def always_ready() -> bool:
    return True


def make_api(handle: FakeHandle, info: ModelInfo = INFO, ready: Any = always_ready, **settings: Any) -> InferenceApi:
    chosen = GatewaySettings(**settings)
    caller = make_caller(handle, queue_timeout_s=chosen.queue_timeout_s, safe_to_repeat=info.safe_to_repeat)
    return InferenceApi(caller, info, chosen, ready)


async def call(
    app: Any, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes
) -> tuple[int, dict[bytes, bytes], bytes]:
    """One request as bare ASGI, with any bytes in its headers: status, headers and body of the answer."""
    scope = {
        "type": "http", "http_version": "1.1", "method": method, "scheme": "http", "path": path, "root_path": "",
        "raw_path": quote(path).encode(), "query_string": b"", "headers": list(headers),
        "server": ("gateway", 80), "client": ("client", 1),
    }  # fmt: skip
    incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    half = len(body) // 2
    for part, more in ((body[:half], True), (body[half:], False)):
        incoming.put_nowait({"type": "http.request", "body": part, "more_body": more})
    sent: list[dict[str, Any]] = []

    async def deliver(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, incoming.get, deliver)
    answer = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), answer


def client(api: InferenceApi) -> httpx.AsyncClient:
    """An HTTP client whose requests go straight into the application; what it fails with is raised."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(make_app(api)), base_url="http://gateway")


@asynccontextmanager
async def grpc_client(
    handle: FakeHandle, info: ModelInfo = INFO, ready: Any = always_ready, **settings: Any
) -> AsyncIterator[tuple[Any, InferenceApi]]:
    """An unmodified client of the gRPC service on loopback, without Serve between them; and the HTTP API beside it."""
    api = make_api(handle, info, ready, **settings)
    rpcs = InferenceRpcs()
    rpcs._service = InferenceService(
        api._caller, info, GatewaySettings(**settings), ready, bodies=api.bodies, statistics=api.statistics
    )
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    add_inference_service(_AsBytes(rpcs), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with triton.InferenceServerClient(f"127.0.0.1:{port}") as found:
            yield found, api
    finally:
        await server.stop(0)


class _AsBytes:
    """Serve serializes what the RPCs return."""

    def __init__(self, rpcs: InferenceRpcs) -> None:
        self._rpcs = rpcs

    def __getattr__(self, name: str) -> Any:
        rpc = getattr(self._rpcs, name)

        async def unary(call: Any, context: Any) -> bytes:
            answer = await rpc(call, context)
            return bytes(answer.SerializeToString())

        async def stream(calls: Any, context: Any) -> AsyncIterator[bytes]:
            async for answer in rpc(calls, context):
                yield answer.SerializeToString()

        return stream if inspect.isasyncgenfunction(rpc) else unary
