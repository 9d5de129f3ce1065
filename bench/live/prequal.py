"""Prequal as a Ray Serve router (Wydrowski et al., NSDI 2024), for comparison: the rule is the simulator's.

Probes are calls for a replica's queue length, sent with each request and never waited for; the latency by requests in
flight is what this router has measured, which with one router is what a replica would have recorded.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)

from bench.simulate.arms.prequal import Prequal, _LatencyByRif, _Probe

_PROBE_TIMEOUT_S = 3.0


class _Rule(Prequal):
    """The hot-cold rule over real replicas: probes are sent by the router, answers come back through `answered`."""

    def __init__(self, send: Any) -> None:
        self._send = send
        self.members: list[int] = []
        self.start(SimpleNamespace(routers=1, now_s=0.0, members=self.members, replicas=[]), None, random.Random())  # type: ignore[arg-type]

    def _probe(self, router: int, count: int) -> None:
        for replica in self.rng.sample(self.sim.members, min(count, len(self.sim.members))):
            self._send(replica)

    def answered(self, replica: int, rif: int, now_s: float) -> None:
        """A probe's answer."""
        n = max(len(self.sim.members), 1)
        spare = (1.0 - min(self.pool_size / n, 1.0)) * self.probes_per_query - self.removals_per_query
        uses = max(1, round((1.0 + self.reuse_delta) / spare)) if spare > 0.0 else self.pool_size
        latency_s = self._latency[replica].estimate(rif + 1, now_s)
        self._pools[0].append(_Probe(replica, rif, latency_s, now_s, uses))
        self._rifs[0].append(rif)
        self._seen[0] += 1
        del self._pools[0][: -self.pool_size]


class PrequalRouter(RequestRouter):
    """Probes of requests in flight and latency; the coldest probe with least latency wins."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rule = _Rule(self._send_probe)
        self._known: list[ReplicaID] = []
        self._probes: set[asyncio.Task[None]] = set()

    def initialize_state(self, **_: Any) -> None:
        """Nothing to set."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Indices are given once; probes of replicas that are gone are dropped."""
        super().update_replicas(replicas)
        rule = self._rule
        for replica in replicas:
            if replica.replica_id not in self._known:
                self._known.append(replica.replica_id)
                rule._latency.append(_LatencyByRif())
        rule.sim.members[:] = [i for i, known in enumerate(self._known) if known in self._replicas]
        alive = set(rule.sim.members)
        rule._pools[0] = [probe for probe in rule._pools[0] if probe.replica in alive]

    def _send_probe(self, index: int) -> None:
        replica = self._replicas.get(self._known[index])
        if replica is not None:
            task = self._event_loop.create_task(self._ask(index, replica))
            self._probes.add(task)
            task.add_done_callback(self._probes.discard)

    async def _ask(self, index: int, replica: RunningReplica) -> None:
        with suppress(Exception):  # a replica that does not answer has no probe in the pool
            rif = await asyncio.wait_for(replica.get_queue_len(deadline_s=_PROBE_TIMEOUT_S), _PROBE_TIMEOUT_S)
            if index in self._rule.sim.members:
                self._rule.answered(index, int(rif), time.monotonic())

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> Sequence[list[RunningReplica]]:
        """The rule's choice alone; full replicas are backed off from, as everywhere in Serve."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        self._rule.sim.now_s = time.monotonic()
        index = self._rule.pick(SimpleNamespace(router=0))  # type: ignore[arg-type]
        chosen = self._replicas.get(self._known[index]) if index >= 0 else None
        return [[chosen]] if chosen is not None else []

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """Record the latency under the requests in flight at arrival, when it ends well."""
        if replica_id not in self._known:
            return
        started_s, index = time.monotonic(), self._known.index(replica_id)
        rif = max(int(self._replica_queue_len_cache.get(replica_id) or 1), 1)

        def done(outcome: Any) -> None:
            took_s = time.monotonic() - started_s
            if not isinstance(outcome, BaseException):
                self._event_loop.call_soon_threadsafe(
                    self._rule._latency[index].record, rif, took_s, started_s + took_s
                )

        with suppress(Exception):
            result.add_done_callback(done)
