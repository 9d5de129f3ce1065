"""Keeps a router in touch with the coordinator: a report each second, and a long poll for the next table.

Standard library, ray and shadecast only, because it runs in users' processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from serve_app.coordinator import NAMESPACE, find_coordinator
from shadecast.types import RouterReport, RoutingTable

logger = logging.getLogger("ray.serve")

_LONG_POLL_S = 5.0
_TIMEOUT_S = 2.0
_SHUTDOWN_S = 5.0
"""Ray has shut down for sure after so long."""
_SECRET_KEY = b"session-secret"


class Linked(Protocol):
    """A router, as far as its link to the coordinator needs it."""

    deployment: str
    settings: Mapping[str, Any]
    """What the deployment says of the configuration; the coordinator reads it with each report."""
    report_s: float

    def has_replicas(self) -> bool:
        """Whether there is anything to route to."""
        ...

    def make_report(self) -> RouterReport:
        """Everything since the last report."""
        ...

    def reported(self, *, wants_table_back: bool) -> None:
        """The coordinator has taken a report; after a restart it asks for the table that the router holds."""
        ...

    def held_version(self) -> tuple[int, int]:
        """Epoch and version of the table that the router goes by."""
        ...

    def take_table(self, table: RoutingTable) -> None:
        """Go by this table if it is newer."""
        ...

    def use_secret(self, secret: bytes | None) -> None:
        """What the cluster's routers place sessions by; None if it will not be known."""
        ...


async def keep_in_touch(router: weakref.ref[Linked]) -> None:
    """Report and take tables until the router or Ray is gone. Never raises.

    A router without replicas says so once and is silent then: Serve keeps the routers of applications that were deleted
    for as long as the process lives.

    Ray is asked for before every call, because a call on a process that has shut Ray down would start a new cluster.
    What it handed out is kept until it has shut down: to drop a call's object meanwhile ends the process (Ray 2.60).
    """
    poll: asyncio.Task[Any] | None = None
    coordinator: Any = None
    taken: Any = None
    known_secret = silent = False
    loop = asyncio.get_running_loop()
    try:
        while ray.is_initialized() and (this := router()) is not None:
            period_s = this.report_s * random.uniform(0.95, 1.05)
            try:
                if not known_secret:
                    this.use_secret(await loop.run_in_executor(None, _cluster_secret))
                    known_secret = True
                empty = not this.has_replicas()
                silent = silent and empty
                if coordinator is None and not silent:
                    coordinator = await loop.run_in_executor(None, find_coordinator)
                if coordinator is not None and not silent:
                    if poll is None or poll.done():
                        poll = loop.create_task(_poll_tables(router, coordinator))
                    taken = coordinator.report_router.remote(this.make_report(), this.settings)
                    this.reported(wants_table_back=bool(await asyncio.wait_for(taken, _TIMEOUT_S)))
                    silent = empty
                    if silent:
                        poll.cancel()
            except (RayActorError, TimeoutError) as error:
                coordinator = None
                logger.debug(f"shadecast: coordinator does not answer: {error}")
            except Exception:
                coordinator = None
                logger.warning("shadecast: reporting failed; routing goes on without", exc_info=True)
            del this
            await asyncio.sleep(period_s)
        if (coordinator is not None or taken is not None) and not ray.is_initialized():
            await asyncio.sleep(_SHUTDOWN_S)
    finally:
        if (this := router()) is not None:
            this.use_secret(None)
        if poll is not None:
            poll.cancel()


async def _poll_tables(router: weakref.ref[Linked], coordinator: Any) -> None:
    """Take tables as they are published; ends with the coordinator that it was started for."""
    with contextlib.suppress(asyncio.CancelledError):
        with contextlib.suppress(RayActorError):
            while ray.is_initialized() and (this := router()) is not None:
                deployment, seen = this.deployment, this.held_version()
                del this
                asked = coordinator.wait_table.remote(deployment, seen, _LONG_POLL_S)
                table = await asked
                this = router()
                if this is not None and table is not None:
                    this.take_table(table)
                del this
        if not ray.is_initialized():
            await asyncio.sleep(_SHUTDOWN_S)  # as `keep_in_touch` does, for what was asked last


def _cluster_secret() -> bytes:
    """What session ids are hashed with, made by the first router of a cluster. Blocks: call it in a thread."""
    _internal_kv_put(_SECRET_KEY, os.urandom(16), overwrite=False, namespace=NAMESPACE.encode())
    secret: bytes = _internal_kv_get(_SECRET_KEY, namespace=NAMESPACE.encode())
    return secret
