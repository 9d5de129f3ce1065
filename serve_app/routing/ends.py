"""How an accepted call ends, learned without taking part. Nothing here holds on to a result."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import ray
from ray.exceptions import TaskCancelledError
from ray.serve.exceptions import RequestCancelledError
from ray.serve.request_router import ReplicaResult

from serve_app.ray_api import is_answer, object_of, when_completed, when_ready

logger = logging.getLogger("ray.serve")

_SOON_S = 0.02


def tell(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: Any) -> None:
    """Have it called on a loop; nobody is left to tell where that is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *args)


class Soon:
    """Does on a loop what other threads learn of: at once, and within `_SOON_S` where it has just done something.

    Waking a loop for each call showed in the throughput of short ones; a busy router catches up whenever it chooses.
    """

    def __init__(self, is_urgent: Callable[[], bool]) -> None:
        self.loop: asyncio.AbstractEventLoop = cast("asyncio.AbstractEventLoop", None)
        self.left: deque[Callable[[], None]] = deque()
        self._is_urgent, self._looks_later = is_urgent, False

    def call(self, callback: Callable[[], None]) -> None:
        """From any thread."""
        self.left.append(callback)
        if not self._looks_later or self._is_urgent():
            tell(self.loop, self.catch_up)

    def catch_up(self) -> None:
        """Do what is left; on the loop."""
        while self.left:
            try:
                self.left.popleft()()
            except Exception:  # it may be a request's choice that does this
                logger.exception("shadecast: the end of a request was not taken in")
            if not self._looks_later:
                self._looks_later = True
                self.loop.call_later(_SOON_S, self._look)

    def _look(self) -> None:
        self._looks_later = False  # before looking: what comes from now on wakes the loop itself
        self.catch_up()


def watch_end(
    result: ReplicaResult,
    on_loop: Callable[[Callable[[], None]], None],
    ended: Callable[[BaseException | None, float], None],
    is_answered: Callable[[], bool] = bool,
) -> None:
    """Have `ended(error or None, when)` called by `on_loop` once, when an accepted unary request has ended.

    Errors of user code travel in the answer's own object. Where the caller does not have the answer yet (`is_answered`)
    that is looked at where it lies, without fetching or deserialising it: a large one may never be wanted here.
    """

    def settle(outcome: object) -> None:
        on_loop(functools.partial(ended, outcome if isinstance(outcome, BaseException) else None, time.monotonic()))

    try:
        ref = object_of(result)
    except (AssertionError, RuntimeError, AttributeError):  # sent by value, or a stream: no object
        result.add_done_callback(settle)
        return

    def look(at_s: float) -> None:
        if is_answered() or (ray.is_initialized() and is_answer(ref)):
            ended(None, at_s)
        elif ray.is_initialized():
            when_completed(ref, settle)

    when_ready(result, ref, lambda: on_loop(functools.partial(look, time.monotonic())), settle)


def was_cancelled(error: BaseException | None) -> bool:
    """Whether a request ended because its caller gave up, which says nothing about the replica."""
    cause = getattr(error, "cause", None)
    kinds = (TaskCancelledError, RequestCancelledError, asyncio.CancelledError)
    return isinstance(error, kinds) or isinstance(cause, kinds)
