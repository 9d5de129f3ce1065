"""Calls the model deployment through its handle: deadlines, a bounded wait for a place, one retry within a budget.

Every way in which a call can fail ends as a `ProtocolError`; nothing here waits without an end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import quote

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from serve_app.gateway.model_server import Refusal
from serve_app.gateway.tensors import whole_number
from serve_app.http_guard import MAX_ID_BYTES
from serve_app.protocol_error import ProtocolError
from serve_app.ray_api import retry_after_s, wait_until_assigned
from shadecast.budget import Budget

_RETRY_SOON = {"Retry-After": "1"}
_END = object()


@dataclass(frozen=True, slots=True)
class CallOptions:
    """What one request brings for its call: its session, its multiplexed model and the seconds that it has.

    For streams `timeout_s` bounds the wait for each item, or with `whole_stream` (the client set a deadline) all of it.
    """

    timeout_s: float
    session_id: str = ""
    multiplexed_model_id: str = ""
    whole_stream: bool = False


def call_options(parameters: Mapping[str, Any], limits_s: Sequence[float], session_id: str) -> CallOptions:
    """Options of a request with these parameters. `limits_s`: the server's limit, then those that the client set.

    Raises ProtocolError (400) for a parameter `timeout` that is no time.
    """
    limits = list(limits_s)
    if parameters.get("timeout") is not None:
        timeout_us = whole_number(parameters["timeout"])
        if timeout_us is None or timeout_us < 0:
            raise ProtocolError(400, "parameter 'timeout' must be a whole number of microseconds, or 0 for none")
        if timeout_us:
            limits.append(min(timeout_us, 2**62) / 1e6)
    return CallOptions(min(limits), session_id, _multiplexed_model_id(), whole_stream=len(limits) > 1)


def _multiplexed_model_id() -> str:
    """The model id that Serve read from the request's header; empty outside a replica."""
    with suppress(Exception):
        return str(serve.get_multiplexed_model_id())
    return ""


def sequence_id(parameters: Mapping[str, Any]) -> str:
    """Triton's id of a sequence of requests, a number or a string; 0 and "" are none. Raises ProtocolError (400).

    As an id of a session, which is printable ASCII: other text is quoted as in URLs.
    """
    given = parameters.get("sequence_id")
    if given is None:
        return ""
    given = given if isinstance(given, str) else whole_number(given)
    if given is None or (isinstance(given, int) and not 0 <= given < 2**64):
        raise ProtocolError(400, "parameter 'sequence_id' must be a whole number from 0 below 2^64, or a string")
    text = str(given) if given else ""
    if len(text) > MAX_ID_BYTES:
        raise ProtocolError(
            400, f"parameter 'sequence_id' has {len(text)} characters; at most {MAX_ID_BYTES} are taken"
        )
    return text if text.isascii() and text.isprintable() else quote(text, errors="backslashreplace")


def retry_budget(fraction: float = 0.2) -> Budget:
    """Of retries: `fraction` of the requests; a quiet service may retry now and then, too."""
    return Budget(fraction, burst=100.0, initial=10.0, per_s=0.5)


class _LostError(Exception):
    """The replica died, was unreachable, or gave the request up: another one may answer it."""


class ModelCaller:
    """Sends requests to the model's replicas. `handle` is a Serve DeploymentHandle."""

    def __init__(
        self,
        handle: Any,
        now_s: Callable[[], float],
        queue_timeout_s: float,
        safe_to_repeat: bool = True,
        budget: Budget | None = None,
        *,
        may_start: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        """`may_start`: whether there is no replica yet because none was needed: requests wait by their deadline."""
        self._unary = handle.options(method_name="infer")
        self._streaming = handle.options(method_name="generate", stream=True)
        self._now_s = now_s
        self._queue_timeout_s = queue_timeout_s
        self._safe_to_repeat = safe_to_repeat
        self._budget = budget or retry_budget()
        self._may_start = may_start
        self.retried = 0
        """Calls sent a second time since the start."""

    async def infer(self, inputs: dict[str, Any], parameters: dict[str, Any], options: CallOptions) -> Any:
        """The outputs of one inference; raises ProtocolError."""
        until_s = self._now_s() + options.timeout_s
        self._budget.request(self._now_s())
        try:
            return await self._infer_once(inputs, parameters, options, until_s)
        except _LostError as lost:
            self._retry(lost)
        try:
            return await self._infer_once(inputs, parameters, options, until_s)
        except _LostError as lost:
            raise self._given_up(lost) from None

    async def stream(self, request: Any, options: CallOptions) -> Stream:
        """A stream whose first item is there already; raises ProtocolError. Retried only up to that first item."""
        until_s = self._now_s() + options.timeout_s
        self._budget.request(self._now_s())
        try:
            return await self._stream_once(request, options, until_s)
        except _LostError as lost:
            self._retry(lost)
        try:
            return await self._stream_once(request, options, until_s)
        except _LostError as lost:
            raise self._given_up(lost) from None

    async def _infer_once(
        self, inputs: dict[str, Any], parameters: dict[str, Any], options: CallOptions, until_s: float
    ) -> Any:
        left_s = until_s - self._now_s()
        response = _addressed(self._unary, options).remote(inputs, parameters, left_s)
        try:
            async with _deadline(left_s, options.timeout_s):
                await self._placed(response, left_s)
                answer = await response
        except BaseException as error:
            _abandon(response)
            _reraise(error)
        if isinstance(answer, Refusal):
            raise ProtocolError(400, answer.reason)
        return answer

    async def _stream_once(self, request: Any, options: CallOptions, until_s: float) -> Stream:
        left_s = until_s - self._now_s()
        response = _addressed(self._streaming, options).remote(request)
        try:
            async with _deadline(left_s, options.timeout_s):
                await self._placed(response, left_s)
                first = await anext(response, _END)
        except BaseException as error:
            _abandon(response)
            _reraise(error)
        if isinstance(first, Refusal):
            raise ProtocolError(400, first.reason)
        if options.whole_stream:
            return Stream(response, first, options.timeout_s, lambda: until_s - self._now_s())
        return Stream(response, first, options.timeout_s, lambda: options.timeout_s)

    async def _placed(self, response: Any, left_s: float) -> None:
        """Waits until a replica has taken the request: bounded, or full replicas would hold clients without an end."""
        if self._queue_timeout_s >= left_s:
            return
        if self._may_start is not None:
            await self._started(response, self._may_start)
            return
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                await wait_until_assigned(response)
        except TimeoutError:
            raise self._no_room() from None

    async def _started(self, response: Any, may_start: Callable[[], Awaitable[bool]]) -> None:
        """As `_placed`, but longer while the first replica is starting: then the request's own deadline counts.

        Once it runs requests have their usual time anew: routers hear of it a moment after the controller.
        """
        placed = asyncio.ensure_future(wait_until_assigned(response))
        starting = False
        try:
            while not (await asyncio.wait({placed}, timeout=self._queue_timeout_s))[0]:
                was_starting, starting = starting, await may_start()
                if not starting and not was_starting:
                    raise self._no_room()
            await placed
        finally:
            placed.cancel()

    def _no_room(self) -> ProtocolError:
        return ProtocolError(
            503, f"no replica had room within {self._queue_timeout_s:g} s; try again later", _RETRY_SOON
        )

    def _retry(self, lost: _LostError) -> None:
        """Spends one retry, or raises the ProtocolError that ends the request."""
        if not self._safe_to_repeat or not self._budget.take(self._now_s()):
            raise self._given_up(lost) from None
        self.retried += 1

    def _given_up(self, lost: _LostError) -> ProtocolError:
        return ProtocolError(503, f"the request was lost: {lost}; try again", _RETRY_SOON)


class Stream:
    """Items of one answer as they come. `close` must be called at the end, whichever way it ends."""

    def __init__(self, response: Any, first: Any, timeout_s: float, left_s: Callable[[], float]) -> None:
        self._response = response
        self._first = first
        self._timeout_s = timeout_s
        self._left_s = left_s
        self._ended = False

    async def items(self) -> AsyncIterator[Any]:
        """All items; raises ProtocolError where the stream breaks."""
        item = self._first
        while item is not _END:
            if isinstance(item, Refusal):
                raise ProtocolError(400, item.reason)
            yield item
            try:
                async with _deadline(self._left_s(), self._timeout_s):
                    item = await anext(self._response, _END)
            except BaseException as error:
                translated = _translated(error)
                if isinstance(translated, _LostError):
                    raise ProtocolError(503, f"the stream broke off: {translated}") from error
                _reraise(error)
        self._ended = True

    def close(self) -> None:
        """Cancels what is left of the stream."""
        if not self._ended:
            self._ended = True
            _abandon(self._response)


@asynccontextmanager
async def _deadline(left_s: float, timeout_s: float) -> AsyncIterator[None]:
    """Ends the block with a 504 after `left_s`; a TimeoutError that the model raised passes as it is."""
    scope = asyncio.timeout(max(left_s, 0.0))
    try:
        async with scope:
            yield
    except TimeoutError:
        if scope.expired():
            raise ProtocolError(504, f"no answer within {timeout_s:g} s") from None
        raise


def _addressed(handle: Any, options: CallOptions) -> Any:
    extra = {}
    if options.session_id:
        extra["session_id"] = options.session_id
    if options.multiplexed_model_id:
        extra["multiplexed_model_id"] = options.multiplexed_model_id
    return handle.options(**extra) if extra else handle


def _abandon(response: Any) -> None:
    with suppress(Exception):  # it may have ended on its own, with an error of its own
        response.cancel()


def _reraise(error: BaseException) -> NoReturn:
    translated = _translated(error)
    if translated is error:
        raise error
    raise translated from error


def _translated(error: BaseException) -> BaseException:
    """The ProtocolError or `_LostError` for a failed call; a cancellation from outside stays what it is."""
    if isinstance(error, ProtocolError):
        return error
    if isinstance(error, asyncio.CancelledError | RequestCancelledError):
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            return error  # our own client left, or we are stopped
        return _LostError("its replica gave it up")
    if not isinstance(error, Exception):
        return error
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, BackPressureError):
        after = {"Retry-After": str(max(1, round(retry_after_s(cause) or 1)))}
        return ProtocolError(503, "all replicas are full and the queue is too; try again later", after)
    if isinstance(cause, DeploymentUnavailableError):
        return ProtocolError(503, "the model is not available: its deployment failed", _RETRY_SOON)
    if isinstance(error, RayActorError) and not isinstance(error, RayTaskError):
        return _LostError("its replica died or could not be reached")
    if isinstance(cause, TimeoutError):
        return ProtocolError(504, "the model did not answer in time")
    return ProtocolError(500, f"the model failed: {describe(cause)}")


def describe(error: BaseException) -> str:
    """Type and first line of an exception's text, without a traceback."""
    text = str(error).strip().partition("\n")[0][:200]
    name = type(error).__name__
    return f"{name}: {text}" if text else name
