"""How an accepted call ends, learned without taking part. Nothing here holds on to a result."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import TaskCancelledError
from ray.serve.exceptions import RequestCancelledError
from ray.serve.request_router import ReplicaResult

from serve_app.ray_api import is_answer, when_completed, when_ready

_MAX_STATUS_BYTES = 1_000_000
"""The status of an HTTP answer comes with the beginning of its body; larger first parts are not read twice for it."""


def tell(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: Any) -> None:
    """Have it called on a loop; nobody is left to tell where that is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *args)


def watch_end(
    result: ReplicaResult, loop: asyncio.AbstractEventLoop, ended: Callable[[BaseException | None], None]
) -> None:
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


def http_status(item: Any) -> int:
    """The status in the first part of an HTTP answer, pickled messages as Serve's proxy reads them; 200 if unknown."""
    if not isinstance(item, bytes) or len(item) > _MAX_STATUS_BYTES:
        return 200
    try:
        first = pickle.loads(item)[0]  # noqa: S301 - from our own replica: the proxy does the same with it
        return int(first["status"]) if first["type"] == "http.response.start" else 200
    except Exception:  # whatever a replica sent: what became of it is the proxy's to find out
        return 200
