"""The protocol's gRPC service: what `ingress` is for HTTP. Calls the model through the same `ModelCaller`.

Serve's proxy calls the method of the ingress deployment that is named like the RPC; `serve_app.grpc_proxy` says what
arrives there. A refusal is a status on the context and an empty answer: an exception would fill Serve's logs with a
traceback for each wrong request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.json_format import ParseDict

from serve_app.gateway import grpc_messages as messages
from serve_app.gateway import openapi
from serve_app.gateway.codec import OFF_LOOP_BYTES, OFF_LOOP_ELEMENTS, elements_to_write
from serve_app.gateway.grpc_messages import Message, parse
from serve_app.gateway.model_call import CallOptions, ModelCaller, call_options, sequence_id
from serve_app.gateway.model_server import ModelInfo
from serve_app.gateway.oip import InferRequest
from serve_app.gateway.oip_grpc import as_json_object, decode_request, encode_response, item_outputs
from serve_app.gateway.tensors import Array, TensorSpec
from serve_app.gateway.triton import Statistics, index_entry, model_config
from serve_app.grpc_proxy import Call
from serve_app.http_guard import MAX_ID_BYTES, BodyReader
from serve_app.protocol_error import ProtocolError

if TYPE_CHECKING:
    from serve_app.gateway.ingress import GatewaySettings

logger = logging.getLogger("ray.serve")

EXTENSIONS = ("classification", "model_configuration", "model_repository", "parameters", "statistics")
_SERVES_SESSION = "session_id"
"""Serve's own metadata key for what its HTTP proxy reads from the session's header."""
STATUS_CODES: Mapping[int, grpc.StatusCode] = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""The code for each HTTP status that a request can end with."""
_MAX_REASON_BYTES = 1000
"""Metadata of 8 KiB is all that many clients take, and a byte of it can become three."""
_FINAL = "triton_final_response"
_EMPTY_FINAL = "triton_enable_empty_final_response"
_ABSENT = object()


class InferenceService:
    """The RPCs over a `ModelCaller`: a `Call` and the client's metadata in, messages out; raises ProtocolError."""

    def __init__(
        self,
        caller: ModelCaller,
        info: ModelInfo,
        settings: GatewaySettings,
        ready: Callable[[], Awaitable[bool]],
        *,
        bodies: BodyReader,
        statistics: Statistics,
    ) -> None:
        """`bodies` counts what requests of all protocols hold, `statistics` how they end."""
        self._caller = caller
        self._info = info
        self._ready = ready
        self._bodies = bodies
        self._statistics = statistics
        self._timeout_s = settings.request_timeout_s
        header = settings.session_header.lower()
        self._session_keys = (header, header.replace("-", "_"), _SERVES_SESSION)

    # ------------------------------------------------ health and metadata

    async def server_live(self, _call: Call, _metadata: Mapping[str, Any]) -> Message:
        """The process answers."""
        return messages.ServerLiveResponse(live=True)

    async def server_ready(self, _call: Call, _metadata: Mapping[str, Any]) -> Message:
        """Whether a replica of the model runs."""
        return messages.ServerReadyResponse(ready=await self._ready())

    async def model_ready(self, call: Call, _metadata: Mapping[str, Any]) -> Message:
        """Whether a replica of this model runs; no replica runs of an unknown one."""
        asked = parse(messages.ModelReadyRequest, call.body)
        known = asked.name == self._info.name and asked.version in ("", self._info.version)
        return messages.ModelReadyResponse(ready=known and await self._ready())

    async def server_metadata(self, _call: Call, _metadata: Mapping[str, Any]) -> Message:
        """Name, version and extensions of the server."""
        return messages.ServerMetadataResponse(name=openapi.SERVER_NAME, version=openapi.VERSION, extensions=EXTENSIONS)

    async def model_metadata(self, call: Call, _metadata: Mapping[str, Any]) -> Message:
        """The model's tensors."""
        asked = parse(messages.ModelMetadataRequest, call.body)
        self._info.check_served(asked.name, asked.version or None)
        return messages.ModelMetadataResponse(**self._info.describe())

    async def model_config(self, call: Call, _metadata: Mapping[str, Any]) -> Message:
        """The model's tensors, and whether it streams, in Triton's form."""
        asked = parse(messages.ModelConfigRequest, call.body)
        self._info.check_served(asked.name, asked.version or None)
        return ParseDict({"config": model_config(self._info)}, messages.ModelConfigResponse())

    async def model_statistics(self, call: Call, _metadata: Mapping[str, Any]) -> Message:
        """Counts of this gateway's inferences, over all protocols."""
        asked = parse(messages.ModelStatisticsRequest, call.body)
        if asked.name:
            self._info.check_served(asked.name, asked.version or None)
        return ParseDict(self._statistics.describe(self._info), messages.ModelStatisticsResponse())

    async def repository_index(self, call: Call, _metadata: Mapping[str, Any]) -> Message:
        """The one model that is served here."""
        asked = parse(messages.RepositoryIndexRequest, call.body)
        ready = await self._ready()
        index = messages.RepositoryIndexResponse()
        if ready or not asked.ready:
            index.models.add(**index_entry(self._info, ready=ready))
        return index

    # ------------------------------------------------ inference

    async def model_infer(self, call: Call, metadata: Mapping[str, Any]) -> Message:
        """One inference."""
        with self._bodies.hold(len(call.body)):
            request = self._checked(parse(messages.ModelInferRequest, call.body))
            if not self._info.infers:
                raise ProtocolError(400, f"model {self._info.name!r} has no infer: call ModelStreamInfer")
            return await self._infer(request, call, metadata)

    async def model_stream_infer(
        self, calls: AsyncIterator[Call], metadata: Mapping[str, Any]
    ) -> AsyncGenerator[Message, None]:
        """Answers the stream's requests one after the other: `generate` where the model has it, else `infer`.

        An error is the answer to its request; the stream goes on.
        """
        async for call in calls:
            request = _ABSENT
            try:
                with self._bodies.hold(len(call.body)):
                    request = parse(messages.ModelInferRequest, call.body)
                    self._checked(request)
                    if not self._info.generates:
                        yield _streamed(await self._infer(request, call, metadata), final=True)
                        continue
                    async with aclosing(self._generate(request, call, metadata)) as responses:
                        async for response in responses:
                            yield response
            except Exception as error:
                yield self._failed(refusal(error), request)

    async def _infer(self, request: Message, call: Call, metadata: Mapping[str, Any]) -> Message:
        with self._statistics.request() as timed:
            asked = await _decoded(_packed, request, call, self._info.inputs, self._info.outputs)
            options = self._options(asked, call, metadata)
            timed.ends("compute_input")
            outputs = await self._caller.infer(asked.inputs, dict(asked.parameters), options)
            timed.ends("compute_infer")
            answer = await _encoded(asked, outputs, self._info.name, self._info.version)
            timed.ends("compute_output")
            timed.succeeded()
        return answer

    async def _generate(
        self, request: Message, call: Call, metadata: Mapping[str, Any]
    ) -> AsyncGenerator[Message, None]:
        with self._statistics.request() as timed:
            asked = await _decoded(decode_request, request, call, (), ())
            options = self._options(asked, call, metadata)
            stream = await self._caller.stream(as_json_object(asked), options)
            passed_over, sent = None, False
            try:
                async for item in stream.items():
                    outputs = item_outputs(item)
                    part = asked.narrowed(outputs)
                    if part.outputs == ():
                        passed_over = outputs
                        continue
                    sent = True
                    answer = encode_response(part, outputs, self._info.name, self._info.version)
                    yield _streamed(answer, final=False)
            finally:
                stream.close()
            if passed_over is not None and not sent:  # what was asked for is in no item: this says so
                encode_response(asked, passed_over, self._info.name, self._info.version)
            timed.succeeded()
        if request.parameters[_EMPTY_FINAL].bool_param:
            nothing = encode_response(asked.narrowed(()), {}, self._info.name, self._info.version)
            yield _streamed(nothing, final=True)

    def _failed(self, error: ProtocolError, request: Message) -> Message:
        request_id = "" if request is _ABSENT else request.id
        of = messages.ModelInferResponse(model_name=self._info.name, model_version=self._info.version, id=request_id)
        return messages.ModelStreamInferResponse(error_message=error.reason, infer_response=of)

    # ------------------------------------------------ what a request brings

    def _checked(self, request: Message) -> Message:
        self._info.check_served(request.model_name, request.model_version or None)
        return request

    def _options(self, asked: InferRequest, call: Call, metadata: Mapping[str, Any]) -> CallOptions:
        limits = [self._timeout_s] if call.left_s is None else [self._timeout_s, max(call.left_s, 0.001)]
        session_id = next((metadata[key] for key in self._session_keys if metadata.get(key)), "")
        if not isinstance(session_id, str) or len(session_id) > MAX_ID_BYTES:
            raise ProtocolError(400, f"metadata {self._session_keys[0]}: must be text of at most {MAX_ID_BYTES} bytes")
        return call_options(asked.parameters, limits, session_id or sequence_id(asked.parameters))


class InferenceRpcs:
    """The RPCs as Serve calls them on the ingress deployment. `_service` is set when that is constructed."""

    _service: InferenceService

    async def ServerLive(self, call: Call, grpc_context: Any) -> Message:  # noqa: N802, D102 - the protocol's names
        return await _answer(self._service.server_live, call, grpc_context)

    async def ServerReady(self, call: Call, grpc_context: Any) -> Message:  # noqa: N802, D102
        return await _answer(self._service.server_ready, call, grpc_context)

    async def ModelReady(self, call: Call, grpc_context: Any) -> Message:  # noqa: N802, D102
        return await _answer(self._service.model_ready, call, grpc_context)

    async def ServerMetadata(self, call: Call, grpc_context: Any) -> Message:  # noqa: N802, D102
        return await _answer(self._service.server_metadata, call, grpc_context)

    async def ModelMetadata(self, call: Call, grpc_context: Any) -> Message:  # noqa: N802, D102
        return await _answer(self._service.model_metadata, call, grpc_context)

    async def ModelConfig(self, call: Call, grpc_context: Any) -> Message:  # noqa: N802, D102
        return await _answer(self._service.model_config, call, grpc_context)

    async def ModelStatistics(self, call: Call, grpc_context: Any) -> Message:  # noqa: N802, D102
        return await _answer(self._service.model_statistics, call, grpc_context)

    async def RepositoryIndex(self, call: Call, grpc_context: Any) -> Message:  # noqa: N802, D102
        return await _answer(self._service.repository_index, call, grpc_context)

    async def ModelInfer(self, call: Call, grpc_context: Any) -> Message:  # noqa: N802, D102
        return await _answer(self._service.model_infer, call, grpc_context)

    async def ModelStreamInfer(  # noqa: N802, D102
        self, calls: AsyncIterator[Call], grpc_context: Any
    ) -> AsyncGenerator[Message, None]:
        metadata = dict(grpc_context.invocation_metadata())
        async with aclosing(self._service.model_stream_infer(calls, metadata)) as responses:
            async for response in responses:
                yield response


async def _answer(
    rpc: Callable[[Call, Mapping[str, Any]], Awaitable[Message]], call: Call, grpc_context: Any
) -> Message:
    """The answer of one RPC; where it fails, the status on the context and an empty message, which is not sent."""
    try:
        return await rpc(call, dict(grpc_context.invocation_metadata()))
    except Exception as error:
        refused = refusal(error)
    grpc_context.set_code(STATUS_CODES.get(refused.status, grpc.StatusCode.INTERNAL))
    grpc_context.set_details(refused.reason.encode()[:_MAX_REASON_BYTES].decode(errors="ignore"))
    if refused.headers:
        grpc_context.set_trailing_metadata([(name.lower(), value) for name, value in refused.headers.items()])
    return messages.ServerLiveResponse()


async def _decoded(
    decode: Callable[[Message, Sequence[TensorSpec], Sequence[TensorSpec]], InferRequest],
    request: Message,
    call: Call,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> InferRequest:
    """The decoded request; by `decode`, in a thread, where that takes long.

    Raw numbers are only looked at, all else is converted.
    """
    quick = request.raw_input_contents and all(tensor.datatype != "BYTES" for tensor in request.inputs)
    if quick or len(call.body) < OFF_LOOP_BYTES:
        return decode_request(request, inputs, outputs)
    return await asyncio.to_thread(decode, request, inputs, outputs)


async def _encoded(request: InferRequest, outputs: Mapping[str, Array], name: str, version: str) -> Message:
    """The response; made in a thread where classes are made of many values."""
    if elements_to_write(request, outputs) < OFF_LOOP_ELEMENTS:
        return encode_response(request, outputs, name, version)
    return await asyncio.to_thread(encode_response, request, outputs, name, version)


def _packed(request: Message, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> InferRequest:
    return decode_request(request, inputs, outputs).packed()


def refusal(error: Exception) -> ProtocolError:
    """The ProtocolError that ends a request; a failure of the gateway itself is logged and a 500."""
    if isinstance(error, ProtocolError):
        return error
    logger.error("a gRPC request failed in the gateway", exc_info=error)
    return ProtocolError(500, f"the gateway failed: {type(error).__name__}")


def _streamed(response: Message, *, final: bool) -> Message:
    response.parameters[_FINAL].bool_param = final
    return messages.ModelStreamInferResponse(infer_response=response)
