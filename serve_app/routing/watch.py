"""Learning how an accepted request goes on, without taking part: its end, its error, the items of its stream.

Callbacks come to the router's event loop, whatever thread noticed; each end is told once. Nothing here holds on to a
result: when its reader drops it, it is freed as if nobody had watched. Standard library and ray.serve only.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import weakref
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import TaskCancelledError
from ray.serve.exceptions import RequestCancelledError
from ray.serve.request_router import ReplicaResult

MARK = 32
"""Items of a stream whose times are kept: what is compared with a copy."""
_WAITED = 0.1
_PROMPT_S = 0.002
"""A reader that asks later than this, and spends less of its time waiting, does not show when an item was there."""

Ended = Callable[[BaseException | None], None]


def watch_end(result: ReplicaResult, loop: asyncio.AbstractEventLoop, ended: Ended) -> None:
    """Call `ended(error or None)` on `loop` once, when an accepted unary request has ended.

    A done-callback of the result itself does not show errors that user code raised (Ray 2.60 hands it None, because
    they travel in the answer's own object). So the answer's object is looked at where it lies, without fetching or
    deserialising it: a large answer may never be wanted in this process.
    """

    def settle(outcome: object) -> None:
        _tell(loop, ended, outcome if isinstance(outcome, BaseException) else None)

    try:
        ref = result.to_object_ref()
    except (AssertionError, RuntimeError, AttributeError):  # sent by value, or a stream: no object
        result.add_done_callback(settle)
        return

    def look() -> None:
        if not ray.is_initialized():
            return
        if _is_answer(ref):
            ended(None)
        else:
            ref._on_completed(settle)

    if hasattr(ref, "_on_ready"):
        ref._on_ready(lambda _: _tell(loop, look))
    else:
        ref._on_completed(settle)


def _is_answer(ref: Any) -> bool:
    """Whether a finished object is an answer for certain, and not an error; False if it cannot be told cheaply."""
    try:
        worker = ray._private.worker.global_worker.core_worker
        [place] = worker.get_local_object_locations([ref]).values()
        if place["node_ids"]:
            return True  # in the object store, so larger than 100 kB: errors stay with their owner
        [stored] = worker.get_objects([ref], 0)
        return not bytes(stored.metadata).split(b",", maxsplit=1)[0].isdigit()  # errors are marked by a number
    except Exception:  # these are Ray's internals: the slower way remains
        return False


def was_cancelled(error: BaseException | None) -> bool:
    """Whether a request ended because its caller gave up, which says nothing about the replica."""
    cause = getattr(error, "cause", None)
    kinds = (TaskCancelledError, RequestCancelledError, asyncio.CancelledError)
    return isinstance(error, kinds) or isinstance(cause, kinds)


def _tell(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
        loop.call_soon_threadsafe(callback, *args)


def _prompt(asked_s: float, last_s: float, now_s: float) -> bool:
    """Whether a reader that asked then, `last_s` being when it got the last item, shows when the next one is there."""
    return asked_s - last_s <= _PROMPT_S or now_s - asked_s >= _WAITED * (now_s - last_s)


class StreamWatch:
    """One live stream, or an answer sent by value (`unary`), watched through its reader.

    Two things end, each told once on the router's loop: `freed()` when the replica has produced the last item, and
    `ended(error or None, duration_s)` when it is known how: the reader came to the end or to an error, Ray reported
    one, or the reader dropped a stream that was complete. A reader that drops it earlier counts as cancelled.
    `marked()` is called at item `MARK`. The duration is until the last item was produced, however slow the reader is.
    """

    __slots__ = (
        *("_asked_s", "_dropped", "_ended", "_freed", "_freed_s", "_last_s", "_loop", "_marked", "_now_s", "_over"),
        *("_paced_items", "_paced_s", "_started_s", "answers", "items", "times_s", "__weakref__"),
    )

    def __init__(
        self,
        result: ReplicaResult,
        loop: asyncio.AbstractEventLoop,
        now_s: Callable[[], float],
        *,
        freed: Callable[[], None],
        ended: Callable[[BaseException | None, float], None],
        marked: Callable[[], None] | None = None,
        unary: bool = False,
    ) -> None:
        self.items = 0
        self.times_s: list[float] = []
        """Of the first items, since the start; NaN where the reader was late to ask."""
        self.answers: list[Any] | None = None
        """The first items themselves, if somebody wants them: set to a list before the reader starts."""
        self._loop, self._now_s = loop, now_s
        self._freed, self._ended, self._marked = freed, ended, marked
        self._started_s = self._last_s = now_s()
        self._freed_s: float | None = None
        self._asked_s: float | None = None
        """Since when the reader has been waiting for an item."""
        self._paced_items, self._paced_s = 0, 0.0
        self._dropped = self._over = False
        self._attach(result, unary)

    @property
    def first_item_s(self) -> float:
        """Time to the first item; NaN if there is none or the reader was late to ask."""
        return self.times_s[0] if self.times_s else math.nan

    @property
    def last_item_s(self) -> float:
        """When its reader got the last item; that never was if it is minus infinite."""
        return self._last_s if self.items else -math.inf

    @property
    def waited_s(self) -> float:
        """How long the reader has been waiting for the next item; 0 if it does not wait. From any thread."""
        asked_s = self._asked_s
        return max(self._now_s() - asked_s, 0.0) if asked_s is not None else 0.0

    def pace(self) -> tuple[int, float]:
        """Items so far, after the first, that the reader was waiting for, and the time that they took.

        Both only grow; the time of an item that has not come yet counts. From any thread.
        """
        asked_s, last_s, waited_s = self._asked_s, self._last_s, self._paced_s
        if asked_s is not None and self.items and (now_s := self._now_s()) > last_s:
            waited_s += now_s - last_s if _prompt(asked_s, last_s, now_s) else 0.0
        return self._paced_items, waited_s

    def _attach(self, result: ReplicaResult, unary: bool) -> None:
        """Put the reader's calls through this watch. The result is held weakly: a cycle would keep answers alive."""
        held, kind = weakref.ref(result), type(result)

        def asynchronous(method: str) -> Any:
            async def call() -> Any:
                self._asked_s = asked_s = self._now_s()
                try:
                    item = await getattr(kind, method)(held())
                except StopAsyncIteration:
                    self._read_end(None)
                    raise
                except Exception as error:  # not a cancelled wait: the reader may ask again
                    self._read_end(error)
                    raise
                self._item(item, asked_s)
                if unary:
                    self._read_end(None)
                return item

            return call

        def blocking(method: str) -> Any:
            def call(*args: Any) -> Any:
                self._asked_s = asked_s = self._now_s()
                try:
                    item = getattr(kind, method)(held(), *args)
                except StopIteration:
                    self._read_end(None)
                    raise
                except TimeoutError:
                    raise  # the reader may ask again
                except Exception as error:
                    self._read_end(error)
                    raise
                self._item(item, asked_s)
                if unary:
                    self._read_end(None)
                return item

            return call

        waits, blocks = ("get_async", "get") if unary else ("__anext__", "__next__")
        setattr(result, waits, asynchronous(waits))
        setattr(result, blocks, blocking(blocks))
        weakref.finalize(result, _tell, self._loop, self._on_dropped).atexit = False
        result.add_done_callback(self._on_done)

    # ------------------------------------------------------------------ any thread

    def _item(self, item: Any, asked_s: float) -> None:
        now_s = self._now_s()
        prompt = _prompt(asked_s, self._last_s, now_s)
        if prompt and self.items:
            self._paced_items += 1
            self._paced_s += now_s - self._last_s
        self._asked_s = None
        self.items += 1
        if self.items <= MARK:
            self.times_s.append(now_s - self._started_s if prompt else math.nan)
            if self.answers is not None:
                self.answers.append(item)
            if self.items == MARK and self._marked is not None:
                _tell(self._loop, self._marked)
        self._last_s = now_s

    def _read_end(self, error: BaseException | None) -> None:
        self._asked_s = None
        _tell(self._loop, self._end, error)

    def _on_done(self, outcome: object) -> None:
        _tell(self._loop, self._on_produced, outcome if isinstance(outcome, BaseException) else None)

    # ------------------------------------------------------------------ the router's loop

    def _free(self) -> float:
        if self._freed_s is None:
            self._freed_s = self._now_s()
            self._freed()
        return self._freed_s

    def _on_produced(self, error: BaseException | None) -> None:
        self._free()
        if error is not None or self._dropped:
            self._end(error or asyncio.CancelledError())

    def _on_dropped(self) -> None:
        self._dropped = True
        if self._freed_s is not None:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        freed_s = self._free()
        if not self._over:
            self._over = True
            self._ended(error, max(freed_s - self._started_s, 0.0))
