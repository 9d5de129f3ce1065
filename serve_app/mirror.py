"""Copies of requests to replicas on trial: sent beside the primary, never before it, their answers thrown away.

A copy has a concurrency cap and a deadline of its own, is dropped rather than queued, and nothing that happens to it
reaches the primary: `copy` is called after the primary was accepted and only starts a task. Runs in users'
processes: standard library, ray.serve and shadecast only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from ray.exceptions import TaskCancelledError
from ray.serve.context import _get_serve_request_context
from ray.serve.exceptions import RequestCancelledError
from ray.serve.request_router import PendingRequest, ReplicaResult, RunningReplica

from shadecast.config import TrialConfig
from shadecast.types import PairedSample

logger = logging.getLogger("ray.serve")

SHADOW_SUFFIX = "-shadow"


def is_shadow() -> bool:
    """Whether the request that is being handled is a copy, whose answer is thrown away. For use in user code."""
    return str(_get_serve_request_context().request_id).endswith(SHADOW_SUFFIX)


@dataclass(slots=True)
class _Pair:
    """Both halves of a mirrored request; complete when both durations are known."""

    candidate_id: str
    primary_id: str
    primary_in_flight: float
    shadow_in_flight: float = 0.0
    primary_s: float | None = None
    shadow_s: float | None = None
    primary_ok: bool = True
    shadow_ok: bool = True


class Mirror:
    """Sends copies and pairs their durations with the primaries'. All calls come from the router's event loop."""

    def __init__(
        self,
        config: TrialConfig,
        now_s: Callable[[], float],
        on_pair: Callable[[PairedSample], None],
        on_drop: Callable[[], None],
    ) -> None:
        self._config = config
        self._now_s = now_s
        self._on_pair = on_pair
        self._on_drop = on_drop
        self._under_way: dict[str, int] = {}
        self._pairs: dict[str, _Pair] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def under_way(self) -> int:
        """Copies that have not ended yet."""
        return sum(self._under_way.values())

    def copyable(self, request: PendingRequest) -> bool:
        """Whether a request may be copied: a method declared safe, and a body that is not streamed through a proxy."""
        methods = self._config.copy_methods
        metadata = request.metadata
        safe = "*" in methods or metadata.call_method in methods
        return safe and not metadata.is_http_request and not metadata.is_grpc_request

    def copy(
        self, request: PendingRequest, candidate: RunningReplica, primary_id: str, primary_in_flight: float
    ) -> bool:
        """Start a copy of an accepted request; False if the candidate has its fill already (the copy is dropped)."""
        candidate_id = candidate.replica_id.unique_id
        limit = min(self._config.mirror_concurrency, candidate.max_ongoing_requests)
        if self._under_way.get(candidate_id, 0) >= limit:
            self._on_drop()
            return False
        request_id = request.metadata.internal_request_id
        self._pairs[request_id] = pair = _Pair(candidate_id, primary_id, primary_in_flight)
        self._under_way[candidate_id] = self._under_way.get(candidate_id, 0) + 1
        task = asyncio.get_running_loop().create_task(self._send(request, candidate, request_id, pair))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    def primary_done(self, request_id: str, duration_s: float | None, *, ok: bool) -> None:
        """The primary of a copied request has ended; a duration of None (cancelled) voids the pair."""
        pair = self._pairs.get(request_id)
        if pair is None:
            return
        if duration_s is None:
            del self._pairs[request_id]
            return
        pair.primary_s, pair.primary_ok = duration_s, ok
        self._complete(request_id, pair)

    def _complete(self, request_id: str, pair: _Pair) -> None:
        if pair.primary_s is None or pair.shadow_s is None or self._pairs.pop(request_id, None) is None:
            return
        self._on_pair(
            PairedSample(
                pair.candidate_id,
                pair.primary_id,
                pair.primary_s,
                pair.shadow_s,
                pair.primary_in_flight,
                pair.shadow_in_flight,
                pair.primary_ok,
                pair.shadow_ok,
            )
        )

    async def _send(self, request: PendingRequest, candidate: RunningReplica, request_id: str, pair: _Pair) -> None:
        started_s = self._now_s()
        result = None
        judged = True
        try:
            shadow = PendingRequest(
                args=request.args,
                kwargs=request.kwargs,
                metadata=replace(
                    request.metadata,
                    request_id=request.metadata.request_id + SHADOW_SUFFIX,
                    internal_request_id=request_id + SHADOW_SUFFIX,
                    tracing_context=None,
                ),
                resolved=True,
            )
            async with asyncio.timeout(self._config.mirror_deadline_s):
                result = candidate.try_send_request(shadow, with_rejection=True)
                answer = await result.get_rejection_response()
                if answer is None or not answer.accepted:
                    judged = False  # full: says nothing about its speed
                    self._on_drop()
                    return
                started_s = self._now_s()
                pair.shadow_in_flight = max(answer.num_ongoing_requests - 1.0, 0.0)
                error = await _ended(result)
            pair.shadow_ok = error is None
        except TimeoutError:
            pair.shadow_ok = False
        except asyncio.CancelledError:
            judged = False
            raise
        except Exception as error:  # whatever a candidate does, the primary must not see it
            logger.debug("shadecast: copy to %s failed: %s", pair.candidate_id, error)
            pair.shadow_ok = False
        finally:
            self._under_way[pair.candidate_id] -= 1
            if not self._under_way[pair.candidate_id]:
                del self._under_way[pair.candidate_id]
            if result is not None and not (judged and pair.shadow_ok):
                result.cancel()
            if judged:
                pair.shadow_s = self._now_s() - started_s
                self._complete(request_id, pair)
            else:
                self._pairs.pop(request_id, None)


async def _ended(result: ReplicaResult) -> BaseException | None:
    """Wait for an accepted request's end; the error it ended with, if any."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[BaseException | None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if not done.done():
            done.set_result(error)

    watch_end(result, loop, settle)
    return await done


def watch_end(
    result: ReplicaResult, loop: asyncio.AbstractEventLoop, ended: Callable[[BaseException | None], None]
) -> None:
    """Call `ended(error or None)` on `loop` once, when an accepted request has ended.

    A done-callback of the result itself does not show errors that user code raised (Ray 2.60 hands it None, because
    they travel in the answer's own object), so unary results are watched through their object reference.
    """
    try:
        watch = result.to_object_ref()._on_completed
    except (AssertionError, RuntimeError, AttributeError):  # a stream, or a result sent by value
        watch = result.add_done_callback

    def settle(outcome: object) -> None:
        error = outcome if isinstance(outcome, BaseException) else None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            loop.call_soon_threadsafe(ended, error)

    watch(settle)


def was_cancelled(error: BaseException | None) -> bool:
    """Whether a request ended because its caller gave up, which says nothing about the replica."""
    cause = getattr(error, "cause", None)
    kinds = (TaskCancelledError, RequestCancelledError, asyncio.CancelledError)
    return isinstance(error, kinds) or isinstance(cause, kinds)
