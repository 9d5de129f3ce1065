"""Learning how an accepted call goes on, without taking part: its end, its error, the items of its stream.

Callbacks come to the router's event loop, whatever thread noticed. Nothing here holds on to a result: when its reader
drops it, it is freed as if nobody had watched.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import pickle
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import TaskCancelledError
from ray.serve.exceptions import RequestCancelledError
from ray.serve.request_router import ReplicaResult

from serve_app.ray_api import is_answer, when_completed, when_ready

MARK = 32
"""Items of a stream whose times are kept: what is compared with a copy."""
_WAITED = 0.1
_PROMPT_S = 0.002
"""A reader that asks later than this, and spends less of its time waiting, does not show when an item was there."""
_MAX_STATUS_BYTES = 1_000_000
"""The status of an HTTP answer comes with the beginning of its body; larger first parts are not read twice for it."""

Ended = Callable[[BaseException | None], None]


class HttpStatusError(Exception):
    """A request that a replica answered, but with a status of 500 or more."""


def tell(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: Any) -> None:
    """Have it called on a loop; nobody is left to tell where that is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *args)


def watch_end(result: ReplicaResult, loop: asyncio.AbstractEventLoop, ended: Ended) -> None:
    """Call `ended(error or None)` on `loop` once, when an accepted unary request has ended.

    Errors of user code travel in the answer's own object. So that is looked at where it lies, without fetching or
    deserialising it: a large answer may never be wanted in this process.
    """

    def settle(outcome: object) -> None:
        tell(loop, ended, outcome if isinstance(outcome, BaseException) else None)

    try:
        ref = result.to_object_ref()
    except (AssertionError, RuntimeError, AttributeError):  # sent by value, or a stream: no object
        result.add_done_callback(settle)
        return

    def look() -> None:
        if not ray.is_initialized():
            return
        if is_answer(ref):
            ended(None)
        else:
            when_completed(ref, settle)

    when_ready(ref, lambda: tell(loop, look), settle)


def was_cancelled(error: BaseException | None) -> bool:
    """Whether a request ended because its caller gave up, which says nothing about the replica."""
    cause = getattr(error, "cause", None)
    kinds = (TaskCancelledError, RequestCancelledError, asyncio.CancelledError)
    return isinstance(error, kinds) or isinstance(cause, kinds)


def _prompt(asked_s: float, last_s: float, now_s: float) -> bool:
    """Whether a reader that asked then, `last_s` being when it got the last item, shows when the next one is there."""
    return asked_s - last_s <= _PROMPT_S or now_s - asked_s >= _WAITED * (now_s - last_s)


class Reading:
    """How a stream, or an answer sent by value, comes to its reader. Written by the reader's thread.

    `marked` is called, there, at item `MARK`.
    """

    __slots__ = (
        *("_last_s", "_marked", "_paced_items", "_paced_s", "_started_s", "_status"),
        *("answers", "asked_s", "dropped", "items", "reported", "times_s"),
    )

    def __init__(self, marked: Callable[[], None], *, http: bool = False) -> None:
        self._marked = marked
        self._started_s = self._last_s = time.monotonic()
        self._paced_items, self._paced_s = 0, 0.0
        self._status = 0 if http else 200
        """Of an HTTP answer, as its first item says."""
        self.items = 0
        self.asked_s: float | None = None
        """Since when the reader has been waiting for an item."""
        self.times_s: list[float] = []
        """Of the first items, since the start; NaN where the reader was late to ask."""
        self.answers: list[Any] | None = None
        """The first items themselves, if somebody wants them: set to a list before the reader starts."""
        self.dropped = False
        """The reader holds the result no more."""
        self.reported = (0, 0.0)
        """The pace that was told already."""

    def ask(self) -> float:
        """The reader asks for an item; when it did."""
        self.asked_s = asked_s = time.monotonic()
        return asked_s

    def got(self, item: Any, asked_s: float) -> None:
        """The reader has the item that it asked for then."""
        now_s = time.monotonic()
        prompt = _prompt(asked_s, self._last_s, now_s)
        if prompt and self.items:
            self._paced_items += 1
            self._paced_s += now_s - self._last_s
        self.asked_s = None
        self.items += 1
        if self.items <= MARK:
            self.times_s.append(now_s - self._started_s if prompt else math.nan)
            if self.answers is not None:
                self.answers.append(item)
            if not self._status:
                self._status = _http_status(item)
            if self.items == MARK:
                self._marked()
        self._last_s = now_s

    @property
    def error(self) -> HttpStatusError | None:
        """What is wrong with an answer that came in good order."""
        return HttpStatusError(f"status {self._status}") if self._status >= 500 else None

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
        asked_s = self.asked_s
        return max(time.monotonic() - asked_s, 0.0) if asked_s is not None else 0.0

    def pace(self) -> tuple[int, float]:
        """Items so far, after the first, that the reader was waiting for, and the time that they took.

        Both only grow; the time of an item that has not come yet counts. From any thread.
        """
        asked_s, last_s, waited_s = self.asked_s, self._last_s, self._paced_s
        if asked_s is not None and self.items and (now_s := time.monotonic()) > last_s:
            waited_s += now_s - last_s if _prompt(asked_s, last_s, now_s) else 0.0
        return self._paced_items, waited_s


def _http_status(item: Any) -> int:
    """The status in the first part of an HTTP answer, pickled messages as Serve's proxy reads them; 200 if unknown."""
    if not isinstance(item, bytes) or len(item) > _MAX_STATUS_BYTES:
        return 200
    try:
        first = pickle.loads(item)[0]  # noqa: S301 - from our own replica: the proxy does the same with it
        return int(first["status"]) if first["type"] == "http.response.start" else 200
    except Exception:  # whatever a replica sent: what became of it is the proxy's to find out
        return 200
