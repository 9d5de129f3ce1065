"""Where a router sends the requests of sessions: `shadecast.sessions`, fed with the router's tables.

All routers of a cluster place sessions alike, by one secret, so that no client can choose its replica.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection

from shadecast.config import Config
from shadecast.pick import PickTable, table_scores
from shadecast.sessions import SessionMap
from shadecast.types import RoutingTable, State

_SECRET_WAIT_S = 0.5


class SessionHomes:
    """One router's sessions. The map is made with the first request that has one."""

    def __init__(self, config: Config, deployment: str, now_s: float) -> None:
        self._config = config
        self._secret = deployment.encode()
        self._secret_known = asyncio.Event()
        self._born_s = now_s
        self._map: SessionMap | None = None

    @property
    def settled(self) -> bool:
        """Whether the secret is known, or is not waited for any more."""
        return self._secret_known.is_set()

    def use_secret(self, secret: bytes | None) -> None:
        """Place sessions by the cluster's secret from now on; None: it will not be known."""
        if secret is not None and secret != self._secret:
            self._secret = secret
            self._map = None
        self._secret_known.set()

    async def wait_for_secret(self, now_s: float) -> None:
        """In a router's first instants: sessions placed by another secret would not be where others place them."""
        left_s = self._born_s + _SECRET_WAIT_S - now_s
        if left_s > 0.0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._secret_known.wait(), left_s)
        self._secret_known.set()

    def forget(self) -> None:
        """Place all sessions anew."""
        self._map = None

    def update(self, picks: PickTable, table: RoutingTable | None, now_s: float) -> None:
        """Tell the sessions of a new table or membership."""
        if self._map is None:
            return
        rows = {row.replica_id: row for row in table.rows} if table is not None else {}
        weights = {
            replica_id: rows[replica_id].session_weight if replica_id in rows else 1.0
            for i, replica_id in enumerate(picks.ids)
            if picks.share[i] > 0.0
        }
        scores = table_scores(table) if table is not None else {}
        draining = [r for r in picks.ids if r in rows and rows[r].state is State.DRAINING]
        self._map.update(weights, scores, now_s, draining)

    def home(
        self, session_id: str, now_s: float, away: Collection[str], picks: PickTable, table: RoutingTable | None
    ) -> int:
        """Index of the replica that has the session, or stands in for one of `away`; -1 if none takes traffic."""
        if self._map is None:
            self._map = SessionMap(self._config.session, self._secret, self._config.trial.drain_s)
            self.update(picks, table, now_s)
        replica_id = self._map.lookup(session_id, now_s, away)
        return picks.index.get(replica_id, -1) if replica_id is not None else -1

    def destination(self, session_id: str) -> str | None:
        """Where the session will move to soon; None if it stays, or nobody knows it."""
        return self._map.destination(session_id) if self._map is not None else None
