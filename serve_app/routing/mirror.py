"""Copies of requests to replicas on trial: sent beside the primary, never before it, their answers thrown away.

A copy has a concurrency cap and a deadline of its own, is dropped rather than queued, and nothing that happens to it
reaches the primary: `copy` is called after the primary was accepted and only starts a task. Runs in users'
processes: standard library, ray.serve and shadecast only.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ray.serve.context import _get_serve_request_context
from ray.serve.request_router import PendingRequest, ReplicaResult, RunningReplica

from serve_app.copying import METADATA_KEY
from serve_app.routing.user_functions import load_function
from serve_app.routing.watch import MARK, StreamWatch, watch_end
from shadecast.compare import answers_equal
from shadecast.config import TrialConfig
from shadecast.types import PairedSample

logger = logging.getLogger("ray.serve")

SHADOW_SUFFIX = "-shadow"
_LARGE_BYTES = 1_000_000
"""Larger arguments are serialised in a thread: the router's loop has other requests to send meanwhile."""
_MISSING = object()


_KEYS = itertools.count()


def key_of(request: PendingRequest) -> str:
    """A key of this very call: Serve's own id is shared by all handle calls that one request makes."""
    key: str | None = request.__dict__.get("shadecast_key")
    if key is None:
        key = f"{request.metadata.internal_request_id}/{next(_KEYS)}"
        request.__dict__["shadecast_key"] = key
    return key


def is_shadow() -> bool:
    """Whether the request that is being handled is a copy, whose answer is thrown away. For use in user code."""
    return str(_get_serve_request_context()._internal_request_id).endswith(SHADOW_SUFFIX)


@dataclass(slots=True)
class _Pair:
    """Both halves of a mirrored request; complete when both are known.

    Of streams the first items are compared: `stream` watches the primary's, `times_s` are the copy's.
    """

    candidate_id: str
    primary_id: str
    primary_in_flight: float
    stream: StreamWatch | None = None
    shadow_in_flight: float = 0.0
    primary_s: float | None = None
    shadow_s: float | None = None
    primary_ok: bool = True
    shadow_ok: bool = True
    times_s: list[float] = field(default_factory=list)
    primary_answer: Any = _MISSING
    shadow_answer: Any = _MISSING

    def compared(self) -> tuple[float, float] | None:
        """Seconds on the primary and on the copy for the same work; None if that cannot be told."""
        primary_s, shadow_s = self.primary_s, self.shadow_s
        if primary_s is None or shadow_s is None:
            return None
        if self.stream is None or not (self.primary_ok and self.shadow_ok):
            return primary_s, shadow_s
        if not self.stream.items and not self.times_s:
            return primary_s, shadow_s
        both = zip(self.stream.times_s, self.times_s, strict=False)
        return next((pair for pair in reversed(list(both)) if not math.isnan(pair[0])), None)

    def answers(self) -> tuple[Any, Any]:
        """Both answers; of streams the first items."""
        return (self.stream.answers if self.stream is not None else self.primary_answer), self.shadow_answer


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
        self._equal = _comparison(config)

    @property
    def under_way(self) -> int:
        """Copies that have not ended yet."""
        return sum(self._under_way.values())

    @property
    def waiting(self) -> int:
        """Pairs of which a half is still missing."""
        return len(self._pairs)

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
        primary_id: str,
        primary_in_flight: float,
        *,
        primary: ReplicaResult | None = None,
        stream: StreamWatch | None = None,
    ) -> bool:
        """Start a copy of an accepted request; False if the candidate has its fill already (the copy is dropped).

        `primary` is the result that the caller gets, `stream` its watch if it is a stream.
        """
        candidate_id = candidate.replica_id.unique_id
        limit = min(self._config.mirror_concurrency, candidate.max_ongoing_requests)
        if self._under_way.get(candidate_id, 0) >= limit:
            self._on_drop()
            return False
        request_id = key_of(request)
        self._pairs[request_id] = pair = _Pair(candidate_id, primary_id, primary_in_flight, stream)
        if self._equal is not None:
            self._keep_answer(pair, primary)
        self._under_way[candidate_id] = self._under_way.get(candidate_id, 0) + 1
        self._start(self._send(request, candidate, request_id, pair))
        return True

    def primary_done(self, request_id: str, duration_s: float | None, *, ok: bool) -> None:
        """The primary of a copied request has ended; a duration of None (cancelled) voids the pair.

        Of a stream also called at item `watch.MARK`, which is as far as it is compared; the first call counts.
        """
        pair = self._pairs.get(request_id)
        if pair is None or pair.primary_s is not None:
            return
        if duration_s is None:
            del self._pairs[request_id]
            return
        pair.primary_s, pair.primary_ok = duration_s, ok
        self._complete(request_id, pair)

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------------ pairs

    def _keep_answer(self, pair: _Pair, primary: ReplicaResult | None) -> None:
        """Have the primary's answer kept for the comparison, whether or not its caller has read it yet."""
        if pair.stream is not None:
            pair.stream.answers = []
            return
        loop = asyncio.get_running_loop()

        def keep(answer: Any) -> None:
            pair.primary_answer = answer

        def arrived(answer: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(keep, answer)

        try:
            primary.to_object_ref()._on_completed(arrived)  # type: ignore[union-attr]
        except (AssertionError, RuntimeError, AttributeError):  # sent by value: only its caller sees it
            logger.debug("shadecast: the answer of %s cannot be compared", pair.primary_id)

    def _complete(self, request_id: str, pair: _Pair) -> None:
        if pair.primary_s is None or pair.shadow_s is None or self._pairs.pop(request_id, None) is None:
            return
        if pair.stream is not None and pair.stream.items and not pair.times_s:
            pair.shadow_ok = False  # an empty stream where the primary's was not
        if self._equal is None or not (pair.primary_ok and pair.shadow_ok):
            self._emit(pair, None)
        else:
            self._start(self._compare(pair, self._equal))

    async def _compare(self, pair: _Pair, equal: Callable[[Any, Any], Any]) -> None:
        """In a thread, for answers may be large and the function is the user's."""
        verdict = None
        try:
            for _ in range(50):  # the answer and its end arrive in any order
                primary, shadow = pair.answers()
                if primary is not _MISSING:
                    break
                await asyncio.sleep(0.02)
            if primary is not _MISSING and shadow is not _MISSING:
                verdict = bool(await asyncio.get_running_loop().run_in_executor(None, equal, primary, shadow))
        except Exception as error:  # the user's function, or answers that cannot be compared
            logger.warning("shadecast: trial.compare = %r failed: %r", self._config.compare, error)
        self._emit(pair, verdict)

    def _emit(self, pair: _Pair, equal: bool | None) -> None:
        durations = pair.compared()
        if durations is None:
            return
        self._on_pair(
            PairedSample(
                pair.candidate_id,
                pair.primary_id,
                *durations,
                pair.primary_in_flight,
                pair.shadow_in_flight,
                pair.primary_ok,
                pair.shadow_ok,
                equal,
            )
        )

    # ------------------------------------------------------------------ copies

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
                result = await _send_beside(candidate, shadow)
                answer = await result.get_rejection_response()
                if answer is None or not answer.accepted:
                    judged = False  # full: says nothing about its speed
                    self._on_drop()
                    return
                started_s = self._now_s()
                pair.shadow_in_flight = max(answer.num_ongoing_requests - 1.0, 0.0)
                if request.metadata.is_streaming:
                    await self._drain(result, pair, started_s)
                elif self._equal is not None or not request.metadata._by_reference:
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
            if result is not None and (request.metadata.is_streaming or not (judged and pair.shadow_ok)):
                result.cancel()
            if judged:
                pair.shadow_s = self._now_s() - started_s
                self._complete(request_id, pair)
            else:
                self._pairs.pop(request_id, None)

    async def _drain(self, result: ReplicaResult, pair: _Pair, started_s: float) -> None:
        """Read the first items of a copied stream and when they came."""
        items = []
        for _ in range(MARK):
            try:
                item = await result.__anext__()
            except StopAsyncIteration:
                break
            pair.times_s.append(self._now_s() - started_s)
            if self._equal is not None:
                items.append(item)
        pair.shadow_answer = items


async def _send_beside(candidate: RunningReplica, shadow: PendingRequest) -> ReplicaResult:
    """Send a copy; one with large arguments from a thread, so that no other request waits for its serialisation."""
    send = functools.partial(candidate.try_send_request, shadow, with_rejection=True)
    if not _is_large(shadow) or not shadow.metadata._by_reference:
        return send()
    candidate._get_replica_wrapper(shadow)  # what it makes at first needs an event loop
    return await asyncio.get_running_loop().run_in_executor(None, send)


def _is_large(request: PendingRequest) -> bool:
    for argument in (*request.args, *request.kwargs.values()):
        size = getattr(argument, "nbytes", None)
        if size is None and isinstance(argument, (bytes, bytearray, str, list, tuple, dict)):
            size = len(argument)  # of a container a guess: its items are at least a byte each
        if isinstance(size, int) and size >= _LARGE_BYTES:
            return True
    return False


def _comparison(config: TrialConfig) -> Callable[[Any, Any], Any] | None:
    """The function that compares answers; None where it is not wanted."""
    match config.compare:
        case "":
            return None
        case "exact":
            return answers_equal
        case "close":
            return functools.partial(answers_equal, tolerance=config.compare_tolerance)
        case path:
            return load_function("trial.compare", path)


async def _ended(result: ReplicaResult) -> BaseException | None:
    """Wait for an accepted request's end; the error it ended with, if any."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[BaseException | None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if not done.done():
            done.set_result(error)

    watch_end(result, loop, settle)
    return await done
