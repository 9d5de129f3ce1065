"""Server-sent events made of a model's stream, and their end: whoever leaves, the call is cancelled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve_app.gateway.model_call import Stream
from serve_app.protocol_error import ProtocolError

_KEEPALIVE = ":\n\n"
"""A comment of server-sent events: every reader skips it."""


class EventStream(StreamingResponse):
    """Server-sent events from a model's stream; the call is cancelled when the client leaves."""

    def __init__(self, events: AsyncGenerator[str], held: AsyncExitStack) -> None:
        """`held` is let go at the end, whichever way it ends."""
        super().__init__(events, media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"
        self.headers["X-Accel-Buffering"] = "no"  # nginx would hold tokens back
        self._events = events
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        async with self._held, aclosing(self._events):
            await super().__call__(scope, receive, send)


async def events(
    open_: Callable[[], Awaitable[Stream]],
    encode: Callable[[Any], str],
    keepalive_s: float,
    succeeded: Callable[[], None],
) -> AsyncGenerator[str]:
    """A stream's events. With `keepalive_s` a comment comes at once, and whenever nothing else came for so long."""
    items = _items(open_)
    pending: asyncio.Future[Any] | None = None
    try:
        if keepalive_s:
            yield _KEEPALIVE
        while True:
            if keepalive_s:
                pending = asyncio.ensure_future(anext(items, None))
                pending.add_done_callback(_seen)
                while not (await asyncio.wait((pending,), timeout=keepalive_s))[0]:
                    yield _KEEPALIVE
            item = await (pending or anext(items, None))
            if item is None:
                succeeded()
                return
            yield f"data: {encode(item[0])}\n\n"
    except ProtocolError as error:  # the status line is gone already: the error is an event
        yield f"data: {json.dumps({'error': error.reason})}\n\n"
    finally:
        if pending is not None and not pending.done():
            pending.cancel()  # which closes the stream
        else:
            await items.aclose()


async def _items(open_: Callable[[], Awaitable[Stream]]) -> AsyncGenerator[tuple[Any]]:
    stream = await open_()
    try:
        async for item in stream.items():
            yield (item,)
    finally:
        stream.close()


async def opened(stream: Stream) -> Stream:
    """A stream that is open already, where one is to be opened."""
    return stream


def _seen(ended: asyncio.Future[Any]) -> None:
    """Takes the exception of a task that nobody awaits any more."""
    if not ended.cancelled():
        ended.exception()
