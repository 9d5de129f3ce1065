"""Moves a request that is under way to another replica without its caller noticing.

Which requests, when and how many is decided in `shadecast.rescue`; here is how. The result object that Serve gave to
the caller stays the same: its `get_async`, once told, leaves the first attempt and awaits the second. A request that is
never rescued pays for nothing but that indirection. Callers that block in `result()` from a thread are not rescued.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import Any, cast

from ray.serve.request_router import PendingRequest, ReplicaResult

RESCUE_SUFFIX = "-rescue"


class Rescuable:
    """One accepted unary request that may be sent again once."""

    __slots__ = ("_cancel_first", "_loop", "_second", "_waiter", "request", "rescued")

    def __init__(self, request: PendingRequest, result: ReplicaResult) -> None:
        self.request = request
        self.rescued = False
        self._second: ReplicaResult | None = None
        self._waiter: asyncio.Task[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        held, kind = weakref.ref(result), type(result)  # weak: a cycle would keep the answer alive for long

        def cancel_first() -> None:
            if (first := held()) is not None:
                kind.cancel(first)

        self._cancel_first = cancel_first

        async def get_async() -> Any:
            if not self.moved:
                task = asyncio.current_task()
                self._waiter, self._loop = task, asyncio.get_running_loop()
                try:
                    return await kind.get_async(held())
                except asyncio.CancelledError:
                    if self._second is None or (task is not None and task.uncancel() > 0):
                        raise  # the caller itself gave up
                finally:
                    self._waiter = None
            return await cast("ReplicaResult", self._second).get_async()

        def cancel() -> None:
            cancel_first()
            if self._second is not None:
                self._second.cancel()

        result.get_async = get_async
        result.cancel = cancel

    @property
    def moved(self) -> bool:
        """Whether the caller was told to await a second attempt."""
        return self._second is not None

    @property
    def awaited(self) -> bool:
        """Whether a caller waits in a way that can be moved."""
        return self._waiter is not None

    def move(self, second: ReplicaResult) -> bool:
        """Let the caller await `second` from now on and cancel the first attempt; False if it is too late."""
        waiter, loop = self._waiter, self._loop
        if waiter is None or loop is None:
            return False

        def wake() -> None:
            if self._waiter is waiter and not waiter.done():
                self._second = second
                waiter.cancel()
                self._cancel_first()
            else:
                second.cancel()  # the first attempt has ended meanwhile

        try:
            loop.call_soon_threadsafe(wake)
        except RuntimeError:  # the caller's loop is closed
            return False
        return True
