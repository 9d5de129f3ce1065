"""Stand-ins for what Serve hands to a router: replicas, results, requests; nothing here talks to a cluster."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.common import ReplicaQueueLengthInfo as QueueInfo
from ray.serve.request_router import PendingRequest

from serve_app.router import PredictiveRouter
from shadecast.types import RoutingTable, State, TableRow

DEPLOYMENT = DeploymentID(name="model", app_name="app")


class FakeResult:
    """A unary result: `end(error or None)` finishes it."""

    def __init__(self, accepted: bool = True, others: int = 0, broken: Exception | None = None) -> None:
        self.info = QueueInfo(accepted=accepted, num_ongoing_requests=others + 1)
        self.broken = broken
        self.callbacks: list[Any] = []
        self.cancelled = False

    async def get_rejection_response(self) -> QueueInfo:
        await asyncio.sleep(0)
        if self.broken is not None:
            raise self.broken
        return self.info

    async def get_async(self) -> None:
        """Never awaited here."""

    def to_object_ref(self) -> FakeResult:
        return self

    def _on_completed(self, callback: Any) -> None:
        self.callbacks.append(callback)

    def end(self, outcome: Any = None) -> None:
        callbacks, self.callbacks = self.callbacks, []
        for callback in callbacks:
            callback(outcome)

    def cancel(self) -> None:
        self.cancelled = True


class FakeStream(FakeResult):
    """A streaming result: `give` makes items, `end` completes it; user code's errors come with the items."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.items: asyncio.Queue[Any] = asyncio.Queue()

    def to_object_ref(self) -> FakeResult:
        raise AssertionError("a stream has no object")

    def add_done_callback(self, callback: Any) -> None:
        self._on_completed(callback)

    def give(self, *items: Any) -> None:
        for item in items:
            self.items.put_nowait(item)

    def end(self, outcome: Any = None, *, raised: Exception | None = None) -> None:
        self.items.put_nowait(raised or outcome or StopAsyncIteration())
        super().end(outcome)

    async def __anext__(self) -> Any:
        item = await self.items.get()
        if isinstance(item, Exception):
            raise item
        return item

    def __next__(self) -> Any:
        item = self.items.get_nowait()
        if isinstance(item, StopAsyncIteration):
            raise StopIteration
        if isinstance(item, Exception):
            raise item
        return item


@dataclass
class FakeReplica:
    """A running replica that keeps what was sent to it."""

    name: str
    node_id: str = "node"
    max_ongoing_requests: int = 8
    sent: list[PendingRequest] = field(default_factory=list)
    results: list[FakeResult] = field(default_factory=list)
    make: Any = FakeResult
    queue_len: int = 0
    availability_zone: str | None = None
    multiplexed_model_ids: set[str] = field(default_factory=set)
    replica_metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def replica_id(self) -> ReplicaID:
        return ReplicaID(unique_id=self.name, deployment_id=DEPLOYMENT)

    def try_send_request(self, request: PendingRequest, with_rejection: bool) -> FakeResult:
        assert with_rejection
        self.sent.append(request)
        result = self.make()
        if isinstance(result, Exception):
            raise result
        self.results.append(result)
        return result

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.queue_len


def request(name: str = "r", method: str = "infer", **metadata: Any) -> PendingRequest:
    """A pending call of a method through a handle."""
    labels = RequestMetadata(request_id=name, internal_request_id=name, call_method=method, **metadata)
    return PendingRequest(args=[1], kwargs={}, metadata=labels)


def make_router(
    *replicas: FakeReplica, kind: type[PredictiveRouter] = PredictiveRouter, **config: Any
) -> PredictiveRouter:
    """A router over `replicas`; `config` are its sections."""
    router = kind(
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.REPLICA,
        self_node_id="node",
        use_replica_queue_len_cache=True,
    )
    router.initialize_state(config=config)
    router.update_replicas(list(replicas))
    return router


def table(version: int = 1, epoch: int = 1, age_s: float = 0.0, **rows: Any) -> RoutingTable:
    """A table of `name=share`, or `name=(share, capacity, mirror_fraction)`."""
    made = []
    for name, row in rows.items():
        share, capacity, mirror = row if isinstance(row, tuple) else (row, 1.0, 0.0)
        state = State.ACTIVE if share else State.SHADOWING
        made.append(TableRow(name, "node", state, share, capacity, 0.0, mirror, share * capacity))
    return RoutingTable("app/model", epoch, version, 1, tuple(made), age_s=age_s)
