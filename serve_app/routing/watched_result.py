"""The one wrapper of Serve's results: it watches an attempt, and lets its caller go on with another one.

The caller holds a `WatchedResult` and never learns that the attempt behind it was replaced. Which calls move, when and
how many is decided in `shadecast.rescue`; here is how: whoever awaits Serve's own result is interrupted, and awaits the
other attempt's instead. Callers that block in `result()` or `next()` from a thread stay where they are.

A result holds its call, never the other way round: when its reader drops it, it is freed as if nobody had watched.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Awaitable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ray.exceptions import RayActorError
from ray.serve.request_router import PendingRequest, ReplicaResult, RunningReplica

from serve_app.ray_api import QueueInfo
from serve_app.routing.ends import tell
from shadecast.calls import Event

if TYPE_CHECKING:
    from serve_app.routing.live_call import LiveCall
    from serve_app.routing.live_calls import LiveCalls
    from shadecast.reading import Reading

T = TypeVar("T")


class InterruptedWaitError(Exception):
    """The router has ended an await of Serve's; the one who waits goes on with something else."""


class _Wait:
    """Awaits that the router may end, all of one event loop."""

    __slots__ = ("ended", "loop", "tasks")

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[Any]] = []
        self.loop: asyncio.AbstractEventLoop | None = None
        self.ended = False

    async def until(self, awaitable: Awaitable[T]) -> T:
        """Await it; raises InterruptedWaitError once ended."""
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self.loop = asyncio.get_running_loop()
        self.tasks.append(task)
        try:
            return await awaitable
        except asyncio.CancelledError:
            if not self.ended or task.uncancel() > 0:
                raise  # the caller itself gave up
            raise InterruptedWaitError from None
        finally:
            self.tasks.remove(task)

    def end(self) -> bool:
        """Interrupt whoever waits; False if nobody does. On the waiters' loop."""
        waiting = [task for task in self.tasks if not task.done()]
        if waiting:
            self.ended = True
            for task in waiting:
                task.cancel()
        return bool(waiting)


class WatchedReplica:
    """A running replica as Serve's routers see it, whose calls are watched; all else is the replica's own."""

    def __init__(self, replica: RunningReplica, calls: LiveCalls) -> None:
        self.unwatched, self._calls = replica, calls
        """The replica itself, for copies, which are no calls of the book's."""
        self.replica_id = replica.replica_id

    def __getattr__(self, name: str) -> Any:
        if name == "unwatched":  # while it is being made, or copied
            raise AttributeError(name)
        return getattr(self.unwatched, name)

    @property
    def max_ongoing_requests(self) -> int:
        """Requests that it takes at most; may change while it runs."""
        return cast("int", self.unwatched.max_ongoing_requests)

    def try_send_request(self, pr: PendingRequest, with_rejection: bool) -> WatchedResult:
        """Send, as the replica itself does, what was chosen for it, reserved on it, or is broadcast to all."""
        call = self._calls.sending(pr, self.replica_id.unique_id, pinned=not with_rejection)
        try:
            inner = self.unwatched.try_send_request(pr, with_rejection=with_rejection)
        except BaseException:
            self._calls.drop(call)
            raise
        result = WatchedResult(inner, call, self._calls)
        if not with_rejection:
            self._calls.accepted(call, result, None)
        return result

    async def reserve_slot(self, request_metadata: Any) -> tuple[str, QueueInfo]:
        """Reserve a place for a request that is dispatched later."""
        call = self._calls.reserving(request_metadata, self.replica_id.unique_id)
        try:
            token, info = await self.unwatched.reserve_slot(request_metadata)
        except BaseException:
            self._calls.drop(call)
            raise
        self._calls.reserved(call, token if info.accepted else None)
        return token, info

    async def release_slot(self, slot_token: str) -> int:
        """Give a reserved place back."""
        self._calls.released(slot_token)
        return cast("int", await self.unwatched.release_slot(slot_token))


class WatchedResult:
    """Serve's result of one attempt, as its caller has it; what is not here is Serve's own, and of this attempt."""

    def __init__(self, inner: ReplicaResult, call: LiveCall, calls: LiveCalls) -> None:
        self.inner, self.call, self._calls = inner, call, calls
        call.result = weakref.ref(self)
        self._wait = _Wait()
        self._second: WatchedResult | None = None
        """The attempt that has taken over."""
        self._trying: WatchedResult | None = None
        """Of a stream: an attempt that has given no item yet."""
        self._ahead: list[Any] = []
        """What the second attempt has given before it was read, or this one while it was held."""
        self._held: asyncio.Event | None = None
        """Set once the reader need not wait any longer for another attempt to begin."""
        self._lost: RayActorError | None = None
        """What a stream has ended with that does not go on: Ray's own ends as if complete when it is read once more."""

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # while it is being made, or copied
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __del__(self) -> None:
        if (reading := self.call.reading) is not None:
            tell(self._calls.loop, self._calls.reader_gone, self.call, reading)

    # ------------------------------------------------------------------ Serve's side

    async def get_rejection_response(self) -> QueueInfo | None:
        """Whether the replica takes the request. Once interrupted it is taken for one that does not."""
        try:
            info = await self._wait.until(self.inner.get_rejection_response())
        except InterruptedWaitError:
            self._calls.tell(self.call, Event.RETRY)
            return QueueInfo(accepted=False, num_ongoing_requests=self._calls.limit_of(self.call.replica_id))
        except BaseException:
            self._calls.drop(self.call)
            raise
        if info is None or info.accepted:
            self._calls.accepted(self.call, self, None if info is None else info.num_ongoing_requests)
        else:
            self._calls.tell(self.call, Event.REJECT)
        return cast("QueueInfo | None", info)

    # ------------------------------------------------------------------ the caller's side

    async def get_async(self) -> Any:
        """The answer."""
        if self._second is None:
            call = self.call
            if call.reading is not None:
                return await self._read(self.inner.get_async(), whole=True)
            waiting = self.inner.get_async()
            try:
                answer = await (self._wait.until(waiting) if call.retriable else waiting)
            except InterruptedWaitError:
                pass
            else:
                call.answered = True
                return answer
        return await cast("WatchedResult", self._second).get_async()

    def get(self, timeout_s: float | None) -> Any:
        """The answer, waited for in a thread."""
        if self.call.reading is None:
            answer = self.inner.get(timeout_s)
            self.call.answered = True
            return answer
        return self._read_blocking(lambda: self.inner.get(timeout_s), whole=True)

    def __next__(self) -> Any:
        if self.call.reading is None:
            return self.inner.__next__()
        return self._read_blocking(self.inner.__next__)

    async def __anext__(self) -> Any:
        if self._second is None:
            if self._lost is not None:  # its reader gave up before the stream could go on elsewhere
                raise self._lost
            if self._ahead:  # or while an item was held
                return self._give(self._ahead.pop())
            try:
                return await self._read(self.inner.__anext__())
            except InterruptedWaitError:
                pass
            except RayActorError as error:
                self._lost = error
                begun = await self._after_death(error)
                if begun is None:
                    raise
                self._take(*begun)
        if not self._ahead:
            return await cast("WatchedResult", self._second).__anext__()
        item = self._ahead.pop()
        if isinstance(item, StopAsyncIteration):
            raise item
        return item

    def cancel(self) -> None:
        """Cancel every attempt."""
        self.inner.cancel()
        for other in (self._trying, self._second):
            if other is not None:
                other.cancel()

    async def _read(self, awaitable: Coroutine[Any, Any, Any], *, whole: bool = False) -> Any:
        """The next item, or the `whole` answer, seen by the call's reading."""
        call, reading = self.call, self.call.reading
        if reading is None:
            return await awaitable
        reading.asked_s = asked_s = time.monotonic()
        try:
            item = await (self._wait.until(awaitable) if call.had is not None else awaitable)
            self._calls.got(call, item, asked_s)
            item = call.mend(item) if call.mend is not None else item
            if (held := self._held) is not None:
                self._ahead = [item]
                await self._wait.until(held.wait())
                item = self._ahead.pop()
        except InterruptedWaitError:
            raise
        except StopAsyncIteration:
            self._read_end(None)
            raise
        except Exception as error:
            self._read_end(error)
            raise
        except BaseException:  # the reader gave up; it may ask again
            self.stay()
            raise
        self._give(item)
        if whole:
            self._read_end(None)
        return item

    def _give(self, item: Any) -> Any:
        if self._trying is not None or self._held is not None:
            self.stay()
        if self.call.had is not None:
            self.call.had.append(item)
        return item

    def _read_blocking(self, read: Any, *, whole: bool = False) -> Any:
        reading = cast("Reading", self.call.reading)
        reading.asked_s = asked_s = time.monotonic()
        try:
            item = read()
        except StopIteration:
            self._read_end(None)
            raise
        except TimeoutError:
            raise  # the reader may ask again
        except Exception as error:
            self._read_end(error)
            raise
        self._calls.got(self.call, item, asked_s)
        self._give(item)
        if whole:
            self._read_end(None)
        return item

    def _read_end(self, error: BaseException | None) -> None:
        cast("Reading", self.call.reading).asked_s = None
        self.stay()
        tell(self._calls.loop, self._calls.read_to_the_end, self.call, error)

    # ------------------------------------------------------------------ going on elsewhere

    @property
    def movable(self) -> bool:
        """Whether a caller waits in a way that can be interrupted, and no other attempt takes over."""
        return self._second is None and self._held is None and bool(self._wait.tasks)

    def stop_waiting(self) -> bool:
        """Do not wait for the replica's word any longer: Serve chooses again. False if nobody waits for it."""
        return self._wait.end()

    def hold(self) -> bool:
        """From now on the reader waits for another attempt to begin, or to be given up (`stay`); False if it does not.

        What this attempt gives meanwhile does not suit what another one says after the items that were had until now.
        """
        if self.movable:
            self._held = asyncio.Event()
        return self._held is not None

    def trying(self, second: WatchedResult) -> None:
        """Another attempt of this stream was accepted: it is cancelled once it is not needed."""
        self._trying = second

    def move(self, second: WatchedResult, ahead: list[Any], after: int) -> bool:
        """Let the caller go on with `second`, and cancel this attempt; False if it is too late.

        One of a stream begins after `after` items, with `ahead`, unless this one has given more meanwhile.
        """
        loop, had = self._wait.loop, self.call.had
        if loop is None or not self._wait.tasks:
            return False

        def wake() -> None:
            suits = had is None or (self._trying is second and len(had) == after)
            if suits and self._second is None and self._wait.end():
                self._take(second, ahead)
                tell(self._calls.loop, self._calls.tell, self.call, Event.MOVE)
                self.inner.cancel()
            else:  # this attempt has ended, or has gone on
                second.cancel()
                self.stay()

        try:
            loop.call_soon_threadsafe(wake)
        except RuntimeError:  # the caller's loop is closed
            return False
        return True

    def stay(self) -> None:
        """No other attempt is needed: this one has given an item, or has ended, or none could begin."""
        trying, held, self._trying, self._held = self._trying, self._held, None, None
        if trying is not None:
            trying.cancel()
        if held is not None:
            tell(cast("asyncio.AbstractEventLoop", self._wait.loop), held.set)

    async def _after_death(self, error: RayActorError) -> tuple[WatchedResult, list[Any]] | None:
        """The replica has died under a stream: another attempt that begins after what was read, and its first item."""
        lost = self._calls.after_death(self.call, error)
        if lost is None:
            return None
        try:
            begun = asyncio.run_coroutine_threadsafe(lost, self._calls.loop)
        except RuntimeError:  # the router's loop is closed
            lost.close()
            return None
        return await asyncio.wrap_future(begun)

    def _take(self, second: WatchedResult, ahead: list[Any]) -> None:
        self._trying, self._held, self._second, self._ahead = None, None, second, ahead
