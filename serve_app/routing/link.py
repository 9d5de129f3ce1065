"""Keeps a router in touch with the coordinator: a report each second, and a long poll for the next table."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import weakref
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError

from serve_app.coordinator import NAMESPACE, find_coordinator
from serve_app.ray_api import shared_secret
from shadecast.config import REPORT_S
from shadecast.errors import MessageError
from shadecast.messages import SCHEMA, check
from shadecast.tables import read_table

if TYPE_CHECKING:
    from serve_app.routing.request_router import Router

logger = logging.getLogger("ray.serve")

_LONG_POLL_S = 5.0
_TIMEOUT_S = 2.0
_SHUTDOWN_S = 5.0
"""Ray has shut down for sure after so long."""


async def keep_in_touch(router: weakref.ref[Router]) -> None:
    """Report and take tables until the router or Ray is gone. Never raises.

    A router without replicas says so once and is quiet then: Serve keeps the routers of applications that were deleted
    for as long as the process lives.

    Ray is asked for before every call, because a call on a process that has shut Ray down would start a new cluster.
    What it handed out is kept until it has shut down: to drop a call's object meanwhile ends the process (Ray 2.60).
    """
    link = _Link(router)
    known_secret = False
    loop = asyncio.get_running_loop()
    try:
        while ray.is_initialized() and (this := router()) is not None:
            if not known_secret:
                with contextlib.suppress(Exception):  # tried again
                    this.use_secret(await loop.run_in_executor(None, _cluster_secret))
                    known_secret = True
            await link.report(this)
            del this
            await asyncio.sleep(REPORT_S * random.uniform(0.95, 1.05))
        if link.holds_something and not ray.is_initialized():
            await asyncio.sleep(_SHUTDOWN_S)
    finally:
        if (this := router()) is not None:
            this.use_secret(None)
        link.close()


class _Link:
    """One router's connection to one coordinator after the other."""

    def __init__(self, router: weakref.ref[Router]) -> None:
        self._router = router
        self._coordinator: Any = None
        self._taken: Any = None
        """The last call's object."""
        self._poll: asyncio.Task[None] | None = None
        self._quiet = False
        self._warned = ""

    @property
    def holds_something(self) -> bool:
        """Whether something of Ray's is held."""
        return self._coordinator is not None or self._taken is not None

    def close(self) -> None:
        """Poll no more."""
        if self._poll is not None:
            self._poll.cancel()

    async def report(self, router: Router) -> None:
        """One report, if somebody is there to take it."""
        loop, empty = asyncio.get_running_loop(), not router.has_replicas()
        self._quiet = self._quiet and empty
        if self._quiet:
            return
        try:
            if self._coordinator is None:
                self._coordinator = await loop.run_in_executor(None, find_coordinator)
            if self._coordinator is None or not self._speaks_our_language():
                return
            if self._poll is None or self._poll.done():
                self._poll = loop.create_task(self._poll_tables(self._coordinator))
            self._taken = self._coordinator.report.remote(router.make_report())
            answer = check(await asyncio.wait_for(self._taken, _TIMEOUT_S), "answer")
            router.reported(int(answer.get("acknowledged", 0)), table_wanted=bool(answer.get("table_wanted")))
            self._quiet = empty
            if empty:
                self.close()
        except (RayActorError, TimeoutError) as error:
            self._coordinator = None
            logger.debug(f"shadecast: coordinator does not answer: {error}")
        except MessageError as error:
            self._warn(str(error))
        except Exception:
            self._coordinator = None
            logger.warning("shadecast: reporting failed; routing goes on without", exc_info=True)

    def _speaks_our_language(self) -> bool:
        """Whether the coordinator knows messages by name; that of Shadecast 0.1 does not."""
        if hasattr(self._coordinator, "report"):
            return True
        self._warn(
            f"the control plane is of Shadecast 0.1 (schema 1), this router speaks schema {SCHEMA}: it routes by power "
            "of two choices until you run `shadecast down` and `shadecast up` with the newer version"
        )
        self._coordinator = None
        return False

    def _warn(self, text: str) -> None:
        """Once for each thing."""
        if text != self._warned:
            self._warned = text
            logger.warning(f"shadecast: {text}")

    async def _poll_tables(self, coordinator: Any) -> None:
        """Take tables as they are published; ends with the coordinator that it was started for."""
        with contextlib.suppress(asyncio.CancelledError):
            with contextlib.suppress(RayActorError):
                built_on = True
                while ray.is_initialized() and (this := self._router()) is not None:
                    deployment, held = this.deployment, this.table if built_on else None
                    del this
                    version = (held.epoch, held.version) if held is not None else (0, 0)
                    asked = coordinator.table.remote(deployment, version, _LONG_POLL_S)
                    received = await asked
                    this = self._router()
                    if this is not None and received is not None:
                        built_on = await self._take(this, received)
                    del this
            if not ray.is_initialized():
                await asyncio.sleep(_SHUTDOWN_S)  # as `keep_in_touch` does, for what was asked last

    async def _take(self, router: Router, received: Any) -> bool:
        """Go by a table and the settings that come with it; False if it builds on another one than the router's."""
        try:
            found = check(received, "table")
            table = read_table(found, router.table)
        except MessageError as error:
            self._warn(str(error))
            await asyncio.sleep(REPORT_S)  # it would be sent again at once
            return False
        if "settings" in found:
            router.use_settings(bool(found.get("observing")), found["settings"])
        if table is not None:
            router.take_table(table)
        return table is not None


def _cluster_secret() -> bytes:
    """What session ids are hashed with, made by the first router of a cluster. Blocks: call it in a thread."""
    return shared_secret(b"session-secret", os.urandom(16), NAMESPACE)
