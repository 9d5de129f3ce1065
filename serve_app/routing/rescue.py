"""Moves a request that is under way to another replica without its caller noticing.

Which requests, when and how many is decided in `shadecast.rescue`; here is how. A request that the replica has not even
accepted is withdrawn, and Serve chooses anew. Of one that it has accepted, the result object that Serve gave to
the caller stays the same: its `get_async`, once told, leaves the first attempt and awaits the second. A request that is
never rescued pays for nothing but that indirection. Callers that block in `result()` from a thread are not rescued.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import Any, cast

from ray.serve._private.common import ReplicaQueueLengthInfo
from ray.serve.request_router import PendingRequest, ReplicaResult, RunningReplica

RESCUE_SUFFIX = "-rescue"


class Withdrawable:
    """A replica as the addressee of one request, whose acceptance need not be waited for until it comes.

    A replica that a hog has starved does not even say that it takes a request: Serve would wait for that for as long as
    the hog stays. `withdraw` makes the replica's answer a refusal, so that Serve chooses again. One event loop only.
    """

    __slots__ = ("_replica", "_waiter", "_withdrawn")

    def __init__(self, replica: RunningReplica) -> None:
        self._replica = replica
        self._waiter: asyncio.Task[Any] | None = None
        self._withdrawn = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._replica, name)

    def try_send_request(self, request: PendingRequest, with_rejection: bool) -> ReplicaResult:
        """Send as the replica itself does."""
        result = self._replica.try_send_request(request, with_rejection=with_rejection)
        if with_rejection:
            self._watch(result)
        return result

    def _watch(self, result: ReplicaResult) -> None:
        held, kind = weakref.ref(result), type(result)

        async def get_rejection_response() -> ReplicaQueueLengthInfo | None:
            self._waiter = task = asyncio.current_task()
            try:
                return await kind.get_rejection_response(held())
            except asyncio.CancelledError:
                if not self._withdrawn or (task is not None and task.uncancel() > 0):
                    raise  # the caller itself gave up
                return ReplicaQueueLengthInfo(accepted=False, num_ongoing_requests=1)
            finally:
                self._waiter = None

        result.get_rejection_response = get_rejection_response

    @property
    def waiting(self) -> bool:
        """Whether the replica's acceptance is waited for just now."""
        return self._waiter is not None and not self._withdrawn

    def withdraw(self) -> bool:
        """Give up waiting for the replica's acceptance and cancel the attempt; False if nothing waits (any more)."""
        waiter = self._waiter
        if waiter is None or waiter.done() or self._withdrawn:
            return False
        self._withdrawn = True
        return waiter.cancel()


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
