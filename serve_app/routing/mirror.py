"""Copies of requests to replicas on trial: sent beside the primary, never before it, their answers thrown away.

A copy has a concurrency cap and a deadline of its own, is dropped rather than queued, and nothing that happens to it
reaches the primary: `copy` is called after the primary was accepted and only starts a task.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaResult, RunningReplica

from serve_app.copying import METADATA_KEY
from serve_app.ray_api import is_by_reference, object_of, serialise_lazily, when_completed
from serve_app.routing.ends import tell, watch_end
from serve_app.shadow import SHADOW_SUFFIX
from serve_app.user_functions import UserFunction, comparison
from shadecast.config import TrialConfig
from shadecast.pairs import MISSING, Pair
from shadecast.reading import MARK, Reading
from shadecast.token_pairs import TokenCopy, shortened
from shadecast.types import PairedSample

logger = logging.getLogger("ray.serve")

_MOST_COMPARED = 4
"""At the same time: a function that hangs must not take all threads of the router's loop."""
_LARGE_BYTES = 1_000_000
"""Larger arguments are serialised in a thread: the router's loop has other requests to send meanwhile."""


class Mirror:
    """Sends copies and pairs their durations with the primaries'. All calls come from the router's event loop."""

    def __init__(
        self, config: TrialConfig, on_pair: Callable[[PairedSample], None], on_drop: Callable[[], None]
    ) -> None:
        self._on_pair, self._on_drop = on_pair, on_drop
        self._under_way: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._comparing = 0
        self._serial = itertools.count()
        """Calls that one request makes share Serve's id; their copies do not."""
        self.configure(config)

    def configure(self, config: TrialConfig) -> None:
        """Go by other settings from the next copy on."""
        before, self._config = getattr(self, "_config", None), config
        if before is None or (before.compare, before.compare_tolerance) != (config.compare, config.compare_tolerance):
            self._compared = comparison(config)

    @property
    def under_way(self) -> int:
        """Copies that have not ended yet."""
        return sum(self._under_way.values())

    def copyable(self, request: PendingRequest, replica: RunningReplica | None = None) -> bool:
        """Whether a request may be copied: a method declared safe, and a body that is not streamed through a proxy.

        Declared in the configuration (`copy_methods`), or by `serve_app.copying.copy_safe` in the code of `replica`.
        """
        metadata = request.metadata
        if metadata.is_http_request or metadata.is_grpc_request:
            return False
        methods = self._config.copy_methods
        if "*" in methods or metadata.call_method in methods:
            return True
        return replica is not None and metadata.call_method in replica.replica_metadata.get(METADATA_KEY, ())

    def copy(
        self,
        request: PendingRequest,
        candidate: RunningReplica,
        primary: tuple[str, float],
        result: ReplicaResult,
        reading: Reading | None = None,
        *,
        tokens: Callable[[], TokenCopy | None] = lambda: None,
    ) -> Pair | None:
        """Start a copy of an accepted request; None if the candidate has its fill already (the copy is dropped).

        `primary` is the replica that has accepted it and the others there, `result` what came back, `reading` how it
        is read if it is a stream, `tokens` how it is copied if a language model is asked.
        """
        candidate_id = candidate.replica_id.unique_id
        limit = min(self._config.mirror_concurrency, candidate.max_ongoing_requests)
        if self._under_way.get(candidate_id, 0) >= limit:
            self._on_drop()
            return None
        copy = tokens()
        equal = (self._compared or None) if copy is None else None  # for both halves alike
        pair = Pair(candidate_id, *primary, functools.partial(self._complete, equal), reading)
        pair.copy = copy
        model_id = request.metadata.multiplexed_model_id
        pair.cold = bool(model_id) and model_id not in candidate.multiplexed_model_ids
        if equal is not None:
            self._keep_answer(pair, result)
        self._under_way[candidate_id] = self._under_way.get(candidate_id, 0) + 1
        self._start(self._send(request, candidate, pair, equal is not None))
        return pair

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------------ pairs

    def _keep_answer(self, pair: Pair, result: ReplicaResult) -> None:
        """Have the primary's answer kept for the comparison, whether or not its caller has read it yet."""
        if pair.reading is not None:
            pair.reading.answers = []
            return
        loop = asyncio.get_running_loop()

        def keep(answer: Any) -> None:
            pair.primary_answer = answer

        def arrived(answer: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(keep, answer)

        try:
            when_completed(object_of(result), arrived)
        except (AssertionError, RuntimeError, AttributeError):  # sent by value: only its caller sees it
            logger.debug("shadecast: the answer of %s cannot be compared", pair.primary_id)

    def _complete(self, equal: UserFunction | None, pair: Pair) -> None:
        if equal is None or not (pair.primary_ok and pair.shadow_ok) or self._comparing >= _MOST_COMPARED:
            self._emit(pair, None)
        else:
            self._start(self._compare(pair, equal))

    async def _compare(self, pair: Pair, equal: UserFunction) -> None:
        """In a thread, for answers may be large and the function is the user's."""
        verdict = None
        self._comparing += 1
        try:
            for _ in range(50):  # the answer and its end arrive in any order
                primary, shadow = pair.answers()
                if primary is not MISSING:
                    break
                await asyncio.sleep(0.02)
            if primary is not MISSING and shadow is not MISSING:
                compare = functools.partial(equal, primary, shadow, read=bool)
                verdict = await asyncio.get_running_loop().run_in_executor(None, compare)
        finally:
            self._comparing -= 1
        self._emit(pair, verdict)

    def _emit(self, pair: Pair, equal: bool | None) -> None:
        if (sample := pair.sample(equal)) is not None:
            self._on_pair(sample)

    # ------------------------------------------------------------------ copies

    async def _send(self, request: PendingRequest, candidate: RunningReplica, pair: Pair, keep: bool) -> None:
        started_s = time.monotonic()
        result = None
        judged = True
        try:
            args, kwargs = request.args, request.kwargs
            if pair.copy is not None:
                args, kwargs = shortened(args, kwargs)
            shadow = PendingRequest(
                args=args,
                kwargs=kwargs,
                metadata=replace(
                    request.metadata,
                    request_id=request.metadata.request_id + SHADOW_SUFFIX,
                    internal_request_id=f"{request.metadata.internal_request_id}/{next(self._serial)}{SHADOW_SUFFIX}",
                    tracing_context=None,
                ),
                resolved=True,
            )
            async with asyncio.timeout(self._config.mirror_deadline_s):
                result = await _send_beside(candidate, shadow)
                answer = await result.get_rejection_response()
                if answer is None or not answer.accepted:
                    judged = False  # full: says nothing about its speed
                    self._on_drop()
                    return
                started_s = time.monotonic()
                pair.shadow_in_flight = max(answer.num_ongoing_requests - 1.0, 0.0)
                if request.metadata.is_streaming:
                    await self._drain(result, pair, started_s, keep)
                elif keep or not is_by_reference(request):
                    pair.shadow_answer = await result.get_async()
                else:
                    pair.shadow_ok = await _ended(result) is None
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
            if pair.copy is not None:
                pair.copy.begun()
            if result is not None and (request.metadata.is_streaming or not (judged and pair.shadow_ok)):
                result.cancel()
            pair.shadow_done(time.monotonic() - started_s if judged else None)

    async def _drain(self, result: ReplicaResult, pair: Pair, started_s: float, keep: bool) -> None:
        """Read the first items of a copied stream and when they came."""
        items = []
        for _ in range(MARK):
            try:
                item = await result.__anext__()
            except StopAsyncIteration:
                if pair.copy is not None:
                    pair.copy.ended = True
                break
            pair.times_s.append(time.monotonic() - started_s)
            if pair.copy is not None and pair.copy.took(item):
                break
            if keep:
                items.append(item)
        pair.shadow_answer = items


async def _send_beside(candidate: RunningReplica, shadow: PendingRequest) -> ReplicaResult:
    """Send a copy; one with large arguments from a thread, so that no other request waits for its serialisation."""
    send = functools.partial(candidate.try_send_request, shadow, with_rejection=True)
    if not _is_large(shadow) or not is_by_reference(shadow):
        return send()
    serialise_lazily(candidate, shadow)
    return await asyncio.get_running_loop().run_in_executor(None, send)


def _is_large(request: PendingRequest) -> bool:
    for argument in (*request.args, *request.kwargs.values()):
        size = getattr(argument, "nbytes", None)
        if size is None and isinstance(argument, (bytes, bytearray, str, list, tuple, dict)):
            size = len(argument)  # of a container a guess: its items are at least a byte each
        if isinstance(size, int) and size >= _LARGE_BYTES:
            return True
    return False


async def _ended(result: ReplicaResult) -> BaseException | None:
    """Wait for an accepted request's end; the error it ended with, if any."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[BaseException | None] = loop.create_future()

    def settle(error: BaseException | None, _at_s: float) -> None:
        if not done.done():
            done.set_result(error)

    watch_end(result, functools.partial(tell, loop), settle)
    return await done
