"""Lets a stream that is under way go on from another replica, without its reader noticing.

Only where the deployment names the keyword argument by which its streaming methods are told what the reader has had
(`balance.resume`). Which streams and when is decided in `shadecast.rescue`; here is how. The result object that Serve
gave to the reader stays the same: its `__anext__`, once told, leaves the first attempt and reads the second, which was
asked to begin after the reader's last item and has given its own first one. Until then both are under way, and the
first goes on if it gives an item meanwhile. Readers that block in `next()` from a thread stay where they are.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.request_router import PendingRequest, ReplicaResult

RESUME_SUFFIX = "-resumed"

Begun = tuple[ReplicaResult, Any]
"""A second attempt and its first item; StopAsyncIteration if it had nothing left to give."""


class Resumable:
    """One live stream, read through a `StreamWatch`, that may go on elsewhere."""

    __slots__ = (
        *("_cancel_first", "_lost", "_loop", "_next", "_router_loop", "_second", "_trying", "_waiter"),
        *("after_loss", "had", "moving", "request"),
    )

    def __init__(
        self,
        request: PendingRequest,
        result: ReplicaResult,
        had: list[Any],
        router_loop: asyncio.AbstractEventLoop,
        lost: Callable[[Resumable], Coroutine[Any, Any, Begun | None]],
        *,
        after_loss: bool = False,
    ) -> None:
        """`had` are the stream's items before this attempt; `lost` runs on the router's loop when the replica has died.

        `after_loss`: a replica has died of this stream, or under it, before: there is no third attempt.
        """
        self.request = request
        self.had = had
        """All items of the stream that its reader has had."""
        self.moving = False
        """Whether the router just tries to let it go on elsewhere."""
        self.after_loss = after_loss
        self._router_loop, self._lost = router_loop, lost
        self._trying: ReplicaResult | None = None
        """A second attempt that has given no item yet."""
        self._second: ReplicaResult | None = None
        self._next: list[Any] = []
        """What the second attempt has given before it was read."""
        self._waiter: asyncio.Task[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        held, kind = weakref.ref(result), type(result)  # weak: a cycle would keep the stream alive for long
        watched = result.__dict__["__anext__"]

        def cancel_first() -> None:
            if (first := held()) is not None:
                kind.cancel(first)

        def cancel() -> None:
            cancel_first()
            for other in (self._trying, self._second):
                if other is not None:
                    other.cancel()

        self._cancel_first = cancel_first
        result.__anext__ = lambda: self._read(watched)
        result.cancel = cancel

    @property
    def movable(self) -> bool:
        """Whether a reader waits in a way that can be moved, and no second attempt is under way or has taken over."""
        return self._waiter is not None and not self.moving and not self.moved

    @property
    def moved(self) -> bool:
        """Whether a second attempt has taken over."""
        return self._second is not None

    async def _read(self, watched: Callable[[], Awaitable[Any]]) -> Any:
        if not self.moved:
            task = asyncio.current_task()
            self._waiter, self._loop = task, asyncio.get_running_loop()
            try:
                item = await watched()
            except asyncio.CancelledError:
                if self._second is None or (task is not None and task.uncancel() > 0):
                    self._stay()
                    raise  # the reader itself gave up
            except RayActorError:
                self._waiter = None
                self._stay()
                begun = await self._after_death()
                if begun is None:
                    raise
                self._take(*begun)
            except BaseException:
                self._stay()
                raise
            else:
                self._stay()
                self.had.append(item)
                return item
            finally:
                self._waiter = task = None
        if not self._next:
            return await self._second.__anext__()  # type: ignore[union-attr]
        item = self._next.pop()
        if isinstance(item, StopAsyncIteration):
            raise item
        return item

    async def _after_death(self) -> Begun | None:
        if self.after_loss:
            return None
        lost = self._lost(self)
        try:
            begun = asyncio.run_coroutine_threadsafe(lost, self._router_loop)
        except RuntimeError:  # the router's loop is closed
            lost.close()
            return None
        return await asyncio.wrap_future(begun)

    def _take(self, second: ReplicaResult, first_item: Any) -> None:
        self._trying, self._second, self._next = None, second, [first_item]

    def _stay(self) -> None:
        """The first attempt has given an item, or has ended."""
        trying, self._trying = self._trying, None
        if trying is not None:
            trying.cancel()

    # ------------------------------------------------------------------ the router's loop

    def trying(self, second: ReplicaResult) -> None:
        """A second attempt has been accepted: it is cancelled once it is not needed."""
        self._trying = second

    def move(self, second: ReplicaResult, first_item: Any, after: int) -> None:
        """Let the reader read `second`, which begins after `after` items, and cancel the first attempt.

        Unless the first has gone on meanwhile: then `second` is cancelled.
        """
        waiter, loop = self._waiter, self._loop
        if waiter is None or loop is None:
            self._stay()
            return

        def wake() -> None:
            if self._waiter is waiter and not waiter.done() and len(self.had) == after and self._trying is second:
                self._take(second, first_item)
                waiter.cancel()
                self._cancel_first()
            else:
                second.cancel()

        try:
            loop.call_soon_threadsafe(wake)
        except RuntimeError:  # the reader's loop is closed
            second.cancel()
