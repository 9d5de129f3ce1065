"""Serve without a cluster: its own routing code, which keeps its own order of callbacks, over stand-in replicas.

`Serve` is Ray's `AsyncioRouter` but for its constructor. So a late completion of a rejected attempt comes after the
second choice, as in real life, and what Ray changes in its order is changed here, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import gc
import itertools
import logging
import selectors
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import ray
from ray.exceptions import ActorDiedError, TaskCancelledError
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata, RequestProtocol
from ray.serve._private.common import ReplicaQueueLengthInfo as QueueInfo
from ray.serve._private.replica_result import ReplicaResult
from ray.serve._private.router import AsyncioRouter
from ray.serve.request_router import PendingRequest

from serve_app.router import PredictiveRouter
from serve_app.routing.request_router import Router
from shadecast.types import RoutingTable, State, TableRow

DEPLOYMENT = DeploymentID(name="model", app_name="app")
_IDS = itertools.count()


class Result(ReplicaResult):
    """What a replica gives back. The test decides: `accept`, `reject`, then `give` and `end`, or `die`.

    Done-callbacks come later and from elsewhere, as Ray's do. Who asks gets an error of its own, as with Ray: its
    traceback keeps the caller's frames, and with them whatever they hold.
    """

    def __init__(self, replica: Replica, request: PendingRequest, with_rejection: bool) -> None:
        self.replica, self.request = replica, request
        self.loop = asyncio.get_running_loop()
        self.word: asyncio.Future[QueueInfo] = self.loop.create_future()
        self.answer: asyncio.Future[Any] = self.loop.create_future()
        self.items: deque[Any] = deque()
        self.more = asyncio.Event()
        self.callbacks: list[Any] = []
        self.outcome: Any = None
        self.done = self.cancelled = self.accepted = False
        if not with_rejection:
            self.accepted = True

    # ------------------------------------------------------------------ the replica's side

    def accept(self, queue: int | None = None) -> Result:
        if not self.word.done():
            self.accepted = True
            ongoing = len(self.replica.running) if queue is None else queue
            self.word.set_result(QueueInfo(accepted=True, num_ongoing_requests=ongoing))
        return self

    def reject(self) -> Result:
        if not self.word.done():
            self.word.set_result(QueueInfo(accepted=False, num_ongoing_requests=self.replica.max_ongoing_requests))
        return self

    def give(self, *items: Any) -> Result:
        self.items.extend(items)
        self.more.set()
        return self

    def end(self, outcome: Any = None, raised: Exception | None = None) -> Result:
        """It is over: an answer, an error of Ray's, or one that user code has `raised`, which travels in the answer."""
        if self.done:
            return self
        self.done, self.outcome = True, raised or outcome
        error = self.outcome if isinstance(self.outcome, Exception) else None
        self.items.append(error or StopAsyncIteration())
        self.more.set()
        if not self.answer.done():
            if error is not None:
                self.answer.set_exception(error)
                self.answer.exception()  # retrieved: perhaps nobody asks
            else:
                self.answer.set_result(outcome)
        if not self.word.done():
            self.word.set_exception(error or TaskCancelledError())
            self.word.exception()
        self.replica.running.discard(self)
        callbacks, self.callbacks = self.callbacks, []
        for callback in callbacks:
            self.loop.call_soon(callback, None if raised is not None else outcome)
        return self

    def die(self) -> Result:
        return self.end(ActorDiedError())

    # ------------------------------------------------------------------ Serve's side

    async def get_rejection_response(self) -> QueueInfo:
        try:
            return await asyncio.shield(self.word)
        except asyncio.CancelledError:
            self.cancel()
            raise
        except TaskCancelledError:
            raise asyncio.CancelledError from None
        except Exception as error:
            raise copy.copy(error) from None

    async def get_async(self) -> Any:
        try:
            return await asyncio.shield(self.answer)
        except TaskCancelledError:
            raise asyncio.CancelledError from None
        except Exception as error:
            raise copy.copy(error) from None

    def get(self, timeout_s: float | None) -> Any:
        return asyncio.run_coroutine_threadsafe(self.get_async(), self.loop).result(timeout_s)

    async def __anext__(self) -> Any:
        while not self.items:
            if self.done:  # read on behind the end, or behind the error: Ray's streams simply end there
                raise StopAsyncIteration
            self.more.clear()
            await self.more.wait()
        item = self.items.popleft()
        if isinstance(item, TaskCancelledError):
            raise asyncio.CancelledError
        if isinstance(item, Exception):
            raise copy.copy(item)
        return item

    def __next__(self) -> Any:
        try:
            return asyncio.run_coroutine_threadsafe(self.__anext__(), self.loop).result()
        except StopAsyncIteration:
            raise StopIteration from None

    def add_done_callback(self, callback: Any) -> None:
        if self.done:
            self.loop.call_soon(callback, self.outcome)
        else:
            self.callbacks.append(callback)

    def cancel(self) -> None:
        if not self.done:
            self.cancelled = True
            self.loop.call_soon(self.end, TaskCancelledError())

    def to_object_ref(self) -> Any:
        if self.request.metadata.is_streaming or not self.request.metadata._by_reference:
            raise AssertionError("no object")
        return self

    async def to_object_ref_async(self) -> Any:
        return self.to_object_ref()

    def to_object_ref_gen(self) -> Any:
        return self

    def _on_completed(self, callback: Any) -> None:
        """Of the answer's object, which holds errors of user code, too."""
        if self.done:
            self.loop.call_soon(callback, self.outcome)
        else:
            self.callbacks.append(lambda _: callback(self.outcome))


@dataclass(eq=False)
class Replica:
    """A running replica. `says` is what it does with a request: "yes", "no" (full), "nothing", "dead", "error"."""

    name: str
    says: str = "yes"
    node_id: str = "node"
    max_ongoing_requests: int = 8
    availability_zone: str | None = None
    multiplexed_model_ids: set[str] = field(default_factory=set)
    replica_metadata: dict[str, Any] = field(default_factory=dict)
    sent: list[Result] = field(default_factory=list)
    running: set[Result] = field(default_factory=set)
    reserved: set[str] = field(default_factory=set)
    queue: int | None = None
    """What it says when asked; None: what is running."""
    tells_after_s: float = 0.0
    """How long it takes to say so."""
    is_cross_language: bool = False
    make: type[Result] = Result
    """The kind of its results."""
    _replica_info: Any = field(default_factory=lambda: SimpleNamespace(node_ip="192.0.2.1", port=None))

    @property
    def replica_id(self) -> ReplicaID:
        return ReplicaID(unique_id=self.name, deployment_id=DEPLOYMENT)

    @property
    def actor_id(self) -> Any:
        return None

    @property
    def copies(self) -> list[Result]:
        """Copies that were sent here."""
        return [r for r in self.sent if r.request.metadata.request_id.endswith("-shadow")]

    @property
    def live(self) -> list[Result]:
        """All that are no copies."""
        return [r for r in self.sent if not r.request.metadata.request_id.endswith("-shadow")]

    def try_send_request(self, pr: PendingRequest, with_rejection: bool) -> Result:
        if self.says == "error":
            raise RuntimeError("no way there")
        result = self.make(self, pr, with_rejection)
        self.sent.append(result)
        self.reserved.discard(pr.metadata._reserved_slot_token)
        match self.says:
            case "yes" if len(self.running) + len(self.reserved) < self.max_ongoing_requests or not with_rejection:
                self.running.add(result)
                result.accept()
            case "yes" | "no":
                result.reject()
            case "dead":
                result.die()
        return result

    async def reserve_slot(self, metadata: RequestMetadata) -> tuple[str, QueueInfo]:
        await asyncio.sleep(0)
        while self.says == "nothing":  # noqa: ASYNC110 - no event says so
            await asyncio.sleep(0.05)
        if self.says == "dead":
            raise ActorDiedError
        if self.says == "error":
            raise RuntimeError("no way there")
        token = f"slot-{next(_IDS)}"
        ongoing = len(self.running) + len(self.reserved)
        if self.says == "no" or ongoing >= self.max_ongoing_requests:
            return token, QueueInfo(accepted=False, num_ongoing_requests=self.max_ongoing_requests)
        self.reserved.add(token)
        return token, QueueInfo(accepted=True, num_ongoing_requests=ongoing + 1)

    async def release_slot(self, slot_token: str) -> int:
        self.reserved.discard(slot_token)
        return len(self.running) + len(self.reserved)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        await asyncio.sleep(self.tells_after_s)
        return len(self.running) + len(self.reserved) if self.queue is None else self.queue

    def __hash__(self) -> int:
        return id(self)


class _Metrics:
    """Serve's counts of queued and running requests, which are not looked at here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("wrap_"):
            return lambda *_, **__: contextlib.nullcontext()
        return lambda *_, **__: None


class Serve(AsyncioRouter):
    """Serve's router of one process, with a request router of ours and these replicas.

    `options` are further arguments of Serve's to the request router, `config` its sections of settings, and
    `router_kwargs` what a deployment gives in place of `{"config": config}`.
    """

    def __init__(
        self,
        *replicas: Replica,
        kind: type[Router] = PredictiveRouter,
        options: dict[str, Any] | None = None,
        router_kwargs: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        self.router: Any = kind(
            deployment_id=DEPLOYMENT,
            handle_source=DeploymentHandleSource.REPLICA,
            self_node_id="node",
            use_replica_queue_len_cache=True,
            **(options or {}),
        )
        self.router.initialize_state(**({"config": config} if router_kwargs is None else router_kwargs))
        self.router.update_replicas(list(replicas))
        self.replicas = {replica.name: replica for replica in replicas}
        self.deployment_id = DEPLOYMENT
        self._request_router = self.router
        self._request_router_class = kind
        self._request_router_kwargs = {}
        self._event_loop = asyncio.get_running_loop()
        self._request_router_initialized = asyncio.Event()
        self._request_router_initialized.set()
        self._metrics_manager = _Metrics()
        self._enable_strict_max_ongoing_requests = True
        self._deployment_available = True
        self._resolve_request_arg_func = _as_it_is
        self._objref_resolution_latency_ms = _Metrics()

    async def send(self, *args: Any, kwargs: dict[str, Any] | None = None, **metadata: Any) -> Any:
        """One handle call, as far as its result: `await (await serve.send(1)).get_async()` is the answer."""
        return await self.route_and_send_request(request(*args, kwargs=kwargs, **metadata), "response")

    def start(self, *args: Any, **metadata: Any) -> asyncio.Task[Any]:
        """The same in a task of its own, as every handle call has one."""
        return asyncio.get_running_loop().create_task(self.send(*args, **metadata))

    def scale(self, *replicas: Replica) -> None:
        """The deployment has these replicas now."""
        self.replicas = {replica.name: replica for replica in replicas}
        self.router.update_replicas(list(replicas))

    def take(self, made: RoutingTable) -> None:
        """A table of the coordinator's has come."""
        self.router.take_table(made)

    def report(self) -> Any:
        """This second's report, as the balancer gets it."""
        from shadecast.inbox import Inbox  # noqa: PLC0415

        message = self.router.make_report()
        if not hasattr(self, "_inbox"):
            self._inbox = Inbox()
        read, acknowledged = self._inbox.take(message, 0.0)
        self.router.reported(acknowledged, table_wanted=False)
        return read

    def close(self) -> None:
        """Nothing goes on."""
        if self.router._control is not None:
            self.router._control.cancel()


@contextlib.asynccontextmanager
async def serving(*replicas: Replica, **config: Any) -> AsyncIterator[Serve]:
    """A `Serve` for one scenario, at whose end every call must be over and nothing may be pending.

    Takes 1.2 s at the end, because picks that nobody sends count for a second at first: for scenarios in `VirtualTime`.
    """
    before = asyncio.all_tasks()
    serve = Serve(*replicas, **config)
    await settle()  # the replicas tell their queues
    try:
        yield serve
        await asyncio.sleep(1.2)
        if serve.router.calls.book.open_calls:
            gc.collect()  # streams that nobody reads any more
            await settle()
        assert serve.router.calls.book.open_calls == 0
        assert not any(serve.router.calls.routes.picks.in_flight)
    finally:
        serve.close()
    await settle()
    assert asyncio.all_tasks() <= before


class VirtualTime:
    """Time that passes only while everybody waits, and then at once, up to the next timer.

    Event loops of `loop`, and `time.monotonic` and `time.time` of all modules while it is `installed`, go by it.
    """

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.waits = 0
        """How often an event loop had nothing to do but to wait for a timer."""

    @contextlib.contextmanager
    def installed(self) -> Iterator[VirtualTime]:
        real = time.monotonic, time.time
        time.monotonic, time.time = (lambda: self.now_s), (lambda: 1.7e9 + self.now_s)
        try:
            yield self
        finally:
            time.monotonic, time.time = real

    def loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.SelectorEventLoop(_NoWaiting(self))

    def run(self, scenario: Any, timeout_s: float = 1000.0) -> Any:
        """Run a scenario in this time."""
        with self.installed(), asyncio.Runner(loop_factory=self.loop) as runner:
            return runner.run(asyncio.wait_for(scenario, timeout_s))


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """An asynchronous test, run in a `VirtualTime` of its own."""

    @functools.wraps(test)
    def run_it(*args: Any, **kwargs: Any) -> None:
        VirtualTime().run(test(*args, **kwargs))

    return run_it


_MOST_ROUNDS = 100_000
"""Of an event loop in one instant."""


class _NoWaiting(selectors.DefaultSelector):
    """Instead of waiting it puts the clock on."""

    def __init__(self, clock: VirtualTime) -> None:
        super().__init__()
        self.clock, self.rounds = clock, 0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0 if timeout is not None else None)
        self.rounds += 1
        if not ready and timeout:
            self.clock.now_s += timeout
            self.clock.waits += 1
            self.rounds = 0
        assert self.rounds < _MOST_ROUNDS, "somebody asks again and again without a pause: time stands still"
        return ready


class Log(logging.Handler):
    """What "ray.serve" logs while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def lines(self, least: int = logging.WARNING) -> list[str]:
        """Of that level and above."""
        return [record.getMessage() for record in self.records if record.levelno >= least]

    def __enter__(self) -> Log:
        logger = logging.getLogger("ray.serve")
        logger.addHandler(self)
        self.level_before = logger.level
        logger.setLevel(logging.INFO)  # whatever tests before this one have made Ray be silent about
        return self

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("ray.serve")
        logger.removeHandler(self)
        logger.setLevel(self.level_before)


async def _as_it_is(_: Any, __: Any) -> None:
    """Arguments are no responses of other calls."""


def metadata(method: str = "infer", **labels: Any) -> RequestMetadata:
    """What a handle call carries; an id of its own unless `request_id` says otherwise."""
    name = labels.pop("request_id", None) or f"r{next(_IDS)}"
    if labels.pop("http", False):
        labels |= {"_request_protocol": RequestProtocol.HTTP, "is_streaming": True}
    if "stream" in labels:
        labels["is_streaming"] = labels.pop("stream")
    return RequestMetadata(request_id=name, internal_request_id=name, call_method=method, **labels)


def request(*args: Any, kwargs: dict[str, Any] | None = None, **labels: Any) -> PendingRequest:
    """A pending call."""
    return PendingRequest(args=list(args), kwargs=kwargs or {}, metadata=metadata(**labels))


def table(version: int = 1, epoch: int = 1, age_s: float = 0.0, reference_s: float = 0.0, **rows: Any) -> RoutingTable:
    """A table of `name=share`, or `name=(share, capacity, mirror_fraction)`."""
    made = []
    for name, row in rows.items():
        share, capacity, mirror = row if isinstance(row, tuple) else (row, 1.0, 0.0)
        state = State.ACTIVE if share else State.SHADOWING
        made.append(TableRow(name, "node", state, share, capacity, 0.0, mirror, share * capacity))
    return RoutingTable("app/model", epoch, version, 1, tuple(made), age_s=age_s, reference_s=reference_s)


async def settle(rounds: int = 40) -> None:
    """Let everything happen that is due."""
    for _ in range(rounds):
        await asyncio.sleep(0)


def run(scenario: Any, timeout_s: float = 20.0) -> Any:
    """Run a test's scenario on an event loop of its own; nothing may be pending at its end."""
    assert not ray.is_initialized()
    return asyncio.run(asyncio.wait_for(scenario, timeout_s))
