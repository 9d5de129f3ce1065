"""Every private name of Ray that this project uses, each with its reason; nothing else touches one.

Ray's router API is alpha. When Ray moves, `tests/serve_app/test_ray_api.py` names what broke, and it is mended here, as
is what differs between the supported versions (docs/decisions/0082): what is there is used, no version is read.
Imported in users' processes: ray.serve and the standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import pickle
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import ray
from ray import serve
from ray._common.constants import HEAD_NODE_RESOURCE_NAME as HEAD_NODE_RESOURCE
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put, internal_kv_get_gcs_client
from ray.serve._private.common import ReplicaQueueLengthInfo as QueueInfo
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.context import _get_serve_batch_request_context, _get_serve_request_context
from ray.serve.exceptions import BackPressureError
from ray.serve.request_router import (
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

if TYPE_CHECKING:
    from serve_app.explained import Explained

try:  # no part of routing: where Ray moves it, spans have nothing of ours
    from ray.serve._private import tracing_utils as _tracing
except ImportError:
    _tracing = None

__all__ = ["HEAD_NODE_RESOURCE", "QueueInfo", "ServeRouter"]

logger = logging.getLogger("ray.serve")

_MAX_STATUS_BYTES = 1_000_000
"""The status of an HTTP answer comes with the beginning of its body; larger first parts are not read twice for it."""


class ServeRouter(LocalityMixin, MultiplexMixin, RequestRouter):
    """Serve's request router with what we need of its inside, under names of our own.

    `_choose_replica_for_request` is overridden because Serve starts a task for each request, which compares queues and
    wakes the request: where nothing is left to compare, the choice is made at once (docs/decisions/0045). The look-up
    by id is overridden because calls that one request makes share Serve's id, and one of two would wait for ever
    (docs/decisions/0041).
    """

    explained: Explained
    """What is kept of its decisions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.choose_now: Callable[[PendingRequest], RunningReplica | None] = self.choose_at_once
        """`choose_at_once` but for a request whose decision is kept: so the others pay nothing for it."""

    # ------------------------------------------------------------------ for the router to define

    @abstractmethod
    def choose_at_once(self, pending_request: PendingRequest) -> RunningReplica | None:
        """The usual choice where no other request waits; None leaves it to `choose_replicas` and Serve's way there."""

    @abstractmethod
    def asked(self, pending_request: PendingRequest) -> None:
        """A request will wait for a replica."""

    @abstractmethod
    def chosen(self, pending_request: PendingRequest, replica: RunningReplica) -> None:
        """Serve will send the request to this replica now."""

    @abstractmethod
    def given_up(self, pending_request: PendingRequest) -> None:
        """The request is cancelled, or cannot be routed."""

    @abstractmethod
    def pending_of(self, metadata: object) -> PendingRequest | None:
        """The request of that very metadata object that waits for a replica."""

    # ------------------------------------------------------------------ Serve's hooks

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        nobody_waits = not (is_retry or self._pending_requests_to_route or self.num_routing_tasks_in_backoff)
        chosen = self.choose_now(pending_request) if nobody_waits else None
        if chosen is not None:
            self._record_queue_wait_time(pending_request)  # Serve's metric of the time in the queue
            return chosen
        self.asked(pending_request)
        try:
            chosen = await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        except BaseException as error:  # perhaps just when it had been chosen for: nobody will send it
            self.given_up(pending_request)
            self.explained.refused(pending_request, error)
            raise
        self.chosen(pending_request, chosen)
        self.explained.compared(pending_request, chosen, came_back=is_retry)
        return cast("RunningReplica", chosen)

    async def _fulfill_pending_requests(self) -> None:
        if hasattr(RequestRouter, "_cancel_routing_task_for_pending_request"):
            await super()._fulfill_pending_requests()
        else:  # before Ray 2.60
            await self.route_those_that_wait()

    async def route_those_that_wait(self) -> None:
        """One of Serve's routing tasks, as from Ray 2.60 on: it stays with a request until that is routed or given up.

        Before, a task that found fewer requests than tasks left its own for others to route, which those of a router
        that matches requests exactly do not; and a task without a request picked replicas for nobody, without a pause.
        """
        routing = cast("asyncio.Task[None]", asyncio.current_task())
        try:
            while (pending := self._get_next_pending_request_to_route()) is not None:
                await self.route_one(pending, routing)
        except Exception:
            logger.exception("shadecast: a routing task has failed")
        finally:
            self._routing_tasks.discard(routing)
            self.num_routing_tasks_gauge.set(self.curr_num_routing_tasks)
            while self._pending_requests_to_fulfill and self._pending_requests_to_fulfill[0].future.done():
                self._pending_requests_to_fulfill.popleft()
            if self._pending_requests_to_route:
                self._maybe_start_routing_tasks()

    async def route_one(self, pending_request: PendingRequest, routing: asyncio.Task[None]) -> None:
        """Offer it replicas until one takes it. Its end from elsewhere ends the task `routing`, which waits for it."""
        future, under_way, attempts = pending_request.future, True, 0

        def end(_: object) -> None:
            if under_way:
                routing.cancel()

        future.add_done_callback(end)
        offered = self._choose_replicas_with_backoff(pending_request)
        try:
            async for candidates in offered:
                if future.done():
                    break
                replica = await self._select_from_candidate_replicas(candidates, attempts)
                if replica is not None:
                    self._fulfill_next_pending_request(replica, pending_request.metadata)
                    if future.done():
                        break
                attempts += 1
        finally:
            under_way = False
            await offered.aclose()

    def _get_pending_request_matching_internal_request_id(self, request_metadata: Any = None) -> PendingRequest | None:
        pending = self.pending_of(request_metadata)
        return pending if pending is not None and not pending.future.done() else None

    # ------------------------------------------------------------------ Serve's state

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop on which Serve routes; all of its calls come there."""
        return cast("asyncio.AbstractEventLoop", self._event_loop)

    @property
    def deployment(self) -> str:
        """ "app/name"."""
        return f"{self._deployment_id.app_name}/{self._deployment_id.name}"

    def queue_of(self, replica_id: ReplicaID) -> int | None:
        """A replica's queue as Serve knows it; None if it does not."""
        return cast("int | None", self._replica_queue_len_cache.get(replica_id))

    @property
    def own_place(self) -> tuple[str | None, str | None]:
        """This process's node and zone as far as Serve prefers replicas there; None where it does not."""
        return (
            self._self_node_id if self._prefer_local_node_routing else None,
            self._self_availability_zone if self._prefer_local_az_routing else None,
        )

    async def choose_as_serve(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None
    ) -> list[list[RunningReplica]]:
        """Serve's own rule, its locality and multiplexing included."""
        serves_rule = PowerOfTwoChoicesRequestRouter.choose_replicas
        chosen = await serves_rule(cast("Any", self), candidate_replicas, pending_request)
        return cast("list[list[RunningReplica]]", chosen)


# ---------------------------------------------------------------- requests and results


def is_by_reference(pending_request: PendingRequest) -> bool:
    """Whether the answer is an object of Ray's; else its bytes come with the call (gRPC between replicas)."""
    return bool(pending_request.metadata._by_reference)


def reserved_slot(pending_request: PendingRequest) -> str | None:
    """The token of the place that `choose_replica` has reserved for a request that is dispatched to it."""
    return cast("str | None", pending_request.metadata._reserved_slot_token)


def serialise_lazily(replica: RunningReplica, request: PendingRequest) -> None:
    """Let a replica make what it makes at its first request, which needs an event loop: then it sends from threads."""
    replica._get_replica_wrapper(request)


def is_tracing() -> bool:
    """Whether Serve makes OpenTelemetry spans in this process. Its module is there where Serve routes."""
    return _tracing is not None and bool(_tracing.is_tracing_enabled())


def set_span_attributes(attributes: dict[str, Any]) -> None:
    """On Serve's span of the request that is being routed, if it has one; those that are None are left out."""
    if _tracing is not None:
        _tracing.set_span_attributes(attributes)


def add_span(name: str, metadata: Any, attributes: dict[str, Any]) -> None:
    """A span without length in the trace of a request, for what becomes of it after it was routed."""
    context = _tracing.extract_propagated_context(metadata.tracing_context) if is_tracing() else None
    if context is not None:
        _tracing.get_tracer().start_span(name, context=context, attributes=attributes).end()


def current_request_ids() -> list[str]:
    """Serve's internal id of the request that is just being handled, or those of a batch; [""] outside of one."""
    contexts = _get_serve_batch_request_context() or [_get_serve_request_context()]
    return [str(context._internal_request_id) for context in contexts]


def object_of(result: Any) -> Any:
    """The object that an accepted unary request's answer comes as.

    Raises AssertionError, RuntimeError or AttributeError where there is none: a stream, or an answer by value. Before
    Ray 2.60 `to_object_ref` waits for the answer, and a router that calls it does nothing else meanwhile.
    """
    stream = getattr(result, "_obj_ref_gen", None)
    if stream is not None and result._obj_ref is None and not result._is_streaming:
        [ref] = stream._get_next_ref_n(1)  # looked at, and left for the caller to take
        return ref
    try:
        return result.to_object_ref()
    except TypeError as error:  # before Ray 2.60 an answer by value asks for a time limit before it says so
        raise RuntimeError("there is no object") from error


def when_ready(result: Any, ref: Any, call: Callable[[], None], settle: Callable[[Any], None]) -> None:
    """Have `call` called once a result's object is there, without fetching it, or `settle` with what it failed with.

    From another thread. A done-callback of a result does not show errors that user code raised: `call` looks for them.
    """
    if hasattr(ref, "_on_ready"):
        ref._on_ready(lambda _: call())
    elif getattr(result, "_obj_ref_gen", None) is not None:  # before Ray 2.60: it is there once its stream has ended
        result.add_done_callback(lambda outcome: settle(outcome) if isinstance(outcome, BaseException) else call())
    else:
        ref._on_completed(settle)


def when_completed(ref: Any, settle: Callable[[Any], None]) -> None:
    """Have `settle` called with an object, or the error in its place, once it is there. From another thread."""
    ref._on_completed(settle)


def is_answer(ref: Any) -> bool:
    """Whether a finished object is an answer for certain, and not an error; False if that cannot be told cheaply."""
    try:
        worker = ray._private.worker.global_worker.core_worker
        [place] = worker.get_local_object_locations([ref]).values()
        if place["node_ids"]:
            return True  # in the object store, so larger than 100 kB: errors stay with their owner
        [stored] = worker.get_objects([ref], 0)
        return not bytes(stored.metadata).split(b",", maxsplit=1)[0].isdigit()  # errors are marked by a number
    except Exception:  # the slower way remains
        return False


def http_status(item: Any) -> int:
    """The status in the first part of an HTTP answer, pickled messages as Serve's proxy reads them; 200 if unknown."""
    if not isinstance(item, bytes) or len(item) > _MAX_STATUS_BYTES:
        return 200
    try:
        first = pickle.loads(item)[0]  # noqa: S301 - from our own replica: the proxy does the same with it
        return int(first["status"]) if first["type"] == "http.response.start" else 200
    except Exception:  # whatever a replica sent: what became of it is the proxy's to find out
        return 200


async def wait_until_assigned(response: Any) -> None:
    """Wait until a replica has taken a handle's call: nothing public tells that before the answer is there."""
    fetch = getattr(response, "_fetch_future_result_async", None)
    if fetch is not None:
        await fetch()


def route_in_this_loop(handle: Any) -> None:
    """Lets a handle that nobody has used yet choose replicas in the running loop, not in a thread of its own.

    Serve does so where it is set up for throughput: no request is handed from thread to thread and back. The handle
    may then be called from this loop only. Where Serve would not have it, everything stays as it was.
    """
    with contextlib.suppress(Exception):
        handle._init(_run_router_in_separate_loop=False)


def rejecting(retry_after_s: float) -> dict[str, Any]:
    """Options of a deployment that tells rejected clients when to come back; {} where Serve cannot (Ray 2.57)."""
    known = "backpressure_config" in inspect.signature(serve.deployment).parameters
    return {"backpressure_config": {"retry_after_s": retry_after_s}} if known else {}


def retry_after_s(error: BackPressureError) -> float | None:
    """What a deployment that rejects a request says of that; None where it says nothing (always with Ray 2.57)."""
    return cast("float | None", getattr(error, "retry_after_s", None))


# ---------------------------------------------------------------- the cluster


def shared_secret(key: bytes, made: bytes, namespace: str) -> bytes:
    """A value that all processes of a cluster agree on: the first one's `made`. Blocks: call it in a thread."""
    _internal_kv_put(key, made, overwrite=False, namespace=namespace.encode())
    return cast("bytes", _internal_kv_get(key, namespace=namespace.encode()))


class Kept:
    """A list of plain values, kept by the cluster itself: it outlives the coordinator. Blocks."""

    def __init__(self, namespace: str, name: str) -> None:
        self.namespace, self.name = namespace.encode(), name.encode()

    def load(self) -> list[Any]:
        """As it was saved last; empty where that cannot be read."""
        kept = _internal_kv_get(self.name, namespace=self.namespace)
        try:
            return list(json.loads(kept or b"[]"))
        except (TypeError, ValueError):
            return []

    def save(self, items: Sequence[Any]) -> None:
        """Keep these."""
        _internal_kv_put(self.name, json.dumps(list(items)).encode(), overwrite=True, namespace=self.namespace)


def draining_nodes() -> list[str]:
    """Ids of the nodes that Ray is about to take away: preempted, scaled down, `ray drain-node`. Blocks."""
    client = internal_kv_get_gcs_client()
    if hasattr(client, "get_draining_nodes"):
        return list(client.get_draining_nodes(timeout=5))
    return list(ray._private.state.state.get_draining_nodes())  # before Ray 2.60


def deployed_router(app_name: str, name: str) -> tuple[str, dict[str, Any]] | None:
    """Import path and arguments of the router that a deployment was last deployed with; "" is Serve's default.

    Serve tells its routers of a change, but keeps the router objects that it has. None where there is no such
    deployment. Blocks: call it in a thread.
    """
    from ray.serve._private.common import DeploymentID  # noqa: PLC0415 - not in users' processes
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE  # noqa: PLC0415

    with contextlib.suppress(ValueError):  # Serve does not run
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        config = ray.get(controller.get_deployment_config.remote(DeploymentID(name, app_name)), timeout=5)
        if config is not None:
            router = config.request_router_config
            path = "" if router.is_default_request_router() else str(router.request_router_class)
            return path, dict(router.request_router_kwargs or {})
    return None
