"""Where sessions live: a router's part of `shadecast.sessions`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection
from typing import Any

from serve_app.shadow import is_of_copy
from shadecast.config import Config
from shadecast.pick import PickTable
from shadecast.sessions import SessionMap
from shadecast.types import RoutingTable

_SECRET_WAIT_S = 0.5


class Sessions:
    """`shadecast.sessions`, fed with the router's tables. The map is made with the first request that has a session.

    All routers of a cluster place sessions alike, by one secret, so that no client can choose its replica.
    """

    def __init__(self, config: Config, deployment: str) -> None:
        self._config = config
        self._secret = deployment.encode()
        self._secret_known = asyncio.Event()
        self._born_s = time.monotonic()
        self._map: SessionMap | None = None
        self.on_moved: Callable[[Any, str, str], object] = lambda _request, _before, _after: None

    def configure(self, config: Config) -> None:
        """Go by other settings; sessions stay where they are."""
        self._config = config
        if self._map is not None:
            self._map.configure(config.session, config.trial.drain_s)

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

    async def wait_for_secret(self) -> None:
        """In a router's first instants: sessions placed by another secret would not be where others place them."""
        left_s = self._born_s + _SECRET_WAIT_S - time.monotonic()
        if left_s > 0.0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._secret_known.wait()
        self._secret_known.set()

    def forget(self) -> None:
        """Place all sessions anew."""
        self._map = None

    def update(self, picks: PickTable, table: RoutingTable | None) -> None:
        """Tell the sessions of a new table or membership."""
        if self._map is not None:
            self._map.take(picks, table, time.monotonic())

    def find(self, metadata: Any, away: Collection[str], picks: PickTable, table: RoutingTable | None) -> int:
        """Index of the replica that has the session, or stands in for one of `away`; -1 if none takes traffic."""
        if self._map is None:
            self._map = SessionMap(self._config.session, self._secret, self._config.trial.drain_s)
            self._map.on_moved = self.on_moved
            self.update(picks, table)
        find = self._map.peek if is_of_copy(metadata) else self._map.lookup
        replica_id = find(metadata.session_id, time.monotonic(), away, metadata)
        return picks.index.get(replica_id, -1) if replica_id is not None else -1
