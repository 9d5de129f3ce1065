"""The bound: our own pick, told by the scenario which node is bad from the instant it turns bad until it is well."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ray.serve.request_router import PendingRequest, RunningReplica

from bench.live.workload import bad_path
from serve_app.routing.request_router import Router
from shadecast.types import RoutingTable

_LOOK_S = 0.01


class OracleRouter(Router):
    """`PredictiveRouter` whose table gives replicas on bad nodes no share."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._bad: frozenset[str] = frozenset()
        self._looked_s = 0.0
        super().__init__(*args, **kwargs)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> Sequence[list[RunningReplica]]:
        """Look at what the scenario says, then choose as always."""
        self._look()
        return await super().choose_replicas(candidate_replicas, pending_request)

    def choose_at_once(self, pending_request: PendingRequest) -> RunningReplica | None:
        """Look at what the scenario says, then choose as always."""
        self._look()
        return super().choose_at_once(pending_request)

    def take_table(self, table: RoutingTable) -> None:
        """Take it with what the scenario says."""
        super().take_table(self._told(table))

    def _look(self) -> None:
        now_s = time.monotonic()
        if now_s - self._looked_s > _LOOK_S:
            self._looked_s = now_s
            with suppress(OSError, ValueError):
                bad = frozenset(json.loads(bad_path().read_text()))
                if bad != self._bad:
                    self._bad = bad
                    routes = self.calls.routes
                    if routes.table is not None:
                        routes.table = self._told(routes.table)
                        routes.lay_out()

    def _told(self, table: RoutingTable) -> RoutingTable:
        nodes = {r.replica_id.unique_id: r.node_id for r in self.calls.routes.replicas}
        told = tuple(
            replace(row, share=0.0, mirror_fraction=0.0)
            if nodes.get(row.replica_id) in self._bad
            else replace(row, share=1.0)
            for row in table.rows
        )
        return replace(table, rows=told)
