"""The Open Inference Protocol's gRPC service for Serve's proxies: name `add_inference_service` in their `grpc_options`.

Serve hands a request on without its deadline, and parses every message in the proxy first. Here a proxy takes a message
as bytes, notes the time that its client gives it, and leaves the rest to the gateway, where a message that is damaged
gets a reason. Standard library and grpc only: this runs in Serve's own processes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc

SERVICE = "inference.GRPCInferenceService"
UNARY = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryIndex",
    "ModelInfer",
)
"""What the gateway answers; grpc itself answers UNIMPLEMENTED to the service's other methods."""
STREAMS = ("ModelStreamInfer",)


@dataclass(frozen=True, slots=True)
class Call:
    """One message of a client as it came, and the seconds until the client's deadline; None where it set none."""

    body: bytes
    left_s: float | None = None


def add_inference_service(servicer: Any, server: Any) -> None:
    """For `grpc_options.grpc_servicer_functions`; Serve's `server` puts calls of the application behind each method."""
    methods = {name: grpc.unary_unary_rpc_method_handler(getattr(servicer, name)) for name in UNARY}
    methods |= {name: grpc.stream_stream_rpc_method_handler(getattr(servicer, name)) for name in STREAMS}
    service = grpc.method_handlers_generic_handler(SERVICE, methods)
    server.add_generic_rpc_handlers((service,))
    service._method_handlers = {path: _timed(handler) for path, handler in service._method_handlers.items()}


def grpc_options(port: int) -> dict[str, Any]:
    """`grpc_options` of `serve.start`; port 0 starts no gRPC server."""
    return {"port": port, "grpc_servicer_functions": [f"{__name__}.{add_inference_service.__name__}"]} if port else {}


def _timed(handler: Any) -> Any:
    """Serve's handler of one method, given `Call`s instead of bytes."""
    if not handler.request_streaming:

        async def unary_unary(body: bytes, context: Any) -> bytes:
            answer: bytes = await handler.unary_unary(Call(body, context.time_remaining()), context)
            return answer

        return handler._replace(unary_unary=unary_unary)

    async def stream_stream(bodies: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        calls = (Call(body, context.time_remaining()) async for body in bodies)
        async for answer in handler.stream_stream(calls, context):
            yield answer

    return handler._replace(stream_stream=stream_stream)
